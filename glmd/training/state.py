"""What a checkpoint of training holds: a student's weights and AdamW's averages, by name, and whose code made them.

Of a student that ranks share out, what is written and read is whole.
"""

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from glmd.distillation.distiller import Distiller
from glmd.training.fsdp import full_tensors, shard_like

LIBRARIES = ("torch", "transformers", "accelerate")
# Raised by hand whenever the weights after a step change. A checkpoint of another number is not continued from.
# test_the_losses_of_a_few_steps_are_those_of_this_step_version holds it to what is computed.
STEP_VERSION = 2


def trainable(distiller: Distiller) -> dict[str, Tensor]:
    """The parameters that learn, each once, by name. Non-persistent and constant buffers are not state."""
    return {name: p for name, p in distiller.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable(distiller: Distiller, tensors: dict[str, Tensor]) -> None:
    for name, parameter in trainable(distiller).items():
        parameter.copy_(shard_like(tensors[name], parameter))


def copy_weights_into(distiller: Distiller, trained: Distiller) -> None:
    """Give `distiller` the weights of the one that is trained, if that is another: a sharded one."""
    if trained is not distiller:
        load_trainable(distiller.to("cpu"), full_tensors(trainable(trained)))


def code_of_a_step() -> dict[str, Any]:
    """What computes a step: its version, and the libraries'."""
    return {"step": STEP_VERSION, **{name: version(name) for name in LIBRARIES}}
