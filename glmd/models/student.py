"""Make a student: the teacher's architecture, or one of narrow embeddings, with fewer layers and fewer tokens.

    student = build_student(teacher, vocabulary, StudentConfig(num_hidden_layers=6), seed=0)

The result is a stock model with `vocab_size` of the kept vocabulary.
"""

import copy
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from glmd.config import StudentConfig
from glmd.errors import ConfigError, ModelError, disk_error, suggestion
from glmd.models.copied_layers import OTHER_LAYERS, prove_copied_layers
from glmd.models.factorized_embeddings import check_narrow, copy_around_layers, narrow_config
from glmd.models.heads import backbone_prefix
from glmd.models.layers import decoder_depth_name, depths, layer_indices, layer_stacks
from glmd.models.loading import base_class
from glmd.models.probes import prove_model
from glmd.vocabulary.slicing import own_matrices, slice_model, tie_weights
from glmd.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
Chosen = tuple[list[int], ...]  # the teacher's layer of each of the student's; of an encoder-decoder those of each half


def build_student(teacher: Any, vocabulary: Vocabulary, config: StudentConfig, *, seed: int) -> Any:
    """A student for `teacher`, a Hugging Face model; the teacher is not changed.

    With `initialization: scratch` every weight is drawn from `seed`. Otherwise the chosen layers, the kept rows of
    the embeddings and all else outside the layers are copied, so that a student with every layer and every token is
    the teacher; of a narrow `architecture` the layers, and what stands around them as nearly as it can. Raises
    ConfigError where a changed width makes that impossible.
    """
    # Every token kept is not every row: a teacher may have rows beyond its tokenizer.
    is_whole = vocabulary.is_identity and vocabulary.size == teacher.config.vocab_size
    sliced = teacher if is_whole else slice_model(teacher, vocabulary)
    chosen = chosen_layers(config, teacher.config)
    torch.manual_seed(seed)
    model_config = student_model_config(sliced.config, config)
    if config.architecture is None:
        student = type(teacher)(model_config)
    else:
        student = base_class(model_config).from_config(model_config)
    own = own_matrices(teacher) if config.architecture is None else ()
    tie_weights(student, own)
    student.to(torch.float32)
    if getattr(sliced, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(sliced.generation_config)
    if chosen is not None:
        _copy_weights(student, sliced, chosen, config.config)
        if config.architecture is not None:
            copy_around_layers(student, sliced)
    tie_weights(student, own)
    if chosen is not None:
        _prove_copy(student, sliced, chosen, config.config)
    prove_model(student)
    return student


def student_model_config(teacher_config: Any, config: StudentConfig) -> Any:
    """The teacher's config with the student's changes. Raises ConfigError for a field the architecture has not."""
    architecture, chosen = config.architecture, chosen_layers(config, teacher_config)
    result = copy.deepcopy(teacher_config) if architecture is None else narrow_config(teacher_config, architecture)
    known = set(result.to_dict()) | set(getattr(result, "attribute_map", {}))
    depth = {getattr(result, "attribute_map", {}).get("num_hidden_layers"): "num_hidden_layers"}
    depth |= {decoder_depth_name(result): "num_decoder_layers"} if len(depths(result)) > 1 else {}
    for key, value in config.config.items():
        if key in depth:
            raise ConfigError(f"student.config.{key} is set by glmd; give student.{depth[key]}")
        if key not in known:
            hint = "; electra and mobilebert have it: student.architecture" if key == "embedding_size" else ""
            raise ConfigError(f"student.config.{key} is unknown to {result.model_type}{hint or suggestion(key, known)}")
        if key.endswith("_token_id"):
            raise ConfigError(f"student.config.{key} is set by glmd; remove it")
        try:
            setattr(result, key, value)
        except Exception as error:  # the config's own checks raise classes of their own
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"student.config.{key}: {value!r} does not fit ({reason})") from None
    if hasattr(result, "true_hidden_size"):  # MobileBERT's; follows from the others, but not when they are changed
        result.true_hidden_size = result.intra_bottleneck_size if result.use_bottleneck else result.hidden_size
    if architecture is not None:
        check_narrow(result, teacher_config, copies=chosen is not None)
    count, *of_decoder = student_depths(config, teacher_config)
    name_of_decoders = decoder_depth_name(result) if of_decoder else ""
    given = {*config.config, name_of_decoders}
    _choose_settings(result, count, None if chosen is None else chosen[0], given=given)
    if of_decoder:
        setattr(result, name_of_decoders, of_decoder[0])
    result.dtype = torch.float32
    return result


def _choose_settings(config: Any, num_layers: int, chosen: list[int] | None, *, given: set[str]) -> None:
    """Give `config` its number of layers, and of each list with a setting for every layer those of the chosen ones.

    Of an encoder-decoder the encoder's. given: fields that are as they should be.
    """
    total, own = config.num_hidden_layers, vars(PreTrainedConfig()).keys() | given
    places = chosen or list(range(min(num_layers, total)))
    # A list with an entry for each layer, and a mapping from some layers' numbers to what is different in them.
    values = {name: value for name, value in {**config.to_dict(), **vars(config)}.items() if value and name not in own}
    lists = {name: value for name, value in values.items() if isinstance(value, (list, tuple)) and len(value) == total}
    mappings = {name: value for name, value in values.items() if _is_by_layer(value, total)}
    if (lists or mappings) and num_layers > total:
        raise ConfigError(f"student.num_hidden_layers: {num_layers} is more than the teacher's {total} layers")
    try:
        for name, value in lists.items():
            setattr(config, name, type(value)(value[i] for i in places))
        for name in mappings:
            setattr(config, name, None)
        if num_layers != total:
            # A decoder with the config of an encoder-decoder has its number in a field of its own.
            for name, value in list(vars(config).items()):
                if re.fullmatch("(.*_)?layers", name) and type(value) is int and value == total and name not in given:
                    setattr(config, name, num_layers)
            config.num_hidden_layers = num_layers
        for name, value in mappings.items():
            of_layer = {int(key): each for key, each in value.items()}
            setattr(config, name, {i: of_layer[j] for i, j in enumerate(places) if j in of_layer})
    except Exception as error:  # Funnel's number of layers follows from its blocks
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"student.num_hidden_layers: {type(config).__name__} does not take it ({reason})") from None


def _is_by_layer(value: Any, total: int) -> bool:
    return isinstance(value, dict) and all(str(key).isdigit() and int(key) < total for key in value)


def saved_and_reopened(config: Any) -> Any:
    """A student's config as its folder will give it. Raises ConfigError where it is another, or cannot be."""
    name = type(config).__name__
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            again = type(config).from_pretrained(folder)
    except Exception as error:  # the checks of configs raise classes of their own
        if disk_error(error):
            raise
        reason = " ".join(str(error).split())[-300:]
        raise ConfigError(
            f"student: a {name} with these changes and {config.num_hidden_layers} layers cannot be saved and opened "
            f"again ({reason}); set the field that it names in student.config, or keep all layers"
        ) from None
    before, after = (_own_fields(json.loads(each.to_json_string(use_diff=False))) for each in (config, again))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    if changed:
        raise ConfigError(
            f"student: {name}.{changed[0]} is {before.get(changed[0])!r:.80} and comes back from its file as "
            f"{after.get(changed[0])!r:.80}; set it in student.config"
        )
    return again


def student_depths(config: StudentConfig, teacher_config: Any) -> tuple[int, ...]:
    """How many layers the student has; of an encoder-decoder those of either half.

    Raises ConfigError for settings of a decoder that is none beside an encoder.
    """
    total, *of_decoder = depths(teacher_config)
    count = config.num_hidden_layers or total
    if of_decoder:
        return count, config.num_decoder_layers or config.num_hidden_layers or of_decoder[0]
    for name in ("num_decoder_layers", "decoder_initialization"):
        if getattr(config, name) is not None:
            raise ConfigError(f"student.{name} has no effect: the teacher is no encoder-decoder; remove it")
    return (count,)


def chosen_layers(config: StudentConfig, teacher_config: Any) -> tuple[list[int], ...] | None:
    """Zero-based teacher layers to copy, of each half of an encoder-decoder; None from scratch. Raises ConfigError."""
    counts = student_depths(config, teacher_config)
    if config.initialization == "scratch":
        return None
    ways = (config.initialization, config.decoder_initialization or config.initialization)[: len(counts)]
    found = []
    for how, count, total, half in zip(ways, counts, depths(teacher_config), ("hidden", "decoder"), strict=False):
        if isinstance(how, list) and len(how) != count:
            key = (
                "initialization" if half == "hidden" or not config.decoder_initialization else "decoder_initialization"
            )
            raise ConfigError(f"student.{key} names {len(how)} layers, num_{half}_layers is {count}")
        try:
            found.append(layer_indices(how, count, total))
        except ConfigError as error:
            key = "initialization" if half == "hidden" else "decoder_initialization"
            raise ConfigError(f"student.{key} and num_{half}_layers: {error}") from None
    return tuple(found)


def fitting_initialization(teacher_config: Any, num_hidden_layers: int) -> str:
    """The first of uniform, even and first by which so many of the teacher's layers can be copied; uniform if none."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        teacher = base_class(teacher_config).from_config(copy.deepcopy(teacher_config))
        for how in ("uniform", "even", "first"):
            shape = StudentConfig(num_hidden_layers, initialization=how)
            try:
                chosen = chosen_layers(shape, teacher_config)
                small = base_class(teacher_config).from_config(student_model_config(teacher_config, shape))
                weight_origins(small, teacher, chosen or ())
            except (ConfigError, ModelError):
                continue
            return how
    return "uniform"


@torch.no_grad()
def _copy_weights(student: Any, teacher: Any, chosen: Chosen, changes: Mapping[str, Any]) -> None:
    source = teacher.state_dict()
    tensors = student.state_dict()
    for name, origin in weight_origins(student, teacher, chosen, changes).items():
        tensors[name].copy_(source[origin])


def _own_fields(value: Any) -> Any:
    """What a config says of its model; not who wrote it, nor in which numbers."""
    if not isinstance(value, dict):
        return value
    others = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures"}
    return {key: _own_fields(each) for key, each in value.items() if key not in others}


def weight_origins(
    student: Any, teacher: Any, chosen: Chosen, changes: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, str]:
    """Which of the teacher's tensors each of the student's is a copy of, by name. Shapes alone are looked at.

    changes: fields of the student's config that are other than the teacher's by wish.
    Of a student of another architecture the tensors of its layers are copies. Raises ConfigError where a changed width
    makes a copy impossible, or a copied layer would have other settings than the teacher's.
    """
    layers, is_narrow = copied_layers(student, teacher, chosen), type(student) is not type(teacher)
    places = "|".join(sorted({re.escape(name.rpartition(".")[0]) for name in layers}))
    pattern = re.compile(rf"^((?:{places})\.\d+)(\..*)$")
    source = teacher.state_dict()
    origins = {}
    for name, tensor in student.state_dict().items():
        match = pattern.match(name)
        if is_narrow and not match:
            continue
        origins[name] = f"{layers[match[1]]}{match[2]}" if match else name
        if match and match[1].endswith(".0") and origins[name] not in source:
            origins[name] = name  # what the first layer alone has, as T5's table of distances, serves all layers
        found = source.get(origins[name])
        if found is None or found.shape != tensor.shape:
            was = tuple(found.shape) if found is not None else "absent"
            raise ConfigError(
                f"student.initialization: {name} has shape {tuple(tensor.shape)}, the teacher's is {was}; "
                "with other widths use scratch"
            )
    if not is_narrow:
        _require_same_settings(student, _with_changes(teacher, changes), layers)
    return origins


def _with_changes(teacher: Any, changes: Mapping[str, Any]) -> Any:
    """The teacher as a model whose config has the student's changes, but for those of single layers."""
    plain = {key: value for key, value in changes.items() if not isinstance(value, (list, dict))}
    if not plain:
        return teacher
    config = copy.deepcopy(teacher.config)
    for key, value in plain.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]), torch.device(teacher.device):
        changed = type(teacher)(config)
    changed.load_state_dict(teacher.state_dict(), assign=True)
    return changed.train(teacher.training)


def copied_layers(student: Any, teacher: Any, chosen: Chosen) -> dict[str, str]:
    """Names of the student's layers -> those of the teacher's that they are copies of.

    Raises ConfigError where layers are not in a list, or in lists of the same names.
    """
    found: dict[str, str] = {}
    for stack, theirs, layers in zip(layer_stacks(student), layer_stacks(teacher), chosen, strict=True):
        ours, whose = (
            [name for name in lists if name.startswith(backbone_prefix(model))]
            for lists, model in ((stack, student), (theirs, teacher))
        )
        if not (ours and whose):
            raise ConfigError(
                f"student.initialization: {type(teacher).__name__} has no list of "
                f"{' + '.join(map(str, depths(teacher.config)))} layers to copy from; use scratch"
            )
        pairs = {name: name for name in ours if name in whose}
        if type(student) is not type(teacher):  # MobileBERT's layers, started from BERT's
            pairs = {min(ours, key=len): min(whose, key=len)}
        for name, origin in pairs.items():
            found |= {f"{name}.{i}": f"{origin}.{j}" for i, j in enumerate(layers)}
    return found


def _require_same_settings(student: Any, teacher: Any, layers: Mapping[str, str]) -> None:
    """Refuse a copied layer with other modules than the teacher's, or with other settings but for its own number.

    A module that the first layer has beside the copied one's, and a setting that says so, belong to all layers.
    """
    for name, origin in layers.items():
        now, was = _settings_of(student.get_submodule(name)), _settings_of(teacher.get_submodule(origin))
        i, j = (int(each.rpartition(".")[2]) for each in (name, origin))
        added = {key.split(" ")[0].rpartition(".")[2] for key in now.keys() - was.keys() if key.endswith(" (class)")}
        for key in sorted(now.keys() | was.keys()):
            value, original = now.get(key, "nothing"), was.get(key, "nothing")
            belongs = i == 0 and {part.removeprefix("has_") for part in key.split(" ")[0].split(".")} & added
            if value != original and (value, original) != (i, j) and not belongs:
                raise ConfigError(
                    f"student.initialization: layer {i} of the student, a copy of the teacher's layer {j}, would "
                    f"have {key} {value} in place of {original}; {OTHER_LAYERS}"
                )


def _settings_of(layer: nn.Module) -> dict[str, Any]:
    """Class and plain attributes of each module of a layer, by name."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[f"{name} (class)".strip()] = type(module).__name__
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        # Neither says what the layer is: its mode, and whether transformers has drawn its weights.
        plain = {key: value for key, value in plain.items() if key not in ("training", "_is_hf_initialized")}
        found |= {f"{name}.{key}".lstrip("."): value for key, value in plain.items()}
    return found


def _prove_copy(student: Any, teacher: Any, chosen: Chosen, changes: Mapping[str, Any]) -> None:
    """Prove that a student holds and does what it copied, once its tied weights are one. Raises ModelError."""
    ours, source = student.state_dict(), teacher.state_dict()
    is_narrow = type(student) is not type(teacher)
    for name, origin in weight_origins(student, teacher, chosen, changes).items():
        if not torch.equal(ours[name], source[origin].to(ours[name].dtype)):
            raise ModelError(f"{type(teacher).__name__}: {name} is tied by the configuration but not in the model")
    if not is_narrow:
        layers, changed = copied_layers(student, teacher, chosen), _with_changes(teacher, changes)
        prove_copied_layers(student, changed, layers)
        if changed is not teacher and not _gives_the_same(student, teacher, layers):
            logger.warning(
                "student.config %s: the copied layers give other outputs than the teacher's; the student begins worse",
                ", ".join(changes),
            )


def _gives_the_same(student: Any, teacher: Any, layers: Mapping[str, str]) -> bool:
    try:
        prove_copied_layers(student, teacher, layers)
    except ModelError:
        return False
    return True
