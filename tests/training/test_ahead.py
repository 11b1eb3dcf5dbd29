"""What a step is fed with, and how backbones are compiled while a stage trains."""

from typing import Any

import pytest
import torch
from test_trainer import distiller_of, teacher_of
from torch._dynamo.exc import TorchDynamoException

from glmd.errors import ConfigError
from glmd.training.ahead import ahead
from glmd.training.compiling import compiled

CPU = torch.device("cpu")


def test_steps_come_in_their_order_and_what_their_loader_raises_is_raised() -> None:
    def batches() -> Any:
        for step in range(3):
            yield [{"input_ids": torch.full((1, 2), 10 * step + micro)} for micro in range(2)]
        raise KeyError("the loader's")

    fed = ahead(batches(), None, CPU)
    for step in range(3):
        micro_batches = next(fed)
        assert [int(each.batch["input_ids"][0, 0]) for each in micro_batches] == [10 * step, 10 * step + 1]
        assert all(each.on_device["input_ids"] is each.batch["input_ids"] for each in micro_batches)
        assert all(each.teacher_outputs is None for each in micro_batches)
    with pytest.raises(KeyError, match="the loader's"):
        next(fed)


def test_backbones_of_student_and_teacher_are_compiled_and_afterwards_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def compile_module(module: Any, *, dynamic: bool) -> Any:
        asked.append((module, dynamic))
        return lambda **given: ("compiled", module)

    monkeypatch.setattr(torch, "compile", compile_module)
    distiller, teacher = distiller_of(), teacher_of()
    splits = distiller.splits[0], teacher.splits[0]
    with compiled([distiller, teacher], True):
        assert asked == [(split.backbone, True) for split in splits]
        assert all(split.run_backbone({}) == ("compiled", split.backbone) for split in splits)
    assert all(split.compiled is None for split in splits)


def test_a_backbone_that_cannot_be_compiled_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> Any:
        raise TorchDynamoException("no compiler\nand a traceback")

    monkeypatch.setattr(torch, "compile", lambda module, dynamic: fails)
    distiller = distiller_of()
    with compiled([distiller], False), pytest.raises(ConfigError) as refused:
        distiller.splits[0].run_backbone({})
    assert str(refused.value).startswith("torch_compile: ") and "\n" not in str(refused.value)
    assert "(no compiler); remove it" in str(refused.value)
