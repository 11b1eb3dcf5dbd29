"""The embedded world: the same bytes everywhere, labels that follow from the text, nothing of val in train."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from glmd.data import synthetic as world
from glmd.data.token_store import build_token_store
from glmd.errors import DataError, DiskError
from glmd.tasks.examples import read_split
from glmd.tasks.tasks import load_task

TASKS = ("RTE", "BoolQ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "world"
    world.build_synthetic(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def read_rows(folder: Path, task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "superglue" / task / f"{split}.jsonl").read_text().splitlines()]


def text_and_claim(row: dict) -> tuple[str, str]:
    return (row["premise"], row["hypothesis"]) if "premise" in row else (row["passage"], row["question"])


def is_true(row: dict) -> bool:
    return row["label"] in (True, "entailment")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- A reader of the texts that knows the phrasings and nothing of how examples are made ---------------------------

VALUE = dict.fromkeys(world.TOPICS["craft"] + ["beast"], r"[a-z]+") | {
    "home": r"[A-Za-z]+(?<!shire)",
    "shire": r"[A-Za-z]+shire",
    "birthplace": r"[A-Za-z]+",
    "day": "|".join(world.DAYS),
    "friend": r"[A-Za-z]+ [A-Za-z]+",
}


def pattern(text: str, fact: str) -> re.Pattern:
    return re.compile(
        text.format(n=r"(?P<name>[A-Za-z]+(?: [A-Za-z]+)?)", v=f"(?P<value>{VALUE[fact]})"), re.IGNORECASE
    )


READINGS = [
    {(fact, pair is pairs[-1], pattern(pair[form], fact)) for fact, pairs in world.PHRASINGS.items() for pair in pairs}
    for form in (0, 1)
]


def read(text: str, form: int) -> tuple[str, str, str, bool]:
    """(fact, name, value, held out phrasing) of a statement (form 0) or question (form 1); its reading is unique."""
    found = [
        (fact, match["name"].lower(), match["value"].lower(), held_out)
        for fact, held_out, regex in READINGS[form]
        if (match := regex.fullmatch(text))
    ]
    assert len(found) == 1, (text, found)
    return found[0]


def read_sentence(text: str) -> tuple[bool, str, str, str, bool]:
    """(affirmed, fact, name, value, held out) of a told sentence."""
    for affirmed, frames in world.FRAMES.items():
        for frame in frames:
            opening = frame.removesuffix("{s}")
            if opening and text.lower().startswith(opening):
                fact, name, value, held_out = read(text[len(opening) :], 0)
                return affirmed, fact, name, value, held_out or frame is frames[-1]
    return (True, *read(text, 0))


def read_row(row: dict) -> tuple[list[tuple], tuple]:
    text, claim = text_and_claim(row)
    claim = read(claim.removesuffix("."), int("question" in row))
    return [read_sentence(each) for each in text.removesuffix(".").split(". ")], claim


def shires(folder: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+) lies on the \w+ in (\w+)\.", (folder / "corpus.txt").read_text().lower(), re.M))


# --- Bytes ---------------------------------------------------------------------------------------------------------


def test_the_bytes_do_not_depend_on_the_hash_seed(folder, tmp_path):
    for hash_seed in ("1", "2"):
        place = tmp_path / hash_seed
        code = f"from glmd.data.synthetic import build_synthetic, Path; build_synthetic(Path({str(place)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
        assert contents(place) == contents(folder)


def test_another_seed_gives_another_world(folder, tmp_path):
    world.build_synthetic(tmp_path / "other", seed=1)
    ours, others = contents(folder), contents(tmp_path / "other")
    assert ours.keys() == others.keys()
    assert [name for name in ours if ours[name] == others[name]] == ["tokenizer/tokenizer_config.json"]


def test_building_again_leaves_the_whole_world_untouched(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    world.build_synthetic(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["corpus.txt", "tokenizer/vocab.txt", "manifest.json"])
def test_a_damaged_or_foreign_folder_is_refused_by_name(tmp_path, name):
    place = tmp_path / "world"
    world.build_synthetic(place)
    (place / name).write_text("something else")
    with pytest.raises(DataError, match=str(place)):
        world.build_synthetic(place)


def test_a_world_of_another_seed_is_refused(folder):
    with pytest.raises(DataError, match="seed 5"):
        world.build_synthetic(folder, seed=5)


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(place, seed):
        (place / "corpus.txt").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(world, "_write_world", fail)
    with pytest.raises(DiskError, match="disk full"):
        world.build_synthetic(tmp_path / "world")
    assert list(tmp_path.iterdir()) == []


# --- Tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_rows_are_superglue_rows(folder, name, split):
    examples = read_split(load_task(name), str(folder / "superglue"), split, require_labels=split != "test")
    assert len(examples) == world.EXAMPLES[split]
    rows = read_rows(folder, name, split)
    assert [row["idx"] for row in rows] == list(range(len(rows)))
    assert all(("label" in row) == (split != "test") for row in rows)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_are_balanced_and_follow_from_the_text(folder, task, split):
    craft_of = {word: row[0] for row in world.CRAFTS for word in row}
    shire_of = shires(folder)
    rows = read_rows(folder, task, split)
    assert 2 * sum(is_true(row) for row in rows) == len(rows)
    for row in rows:
        told, (fact, name, value, _) = read_row(row)
        assert {who.split()[0] for _, _, who, _, _ in told} == {name.split()[0]}
        implied = any(
            affirmed
            and (
                (told_fact, told_value) == (fact, value)
                or (fact == "shire" and told_fact == "home" and shire_of[told_value] == value)
                or (craft_of.get(told_value, 1) == craft_of.get(value, 2))
            )
            for affirmed, told_fact, _, told_value, _ in told
        )
        assert implied == is_true(row), row


@pytest.mark.parametrize("task", TASKS)
def test_the_claim_alone_does_not_tell_the_label(folder, task):
    """Naive Bayes on the claim's words, learned on train, stays near chance on val."""
    train, val = (read_rows(folder, task, split) for split in ("train", "val"))
    counts = {True: Counter(), False: Counter()}
    for row in train:
        counts[is_true(row)].update(set(text_and_claim(row)[1].split()))
    hits = 0
    for row in val:
        words = set(text_and_claim(row)[1].split())
        score = sum(math.log((counts[True][word] + 1) / (counts[False][word] + 1)) for word in words)
        hits += (score > 0) == is_true(row)
    assert abs(hits / len(val) - 0.5) < 0.06  # 800 examples: three standard deviations are 0.053


# --- What is held out ----------------------------------------------------------------------------------------------


def people_in(texts: list[str]) -> set[str]:
    """Every first name followed by a surname, wherever it stands."""
    names = world.World(0).names
    firsts, surnames = ({name.lower() for name in names[kind]} for kind in ("first name", "surname"))
    words = re.findall(r"\w+|[^\w ]", "\n".join(texts).lower())
    return {f"{first} {last}" for first, last in pairwise(words) if first in firsts and last in surnames}


def test_no_person_occurs_in_two_splits(folder):
    found = {
        split: people_in([" \n ".join(text_and_claim(row)) for task in TASKS for row in read_rows(folder, task, split)])
        for split in ("train", "val", "test")
    }
    found["corpus"] = people_in([(folder / "corpus.txt").read_text()])
    assert all(len(people) > 200 for people in found.values())
    assert sum(len(people) for people in found.values()) == len(set.union(*found.values()))


@pytest.mark.parametrize("task", TASKS)
def test_held_out_phrasings_occur_in_val_and_never_in_train(folder, task):
    shares = {}
    for split in ("train", "val"):
        rows = [read_row(row) for row in read_rows(folder, task, split)]
        shares[split] = sum(claim[3] or any(each[4] for each in told) for told, claim in rows) / len(rows)
    assert shares["train"] == 0
    assert 0.3 < shares["val"] < 0.8


# --- Tokenizer -----------------------------------------------------------------------------------------------------


def test_the_tokenizer_knows_every_text_and_reads_back(folder, tokenizer, tmp_path):
    assert tokenizer.convert_tokens_to_ids(world.SPECIAL_TOKENS) == [0, 1, 2, 3, 4]
    corpus = (folder / "corpus.txt").read_text()
    others = [each for task in TASKS for row in read_rows(folder, task, "val") for each in text_and_claim(row)]
    words = sorted(set((corpus + " ".join(others)).split()))  # white space splits first, so words stand for texts
    encoded = tokenizer(words).input_ids
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)
    assert tokenizer.tokenize("XyZwick!") == ["x", "##y", "##z", "##wick", "!"]
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)(words).input_ids == encoded


def test_the_vocabulary_has_the_corpus_words_by_count_and_no_word_twice(folder, tokenizer):
    entries = (folder / "tokenizer" / "vocab.txt").read_text().splitlines()
    assert len(entries) == len(set(entries)) == len(tokenizer)
    counts = Counter(re.findall(r"\w+|[^\w\s]", (folder / "corpus.txt").read_text().lower()))
    words = [entry for entry in entries[5:] if counts[entry] >= world.MINIMUM_COUNT and len(entry) > 1]
    assert [counts[word] for word in words] == sorted((counts[word] for word in words), reverse=True)
    assert set(words) == {word for word, count in counts.items() if count >= world.MINIMUM_COUNT and len(word) > 1}


def test_half_of_the_vocabulary_leaves_a_measurable_share_of_the_running_tokens(folder, tokenizer, tmp_path):
    store = build_token_store(tmp_path / "store", [str(folder / "corpus.txt")], tokenizer)
    counts = store.counts(len(tokenizer))
    assert 400_000 < store.num_tokens < 700_000
    kept = sorted(counts, reverse=True)[: len(tokenizer) // 2]
    assert 0.015 < 1 - sum(kept) / counts.sum() < 0.06
