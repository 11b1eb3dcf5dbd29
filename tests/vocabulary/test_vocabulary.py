"""The kept tokens, the map onto them, and models cut to them."""

import copy
import json
import logging
import os

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer, GenerationConfig

from glmd.errors import ModelError
from glmd.vocabulary.build import build_vocabulary
from glmd.vocabulary.mapping import MAPPINGS, map_tokens, token_classes
from glmd.vocabulary.renumbering import renumber_config, renumber_generation_config
from glmd.vocabulary.selection import byte_ids, choose_kept_ids, must_keep_ids, parts_to_keep, unknown_id
from glmd.vocabulary.slicing import expand_model, ids_to_keep, slice_model, vocabulary_axes
from glmd.vocabulary.tokenizer import compress_tokenizer, load_tokenizer, save_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary, in_degrees

V = 60
TOKENS = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"abcdefghij",
    *(f"##{c}" for c in "abcdefghij"),
    *(f"w{i}" for i in range(34)),
]


@pytest.fixture
def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={token: i for i, token in enumerate(TOKENS)})


def vocabulary_of(kept: list[int] | np.ndarray, source_size: int = V) -> Vocabulary:
    """Keeps `kept`; the others go round the kept ones."""
    kept = np.sort(np.asarray(kept))
    token_map = np.arange(source_size) % len(kept)
    token_map[kept] = np.arange(len(kept))
    return Vocabulary(kept, token_map)


EVEN = vocabulary_of([0, 1, 2, 3, *range(4, V, 2)])


# Choosing


def test_the_most_frequent_tokens_are_kept_and_ties_go_to_the_lower_id():
    counts = np.array([5, 9, 9, 0, 5, 5, 1])
    assert choose_kept_ids(counts, set(), size=4).tolist() == [0, 1, 2, 4]
    assert choose_kept_ids(counts, {3, 6}, size=4).tolist() == [1, 2, 3, 6]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), counts=st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_no_dropped_token_was_seen_more_often_than_a_kept_one(data, counts):
    must = data.draw(st.sets(st.integers(0, len(counts) - 1)))
    size = data.draw(st.integers(max(1, len(must)), len(counts)))
    kept = choose_kept_ids(np.array(counts), must, size=size)
    free = [i for i in kept if i not in must]
    dropped = [i for i in range(len(counts)) if i not in kept]
    assert len(kept) == size
    assert must <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert all((counts[k], -k) > (counts[d], -d) for k in free for d in dropped)


def test_a_ratio_counts_as_written_and_may_be_rounded_up_to_a_multiple():
    assert len(choose_kept_ids(np.zeros(100, dtype=int), set(), keep_ratio=0.29)) == 29
    assert len(choose_kept_ids(np.zeros(30524, dtype=int), set(), keep_ratio=0.5, multiple_of=1)) == 15262
    assert len(choose_kept_ids(np.zeros(30524, dtype=int), set(), keep_ratio=0.5, multiple_of=128)) == 15360
    assert len(choose_kept_ids(np.zeros(30522, dtype=int), set(), keep_ratio=0.5, multiple_of=1)) == 15261
    for everything in ({"keep_ratio": 1.0}, {"size": 10}, {"size": 9, "multiple_of": 8}):
        assert choose_kept_ids(np.arange(10), set(), **everything).tolist() == list(range(10))


def test_a_ratio_of_a_large_vocabulary_is_rounded_up_to_64_unless_something_else_is_asked_for():
    kept = {v: len(choose_kept_ids(np.zeros(v, dtype=int), set(), keep_ratio=0.51)) for v in (4095, 4096, 30522)}
    assert kept == {4095: 2088, 4096: 2112, 30522: 15616}
    assert len(choose_kept_ids(np.zeros(30522, dtype=int), set(), size=15261)) == 15261
    for ratio in (0.9999, 1.0):
        assert len(choose_kept_ids(np.zeros(30522, dtype=int), set(), keep_ratio=ratio)) == 30522, "never more"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"keep_ratio": 1.5}, r"keep_ratio must be in \(0, 1\], got 1.5"),
        ({"keep_ratio": float("nan")}, "keep_ratio must be in"),
        ({}, "exactly one of keep_ratio and size"),
        ({"keep_ratio": 0.5, "size": 5}, "exactly one of keep_ratio and size"),
        ({"size": 0}, "at least one token"),
        ({"keep_ratio": 0.01}, "at least one token"),
        ({"size": 5, "multiple_of": 0}, "multiple_of must be at least 1"),
        ({"size": 5, "multiple_of": 11}, "multiple_of is 11, more than the 10 tokens there are"),
        ({"size": 11}, "size is 11, but there are 10 tokens"),
        ({"size": 2}, r"2 of 10 tokens would be kept, but 3 must be .* raise size to at least 3"),
        ({"keep_ratio": 0.2}, r"2 of 10 tokens would be kept, but 3 must be .* raise keep_ratio to at least 0.3000"),
    ],
)
def test_impossible_budgets_are_refused_with_what_would_work(kwargs, message):
    with pytest.raises(ModelError, match=message):
        choose_kept_ids(np.arange(10), {1, 2, 3}, **kwargs)


def test_counts_that_are_no_counts_are_refused():
    for counts in (
        np.array([1, -1]),
        np.array([0.5, 1.0]),
        np.ones((2, 2), dtype=int),
        np.array([], dtype=int),
    ):
        with pytest.raises(ModelError, match=r"counts must be a row of integers"):
            choose_kept_ids(counts, set(), size=1)
    with pytest.raises(ModelError, match=r"must_keep holds ids outside 0 to 9"):
        choose_kept_ids(np.arange(10), {10}, size=5)


def test_special_tokens_characters_and_the_pieces_of_words_must_be_kept(tokenizer):
    tokenizer.add_tokens(["<added>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    special = {0, 2, 3, 4, 5, V, V + 1}
    characters = set(range(6, 26))
    assert must_keep_ids(tokenizer) == special | characters
    word = {tokenizer.convert_tokens_to_ids(token) for token in ("w3", "##a")}
    assert must_keep_ids(tokenizer, words=["w3a"]) == special | characters | word


def test_a_word_the_tokenizer_does_not_know_is_refused_by_name(tokenizer):
    for word in ("w1 zebra", "", "   "):
        with pytest.raises(ModelError, match=rf"keep_words: the tokenizer does not know '{word}'"):
            must_keep_ids(tokenizer, words=["w1", word])
    must_keep_ids(tokenizer, words=["[UNK]"])


# Mapping


def nearest(embeddings: np.ndarray, kept: np.ndarray, method: str, forbidden: set[int]) -> list[int]:
    """The plainest mapping: one token after the other."""
    score = {
        "inner_product": lambda a, b: a @ b,
        "cosine": lambda a, b: a @ b / (np.linalg.norm(a) * np.linalg.norm(b)),
        "euclidean": lambda a, b: -np.linalg.norm(a - b),
    }[method]
    result = []
    for i, row in enumerate(embeddings):
        if i in kept:
            result.append(int(np.flatnonzero(kept == i)[0]))
        else:
            allowed = [k for k, source in enumerate(kept) if source not in forbidden]
            result.append(max(allowed, key=lambda k: score(row, embeddings[kept[k]])))
    return result


@pytest.mark.parametrize("method", ["inner_product", "cosine", "euclidean"])
@pytest.mark.parametrize("chunk_size", [1, 7, 4096])
def test_mapping_agrees_with_one_token_at_a_time(method, chunk_size):
    embeddings = np.random.default_rng(1).standard_normal((V, 5)) * np.linspace(0.2, 3, V)[:, None]
    forbidden = {0, 3, 4, 58}
    found = map_tokens(embeddings, EVEN.kept_ids, method=method, forbidden_targets=forbidden, chunk_size=chunk_size)
    assert found.tolist() == nearest(embeddings, EVEN.kept_ids, method, forbidden)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_kept_ids_are_fixed_points_and_special_tokens_are_no_targets(seed, data):
    random = np.random.default_rng(seed)
    special = data.draw(st.sets(st.integers(0, V - 1), max_size=8))
    kept = choose_kept_ids(random.integers(0, 9, V), special, size=data.draw(st.integers(len(special) + 1, V)))
    for method in MAPPINGS[:3]:
        token_map = map_tokens(random.standard_normal((V, 4)), kept, method=method, forbidden_targets=special)
        vocabulary = Vocabulary(kept, token_map)
        assert token_map[kept].tolist() == list(range(len(kept)))
        targets = kept[token_map[vocabulary.dropped_ids]]
        assert not special & set(targets.tolist())


def test_rows_of_equal_length_are_mapped_alike_by_every_distance():
    embeddings = np.random.default_rng(2).standard_normal((V, 6))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    maps = [map_tokens(embeddings, EVEN.kept_ids, method=method) for method in MAPPINGS[:3]]
    assert np.array_equal(maps[0], maps[1])
    assert np.array_equal(maps[0], maps[2])


def test_equal_scores_go_to_the_lower_id_and_half_precision_decides_like_single():
    embeddings = np.ones((6, 3), dtype=np.float32)
    assert map_tokens(embeddings, np.array([1, 2, 4])).tolist() == [0, 0, 1, 0, 2, 0]
    assert map_tokens(np.zeros((4, 3)), np.array([1, 2]), method="cosine").tolist() == [0, 0, 1, 0]
    tensor = torch.randn(V, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = map_tokens(tensor.float().numpy(), EVEN.kept_ids)
    assert np.array_equal(map_tokens(tensor.requires_grad_(), EVEN.kept_ids), expected)
    nearly_equal = torch.tensor([[1.0], [1.0 + 1e-12], [1.0]], dtype=torch.float64)
    assert map_tokens(nearly_equal, np.array([0, 1])).tolist() == [0, 1, 1]


def test_within_classes_a_token_is_mapped_onto_its_own_kind_where_one_is_kept():
    embeddings = np.random.default_rng(3).standard_normal((V, 5))
    classes = np.arange(V) % 3
    classes[7] = 9  # alone: no kept token is like it
    found = map_tokens(embeddings, EVEN.kept_ids, classes=classes, forbidden_targets={0}, chunk_size=4)
    for i in EVEN.dropped_ids:
        like = set(np.flatnonzero(classes != classes[i]).tolist()) if i != 7 else set()
        assert found[i] == nearest(embeddings, EVEN.kept_ids, "inner_product", {0} | like)[i]
    assert np.array_equal(found[EVEN.kept_ids], np.arange(EVEN.size))


@pytest.mark.parametrize(
    ("family", "begins", "goes_on"),
    [("gpt2", "Ġlight", "er"), ("llama2", "▁light", "er"), ("xlm-r", "▁light", "s"), ("t5", "▁light", "s")],
)
def test_classes_tell_beginnings_of_words_from_what_goes_on_and_bytes(family, begins, goes_on):
    tokenizer = FAMILIES[family]()
    ids, classes, in_bytes = tokenizer.get_vocab(), token_classes(tokenizer), byte_ids(tokenizer)
    assert (classes[ids[begins]], classes[ids[goes_on]]) == (1, 0)
    assert sorted(np.flatnonzero(classes == 2)) == sorted(in_bytes)


def test_a_vocabulary_within_classes_maps_pieces_onto_pieces(tokenizer):
    embeddings = np.random.default_rng(0).standard_normal((V, 4))
    counts = np.arange(V)[::-1].copy()
    classes, share = token_classes(tokenizer), []
    assert np.array_equal(classes == 0, [token.startswith("##") for token in TOKENS])
    counts[[TOKENS.index("##a"), TOKENS.index("##b")]] = V + 1
    for within in (False, True):
        vocabulary = build_vocabulary(tokenizer, embeddings, counts, size=45, within_class=within)
        dropped = vocabulary.dropped_ids
        targets = vocabulary.kept_ids[vocabulary.token_map[dropped]]
        share.append((classes[dropped] == classes[targets]).mean())
    assert share[1] == 1 > share[0]


def test_mapping_unk_sends_every_dropped_token_to_the_unknown_token():
    token_map = map_tokens(np.zeros((V, 2)), EVEN.kept_ids, method="unk", unk_id=2)
    assert set(token_map[EVEN.dropped_ids]) == {2}
    for unk_id in (None, 5):
        with pytest.raises(ModelError, match=r"needs an unknown token that is kept"):
            map_tokens(np.zeros((V, 2)), EVEN.kept_ids, method="unk", unk_id=unk_id)


def test_mappings_that_cannot_be_made_are_refused():
    with pytest.raises(ModelError, match=r"one of inner_product, cosine, euclidean, unk, got 'dot'"):
        map_tokens(np.zeros((V, 2)), EVEN.kept_ids, method="dot")
    with pytest.raises(ModelError, match=r"every kept token is a special one"):
        map_tokens(np.zeros((V, 2)), np.array([0, 1]), forbidden_targets={0, 1})
    broken = np.zeros((V, 2))
    broken[7] = np.nan
    with pytest.raises(ModelError, match=r"not finite"):
        map_tokens(broken, EVEN.kept_ids)


# The vocabulary itself


def test_a_vocabulary_survives_saving(tmp_path):
    vocabulary = Vocabulary(EVEN.kept_ids, EVEN.token_map, "cosine", np.arange(V))
    vocabulary.save(tmp_path)
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert np.array_equal(loaded.kept_ids, vocabulary.kept_ids)
    assert np.array_equal(loaded.token_map, vocabulary.token_map)
    assert np.array_equal(loaded.counts, vocabulary.counts)
    assert loaded.mapping == "cosine"
    assert loaded.fingerprint() == vocabulary.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vocabulary.json", "vocabulary.safetensors"]
    summary = json.loads((tmp_path / "vocabulary.json").read_text())
    assert summary["size"] == vocabulary.size
    assert summary["coverage"] == vocabulary.coverage
    assert sum(hub["takes"] for hub in summary["hubs"]) <= summary["dropped"] == V - vocabulary.size
    EVEN.save(tmp_path / "uncounted")
    assert Vocabulary.load(tmp_path / "uncounted").counts is None


def test_a_kill_in_the_middle_of_saving_leaves_nothing_once_it_is_saved_again(tmp_path, monkeypatch):
    class Killed(BaseException):
        """Nothing may catch it, as nothing catches SIGKILL."""

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die)
        patched.setattr(os, "getpid", lambda: 4711)
        with pytest.raises(Killed):
            EVEN.save(tmp_path)
    EVEN.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vocabulary.json", "vocabulary.safetensors"]


def test_a_torn_or_damaged_vocabulary_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"vocabulary.safetensors is missing"):
        Vocabulary.load(tmp_path)
    EVEN.save(tmp_path / "even")
    arrays, summary = (tmp_path / "even" / f"vocabulary.{end}" for end in ("safetensors", "json"))
    whole, text = arrays.read_bytes(), summary.read_text()
    vocabulary_of(range(0, V, 3)).save(tmp_path / "other")
    arrays.write_bytes((tmp_path / "other" / "vocabulary.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"do not belong together"):
        Vocabulary.load(tmp_path / "even")
    arrays.write_bytes(whole[:-40])
    with pytest.raises(ModelError, match=r"vocabulary.safetensors cannot be used"):
        Vocabulary.load(tmp_path / "even")
    arrays.write_bytes(whole)
    for broken, message in (
        (text[:-20], "cannot be read"),
        ("{}", "cannot be read"),
        ("[]", "cannot be read"),
    ):
        summary.write_text(broken)
        with pytest.raises(ModelError, match=message):
            Vocabulary.load(tmp_path / "even")
    summary.write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(ModelError, match=r"version 9"):
        Vocabulary.load(tmp_path / "even")


@pytest.mark.parametrize(
    ("kept", "token_map", "message"),
    [
        ([], [0], "at least one must be"),
        ([1, 0], [1, 0], "must ascend"),
        ([0, 0], [0, 0], "must ascend"),
        ([0, 2], [0, 1], "must ascend"),
        ([0, 1], [1, 0, 0], "does not map the kept ids"),
        ([0, 1], [0, 1, 2], "targets outside 0 to 1"),
        ([0, 1], [0, 1, -1], "targets outside"),
        ([0.0], [0], "row of integers"),
    ],
)
def test_arrays_that_are_no_vocabulary_are_refused(kept, token_map, message):
    with pytest.raises(ModelError, match=message):
        Vocabulary(np.array(kept, dtype=None if kept else int), np.array(token_map))
    with pytest.raises(ModelError, match=r"counts must be 2 numbers"):
        Vocabulary(np.array([0, 1]), np.array([0, 1]), counts=np.array([1, 2, 3]))


def test_unknown_tokens_cover_nothing_and_are_counted_apart(tmp_path):
    counts = np.array([1, 2, 3, 4, 0])
    vocabulary = Vocabulary(np.array([0, 2, 3]), np.array([0, 1, 1, 2, 1]), counts=counts, unknown_id=3)
    assert (vocabulary.coverage, vocabulary.unknown_share) == (0.4, 0.4)
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path).coverage == 0.4
    summary = json.loads((tmp_path / "vocabulary.json").read_text())
    assert (summary["coverage"], summary["unknown_share"]) == (0.4, 0.4)
    alone = Vocabulary.identity(5, counts=np.array([0, 0, 0, 9, 0]), unknown_id=3)
    assert (alone.coverage, alone.unknown_share) == (0.0, 1.0)


def test_the_unknown_token_is_the_models_own_and_none_where_bytes_spell_all(tiny):
    assert unknown_id(transformers.AutoTokenizer.from_pretrained(tiny.teacher)) == 1
    tokenizer = FAMILIES["gpt2"]()
    assert unknown_id(tokenizer) is None
    # Some say that it is the end of text, which separates documents and is often seen.
    tokenizer.backend_tokenizer.model.unk_token = tokenizer.eos_token
    assert unknown_id(tokenizer) is None


@pytest.mark.parametrize("keep_ratio", [0.7, 1.0])
@pytest.mark.parametrize(("share", "warned"), [(1.0, True), (0.02, True), (0.005, False), (0.0, False)])
def test_a_notable_share_of_unknown_tokens_is_warned_of(tiny, caplog, keep_ratio, share, warned):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.teacher)
    counts = np.full(len(tokenizer), 1000)
    known = 1000 * (len(tokenizer) - len(tokenizer.all_special_ids))  # a separator between documents is no text
    counts[tokenizer.unk_token_id] = round(share / (1 - share) * known) if share < 1 else 1000
    if share == 1:
        counts *= np.isin(np.arange(len(counts)), tokenizer.all_special_ids)
    embeddings = np.eye(len(tokenizer), 8)
    vocabulary = build_vocabulary(tokenizer, embeddings, counts, keep_ratio=keep_ratio)
    assert vocabulary.unknown_share == pytest.approx(share, abs=1e-4)
    assert vocabulary.coverage <= 1 - vocabulary.unknown_share
    assert ("unknown to the tokenizer ([UNK])" in caplog.text) == warned


def test_its_properties_say_what_the_arrays_say():
    vocabulary = Vocabulary(np.array([0, 2, 3]), np.array([0, 1, 1, 2, 1]), counts=np.array([1, 2, 3, 4, 0]))
    assert (vocabulary.size, vocabulary.source_size, vocabulary.is_identity) == (3, 5, False)
    assert vocabulary.dropped_ids.tolist() == [1, 4]
    assert vocabulary.coverage == 0.8
    assert [vocabulary.is_kept(i) for i in range(5)] == [True, False, True, True, False]
    degrees = in_degrees(vocabulary)
    assert (degrees.dropped, degrees.targets, degrees.hubs, degrees.largest_share) == (2, 1, ((2, 2),), 1.0)
    identity = Vocabulary.identity(5)
    assert identity.is_identity
    assert in_degrees(identity).largest_share == 0.0
    assert identity.token_map.tolist() == identity.kept_ids.tolist() == list(range(5))


def test_the_fingerprint_depends_on_the_arrays_alone():
    twin = Vocabulary(EVEN.kept_ids.copy(), EVEN.token_map.copy(), "cosine", np.arange(V))
    assert twin.fingerprint() == EVEN.fingerprint()
    moved = EVEN.token_map.copy()
    moved[EVEN.dropped_ids[0]] = 0 if moved[EVEN.dropped_ids[0]] else 1
    assert Vocabulary(EVEN.kept_ids, moved).fingerprint() != EVEN.fingerprint()


def test_one_call_builds_a_vocabulary_from_a_larger_matrix(tokenizer, caplog):
    random = np.random.default_rng(0)
    counts = random.integers(0, 9, V)
    embeddings = torch.randn(V + 4, 6, generator=torch.Generator().manual_seed(1))
    embeddings[V:] = 1000.0
    with caplog.at_level(logging.INFO, "glmd.vocabulary"):
        vocabulary = build_vocabulary(tokenizer, embeddings, counts, keep_ratio=0.6, keep_words=["w9"])
    assert "4 embedding rows beyond the tokenizer are dropped" in caplog.text
    assert vocabulary.size == 36
    assert vocabulary.source_size == V
    assert must_keep_ids(tokenizer, words=["w9"]) <= set(vocabulary.kept_ids.tolist())
    special = set(tokenizer.all_special_ids)
    expected = map_tokens(embeddings[:V], vocabulary.kept_ids, forbidden_targets=special)
    assert np.array_equal(vocabulary.token_map, expected)
    assert not special & set(vocabulary.kept_ids[vocabulary.token_map[vocabulary.dropped_ids]].tolist())
    assert build_vocabulary(tokenizer, embeddings, counts, keep_ratio=1.0).is_identity


def test_a_hub_that_takes_a_large_share_is_named_in_a_warning(tokenizer, caplog):
    embeddings = np.random.default_rng(0).random((V, 3)) + 0.1
    embeddings[10] = 50.0
    build_vocabulary(tokenizer, embeddings, np.zeros(V, dtype=int), size=40)
    assert "'e' takes 20 of 20 dropped tokens (100.0 %)" in caplog.text


def test_text_that_never_uses_most_of_the_vocabulary_is_told_with_numbers(tokenizer, caplog):
    embeddings = np.random.default_rng(0).standard_normal((V, 4))
    counts = np.zeros(V, dtype=int)
    counts[[40, 41, 42]] = 9
    build_vocabulary(tokenizer, embeddings, counts, size=50)
    unseen = 50 - len(must_keep_ids(tokenizer)) - 3
    assert unseen > 5
    assert f"{unseen} of 50 kept tokens stand nowhere in the text, which uses 3 of {V}; count more" in caplog.text
    caplog.clear()
    build_vocabulary(tokenizer, embeddings, np.arange(1, V + 1), size=50)
    assert "nowhere" not in caplog.text


def test_counts_embeddings_and_tokenizer_must_fit(tokenizer):
    with pytest.raises(ModelError, match=r"59 counts for a tokenizer of 60 tokens"):
        build_vocabulary(tokenizer, np.zeros((V, 2)), np.zeros(V - 1, dtype=int), size=40)
    with pytest.raises(ModelError, match=r"have 59 rows, the tokenizer has 60 tokens"):
        build_vocabulary(tokenizer, np.zeros((V - 1, 2)), np.zeros(V, dtype=int), size=40)
    holey = BertTokenizer(vocab={token: i + (i > 50) for i, token in enumerate(TOKENS)})
    with pytest.raises(ModelError, match=r"ids with holes"):
        build_vocabulary(holey, np.zeros((V, 2)), np.zeros(V, dtype=int), size=40)


# Slicing models

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {**SMALL, "vocab_size": V, "max_position_embeddings": 32}
LLAMA = {
    **SMALL,
    "vocab_size": V,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 4],
}
GPT2 = {
    "vocab_size": V,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 4,
    "eos_token_id": 4,
}
ENDS = {"bos_token_id": 2, "eos_token_id": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 4, "cls_token_id": 3, "sep_token_id": 4}
T5 = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {
    "vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
HEADS = {
    "BertForMaskedLM": ("BertConfig", BERT, True),
    "BertForSequenceClassification": ("BertConfig", {**BERT, "num_labels": V}, False),
    "BertForQuestionAnswering": ("BertConfig", BERT, False),
    "RobertaForMaskedLM": ("RobertaConfig", {**BERT, "pad_token_id": 1}, True),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {
            "vocab_size": V,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 32,
        },
        True,
    ),
    "ElectraForMaskedLM": ("ElectraConfig", {**BERT, "embedding_size": 8}, True),
    "ElectraForPreTraining": ("ElectraConfig", {**BERT, "embedding_size": 8}, False),
    "AlbertForMaskedLM": ("AlbertConfig", {**BERT, "embedding_size": 8}, True),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, True),
    "LlamaForCausalLM": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": False}, True),
    "LlamaForCausalLM-tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, True),
    "T5ForConditionalGeneration": ("T5Config", T5, True),
    "BartForConditionalGeneration": ("BartConfig", BART, True),
    "BertForTokenClassification": ("BertConfig", BERT, False),
    "XLMRobertaForMaskedLM": ("XLMRobertaConfig", {**BERT, "pad_token_id": 1}, True),
    "MPNetForMaskedLM": ("MPNetConfig", {**BERT, "pad_token_id": 1}, True),
    "DebertaV2ForMaskedLM": ("DebertaV2Config", BERT, True),
    "ModernBertForMaskedLM": ("ModernBertConfig", {**BERT, **IDS}, True),
    "MobileBertForMaskedLM": ("MobileBertConfig", {**BERT, "embedding_size": 8, "intra_bottleneck_size": 8}, True),
    "Gemma2ForCausalLM": ("Gemma2Config", {**LLAMA, "head_dim": 8}, True),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA, True),
    "GlmForCausalLM": ("GlmConfig", {**LLAMA, "head_dim": 8}, True),
    "OPTForCausalLM": (
        "OPTConfig",
        {
            "vocab_size": V,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 16,
            "pad_token_id": 1,
            **ENDS,
        },
        True,
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**BERT, **ENDS}, True),
    "MT5ForConditionalGeneration": ("MT5Config", T5, True),
}


def model_of(name: str, **changes: object) -> transformers.PreTrainedModel:
    config_name, fields, _ = HEADS[name]
    config = getattr(transformers, config_name)(**{**fields, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, name.split("-")[0])(config).eval()
    for parameter in model.parameters():  # biases are born zero, where a wrong slice would not be seen
        parameter.data += 0.1 * torch.randn_like(parameter)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias += torch.randn_like(model.final_logits_bias)
    return model


def logits_of(model: transformers.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.start_logits if "start_logits" in outputs else outputs.logits


def kept_batch(vocabulary: Vocabulary) -> torch.Tensor:
    ids = np.random.default_rng(5).choice(vocabulary.kept_ids[3:], (3, 9))
    return torch.tensor(ids)


def test_an_expanded_model_reads_source_ids_as_the_student_reads_their_targets():
    """And its configuration has the source's ids again, where the student's were others."""
    model = model_of("BertForSequenceClassification", pad_token_id=6, bos_token_id=8, eos_token_id=[10, 12])
    student = slice_model(model, EVEN)
    expanded = expand_model(student, EVEN)
    for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(expanded.config, name) == getattr(model.config, name)
        assert getattr(expanded.config, name) != getattr(student.config, name), "else this shows nothing"
    ids = torch.randint(5, V, (3, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(expanded, ids), logits_of(student, torch.from_numpy(EVEN.token_map)[ids]))
    with pytest.raises(ModelError, match="BertForMaskedLM predicts tokens"):
        expand_model(slice_model(model_of("BertForMaskedLM"), EVEN), EVEN)


@pytest.mark.parametrize("name", HEADS)
def test_a_sliced_models_logits_are_the_full_models_on_the_kept_tokens(name, tmp_path):
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sliced = slice_model(model, EVEN)
    ids = kept_batch(EVEN)
    expected = logits_of(model, ids)
    if HEADS[name][2]:
        expected = expected[..., torch.tensor(EVEN.kept_ids)]
    student_ids = torch.tensor(EVEN.token_map)[ids]
    assert torch.equal(logits_of(sliced, student_ids), expected) or torch.allclose(
        logits_of(sliced, student_ids), expected, atol=1e-6
    )
    assert type(sliced) is type(model)
    assert sliced.config.vocab_size == EVEN.size
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.vocab_size == V
    sliced.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(reloaded, student_ids), logits_of(sliced, student_ids))


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head[2]])
def test_tied_weights_stay_tied_and_others_apart(name):
    model = model_of(name)
    sliced = slice_model(model, EVEN)
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (model, sliced)]
    assert tied[0] == tied[1]
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in model.parameters())


def test_slicing_keeps_dtype_mode_and_what_is_frozen():
    model = model_of("BertForMaskedLM").to(torch.bfloat16).train()
    model.bert.encoder.eval()
    model.bert.embeddings.requires_grad_(False)
    before = torch.get_rng_state()
    sliced = slice_model(model, EVEN)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in sliced.parameters()} == {torch.bfloat16}
    assert sliced.training
    assert not sliced.bert.encoder.training
    assert not sliced.bert.embeddings.word_embeddings.weight.requires_grad
    assert sliced.bert.encoder.layer[0].output.dense.weight.requires_grad
    assert sliced.bert.embeddings.word_embeddings.padding_idx == 0


def test_rows_beyond_the_tokenizer_are_dropped_and_said(caplog):
    model = model_of("BertForMaskedLM", vocab_size=V + 4)
    with caplog.at_level(logging.INFO, "glmd.vocabulary.slicing"):
        sliced = slice_model(model, Vocabulary.identity(V))
    assert "4 rows beyond the tokenizer are dropped" in caplog.text
    ids = kept_batch(EVEN)
    assert sliced.config.vocab_size == V
    assert torch.allclose(logits_of(sliced, ids), logits_of(model, ids)[..., :V], atol=1e-6)


def test_the_identity_gives_an_equal_model():
    model = model_of("LlamaForCausalLM-tied")
    sliced = slice_model(model, Vocabulary.identity(V))
    assert sliced.config.to_dict() == model.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), sliced.parameters(), strict=True))
    assert sliced.model.embed_tokens.weight is not model.model.embed_tokens.weight


def test_axes_are_found_by_shape_and_not_by_number():
    config = transformers.BertConfig(**{**BERT, "num_labels": V, "max_position_embeddings": V, "hidden_size": V})
    axes = vocabulary_axes(config, transformers.BertForMaskedLM)
    assert axes == {
        "bert.embeddings.word_embeddings.weight": 0,
        "cls.predictions.bias": 0,
        "cls.predictions.decoder.weight": 0,
        "cls.predictions.decoder.bias": 0,
    }
    bart = vocabulary_axes(transformers.BartConfig(**BART), transformers.BartForConditionalGeneration)
    assert bart["final_logits_bias"] == 1
    assert bart["lm_head.weight"] == 0


def test_generating_greedily_gives_the_mapped_text_of_the_full_model():
    model = model_of("GPT2LMHeadModel")
    model.generation_config.suppress_tokens = EVEN.dropped_ids.tolist()
    sliced = slice_model(model, EVEN)
    prompt = torch.tensor([[6, 8, 20]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": None}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    student_prompt = torch.tensor(EVEN.token_map)[prompt]
    actual = sliced.generate(student_prompt, attention_mask=torch.ones_like(prompt), **options)
    assert sliced.generation_config.suppress_tokens == []
    assert torch.tensor(EVEN.token_map)[expected].tolist() == actual.tolist()


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "MPNetForMaskedLM"])
def test_a_pad_token_that_would_move_all_positions_is_refused(name):
    config = getattr(transformers, name.replace("ForMaskedLM", "Config"))(**{**BERT, "pad_token_id": 4})
    model = getattr(transformers, name)(config)
    moving = vocabulary_of([0, 2, 3, *range(4, V)])
    with pytest.raises(ModelError, match=rf"{name}: .*position_embeddings counts positions .* from 4 to 3"):
        slice_model(model, moving)
    staying = vocabulary_of([0, 1, 2, 3, *range(4, V, 2)])
    assert slice_model(model, staying).config.pad_token_id == 4
    assert slice_model(model_of("BertForMaskedLM", pad_token_id=4), moving).config.pad_token_id == 3


@pytest.mark.parametrize("name", ["CamembertForMaskedLM", "BertForMaskedLM"])
def test_what_stands_before_a_pad_token_that_cannot_move_is_kept(name):
    """CamemBERT's first tokens are of no use, and its positions are counted from the second one."""
    config = getattr(transformers, name.replace("ForMaskedLM", "Config"))(
        **{**BERT, "pad_token_id": 4, "bos_token_id": 9, "eos_token_id": 5}, architectures=[name]
    )
    before = {0, 1, 2, 3} if name == "CamembertForMaskedLM" else set()
    assert ids_to_keep(config) == {4, 5, 9} | before
    kept = vocabulary_of(sorted(ids_to_keep(config)))
    assert slice_model(getattr(transformers, name)(config), kept).config.pad_token_id == len(before)


def test_models_that_cannot_be_sliced_are_refused_by_name():
    with pytest.raises(ModelError, match=r"Linear is not a transformers model"):
        slice_model(torch.nn.Linear(2, 2), EVEN)
    with pytest.raises(ModelError, match=r"BertForMaskedLM has 60 rows, the vocabulary maps 64"):
        slice_model(model_of("BertForMaskedLM"), Vocabulary.identity(64))
    model = model_of("BertForMaskedLM")
    model.config.vocab_size = V + 1
    with pytest.raises(ModelError, match=r"config.vocab_size is 61, the embedding has 60 rows"):
        slice_model(model, EVEN)


def test_two_matrices_that_the_class_ties_stay_two():
    """As T5 1.1's, whose config cannot say so: transformers goes by what a file holds."""
    untied = model_of("GPT2LMHeadModel").eval()
    untied.lm_head.weight = torch.nn.Parameter(torch.randn(V, 16))
    sliced, ids = slice_model(untied, EVEN), torch.arange(5)[None]
    kept = torch.from_numpy(EVEN.kept_ids)
    assert sliced.lm_head.weight is not sliced.transformer.wte.weight
    torch.testing.assert_close(sliced(ids).logits, untied(kept[ids]).logits[..., kept])


# Ids in configurations


def test_every_id_of_a_configuration_is_renumbered_and_nothing_else():
    config = transformers.BartConfig(
        **BART,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=[2, 10],
        decoder_start_token_id=12,
        forced_eos_token_id=14,
    )
    config.suppress_tokens = [5, 6, 7, 8]
    config.task_specific_params = {"summary": {"forced_bos_token_id": 20, "max_length": 50, "num_beams": 4}}
    before = copy.deepcopy(config.to_dict())
    new = renumber_config(config, EVEN)
    to_student = EVEN.token_map
    assert new.eos_token_id == [2, to_student[10]]
    assert new.decoder_start_token_id == to_student[12]
    assert new.forced_eos_token_id == to_student[14]
    assert new.vocab_size == EVEN.size
    assert new.suppress_tokens == [to_student[6], to_student[8]]
    assert new.task_specific_params["summary"] == {
        "forced_bos_token_id": to_student[20], "max_length": 50, "num_beams": 4,
    }  # fmt: skip
    assert config.to_dict() == before
    changed = {key for key, value in new.to_dict().items() if value != before[key]}
    assert changed == {
        "vocab_size", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id", "suppress_tokens",
        "task_specific_params",
    }  # fmt: skip


def test_ids_in_parts_of_a_configuration_are_renumbered_too():
    text = transformers.LlamaConfig(**LLAMA)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**SMALL), image_token_index=40
    )
    new = renumber_config(config, EVEN)
    assert new.text_config.eos_token_id == [2, EVEN.token_map[4]]
    assert new.text_config.vocab_size == EVEN.size
    assert new.image_token_id == EVEN.token_map[40]


def test_a_generation_configuration_is_renumbered_and_loses_what_cannot_occur(caplog):
    config = GenerationConfig(
        pad_token_id=0, eos_token_id=[2, 6], suppress_tokens=[5, 8], begin_suppress_tokens=[7],
        bad_words_ids=[[6, 8], [6, 7]], sequence_bias=[[[8], -1.0], [[9], 2.0]],
        max_new_tokens=50, num_beams=10,
    )  # fmt: skip
    new = renumber_generation_config(config, EVEN)
    six, eight = int(EVEN.token_map[6]), int(EVEN.token_map[8])
    assert (new.pad_token_id, new.eos_token_id) == (0, [2, six])
    assert (new.suppress_tokens, new.begin_suppress_tokens) == ([eight], [])
    assert new.bad_words_ids == [[six, eight]]
    assert new.sequence_bias == [[[eight], -1.0]]
    assert (new.max_new_tokens, new.num_beams) == (50, 10)
    assert config.eos_token_id == [2, 6]
    assert "[6, 7] is left out" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eos_token_id", V, "eos_token_id = 60 is no id of the tokenizer"),
        ("eos_token_id", [2, -1], "eos_token_id = -1 is no id"),
        ("bos_token_id", 5, "bos_token_id = 5 is a dropped token"),
        ("galaxy_token_id", 4, "galaxy_token_id = 4 looks like a token id"),
        ("codec_bos_id", 4, "codec_bos_id = 4 looks like a token id"),
        ("lang_to_id", {"en": 4}, "lang_to_id = .* looks like a token id"),
        ("mask_token_id", "4", "'4' is no token id"),
    ],
)
def test_stale_dropped_and_unknown_ids_are_refused_by_name(field, value, message):
    config = transformers.BertConfig(**BERT)
    object.__setattr__(config, field, value)
    with pytest.raises(ModelError, match=message):
        renumber_config(config, EVEN)


@pytest.mark.parametrize("name", ["BertConfig", "RobertaConfig", "LlamaConfig", "T5Config", "ModernBertConfig"])
def test_default_configurations_hold_nothing_unknown(name):
    config = getattr(transformers, name)()
    identity = Vocabulary.identity(config.vocab_size)
    assert renumber_config(config, identity).to_dict() == config.to_dict()


# Together


def test_model_and_tokenizer_share_their_ids_after_a_round_trip(tokenizer, tmp_path):
    model = model_of("BertForMaskedLM")
    counts = np.random.default_rng(0).integers(0, 9, V)
    vocabulary = build_vocabulary(tokenizer, model.get_input_embeddings().weight, counts, keep_ratio=0.6)
    student = compress_tokenizer(tokenizer, vocabulary)
    sliced = slice_model(model, vocabulary)
    sliced.save_pretrained(tmp_path)
    save_tokenizer(student, tmp_path)
    loaded, reloaded = load_tokenizer(tmp_path), transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert len(loaded) == reloaded.config.vocab_size == vocabulary.size
    assert loaded.pad_token_id == reloaded.config.pad_token_id
    kept_words = [TOKENS[i] for i in vocabulary.kept_ids if i >= 6]
    text = " ".join(word.removeprefix("##") for word in kept_words[:12])
    expected = logits_of(model, torch.tensor(tokenizer([text])["input_ids"]))
    actual = logits_of(reloaded.eval(), torch.tensor(loaded([text])["input_ids"]))
    assert torch.allclose(actual, expected[..., torch.tensor(vocabulary.kept_ids)], atol=1e-6)


@pytest.mark.slow
@pytest.mark.real
def test_a_real_masked_lm_keeps_its_predictions_with_half_of_its_vocabulary(shared, tmp_path):
    folder = str(shared / "models/minilm-l6-mlm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for name in ("wikitext2_valid", "state_union"):
        lines = (shared / f"data/corpus/{name}.txt").read_text().splitlines()
        for row in tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]:
            np.add.at(counts, row, 1)
    embeddings = model.get_input_embeddings().weight
    words = ["yes", "no", "maybe", "true", "false"]
    vocabulary = build_vocabulary(tokenizer, embeddings, counts, keep_ratio=0.5, keep_words=words)
    assert vocabulary.size == 15296, "half of 30,522, rounded up to 64"
    assert vocabulary.coverage > 0.97
    special = vocabulary.token_map[tokenizer.all_special_ids]
    assert vocabulary.kept_ids[special].tolist() == tokenizer.all_special_ids
    quarter = choose_kept_ids(counts, must_keep_ids(tokenizer), keep_ratio=0.25)
    assert 0.9 < counts[quarter].sum() / counts.sum() < vocabulary.coverage

    sliced = slice_model(model, vocabulary)
    assert sliced.num_parameters() == model.num_parameters() - (30522 - 15296) * (384 + 1)
    sentence = "He opened the [MASK] and walked into the room."
    source_ids = torch.tensor(tokenizer([sentence])["input_ids"])
    student = compress_tokenizer(tokenizer, vocabulary)
    student_ids = torch.tensor(student([sentence])["input_ids"])
    expected = logits_of(model, source_ids)[..., torch.tensor(vocabulary.kept_ids)]
    assert torch.allclose(logits_of(sliced, student_ids), expected, atol=1e-4)
    best = int(logits_of(sliced, student_ids)[0, student_ids[0].tolist().index(student.mask_token_id)].argmax())
    source_best = int(logits_of(model, source_ids)[0, source_ids[0].tolist().index(103)].argmax())
    assert student.convert_ids_to_tokens(best) == tokenizer.convert_ids_to_tokens(source_best)
    save_tokenizer(student, tmp_path)
    tests = (shared / "data/corpus/inaugural.txt").read_text().splitlines()[:200]
    loaded = load_tokenizer(tmp_path)
    expected_ids = [vocabulary.token_map[row].tolist() for row in tokenizer(tests, verbose=False)["input_ids"]]
    assert loaded(tests, verbose=False)["input_ids"] == expected_ids


# Merged tokens


def test_a_merged_token_is_kept_with_all_its_parts_or_passed_over():
    """0-4 are letters, 5 = 0+1, 6 = 5+2, 7 = 3+4; 6 is the most frequent and needs 5."""
    parts = {5: (0, 1), 6: (5, 2), 7: (3, 4)}
    counts = np.array([9, 9, 9, 9, 9, 0, 50, 40])
    letters = range(5)
    assert choose_kept_ids(counts, letters, size=7, parts=parts).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert choose_kept_ids(counts, letters, size=6, parts=parts).tolist() == [0, 1, 2, 3, 4, 7], "6 does not fit"
    assert choose_kept_ids(counts, letters, size=7).tolist() == [0, 1, 2, 3, 4, 6, 7], "by count alone"
    with pytest.raises(ModelError, match=r"4 of 8 tokens would be kept, but 5 must be .*all they are merged from"):
        choose_kept_ids(counts, {6}, size=4, parts=parts)
    assert choose_kept_ids(counts, {6}, size=5, parts=parts).tolist() == [0, 1, 2, 5, 6]


@settings(deadline=None)
@given(data=st.data())
def test_a_closed_selection_is_closed_and_of_the_size_asked_for(data):
    size = data.draw(st.integers(4, 30))
    # Parts have smaller ids, as merges build on what is there; a few tokens have none.
    ids = st.integers(0, size - 1)
    parts = {i: (data.draw(st.integers(0, i - 1)), data.draw(st.integers(0, i - 1))) for i in range(3, size) if i % 4}
    counts = np.array(data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)))
    must = {data.draw(ids)}
    wanted = data.draw(st.integers(_closed_size(must, parts), size))
    kept = set(choose_kept_ids(counts, must, size=wanted, parts=parts).tolist())
    assert len(kept) == wanted and must <= kept
    assert all(part in kept for i in kept for part in parts.get(i, ()))


def _closed_size(ids: set[int], parts: dict[int, tuple[int, int]]) -> int:
    found, to_visit = set(), list(ids)
    while to_visit:
        i = to_visit.pop()
        found.add(i)
        to_visit += [part for part in parts.get(i, ()) if part not in found]
    return len(found)


def test_a_selection_that_does_nothing_or_is_unknown_is_refused(tokenizer):
    with pytest.raises(ModelError, match="selection free has no effect: tokens of WordPiece are not merged; remove it"):
        parts_to_keep(tokenizer, "free")
    with pytest.raises(ModelError, match="selection must be one of closed, free, got 'fre'"):
        parts_to_keep(tokenizer, "fre")
    assert parts_to_keep(tokenizer, "closed") == {}


def test_bytes_are_told_by_the_tokenizers_own_alphabet():
    from families import FAMILIES
    from tokenizers.pre_tokenizers import ByteLevel

    gpt2, llama2, xlm_r = (FAMILIES[name]() for name in ("gpt2", "llama2", "xlm-r"))
    letters = {gpt2.convert_ids_to_tokens(i): byte for i, byte in byte_ids(gpt2).items()}
    assert set(letters) == set(ByteLevel.alphabet()) and sorted(letters.values()) == list(range(256))
    # A character beyond ASCII is cut into the letters of its bytes.
    for character in "é猫 \n":
        spelled = "".join(piece for piece, _ in ByteLevel(False, use_regex=False).pre_tokenize_str(character))
        assert bytes(letters[letter] for letter in spelled) == character.encode()
    assert byte_ids(llama2) == {3 + byte: byte for byte in range(256)}
    assert byte_ids(xlm_r) == {}


@given(st.integers(1, 3000), st.data())
def test_the_ratio_that_a_refusal_names_is_not_refused_again(size, data):
    required = range(data.draw(st.integers(1, size)))
    counts = np.zeros(size, dtype=int)
    try:
        choose_kept_ids(counts, required, keep_ratio=0.0001)
    except ModelError as error:
        if "raise keep_ratio to at least" in str(error):
            named = float(str(error).rpartition(" ")[2])
            assert len(choose_kept_ids(counts, required, keep_ratio=named)) >= len(required)


@pytest.mark.parametrize(
    ("name", "config", "field"),
    [
        ("MarianMTModel", ("MarianConfig", {**BART, "vocab_size": 40, "decoder_vocab_size": 40,
                                            "share_encoder_decoder_embeddings": False}), "decoder_vocab_size"),
        ("Gemma3nForCausalLM", ("Gemma3nTextConfig", {"vocab_size": 60, "vocab_size_per_layer_input": 40}),
         "vocab_size_per_layer_input"),
    ],
)  # fmt: skip
def test_a_second_table_of_tokens_is_refused_by_name(name, config, field):
    import transformers

    made = getattr(transformers, config[0])(**config[1])
    with pytest.raises(ModelError, match=rf"{field} = 40 is a second table of tokens"):
        vocabulary_axes(made, getattr(transformers, name))


def test_a_model_that_follows_token_ids_otherwise_is_found_by_its_output():
    import torch

    from glmd.models.export import prove_slice

    class Odd(transformers.BertForMaskedLM):
        """Adds a table of its own, as long as it was when it was made."""

        def __init__(self, config):
            super().__init__(config)
            self.table = torch.nn.Embedding(V, config.hidden_size)

        def forward(self, input_ids=None, **rest):
            outputs = super().forward(input_ids=input_ids, **rest)
            return (outputs[0] + self.table(input_ids).sum(-1, keepdim=True),)

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    kept = np.setdiff1d(np.arange(V), [30, 31, 32])
    token_map = np.zeros(V, dtype=int)
    token_map[kept] = np.arange(len(kept))
    for model_class in (transformers.BertForMaskedLM, Odd):
        source = model_class(config).eval()
        student = slice_model(source, Vocabulary(kept, token_map))
        if model_class is Odd:
            with pytest.raises(ModelError, match="Odd: its output differs with another vocabulary"):
                prove_slice(source, student, torch.from_numpy(kept))
        else:
            prove_slice(source, student, torch.from_numpy(kept))
