"""Make a student: the teacher's architecture with fewer layers, fewer words, perhaps narrower.

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
from glmd.slicing import slice_model
from glmd.strict_yaml import suggestion
from glmd.vocabulary import Vocabulary


def build_student(teacher: Any, vocabulary: Vocabulary, config: StudentConfig, *, seed: int) -> Any:
    """A student for `teacher`, a Hugging Face model; the teacher is not changed.

    With `initialisation: scratch` every weight is drawn from `seed`. Otherwise the chosen layers, the kept rows of
    the embeddings and all else outside the layers are copied, so that a student with every layer and every word is
    the teacher. Raises ConfigError where a changed width makes that impossible.
    """
    sliced = teacher if vocabulary.is_identity else slice_model(teacher, vocabulary)
    total = teacher.config.num_hidden_layers
    count = config.num_hidden_layers or total
    chosen = chosen_layers(config, count, total)
    torch.manual_seed(seed)
    student = type(teacher)(student_model_config(sliced.config, config, count, chosen))
    student.to(torch.float32)
    if getattr(sliced, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(sliced.generation_config)
    if chosen is not None:
        _copy_weights(student, sliced, chosen)
    student.tie_weights()
    return student


def student_model_config(teacher_config: Any, config: StudentConfig, num_layers: int, chosen: list[int] | None) -> Any:
    """The teacher's config with the student's changes. Raises ConfigError for a field the architecture has not."""
    result = copy.deepcopy(teacher_config)
    known = set(result.to_dict()) | set(getattr(result, "attribute_map", {}))
    for key, value in config.config.items():
        if key not in known:
            raise ConfigError(f"student.config.{key} is unknown to {result.model_type}{suggestion(key, known)}")
        if key.endswith("_token_id"):
            raise ConfigError(f"student.config.{key} is set by glmd; remove it")
        try:
            setattr(result, key, value)
        except Exception as error:  # the config's own checks raise classes of their own
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"student.config.{key}: {value!r} does not fit ({reason})") from None
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

    Raises ConfigError where a changed width makes a copy impossible.
    """
    pattern = re.compile(rf"^({re.escape(_layer_list(teacher))}\.)(\d+)(\..*)$")
    source = teacher.state_dict()
    origins = {}
    for name, tensor in student.state_dict().items():
        match = pattern.match(name)
        origins[name] = f"{match[1]}{chosen[int(match[2])]}{match[3]}" if match else name
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
