"""AdamW for a student, and its averages by the names of the parameters."""

from typing import Any

import torch
from torch import Tensor

from glmd.distillation.distiller import Distiller
from glmd.errors import ModelError
from glmd.stage_config import StageConfig
from glmd.training.fsdp import shard_like
from glmd.training.state import trainable


def make_optimizer(distiller: Distiller, settings: StageConfig) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only, as in BERT.

    Raises ModelError for weights of half precision: most updates are smaller than their steps, and would be lost.
    """
    for name, parameter in trainable(distiller).items():
        if parameter.dtype not in (torch.float32, torch.float64):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(f"{name} is {kind}, in which it would not learn; load it in torch.float32")
    named = list(trainable(distiller).values())
    groups = [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, fused=True)


def optimizer_tensors(distiller: Distiller, optimizer: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in trainable(distiller).items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(distiller: Distiller, optimizer: Any, tensors: dict[str, Tensor]) -> None:
    for name, parameter in trainable(distiller).items():
        if f"{name}.step" not in tensors:  # no step yet, as all were left out, or it had no gradient in any
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][key] = shard_like(tensors[f"{name}.{key}"], parameter)
        # AdamW keeps its step counter beside the parameter only when fused.
        optimizer.state[parameter]["step"] = tensors[f"{name}.step"].to(parameter.device)
