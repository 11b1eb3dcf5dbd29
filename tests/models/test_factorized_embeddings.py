"""Students with narrow embeddings, as ELECTRA and MobileBERT: where they start, what runs of them leave, refusals."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import one_of
from safetensors.torch import load_file
from test_student import ALL, CUT, KEPT, V, logits_of, random_ids, teacher_of
from torch.nn.functional import kl_div

from glmd.cli import main
from glmd.commands.check import describe
from glmd.commands.verify import verify_folder
from glmd.config import StudentConfig
from glmd.errors import ConfigError
from glmd.models.export import check_exports
from glmd.models.student import build_student
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan

E, H = 6, 16
CLASSES = {"electra": "Electra", "mobilebert": "MobileBert"}


def narrow(architecture: str, *args: Any, **fields: Any) -> StudentConfig:
    return StudentConfig(*args, architecture=architecture, config={"embedding_size": E, **fields})


# --- The start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initialization", ["uniform", "scratch"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_a_narrow_student_is_a_stock_model_of_its_architecture(architecture: str, initialization: str) -> None:
    student = build_student(teacher_of(), CUT, narrow(architecture, 3, initialization), seed=0)
    assert type(student) is getattr(transformers, f"{CLASSES[architecture]}ForMaskedLM")
    assert student.get_input_embeddings().weight.shape == (len(KEPT), E)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert (student.config.num_hidden_layers, student.config.vocab_size) == (3, len(KEPT))
    ours = logits_of(student, torch.from_numpy(CUT.token_map)[random_ids(KEPT[3:])])
    assert ours.shape[-1] == len(KEPT) and ours.isfinite().all()


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_narrow_student_holds_the_layers_it_names(architecture: str) -> None:
    teacher = teacher_of()
    student = build_student(teacher, CUT, narrow(architecture, 2, [1, 4]), seed=0)
    ours, theirs = student.state_dict(), teacher.state_dict()
    copied = [name for name in ours if ".encoder.layer." in name]
    assert len(copied) == 2 * sum(".layer.0." in name for name in theirs)
    for name in copied:
        _, _, _, number, rest = name.split(".", 4)
        assert torch.equal(ours[name], theirs[f"bert.encoder.layer.{(1, 4)[int(number)]}.{rest}"]), name


def test_a_mobilebert_is_the_teacher_where_its_vectors_are_determined_by_their_first_columns() -> None:
    """Head and layers are the teacher's, so nothing but the input is approximated; [PAD] is nothing and says so."""
    teacher = teacher_of()
    teacher.config.layer_norm_eps = 1e-5  # of two of MobileBERT's normalizations the stock class leaves no choice
    for module in teacher.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    with torch.no_grad():
        words = teacher.bert.embeddings.word_embeddings.weight
        words[:, E:] = words[:, :E] @ torch.randn(E, H - E, generator=torch.Generator().manual_seed(1))
    student = build_student(teacher.double(), CUT, narrow("mobilebert"), seed=0)
    ids = random_ids(KEPT[3:])
    ours, theirs = logits_of(student, torch.from_numpy(CUT.token_map)[ids]), logits_of(teacher, ids)[:, KEPT]
    torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], atol=1e-4, rtol=1e-4)


def test_the_vectors_of_an_electra_are_the_best_of_their_width() -> None:
    teacher = teacher_of()
    student = build_student(teacher, ALL, narrow("electra"), seed=0)
    words = teacher.bert.embeddings.word_embeddings.weight.detach().double()
    codes = student.get_input_embeddings().weight.detach().double()
    left, values, right = torch.linalg.svd(words, full_matrices=False)
    best = left[:, :E] * values[:E] @ right[:E]
    # The map to hidden states is that of the codes, times the scale of the teacher's normalization and of the width.
    scale = teacher.bert.embeddings.LayerNorm.weight.detach().double()[:, None] * (H / E) ** 0.5
    back = student.electra.embeddings_project.weight.detach().double() / scale
    torch.testing.assert_close(codes @ back.T, best, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_copied_start_is_nearer_to_the_teacher_than_one_with_fresh_embeddings(architecture: str) -> None:
    teacher, ids = teacher_of(), random_ids(np.arange(3, V))
    with torch.no_grad():  # vectors of a trained model are far from alike in all directions
        teacher.bert.embeddings.word_embeddings.weight[:, 8:] *= 0.2
    target = logits_of(teacher, ids).log_softmax(-1)
    student = build_student(teacher, ALL, narrow(architecture), seed=0)
    fresh = build_student(teacher, ALL, narrow(architecture, None, "scratch"), seed=0)
    around = {name: tensor for name, tensor in fresh.state_dict().items() if ".encoder.layer." not in name}
    distances = []
    for each in (student, build_student(teacher, ALL, narrow(architecture), seed=0)):
        if distances:
            each.load_state_dict(around, strict=False)
        ours = logits_of(each, ids).log_softmax(-1)
        distances.append(kl_div(ours, target, log_target=True, reduction="batchmean").item())
    assert distances[0] < 0.7 * distances[1]


def test_the_pad_vector_of_a_mobilebert_begins_as_zeros() -> None:
    for initialization in ("uniform", "scratch"):
        student = build_student(teacher_of(), CUT, narrow("mobilebert", 2, initialization), seed=0)
        assert student.get_input_embeddings().weight[0].eq(0).all()
        assert student.get_input_embeddings().weight[1:].ne(0).all()


def test_the_bottlenecks_of_a_mobilebert_follow_its_config_from_scratch() -> None:
    fields = {"use_bottleneck": True, "intra_bottleneck_size": 8, "num_feedforward_networks": 2}
    student = build_student(teacher_of(), CUT, narrow("mobilebert", 2, "scratch", **fields), seed=0)
    layer = student.mobilebert.encoder.layer[0]
    assert layer.attention.self.query.weight.shape == (8, 8) and len(layer.ffn) == 1
    with pytest.raises(ConfigError, match=r"student.config.use_bottleneck is True, to copy layers .* must be False;"):
        build_student(teacher_of(), CUT, narrow("mobilebert", 2, **fields), seed=0)


# --- Runs ---------------------------------------------------------------------------------------------------------

RTE = """
name: RTE
folder: RTE
hub_name: rte
fields: [premise, hypothesis]
text: "{{premise}}"
text_pair: "{{hypothesis}}"
labels: [entailment, not_entailment]
metrics: [accuracy]
max_length: 32
cloze: {{text: "{{hypothesis}} {{blank}} .", text_pair: "{{premise}}", verbalizers: [{words}]}}
"""


@pytest.fixture(scope="module")
def narrow_runs(tiny, tmp_path_factory):
    """`narrow_runs("electra", "head")`: folder and results of a whole run on tasks of classes and of choices."""
    root, made = tmp_path_factory.mktemp("narrow"), {}
    words = [word for word in tiny.corpus.read_text().split() if word.isalpha()]
    (root / "rte.yaml").write_text(RTE.format(words=f"{words[0]}, {next(w for w in words if w != words[0])}"))
    rows = [
        {"premise": f"{words[i]} {words[i + 1]} .", "question": "cause", "choice1": f"{words[i]} .",
         "choice2": f"{words[i + 2]} .", "label": i % 2, "idx": i}
        for i in range(12)
    ]  # fmt: skip
    (root / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(architecture: str, casting: str) -> tuple[Path, dict[str, Any]]:
        folder = root / f"{architecture}-{casting}"
        if folder not in made:
            copa = {"train": str(root / "copa.jsonl"), "val": str(root / "copa.jsonl")}
            tasks = {"RTE": {"definition": str(root / "rte.yaml")}} | ({"COPA": copa} if casting == "head" else {})
            settings = [f"student.architecture={architecture}", f"student.config.embedding_size={E}"]
            settings += [f"casting={casting}", f"tasks={json.dumps(tasks)}", "controls.hard_labels=false"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("glmd.pipeline.exports.check_exports", lambda folders: None)
                patch.setattr("glmd.pipeline.run.stranger_ahead", nullcontext)
                made[folder] = run(tiny.config(folder, *settings))
        return folder, made[folder]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("casting", one_of(["head", "cloze"]))
@pytest.mark.parametrize("architecture", CLASSES)
def test_every_student_of_a_run_is_stock_and_states_its_width(narrow_runs, architecture, casting):
    folder, results = narrow_runs(architecture, casting)
    kinds = {
        "pretraining": "MaskedLM",
        "tasks/RTE/seed-0/task_lm": "MaskedLM",
        "tasks/RTE/seed-0/task_soft_labels": "MaskedLM",
    }
    if casting == "head":
        kinds["tasks/RTE/seed-0/task_soft_labels"] = "SequenceClassification"
        kinds["tasks/COPA/seed-0/task_soft_labels"] = "MultipleChoice"
    for place, kind in kinds.items():
        student = folder / place / "student"
        assert json.loads((student / "config.json").read_text())["architectures"] == [
            f"{CLASSES[architecture]}For{kind}"
        ]
        assert f"- embedding_size: {E} (hidden_size {H})\n" in (student / "README.md").read_text()
    labels = [row for row in results["rows"] if row["stage"] == "task_soft_labels"]
    assert len(labels) == len(kinds) - 2 and all(0 <= row["agreement"] <= 1 for row in labels)


@pytest.mark.parametrize("architecture", CLASSES)
def test_the_parameters_of_a_narrow_student_are_those_of_its_folder(narrow_runs, architecture):
    folder, results = narrow_runs(architecture, "head")
    student = transformers.AutoModelForMaskedLM.from_pretrained(folder / "pretraining" / "student")
    kept, total = student.config.vocab_size, sum(parameter.numel() for parameter in student.parameters())
    # MobileBERT's second weight gives its output the width of the hidden states; a bias for each word.
    vocabulary = kept * ((E if architecture == "electra" else H) + 1)
    expected = {"total": total, "vocabulary": vocabulary, "body": total - vocabulary, "embedding_size": E}
    assert results["parameters"]["student"] == expected
    assert results["parameters"]["teacher"]["embedding_size"] == H
    assert next(row for row in results["rows"] if row["stage"] == "pretraining")["parameters"] == expected


@pytest.mark.slow
def test_verify_passes_a_narrow_student_of_each_kind(narrow_runs, monkeypatch):
    folders = [
        narrow_runs(architecture, "head")[0] / place / "student"
        for architecture in CLASSES
        for place in ("pretraining", "tasks/RTE/seed-0/task_soft_labels", "tasks/COPA/seed-0/task_soft_labels")
    ]
    check_exports(folders)  # all in one fresh process, without glmd
    monkeypatch.setattr("glmd.commands.verify.check_exports", lambda _: None)
    for folder in folders:
        assert [check.line() for check in verify_folder(folder) if check.problem] == []


def test_the_pad_vector_of_a_mobilebert_stays_zero_through_both_passes_on_words(narrow_runs):
    for place in ("pretraining", "tasks/RTE/seed-0/task_lm", "tasks/RTE/seed-0/task_soft_labels"):
        folder = narrow_runs("mobilebert", "cloze")[0] / place / "student"
        pad = json.loads((folder / "config.json").read_text())["pad_token_id"]
        words = load_file(folder / "model.safetensors")["mobilebert.embeddings.word_embeddings.weight"]
        assert words[pad].eq(0).all() and words.ne(0).any(1).sum() == len(words) - 1


def test_a_plan_tells_the_width_of_word_vectors(tiny, tmp_path):
    settings = ("student.architecture=electra", f"student.config.embedding_size={E}")
    lines = describe(make_plan(tiny.config(tmp_path / "run", *settings)), 1).splitlines()
    widths = {line.split()[0]: line.split()[-1] for line in lines if line.startswith(("teacher  ", "student  "))}
    assert next(line for line in lines if line.startswith("parameters")).endswith("embedding")
    assert widths == {"teacher": str(H), "student": str(E)}


# --- Refusals, without weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["architecture=electra"],
            "embedding_size is 128, hidden_size 16: with student.architecture electra give one in [1, 15]",
        ),
        (["architecture=mobilebert", "config.embedding_size=16"], "embedding_size is 16, hidden_size 16"),
        (
            ["architecture=electra", "config={embedding_size: 6, num_attention_heads: 4}"],
            "config.num_attention_heads is 4, to copy layers of the teacher it must be 2; otherwise use scratch",
        ),
        (
            ["architecture=electra", "config={embedding_size: 6, trigram_input: true}"],
            "student.config.trigram_input is unknown to electra",
        ),
        (["architecture=albert"], "student.architecture"),
        (
            ["config.embedding_size=6"],
            "embedding_size is unknown to bert; electra and mobilebert have it: student.architecture",
        ),
    ],
)
def test_a_narrow_student_that_cannot_be_is_refused(tiny, tmp_path, settings, expected):
    with pytest.raises(ConfigError) as refused:
        make_plan(tiny.config(tmp_path / "run", *(f"student.{each}" for each in settings)))
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("RobertaForMaskedLM", "roberta"), ("ModernBertForMaskedLM", "modernbert"), ("GPT2LMHeadModel", "causal")],
)
@pytest.mark.parametrize("architecture", CLASSES)
def test_a_teacher_that_no_narrow_architecture_carries_is_refused_by_name(
    tiny, models, tmp_path, capsys, name, kind, architecture
):
    arguments = [f"output_dir={tmp_path / 'run'}", f"teacher={models / name}", "tasks={}", "vocabulary.keep_ratio=0.99"]
    arguments += [f"student.architecture={architecture}", "student.config.embedding_size=6"]
    assert main(["check", str(tiny.root / "run.yaml"), *arguments]) == 2
    expected = f"student.architecture {architecture} carries students of bert teachers, this one is {kind}; remove it\n"
    assert capsys.readouterr().err == f"glmd: ConfigError: {expected}"
