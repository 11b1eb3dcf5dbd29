"""A compressed tokenizer cuts text as its source does and speaks the student's ids everywhere else."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import families
import numpy as np
import pytest
from families import FAMILIES, one_of
from hypothesis import given, settings
from hypothesis import strategies as st
from skeletoken import TokenizerModel
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import AddedToken, AutoTokenizer, BertConfig, BertTokenizer, DataCollatorForLanguageModeling
from transformers import PreTrainedTokenizerFast as PlainTokenizer

from glmd.errors import ModelError
from glmd.vocabulary.build import build_vocabulary
from glmd.vocabulary.selection import choose_kept_ids, merge_parts
from glmd.vocabulary.tokenizer import (
    GlmdTokenizer,
    compress_tokenizer,
    load_tokenizer,
    require_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
)
from glmd.vocabulary.vocabulary import Vocabulary

WORDS = "the cat dog bird river mountain sing sang run light dark green over under blue stone paper quick slow"
PIECES = "##ing ##ed ##es ##er ##est ##ly ##ness ##ful ##ish ##able"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
SPECIAL = "[PAD] [unused0] [UNK] [unused1] [CLS] [SEP] [MASK]"
TEXTS = [
    "The cat sang over a dark river.",
    "a quickest bird, running slowly under mountains!",
    "[MASK] stones & papers [SEP] blueish é 猫 🙂 zzz",
    "",
    "light",
]


def source_tokenizer() -> BertTokenizer:
    tokens = [
        *SPECIAL.split(),
        *LETTERS,
        *(f"##{c}" for c in LETTERS[:36]),
        *WORDS.split(),
        *PIECES.split(),
        "猫",
    ]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=48)


def some_vocabulary(tokenizer: Any, keep_ratio: float, *, seed: int = 0, selection: str = "closed") -> Vocabulary:
    random = np.random.default_rng(seed)
    counts = random.integers(0, 50, len(tokenizer))
    embeddings = random.standard_normal((len(tokenizer), 8))
    return build_vocabulary(tokenizer, embeddings, counts, keep_ratio=keep_ratio, selection=selection)


def without_characters(tokenizer: BertTokenizer) -> Vocabulary:
    """Half of the tokens, single characters dropped like any other: many texts meet a dropped token."""
    random = np.random.default_rng(3)
    counts = random.integers(0, 50, len(tokenizer))
    special = {*tokenizer.all_special_ids}
    kept = choose_kept_ids(counts, special, keep_ratio=0.5)
    token_map = random.choice([i for i, k in enumerate(kept) if k not in special], len(tokenizer))
    token_map[kept] = np.arange(len(kept))
    return Vocabulary(kept, token_map)


SOURCE = source_tokenizer()
VOCABULARIES = [some_vocabulary(SOURCE, 0.85), without_characters(SOURCE)]
PAIRS = [(compress_tokenizer(SOURCE, v), v) for v in VOCABULARIES]


class Case(NamedTuple):
    """A tokenizer, the compressed one, and the vocabulary between them."""

    source: Any
    student: GlmdTokenizer
    vocabulary: Vocabulary


def made(source: Any, keep_ratio: float, selection: str = "closed") -> Case:
    vocabulary = some_vocabulary(source, keep_ratio, selection=selection)
    return Case(source, compress_tokenizer(source, vocabulary), vocabulary)


CASES = {"words": Case(SOURCE, *PAIRS[0]), "characters": Case(SOURCE, *PAIRS[1])}
# A little above what must be kept: bytes and characters are most of these small vocabularies.
CASES |= {name: made(make(), 0.85) for name, make in FAMILIES.items()}
FREE = {f"{name}, free": made(CASES[name].source, 0.85, "free") for name in ("gpt2", "llama2")}
SPECIALS = sorted({token for case in CASES.values() for token in case.source.all_special_tokens})
parts = st.sampled_from(
    [*WORDS.split(), *families.WORDS, *(p[2:] for p in PIECES.split()), *SPECIALS, " ", "ing ", "🙂"]
)
texts = st.one_of(st.text(max_size=30), st.lists(st.one_of(parts, st.text(max_size=3)), max_size=12).map("".join))
cases = pytest.mark.parametrize("case", [*CASES.values(), *FREE.values()], ids=[*CASES, *FREE])
closed_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def mapped(vocabulary: Vocabulary, ids: list) -> list:
    if ids and isinstance(ids[0], list):
        return [mapped(vocabulary, row) for row in ids]
    return [int(vocabulary.token_map[i]) for i in ids]


def assert_same_but_mapped(case: Case, *args: object, **kwargs: object) -> None:
    source, student, vocabulary = case
    expected, actual = source(*args, **kwargs), student(*args, **kwargs)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name] == (mapped(vocabulary, value) if name == "input_ids" else value), name


@cases
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_ids_are_the_mapped_ids_of_the_source_and_all_else_is_equal(case, text):
    source, student, vocabulary = case
    assert_same_but_mapped(
        case,
        text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_length=True,
    )
    encoding, expected = student(text), source(text)
    assert encoding.word_ids() == expected.word_ids()
    assert all(0 <= i < vocabulary.size for i in encoding["input_ids"])
    assert student.encode(text) == encoding["input_ids"]


@cases
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_decoding_says_what_the_source_says_of_the_kept_tokens(case, text):
    source, student, vocabulary = case
    ids = student(text)["input_ids"]
    source_ids = vocabulary.kept_ids[ids].tolist()
    for skip in (False, True):
        assert student.decode(ids, skip_special_tokens=skip) == source.decode(source_ids, skip_special_tokens=skip)
    assert student.convert_ids_to_tokens(ids) == source.convert_ids_to_tokens(source_ids)


@cases
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_converting_the_pieces_of_a_text_gives_its_ids(case, text):
    source, student, _ = case
    pieces = student.tokenize(text)
    assert pieces == source.tokenize(text)
    assert student.convert_tokens_to_ids(pieces) == student.encode(text, add_special_tokens=False)


@closed_cases
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_the_plain_tokenizer_cuts_text_without_dropped_tokens_alike(case, text):
    source, student, vocabulary = case
    plain = student.backend_tokenizer.encode(text).ids
    assert all(0 <= i < vocabulary.size for i in plain)
    if all(vocabulary.is_kept(i) for i in source(text)["input_ids"]):
        assert plain == student(text)["input_ids"]


TRIMMED_BY_OTHERS: dict[int, Any] = {}


@closed_cases
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_the_plain_tokenizer_is_what_skeletoken_makes_of_the_same_tokens(case, text):
    """Another's typed model of tokenizer.json, as a second opinion on what is trimmed."""
    source, student, vocabulary = case
    if id(case) not in TRIMMED_BY_OTHERS:
        model = TokenizerModel.from_string(source.backend_tokenizer.to_str())
        dropped = source.convert_ids_to_tokens(vocabulary.dropped_ids.tolist())
        TRIMMED_BY_OTHERS[id(case)] = model.remove_tokens_from_vocabulary(dropped).to_tokenizer()
    theirs = TRIMMED_BY_OTHERS[id(case)]
    assert theirs.get_vocab() == student.get_vocab()
    ours = student.backend_tokenizer.encode(text)
    assert theirs.encode(text).ids == ours.ids
    assert theirs.decode(ours.ids) == student.backend_tokenizer.decode(ours.ids)


@cases
def test_its_vocabulary_is_dense_and_its_special_tokens_are_the_sources(case):
    source, student, vocabulary = case
    assert len(student) == vocabulary.size
    assert sorted(student.get_vocab().values()) == list(range(vocabulary.size))
    for name in ("pad", "unk", "cls", "sep", "mask", "bos", "eos"):
        source_id = getattr(source, f"{name}_token_id")
        expected = None if source_id is None else vocabulary.token_map[source_id]
        assert getattr(student, f"{name}_token_id") == expected
    assert student.all_special_tokens == source.all_special_tokens
    assert student.is_exact
    assert student.model_max_length == source.model_max_length == 48
    assert student.token_map == vocabulary.token_map.tolist()


@cases
@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": True},
        {"padding": "max_length", "max_length": 20, "truncation": True},
        {"padding": True, "padding_side": "left"},
        {"padding": True, "pad_to_multiple_of": 8},
        {"truncation": True, "max_length": 5},
        {"truncation": True, "max_length": 6, "stride": 2, "return_overflowing_tokens": True},
        {"add_special_tokens": False},
        {"return_token_type_ids": False, "return_attention_mask": False},
        {"split_special_tokens": True},
    ],
    ids=lambda kwargs: ",".join(kwargs),
)
def test_every_way_to_call_agrees_with_the_source(case, kwargs):
    assert_same_but_mapped(case, TEXTS, **kwargs)
    assert_same_but_mapped(case, TEXTS[1], **kwargs)
    assert_same_but_mapped(case, [text.split() for text in TEXTS], is_split_into_words=True, **kwargs)
    if "stride" not in kwargs:
        assert_same_but_mapped(case, TEXTS, TEXTS[::-1], **kwargs)
        assert_same_but_mapped(case, TEXTS[0], TEXTS[1], **kwargs)
        assert_same_but_mapped(case, list(zip(TEXTS, TEXTS[::-1], strict=True)), **kwargs)
    else:
        only_second = {**kwargs, "truncation": "only_second", "max_length": 24}
        assert_same_but_mapped(case, [TEXTS[0]] * 2, [TEXTS[1] * 3] * 2, **only_second)


@cases
def test_tensors_hold_the_same_rows(case):
    source, student, vocabulary = case
    for args, kwargs in [
        ((TEXTS,), {"padding": True}),
        ((TEXTS[0],), {}),
        ((TEXTS[0], TEXTS[1]), {"return_length": True}),
        ((TEXTS[0].split(),), {"is_split_into_words": True}),
        (
            (TEXTS[1],),
            {"truncation": True, "max_length": 6, "return_overflowing_tokens": True, "padding": True},
        ),
    ]:
        expected = source(*args, return_tensors="pt", **kwargs)
        actual = student(*args, return_tensors="pt", **kwargs)
        for name, value in expected.items():
            assert actual[name].shape == value.shape, name
            assert actual[name].tolist() == (
                mapped(vocabulary, value.tolist()) if name == "input_ids" else value.tolist()
            )


@cases
def test_settings_changed_by_the_user_are_obeyed(case):
    source, student, vocabulary = case
    student, source = copy.deepcopy(student), copy.deepcopy(source)
    for tokenizer in (student, source):
        tokenizer.padding_side = "left"
        tokenizer.truncation_side = "left"
        tokenizer.model_max_length = 7
    expected = source(TEXTS, padding=True, truncation=True)
    actual = student(TEXTS, padding=True, truncation=True)
    assert actual["input_ids"] == mapped(vocabulary, expected["input_ids"])
    assert actual["attention_mask"] == expected["attention_mask"]


@cases
def test_pad_and_masks_and_positions_agree_with_the_source(case):
    source, student, vocabulary = case
    expected, actual = source(TEXTS[1]), student(TEXTS[1])
    assert [actual.char_to_token(i) for i in range(20)] == [expected.char_to_token(i) for i in range(20)]
    rows = [student(text) for text in TEXTS]
    padded = student.pad({"input_ids": [row["input_ids"] for row in rows]})
    assert padded["input_ids"] == student(TEXTS, padding=True)["input_ids"]
    ids = student(TEXTS[2])["input_ids"]
    source_mask = source.get_special_tokens_mask(vocabulary.kept_ids[ids].tolist(), already_has_special_tokens=True)
    assert student.get_special_tokens_mask(ids, already_has_special_tokens=True) == source_mask
    assert student.num_special_tokens_to_add(pair=True) == source.num_special_tokens_to_add(pair=True)
    assert student.model_input_names == source.model_input_names


@cases
def test_a_stream_of_ids_decodes_as_a_whole_does(case):
    _, student, _ = case
    ids = student("the quickest birds sang", add_special_tokens=False)["input_ids"]
    stream = DecodeStream(skip_special_tokens=False)
    text = "".join(stream.step(student.backend_tokenizer, i) or "" for i in ids)
    assert text == student.decode(ids) and "\ufffd" not in text, "no word is mapped onto a part of a character"


@pytest.mark.parametrize("name", ["words", "characters", "roberta", "xlm-r"])
def test_masking_for_training_uses_the_students_mask_token(name):
    _, student, vocabulary = CASES[name]
    collator = DataCollatorForLanguageModeling(student, mlm_probability=0.9, seed=1)
    batch = collator([student(text) for text in TEXTS])
    assert int(batch["input_ids"].max()) < vocabulary.size
    assert (batch["input_ids"] == student.mask_token_id).any()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cases
def test_saving_what_was_loaded_changes_no_byte(case, tmp_path):
    _, student, _ = case
    student = copy.deepcopy(student)
    student.chat_template = "{{ messages[0]['content'] }}"
    student(TEXTS, padding="max_length", truncation=True, max_length=9)
    save_tokenizer(student, tmp_path / "first")
    save_tokenizer(student, tmp_path / "first")
    loaded = load_tokenizer(tmp_path / "first")
    loaded(TEXTS, padding=True, truncation=True, max_length=5)
    save_tokenizer(loaded, tmp_path / "second")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    assert set(files_of(tmp_path / "first")) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "source_tokenizer.json",
        "token_map.json",
        "tokenization_glmd.py",
        "chat_template.jinja",
    }
    assert loaded(TEXTS)["input_ids"] == student(TEXTS)["input_ids"]
    assert loaded.chat_template == student.chat_template
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(student)
    saved = json.loads((tmp_path / "second" / "tokenizer.json").read_text())
    assert saved["padding"] is None
    assert saved["truncation"] is None


@pytest.mark.slow
def test_two_processes_write_the_same_files_of_every_family(tmp_path):
    """Of one source tokenizer each; with other hash seeds, so with another order of every set."""
    for name, case in CASES.items():
        case.source.backend_tokenizer.save(str(tmp_path / f"{name}.json"))
    script = """
import pathlib, sys
import test_tokenizer as t
folder, out = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[1])
for path in sorted(folder.glob("*.json")):
    source = t.PlainTokenizer(tokenizer_object=t.Tokenizer.from_file(str(path)))
    t.save_tokenizer(t.made(source, 0.9).student, out / path.stem)
"""
    for seed in ("1", "2"):
        arguments = [sys.executable, "-c", script, str(tmp_path / seed), str(tmp_path)]
        subprocess.run(
            arguments, check=True, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
    assert len(files_of(tmp_path / "1")) == 5 * len(CASES) and files_of(tmp_path / "1") == files_of(tmp_path / "2")


@cases
def test_copies_and_pickles_encode_alike(case):
    _, student, _ = case
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert twin(TEXTS)["input_ids"] == student(TEXTS)["input_ids"]
        twin.pad_token = other = next(token for token in student.all_special_tokens if token != student.pad_token)
        assert twin(TEXTS, padding=True)["input_ids"][-1][-1] == twin.convert_tokens_to_ids(other)
        assert student(TEXTS, padding=True)["input_ids"][-1][-1] == student.pad_token_id


@cases
def test_added_tokens_get_rows_of_their_own_and_survive_saving(case, tmp_path):
    source, student, vocabulary = case
    student, source = copy.deepcopy(student), copy.deepcopy(source)
    pieces = source.convert_ids_to_tokens(vocabulary.dropped_ids.tolist())
    dropped = next(piece for piece in reversed(pieces) if len(piece.lstrip("#▁Ġ")) > 1)
    new = ["<new>", AddedToken("<special>", special=True), dropped.removeprefix("##")]
    rows = 2 + (new[2] not in student.get_vocab())
    for tokenizer in (student, source):
        tokenizer.add_tokens(new)
    assert len(student) == vocabulary.size + rows
    text = f"a <new> {new[2]} <special>cat <new>"
    ids = student(text)["input_ids"]
    assert len(ids) == len(source(text)["input_ids"])
    assert ids.count(student.convert_tokens_to_ids("<new>")) == 2
    assert student.convert_tokens_to_ids("<new>") == vocabulary.size
    save_tokenizer(student, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(text)["input_ids"] == ids
    assert len(loaded) == len(student)


def test_tokens_added_to_the_source_before_are_tokens_like_any_other(tmp_path):
    source = source_tokenizer()
    source.add_tokens(["<one>", "dark river"])
    source.add_special_tokens({"extra_special_tokens": ["<two>"]})
    vocabulary = some_vocabulary(source, 0.85)
    student = compress_tokenizer(source, vocabulary)
    save_tokenizer(student, tmp_path)
    text = "a <one> sang over dark rivers <two> dark <two>"
    for tokenizer in (student, load_tokenizer(tmp_path)):
        assert tokenizer(text)["input_ids"] == mapped(vocabulary, source(text)["input_ids"])
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).count("<two>") == 0
        assert tokenizer.added_tokens_encoder == {
            token: vocabulary.token_map[i] for token, i in source.added_tokens_encoder.items()
        }


def test_keeping_everything_returns_the_source_itself():
    assert compress_tokenizer(SOURCE, Vocabulary.identity(len(SOURCE))) is SOURCE


def test_auto_tokenizer_gives_the_exact_class_once_glmd_is_imported(tmp_path):
    student, _ = PAIRS[0]
    BertConfig(vocab_size=len(student)).save_pretrained(tmp_path)
    save_tokenizer(student, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, GlmdTokenizer)
    assert loaded(TEXTS)["input_ids"] == student(TEXTS)["input_ids"]


STOCK = """
import json, sys
from transformers import AutoConfig, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
plain = AutoTokenizer.from_pretrained(folder)
exact = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
exact.save_pretrained(sys.argv[3])
assert not any(name == "glmd" or name.startswith("glmd.") for name in sys.modules)
print(json.dumps({
    "class": type(plain).__name__, "exact class": type(exact).__name__,
    "len": len(plain), "vocab_size": AutoConfig.from_pretrained(folder).vocab_size,
    "special": [getattr(plain, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")],
    "names": plain.model_input_names, "plain": plain(texts)["input_ids"], "exact": exact(texts)["input_ids"],
    "decoded": plain.decode(plain(texts[0])["input_ids"], skip_special_tokens=True),
}))
"""


@pytest.mark.slow
def test_without_glmd_the_folder_loads_as_an_ordinary_tokenizer_in_silence(tmp_path):
    student, vocabulary = PAIRS[0]
    folder = tmp_path / "student"
    BertConfig(vocab_size=len(student)).save_pretrained(folder)
    save_tokenizer(student, folder)
    arguments = [sys.executable, "-c", STOCK, str(folder), json.dumps(TEXTS), str(tmp_path / "again")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    seen = json.loads(run.stdout)
    assert run.stderr == ""
    assert seen["class"] == "TokenizersBackend"
    assert seen["exact class"] == "GlmdTokenizer"
    assert seen["len"] == seen["vocab_size"] == vocabulary.size
    assert seen["special"] == [getattr(student, f"{n}_token_id") for n in ("pad", "unk", "cls", "sep", "mask")]
    assert seen["names"] == student.model_input_names
    assert seen["exact"] == student(TEXTS)["input_ids"]
    assert seen["plain"] == [student.backend_tokenizer.encode(text).ids for text in TEXTS]
    again = files_of(tmp_path / "again")
    assert again == {name: content for name, content in files_of(folder).items() if name in again} and len(again) == 5
    assert seen["decoded"] == student.decode(seen["plain"][0], skip_special_tokens=True)


def test_a_source_tokenizer_that_was_exchanged_is_refused(tmp_path):
    save_tokenizer(PAIRS[0][0], tmp_path)
    path = tmp_path / "source_tokenizer.json"
    path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))
    with pytest.raises(ModelError, match=r"source_tokenizer.json is not the file.*sha256"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"sha256"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["source_tokenizer.json", "token_map.json"])
def test_a_folder_that_lost_half_of_its_map_is_refused(tmp_path, name):
    save_tokenizer(PAIRS[0][0], tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_tokenizer(tmp_path)


def change_map(folder: Path, **changes: object) -> None:
    path = folder / "token_map.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_map_of_wrong_length_range_or_version_is_refused(tmp_path):
    student, _ = PAIRS[0]
    save_tokenizer(student, tmp_path)
    change_map(tmp_path, token_map=student.token_map[:-1])
    with pytest.raises(ModelError, match=r"entries for"):
        load_tokenizer(tmp_path)
    change_map(tmp_path, token_map=[*student.token_map[:-1], len(student)])
    with pytest.raises(ModelError, match=r"has target"):
        load_tokenizer(tmp_path)
    change_map(tmp_path, token_map=student.token_map, version=2)
    with pytest.raises(ModelError, match=r"version 2"):
        load_tokenizer(tmp_path)


def test_an_ordinary_tokenizer_is_saved_and_loaded_as_it_is(tmp_path):
    save_tokenizer(SOURCE, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert not isinstance(loaded, GlmdTokenizer)
    assert loaded(TEXTS)["input_ids"] == SOURCE(TEXTS)["input_ids"]
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(SOURCE)


def test_two_tokenizers_are_not_mixed_in_one_folder(tmp_path):
    save_tokenizer(PAIRS[0][0], tmp_path)
    with pytest.raises(ModelError, match=r"token_map.json belongs to another tokenizer"):
        save_tokenizer(SOURCE, tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]")
    with pytest.raises(ModelError, match=r"vocab.txt belongs to another tokenizer"):
        save_tokenizer(PAIRS[0][0], tmp_path)


def test_the_fingerprint_tells_apart_equal_sizes_and_equal_vocabularies():
    swapped = dict(SOURCE.get_vocab())
    swapped["cat"], swapped["dog"] = swapped["dog"], swapped["cat"]
    assert len(BertTokenizer(vocab=swapped)) == len(SOURCE)
    assert tokenizer_fingerprint(BertTokenizer(vocab=swapped)) != tokenizer_fingerprint(SOURCE)
    assert tokenizer_fingerprint(source_tokenizer()) == tokenizer_fingerprint(SOURCE)
    vocabulary = VOCABULARIES[1]
    other = vocabulary.token_map.copy()
    other[vocabulary.dropped_ids[0]] = 7 if other[vocabulary.dropped_ids[0]] != 7 else 8
    twin = compress_tokenizer(SOURCE, Vocabulary(vocabulary.kept_ids, other))
    assert twin.get_vocab() == PAIRS[1][0].get_vocab()
    assert tokenizer_fingerprint(twin) != tokenizer_fingerprint(PAIRS[1][0])


def plain(model: models.Model, **special: str) -> PlainTokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PlainTokenizer(tokenizer_object=backend, **special)


def test_a_tokenizer_without_pad_or_mask_token_is_refused_with_a_remedy():
    tokenizer = plain(models.WordPiece({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match=r"no pad token; set one .*tokenizer.pad_token ="):
        require_tokenizer(tokenizer, mask=False)
    tokenizer.pad_token = "[PAD]"
    require_tokenizer(tokenizer, mask=False)
    with pytest.raises(ModelError, match=r"no mask token"):
        require_tokenizer(tokenizer, mask=True)
    require_tokenizer(SOURCE, mask=True)


def test_a_tokenizer_that_is_not_fast_is_refused_by_name():
    class SlowTokenizer:
        pad_token_id = 0

    with pytest.raises(ModelError, match=r"SlowTokenizer is not backed by the tokenizers library"):
        require_tokenizer(SlowTokenizer(), mask=False)


def test_families_that_cannot_be_trimmed_are_refused_by_name():
    tokenizer = plain(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    vocabulary = Vocabulary(np.array([0, 1]), np.array([0, 1, 1]))
    with pytest.raises(ModelError, match=r"type WordLevel cannot be trimmed yet; supported: WordPiece"):
        compress_tokenizer(tokenizer, vocabulary)


def test_a_class_with_logic_of_its_own_is_refused_by_name():
    class ShoutingTokenizer(BertTokenizer):
        def _decode(self, *args: object, **kwargs: object) -> str:
            return super()._decode(*args, **kwargs).upper()

    tokenizer = ShoutingTokenizer(vocab=SOURCE.get_vocab())
    with pytest.raises(ModelError, match=r"ShoutingTokenizer overrides _decode"):
        compress_tokenizer(tokenizer, VOCABULARIES[0])


def test_compressing_twice_or_with_a_strange_vocabulary_is_refused():
    student, vocabulary = PAIRS[0]
    with pytest.raises(ModelError, match=rf"maps {vocabulary.source_size} tokens, the tokenizer has {len(student)}"):
        compress_tokenizer(student, vocabulary)
    smaller = Vocabulary(np.arange(9), np.minimum(np.arange(len(student)), 8))
    with pytest.raises(ModelError, match=r"compressed already"):
        compress_tokenizer(student, smaller)
    kept = np.setdiff1d(np.arange(len(SOURCE)), [SOURCE.mask_token_id])
    token_map = np.zeros(len(SOURCE), dtype=np.int64)
    token_map[kept] = np.arange(len(kept))
    with pytest.raises(ModelError, match=r"drops '\[MASK\]'"):
        compress_tokenizer(SOURCE, Vocabulary(kept, token_map))


def test_training_a_compressed_tokenizer_anew_is_refused():
    with pytest.raises(NotImplementedError, match=r"source tokenizer"):
        PAIRS[0][0].train_new_from_iterator([], 10)


@pytest.mark.real
def test_real_bert_text_is_encoded_exactly_and_fully(shared, tmp_path):
    tokenizer = BertTokenizer.from_pretrained(str(shared / "data/tokenizers/bert-base-uncased"))
    lines = (shared / "data/corpus/state_union.txt").read_text().splitlines()[:400]
    counts = np.bincount(
        np.concatenate(tokenizer(lines, add_special_tokens=False)["input_ids"]).astype(np.int64),
        minlength=len(tokenizer),
    )
    kept = np.arange(len(tokenizer))
    kept = choose_kept_ids(counts, set(tokenizer.all_special_ids), keep_ratio=0.1)
    token_map = np.full(len(tokenizer), 500)
    token_map[kept] = np.arange(len(kept))
    student = compress_tokenizer(tokenizer, Vocabulary(kept, token_map))
    save_tokenizer(student, tmp_path)
    other = (shared / "data/corpus/movie_reviews.txt").read_text().splitlines()[:30]
    expected = [token_map[row].tolist() for row in tokenizer(other)["input_ids"]]
    assert load_tokenizer(tmp_path)(other)["input_ids"] == expected


# Families


def test_a_chat_template_and_its_mask_of_the_assistant_give_mapped_ids():
    source, student, vocabulary = CASES["llama3"]
    messages = [{"role": "user", "content": "the quickest cat"}, {"role": "assistant", "content": "sang über rivers"}]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected, actual = (each.apply_chat_template(messages, **options) for each in (source, student))
    assert actual["input_ids"] == mapped(vocabulary, expected["input_ids"])
    assert actual["assistant_masks"] == expected["assistant_masks"] and any(expected["assistant_masks"])


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_bytes_bring_every_text_back_through_the_plain_tokenizer(text):
    for name in ("gpt2", "llama3", "gpt2, free"):
        source, student, _ = (CASES | FREE)[name]
        ids = student.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert student.decode(ids) == source.decode(source.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama2"])
def test_closed_selection_keeps_what_a_kept_token_is_merged_from(name):
    source, _, vocabulary = CASES[name]
    parts = merge_parts(json.loads(source.backend_tokenizer.to_str())["model"])
    assert all(vocabulary.is_kept(part) for i in parts if vocabulary.is_kept(i) for part in parts[i])
    free = FREE.get(f"{name}, free")
    if free is not None:
        orphans = [i for i in parts if free.vocabulary.is_kept(i) and not all(map(free.vocabulary.is_kept, parts[i]))]
        assert orphans, "else this shows nothing"
        assert json.loads(free.student.backend_tokenizer.to_str())["model"]["ignore_merges"]


def test_a_token_has_the_parts_that_the_tokenizer_merges_it_from():
    """Against the tokenizer itself: without a token's own merge it falls into exactly its two parts."""
    for name in ("gpt2", "llama2"):
        state = json.loads(CASES[name].source.backend_tokenizer.to_str())
        entries = {i: token for token, i in state["model"]["vocab"].items()}
        parts = merge_parts(state["model"])
        assert len(parts) > 100
        for i, (left, right) in list(parts.items())[::9]:
            model = copy.deepcopy(state["model"])
            pair = [entries[left], entries[right]]
            model["merges"] = [m for m in model["merges"] if (m.split(" ") if isinstance(m, str) else list(m)) != pair]
            alone = {"version": "1.0", "model": model, "added_tokens": []}
            assert Tokenizer.from_str(json.dumps(alone)).encode(entries[i]).tokens == pair


def test_a_prefix_of_byte_pairs_is_refused_by_name():
    backend = Tokenizer(models.BPE({"a": 0, "##b": 1, "a##b": 2}, [], continuing_subword_prefix="##"))
    with pytest.raises(ModelError, match="continuing_subword_prefix is not supported"):
        merge_parts(json.loads(backend.to_str())["model"])


@pytest.fixture(scope="module", params=["smollm2", "unigram-8k-own", *one_of(["gpt2", "roberta", "mistral-v1-spm"])])
def real_tokenizer(request, shared, tmp_path_factory):
    """The tokenizer that a user would load from such files."""
    from transformers import GPT2Tokenizer, LlamaTokenizer, RobertaTokenizer, T5Tokenizer

    classes = {"gpt2": GPT2Tokenizer, "roberta": RobertaTokenizer, "mistral-v1-spm": LlamaTokenizer}
    folder = shared / "data/tokenizers" / request.param
    if request.param == "unigram-8k-own":
        named = tmp_path_factory.mktemp("t5")
        (named / "spiece.model").write_bytes((folder / "unigram8k.model").read_bytes())
        return T5Tokenizer.from_pretrained(named)
    return classes.get(request.param, AutoTokenizer).from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.real
def test_real_text_is_encoded_exactly_and_text_of_kept_tokens_alike_without_glmd(real_tokenizer, shared, tmp_path):
    tokenizer, size = real_tokenizer, len(real_tokenizer)
    lines = (shared / "data/corpus/state_union.txt").read_text().splitlines()
    counts = np.zeros(size, dtype=np.int64)
    for row in tokenizer(lines[:3000], add_special_tokens=False)["input_ids"]:
        counts += np.bincount(row, minlength=size) if row else 0
    embeddings = np.random.default_rng(0).standard_normal((size, 4))
    vocabulary = build_vocabulary(tokenizer, embeddings, counts, keep_ratio=0.25)
    student = compress_tokenizer(tokenizer, vocabulary)
    save_tokenizer(student, tmp_path)
    student = load_tokenizer(tmp_path)
    other = [line for line in (shared / "data/corpus/movie_reviews.txt").read_text().splitlines() if line][:400]
    other += lines[-400:]
    alike = 0
    for text, ids in zip(other, tokenizer(other)["input_ids"], strict=True):
        exact = student(text)["input_ids"]
        assert exact == vocabulary.token_map[ids].tolist()
        if all(vocabulary.is_kept(i) for i in ids):
            alike += 1
            assert student.backend_tokenizer.encode(text).ids == exact
    assert alike > 50, "lines of kept tokens alone are not rare"


def test_a_tokenizer_that_cuts_at_random_is_refused():
    state = json.loads(CASES["gpt2"].source.backend_tokenizer.to_str())
    state["model"]["dropout"] = 0.3
    tokenizer = PlainTokenizer(tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<|pad|>")
    with pytest.raises(ModelError, match=r"has a dropout of 0.3.*; set it to null"):
        compress_tokenizer(tokenizer, CASES["gpt2"].vocabulary)


def test_a_class_that_changes_its_own_backend_is_refused_by_name():
    """As CLIP's: it puts a decode of its own on the instance."""
    from transformers import CLIPTokenizer

    letters = {f"{c}{end}": i for i, (c, end) in enumerate((c, e) for c in "abc" for e in ("", "</w>"))}
    special = {token: len(letters) + i for i, token in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    tokenizer = CLIPTokenizer(vocab=letters | special, merges=[])
    vocabulary = Vocabulary(np.arange(1, len(tokenizer)), np.maximum(np.arange(len(tokenizer)) - 1, 0))
    with pytest.raises(ModelError, match="CLIPTokenizer replaces decode of its backend"):
        compress_tokenizer(tokenizer, vocabulary)
