"""Frozen teachers whose layers hold 8 or 4 bits a weight, made by bitsandbytes (extra `quantization`) as they load.

    model = from_pretrained(auto_class, name, **quantized_loading("4bit", config, auto_class, dtype=..., device=...))

The linear layers of the backbone alone are quantized. Embeddings and heads stay whole: the losses multiply with the
rows of a head by themselves, and embeddings may be those rows.
"""

import logging
from importlib.util import find_spec
from typing import Any, Literal

import torch

from glmd.errors import ConfigError, ModelError
from glmd.models.heads import backbone_name

Quantization = Literal["8bit", "4bit"]
LIBRARY, EXTRA = "bitsandbytes", "quantization"
# Bytes of a weight, with its scale: one in float32 for each row of 8 bits, for each 64 numbers of 4 bits.
SCALE_BYTES, BLOCK = 4, 64


def require_library() -> None:
    """Refuse a quantized teacher where bitsandbytes is not installed. Raises ConfigError, which names the extra."""
    if find_spec(LIBRARY) is None:
        raise ConfigError(
            f"teacher.quantization: {LIBRARY} is not installed; pip install 'glmd[{EXTRA}]', or remove the key"
        )


def is_quantized(model: Any) -> bool:
    """Whether a model was loaded in 8 or 4 bits."""
    return getattr(model, "hf_quantizer", None) is not None


def quantized_linears(model: Any) -> dict[str, Any]:
    """The modules that are quantized of a model, by name: the linear layers of its backbone.

    Raises ModelError where there is none, or where its files are quantized already.
    """
    from transformers.pytorch_utils import Conv1D

    name, prefix = type(model).__name__, f"{backbone_name(model)}."
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"teacher.quantization: the weights of this {name} are quantized in its files; remove the key")
    found = {
        key: module
        for key, module in model.named_modules()
        if key.startswith(prefix) and (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
    }
    if not found:
        raise ModelError(
            f"teacher.quantization: {name} has no layer that {LIBRARY} quantizes (torch's Linear); remove the key, or "
            "give teacher.dtype=bfloat16"
        )
    return found


def quantized_savings(model: Any, quantization: Quantization) -> int:
    """Bytes by which the weights of a whole model become fewer; shapes and dtypes alone are looked at."""
    weights = {id(each.weight): each.weight for each in quantized_linears(model).values()}
    saved = 0
    for each in weights.values():
        scales, numbers = (
            (len(each), each.numel()) if quantization == "8bit" else (each.numel() / BLOCK, each.numel() / 2)
        )
        saved += each.nbytes - round(numbers + SCALE_BYTES * scales)
    return saved


def quantized_loading(
    quantization: Quantization, config: Any, auto_class: Any, *, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Any]:
    """What `from_pretrained` is given for a quantized model, which is made where it will run. Raises GlmdError.

    In 8 bits each token's activations are rounded too, by a scale of their own: with bitsandbytes' outliers, which are
    looked for in a whole batch, a text's predictions would depend on the texts beside it, on padding and ranks. In 4
    bits (nf4) the weights alone are rounded.
    """
    from transformers import BitsAndBytesConfig

    require_library()
    # It says at every product that activations pass through float16, and that a CPU's kernel is not the fastest.
    logging.getLogger(LIBRARY).setLevel(logging.ERROR)
    with torch.device("meta"):
        model = auto_class.from_config(config)
    quantized_linears(model)
    body = backbone_name(model)
    kept = [name for name, _ in model.named_children() if name != body]
    if quantization == "8bit":
        options: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    else:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {
        "quantization_config": BitsAndBytesConfig(**options, llm_int8_skip_modules=kept),
        "device_map": {"": device},
    }
