"""A quantized teacher: what of it is rounded, what stays whole, and what a run makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    SqueezeBertConfig,
    SqueezeBertForMaskedLM,
)

from glmd.config import TeacherConfig
from glmd.errors import ConfigError, ModelError, RunError
from glmd.models.heads import Split
from glmd.models.loading import load_language_model
from glmd.models.quantization import LIBRARY, is_quantized, quantized_linears, quantized_savings
from glmd.planning.checks import model_on_meta
from glmd.planning.plan import make_plan
from glmd.tasks.loading import load_classifier
from glmd.tasks.tasks import load_task

KINDS = ("8bit", "4bit")


@pytest.fixture
def library() -> Any:
    return pytest.importorskip(LIBRARY)


@pytest.fixture(scope="module")
def teacher(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As that of `tiny`, of a width that the kernels of a CPU take."""
    folder, config = tmp_path_factory.mktemp("wide"), AutoConfig.from_pretrained(tiny.teacher)
    config.hidden_size, config.intermediate_size, config.initializer_range = 64, 128, 0.1
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.teacher).save_pretrained(folder)
    return folder


def hidden_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    split = Split(model)
    with torch.no_grad():
        return split.hidden_before_final(split.run_backbone({"input_ids": ids, "attention_mask": ids * 0 + 1}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_rounded_and_head_and_embeddings_are_those_of_the_files(
    teacher: Path, library: Any, kind: Any, dtype: Any
) -> None:
    whole = load_language_model(TeacherConfig(str(teacher), dtype=dtype))
    found = load_language_model(TeacherConfig(str(teacher), dtype=dtype, quantization=kind))
    assert is_quantized(found) and not is_quantized(whole)
    layers = quantized_linears(whole)
    assert len(layers) == 2 * 6, "of each layer the attention's four maps and the two behind it"
    wanted = library.nn.Linear8bitLt if kind == "8bit" else library.nn.Linear4bit
    assert {name for name, module in found.named_modules() if isinstance(module, wanted)} == set(layers)
    head, embeddings = Split(found).head, found.get_input_embeddings().weight
    assert head.weight is embeddings and type(head.weight) is torch.nn.Parameter
    assert torch.equal(head.weight, Split(whole).head.weight) and head.weight.dtype == getattr(torch, dtype)
    ids = torch.arange(5, 17).reshape(1, -1)
    ours, theirs = hidden_of(found, ids).float(), hidden_of(whole, ids).float()
    error = float((ours - theirs).norm() / theirs.norm())
    assert 1e-4 < error < {"8bit": 0.03, "4bit": 0.3}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_quantized_teacher_says_of_a_text_does_not_depend_on_the_texts_beside_it(
    teacher: Path, library: Any, kind: Any
) -> None:
    model = load_language_model(TeacherConfig(str(teacher), quantization=kind))
    with torch.no_grad():  # one activation far beyond the others, which bitsandbytes would look for in the whole batch
        model.get_input_embeddings().weight[6] = 1000 * torch.eye(64)[3]
    ids = torch.tensor([[5, 7, 8, 9], [6, 6, 6, 6]])
    assert torch.allclose(hidden_of(model, ids)[:1], hidden_of(model, ids[:1]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_the_bytes_that_a_quantized_teacher_takes(teacher: Path, library: Any, kind: Any) -> None:
    model = load_language_model(TeacherConfig(str(teacher), quantization=kind))
    on_meta = model_on_meta("teacher", AutoConfig.from_pretrained(teacher))
    scales = 0
    for module in model.modules():
        if isinstance(module, library.nn.Linear8bitLt):
            scales += (module.state.SCB if module.state.SCB is not None else module.weight.SCB).nbytes
        elif isinstance(module, library.nn.Linear4bit):
            scales += module.weight.quant_state.absmax.nbytes
    before = sum(each.nbytes for each in on_meta.parameters())
    after = sum(each.nbytes for each in model.parameters()) + scales
    # In 4 bits a CPU's kernel may keep the scales in two bytes, not in four.
    assert after <= before - quantized_savings(on_meta, kind) <= after + (scales if kind == "4bit" else 0)


def test_a_model_without_linear_layers_and_one_that_is_quantized_already_are_refused() -> None:
    config = SqueezeBertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        embedding_size=16,
    )
    model = SqueezeBertForMaskedLM(config)  # whose layers are convolutions
    model.transformer.pooler = None
    with pytest.raises(ModelError, match="SqueezeBertForMaskedLM has no layer that bitsandbytes quantizes"):
        quantized_linears(model)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="are quantized in its files; remove the key"):
        quantized_linears(model)


def test_check_names_the_extra_where_the_library_is_missing(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmd.models.quantization.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed; pip install 'glmd\[quantization\]'"):
        make_plan(tiny.config(tmp_path / "run", "teacher.quantization=8bit"))


def test_a_quantized_teacher_is_not_shared_out(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization and sharded are both given; quantized weights cannot be"):
        tiny.config(tmp_path / "run", "teacher.quantization=8bit", "teacher.sharded=true")


def test_a_fine_tuned_teacher_keeps_its_task_head(teacher: Path, library: Any, tmp_path: Path) -> None:
    labels = ["entailment", "not_entailment"]
    config = AutoConfig.from_pretrained(
        teacher, id2label=dict(enumerate(labels)), label2id={labels[0]: 0, labels[1]: 1}
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), load_task("RTE"), quantization="8bit")
    assert is_quantized(model) and type(model.classifier) is torch.nn.Linear
    assert type(model.bert.pooler.dense) is library.nn.Linear8bitLt


def test_sharding_a_teacher_where_nothing_is_sharded_is_refused(tiny: Any, tmp_path: Path) -> None:
    from glmd.pipeline.run import prepared_run

    refused = pytest.raises(ConfigError, match=r"teacher\.sharded has no effect without FSDP; launch with")
    with refused, prepared_run(tiny.config(tmp_path / "run", "teacher.sharded=true")):
        pytest.fail("it is prepared")


@pytest.mark.slow
def test_a_run_learns_from_the_quantized_teacher_and_begins_with_the_whole_one(
    tiny: Any, teacher: Path, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import glmd.pipeline.run_stage
    from glmd.pipeline.run import complete, prepared_run, run

    copied, build = [], glmd.pipeline.run_stage.build_student

    def copy(source: Any, *rest: Any, **options: Any) -> Any:
        copied.append(is_quantized(source))
        return build(source, *rest, **options)

    monkeypatch.setattr("glmd.pipeline.run_stage.build_student", copy)
    settings = ["tasks={}", "pretraining.num_maskings=1", "pretraining.max_steps=2", f"teacher.model={teacher}"]
    settings += [f"teacher.cache={tmp_path / 'cache'}"]
    with prepared_run(tiny.config(tmp_path / "run", *settings, "teacher.quantization=4bit")) as context:
        _, found = [complete(context, stage) for stage in context.stages]
    assert copied == [False]
    assert 0 < found["quantization"]["kl_divergence"] < 0.1 and 0.7 < found["quantization"]["agreement"] <= 1
    with pytest.raises(RunError, match=r"quantization: '4bit' -> '8bit'"):
        run(tiny.config(tmp_path / "other", *settings, "teacher.quantization=8bit"))
