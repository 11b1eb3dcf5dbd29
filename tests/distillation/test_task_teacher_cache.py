"""A fine-tuned teacher's answers from disk are the live one's, for every form of task; seeds and sweeps share them."""

import json
import logging
import shutil
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import class_form, cloze_form

import glmd.training.trainer
from glmd.cli import main
from glmd.config import TeacherConfig
from glmd.data.batches import Batch, Collate
from glmd.data.masking import masking_for
from glmd.data.sampling import StepPlan, step_batches
from glmd.distillation.cached_teacher import CachedTeacher, digests
from glmd.distillation.teacher import OnlineTeacher, TeacherOutputs
from glmd.distillation.teacher_cache import TeacherCache
from glmd.errors import ConfigError, DataError, NumericsError, RunError
from glmd.models.heads import Split
from glmd.models.loading import load_language_model
from glmd.pipeline.run import run
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import TaskExample
from glmd.tasks.forms import TaskForm, task_form
from glmd.tasks.tasks import BLANK, load_task
from glmd.training.ahead import ahead
from glmd.training.trainer import Trainer
from glmd.vocabulary.vocabulary import Vocabulary

COLLATE = Collate(0)
FORMS = ("pairs", "choices", "labels in a cloze", "candidates in a cloze")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to disk is another file's matter, and slow."""
    monkeypatch.setattr("glmd.storage.sync_to_disk", lambda path: None)


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> Any:
    from transformers import BertTokenizer

    return BertTokenizer.from_pretrained(tiny.teacher)


@pytest.fixture(scope="module")
def language_model(tiny: Any) -> Any:
    return load_language_model(TeacherConfig(str(tiny.teacher)))


@pytest.fixture(scope="module")
def words(tokenizer: Any) -> list[str]:
    return sorted(word for word in tokenizer.get_vocab() if len(word) == 4 and word.isalpha())


def examples_of(form: str, words: list[str]) -> list[TaskExample]:
    """Thirty of many lengths, the last one equal to the first but for its label."""
    rng, found = np.random.default_rng(0), []

    def text() -> str:
        return " ".join(rng.choice(words, int(rng.integers(2, 9))))

    for i in range(29):
        if form == "pairs":
            found.append(TaskExample(i, ((text(), text()),), i % 2))
        elif form == "labels in a cloze":
            found.append(TaskExample(i, ((f"{text()} {BLANK} .", text()),), i % 2))
        else:
            choices = tuple(str(each) for each in rng.choice(words, int(rng.integers(2, 5)), replace=False))
            context, blank = text(), form == "candidates in a cloze"
            texts = tuple((f"{context} {BLANK} .", None) if blank else (context, choice) for choice in choices)
            found.append(TaskExample(i, texts, 0, choices=choices))
    return [*found, replace(found[0], example_id=29, label=1)]


def task_form_of(form: str, words: Sequence[str] = ("light", "dark")) -> TaskForm:
    if form == "labels in a cloze":
        return cloze_form(*words[:2])
    if form == "candidates in a cloze":
        return cloze_form(mean=True)
    return class_form() if form == "pairs" else task_form(load_task("COPA"), kind="masked")


def dataset(form: str, tokenizer: Any, words: list[str], **options: Any) -> TaskDataset:
    return TaskDataset(examples_of(form, words), task_form_of(form, words), tokenizer, max_length=24, **options)


def teacher_of(form: str, tiny: Any, language_model: Any, vocabulary: Vocabulary) -> OnlineTeacher:
    """With an LM head beside the task's, over the backbone of the task's."""
    from transformers import BertForMultipleChoice, BertForSequenceClassification

    torch.manual_seed(1)
    own = {"pairs": BertForSequenceClassification, "choices": BertForMultipleChoice}.get(form)
    classifier = own.from_pretrained(tiny.teacher) if own is not None else language_model
    words = load_language_model(TeacherConfig(str(tiny.teacher))) if own else classifier
    return OnlineTeacher(words, classifier, vocabulary, task_logits=task_form_of(form).logits)


def cache_of(folder: Path, data: TaskDataset, form: str, *, words: bool = True, maskings: int = 1) -> TeacherCache:
    classes = 2 if form in ("pairs", "labels in a cloze") else 0
    parts = ((data, maskings),)
    return TeacherCache(
        folder, parts, width=16 if words else None, num_classes=classes, dtype="float32", made_from={"teacher": "one"}
    )


def make(cache: TeacherCache, teacher: Any, batch_size: int = 1) -> TeacherCache:
    missing = cache.missing()
    cache.begin()
    for number in missing:
        cache.write_shard(number, teacher, COLLATE, batch_size=batch_size)
    cache.finish()
    return cache


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary(np.arange(0, len(tokenizer), 2), np.arange(len(tokenizer)) // 2)


# What is read is the teacher's outputs


def test_every_example_of_shuffled_batches_gets_its_own_answer(
    form, tiny, language_model, tokenizer, words, vocabulary, tmp_path, monkeypatch
):
    """Over three epochs of three maskings, in micro-batches of either of two ranks, begun in the middle."""
    masked = masking_for(tokenizer, 0.3, 0, 3) if form in ("pairs", "choices") else None
    data, live = dataset(form, tokenizer, words, masking=masked), teacher_of(form, tiny, language_model, vocabulary)
    monkeypatch.setattr("glmd.distillation.teacher_cache.SHARD_BYTES", data.longest * 16 * 2 * 7)  # seven examples
    cache = make(cache_of(tmp_path / "cache", data, form, maskings=3 if masked else 1), live)
    assert cache.num_shards > 3
    cached = CachedTeacher(cache.open(), live.language_model, vocabulary)
    seen = 0
    for rank in range(2):
        plan = StepPlan(len(data), 4, 2, rank, 2, seed=1)
        for micro_batches in step_batches(data, plan, COLLATE, start_step=1, stop_step=6):
            for batch in micro_batches:
                got, whole = cached(batch), live(batch)
                keys = [(key, int(i)) for key in range(3) for i in batch["example_id"]]
                alone = {digests(COLLATE([data[key]]))[0]: live(COLLATE([data[key]])) for key in keys}
                expected = [alone[each] for each in digests(batch)]
                # Stored from examples by themselves, so that the twin's sums are taken in the same order.
                hidden = torch.cat([each.hidden_states for each in expected])
                assert torch.equal(got.hidden_states, hidden.half().float())
                for logits, twin in zip(got.task_logits, expected, strict=True):
                    assert torch.equal(logits[: twin.task_logits.shape[1]], twin.task_logits[0])
                torch.testing.assert_close(got.task_logits, whole.task_logits, atol=1e-5, rtol=1e-5)
                assert torch.equal(got.head.weight, whole.head.weight)
                seen += len(batch["example_id"])
    assert seen == 2 * 5 * 2 * 4


def test_task_logits_alone_need_no_model(form, tiny, language_model, tokenizer, words, vocabulary, tmp_path):
    data, live = dataset(form, tokenizer, words), teacher_of(form, tiny, language_model, vocabulary)
    cache = make(cache_of(tmp_path / "cache", data, form, words=False), live)
    batch = COLLATE([data[0, i] for i in (3, 0, 7)])
    got = CachedTeacher(cache.open(), None, vocabulary)(batch)
    assert got.hidden_states is None and got.head is None
    torch.testing.assert_close(got.task_logits, live(batch).task_logits, atol=1e-5, rtol=1e-5)


def test_the_disk_holds_what_was_said_before(form, tiny, language_model, tokenizer, words, vocabulary, tmp_path):
    data, live = dataset(form, tokenizer, words), teacher_of(form, tiny, language_model, vocabulary)
    for hidden in (True, False):
        cache = make(cache_of(tmp_path / f"{hidden}", data, form, words=hidden), live, batch_size=8)
        on_disk = sum(path.stat().st_size for path in cache.folder.iterdir())
        assert cache.num_bytes < on_disk < cache.num_bytes + 1500 * (cache.num_shards + 1)
        assert cache.bytes_to_come == 0


def test_whatever_a_teacher_reads_is_in_the_name_and_padding_is_not(form, tokenizer, words):
    data = dataset(form, tokenizer, words)
    names = digests(COLLATE([data[0, i] for i in range(30)]))
    assert names[29] == names[0] and len(set(names)) == 29
    assert [digests(COLLATE([data[0, i]]))[0] for i in range(30)] == names
    batch = COLLATE([data[0, 5]])
    columns = ["input_ids", *(name for name in ("token_type_ids", "cloze_ids", "verbalizers") if name in batch)]
    others = [batch | {name: batch[name] + (batch[name] == batch[name].flatten()[0])} for name in columns]
    fewer = batch["predicts"].clone()
    fewer[0, 1] = False
    others.append(batch | {"predicts": fewer})
    if "mean_over_tokens" in batch:
        others.append({name: each for name, each in batch.items() if name != "mean_over_tokens"})
    if "num_choices" in batch:
        others.append({**{name: each[:1] for name, each in batch.items()}, "num_choices": torch.tensor([1])})
    found = [digests(each)[0] for each in others]
    assert len({names[5], *found}) == len(found) + 1


def test_names_are_those_of_earlier_versions_so_that_their_caches_are_read():
    batch = COLLATE([{"input_ids": np.array(row), "example_id": i} for i, row in enumerate([[2, 7, 8, 3], [2, 9, 3]])])
    assert [name.hex() for name in digests(batch)] == [
        "23fa41c5c5fd85ddf98edbf824e5e290",
        "314f3ad211247fa3cf751714eb4c5555",
    ]


def test_rows_do_not_run_together(tokenizer):
    """Two choices of 2 and 3 tokens are not those of 3 and 2 with the same tokens in a row."""

    def batch(*rows: list[int]) -> Batch:
        rows = [np.array(row) for row in rows]
        return COLLATE([{"input_ids": rows, "example_id": 0, "num_choices": len(rows)}])

    names = [digests(batch(*rows))[0] for rows in (([7, 8], [9, 7, 8]), ([7, 8, 9], [7, 8]), ([7, 8, 9, 7, 8],))]
    assert len(set(names)) == 3


def test_an_example_that_the_cache_has_not_is_refused(tiny, language_model, tokenizer, words, vocabulary, tmp_path):
    data, live = dataset("pairs", tokenizer, words), teacher_of("pairs", tiny, language_model, vocabulary)
    teacher = CachedTeacher(make(cache_of(tmp_path / "cache", data, "pairs"), live).open(), None, vocabulary)
    batch = COLLATE([data[0, 4]])
    with pytest.raises(DataError, match="example 4"):
        teacher(batch | {"token_type_ids": 1 - batch["token_type_ids"]})


def test_task_logits_that_are_not_finite_are_refused(tiny, language_model, tokenizer, words, vocabulary, tmp_path):
    data, live = dataset("pairs", tokenizer, words), teacher_of("pairs", tiny, language_model, vocabulary)

    def spoilt(batch: Batch) -> TeacherOutputs:
        outputs = live(batch)
        return replace(outputs, task_logits=outputs.task_logits * float("inf"))

    with pytest.raises(NumericsError, match=r"of example 0 .* are not finite"):
        make(cache_of(tmp_path / "cache", data, "pairs"), spoilt)


def test_a_teacher_answers_on_its_device_and_is_given_the_batch_as_the_loader_made_it(
    tiny, trusting, language_model, tokenizer, words, vocabulary, tmp_path, monkeypatch
):
    """Ids are hashed in host memory, so that no GPU is waited for."""
    data, live = dataset("pairs", tokenizer, words), teacher_of("pairs", tiny, language_model, vocabulary)
    cached = CachedTeacher(make(cache_of(tmp_path / "cache", data, "pairs"), live).open(), None, vocabulary)
    cached.device = torch.device("meta")
    assert cached(COLLATE([data[0, 3]])).task_logits.device.type == "meta"
    seen, far = [], OnlineTeacher(None, live.classifier.to("meta"), vocabulary, task_logits=live.task_logits)
    with monkeypatch.context() as patch:
        patch.setattr(Split, "run_backbone", lambda _, inputs, **asked: seen.append(inputs) or stop())
        with pytest.raises(Stop):
            far(COLLATE([data[0, 3]]))
    assert {each.device.type for each in seen[0].values()} == {"meta"}

    given = []
    monkeypatch.setattr(CachedTeacher, "__call__", lambda self, batch: given.append(batch))
    batch = COLLATE([data[0, 3]])
    ((fed,),) = ahead(iter([[batch]]), cached, torch.device("meta"))
    assert given == [batch] and {each.device.type for each in fed.on_device.values()} == {"meta"}


# Whole runs

RUN = ("data.eval_blocks=4", "pretraining.num_maskings=2", "pretraining.max_steps=2")
SHORT = ("task_lm.num_train_epochs=2", "task_soft_labels.num_train_epochs=2")
LOGS = ("task_lm.logging_steps=1", "task_soft_labels.logging_steps=1")


def losses(folder: Path, stage: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["stage"].endswith(stage) and "loss" in row]


@pytest.mark.slow
def test_cached_passes_have_the_live_ones_loss_curves_and_seeds_and_cells_ask_nothing(tiny, trusting, tmp_path, asked):
    both = (*RUN, *SHORT, *LOGS)
    live = run(tiny.config(tmp_path / "live", *both))
    assert set(asked) == {"live"}
    asked.clear()
    place = f"teacher.cache={tmp_path / 'cache'}"
    cached = run(tiny.config(tmp_path / "run", *both, place))
    assert set(asked) == {"cache"}
    for stage in ("/task_lm", "/task_soft_labels"):
        ours, theirs = losses(tmp_path / "run", stage), losses(tmp_path / "live", stage)
        assert len(ours) == 6 and ours != theirs and np.allclose(ours, theirs, rtol=1e-3, atol=0)
    rows = [{row["stage"]: row for row in results["rows"]} for results in (cached, live)]
    for before in ("lm_scores_before", "lm_scores"):
        assert rows[0]["task_lm"][before] == pytest.approx(rows[1]["task_lm"][before], rel=1e-3)
    assert rows[0]["task_soft_labels"]["agreement"] == rows[1]["task_soft_labels"]["agreement"]
    asked.clear()
    grown = ("seeds=[0, 1]", "sweep.task_soft_labels.learning_rate=[1e-3, 1e-2]", "controls.full_vocabulary=true")
    run(tiny.config(tmp_path / "run", *both, place, *grown))
    assert asked == []
    other = ("vocabulary.keep_ratio=0.9", "student.num_hidden_layers=2", f"output_dir={tmp_path / 'other'}")
    run(tiny.config(tmp_path / "other", *both, place, *other))
    assert asked == [], "another run with the same teachers"


@pytest.mark.slow
def test_the_teacher_answers_val_once_for_all_seeds_cells_and_controls(tiny, trusting, tmp_path, monkeypatch):
    import glmd.pipeline.teachers

    loaded: list[str] = []
    real = glmd.pipeline.teachers.load_classifier
    monkeypatch.setattr(
        "glmd.pipeline.teachers.load_classifier",
        lambda name, *rest, **o: loaded.append(name) or real(name, *rest, **o),
    )
    place = f"teacher.cache={tmp_path / 'cache'}"
    stages = "teacher.cached_stages=[task_soft_labels]"
    run(tiny.config(tmp_path / "run", *RUN[2:], place, stages, "seeds=[0, 1, 2]", "method=kd"))
    teacher = str(tmp_path / "run/tasks/RTE/task_teacher/model")
    assert loaded.count(teacher) == 2, "to make the cache, and to answer val; not for every seed"


@pytest.mark.slow
@pytest.mark.parametrize("casting", ["head", "cloze"])
def test_a_task_cache_is_made_ahead_with_its_teacher_and_read_by_the_run(
    casting, tiny, trusting, tmp_path, asked, capsys
):
    given = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *RUN, f"teacher.cache={tmp_path / 'cache'}"]
    if casting == "cloze":
        definition = tmp_path / "rte.yaml"
        tokens = [line.split()[0] for line in tiny.corpus.read_text().splitlines() if line][:40]
        chosen = list(dict.fromkeys(tokens))[:2]
        text = 'name: RTE\nfolder: RTE\nhub_name: rte\nfields: [premise, hypothesis]\ntext: "{premise}"\n'
        text += 'text_pair: "{hypothesis}"\nlabels: [entailment, not_entailment]\nmetrics: [accuracy]\nmax_length: 32\n'
        text += f'cloze:\n  text: "{{hypothesis}} {{blank}} ."\n  text_pair: "{{premise}}"\n  verbalizers: {chosen}\n'
        definition.write_text(text)
        given += ["casting=cloze", f"tasks.RTE.definition={definition}"]
    assert main(["cache", *given]) == 0
    assert set(asked) == {"cache"}
    cache = tmp_path / "cache"
    folders = {path.parent.relative_to(cache).as_posix() for path in cache.rglob("manifest.json")}
    assert folders == {".", "tasks/RTE/task_lm", "tasks/RTE/task_soft_labels"}
    asked.clear()
    assert main(["run", *given]) == 0 and asked == []


@pytest.mark.slow
def test_masked_passes_have_a_cache_for_each_seed(tiny, trusting, tmp_path, asked):
    masked = (*RUN, "method=glmd-masked-only", "seeds=[0, 1]")
    place = f"teacher.cache={tmp_path / 'cache'}"
    with pytest.raises(ConfigError, match=r"task_lm\.num_maskings is missing; with teacher\.cache"):
        run(tiny.config(tmp_path / "run", *masked, place))
    fixed = (*masked, "task_lm.num_maskings=2", "task_lm.num_train_epochs=5", LOGS[0])
    run(tiny.config(tmp_path / "live", *fixed))
    asked.clear()
    run(tiny.config(tmp_path / "run", *fixed, place))
    assert set(asked) == {"cache"}
    assert {path.name for path in (tmp_path / "cache/tasks/RTE/task_lm").iterdir()} == {"seed-0", "seed-1"}
    for seed in range(2):
        ours, theirs = (losses(tmp_path / each, f"seed-{seed}/task_lm") for each in ("run", "live"))
        assert len(ours) == 15 and np.allclose(ours, theirs, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_a_stage_left_out_asks_the_live_teacher(tiny, trusting, tmp_path, asked):
    place = (f"teacher.cache={tmp_path / 'cache'}", "teacher.cached_stages=[task_soft_labels]")
    run(tiny.config(tmp_path / "run", RUN[0], RUN[2], *place))
    assert set(asked) == {"live", "cache"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"tasks"}
    assert not (tmp_path / "cache/tasks/RTE/task_lm").exists()
    record = json.loads((tmp_path / "run/tasks/RTE/seed-0/task_soft_labels/stage.json").read_text())["inputs"][
        "teacher.cache"
    ]
    assert record == "float32"


@pytest.mark.slow
def test_a_stage_that_a_cache_cannot_serve_asks_the_live_teacher_and_says_so(
    tiny, trusting, tmp_path, asked, caplog, capsys
):
    given = (RUN[0], RUN[2], "method=tinybert", f"teacher.cache={tmp_path / 'cache'}")
    assert main(["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *given]) == 0
    said = capsys.readouterr().out
    assert "the live teacher serves pretraining, which compares layers" in said
    assert "cache     " in said and "tasks/RTE/task_soft_labels, " in said
    with caplog.at_level(logging.INFO):
        run(tiny.config(tmp_path / "run", *given))
    assert set(asked) == {"live", "cache"}
    assert "teacher.cache: pretraining compares layers; the live teacher serves it" in caplog.text
    assert [path.parent.name for path in (tmp_path / "cache").rglob("manifest.json")] == ["task_soft_labels"]


@pytest.fixture(scope="module")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with its cache: the cache, and the task's teacher."""
    place = tmp_path_factory.mktemp("made")
    import glmd.pipeline.run

    glmd.pipeline.run.make_cache(tiny.config(place / "run", *RUN, f"teacher.cache={place / 'cache'}"))
    return place / "cache", place / "run/tasks/RTE/task_teacher/model"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("teacher.tasks.RTE={other}", "(classifier has changed"),
        ("task_lm.max_length=24", "max_length: 32 -> 24"),
        ("task_soft_labels.max_length=24", "max_length: 32 -> 24"),
        ("tasks.RTE.inputs={inputs}", "(inputs"),
        ("tasks.RTE={mlm_probability: 0.2, num_maskings: 2}", None),
    ],
)
def test_a_stale_cache_of_a_task_is_refused_by_name_before_pretraining(made, tiny, tmp_path, change, named):
    from safetensors.torch import load_file, save_file

    cache = shutil.copytree(made[0], tmp_path / "cache")
    other = shutil.copytree(made[1], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"][0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    inputs = tmp_path / "inputs.jsonl"
    inputs.write_text("".join((tiny.superglue / "RTE/train.jsonl").read_text().splitlines(keepends=True)[1:]))
    places = {"{other}": str(other), "{inputs}": str(inputs)}
    for name, path in places.items():
        change = change.replace(name, path)
    given = [] if "teacher.tasks" in change else [f"teacher.tasks.RTE={made[1]}"]
    config = tiny.config(tmp_path / "run", *RUN, f"teacher.cache={cache}", *given, change)
    if named is None:  # masked inputs have a folder of their own
        with pytest.raises(Stop):
            run_to_pretraining(config)
        return
    with pytest.raises(RunError) as refused:
        run_to_pretraining(config)
    assert named in str(refused.value) and "\n" not in str(refused.value)


class Stop(Exception):
    """Pretraining began."""


def run_to_pretraining(config: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", stop)
        run(config)


def stop(*_: Any) -> None:
    raise Stop


# Disks, settings and costs


def test_a_disk_too_small_for_all_caches_together_is_refused_before_the_first(tiny, trusting, tmp_path, monkeypatch):
    """There is room for each."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(Trainer, "run", stop)
    # 62 blocks of 16 tokens in two maskings, of 32 bytes a token, are some 65 kB, and the first pass 20 kB.
    monkeypatch.setattr("glmd.distillation.teacher_cache.shutil.disk_usage", lambda path: usage(10**6, 0, 70_000))
    with pytest.raises(
        RunError, match=r"MB for .*cache, .*MB for .*task_lm, .* are needed and 0.07 MB free; give another"
    ):
        run(tiny.config(tmp_path / "run", *RUN, f"teacher.cache={tmp_path / 'cache'}"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_complete_cache_on_a_disk_that_cannot_be_written_is_read(made, tiny, trusting, tmp_path, asked, monkeypatch):
    cache = shutil.copytree(made[0], tmp_path / "cache")
    for path in cache.rglob("lock"):
        path.unlink()
    before = sorted(cache.rglob("*"))
    real = glmd.distillation.teacher_cache.write_problem

    def problem(folder: Path) -> str | None:
        return "cannot be written (Read-only file system)" if folder.is_relative_to(cache) else real(folder)

    monkeypatch.setattr("glmd.distillation.teacher_cache.write_problem", problem)
    config = tiny.config(tmp_path / "run", *RUN, f"teacher.cache={cache}", f"teacher.tasks.RTE={made[1]}")
    run(config)
    assert asked == [] and sorted(cache.rglob("*")) == before
    next(cache.glob("*.safetensors")).unlink()
    with pytest.raises(RunError, match="Read-only file system"):
        run(replace(config, output_dir=str(tmp_path / "other")))


@pytest.mark.slow
def test_a_run_compares_the_contents_of_its_caches_once(made, tiny, trusting, tmp_path, monkeypatch, caplog):
    """Not again for every seed and grid point: of a terabyte that would be hours. A later run finds what is damaged."""
    import glmd.distillation.teacher_cache

    cache, read = shutil.copytree(made[0], tmp_path / "cache"), []
    real = glmd.distillation.teacher_cache.file_sha256
    monkeypatch.setattr("glmd.distillation.teacher_cache.file_sha256", lambda path: read.append(path) or real(path))
    shared = (*RUN, f"teacher.cache={cache}", f"teacher.tasks.RTE={made[1]}")
    run(tiny.config(tmp_path / "run", *shared, "seeds=[0, 1]", "controls.full_vocabulary=true"))
    assert sorted(read) == sorted(cache.rglob("*.safetensors"))
    labels = next((cache / "tasks/RTE/task_soft_labels").glob("*.safetensors"))
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        run(tiny.config(tmp_path / "second", *shared))
    assert "has changed; it is made again" in caplog.text and labels.read_bytes() == whole


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["teacher.cached_stages=[task_soft_labels]"], "cached_stages has no effect without cache"),
        (["teacher.cache=c", "teacher.cached_stages=[]"], "cached_stages names no stage"),
        (["teacher.cache=c", "teacher.cached_stages=[task_soft_labels, task_soft_labels]"], "has a stage twice"),
        (
            ["teacher.cache=c", "tasks={}", "teacher.cached_stages=[task_soft_labels]"],
            "task_soft_labels needs no teacher",
        ),
        (["teacher.cache=c", "method=hard"], "method hard needs no teacher"),
        (
            ["teacher.cache=c", "method=pkd", "teacher.cached_stages=[task_soft_labels]"],
            "task_soft_labels of method pkd compares layers, which the cache does not keep; it can serve no stage",
        ),
        (["teacher.cache=c", "method=pkd"], "it does not keep what task_soft_labels of method pkd asks of a teacher"),
    ],
)
def test_settings_of_a_cache_without_effect_are_refused(given, message, tiny, tmp_path, capsys):
    assert main(["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *given]) == 2
    assert message in capsys.readouterr().err
