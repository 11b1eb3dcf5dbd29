"""Cut a model to a vocabulary: every vocabulary-sized tensor sliced, every id in its configs renumbered.

    student = slice_model(teacher, vocabulary)      # a new model of the same class
    as_wide = expand_model(student, vocabulary)     # and back: a row for each of the teacher's tokens again

Which axes belong to the vocabulary is found by building the config at two sizes on the meta device and comparing
shapes, so that any head of any architecture is cut by the same rule.
"""

import copy
import inspect
import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from glmd.errors import ModelError
from glmd.vocabulary.renumbering import (
    Expansion,
    Rows,
    _config_parts,
    _config_rows,
    _set_rows,
    named_ids,
    renumber_config,
    renumber_generation_config,
)
from glmd.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


def vocabulary_axes(config: Any, model_class: type) -> dict[str, int]:
    """Name of each parameter and saved buffer with a vocabulary axis -> that axis.

    Two models that differ only in vocabulary size are laid out on the meta device, where they cost nothing; the
    axes whose lengths differ are the vocabulary's.
    """
    _refuse_second_tables(config, model_class)
    rows = _config_rows(config)
    # Larger, not smaller: a smaller one could fall below a pad id.
    shapes = [_shapes_on_meta(config, model_class, size) for size in (rows, rows + 64)]
    axes = {}
    for name, shape in shapes[0].items():
        differing = [axis for axis, (a, b) in enumerate(zip(shape, shapes[1][name], strict=True)) if a != b]
        if len(differing) > 1 or (differing and shape[differing[0]] != rows):
            raise ModelError(
                f"{model_class.__name__}: {name} {shape} depends on the vocabulary otherwise than by one axis"
            )
        if differing:
            axes[name] = differing[0]
    if not axes:
        raise ModelError(f"{model_class.__name__} has no tensor that depends on vocab_size")
    return axes


def parameters_by_vocabulary(config: Any, vocab_size: int) -> tuple[int, int]:
    """Parameters in all, and in tensors with a vocabulary axis, of the config's own class with `vocab_size` rows.

    Tied ones count once. Raises ModelError for an architecture that transformers has not.
    """
    import torch

    architecture = (config.architectures or [None])[0]
    model_class: Any = model_class_of(config)
    if model_class is None:
        raise ModelError(f"the config names the architecture {architecture!r}, which transformers has not")
    axes = vocabulary_axes(config, model_class)
    rows = _config_rows(config)
    with torch.device("meta"):
        parameters = dict(model_class(config).named_parameters())
    total = sum(tensor.numel() for tensor in parameters.values())
    rated = sum(tensor.numel() for name, tensor in parameters.items() if name in axes)
    resized = rated // rows * vocab_size
    return total - rated + resized, resized


def own_matrices(model: "nn.Module") -> set[str]:
    """Names of weights that the class ties to others by its config, and that are matrices of their own in this model.

    Of T5 1.1 and its kin the config cannot say that the output embeddings are; transformers goes by what a file holds.
    """
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
    weights = dict(model.named_parameters(remove_duplicate=False))
    return {name for name, other in tied.items() if weights.get(name) is not weights.get(other)}


def tie_weights(model: "nn.Module", own: Collection[str] = ()) -> None:
    """Tie what a model's config says is one, but for some weights that are matrices of their own."""
    import torch

    kept = {name: model.get_parameter(name) for name in own}
    model.tie_weights()  # type: ignore[operator]
    for name, parameter in kept.items():
        if any(parameter is each for key, each in model.named_parameters(remove_duplicate=False) if key != name):
            parameter = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
        model.all_tied_weights_keys.pop(name, None)  # type: ignore[union-attr,operator]


def model_class_of(config: Any) -> Any:
    """The class of the architecture that a config names, of transformers or registered with it; None for another."""
    import transformers

    name = (config.architectures or [""])[0]
    registered = transformers.AutoModelForMaskedLM._model_mapping._extra_content.get(type(config))
    return registered if getattr(registered, "__name__", "") == name else getattr(transformers, name or "", None)


def expand_model(model: "nn.Module", vocabulary: Vocabulary) -> "nn.Module":
    """A compressed model with a row for each source token again: a dropped one has its target's.

    Reads source ids as `model` reads their targets, so that the source tokenizer serves. Raises ModelError for a model
    that predicts tokens: it would predict each as often as it has rows.
    """
    if model.get_output_embeddings() is not None:  # type: ignore[operator]
        raise ModelError(
            f"{type(model).__name__} predicts tokens, and with a row for each of the source's it would predict dropped "
            "ones too; only models without a word head can be expanded"
        )
    return slice_model(model, Expansion(vocabulary))


def slice_model(model: "nn.Module", vocabulary: Rows) -> "nn.Module":
    """A new model of the same class with the kept rows only, in the same order. `model` is not touched.

    Its logits are those of `model` on the kept tokens, for inputs of kept tokens. Ids in the configuration and the
    generation configuration are renumbered; dtype, device, tied weights, training mode and requires_grad are kept.
    """
    import torch
    from transformers.initialization import no_init_weights

    _refuse_unsliceable(model, vocabulary)
    config: Any = model.config
    axes = vocabulary_axes(config, type(model))
    rows = _config_rows(config)
    if rows > vocabulary.source_size:
        logger.info("%d rows beyond the tokenizer are dropped", rows - vocabulary.source_size)
    new_config = renumber_config(config, vocabulary)
    _refuse_moved_positions(model, axes, config, new_config)
    tensors = {name: _kept_rows(tensor, axes.get(name), vocabulary) for name, tensor in model.state_dict().items()}
    # No weights are drawn that are then replaced. What draws all the same must not change the caller's random numbers.
    device = torch.device(tensors[next(iter(axes))].device)
    with torch.random.fork_rng(devices=[]), no_init_weights(), device:
        sliced = type(model)(new_config)
    sliced.load_state_dict(tensors, strict=True, assign=True)
    tie_weights(sliced, own_matrices(model))
    for name, tensor in sliced.state_dict().items():
        if not torch.equal(tensor, tensors[name]):
            raise ModelError(f"{type(model).__name__}: {name} is tied by the configuration but not in the model")
    _copy_state(model, sliced)
    if getattr(model, "generation_config", None) is not None:
        sliced.generation_config = renumber_generation_config(model.generation_config, vocabulary)
    return sliced


def _refuse_unsliceable(model: Any, vocabulary: Rows) -> None:
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{name} is not a transformers model; unwrap it first")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{name} is quantized or carries adapters; slice the plain model")
    rows = _config_rows(model.config)
    embedding_rows = next(model.get_input_embeddings().parameters()).shape[0]
    if embedding_rows != rows:
        raise ModelError(f"{name}: config.vocab_size is {rows}, the embedding has {embedding_rows} rows")
    if rows < vocabulary.source_size:
        raise ModelError(
            f"{name} has {rows} rows, the vocabulary maps {vocabulary.source_size} tokens; they do not match"
        )


def _kept_rows(tensor: Any, axis: int | None, vocabulary: Rows) -> Any:
    import torch

    if axis is None:
        return tensor.clone()
    return tensor.index_select(axis, torch.tensor(vocabulary.kept_ids, device=tensor.device))


def _copy_state(model: "nn.Module", sliced: "nn.Module") -> None:
    """What a state dict does not hold: requires_grad, training mode, unsaved buffers (rotary frequencies)."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, parameter in sliced.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trainable[name])
    training = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in sliced.named_modules(remove_duplicate=False):
        module.training = training[name]
    saved = set(model.state_dict())
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in saved:
            owner, _, leaf = name.rpartition(".")
            setattr(sliced.get_submodule(owner), leaf, buffer.clone())


def ids_to_keep(config: Any, generation_config: Any | None = None) -> set[int]:
    """The source ids that a student must have, whatever the text says: those that its configs name, and in a model that
    counts positions from its pad token all before that one, as it could not move."""
    import torch

    pad = getattr(config.get_text_config(), "pad_token_id", None)
    model_class, before = model_class_of(config), 0
    if isinstance(pad, int) and pad > 0 and model_class is not None:
        axes = vocabulary_axes(config, model_class)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            before = pad if _counted_from_padding(model_class(config), axes) else 0
    return named_ids(config, generation_config) | set(range(before))


def _counted_from_padding(model: "nn.Module", axes: Mapping[str, int]) -> str | None:
    """The name of the table of positions in which a model counts from its pad token, as RoBERTa and its kin do."""
    for name, module in model.named_modules():
        has_padding = getattr(module, "padding_idx", None) is not None and f"{name}.weight" not in axes
        if has_padding and "osition" in name + type(module).__name__:
            return name
    return None


def _refuse_moved_positions(model: "nn.Module", axes: Mapping[str, int], config: Any, new_config: Any) -> None:
    """A pad token that moves would shift all positions that are counted from it."""
    old, new = (getattr(c.get_text_config(), "pad_token_id", None) for c in (config, new_config))
    if old != new and (name := _counted_from_padding(model, axes)) is not None:
        raise ModelError(
            f"{type(model).__name__}: {name} counts positions from pad_token_id + 1, and the pad token would move "
            f"from {old} to {new}; keep all tokens below it"
        )


def _shapes_on_meta(config: Any, model_class: Any, rows: int) -> dict[str, tuple[int, ...]]:
    import torch

    config = copy.deepcopy(config)
    _set_rows(config, rows)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}


def _refuse_second_tables(config: Any, model_class: Any) -> None:
    """Refuse tables of tokens besides the one of vocab_size: cut alone, it would leave their ids behind.

    A table whose ids are an input of their own (token_type_ids, entity_ids, input_shape_ids) is none of tokens.
    """
    forwards = [vars(each)["forward"] for each in model_class.__mro__ if "forward" in vars(each)]
    inputs = {name for forward in forwards for name in inspect.signature(forward).parameters}
    for part in _config_parts(config):
        shared = getattr(part, "share_encoder_decoder_embeddings", False) and part.decoder_vocab_size == part.vocab_size
        known = ("vocab_size", *(("decoder_vocab_size",) if shared else ()))
        for name, value in vars(part).items():
            if "vocab_size" in name and name not in known and isinstance(value, int):
                of_other_ids = any(each.endswith(name.replace("vocab_size", "ids")) for each in inputs)
                if not of_other_ids:
                    found = f"{type(part).__name__}.{name} = {value}"
                    raise ModelError(f"{found} is a second table of tokens; models with two are not supported yet")
