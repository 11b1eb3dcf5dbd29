"""Every method that comes with glmd: it builds, lowers its own losses, and ends in the same bits when it was killed.

And with the same weights on two ranks, replicated or sharded, or it is refused there.
"""

import json
import math
import multiprocessing
import os
import socket
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import save_encoder
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

import glmd.pipeline.exports
import glmd.pipeline.run
import glmd.storage
from glmd.distillation.methods import load_method
from glmd.errors import ConfigError, GlmdError
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.planning.stages import stages
from glmd.training.trainer import Trainer

METHODS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml"))
STEPS = 30


@pytest.fixture(scope="module")
def four_layers(tiny, tmp_path_factory):
    """A teacher of four layers and 192 numbers a token, which all methods can divide."""
    folder = tmp_path_factory.mktemp("methods") / "teacher"
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer = BertTokenizer.from_pretrained(tiny.teacher)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    config.num_hidden_layers = 2
    BertForMaskedLM(config).save_pretrained(folder / "small")
    for place in (folder, folder / "small"):
        tokenizer.save_pretrained(place)
    save_encoder(folder / "encoder", folder / "small", pooling="mean_tokens")
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
        if method in ("takd", "dgkd"):
            more = ("assistants=[{num_hidden_layers: 3}, {num_hidden_layers: 2}]", *more)
        elif any(objective.weighs_teachers for objective in load_method(method).values()):
            more = (f"teacher.ensemble=[{four_layers / 'small'}]", *more)
        teacher = four_layers
        if any("sentence_embeddings" in each.name for every in load_method(method).values() for each in every.terms):
            teacher, sentences = (
                four_layers / "encoder",
                f"{{own: {{train: {tiny.corpus}, text: text, max_length: 32}}}}",
            )
            more = (f"tasks={sentences}", *more)
        saves = [f"{name}.save_steps=10" for name in ("pretraining", "task_lm", "task_soft_labels")]
        return tiny.config(
            output, f"teacher={teacher}", student, f"method={method}", "controls.hard_labels=false", *lengths, *own,
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


LAUNCHES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
}
LIMIT = 300  # seconds, of a run on two ranks


def run_on_rank(config, environment, said):
    """One rank of a run, in a process of its own. said: the file for what it ends with, if that is an error."""
    os.environ.update(environment)
    glmd.storage.sync_to_disk = lambda path: None
    glmd.pipeline.exports.check_exports = lambda folders: None
    glmd.pipeline.run.stranger_ahead = nullcontext
    try:
        run(config)
    except GlmdError as error:
        said.write_text(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
    except BaseException:
        said.write_text(traceback.format_exc())
        raise


def run_on_ranks(config, launch, tmp_path):
    """Exit codes and errors of a run on two ranks, forked from a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    said = [tmp_path / f"rank-{rank}.txt" for rank in range(2)]
    ranks = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(context.Process(target=run_on_rank, args=(config, common | own | LAUNCHES[launch], said[rank])))
        ranks[-1].start()
    try:
        for each in ranks:
            each.join(LIMIT)
        return [each.exitcode for each in ranks], [each.read_text() if each.exists() else "" for each in said]
    finally:
        for each in ranks:
            each.kill()


def losses_of(folder):
    """(stage, step) -> what a run logged of it, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        (line["stage"], line["step"]): [value for key, value in line.items() if key == "loss" or "." in key]
        for line in lines
        if "loss" in line
    }


def students_of(folder):
    return {path.relative_to(folder): load_file(path) for path in sorted(folder.rglob("student/*.safetensors"))}


@pytest.fixture(scope="module")
def on_one_process():
    """Runs of one process by method, which both ways of two ranks are compared with."""
    return {}


@pytest.mark.full
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_two_ranks_as_in_one_process_or_is_refused_there(
    method, launch, config, tmp_path, on_one_process, trusting
):
    """Of one global batch a step: what is logged of each term, and the weights that each stage leaves."""

    def made(name, accumulation):
        keys = [*("pretraining", "task_teacher", "task_lm", "task_soft_labels")]
        own = [f"stages.{each}.max_steps=4" for each in load_method(method) if each not in keys]
        # Some gradients are zero but for rounding, which AdamW would make large without a large epsilon.
        common = ["per_device_train_batch_size=4", "adam_epsilon=1e-3", "logging_steps=1", "max_steps=4"]
        common += [f"gradient_accumulation_steps={accumulation}", "num_train_epochs="]
        return config(tmp_path / name, method, *own, *(f"{key}.{each}" for key in keys for each in common))

    codes, said = run_on_ranks(made(launch, 1), launch, tmp_path)
    if any(objective.couples for objective in load_method(method).values()):
        assert codes == [ConfigError.exit_code] * 2
        assert all("launch one" in each and "\n" not in each for each in said), said
        return
    assert codes == [0, 0], said
    if method not in on_one_process:
        run(made("one", 2))
        on_one_process[method] = losses_of(tmp_path / "one"), students_of(tmp_path / "one")
    losses, students = on_one_process[method]
    found = losses_of(tmp_path / launch)
    assert found.keys() == losses.keys() and len(losses) >= 4 * len(load_method(method))
    for place, expected in losses.items():
        assert found[place] == pytest.approx(expected, rel=1e-4, abs=1e-6), place
    ours = students_of(tmp_path / launch)
    assert ours.keys() == students.keys()
    for path, weights in students.items():
        for name, tensor in weights.items():
            torch.testing.assert_close(ours[path][name], tensor, rtol=1e-4, atol=1e-5, msg=f"{path}: {name}")
