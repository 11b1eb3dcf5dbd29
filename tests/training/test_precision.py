"""Weights are trained in float32 whatever a file holds, teachers scored in the precision that they teach in."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from test_trainer import distiller_of, settings_of, trainer_of
from transformers import AutoModelForMaskedLM, AutoTokenizer

import glmd.losses.products
from glmd.commands.check import describe
from glmd.config import TeacherConfig
from glmd.config_file import load_config
from glmd.errors import ModelError, RunError
from glmd.losses.head import Head
from glmd.losses.linear import linear_distillation_loss
from glmd.losses.products import converted
from glmd.models.loading import load_language_model
from glmd.models.weight_headers import stored_embeddings
from glmd.planning.plan import make_plan
from glmd.planning.rules import resolve
from glmd.tasks.loading import load_classifier
from glmd.tasks.tasks import load_task
from glmd.training.optimizer import make_optimizer

HALVES = (torch.bfloat16, torch.float16)


def dtypes(model: Any) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}


@pytest.fixture
def half_teacher(tiny: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The tiny teacher as a file of half precision."""
    folder = tmp_path / "half"
    AutoModelForMaskedLM.from_pretrained(tiny.teacher).to(request.param).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.teacher).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("half_teacher", HALVES, indirect=True)
@pytest.mark.parametrize("casting", ["head", "cloze"])
def test_a_task_model_is_float32_whatever_its_file_holds(half_teacher: Path, casting: Any) -> None:
    task = load_task("RTE", casting)
    assert dtypes(load_classifier(str(half_teacher), task, new_head=True)) == {torch.float32}
    asked = load_classifier(str(half_teacher), task, new_head=True, dtype=torch.bfloat16)
    assert dtypes(asked) == {torch.bfloat16}
    assert dtypes(load_language_model(TeacherConfig(str(half_teacher)))) == {torch.float32}


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_of_half_precision_are_not_trained(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"language_model.* is (b?float16), in which it would not learn"):
        make_optimizer(distiller_of().to(dtype), settings_of())


@pytest.mark.slow
@pytest.mark.parametrize("half_teacher", [torch.bfloat16], indirect=True)
def test_a_run_of_a_half_precision_teacher_trains_float32_and_scores_what_teaches(
    tiny: Any, half_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import glmd.pipeline.teachers
    from glmd.pipeline.run import run

    loaded: list[tuple[str, torch.dtype]] = []
    real = glmd.pipeline.teachers.load_classifier

    def load(name: str, *rest: Any, **options: Any) -> Any:
        model = real(name, *rest, **options)
        loaded.append((Path(name).parent.name, *dtypes(model)))
        return model

    monkeypatch.setattr("glmd.pipeline.teachers.load_classifier", load)
    run(
        tiny.config(tmp_path / "run", f"teacher={half_teacher}", "teacher.dtype=bfloat16", "controls.hard_labels=false")
    )
    written = sorted((tmp_path / "run").rglob("model.safetensors"))
    assert len(written) == 4, "the task's teacher, and the student after each stage"
    assert {tensor.dtype for path in written for tensor in load_file(path).values()} == {torch.float32}
    asked = [dtype for folder, dtype in loaded if folder == "task_teacher"]
    assert len(asked) >= 3 and set(asked) == {torch.bfloat16}, "scored, asked and compared with in one precision"


@pytest.mark.parametrize("half_teacher", HALVES, indirect=True)
def test_check_says_in_which_precision_is_trained(tiny: Any, half_teacher: Path, tmp_path: Path) -> None:
    plan = make_plan(tiny.config(tmp_path / "run", f"teacher={half_teacher}"))
    said = describe(replace(plan, config=replace(plan.config, mixed_precision="fp16")), 1)  # which a CPU refuses
    held = "bfloat16" if "bfloat16" in (half_teacher / "config.json").read_text() else "float16"
    assert f"trained in float32, though the teacher's file holds {held}; the teacher runs in float32" in said
    assert "products with LM heads run in float32" in said
    said = describe(make_plan(tiny.config(tmp_path / "run")), 1)
    assert "trained in float32; the teacher runs in float32\n" in said


def test_a_frozen_head_is_converted_once_and_anew_when_it_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, frozen = torch.randn(6, 8, generator=generator), [torch.randn(40, 8, generator=generator)]
    student = torch.randn(40, 8, generator=generator, requires_grad=True)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_distillation_loss(hidden, Head(student), hidden, Head(frozen[0]))

    before, ours = loss(), converted(frozen[0], torch.bfloat16)
    assert ours.dtype == torch.bfloat16 and converted(frozen[0], torch.bfloat16) is ours
    assert torch.equal(loss(), before) and student not in glmd.losses.products._constants
    frozen[0].add_(1.0 * torch.arange(40)[:, None])
    assert torch.equal(converted(frozen[0], torch.bfloat16), frozen[0].bfloat16()) and not torch.equal(loss(), before)
    known = len(glmd.losses.products._constants)
    del frozen[:]
    assert len(glmd.losses.products._constants) == known - 1, "it is kept no longer than the teacher"


def test_the_loss_scale_begins_anew_in_each_stage(tmp_path: Path) -> None:
    """Else a stage that is resumed in a new process would have another than one that follows a stage."""
    AcceleratorState._reset_state(True)
    trainer = trainer_of(tmp_path, settings_of())
    of_another_stage = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    _, _, optimizer = trainer._prepare(distiller_of())
    scaler = trainer.accelerator.scaler
    assert scaler is not of_another_stage and scaler is optimizer.scaler
    assert scaler.state_dict() == torch.amp.GradScaler("cpu").state_dict()
    AcceleratorState._reset_state(True)


@pytest.mark.cuda
def test_a_run_in_fp16_says_once_that_heads_run_in_float32(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from glmd.pipeline.run import run

    with caplog.at_level(logging.INFO):
        run(tiny.config(tmp_path / "run", "mixed_precision=fp16"))
    assert caplog.text.count("products with LM heads run in float32") == 1


@pytest.mark.parametrize(
    ("gpu", "bf16", "cpu_asked", "dtype"),
    [
        (False, False, "", "float32"),
        (True, True, "", "bfloat16"),
        (True, False, "", "float32"),
        (True, True, "true", "float32"),
    ],
)
def test_dtype_auto_is_bfloat16_on_a_gpu_that_has_it(tiny, tmp_path, monkeypatch, gpu, bf16, cpu_asked, dtype):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setenv("ACCELERATE_USE_CPU", cpu_asked)
    config = tiny.config(tmp_path / "run")
    assert config.teacher.dtype == "auto" and resolve(config)[1].teacher.dtype == dtype
    asked = tiny.config(tmp_path / "run", "teacher.dtype=float16")
    assert resolve(asked)[1].teacher.dtype == "float16"


def test_a_run_goes_on_in_the_dtype_that_it_was_begun_with_on_whatever_machine(
    finished: Any, tiny: Any, tmp_path: Path, trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmd.pipeline.run import run

    folder = finished.copy(tmp_path / "run")
    monkeypatch.setattr("glmd.planning.rules._dtype_here", lambda: "bfloat16")
    assert run(tiny.config(folder)) == finished.results
    assert load_config(folder / "config.yaml").teacher.dtype == "float32"
    with pytest.raises(RunError, match=r"holds another run \(teacher.dtype: 'float32' -> 'bfloat16'\)"):
        run(tiny.config(folder, "teacher.dtype=bfloat16"))
    (folder / "config.yaml").unlink()  # the stages know it too
    with pytest.raises(RunError, match=r"made from other inputs \(teacher_dtype: 'float32' -> 'bfloat16'\)"):
        run(tiny.config(folder))


@pytest.mark.parametrize("half_teacher", [torch.bfloat16, torch.float32], indirect=True)
def test_embeddings_are_read_alone_and_as_a_whole_model_has_them(
    half_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = TeacherConfig(str(half_teacher), dtype="float32")
    expected = load_language_model(teacher)
    monkeypatch.setattr("glmd.models.loading.require_complete", None)  # which a whole model goes through
    embeddings, model = stored_embeddings(teacher, "input")
    assert embeddings.dtype == torch.float32 and torch.equal(embeddings, expected.get_input_embeddings().weight)
    assert all(each.is_meta for each in model.parameters())
    tensors = load_file(half_teacher / "model.safetensors")
    tensors = {name.removeprefix("bert."): each for name, each in tensors.items()}
    save_file(tensors, half_teacher / "model.safetensors", metadata={"format": "pt"})
    assert stored_embeddings(teacher, "input")[0] is None, "by another name: the whole model is loaded"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("half_teacher", HALVES, indirect=True)
def test_a_weight_that_is_not_finite_is_refused(half_teacher: Path, value: float) -> None:
    tensors = load_file(half_teacher / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.bias"][3] = value
    save_file(tensors, half_teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer.1.output.dense.bias holds values that are not finite"):
        load_language_model(TeacherConfig(str(half_teacher)))
