"""Every method that comes with glmd: it builds, lowers its own losses, and ends in the same bits when it was killed."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from glmd.distillation.methods import load_method
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.planning.stages import stages
from glmd.training.trainer import Trainer

METHODS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml"))
STEPS = 30


@pytest.fixture(scope="module")
def four_layers(tiny, tmp_path_factory):
    """A teacher of four layers and 192 numbers a token, which all methods can divide."""
    import torch

    folder = tmp_path_factory.mktemp("methods") / "teacher"
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer = BertTokenizer.from_pretrained(tiny.teacher)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tiny, four_layers):
    def made(output, method, *more):
        task_stages = [name for name in load_method(method) if name not in ("pretraining", "task_lm")]
        own = [f"stages.{name}.max_steps={STEPS}" for name in task_stages if name != "task_soft_labels"]
        lengths = [f"{name}.max_steps={STEPS}" for name in ("pretraining", "task_lm", "task_soft_labels")]
        layers = 3 if method == "mgskd" else 2  # whose upper ones begin behind the second
        dropout = "{hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}"
        student = f"student={{num_hidden_layers: {layers}, config: {dropout}}}"
        saves = [f"{name}.save_steps=10" for name in ("pretraining", "task_lm", "task_soft_labels")]
        return tiny.config(
            output, f"teacher={four_layers}", student, f"method={method}", "controls.hard_labels=false", *lengths, *own,
            *saves, "task_lm.num_train_epochs=", "task_soft_labels.num_train_epochs=",
            *(f"{name}.logging_steps=5" for name in ("pretraining", "task_lm", "task_soft_labels")), *more,
        )  # fmt: skip

    return made


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_checked_and_planned_with_its_own_stages(method, config, tmp_path):
    plan = make_plan(config(tmp_path / "run", method), hash_corpus=False)
    kinds = [stage.kind for stage in stages(plan, 1) if stage.variant == "student" and stage.objective is not None]
    assert kinds == [*load_method(method)]


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_losses_and_a_killed_run_ends_in_the_same_bits(
    method, config, tmp_path, monkeypatch, trusting
):
    results = run(config(tmp_path / "whole", method))
    rows = {row["stage"]: row for row in results["rows"] if row["system"] == "student"}
    for name, objective in load_method(method).items():
        log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
        of_stage = [line for line in log if line.get("stage", "").endswith(name) and "loss" in line]
        first, last = (sum(line["loss"] for line in part) / 2 for part in (of_stage[:2], of_stage[-2:]))
        assert math.isfinite(last), name
        assert last < first or objective.changes, f"{name}: {first} -> {last}"
        assert rows[name]["training"]["steps"] == STEPS
    step, killed = Trainer._step, []

    def dying(self, *arguments):
        if arguments[4] == 17 and self.stage not in killed:
            killed.append(self.stage)
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", dying)
    again = config(tmp_path / "killed", method)
    for _ in range(8):
        try:
            run(again)
            break
        except KeyboardInterrupt:
            continue
    assert len(killed) == len(load_method(method))
    ends = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("student/*.safetensors"))
    assert len(ends) >= len(load_method(method))
    for path in ends:
        ours, theirs = (load_file(tmp_path / place / path) for place in ("whole", "killed"))
        assert all(ours[key].equal(theirs[key]) for key in ours), path
        assert not any("projection" in key for key in ours)
