"""Make a student: the teacher's architecture, or one of narrow word vectors, with fewer layers and fewer words.

    student = build_student(teacher, vocabulary, StudentConfig(num_hidden_layers=6), seed=0)

The result is a stock model with `vocab_size` of the kept vocabulary.
"""

import copy
import re
from typing import Any

import torch
from torch import nn

from glmd.config import StudentConfig
from glmd.errors import ConfigError
from glmd.heads import backbone
from glmd.layers import layer_indices
from glmd.loading import language_model_class
from glmd.narrow_embeddings import check_narrow, copy_around_layers, narrow_config
from glmd.slicing import slice_model
from glmd.strict_yaml import suggestion
from glmd.vocabulary import Vocabulary


def build_student(teacher: Any, vocabulary: Vocabulary, config: StudentConfig, *, seed: int) -> Any:
    """A student for `teacher`, a Hugging Face model; the teacher is not changed.

    With `initialisation: scratch` every weight is drawn from `seed`. Otherwise the chosen layers, the kept rows of
    the embeddings and all else outside the layers are copied, so that a student with every layer and every word is
    the teacher; of a narrow `architecture` the layers, and what stands around them as nearly as it can. Raises
    ConfigError where a changed width makes that impossible.
    """
    sliced = teacher if vocabulary.is_identity else slice_model(teacher, vocabulary)
    total = teacher.config.num_hidden_layers
    count = config.num_hidden_layers or total
    chosen = chosen_layers(config, count, total)
    torch.manual_seed(seed)
    model_config = student_model_config(sliced.config, config, count, chosen)
    if config.architecture is None:
        student = type(teacher)(model_config)
    else:
        student = language_model_class(model_config).from_config(model_config)
    student.to(torch.float32)
    if getattr(sliced, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(sliced.generation_config)
    if chosen is not None:
        _copy_weights(student, sliced, chosen)
        if config.architecture is not None:
            copy_around_layers(student, sliced)
    student.tie_weights()
    return student


def student_model_config(teacher_config: Any, config: StudentConfig, num_layers: int, chosen: list[int] | None) -> Any:
    """The teacher's config with the student's changes. Raises ConfigError for a field the architecture has not."""
    architecture = config.architecture
    result = copy.deepcopy(teacher_config) if architecture is None else narrow_config(teacher_config, architecture)
    known = set(result.to_dict()) | set(getattr(result, "attribute_map", {}))
    for key, value in config.config.items():
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
    old_layers = result.num_hidden_layers
    layer_types = getattr(result, "layer_types", None)
    if isinstance(layer_types, list) and len(layer_types) == old_layers:
        if num_layers > old_layers:
            raise ConfigError(f"student.num_hidden_layers: {num_layers} is more than the teacher's {old_layers} layers")
        result.layer_types = [layer_types[i] for i in chosen or range(num_layers)]
    result.num_hidden_layers = num_layers
    result.dtype = "float32"
    return result


def chosen_layers(config: StudentConfig, count: int, total: int) -> list[int] | None:
    """Zero-based teacher layers to copy, or None from scratch. Raises ConfigError."""
    if config.initialisation == "scratch":
        return None
    if isinstance(config.initialisation, list) and len(config.initialisation) != count:
        raise ConfigError(
            f"student.initialisation names {len(config.initialisation)} layers, num_hidden_layers is {count}"
        )
    return layer_indices(config.initialisation, count, total)


@torch.no_grad()
def _copy_weights(student: Any, teacher: Any, chosen: list[int]) -> None:
    source = teacher.state_dict()
    tensors = student.state_dict()
    for name, origin in weight_origins(student, teacher, chosen).items():
        tensors[name].copy_(source[origin])


def weight_origins(student: Any, teacher: Any, chosen: list[int]) -> dict[str, str]:
    """Which of the teacher's tensors each of the student's is a copy of, by name. Shapes alone are looked at.

    Of a student of another architecture those of its layers are. Raises ConfigError where a changed width makes a copy
    impossible.
    """
    theirs, is_narrow = _layer_list(teacher), type(student) is not type(teacher)
    ours = _layer_list(student) if is_narrow else theirs
    pattern = re.compile(rf"^{re.escape(ours)}\.(\d+)(\..*)$")
    source = teacher.state_dict()
    origins = {}
    for name, tensor in student.state_dict().items():
        match = pattern.match(name)
        if is_narrow and not match:
            continue
        origins[name] = f"{theirs}.{chosen[int(match[1])]}{match[2]}" if match else name
        found = source.get(origins[name])
        if found is None or found.shape != tensor.shape:
            was = tuple(found.shape) if found is not None else "absent"
            raise ConfigError(
                f"student.initialisation: {name} has shape {tuple(tensor.shape)}, the teacher's is {was}; "
                "with other widths use scratch"
            )
    return origins


def _layer_list(model: Any) -> str:
    """The name of the module list that holds the layers."""
    encoder, total = backbone(model), model.config.num_hidden_layers
    names = [
        name for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not names:
        raise ConfigError(
            f"student.initialisation: {type(model).__name__} has no list of {total} layers to copy from; use scratch"
        )
    # The outermost list; lists inside a layer have longer names.
    return f"{model.base_model_prefix}.{min(names, key=len)}"
