"""Cut a model to a vocabulary: every vocabulary-sized tensor sliced, every id in its configs renumbered.

    student = slice_model(teacher, vocabulary)      # a new model of the same class
    as_wide = expand_model(student, vocabulary)     # and back: a row for each of the teacher's tokens again

Which axes belong to the vocabulary is found by building the config at two sizes on the meta device and comparing
shapes, so that any head of any architecture is cut by the same rule.
"""

import copy
import inspect
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glmd.errors import ModelError
from glmd.vocabulary import Vocabulary

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
    import transformers

    architecture = (config.architectures or [None])[0]
    model_class: Any = getattr(transformers, architecture or "", None)
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


class Expansion:
    """A vocabulary read backwards: each source token has the row of its target, and student ids become source ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.kept_ids, self.token_map = vocabulary.token_map, vocabulary.kept_ids
        self.size, self.source_size = vocabulary.source_size, vocabulary.size

    def is_kept(self, _: int) -> bool:
        return True


Rows = Vocabulary | Expansion


def expand_model(model: "nn.Module", vocabulary: Vocabulary) -> "nn.Module":
    """A compressed model with a row for each source token again: a dropped one has its target's.

    Reads source ids as `model` reads their targets, so that the source tokenizer serves. Raises ModelError for a model
    that predicts words: it would predict each as often as it has rows.
    """
    if model.get_output_embeddings() is not None:  # type: ignore[operator]
        raise ModelError(
            f"{type(model).__name__} predicts words, and with a row for each of the source's it would predict dropped "
            "ones too; only models without a word head can be expanded"
        )
    return slice_model(model, Expansion(vocabulary))


def slice_model(model: "nn.Module", vocabulary: Rows) -> "nn.Module":
    """A new model of the same class with the kept rows only, in the same order. `model` is not touched.

    Its logits are those of `model` on the kept tokens, for inputs of kept tokens. Ids in the configuration and the
    generation configuration are renumbered; dtype, device, tied weights, training mode and requires_grad are kept.
    """
    import torch

    _refuse_unsliceable(model, vocabulary)
    config: Any = model.config
    axes = vocabulary_axes(config, type(model))
    rows = _config_rows(config)
    if rows > vocabulary.source_size:
        logger.info("%d rows beyond the tokenizer are dropped", rows - vocabulary.source_size)
    new_config = renumber_config(config, vocabulary)
    _refuse_moved_positions(model, axes, config, new_config)
    tensors = {name: _kept_rows(tensor, axes.get(name), vocabulary) for name, tensor in model.state_dict().items()}
    # Weights are drawn and then overwritten; the caller's random numbers must not depend on it.
    with torch.random.fork_rng(devices=[]), torch.device(tensors[next(iter(axes))].device):
        sliced = type(model)(new_config)
    sliced.load_state_dict(tensors, strict=True, assign=True)
    sliced.tie_weights()  # type: ignore[operator]
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
        raise ModelError(f"{name} is quantised or carries adapters; slice the plain model")
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


def _refuse_moved_positions(model: "nn.Module", axes: Mapping[str, int], config: Any, new_config: Any) -> None:
    """RoBERTa and its kin count positions from pad_token_id + 1: a pad token that moves would shift them all."""
    old, new = (getattr(c.get_text_config(), "pad_token_id", None) for c in (config, new_config))
    if old == new:
        return
    for name, module in model.named_modules():
        holds_tokens = f"{name}.weight" in axes
        if (
            getattr(module, "padding_idx", None) is not None
            and not holds_tokens
            and "osition" in name + type(module).__name__
        ):
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


def _config_rows(config: Any) -> int:
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int) or rows < 1:
        raise ModelError(f"{type(config).__name__} has no vocab_size; its vocabulary cannot be found")
    return rows


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


def _set_rows(config: Any, rows: int) -> None:
    """Set vocab_size wherever the configuration or a part of it has the same one."""
    old = _config_rows(config)
    for part in _config_parts(config):
        for name in ("vocab_size", "decoder_vocab_size"):
            if getattr(part, name, None) == old:
                setattr(part, name, rows)


def _config_parts(config: Any) -> list[Any]:
    """The configuration itself and every configuration inside it."""
    from transformers import PreTrainedConfig

    parts = [config]
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            parts += _config_parts(value)
    return parts


# Fields that hold one id or a list of ids of the text vocabulary.
_ID_FIELD = re.compile(
    "(pad|bos|eos|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos|blank|eod|question|system|user|assistant"
    "|prev_sot|no_timestamps|image|video|audio|timestamp|bo[ia]|eo[ia]|(image|video|vision|audio)_(start|end|bos|eos|pad))"
    "_token_(ids?|index|idx)"
    "|(pad|bos|eos|unk|mask)_index"  # XLM's
)
# Fields that look like ids but are none of the above: to copy or to map them unread would be a guess.
_ID_LIKE = re.compile(
    "(?!.*layer).*(token_ids?|token_index|token_idx|tokens_ids?|(^|_)(bos|eos|pad|sep|cls|mask|unk|start|end|newline|patch)_(id|index))"
    "|(lang|task)_to_id"
)
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def renumber_config(config: Any, vocabulary: Rows) -> Any:
    """A copy of a model's configuration with vocab_size K and every token id, its parts' too, as a student id.

    Raises ModelError naming the field for an id that is dropped or out of range, and for a field that looks like
    an id but is not known: a stale id is wrong without a sound.
    """
    renumbered = copy.deepcopy(config)
    for part in _config_parts(renumbered):
        _renumber_fields(part, vocabulary, type(part).__name__)
        specific: dict[str, Any] = getattr(part, "task_specific_params", None) or {}
        for task, fields in specific.items():
            if isinstance(fields, dict):
                specific[task] = {
                    name: _renumber_field(name, value, vocabulary, f"{type(part).__name__}.task_specific_params.{task}")
                    for name, value in fields.items()
                }
    _set_rows(renumbered, vocabulary.size)
    return renumbered


def renumber_generation_config(generation_config: Any, vocabulary: Rows) -> Any:
    """A copy of a generation configuration with student ids. Suppressed tokens that no longer exist are left out."""
    renumbered = copy.deepcopy(generation_config)
    _renumber_fields(renumbered, vocabulary, type(renumbered).__name__)
    return renumbered


def token_id_fields(holder: Any) -> list[tuple[str, int]]:
    """(field, id) of every token id in a model's configuration and its parts, or in a generation configuration."""
    parts = _config_parts(holder) if hasattr(holder, "get_text_config") else [holder]
    found = []
    for part in parts:
        for name, value in vars(part).items():
            if _ID_FIELD.fullmatch(name.removeprefix("_")):
                ids = value if isinstance(value, (list, tuple)) else [value]
                found += [(f"{type(part).__name__}.{name}", i) for i in ids if isinstance(i, int)]
    return found


def named_ids(*holders: Any) -> set[int]:
    """The token ids that a model's configuration, and its generation configuration if there is one, name."""
    return {i for holder in holders if holder is not None for _, i in token_id_fields(holder)}


def _renumber_fields(holder: Any, vocabulary: Rows, place: str) -> None:
    for name, value in list(vars(holder).items()):
        new = _renumber_field(name, value, vocabulary, place)
        if new is not value:
            setattr(holder, name, new)


def _renumber_field(name: str, value: Any, vocabulary: Rows, place: str) -> Any:
    """The value of one field in student ids; the value itself where it holds no ids."""
    place = f"{place}.{name}"
    if value is None or isinstance(value, bool):
        return value
    if name in _SUPPRESSED:
        # A dropped token cannot be produced: mapped onto another, it would forbid that one.
        return type(value)(_student_id(i, vocabulary, place) for i in value if _is_kept(i, vocabulary, place))
    if name in ("bad_words_ids", "sequence_bias"):
        return _renumber_sequences(value, vocabulary, place)
    if name == "forced_decoder_ids":
        return [[position, None if i is None else _student_id(i, vocabulary, place)] for position, i in value]
    if name == "force_words_ids" or _ID_FIELD.fullmatch(name.removeprefix("_")):
        return _renumber_nested(value, vocabulary, place)
    if _ID_LIKE.fullmatch(name):
        raise ModelError(f"{place} = {value!r} looks like a token id, but glmd does not know it; set it to None first")
    return value


def _renumber_nested(value: Any, vocabulary: Rows, place: str) -> Any:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return type(value)(_renumber_nested(item, vocabulary, place) for item in value)
    return _student_id(value, vocabulary, place)


def _renumber_sequences(value: Any, vocabulary: Rows, place: str) -> Any:
    """Token sequences, with a bias each or without. A sequence with a dropped token cannot occur and is left out."""
    if isinstance(value, dict):
        return dict(_renumber_sequences(list(value.items()), vocabulary, place))
    kept = []
    for entry in value:
        has_bias = len(entry) == 2 and isinstance(entry[0], (list, tuple))
        sequence = entry[0] if has_bias else entry
        if not all(_is_kept(i, vocabulary, place) for i in sequence):
            logger.warning("%s: %s is left out, it holds a dropped token", place, list(sequence))
            continue
        ids = type(sequence)(_student_id(i, vocabulary, place) for i in sequence)
        kept.append(type(entry)((ids, entry[1])) if has_bias else ids)
    return kept


def _is_kept(source_id: Any, vocabulary: Rows, place: str) -> bool:
    if isinstance(source_id, bool) or not isinstance(source_id, int):
        raise ModelError(f"{place}: {source_id!r} is no token id")
    if not 0 <= source_id < vocabulary.source_size:
        raise ModelError(
            f"{place} = {source_id} is no id of the tokenizer (0 to {vocabulary.source_size - 1}); "
            "set it to None or to the tokenizer's id first"
        )
    return vocabulary.is_kept(source_id)


def _student_id(source_id: Any, vocabulary: Rows, place: str) -> int:
    if not _is_kept(source_id, vocabulary, place):
        raise ModelError(
            f"{place} = {source_id} is a dropped token; keep it through keep_words, or set the field to None"
        )
    return int(vocabulary.token_map[source_id])
