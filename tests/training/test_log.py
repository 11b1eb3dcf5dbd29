"""The log that a person reads: numbers as they are, however small."""

import json
import logging

import pytest
from accelerate import Accelerator

from glmd.training.log import RunLog


@pytest.mark.parametrize(
    ("loss", "shown"), [(2.9e-05, "2.9e-05"), (0.00012345, "0.0001234"), (12.34567, "12.35"), (float("nan"), "nan")]
)
def test_a_small_loss_is_shown_with_four_digits_and_not_as_zero(tmp_path, capsys, loss, shown):
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    row = {"stage": "pretraining", "step": 2, "max_steps": 4, "loss": loss, "learning_rate": 1e-4}
    RunLog(tmp_path / "log.jsonl", Accelerator(cpu=True)).write(row)
    assert capsys.readouterr().err == f"pretraining  step 2/4  loss {shown}  lr 1.00e-04\n"
    assert json.dumps(json.loads((tmp_path / "log.jsonl").read_text())) == json.dumps(row)


def test_a_tracker_that_fails_is_warned_of_once_and_the_log_goes_on(tmp_path, monkeypatch, caplog):
    accelerator, calls = Accelerator(cpu=True), []

    def unreachable(*_, **__):
        calls.append(0)
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(accelerator, "log", unreachable)
    log = RunLog(tmp_path / "log.jsonl", accelerator)
    with caplog.at_level(logging.WARNING, logger="glmd"):
        for step in (1, 2, 3):
            log.write({"stage": "pretraining", "step": step, "loss": 1.0})
    assert len(calls) == 1 and caplog.text.count("the server is gone; the run goes on without it") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
