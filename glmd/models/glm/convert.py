"""A published GLM checkpoint as a folder of transformers: its keys renamed, its fused queries, keys and values parted.

model = converted_model("blocklm-base-blank/150000/mp_rank_00_model_states.pt")

Read are the files of the GLM repository (mp_rank_00_model_states.pt, of one part) and those of the hub's folders.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmd.errors import GlmdError, ModelError, counted
from glmd.models.glm.configuration import HEAD_SIZE, TOKEN_IDS, published_config
from glmd.models.glm.modeling_glmd_glm import GlmdGlmConfig, GlmdGlmForBlankInfilling

# Published names of a layer's modules -> ours; those of queries, keys and values are one there.
_MODULES = {
    "input_layernorm": ["input_layernorm"],
    "attention.query_key_value": ["attention.query", "attention.key", "attention.value"],
    "attention.dense": ["attention.dense"],
    "post_attention_layernorm": ["post_attention_layernorm"],
    "mlp.dense_h_to_4h": ["mlp.up"],
    "mlp.dense_4h_to_h": ["mlp.down"],
}
MOST_LAYERS = 1000
_WORDS, _POSITIONS = "word_embeddings.weight", "transformer.position_embeddings.weight"
_LAYER = re.compile(r"transformer\.layers\.(\d+)\.")


def published_names(num_layers: int) -> dict[str, list[str]]:
    """Keys of a published checkpoint -> ours, of its parts one after another along the first axis."""
    names = {_WORDS: ["word_embeddings.weight"], _POSITIONS: ["position_embeddings.weight"]}
    names["transformer.block_position_embeddings.weight"] = ["block_position_embeddings.weight"]
    for kind in ("weight", "bias"):
        names[f"transformer.final_layernorm.{kind}"] = [f"final_layernorm.{kind}"]
        for layer in range(num_layers):
            for theirs, ours in _MODULES.items():
                names[f"transformer.layers.{layer}.{theirs}.{kind}"] = [
                    f"layers.{layer}.{each}.{kind}" for each in ours
                ]
    return {theirs: [f"glm.{each}" for each in ours] for theirs, ours in names.items()}


def converted_model(
    checkpoint: str | Path, *, size: str | None = None, num_attention_heads: int | None = None
) -> GlmdGlmForBlankInfilling:
    """The model of a published checkpoint, in its dtype. Its shape is that of its tensors.

    size: that of a published model ("110M"), which the tensors have to be of. num_attention_heads: heads have 64
    numbers each in all published models; of others their count must be given.
    Raises ModelError naming what cannot be read, or what is missing, unexpected or of another shape.
    """
    try:
        return _converted(str(checkpoint), _read(Path(checkpoint)), size, num_attention_heads)
    except GlmdError:
        raise
    except Exception as error:  # of tensors that are none of a GLM, in one of many ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(f"{checkpoint}: is no checkpoint of a GLM ({reason})") from None


def _converted(
    name: str, tensors: dict[str, Tensor], size: str | None, num_attention_heads: int | None
) -> GlmdGlmForBlankInfilling:
    numbers = [int(match[1]) for key in tensors if (match := _LAYER.match(key))]
    if max(numbers, default=0) >= MOST_LAYERS:
        raise ModelError(f"{name}: names a layer {max(numbers)}; no GLM has more than {MOST_LAYERS}")
    names = published_names(max(numbers, default=0) + 1)
    _require_keys(name, tensors, names)
    config = _config(name, tensors, max(numbers) + 1, size, num_attention_heads)
    ours: dict[str, Tensor] = {}
    for theirs, parts in names.items():
        tensor = tensors.pop(theirs)
        if not tensor.isfinite().all():
            raise ModelError(f"{name}: {theirs} holds values that are not finite")
        ours |= {part: each.contiguous() for part, each in zip(parts, tensor.chunk(len(parts)), strict=True)}
    with torch.device("meta"):
        model = GlmdGlmForBlankInfilling(config)
    wanted = {key: value.shape for key, value in model.state_dict().items() if key in ours}
    other = [key for key, shape in wanted.items() if ours[key].shape != shape]
    if other:
        found, shape = tuple(ours[other[0]].shape), tuple(wanted[other[0]])
        raise ModelError(f"{name}: {other[0]} would have shape {found} in place of {shape}; this is no GLM")
    ours["lm_head.weight"] = ours["glm.word_embeddings.weight"]
    model.load_state_dict(ours, assign=True)
    model.tie_weights()
    return model.eval()


def _require_keys(name: str, tensors: Mapping[str, Tensor], names: Mapping[str, Any]) -> None:
    problems = []
    for what, keys in (("lacks", names.keys() - tensors.keys()), ("has beside", tensors.keys() - names.keys())):
        if keys:
            shown = sorted(keys)[:3]
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{what} {counted(len(keys), 'key')} ({', '.join(shown)}{more})")
    if problems:
        raise ModelError(f"{name}: its keys are not those of a published GLM: it {' and '.join(problems)}")


def _config(
    name: str, tensors: Mapping[str, Tensor], num_layers: int, size: str | None, num_attention_heads: int | None
) -> GlmdGlmConfig:
    """The config that tensors are of."""
    vocab_size, hidden_size = tensors[_WORDS].shape
    if num_attention_heads is None and hidden_size % HEAD_SIZE:
        raise ModelError(
            f"{name}: its hidden_size {hidden_size} is no multiple of {HEAD_SIZE}, the width of a head in all "
            "published models; give --num-attention-heads"
        )
    if num_attention_heads is not None and num_attention_heads < 1:
        raise ModelError(f"--num-attention-heads must be at least 1, got {num_attention_heads}")
    heads = hidden_size // HEAD_SIZE if num_attention_heads is None else num_attention_heads
    if hidden_size % heads:
        raise ModelError(f"{name}: --num-attention-heads {heads} does not divide its hidden_size {hidden_size}")
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "intermediate_size": tensors["transformer.layers.0.mlp.dense_h_to_4h.weight"].shape[0],
        "max_position_embeddings": tensors[_POSITIONS].shape[0] - 1,
    }
    if size is not None:
        wanted = published_config(size).to_dict()
        other = [f"{key} {value} in place of {wanted[key]}" for key, value in shape.items() if wanted[key] != value]
        if other:
            raise ModelError(f"{name}: is no GLM of {size}: it has {', '.join(other)}; remove --size")
    special = next((ids for ids in TOKEN_IDS.values() if ids["vocab_size"] == vocab_size), {})
    architectures = [GlmdGlmForBlankInfilling.__name__]
    config = GlmdGlmConfig(**{**special, **shape, "architectures": architectures})
    config.dtype = tensors[_WORDS].dtype
    return config


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their published keys."""
    files = _files(path)
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= _read_file(file)
    plain = {re.sub(r"^(module\.|model\.|glm\.)+", "", key): value for key, value in tensors.items()}
    if not all(isinstance(each, Tensor) for each in plain.values()):
        raise ModelError(f"{path}: holds no tensors under `module`; give the mp_rank_00_model_states.pt of a GLM")
    return plain


def _files(path: Path) -> list[Path]:
    """The weight files of a checkpoint: itself, or what its folder holds."""
    if path.is_file():
        parts = sorted(path.parent.glob("mp_rank_*_model_states.pt")) if path.name.startswith("mp_rank_") else [path]
    else:
        if not path.is_dir():
            raise ModelError(f"{path}: no such file or folder; give a GLM's checkpoint")
        for tracker in ("latest", "latest_checkpointed_iteration.txt"):
            if (path / tracker).is_file():
                return _files(path / (path / tracker).read_text(encoding="utf-8").strip())
        parts = sorted(path.glob("mp_rank_*_model_states.pt"))
        for kind in ("model.safetensors", "pytorch_model.bin"):
            index = path / f"{kind}.index.json"
            if not parts and index.is_file():
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return [path / Path(each).name for each in sorted(set(names))]
            if not parts and (path / kind).is_file():
                return [path / kind]
    if not parts:
        raise ModelError(
            f"{path}: holds no mp_rank_00_model_states.pt, model.safetensors or pytorch_model.bin; give a checkpoint "
            "of a GLM"
        )
    if len(parts) > 1:
        raise ModelError(
            f"{path}: its weights are split over {len(parts)} parts of model parallelism; merge them with "
            "change_mp.py of the GLM repository (`python change_mp.py FOLDER 1`)"
        )
    return parts


# Beside weights a checkpoint holds the state of random generators, and arguments. None of these runs code.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("u4", "u8", "i4", "i8", "f4", "f8", "u1")},
    (np.zeros(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.zeros(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
]


def _read_file(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with torch.serialization.safe_globals(_HARMLESS):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(file) and file.read_bytes()[:1] != b"\x80":
            raise ModelError(f"{file}: cannot be read: it is no checkpoint of torch; copy it again") from None
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{file}: holds more than weights, and what it holds is not run ({reason}); where you trust it, save its "
            "weights alone: torch.save({'module': torch.load(FILE, weights_only=False)['module']}, NEW_FILE)"
        ) from None
    except Exception as error:  # torch, zip and safetensors have errors of their own
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{file}: cannot be read ({reason})") from None
    inner = found.get("module", found) if isinstance(found, dict) else None
    if not isinstance(inner, dict):
        raise ModelError(f"{file}: holds no weights; give the mp_rank_00_model_states.pt of a GLM")
    return inner
