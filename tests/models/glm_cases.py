"""A tiny GLM for tests, the layout of a published checkpoint, and its forward in plain loops."""

import math
from typing import Any

import torch
from torch import Tensor

from glmd.models.glm import GlmdGlmConfig, GlmdGlmForBlankInfilling

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 30,
    "pad_token_id": 0,
    "mask_token_id": 4,
    "bos_token_id": 5,
    "eos_token_id": 6,
}


def tiny_glm(**changes: Any) -> GlmdGlmForBlankInfilling:
    """A GLM with opinions, in float64."""
    torch.manual_seed(0)
    config = GlmdGlmConfig(**{**SIZES, "initializer_range": 0.4, **changes}, architectures=["GlmdGlmForBlankInfilling"])
    model = GlmdGlmForBlankInfilling(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter) + ("norm.weight" in name)
    return model


def published_checkpoint(sizes: dict[str, Any] = SIZES, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights under the keys of the GLM repository."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3).to(dtype)

    width = sizes["hidden_size"]
    positions = sizes["max_position_embeddings"] + 1
    found = {
        "word_embeddings.weight": drawn(sizes["vocab_size"], width),
        "transformer.position_embeddings.weight": drawn(positions, width),
        "transformer.block_position_embeddings.weight": drawn(positions, width),
        "transformer.final_layernorm.weight": 1 + drawn(width),
        "transformer.final_layernorm.bias": drawn(width),
    }
    for layer in range(sizes["num_hidden_layers"]):
        place = f"transformer.layers.{layer}"
        for name, rows, columns in (
            ("attention.query_key_value", 3 * width, width),
            ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", 4 * width, width),
            ("mlp.dense_4h_to_h", width, 4 * width),
        ):
            found |= {f"{place}.{name}.weight": drawn(rows, columns), f"{place}.{name}.bias": drawn(rows)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            found |= {f"{place}.{name}.weight": 1 + drawn(width), f"{place}.{name}.bias": drawn(width)}
    return found


def plain_logits(
    weights: dict[str, Tensor], ids: list[int], positions: list[int], within: list[int], context: list[int], heads: int
) -> Tensor:
    """(S, V) logits of one row without padding, from published weights, a token and a head at a time."""

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    states = [
        weights["word_embeddings.weight"][i]
        + weights["transformer.position_embeddings.weight"][p]
        + weights["transformer.block_position_embeddings.weight"][b]
        for i, p, b in zip(ids, positions, within, strict=True)
    ]
    layers = {key.split(".")[2] for key in weights if key.startswith("transformer.layers.")}
    for layer in range(len(layers)):
        place = f"transformer.layers.{layer}"
        fused = [linear(norm(x, f"{place}.input_layernorm"), f"{place}.attention.query_key_value") for x in states]
        queries, keys, values = zip(*(each.chunk(3) for each in fused), strict=True)
        after = []
        for i, state in enumerate(states):
            seen = [j for j in range(len(states)) if context[j] or (not context[i] and j <= i)]
            mixed = []
            for head in range(heads):
                size = len(state) // heads
                part = slice(head * size, (head + 1) * size)
                scores = torch.stack([queries[i][part] @ keys[j][part] for j in seen]) / math.sqrt(size)
                shares = scores.exp() / scores.exp().sum()
                mixed.append(sum(share * values[j][part] for share, j in zip(shares, seen, strict=True)))
            after.append(state + linear(torch.cat(mixed), f"{place}.attention.dense"))
        states = [
            state
            + linear(
                gelu(linear(norm(state, f"{place}.post_attention_layernorm"), f"{place}.mlp.dense_h_to_4h")),
                f"{place}.mlp.dense_4h_to_h",
            )
            for state in after
        ]
    final = [norm(state, "transformer.final_layernorm") for state in states]
    return torch.stack([weights["word_embeddings.weight"] @ state for state in final])


# A text of six tokens with two blanks, filled in the other order: columns as arXiv:2103.10360, figure 2, has them.
ROW = {
    "input_ids": [2, 11, 4, 13, 4, 3, 5, 21, 22, 5, 23],
    "position_ids": [0, 1, 2, 3, 4, 5, 4, 4, 4, 2, 2],
    "block_position_ids": [0, 0, 0, 0, 0, 0, 1, 2, 3, 1, 2],
    "context_mask": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
}


def as_row(columns: dict[str, list[int]] = ROW, padding: int = 0) -> dict[str, Tensor]:
    """The columns as a batch of one row, with padding behind it."""
    padded = {name: torch.tensor([[*column, *[0] * padding]]) for name, column in columns.items()}
    length = len(columns["input_ids"])
    return padded | {"attention_mask": torch.tensor([[1] * length + [0] * padding])}
