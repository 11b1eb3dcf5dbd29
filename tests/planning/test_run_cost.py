"""What `glmd plan` says of a run: against the run's own step where there is one, else as properties."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import class_form, cloze_form
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, LlamaConfig

from glmd.cli import main
from glmd.config_file import load_config
from glmd.data.batches import with_positions
from glmd.distillation.distiller import Distiller
from glmd.distillation.methods import load_method
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher
from glmd.errors import ConfigError
from glmd.models.loading import language_model_class
from glmd.planning.plan import is_config_alone, make_plan, make_sketch
from glmd.planning.run_cost import USABLE, Layout, RunCost, run_cost, to_json
from glmd.planning.step_cost import MORE_FLOPS, Allocated, Cast, counted
from glmd.stage_config import StageConfig
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task
from glmd.training.optimizer import make_optimizer
from glmd.vocabulary.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
WORDS = Objective((Term("lm_logits", "kl_divergence", options={"temperature": 15.0}),))
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
B, S, V, K = 4, 32, 600, 320


def bert(layers: int, words: int) -> BertConfig:
    return BertConfig(num_hidden_layers=layers, vocab_size=words, **SHAPE)


def llama(layers: int, words: int) -> LlamaConfig:
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=words, num_key_value_heads=2, **SHAPE)
    config.architectures = ["LlamaForCausalLM"]
    return config


def cast_of(family: Any = bert, **changes: Any) -> Cast:
    return replace(Cast(WORDS, student=family(2, K), source_size=V, teacher=family(4, V)), **changes)


def count_of(family: Any = bert, examples: int = B, **changes: Any) -> Any:
    choices = 3 if changes.get("form") == "choices" else 1
    return counted(cast_of(family, **changes), examples=examples, choices=choices, length=S, fused_attention=False)


FORMS = [class_form(), task_form(load_task("COPA"), kind="masked"), cloze_form("yes", "no")]


@pytest.mark.parametrize("family", [bert, llama])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_memory_and_flops_are_those_of_a_real_micro_batch(family, precision):
    """Of the distiller, teacher and optimizer that training uses, counted on tensors that hold numbers."""
    found = count_of(family, mixed_precision=precision)
    source, student = (language_model_class(config).from_config(config) for config in (family(4, V), family(2, K)))
    vocabulary = Vocabulary(np.arange(K), np.minimum(np.arange(V), K - 1))
    teacher, distiller = (
        OnlineTeacher(source, None, vocabulary),
        Distiller(WORDS, vocabulary.token_map, language_model=student),
    )
    optimizer = make_optimizer(distiller, StageConfig(max_steps=1))
    distiller.train()
    ids = torch.randint(V, (B, S))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][-1, -1] = 0  # else a decoder would need no mask
    batch = with_positions(batch | {"predicts": batch["attention_mask"].bool()})
    for parameter in distiller.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    flops = FlopCounterMode(display=False)
    flops.flop_registry |= MORE_FLOPS
    with Allocated() as allocated, flops:
        outputs = teacher(batch)
        forward, allocated.peak = allocated.peak, allocated.now
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = distiller(batch, outputs).sum()
        loss.backward()
    assert found.teacher == sum(each.nbytes for each in [*source.parameters(), *source.buffers()])
    assert found.student == sum(p.nbytes for p in student.parameters())
    assert found.optimizer == sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert found.teacher_flops + found.student_flops == pytest.approx(flops.get_total_flops(), rel=0.02)
    assert found.student_step == pytest.approx(allocated.peak, rel=0.03)
    assert found.teacher_forward == pytest.approx(forward, rel=0.05)


def test_bytes_are_counted_from_their_making_to_their_end_and_once_for_all_views():
    with Allocated() as allocated:
        one = torch.zeros(250)
        two = one + 1
        del one, two
        three = torch.zeros(100).view(10, 10)
        assert (allocated.peak, allocated.now) == (2000, three.nbytes)


def test_flops_are_two_a_weight_and_token_forward_six_with_backward_and_four_products_of_the_loss():
    found, more = count_of(), count_of(student=bert(2, K + 64))
    layer = 2 * B * S * (64 * 64 * 4 + 2 * 64 * 128) + 2 * 2 * B * S * S * 64  # its weights, and tokens times tokens
    transform = 2 * B * S * 64 * 64  # of the head
    words = 2 * (B * S - 1) * 64  # one product with a word's weights; a token is padding
    assert found.teacher_flops == 4 * layer + transform
    assert found.student_flops == 3 * (2 * layer + transform) + K * words * 4
    assert more.student_flops - found.student_flops == 64 * words * 4


def test_each_further_text_takes_as_much():
    one, two, four = (count_of(examples=n) for n in (32, 64, 128))  # from 512 tokens on the loss's chunks are full
    for name in ("teacher_forward", "student_step", "student_flops"):
        first, second = (getattr(b, name) - getattr(a, name) for a, b in ((one, two), (two, four)))
        assert second == pytest.approx(2 * first, rel=0.01)
    assert one.loss == two.loss


def test_nothing_is_asked_of_a_cached_teacher():
    live, cached = count_of(), count_of(is_cached=True)
    assert (cached.teacher, cached.teacher_flops) == (0, 0)
    assert cached.teacher_forward == (B * S - 1) * 64 * 4  # its hidden states are read all the same
    assert cached.head == live.head and cached.student_flops == live.student_flops


def test_a_gpus_attention_keeps_no_probabilities():
    fused, plain = (counted(cast_of(), examples=B, length=256, fused_attention=on) for on in (True, False))
    probabilities = 2 * B * 4 * 256 * 256 * 4  # of two layers
    assert plain.student_step - fused.student_step > probabilities
    eager, flex = (counted(cast_of(attention=name), examples=B, length=256) for name in ("eager", "flex_attention"))
    assert eager.student_step - fused.student_step > probabilities and flex == fused


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_cached_teachers_answers_to_tasks_need_no_forward(form):
    found = count_of(form=form, is_cached=True, objective=load_method("kd")["task_soft_labels"])
    assert (found.teacher, found.teacher_flops) == (0, 0) < (found.student, found.student_flops)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_of_a_task_can_be_counted(form):
    found = count_of(form=form, objective=load_method("kd")["task_soft_labels"])
    assert found.student_flops == pytest.approx(1.5 * found.teacher_flops, rel=0.1)  # half the layers, and a backward


def test_layers_that_are_run_again_keep_less_and_compute_more():
    kept, again = (count_of(gradient_checkpointing=on) for on in (False, True))
    assert again.student_step < kept.student_step and again.student_flops > kept.student_flops


def test_a_bfloat16_teacher_takes_half():
    assert 2 * count_of(teacher_dtype="bfloat16").teacher == pytest.approx(count_of().teacher, rel=0.01)


# --- Runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cost_of(tiny, tmp_path_factory):
    """The cost of the tiny run with overrides, from one device of 10 GB."""

    def cost(*overrides: str, measure: bool = False, **layout: Any) -> RunCost:
        plan = make_plan(tiny.config(tmp_path_factory.mktemp("costs") / "run", *overrides))
        return run_cost(plan, Layout(**{"device_memory": 1e10, **layout}), measure=measure)

    return cost


def pretraining(cost: RunCost) -> Any:
    return next(stage for stage in cost.stages if stage.name == "pretraining")


def test_every_stage_and_control_has_its_line(cost_of):
    cost = cost_of("seeds=[0,1]")
    assert [(stage.name, stage.runs) for stage in cost.stages] == [
        ("RTE task_teacher", 1),
        ("pretraining", 1),
        ("RTE task_lm", 2),
        ("RTE task_soft_labels", 2),
        ("RTE hard_labels", 2),
    ]
    words, labels, control = cost.stages[2:]
    assert control.steps == words.steps + labels.steps == 6
    assert labels.memory["head"] == 0 < words.memory["head"]
    assert json.loads(to_json(cost))["stages"][1]["tokens"] == 6 * 4 * 16


@pytest.mark.slow
def test_a_swept_first_pass_has_a_second_pass_behind_each_of_its_cells(cost_of):
    stages = cost_of("sweep={task_lm: {learning_rate: [0.1, 0.2]}}", "controls.hard_labels=false").stages
    assert [(stage.name, stage.runs) for stage in stages[2:]] == [
        ("RTE task_lm learning_rate=0.1", 1),
        ("RTE task_lm learning_rate=0.2", 1),
        ("RTE task_soft_labels", 2),
    ]


@pytest.mark.slow
def test_devices_divide_nothing_but_the_steps_unless_weights_are_sharded(cost_of):
    one, many = (pretraining(cost_of("tasks={}", devices=devices)) for devices in (1, 4))
    sharded = pretraining(cost_of("tasks={}", devices=4, sharding="fsdp"))
    parts = ("student", "gradients", "AdamW")
    assert [many.memory[name] for name in parts] == [one.memory[name] for name in parts]
    assert many.memory["buckets"] == many.memory["gradients"] and one.memory["buckets"] == 0
    assert [4 * sharded.memory[name] for name in parts] == [one.memory[name] for name in parts]
    assert sharded.memory["gathered"] > 0 == many.memory["gathered"]  # what is whole for a time
    assert one.memory["teacher"] / 4 < sharded.memory["teacher"] < one.memory["teacher"], "its head is whole"
    whole = pretraining(cost_of("tasks={}", "teacher.sharded=false", devices=4, sharding="fsdp"))
    assert whole.memory["teacher"] == one.memory["teacher"] and sharded.step_flops == 4 * one.step_flops
    assert sharded.memory["teacher forward"] > whole.memory["teacher forward"], "its gathered layers"


def test_a_smaller_vocabulary_shrinks_the_head(cost_of):
    small, large = (pretraining(cost_of("tasks={}", f"vocabulary.keep_ratio={r}")) for r in (0.6, 1.0))
    assert small.memory["head"] < large.memory["head"] and small.memory["of it loss"] < large.memory["of it loss"]
    assert small.memory["teacher"] == large.memory["teacher"]


def test_accumulation_changes_no_memory(cost_of):
    one, many = (pretraining(cost_of("tasks={}", f"pretraining.gradient_accumulation_steps={n}")) for n in (1, 4))
    assert one.memory == many.memory and many.step_flops == 4 * one.step_flops


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not(cost_of):
    settings = ("tasks={}", "pretraining.per_device_train_batch_size=64")
    largest = pretraining(cost_of(*settings, device_memory=2e7)).largest_batch
    needed = [
        pretraining(cost_of("tasks={}", f"pretraining.per_device_train_batch_size={b}", device_memory=2e7))
        for b in (largest, largest + 1)
    ]
    assert [each.fits for each in needed] == [True, False] and needed[0].memory["in all"] <= USABLE * 2e7


@pytest.mark.slow
def test_the_disk_is_known_once_the_corpus_is_tokenized(cost_of, finished):
    cached = ("tasks={}", "teacher.cache=elsewhere", "pretraining.num_maskings=3")
    before = cost_of(*cached)
    config = replace(finished.config, teacher=replace(finished.config.teacher, cache="elsewhere"))
    config = replace(config, pretraining=replace(config.pretraining, num_maskings=3))
    after = run_cost(make_plan(config), Layout(device_memory=1e10))
    assert before.corpus_tokens is None and before.disk["teacher.cache, corpus"] is None
    assert after.corpus_tokens and after.disk["teacher.cache, corpus"] == after.corpus_tokens * 3 * 16 * 2
    assert after.disk["corpus as ids"] == 2 * after.corpus_tokens
    student = pretraining(after).memory
    written = finished.folder / "pretraining" / "student" / "model.safetensors"
    assert written.stat().st_size == pytest.approx(student["student"], rel=0.2)  # a header of some kilobytes


def test_measured_steps_have_seconds(cost_of):
    assert 0 < pretraining(cost_of("tasks={}", measure=True)).step_seconds < 10


# --- A teacher of whom there is a config alone ----------------------------------------------------------------------


def test_the_papers_10b_setting_needs_no_weights(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("docs/plan-10b/run.yaml")
    assert is_config_alone(config.teacher.model)
    sizes = {name: each["total"] for name, each in make_sketch(config).parameters.items()}
    assert 9.8e9 < sizes["teacher"] < 1e10 and 1.8e9 < sizes["student"] < 2e9


@pytest.fixture
def config_alone(tmp_path):
    config = bert(2, V)
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path / "teacher")
    data = ["data.synthetic=false", "data.corpus=[absent]", "data.superglue=absent"]
    return [*data, f"output_dir={tmp_path / 'run'}", f"teacher={tmp_path}/teacher"]


def test_plan_of_a_config_alone_says_what_it_does_not_know(config_alone, capsys):
    assert main(["plan", "quickstart", *config_alone, "tasks={}", "--devices", "2", "--sharding", "fsdp"]) == 0
    printed = capsys.readouterr().out
    assert "2 devices" in printed and "not tokenized yet" in printed and "pretraining" in printed


def test_plan_refuses_in_one_line(tiny, tmp_path, config_alone, capsys):
    run = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}"]
    for arguments, words in (
        (["no-such"], "run 'no-such' is unknown"),
        ([*run, "pretraining.learning_rte=1"], "did you mean learning_rate?"),
        ([*run, "--sharding", "fsdp"], "has no effect on one device"),
        (["quickstart", *config_alone], "holds no tokenizer"),
    ):
        assert main(["plan", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("option", [("--devices", "0"), ("--devices", "two"), ("--device-memory", "-1")])
def test_plan_refuses_numbers_that_are_none(option, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "quickstart", *option])
    assert end.value.code == 2 and f"argument {option[0]}: {option[1]!r} is no" in str(capsys.readouterr().err)


def test_a_step_too_large_for_this_machine_is_not_measured(cost_of, monkeypatch):
    monkeypatch.setattr("glmd.planning.run_cost.memory_of_this_machine", lambda: 1e5)
    with pytest.raises(ConfigError, match="--measure: RTE task_teacher needs"):
        cost_of(measure=True)


def test_layers_with_dropout_in_attention_are_run_again_in_the_count() -> None:
    """The backward runs them outside of what stands for a GPU's attention."""
    shape = {**SHAPE, "attention_probs_dropout_prob": 0.1}
    config = BertConfig(num_hidden_layers=2, vocab_size=64, architectures=["BertForMaskedLM"], **shape)
    objective = load_method("glmd")["pretraining"]
    whole, again = (
        counted(Cast(objective, config, 64, config, gradient_checkpointing=kept), examples=2, length=16)
        for kept in (False, True)
    )
    assert again.student_flops > whole.student_flops
