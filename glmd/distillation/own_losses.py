"""A loss of the user's own: a function in a Python file that a method's YAML names.

    {signal: hidden_states, loss: my_losses.py:absolute}      # beside the YAML

The file is run with all rights of who runs glmd. A function is given a student's and a teacher's tensor, as those that
come with glmd; keyword-only parameters are options of the term. It is tried on a few numbers before anything else.
"""

import hashlib
import importlib.util
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glmd.distillation.signals import SIGNALS
from glmd.errors import ConfigError
from glmd.losses.feature_loss import FeatureLoss
from glmd.losses.rows import ROW_LOSSES, rows_by_autograd


class OwnLoss(NamedTuple):
    """Under which name a loss was added, and the sha256 of its file."""

    name: str
    source: str


_added: dict[tuple[str, str], str] = {}  # (signal, name) -> sha256 of the file it came from


def is_own(loss: Any) -> bool:
    """Whether a term's loss names a file."""
    return isinstance(loss, str) and ".py:" in loss


def add_own_loss(loss: str, signal: str, beside: Path, where: str) -> OwnLoss:
    """Run the file of a loss and add the function to those of a signal. Raises ConfigError that begins with `where`.

    beside: the method's YAML, whose folder the file is looked for in.
    """
    file, _, name = loss.rpartition(":")
    path = beside.parent / Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"{where}.loss: {path} is no file; its place counts from the method's YAML")
    source = hashlib.sha256(path.read_bytes()).hexdigest()
    losses: Any = SIGNALS[signal].losses
    if _added.get((signal, name)) == source:
        return OwnLoss(name, source)
    if name in losses and (signal, name) not in _added:
        raise ConfigError(f"{where}.loss: {name} is the name of a loss that comes with glmd; give the function another")
    if signal == "lm_labels":
        raise ConfigError(f"{where}.loss: lm_labels have one loss, hard_cross_entropy")
    _add(losses, name, _function(path, name, where), signal, where)
    _added[signal, name] = source
    return OwnLoss(name, source)


def _add(losses: MutableMapping[str, Any], name: str, function: Any, signal: str, where: str) -> None:
    is_feature = SIGNALS[signal].level == "layer"
    made = FeatureLoss(function) if is_feature and not isinstance(function, FeatureLoss) else function
    if not is_feature or made == FeatureLoss(function):
        _try(function, signal, where)
    losses[name] = made
    if signal == "lm_logits":
        ROW_LOSSES[name] = rows_by_autograd(function)


def _function(path: Path, name: str, where: str) -> Callable[..., Tensor]:
    spec = importlib.util.spec_from_file_location(f"glmd_own_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a Python file"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's code raises
        raise ConfigError(f"{where}.loss: {path} cannot be run ({type(error).__name__}: {error})") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{where}.loss: {path} has no function {name}")
    return found


def _try(function: Callable[..., Tensor], signal: str, where: str) -> None:
    """Refuse a function that does not give a differentiable value for each row."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 5) if signal in _OF_ROWS else (3, 2, 5)
    student, teacher = (torch.rand(shape, generator=generator).softmax(-1) for _ in range(2))
    target = torch.tensor([0, 1, 2]) if SIGNALS[signal].labels is not None else teacher
    try:
        values = function(student.requires_grad_(), target)
        given = tuple(values.shape)
        values.sum().backward()
    except Exception as error:  # whatever a user's code raises
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}.loss fails on {shape} numbers ({type(error).__name__}: {reason})") from error
    if given != (3,) or student.grad is None or not (values.isfinite().all() and student.grad.isfinite().all()):
        raise ConfigError(
            f"{where}.loss must give a finite, differentiable value for each of 3 rows of {shape}, gave {given}"
        )


_OF_ROWS = ("lm_logits", "task_logits", "task_labels", "hidden_states")  # (N, ...) of one axis more
