"""The teacher's hidden states from disk are the live teacher's, whatever the order, the batch and the interruption."""

import json
import logging
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glmd.distillation.teacher_cache
from glmd.cli import main
from glmd.config import TeacherConfig
from glmd.data.batches import Batch, Collate
from glmd.data.blocks import BlockDataset
from glmd.data.masking import masking_for
from glmd.data.sampling import StepPlan, step_batches
from glmd.data.token_store import TokenStore, build_token_store
from glmd.distillation.cached_teacher import CachedTeacher, _Header
from glmd.distillation.teacher import OnlineTeacher, TeacherOutputs
from glmd.distillation.teacher_cache import TeacherCache
from glmd.errors import DataError, GlmdError, ModelError, RunError
from glmd.models.loading import load_language_model
from glmd.pipeline.run import run
from glmd.training.trainer import Interrupted, Trainer
from glmd.vocabulary.vocabulary import Vocabulary

MASKINGS = 3
COLLATE = Collate(0)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to disk is another file's matter, and slow."""
    monkeypatch.setattr("glmd.storage.sync_to_disk", lambda path: None)


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> Any:
    from transformers import BertTokenizer

    return BertTokenizer.from_pretrained(tiny.teacher)


@pytest.fixture(scope="module")
def store(tiny: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return build_token_store(tmp_path_factory.mktemp("store"), [str(tiny.corpus)], tokenizer)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return load_language_model(TeacherConfig(str(tiny.teacher)))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Any) -> Vocabulary:
    kept = np.arange(0, len(tokenizer), 2)
    return Vocabulary(kept, np.arange(len(tokenizer)) // 2)


@pytest.fixture
def blocks(store: TokenStore, tokenizer: Any) -> Callable[..., BlockDataset]:
    def blocks_of(*, held_out: bool = False, seed: int = 0, num_maskings: int | None = MASKINGS) -> BlockDataset:
        total, masking = store.num_blocks(10), masking_for(tokenizer, 0.3, seed, num_maskings)
        part = range(total - 5, total) if held_out else range(total - 5)
        return BlockDataset(store, tokenizer, max_length=12, blocks=part, masking=masking)

    return blocks_of


@pytest.fixture
def cache(blocks: Callable[..., BlockDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TeacherCache:
    """Of several shards, none of them made."""
    monkeypatch.setattr("glmd.distillation.teacher_cache.SHARD_BYTES", 12 * 16 * 2 * 40)  # forty texts
    return cache_of(tmp_path / "cache", blocks)


def cache_of(folder: Path, blocks: Callable[..., BlockDataset], dtype: str = "float32", **other: Any) -> TeacherCache:
    parts = ((blocks(), MASKINGS), (blocks(held_out=True), 1))
    return TeacherCache(folder, parts, width=16, dtype=dtype, made_from={"teacher": "one", **other})


def make(cache: TeacherCache, model: Any, *, batch_size: int = 7, shards: int | None = None) -> TeacherCache:
    missing = cache.missing()
    cache.begin()
    teacher = OnlineTeacher(model, None, Vocabulary.identity(model.config.vocab_size))
    for number in missing[:shards]:
        cache.write_shard(number, teacher, COLLATE, batch_size=batch_size)
    if shards is None:
        cache.finish()
    return cache


def row_by_row(model: Any, batch: Batch) -> torch.Tensor:
    """(N, H) the plainest teacher: the model's own hooks, one unpadded text after the other."""
    seen: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[mask.bool()][None])
    handle.remove()
    return torch.cat(seen)


# What is read is the teacher's outputs


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation", "workers", "start"), [(1, 0, 0), (2, 0, 5), (1, 2, 3)])
def test_every_token_of_shuffled_batches_gets_its_own_row(
    cache, model, blocks, vocabulary, accumulation, workers, start
):
    """Over more epochs than maskings, on either of two ranks, begun anywhere."""
    teacher = CachedTeacher(make(cache, model, batch_size=1).open(), model, vocabulary)
    live, data = OnlineTeacher(model, None, vocabulary), blocks()
    steps = 4 * len(data) // (accumulation * 8)
    for rank in range(2):
        plan = StepPlan(len(data), 4, accumulation, rank, 2, seed=1)
        batches = step_batches(data, plan, COLLATE, start_step=start, stop_step=steps, num_workers=workers)
        for batch in (each for micro_batches in batches for each in micro_batches):
            got, expected = teacher(batch), live(batch)
            # Stored from texts by themselves, so that the twin's sums are taken in the same order.
            assert torch.equal(got.hidden_states, row_by_row(model, batch).half().float())
            assert torch.equal(got.head.weight, expected.head.weight)
            assert torch.equal(got.head.bias, expected.head.bias)
            torch.testing.assert_close(got.hidden_states, expected.hidden_states, atol=1e-5, rtol=1e-3)


def test_held_out_texts_and_a_short_last_block_are_there(cache, model, blocks, vocabulary):
    teacher, data = CachedTeacher(make(cache, model, batch_size=1).open(), model, vocabulary), blocks(held_out=True)
    batch = COLLATE([data[0, i] for i in range(len(data))])
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 2, "the last block is short, and padded here"
    assert torch.equal(teacher(batch).hidden_states, row_by_row(model, batch).half().float())


def test_dropped_words_are_merged_as_by_the_live_teacher(cache, model, blocks, vocabulary):
    teacher = CachedTeacher(make(cache, model).open(), model, vocabulary, merge_dropped=True)
    live = OnlineTeacher(model, None, vocabulary, merge_dropped=True)
    batch = COLLATE([blocks()[0, 0]])
    for name in ("weight", "bias", "merged_into"):
        assert torch.equal(getattr(teacher(batch).head, name), getattr(live(batch).head, name))


@pytest.mark.parametrize(("bits", "is_read"), [(16, True), (8, False)])
def test_of_an_earlier_version_caches_in_16_bits_are_read_and_those_in_8_refused(cache, model, bits, is_read):
    manifest = make(cache, model).folder / "manifest.json"
    found = json.loads(manifest.read_text())
    assert found["made_from"]["kept"] == {"hidden_size": 16, "bits": 16, "num_classes": None}
    found["made_from"]["kept"]["bits"] = bits
    manifest.write_text(json.dumps(found))
    if is_read:
        assert cache.missing() == []
    else:
        with pytest.raises(RunError, match=r"kept\.bits: 8 -> 16"):
            cache.missing()


def test_a_text_that_the_cache_has_not_is_refused(cache, model, blocks, vocabulary):
    """Another seed masks otherwise; without a number of maskings so does every further epoch."""
    teacher = CachedTeacher(make(cache, model).open(), model, vocabulary)
    for data, key in ((blocks(seed=1), (0, 2)), (blocks(num_maskings=None), (MASKINGS, 2))):
        with pytest.raises(DataError, match="example 2"):
            teacher(COLLATE([data[key]]))
    teacher(COLLATE([blocks()[MASKINGS, 2]]))


def test_a_teacher_in_bfloat16_is_kept_as_it_is(blocks, tiny, vocabulary, tmp_path):
    model = load_language_model(TeacherConfig(str(tiny.teacher), dtype="bfloat16"))
    cache = make(cache_of(tmp_path / "cache", blocks, "bfloat16"), model, batch_size=1)
    batch = COLLATE([blocks()[0, i] for i in range(3)])
    got = CachedTeacher(cache.open(), model, vocabulary)(batch).hidden_states
    assert got.dtype == torch.bfloat16 and torch.equal(got, row_by_row(model, batch))


def test_the_disk_holds_what_was_said_before(cache, model):
    make(cache, model)
    on_disk = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert cache.num_shards > 3
    assert sum(len(shard.maps["hidden_states"]) for shard in cache.open().shards) == cache.num_tokens
    assert cache.num_bytes < on_disk < cache.num_bytes + 1000 * (cache.num_shards + 1)
    assert {path.suffix for path in cache.folder.iterdir()} == {".safetensors", ".json"}


# Interruptions and other caches


def test_an_interrupted_cache_is_completed_with_what_is_missing(cache, model):
    make(cache, model, shards=2)
    (cache.folder / "shard-00002.safetensors.tmp").write_bytes(b"half")
    assert cache.missing() == list(range(2, cache.num_shards))
    make(cache, model)
    assert cache.missing() == [] and not list(cache.folder.glob("*.tmp"))
    files = {path.name: path.read_bytes() for path in cache.folder.iterdir()}
    shutil.rmtree(cache.folder)
    make(cache, model)
    assert files == {path.name: path.read_bytes() for path in cache.folder.iterdir()}


def test_a_half_written_cache_keeps_the_size_of_its_shards(cache, model, blocks, monkeypatch):
    make(cache, model, shards=2)
    monkeypatch.setattr("glmd.distillation.teacher_cache.SHARD_BYTES", 1 << 20)
    other = cache_of(cache.folder, blocks)
    assert other.missing() == list(range(2, cache.num_shards))


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_shard_is_made_again(cache, model, damage):
    make(cache, model)
    path = cache.folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert cache.missing() == [1]
    make(cache, model)
    assert path.read_bytes() == whole and cache.missing() == []


def test_a_cache_of_something_else_is_refused_by_name(cache, model, blocks):
    make(cache, model)
    other = cache_of(cache.folder, blocks, "bfloat16", masking={"seed": 1})
    with pytest.raises(RunError) as refused:
        other.missing()
    for difference in ("dtype: 'float32' -> 'bfloat16'", "masking: None -> {'seed': 1}"):
        assert difference in str(refused.value)


def test_shards_without_a_manifest_are_nobodys(cache, model, blocks):
    """Whoever deletes the manifest, to be rid of a refusal, must not be given another teacher's answers."""
    make(cache, model, shards=cache.num_shards)
    (cache.folder / "manifest.json").unlink()
    with pytest.raises(RunError, match="not empty and holds no cache"):
        cache_of(cache.folder, blocks, teacher="two").missing()


def test_a_lock_that_cannot_be_taken_is_refused_in_one_line(cache):
    (cache.folder / "lock").mkdir(parents=True)
    with pytest.raises(RunError, match=r"lock cannot be locked \(Is a directory\)"), cache.lock():
        pass


UNSOUND = (
    *("", "{", "[]", '{"version": 0, "made_from": {}}', '{"version": 1}', '{"version": 2, "made_from": {}}'),
    '{"version": 2, "made_from": {}, "rows_per_shard": 4, "shards": []}',
    '{"version": 2, "made_from": {}, "rows_per_shard": 4, "shards": {"shard-00000.safetensors": 1}}',
)


@pytest.mark.parametrize("text", UNSOUND)
def test_a_manifest_that_cannot_be_read_is_refused(cache, model, text):
    make(cache, model)
    (cache.folder / "manifest.json").write_text(text)
    with pytest.raises(RunError, match="delete the folder"):
        cache.missing()


def test_a_folder_of_other_things_is_refused(cache):
    cache.folder.mkdir()
    (cache.folder / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty and holds no cache"):
        cache.missing()


def test_a_disk_too_small_is_refused_before_anything_is_written(cache, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "glmd.distillation.teacher_cache.shutil.disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000)
    )
    with caplog.at_level(logging.INFO), pytest.raises(RunError, match=r"MB are needed and 0.00 MB free"):
        cache.missing()
    assert not cache.folder.exists()
    assert f"{cache.num_tokens:,} tokens of 32 bytes" in caplog.text


@pytest.mark.parametrize(("scale", "reason"), [(1e5, "reach"), (1e-7, "lose"), (float("nan"), "not finite")])
def test_hidden_states_that_16_bits_cannot_hold_are_refused(cache, tiny, scale, reason):
    model = load_language_model(TeacherConfig(str(tiny.teacher)))
    with torch.no_grad():
        model.cls.predictions.transform.LayerNorm.weight *= scale
        model.cls.predictions.transform.LayerNorm.bias *= scale
    with pytest.raises(GlmdError, match=reason) as refused:
        make(cache, model)
    if reason != "not finite":
        assert isinstance(refused.value, ModelError) and "teacher.dtype=bfloat16" in str(refused.value)
    assert not list(cache.folder.glob("shard-*"))


# Whole runs

CACHED = ("tasks={}", "pretraining.num_maskings=2", "pretraining.max_steps=24", "pretraining.logging_steps=1")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_cached_teacher_gives_the_live_teachers_loss_curve(tiny, trusting, tmp_path, asked):
    """Several epochs, in micro-batches by loader workers; a second student needs no teacher."""
    both = (*CACHED, "pretraining.gradient_accumulation_steps=2", "dataloader_num_workers=2")
    live = run(tiny.config(tmp_path / "live", *both))
    assert set(asked) == {"live"}
    asked.clear()
    place = f"teacher.cache={tmp_path / 'cache'}"
    cached = run(tiny.config(tmp_path / "cached", *both, place))
    assert set(asked) == {"cache"}
    asked.clear()
    ours, theirs = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert len(ours) == 24 and max(theirs) > 1.1 * min(theirs)
    assert ours != theirs and np.allclose(ours, theirs, rtol=1e-3, atol=0)
    for before in ("lm_scores_before", "lm_scores"):
        got, expected = (result["rows"][0][before] for result in (cached, live))
        assert got == pytest.approx(expected, rel=1e-3)

    wider = ("vocabulary.keep_ratio=1.0", "student.num_hidden_layers=2", "pretraining.learning_rate=1e-4")
    run(tiny.config(tmp_path / "second", *both, *wider, place))
    assert asked == []
    run(tiny.config(tmp_path / "second live", *both, *wider))
    assert np.allclose(losses(tmp_path / "second"), losses(tmp_path / "second live"), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_cached_run_is_the_run_of_a_teacher_rounded_to_float16(tiny, trusting, tmp_path, monkeypatch):
    """Bit by bit: nothing else differs. Every text is asked for by itself, so that sums have one order."""

    def rounded(self: OnlineTeacher, batch: Batch) -> TeacherOutputs:
        hidden = row_by_row(self.language_model, batch)
        return TeacherOutputs(hidden.half().float(), self.head)

    short = (*CACHED, "pretraining.per_device_eval_batch_size=1")
    run(tiny.config(tmp_path / "cached", *short, f"teacher.cache={tmp_path / 'cache'}"))
    monkeypatch.setattr(OnlineTeacher, "__call__", rounded)
    run(tiny.config(tmp_path / "live", *short))
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")
    weights = "pretraining/student/model.safetensors"
    assert (tmp_path / "cached" / weights).read_bytes() == (tmp_path / "live" / weights).read_bytes()


@pytest.mark.slow
def test_an_interrupted_cached_run_ends_in_the_weights_of_a_whole_one(tiny, trusting, tmp_path, monkeypatch):
    config = tiny.config(tmp_path / "run", *CACHED, f"teacher.cache={tmp_path / 'cache'}")
    step = Trainer._step

    def stopping(self: Trainer, *rest: Any) -> Any:
        if rest[4] == 14:
            raise Interrupted(143)
        return step(self, *rest)

    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(Interrupted):
        run(config)
    monkeypatch.setattr(Trainer, "_step", step)
    run(config)
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    run(whole)
    weights = "pretraining/student/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.slow
def test_a_finished_run_needs_its_cache_no_more(tiny, trusting, tmp_path):
    """Nor does it matter where it lay."""
    config = tiny.config(tmp_path / "run", *CACHED, "pretraining.max_steps=2", f"teacher.cache={tmp_path / 'cache'}")
    results = run(config)
    shutil.rmtree(tmp_path / "cache")
    moved = replace(config, teacher=replace(config.teacher, cache=str(tmp_path / "moved")))
    for each in (config, moved):
        assert run(each)["rows"] == results["rows"]
    assert not (tmp_path / "cache").exists() and not (tmp_path / "moved").exists()


@pytest.mark.slow
def test_a_run_that_began_without_a_cache_does_not_go_on_with_one(tiny, trusting, tmp_path):
    short = (*CACHED, "pretraining.max_steps=2")
    run(tiny.config(tmp_path / "run", *short))
    with pytest.raises(RunError, match=r"teacher\.cache: None -> 'float16'"):
        run(tiny.config(tmp_path / "run", *short, f"teacher.cache={tmp_path / 'cache'}"))


@pytest.mark.slow
def test_a_cache_made_ahead_is_read_by_the_run(tiny, trusting, tmp_path, asked, capsys):
    arguments = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *CACHED, "pretraining.max_steps=2"]
    assert main(["cache", *arguments]) == 2
    assert "teacher.cache is missing" in capsys.readouterr().err
    arguments.append(f"teacher.cache={tmp_path / 'cache'}")
    assert main(["cache", *arguments]) == 0
    assert f"{tmp_path / 'cache'}: complete" in capsys.readouterr().out
    assert set(asked) == {"cache"} and not (tmp_path / "run" / "pretraining").exists()
    asked.clear()
    assert main(["run", *arguments]) == 0
    assert asked == []


@pytest.fixture(scope="module")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache made ahead."""
    place = tmp_path_factory.mktemp("made")
    config = tiny.config(place / "run", *CACHED, f"teacher.cache={place / 'cache'}")
    glmd.pipeline.run.make_cache(config)
    return place / "cache"


@pytest.fixture
def others(tiny: Any, tmp_path: Path) -> dict[str, str]:
    """Another teacher, tokenizer and corpus, each but for one thing the tiny one's."""
    from safetensors.torch import load_file, save_file

    teacher = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][7, 0] += 1e-3
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    words = shutil.copytree(tiny.teacher, tmp_path / "words")
    text = (words / "tokenizer.json").read_text()
    (words / "tokenizer.json").write_text(text.replace('"##a"', '"##z"'))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(tiny.corpus.read_text().replace(".", "", 1))
    return {"teacher": str(teacher), "tokenizer": str(words), "corpus": str(corpus)}


STALE = [
    ("teacher={teacher}", "(teacher has changed"),
    ("teacher={tokenizer}", "(tokenizer has changed"),
    ("data.corpus={corpus}", "(corpus.files has changed"),
    ("pretraining.num_maskings=3", "(masking.num_maskings: 2 -> 3)"),
    ("pretraining.mlm_probability=0.2", "(masking.mlm_probability: 0.15 -> 0.2)"),
    ("seeds=[4]", "(masking.seed: 0 -> 4)"),
    ("pretraining.max_length=24", "(blocks"),
    ("data.eval_blocks=5", "(blocks"),
    ("teacher.dtype=bfloat16", "(dtype: 'float32' -> 'bfloat16')"),
]


@pytest.mark.parametrize(("change", "named"), STALE)
def test_a_stale_cache_is_refused_before_training(made, tiny, others, tmp_path, change, named):
    config = tiny.config(tmp_path / "run", *CACHED, f"teacher.cache={made}", change.format(**others))
    with pytest.raises(RunError) as refused:
        run(config)
    assert named in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.glob("run/**/stage.json"))


@pytest.mark.parametrize(("change", "named"), [each for each in STALE if "eval_blocks" not in each[0]])
def test_check_names_what_is_stale_before_the_corpus_is_read(made, tiny, others, tmp_path, capsys, change, named):
    given = [*CACHED, f"teacher.cache={made}", change.format(**others)]
    assert main(["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *given]) == 2
    assert named in capsys.readouterr().err


def test_check_tells_what_the_cache_will_take(tiny, trusting, tmp_path, capsys, monkeypatch):
    """Tokens x bytes: within a percent of what is then written, and exactly once the corpus is cut into ids."""
    given = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *CACHED, f"teacher.cache={tmp_path / 'c'}"]
    assert main(["check", *given]) == 0
    before = capsys.readouterr().out
    assert main(["cache", *given]) == 0
    cache = next(iter(tmp_path.glob("c/*.safetensors")))
    tokens = _Header(cache).fields["hidden_states"]["shape"][0]
    capsys.readouterr()
    assert main(["check", *given]) == 0
    after = capsys.readouterr().out
    found = [
        int(re.search(r"corpus, (?:about )?([\d,]+) tokens", text)[1].replace(",", "")) for text in (before, after)
    ]
    assert "about" in before and "about" not in after.partition("corpus, ")[2]
    assert found == [pytest.approx(tokens, rel=0.01)] * 2
    size = re.search(r"32 bytes in 2 maskings, ([\d.]+) MB", after)
    assert float(size[1]) * 1e6 == pytest.approx(cache.stat().st_size, rel=0.1)
    assert "0.00 MB to come" in after
    shutil.rmtree(tmp_path / "c")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("glmd.distillation.teacher_cache.shutil.disk_usage", lambda path: usage(10**6, 0, 50_000))
    assert main(["check", *given]) == 2
    assert "0.06 MB to come, 0.05 MB free; give another disk" in capsys.readouterr().err


@pytest.mark.slow
def test_a_causal_teacher_is_cached_in_one_masking(models, tiny, trusting, tmp_path, asked):
    """A decoder reads whole text: its epochs are alike."""
    base = [f"teacher={models / 'GPT2LMHeadModel'}", "vocabulary.keep_ratio=0.9", *CACHED[::2], CACHED[3]]
    live = tiny.config(tmp_path / "live", *base)
    run(live)
    asked.clear()
    run(tiny.config(tmp_path / "cached", *base, f"teacher.cache={tmp_path / 'cache'}"))
    assert set(asked) == {"cache"}
    ours, theirs = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert ours != theirs and np.allclose(ours, theirs, rtol=1e-3, atol=0)
    with pytest.raises(GlmdError, match=r"pretraining\.num_maskings has no effect"):
        run(tiny.config(tmp_path / "masked", *base, "pretraining.num_maskings=2"))
