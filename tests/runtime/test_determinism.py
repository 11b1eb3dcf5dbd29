"""What asks for the same bits on a GPU is set for a run, refused where it cannot be, and put back afterwards."""

import logging
import os
from typing import Any

import pytest
import torch

from glmd.errors import ConfigError
from glmd.runtime.determinism import FLASH, VARIABLE, cublas_workspace, is_repeatable, same_bits

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def switches() -> list[Any]:
    memory: Any = torch.utils.deterministic
    cudnn = torch.backends.cudnn
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        cudnn.deterministic,
        cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
        os.environ.get(FLASH),
    ]


def test_a_run_on_a_gpu_has_its_switches_and_gives_them_back() -> None:
    before, seen = switches(), []

    def fail() -> None:
        with same_bits(CUDA, True):
            seen.append([*switches(), is_repeatable(CUDA)])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [[True, False, False, True, False, False, "1", True]]
    assert switches() == before and not is_repeatable(CUDA)


@pytest.mark.parametrize(("device", "wanted"), [(CPU, True), (CPU, False), (CUDA, False)])
def test_a_cpu_and_who_wants_speed_are_left_alone(device: torch.device, wanted: bool) -> None:
    before = switches()
    with same_bits(device, wanted):
        assert switches() == before


def test_an_operation_that_has_no_such_form_is_named_with_the_way_out() -> None:
    said = "cumsum_cuda_kernel does not have a deterministic implementation, but you set ..."
    named = r"^deterministic: cumsum_cuda_kernel of this model .*deterministic: false"
    with pytest.raises(ConfigError, match=named), same_bits(CUDA, True):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="out of memory"), same_bits(CUDA, True):
        raise RuntimeError("out of memory")


def test_cublas_is_told_before_it_starts_and_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(VARIABLE, raising=False)
    with cublas_workspace(True):
        assert os.environ[VARIABLE] == ":4096:8"
    assert VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, ":16:8")
    with cublas_workspace(True):
        assert os.environ[VARIABLE] == ":16:8"
    assert os.environ[VARIABLE] == ":16:8"
    monkeypatch.setenv(VARIABLE, ":0:0")
    with cublas_workspace(False):
        assert os.environ[VARIABLE] == ":0:0"
    with pytest.raises(ConfigError, match=f"{VARIABLE}=:0:0 does not give the same bits twice"), cublas_workspace(True):
        pass


def test_the_setting_is_part_of_what_a_run_and_a_stage_are_made_from(
    tiny: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And on a CPU it says that it changes nothing, so that one config serves both."""
    from glmd.errors import RunError
    from glmd.pipeline.run import prepared_run

    def inputs_of(context: Any) -> dict[str, Any]:
        return context.inputs(context.stage("tasks/RTE/task_teacher"))  # which needs no vocabulary

    with caplog.at_level(logging.INFO), prepared_run(tiny.config(tmp_path / "run", "deterministic=false")) as context:
        inputs = inputs_of(context)
    assert inputs["deterministic"] is False and "deterministic: false has no effect on this device" in caplog.text
    with pytest.raises(RunError, match="deterministic: False -> True"), prepared_run(tiny.config(tmp_path / "run")):
        pass
    with prepared_run(tiny.config(tmp_path / "other")) as context:
        inputs = inputs_of(context)
    assert "deterministic" not in inputs, "what was made before there was the key is not made again"
