"""What a checkpoint of training holds: a student's weights and AdamW's averages, by name, and whose code made them.

Of a student that ranks share out, what is written and read is whole.
"""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmd import __version__
from glmd.distiller import Distiller
from glmd.sharding import part_of, whole

LIBRARIES = ("torch", "transformers", "accelerate")
# The code that the weights after a step depend on. What exports, scores or reports may be mended in between.
STEP_MODULES = (
    "trainer.py",
    "training_state.py",
    "sharding.py",
    "distiller.py",
    "heads.py",
    "teacher.py",
    "finite.py",
    "determinism.py",
    "cache.py",
    "cached_teacher.py",
    "objective.py",
    "schedules.py",
    "losses/*.py",
    "data/batches.py",
    "data/blanks.py",
)


def trainable(distiller: Distiller) -> dict[str, Tensor]:
    """The parameters that learn, each once, by name. Non-persistent and constant buffers are not state."""
    return {name: p for name, p in distiller.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable(distiller: Distiller, tensors: dict[str, Tensor]) -> None:
    for name, parameter in trainable(distiller).items():
        parameter.copy_(part_of(tensors[name], parameter))


def fill(distiller: Distiller, trained: Distiller) -> None:
    """Give `distiller` the weights of the one that is trained, if that is another: a sharded one."""
    if trained is not distiller:
        load_trainable(distiller.to("cpu"), whole(trainable(trained)))


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
            optimizer.state[parameter][key] = part_of(tensors[f"{name}.{key}"], parameter)
        # AdamW keeps its step counter beside the parameter only when fused.
        optimizer.state[parameter]["step"] = tensors[f"{name}.step"].to(parameter.device)


@cache
def code_of_a_step() -> dict[str, str]:
    """What computes a step: glmd's version with a hash of the modules that do, and the libraries' versions."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(path for pattern in STEP_MODULES for path in package.glob(pattern)):
        digest.update(path.read_bytes())
    libraries = {name: version(name) for name in LIBRARIES}
    return {"glmd": f"{__version__}, {digest.hexdigest()[:12]}", **libraries}
