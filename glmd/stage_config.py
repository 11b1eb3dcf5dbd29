"""How a stage trains: its settings, and the range of each number."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from glmd.errors import ConfigError


class Range(NamedTuple):
    """The numbers that a setting may have: from `least` to `most`; `opens` and `closes` as mathematicians write it."""

    least: float
    most: float
    opens: str = "["
    closes: str = "]"

    def __contains__(self, value: Any) -> bool:
        above = self.least < value if self.opens == "(" else self.least <= value
        return above and (value < self.most if self.closes == ")" else value <= self.most)

    def __str__(self) -> str:
        return f"{self.opens}{self.least:,}, {self.most:,}{self.closes}"


# What a setting of a stage may be. Upper ends are beyond reason whatever the data and the machine; batches are compared
# with both (glmd.planning.limits).
RANGES = {
    "max_steps": Range(1, 10**9),
    "num_train_epochs": Range(0, 10**6, "("),
    "per_device_train_batch_size": Range(1, math.inf, "[", ")"),
    "gradient_accumulation_steps": Range(1, math.inf, "[", ")"),
    "learning_rate": Range(0, 10, "("),
    "warmup_ratio": Range(0, 1),
    "min_lr_ratio": Range(0, 1),
    "weight_decay": Range(0, math.inf, "[", ")"),
    "adam_beta1": Range(0, 1, "[", ")"),
    "adam_beta2": Range(0, 1, "[", ")"),
    "adam_epsilon": Range(0, math.inf, "(", ")"),
    "max_grad_norm": Range(0, math.inf, "(", ")"),
    "skip_nonfinite": Range(0, 10**9),
    "max_length": Range(8, 10**6),
    "mlm_probability": Range(0, 1, "[", ")"),
    "num_maskings": Range(1, 10**4),
    "logging_steps": Range(1, 10**9),
    "save_steps": Range(1, 10**9),
    "save_total_limit": Range(1, 10**6),
    "per_device_eval_batch_size": Range(1, math.inf, "[", ")"),
}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class StageConfig:
    """How one stage trains. Exactly one of `max_steps` and `num_train_epochs` says how long."""

    max_steps: int | None = None
    num_train_epochs: float | None = None
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    # group_by_length: each step's texts are of like length, for fewer pads. None: that on tasks and conversations;
    # random on a corpus of texts, whose blocks are of one length
    train_sampling_strategy: Literal["random", "group_by_length"] | None = None
    gradient_checkpointing: bool = False  # run each layer again in the backward: less memory, more time, the same bits
    learning_rate: float = 2e-5
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.1  # the schedule ends at this share of learning_rate
    weight_decay: float = 0.1  # not applied to biases and normalization weights
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    skip_nonfinite: int = 0  # so many steps may have a loss or gradient that is not finite: they are left out
    max_length: int | None = None  # tokens; a task's own value if not given
    mlm_probability: float | None = None  # share of masked tokens; None: 0.15 where the method needs it
    num_maskings: int | None = None  # masked copies of each text, taken in turn by the epochs; None: one an epoch
    logging_steps: int = 50
    save_steps: int = 500
    save_total_limit: int = 2
    per_device_eval_batch_size: int = 64

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            require(value is None or value in allowed, f"{name} must be in {allowed}, got {value}")
        require(
            self.max_steps is None or self.num_train_epochs is None,
            "max_steps and num_train_epochs are both given; keep one (num_train_epochs= removes the other)",
        )

    def global_batch_size(self, world_size: int) -> int:
        """Examples of one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    def spread(self, begun_with: int, processes: int) -> "StageConfig":
        """The same micro-batches in the same global batches for another number of processes, by accumulation."""
        total = self.gradient_accumulation_steps * begun_with
        require(
            total % processes == 0,
            f"elastic: the {total} micro-batches of a step cannot be shared by {processes} processes; "
            f"launch a number that divides {total}",
        )
        return dataclasses.replace(self, gradient_accumulation_steps=total // processes)

    def steps(self, num_examples: int, world_size: int) -> int:
        """Optimizer steps of the stage: max_steps, or enough for num_train_epochs."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None, "checked by RunConfig.stage"
        return max(1, math.ceil(self.num_train_epochs * num_examples / self.global_batch_size(world_size)))
