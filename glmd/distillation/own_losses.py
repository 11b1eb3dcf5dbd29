"""A loss of the user's own: a function in a Python file that a method's YAML names.

    {signal: hidden_states, loss: my_losses.py:absolute}      # beside the YAML

The file is run with all rights of who runs glmd. A function is given a student's and a teacher's tensor, as those that
come with glmd; keyword-only parameters are options of the term. It is tried on a few numbers before anything else.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glmd.distillation.own_code import run_own_file, sha256_of
from glmd.distillation.schedules import scheduled
from glmd.distillation.signals import SIGNALS, takes
from glmd.errors import ConfigError
from glmd.losses.feature_loss import FeatureLoss


class OwnLoss(NamedTuple):
    """The key under which a loss was added to those of its signal, and the sha256 of its file and its imports."""

    key: str
    source: Mapping[str, str]


class _Run(NamedTuple):
    module: ModuleType
    files: Mapping[str, str]


_RUNS: dict[Path, _Run] = {}


def is_own(loss: Any) -> bool:
    """Whether a term's loss names a file."""
    return isinstance(loss, str) and ".py:" in loss


def add_own_loss(loss: str, signal: str, beside: Path, where: str) -> OwnLoss:
    """Run the file of a loss and add the function to those of a signal, under a key that no other file can have.

    beside: the method's YAML, whose folder the file is looked for in. Raises ConfigError that begins with `where`.
    """
    file, _, name = loss.rpartition(":")
    path = beside.parent / Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"{where}.loss: {path} is no file; its place counts from the method's YAML")
    if signal == "lm_labels":
        raise ConfigError(f"{where}.loss: lm_labels have one loss, hard_cross_entropy")
    module, files = _run(path.resolve(), where)
    key, losses = f"{name}@{_digest(files)[:16]}", SIGNALS[signal].losses
    assert isinstance(losses, dict), "a table"
    if key not in losses:
        function = _function(path, module, name, where)
        is_feature = SIGNALS[signal].level == "layer" and not isinstance(function, FeatureLoss)
        losses[key] = FeatureLoss(function) if is_feature else function
    return OwnLoss(key, files)


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(files.values()).encode()).hexdigest()


def _run(path: Path, where: str) -> _Run:
    """What a file gave when it was last run, if it and what it imported are what they were."""
    known = _RUNS.get(path)
    if known is not None and all(_is_as_it_was(path.parent / name, found) for name, found in known.files.items()):
        return known
    try:
        module, files = run_own_file(path)
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        raise ConfigError(f"{where}.loss: {path} cannot be run ({type(error).__name__}: {error})") from error
    _RUNS[path] = _Run(module, files)
    return _RUNS[path]


def _is_as_it_was(path: Path, found: str) -> bool:
    return path.is_file() and sha256_of(path) == found


def _function(path: Path, module: ModuleType, name: str, where: str) -> Callable[..., Tensor]:
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{where}.loss: {path} has no function {name}")
    return found


def try_loss(loss: Any, signal: str, options: Mapping[str, Any], where: str, *, is_own: bool) -> None:
    """Try a loss with its options on numbers of two sizes. Raises ConfigError that begins with `where`.

    is_own: whatever it raises or returns is looked at; else only whether it takes the options.
    """
    options = {key: scheduled(each, 0.5) if key == "temperature" else each for key, each in options.items()}
    for count in (3, 5):
        given: dict[str, Any] = {"progress": 0.5}
        if SIGNALS[signal].level == "example":
            given["labels"] = torch.arange(count) % 5
        more = {name: value for name, value in given.items() if takes(loss, name)}
        student, teacher, valid = _numbers(signal, getattr(loss, "unit", "token"), count)
        if getattr(loss, "takes_all_layers", False):
            student, teacher = (each.expand(2, *each.shape).clone() for each in (student, teacher))
        student, shape, before = student.requires_grad_(), tuple(student.shape), teacher.clone()
        try:
            values = loss(student, teacher, *valid, **options, **more)
            if not is_own:
                return
            values.sum().backward()
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None
        except Exception as error:  # whatever a user's code raises
            if not is_own:
                return
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{where}.loss fails on {shape} numbers ({type(error).__name__}: {reason})") from error
        wanted = tuple(valid[0].shape) if getattr(loss, "unit", "token") == "row" else (count,)
        finite = student.grad is not None and bool(values.isfinite().all() and student.grad.isfinite().all())
        if tuple(values.shape) != wanted or not finite:
            raise ConfigError(
                f"{where}.loss must give a finite, differentiable value for each of {count} rows of {shape}, gave "
                f"{tuple(values.shape)}"
            )
        if not torch.equal(before, teacher):
            raise ConfigError(f"{where}.loss changes the teacher's numbers, which other terms read; copy them first")


def _numbers(signal: str, unit: str, count: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """A student's numbers, a teacher's or labels, and, of rows, which tokens are valid."""
    generator, heads = torch.Generator().manual_seed(0), signal in _OF_HEADS
    shape = (count, *(() if unit == "token" else (3,)), *((2, 4) if heads else (5,)))
    student, teacher = (torch.rand(shape, generator=generator).softmax(-1) for _ in range(2))
    if SIGNALS[signal].labels is not None:
        teacher = torch.arange(count) % 5
    return student, teacher, () if unit == "token" else (torch.ones(count, 3, dtype=torch.bool),)


_OF_HEADS = ("attentions", "attention_scores", "queries", "keys", "values")
