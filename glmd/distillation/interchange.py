"""The interchange intervention of DIITO (arXiv:2112.02505): some tokens think what those of another text thought.

terms: [..., {signal: lm_logits, loss: kl_divergence, intervened: true}]
intervention: {name: interchange, share: 0.3}
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from glmd.errors import ConfigError
from glmd.models.layers import layer_indices, layers_in_order, with_states


@contextmanager
def interchange(
    student: Any,
    teacher: Sequence[Any],
    batch: Mapping[str, Tensor],
    progress: float,
    generator: torch.Generator,
    *,
    share: float = 0.3,
) -> Iterator[None]:
    """Give some tokens of each text in one layer the states of the batch's next text, alike in both models.

    share: how many tokens that stand side by side, of the shorter one of both texts. Where they stand in either text,
        and behind which of the student's layers, is drawn in each micro-batch; the teacher's is the last of its block.
    Both models then go on with these states, and gradients go into both texts.
    """
    ours, theirs = (layers_in_order(model) for model in (student.model, teacher[0].model))
    drawn = int(torch.randint(len(ours), (), generator=generator))
    behind = layer_indices("uniform", len(ours), len(theirs))[drawn]
    places = torch.rand(2, len(batch["input_ids"]), generator=generator).to(batch["input_ids"].device)
    inside, sources = interchanged(batch["attention_mask"], places, share)
    with ExitStack() as hooks:
        for layer in (ours[drawn], theirs[behind]):
            hooks.callback(layer.register_forward_hook(_exchanged(inside, sources)).remove)
        yield


def interchanged(attention_mask: Tensor, places: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Which tokens are given others' states, (R, S) bool, and the places of these in the next row, (R, S).

    attention_mask: (R, S), padding behind the tokens. places: (2, R) in [0, 1), where in its row and in the next one
        the tokens begin, from as far left to as far right as can be.
    """
    lengths = attention_mask.sum(1)
    others = lengths.roll(-1)
    count = (torch.minimum(lengths, others) * share).long()
    start, source = (
        torch.minimum((place * (length - count + 1)).long(), length - count)
        for place, length in zip(places, (lengths, others), strict=True)
    )
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)[None]
    inside = (columns >= start[:, None]) & (columns < (start + count)[:, None])
    return inside, (columns - start[:, None] + source[:, None]).clamp(0, attention_mask.shape[1] - 1)


def _exchanged(inside: Tensor, sources: Tensor) -> Callable[..., Any]:
    def hook(layer: Any, given: Any, output: Any) -> Any:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        others = states.roll(-1, 0).gather(1, sources[..., None].expand_as(states))
        return with_states(output, torch.where(inside[..., None], others, states))

    return hook


def require_share(*, share: float = 0.3) -> None:
    """Raises ConfigError for an option out of its range."""
    if not 0 < share <= 1:
        raise ConfigError(f"share must be in (0, 1], got {share}")


def require_block_for_each(student: Any, teacher: Any) -> None:
    """A teacher's layer behind each of the student's. Raises ConfigError."""
    numbers = [config.get_text_config().num_hidden_layers for config in (student, teacher)]
    layer_indices("uniform", *numbers)
