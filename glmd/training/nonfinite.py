"""A step as the host knows of it, and what becomes of one that is not finite."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from glmd.distillation.teacher import AllOutputs, unsound_examples
from glmd.errors import NumericsError
from glmd.training.ahead import Fed
from glmd.training.log import RunLog

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a checkpoint must remember beside tensors. JSON only."""

    step: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_step: int | None = None
    scaler: dict[str, Any] | None = None
    skipped: int = 0  # steps that were left out because of `skip_nonfinite`


@dataclass(frozen=True)
class Made:
    """A step that the device may still be at: what the host reads of it a step later, and never waits for."""

    step: int
    micro_batches: list[Fed]
    means: Tensor  # (terms,) of all ranks
    norm: Tensor  # of the gradient
    status: Tensor  # in host memory: whether the step was left out, and how many ranks had each signal when it began
    is_there: torch.cuda.Event | None  # when it is


def leave_out(
    made: Made, stage: str, tolerated: int, progress: Progress, teacher: Callable[..., AllOutputs], log: RunLog
) -> None:
    """Log the examples of all ranks, which have the same means and norm. No weight has seen the step.

    Raises NumericsError where no more are tolerated.
    """
    batches = [fed.batch for fed in made.micro_batches]
    ids: list[int] = gather_object([int(i) for batch in batches for i in batch["example_id"]])
    losses, norm = made.means.tolist(), float(made.norm)
    log.write({"stage": stage, "step": made.step, "losses": losses, "gradient_norm": norm, "examples": ids})
    progress.skipped += 1
    if progress.skipped > tolerated:
        unsound = gather_object([i for batch in batches for i in unsound_examples(teacher(batch), batch)])
        raise NumericsError(
            f"{stage}: step {made.step}: loss {losses} or gradient norm {norm:g} is not finite; "
            f"examples {ids}; the last checkpoint is kept. "
            + (
                f"The teacher's outputs for {sorted(set(unsound))} are not finite; check the teacher"
                if unsound
                else "Lower learning_rate or check the teacher"
            )
            + (f"; skip_nonfinite {tolerated} is used up" if tolerated else "")
        )
    logger.warning("%s: step %d is left out (%d of %d)", stage, made.step, progress.skipped, tolerated)
