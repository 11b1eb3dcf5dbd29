"""No score, soft label or answer from a number that is not finite: who said it, and of which example.

    require_finite(model_name, {example_id: logits, ...})      # NumericsError names the model and the first example

A choice that an example has not is -inf by design; it is no answer and is not looked at.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glmd.errors import NumericsError


def require_finite(name: str, answers: Mapping[int, Sequence[float]]) -> None:
    """Refuse answers of which one is not finite, with the first example of such. name: the model that gave them.

    Raises NumericsError.
    """
    bad = sorted(i for i, values in answers.items() if not all(map(math.isfinite, values)))
    if bad:
        value = next(value for value in answers[bad[0]] if not math.isfinite(value))
        raise not_finite(name, bad, f"logits {value}")


def not_finite(name: str, examples: Sequence[int], found: str) -> NumericsError:
    """The refusal of a model whose numbers for some examples, of which there is at least one, are not finite."""
    many = f" and of {len(examples) - 1} others" if len(examples) > 1 else ""
    return NumericsError(
        f"{name}: {found} of example {examples[0]} (counted from 0){many} are not finite, so nothing can be told from "
        "them; check the model's weights, or load it in a wider dtype"
    )


def spoiled(logits: Tensor, num_choices: Tensor | None) -> Tensor:
    """(B, C) logits with NaN for each that is not finite, -inf among them, but for choices that an example has not.

    A loss takes -inf for a class of probability 0; of a NaN it becomes one, which stops the step. Asks nothing of the
    device. num_choices: (B,) or None where all classes exist.
    """
    sound = torch.isfinite(logits)
    if num_choices is not None:
        sound |= torch.arange(logits.shape[1], device=logits.device) >= num_choices.to(logits.device)[:, None]
    return torch.where(sound, logits, torch.nan)


def examples_of_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """(N,) the example of each position that predicts, row after row. Reads how many there are."""
    examples = batch["example_id"]
    rows = examples.repeat_interleave(batch["num_choices"]) if "num_choices" in batch else examples
    return rows.repeat_interleave(batch["predicts"].sum(1))
