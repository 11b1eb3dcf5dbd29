"""What the attention of a backbone's layers is made of: queries, keys and values, and the probabilities they give.

    with AttentionCalls() as calls:
        outputs = split.run_backbone(inputs)
    probabilities = calls.layers[3].scores().softmax(-1)     # (R, A, S, S)

A layer that multiplies by `scaled_dot_product_attention` is listened to as it calls it, whatever its class names its
parts, and goes on with its fused kernel. One that computes probabilities by itself can be asked for these alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from glmd.errors import ModelError
from glmd.models.heads import Split, backbone
from glmd.models.probes import probe_inputs, prove_attentions


@dataclass(frozen=True)
class Attention:
    """What one layer's attention was given. R: rows, A: heads (of keys and values a divisor of it), S: tokens, D: width
    of a head.
    """

    query: Tensor  # (R, A, S, D)
    key: Tensor
    value: Tensor
    mask: Tensor | None  # bool, True where a query may look, or added to the scores; broadcasts to (R, A, S, S)
    scale: float
    is_causal: bool

    def scores(self) -> Tensor:
        """(R, A, S, S) in float32 or better, scaled, before the softmax; -inf where a query may not look.

        Of a query that may look nowhere, which is padding, some numbers that are finite.
        """
        query, key = _widened(self.query), _widened(self.key)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        with torch.autocast(query.device.type, enabled=False):
            scores = query @ key.transpose(-1, -2) * self.scale
        if self.is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        elif self.mask is None:
            return scores
        elif self.mask.dtype == torch.bool:
            hidden = ~self.mask
        else:
            hidden = self.mask <= torch.finfo(self.mask.dtype).min / 2  # as far down as transformers writes it
            scores = scores + self.mask.to(scores)
        # A pad behind a window of local attention sees nothing: its softmax, and the gradient of that, would be nan.
        return scores.masked_fill(hidden & ~hidden.all(-1, keepdim=True), float("-inf"))

    def read(self, signal: str, key_value_heads: int) -> Tensor:
        """(R, S, A, S) `attentions`, before any dropout, or `attention_scores`; (R, S, A, D) the inputs by their names.

        key_value_heads: how many heads keys and values have, which may come here each several times.
        """
        if signal in ("attentions", "attention_scores"):
            scores = self.scores()
            return (scores.softmax(-1) if signal == "attentions" else scores).transpose(1, 2)
        found = {"queries": self.query, "keys": self.key, "values": self.value}[signal]
        repeats = 1 if signal == "queries" else found.shape[1] // key_value_heads
        return found[:, ::repeats].transpose(1, 2)


class AttentionCalls(TorchFunctionMode):
    """Keeps what each call of `scaled_dot_product_attention` was given, in their order, which is that of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Attention] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self._keep(*args, **kwargs)
        return func(*args, **kwargs)

    def _keep(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.layers.append(Attention(query, key, value, attn_mask, scale, is_causal))


def is_heard(model: Any) -> bool:
    """Whether the attention of a model's layers goes through `scaled_dot_product_attention`."""
    return _implementation(model) == "sdpa"


def _implementation(model: Any) -> str:
    config: Any = backbone(model).config
    return str(config._attn_implementation)


def prove_attention(model: Any, *, inside: bool, training: bool) -> None:
    """Prove that a model's layers give their attention, and set it up to do so. Raises ModelError where they do not.

    inside: queries, keys, values or scores are wanted, not the probabilities alone. training: as it is while it learns.
    """
    name = type(model).__name__
    if not is_heard(model):
        if inside:
            raise ModelError(
                f"{name}: its attention is {_implementation(model)}, not torch's "
                "scaled_dot_product_attention, so its queries, keys, values and scores cannot be read; compare "
                "attentions or hidden_states instead"
            )
        backbone(model).set_attn_implementation("eager")  # type: ignore[operator]
        prove_attentions(model, training=training)
        return
    split, inputs, modes = Split(model), probe_inputs(model), {module: module.training for module in model.modules()}
    try:
        model.train(training)
        with torch.no_grad(), torch.random.fork_rng(), AttentionCalls() as calls:
            split.run_backbone(inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    require_each_layer(calls, model, len(inputs["input_ids"]))


def require_each_layer(calls: AttentionCalls, model: Any, rows: int) -> None:
    """Refuse attention that is not called once by each layer on whole rows. Raises ModelError."""
    wanted = model.config.get_text_config().num_hidden_layers
    found = [each for each in calls.layers if each.query.ndim == 4 and len(each.query) == rows]
    if len(calls.layers) != wanted or len(found) != wanted:
        raise ModelError(
            f"{type(model).__name__}: {len(calls.layers)} calls of attention in {wanted} layers; whose they are cannot "
            "be told, so none can be compared"
        )


def key_value_heads(config: Any) -> int:
    """How many heads the keys and values of a model have, which several heads of queries may share."""
    config = config.get_text_config()
    found = getattr(config, "num_key_value_heads", None)
    return int(config.num_attention_heads if found is None else found)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
