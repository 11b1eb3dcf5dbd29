"""What a checkpoint of training holds: a student's weights and AdamW's averages, by name, and whose code made them.

Of a student that ranks share out, what is written and read is whole.
"""

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmd.distillation.distiller import Distiller
from glmd.errors import RunError
from glmd.runtime.determinism import is_repeatable
from glmd.training.checkpoint import Checkpoint
from glmd.training.fsdp import full_tensors, shard_like

logger = logging.getLogger(__name__)
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


def require_same_code(stage: str, folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse to go on with other code of glmd; warn of other libraries, which may be gone for good."""
    before, now = checkpoint.state.get("code", {}), code_of_a_step()
    if before.get("step") != now["step"]:
        made = f"by training steps of version {before.get('step', 0)}, and this glmd makes those of {now['step']}"
        raise RunError(
            f"{stage}: {checkpoint.path} was made {made}; go on with the glmd that began it, or delete "
            f"{folder} to train the stage again"
        )
    for name in LIBRARIES:
        if before[name] != now[name]:
            logger.warning(
                "%s: continues with %s %s after %s, which would end in identical weights",
                stage,
                name,
                now[name],
                before[name],
            )


def warn_of_other_bits(stage: str, state: Mapping[str, Any], device: torch.device) -> None:
    """Say why a stage that goes on from a checkpoint of this state may not end as it would have."""
    saved_by, threads = state["threads"], torch.get_num_threads()
    if device.type == "cpu" and threads != saved_by:
        # Sums are split over them, so the last bits of the weights depend on their number.
        logger.warning(
            "%s: continues with %d CPU threads after %d; OMP_NUM_THREADS=%d would end in identical weights",
            stage,
            threads,
            saved_by,
            saved_by,
        )
    if not (state.get("repeatable", True) and is_repeatable(device)):
        logger.warning(
            "%s: was begun, or continues, without deterministic algorithms; its weights will differ in their last "
            "bits from those of an uninterrupted run",
            stage,
        )
