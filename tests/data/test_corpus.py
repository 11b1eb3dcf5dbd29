"""Documents from every kind of source, and the token store: exact, reused, rebuilt, refused."""

import json
import logging
import os
import pickle
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from glmd.data import corpus, token_store
from glmd.data.corpus import corpus_fingerprint, read_documents, require_corpus
from glmd.data.encoding import encode_texts
from glmd.data.token_store import build_token_store, open_token_store
from glmd.errors import DataError, ModelError, RunError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "mask", "oak", "elm", "ash", "fir", "yew"]


def make_tokenizer(words=WORDS, **special):
    """One word, one id, so that a test can write the ids down by hand."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = special or {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_max_length=8, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def trees(tmp_path) -> str:
    path = tmp_path / "trees.txt"
    path.write_text("oak elm\nash\n\nfir\n\nyew oak")
    return str(path)


TREES = [8, 9, 10, 3, 11, 3, 12, 8]


def refusal(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def documents(*sources, **options) -> list[str]:
    return list(read_documents([str(source) for source in sources], **options))


# Documents


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_blank_line_ends_a_document_whatever_the_line_ends(tmp_path, end, bom):
    lines = ["", "first paragraph", "  second, indented", "", "   ", "next\u2028document \u00e9", "", ""]
    (tmp_path / "a.txt").write_bytes(bom + end.join(lines).encode())
    assert documents(tmp_path / "a.txt") == [
        "first paragraph\n  second, indented",
        "next\u2028document \u00e9",
    ]


def test_a_folder_is_its_text_files_by_name(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "C.TXT").write_text("zero")
    (tmp_path / "notes.md").write_text("not text of the corpus")
    (tmp_path / "._b.txt").write_bytes(b"\x00\xff")
    (tmp_path / "inner.txt").mkdir()
    assert documents(tmp_path) == ["zero", "one", "two"]
    assert documents(tmp_path / "b.txt", tmp_path / "a.jsonl") == ["two", "one"]


def test_a_document_of_a_row_stands_in_the_field_that_was_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one\\ntwo", "id": 3}\n')
    assert documents(path, text_field="body") == ["one\ntwo"]
    message = refusal(DataError, documents, path, text_field="boddy")
    assert message == f"{path}:1: field 'boddy' is missing; did you mean body?"
    message = refusal(DataError, documents, path, text_field="id")
    assert message == f"{path}:1: field 'id' must be text, got 3"


def test_a_file_without_blank_lines_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_CHARACTERS", 1_000_000)
    path = tmp_path / "a.txt"
    path.write_text(("x" * 99 + "\n") * 10_000)
    assert len(documents(path)[0]) == 999_999
    path.write_text(("x" * 99 + "\n") * 10_001)
    message = refusal(DataError, documents, path)
    assert message.startswith(f"{path}:10001: the document is longer than 1 million characters; put a blank line")


@pytest.mark.parametrize(
    "source",
    [
        "./none",
        "none.txt",
        "none.jsonl",
        "data/none",
        "owner/name",
        "/none",
        "a/b/c",
        "a\\b",
        "~none",
        "",
        " ",
    ],
)
def test_a_path_that_does_not_exist_is_named_and_never_looked_up(source, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    message = refusal(DataError, read_documents, [source])
    assert message.startswith(f"{source if source.strip() else repr(source)}: no such file or folder")
    assert ("write owner/name:config" in message) == (source in ("data/none", "owner/name"))


def test_sources_are_checked_before_the_first_document(trees, tmp_path):
    refusal(DataError, read_documents, [trees, str(tmp_path / "none.txt")])
    (tmp_path / "a.pdf").write_text("x")
    assert "ends in .txt, .jsonl or .parquet" in refusal(DataError, read_documents, [str(tmp_path / "a.pdf")])
    (tmp_path / "empty").mkdir()
    assert "holds no .txt, .jsonl or .parquet file" in refusal(DataError, read_documents, [str(tmp_path / "empty")])
    assert "a list of files" in refusal(DataError, read_documents, trees)
    assert "a list of files" in refusal(DataError, read_documents, [])


@pytest.mark.parametrize("content", [b"", b"\r\n \n", b"\xef\xbb\xbf"])
def test_a_text_file_without_text_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert refusal(DataError, documents, tmp_path / "a.txt").endswith("a.txt: the file holds no text")


def test_text_that_is_not_utf8_is_named_by_its_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"oak\n\n\xff")
    assert "a.txt:3: not UTF-8 at byte 5" in refusal(DataError, documents, tmp_path / "a.txt")


# The hub


@pytest.mark.parametrize(
    ("source", "name", "config"),
    [
        ("trees", "trees", None),
        ("trees:default", "trees", "default"),
        ("forest/trees:2023-11.en", "forest/trees", "2023-11.en"),
        ("forest/trees.v2:default", "forest/trees.v2", "default"),
    ],
)
def test_a_hub_data_set_is_streamed_by_name_and_config(source, name, config, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{"text": "oak"}])
    assert documents(source) == ["oak"]
    assert asked == [((name, config), {"split": "train", "streaming": True})]


def test_rows_of_a_data_set_stream_through_the_datasets_library(tmp_path):
    import datasets

    (tmp_path / "forest").mkdir()
    datasets.Dataset.from_dict({"text": ["oak", "elm", None]}).to_parquet(str(tmp_path / "forest" / "train.parquet"))
    rows = corpus._read_hub(str(tmp_path / "forest"), None)
    stream = (corpus._text_of(row, "text", where) for where, row in rows)
    assert [next(stream), next(stream)] == ["oak", "elm"]
    assert refusal(DataError, next, stream).endswith("forest row 3: field 'text' must be text, got None")


def test_rows_of_a_parquet_file_are_documents(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["oak", "elm", None]}).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "b.txt").write_text("ash")
    stream = read_documents([str(tmp_path)])
    assert [next(stream), next(stream)] == ["oak", "elm"]
    assert refusal(DataError, next, stream).endswith("a.parquet row 3: field 'text' must be text, got None")


def test_without_a_network_a_hub_data_set_is_refused_with_the_local_way():
    message = refusal(DataError, documents, "nobody/nothing:default")
    assert message.startswith("nobody/nothing:default: no such file or folder, and the hub gave no data set")
    assert message.endswith("give a .txt, .jsonl or .parquet file, or a folder of them")


# The store


def test_the_store_is_every_document_with_a_separator_between(tmp_path, trees, tokenizer):
    store = build_token_store(tmp_path / "store", [trees], tokenizer)
    assert store.tokens.tolist() == TREES
    assert not store.tokens.flags.writeable
    assert store.num_tokens == 8
    assert store.manifest["num_documents"] == 3
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["manifest.json", "tokens.bin"]
    assert open_token_store(tmp_path / "store").tokens.tolist() == TREES


def test_windows_line_ends_give_the_same_tokens(tmp_path, trees, tokenizer):
    windows = tmp_path / "windows.txt"
    windows.write_bytes(Path(trees).read_bytes().replace(b"\n", b"\r\n"))
    store = build_token_store(tmp_path / "store", [str(windows)], tokenizer)
    assert store.tokens.tolist() == TREES


@pytest.mark.parametrize("block_length", [1, 3, 4, 8, 9])
def test_blocks_laid_end_to_end_are_the_store(tmp_path, trees, tokenizer, block_length):
    store = build_token_store(tmp_path / "store", [trees], tokenizer)
    blocks = [store.block(i, block_length) for i in range(store.num_blocks(block_length))]
    assert np.concatenate(blocks).tolist() == TREES
    assert all(len(block) == block_length for block in blocks[:-1])
    assert 0 < len(blocks[-1]) <= block_length
    assert blocks[0].dtype == np.int64
    for index in (-1, len(blocks)):
        with pytest.raises(IndexError):
            store.block(index, block_length)


def test_many_documents_keep_their_order_over_batches(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    rows = [[WORDS[i] for i in rng.integers(8, 13, rng.integers(0, 9))] for _ in range(2500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in rows))
    store = build_token_store(tmp_path / "store", [str(tmp_path / "a.jsonl")], tokenizer)
    expected: list[int] = []
    for row in filter(None, rows):
        expected += ([3] if expected else []) + [WORDS.index(word) for word in row]
    assert store.tokens.tolist() == expected
    assert store.manifest["num_empty_documents"] == sum(not row for row in rows) > 0
    assert store.manifest["num_documents"] == sum(map(bool, rows))
    assert store.counts(13).tolist() == np.bincount(expected, minlength=13).tolist()


def test_batches_are_cut_by_text_and_by_number():
    texts = ["a" * n for n in (5, 5, 1, 1, 1, 1, 30, 2)]
    sizes = [[len(text) for text in batch] for batch in token_store._batches(texts, characters=10, length=3)]
    assert sizes == [[5, 5], [1, 1, 1], [1, 30], [2]]


def test_weights_are_the_shares_of_the_sources_whatever_their_sizes(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    sources, own = [], []
    for name, size, words in (("a", 4000, range(8, 13)), ("b", 300, range(5, 9)), ("empty", 0, ())):
        ids = rng.choice(list(words), size) if size else []
        rows = [" ".join(WORDS[i] for i in part) for part in np.array_split(ids, 50)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        sources.append(str(tmp_path / f"{name}.jsonl"))
        own.append(np.bincount(ids, minlength=13) if size else np.zeros(13))
    store = build_token_store(tmp_path / "store", sources, tokenizer)
    assert store.manifest["source_ends"] == [4049, 4399, 4399]
    counts = store.counts(13, weights=[1, 3, 7])
    words = counts.copy()
    words[3] = 0  # the separators
    shares = [each / max(1, each.sum()) for each in own]
    expected = (1 * shares[0] + 3 * shares[1]) / 4
    assert np.allclose(words / words.sum(), expected, atol=0.01)
    assert abs(counts.sum() - store.num_tokens * 4 / 11) < 20, "an empty source has its share and no tokens"
    tiny = store.counts(13, weights=[1e9, 1, 1])
    assert (tiny[5:8] == 1).all(), "what is seen counts"
    assert np.array_equal(store.counts(13), np.bincount(store.tokens, minlength=13))


def test_counts_refuse_a_vocabulary_that_is_too_small(tmp_path, trees, tokenizer):
    store = build_token_store(tmp_path / "store", [trees], tokenizer)
    assert store.counts(14)[13] == 0
    assert "holds token 12, but the vocabulary has 12" in refusal(DataError, store.counts, 12)


def test_special_words_in_the_text_are_only_words(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("oak [MASK] elm")
    store = build_token_store(tmp_path / "store", [str(tmp_path / "a.txt")], tokenizer)
    assert store.tokens.tolist() == [8, 5, 7, 6, 9]
    assert tokenizer("oak [MASK] elm")["input_ids"] == [8, 4, 9]  # and the tokenizer is as it was


@pytest.mark.parametrize(("num_words", "dtype"), [(2**16, "uint16"), (2**16 + 1, "int32")])
def test_ids_take_two_bytes_while_they_fit(tmp_path, num_words, dtype):
    words = ["[UNK]", "[SEP]", *(f"w{i}" for i in range(2, num_words))]
    (tmp_path / "a.txt").write_text(f"w2 {words[-1]}")
    store = build_token_store(tmp_path / "store", [str(tmp_path / "a.txt")], make_tokenizer(words, sep_token="[SEP]"))
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [2, num_words - 1]
    assert store.counts(num_words)[-1] == 1


def test_the_end_of_sequence_separates_where_there_is_no_sep_token(tmp_path, trees):
    causal = make_tokenizer(eos_token="[CLS]")
    assert build_token_store(tmp_path / "store", [trees], causal).tokens.tolist()[3] == 2
    neither = make_tokenizer(pad_token="[PAD]")
    assert "neither a sep_token nor an eos_token" in refusal(
        ModelError, build_token_store, tmp_path / "other", [trees], neither
    )


def test_a_corpus_without_a_word_is_refused_and_leaves_nothing(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": ""}\n{"text": " \\n"}\n')
    message = refusal(DataError, build_token_store, tmp_path / "store", [str(source)], tokenizer)
    assert message == f"{source}: no text in 2 documents"
    assert list((tmp_path / "store").iterdir()) == []


def test_a_bad_row_far_into_the_corpus_leaves_nothing(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "oak"}\n' * 1500 + '{"text": "oa')
    assert "a.jsonl:1501:" in refusal(DataError, build_token_store, tmp_path / "store", [str(source)], tokenizer)
    assert list((tmp_path / "store").iterdir()) == []


def test_nothing_is_printed_unless_stderr_is_a_terminal(tmp_path, trees, capfd):
    tokenizer = make_tokenizer()
    Path(trees).write_text("oak " * 20)  # longer than the model's input, of which transformers would warn
    build_token_store(tmp_path / "store", [trees], tokenizer)
    assert capfd.readouterr() == ("", "")
    assert tokenizer.model_max_length < 20
    assert not tokenizer.deprecation_warnings


def test_a_pickled_store_holds_its_place_and_no_tokens(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("oak " * 50_000)
    store = build_token_store(tmp_path / "store", [str(tmp_path / "a.txt")], tokenizer)
    assert store.tokens.nbytes == 100_000
    copied = pickle.dumps(store)
    assert len(copied) < 2000
    assert np.array_equal(pickle.loads(copied).tokens, store.tokens)


# Reuse, refusal, rebuilding


def test_a_store_of_the_same_origin_is_reused(tmp_path, trees, tokenizer, monkeypatch):
    build_token_store(tmp_path / "store", [trees], tokenizer)
    moved = tmp_path / "elsewhere" / "trees.txt"
    moved.parent.mkdir()
    Path(trees).rename(moved)
    tokenizer("oak elm", truncation=True, max_length=1)  # leaves a trace in the tokenizer that is none of ours
    monkeypatch.setattr(token_store, "_write_store", lambda *_: pytest.fail("tokenized again"))
    assert build_token_store(tmp_path / "store", [str(moved)], make_tokenizer()).tokens.tolist() == TREES


def test_a_store_of_another_origin_is_refused_by_what_differs_and_kept(tmp_path, trees, tokenizer):
    folder = tmp_path / "store"
    build_token_store(folder, [trees], tokenizer)
    other = tmp_path / "other.txt"
    other.write_text("ash")
    build = build_token_store
    swapped = make_tokenizer([*WORDS[:-2], WORDS[-1], WORDS[-2]])
    assert "made from another tokenizer;" in refusal(RunError, build, folder, [trees], swapped)
    cased = make_tokenizer()
    cased.backend_tokenizer.normalizer = None
    assert "made from another tokenizer;" in refusal(RunError, build, folder, [trees], cased)
    message = refusal(RunError, build, folder, [trees], tokenizer, text_field="body")
    assert "made from another text_field ('text', now 'body')" in message
    assert "corpus (trees.txt, now other.txt)" in refusal(RunError, build, folder, [str(other)], tokenizer)
    assert "corpus (nothing, now other.txt)" in refusal(RunError, build, folder, [trees, str(other)], tokenizer)
    Path(trees).write_text("fir" + Path(trees).read_text()[3:])  # same size
    assert "corpus (trees.txt changed)" in refusal(RunError, build, folder, [trees], tokenizer)
    assert open_token_store(folder).tokens.tolist() == TREES


def test_the_fingerprint_is_of_names_sizes_and_contents(tmp_path, trees):
    import hashlib

    content = Path(trees).read_bytes()
    expected = {"name": "trees.txt", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert corpus_fingerprint([trees, "forest/trees:default"]) == {
        "sources": [expected, {"hub": "forest/trees:default"}]
    }
    assert corpus_fingerprint([str(tmp_path)]) == {"sources": [expected]}


DAMAGES = {
    "cut short": lambda folder: (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2]),
    "flipped byte": lambda folder: (folder / "tokens.bin").write_bytes(
        b"\x09" + (folder / "tokens.bin").read_bytes()[1:]
    ),
    "no tokens": lambda folder: (folder / "tokens.bin").unlink(),
    "garbage manifest": lambda folder: (folder / "manifest.json").write_bytes(b"\x00\xff"),
    "empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "list manifest": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"version": 2, "num_tokens": 8}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_built_again_with_a_warning(tmp_path, trees, tokenizer, damage, caplog):
    folder = tmp_path / "store"
    build_token_store(folder, [trees], tokenizer)
    DAMAGES[damage](folder)
    if damage != "flipped byte":  # only the sha256 tells, which opening does not compute
        assert str(folder) in refusal(RunError, open_token_store, folder)
    with caplog.at_level(logging.WARNING, logger="glmd"):
        store = build_token_store(folder, [trees], tokenizer)
    assert "building it again" in caplog.text
    assert store.tokens.tolist() == open_token_store(folder).tokens.tolist() == TREES


def test_a_store_of_another_version_is_refused(tmp_path, trees, tokenizer):
    folder = tmp_path / "store"
    build_token_store(folder, [trees], tokenizer)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "has version 99, not 2" in refusal(RunError, open_token_store, folder)
    assert "has version 99, not 2" in refusal(RunError, build_token_store, folder, [trees], tokenizer)


def test_where_there_is_no_store_opening_says_so(tmp_path):
    assert "holds no finished token store" in refusal(RunError, open_token_store, tmp_path)
    assert "holds no finished token store" in refusal(RunError, open_token_store, tmp_path / "none")


def in_a_child(action) -> int:
    """Run the action in a forked process; the wait status."""
    process = os.fork()
    if process == 0:
        try:
            action()
        except RunError as error:
            os._exit(40 if "cannot be written" in str(error) else 41)
        except BaseException:
            os._exit(42)
        os._exit(0)
    return os.waitpid(process, 0)[1]


@pytest.mark.parametrize("over_a_damaged_one", [False, True])
@pytest.mark.parametrize("point", ["in a batch", "before tokens.bin", "before manifest.json", "after"])
def test_a_build_killed_anywhere_leaves_no_store_or_the_whole_one(tmp_path, tokenizer, point, over_a_damaged_one):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "oak elm"}\n' * 2500)
    folder = tmp_path / "store"
    if over_a_damaged_one:  # whose manifest must not vouch for what comes after it
        build_token_store(folder, [str(source)], tokenizer)
        DAMAGES["flipped byte"](folder)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_build():
        replace, calls = os.replace, []

        def counted(old, new):
            calls.append(new)
            if point == f"before {Path(new).name}":
                die()
            replace(old, new)

        os.replace = counted
        if point == "in a batch":
            encode = token_store.encode_texts
            die_late = lambda t, texts: calls.append(0) or (die() if len(calls) == 3 else encode(t, texts))  # noqa: E731
            token_store.encode_texts = die_late
        build_token_store(folder, [str(source)], tokenizer)
        die()

    status = in_a_child(killed_build)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    if point == "after":
        open_token_store(folder)
    else:
        refusal(RunError, open_token_store, folder)
        assert any(path.suffix == ".tmp" for path in folder.iterdir())
    store = build_token_store(folder, [str(source)], tokenizer)
    assert store.tokens.tolist() == ([8, 9, 3] * 2500)[:-1]
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "tokens.bin"]


def test_a_full_disk_is_a_refusal_and_leaves_nothing(tmp_path, tokenizer):
    source = tmp_path / "a.txt"
    source.write_text("oak " * 100_000)
    folder = tmp_path / "store"

    def build_with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        build_token_store(folder, [str(source)], tokenizer)

    status = in_a_child(build_with_little_room)
    assert os.WEXITSTATUS(status) == 40
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "store"])
def test_a_folder_that_cannot_be_made_is_a_refusal(tmp_path, trees, tokenizer, inside):
    file = tmp_path / "file"
    file.write_text("mine")
    message = refusal(RunError, build_token_store, file / inside, [trees], tokenizer)
    assert message.startswith(f"{file / inside}: the token store cannot be written (")
    assert file.read_text() == "mine"


@pytest.mark.real
def test_a_real_corpus_has_as_many_bert_tokens_as_documented(shared, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "minilm-l6-mlm")
    store = build_token_store(tmp_path, [str(shared / "data" / "corpus" / "inaugural.txt")], tokenizer)
    assert store.manifest["num_documents"] == 59
    counts = store.counts(len(tokenizer))
    assert counts[tokenizer.sep_token_id] == 58
    assert counts.sum() - 58 == 161_642


# What a run would refuse at its start is refused before


CORPUS_FAULTS = [
    ("absent", "no such file or folder, and the hub gave no data set"),
    ("absent.txt", "no such file or folder"),
    ("loop.txt", "is a link to loop.txt, where nothing can be read"),
    ("loop", "is a link to loop, where nothing can be read"),
    ("gone.jsonl", "is a link to nowhere, where nothing can be read"),
    ("linked", "gone.txt: is a link to nowhere, where nothing can be read"),
    ("empty", "the folder holds no .txt, .jsonl or .parquet file; it holds nothing"),
    ("packed", "the folder holds no .txt, .jsonl or .parquet file; it holds a.txt.gz, deep/"),
    ("blank", "a.txt: the file holds no text"),
    ("a.txt.gz", "a corpus file ends in .txt, .jsonl or .parquet, not in .gz"),
    ("a.parquet", "a.parquet: cannot be read as Parquet"),
    ("a.jsonl", "a.jsonl:1: field 'text' is missing; known: body"),
    ("some.jsonl", "some.jsonl:3: field 'text' is missing; did you mean txt?"),
    ("null.jsonl", "null.jsonl:1: field 'text' must be text, got None"),
    ("hollow.jsonl", "no text in any document"),
    ("broken.jsonl", "broken.jsonl:2: not valid JSON"),
    ("bits.txt", "bits.txt:1: not UTF-8 at byte 1"),
    ("wide.txt", "wide.txt:1: holds a NUL byte and is no text"),
    ("pipe.txt", "is neither a file nor a folder"),
]


@pytest.fixture
def faults(tmp_path, monkeypatch) -> Path:
    """Every kind of corpus that cannot be read, by the names of CORPUS_FAULTS."""
    monkeypatch.chdir(tmp_path)
    for name, target in {"loop.txt": "loop.txt", "loop": "loop", "gone.jsonl": "nowhere"}.items():
        os.symlink(target, name)
    for folder in ("empty", "packed/deep", "blank", "linked"):
        Path(folder).mkdir(parents=True)
    os.symlink("nowhere", "linked/gone.txt")
    Path("linked/a.txt").write_text("oak")
    Path("blank/a.txt").write_text("\n \n")
    for name in ("packed/a.txt.gz", "a.txt.gz", "bits.txt"):
        Path(name).write_bytes(b"\x1f\x8b\x08\x00")
    Path("a.parquet").write_bytes(b"PAR1")
    Path("a.jsonl").write_text('{"body": "oak"}\n')
    Path("some.jsonl").write_text('{"text": "oak"}\n{"text": ""}\n{"txt": "elm"}\n')
    Path("null.jsonl").write_text('{"text": null}\n')
    Path("hollow.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    Path("broken.jsonl").write_text('{"text": "oak"}\n{"text": \n')
    Path("wide.txt").write_bytes("oak\n".encode("utf-16-le"))
    os.mkfifo("pipe.txt")
    return tmp_path


@pytest.mark.parametrize(("source", "says"), CORPUS_FAULTS)
def test_a_corpus_that_cannot_be_read_is_refused_by_its_beginning(faults, tmp_path, trees, source, says):
    message = refusal(DataError, require_corpus, [trees, source] if source != "hollow.jsonl" else [source], "text")
    assert says in message and source in message


def test_a_corpus_is_looked_at_and_not_read_through(tmp_path, monkeypatch):
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "oak"}\n' * 30 + "{\n")
    monkeypatch.setattr(corpus, "PEEK_DOCUMENTS", 20)
    require_corpus([str(path)], "text")
    monkeypatch.setattr(corpus, "PEEK_DOCUMENTS", 40)
    assert "long.jsonl:31" in refusal(DataError, require_corpus, [str(path)], "text")
    monkeypatch.setattr(corpus, "PEEK_CHARACTERS", 60)
    require_corpus([str(path)], "text")


def test_a_run_that_has_its_tokens_goes_on_without_the_hub(tmp_path):
    require = ["owner/name:default"], "text"
    assert "the hub gave no data set" in refusal(DataError, require_corpus, *require, store=tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    require_corpus(*require, store=tmp_path)


def test_a_blank_file_beside_text_and_no_corpus_at_all_are_fine(tmp_path, trees):
    (tmp_path / "hollow.jsonl").write_text('{"text": ""}\n')
    require_corpus([trees, str(tmp_path / "hollow.jsonl")], "text")
    require_corpus([], "text")
    assert "a list of files" in refusal(DataError, require_corpus, [], "body")


@pytest.mark.parametrize("command", ["check", "run", "vocab", "compress"])
@pytest.mark.parametrize("source", ["absent", "loop", "blank", "a.jsonl", "bits.txt"])
def test_every_command_refuses_it_in_one_line_before_anything_is_written(faults, tiny, capsys, command, source):
    from glmd.cli import main

    arguments = {
        "check": [str(tiny.root / "run.yaml"), f"data.corpus=[{source}]", "output_dir=out"],
        "run": [str(tiny.root / "run.yaml"), f"data.corpus=[{source}]", "output_dir=out"],
        "vocab": [source, "--teacher", str(tiny.teacher)],
        "compress": [str(tiny.teacher), "out", "--corpus", source, "--keep-ratio", "0.6"],
    }
    assert main([command, *arguments[command]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert source in lines[-1] and not list(Path().glob("out/*/*"))


def test_texts_are_cut_as_the_tokenizer_itself_cuts_them_whatever_was_asked_of_it_before(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    texts = ["[MASK] abcd [SEP]", "", "größe \u6771\u4eac", "abcd " * 100]
    plainly = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    tokenizer(texts, truncation=True, padding="max_length", max_length=7)
    assert token_store.encode_texts(tokenizer, texts) == plainly

    class Own(type(tokenizer)):
        """With code of its own between a text and its tokens."""

        def _encode_plus(self, *given, **options):
            encoded = super()._encode_plus(*given, **options)
            return encoded | {"input_ids": [ids[::-1] for ids in encoded["input_ids"]]}

    own = Own.from_pretrained(tiny.teacher)
    assert token_store.encode_texts(own, texts) == [ids[::-1] for ids in plainly]


def test_a_text_that_spells_a_token_of_t5_means_no_token():
    """Its model has sentinels and ends as pieces of its own, so letters cannot be told from them: they are unknown."""
    tokenizer = FAMILIES["t5"]()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] += [["<extra_id_0>", 0.0]]
    spelled = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )
    (ids,) = encode_texts(spelled, ["the cat </s> sang"])
    assert spelled.eos_token_id not in ids and spelled.unk_token_id in ids
    spelled.add_tokens(["sang"])  # which is a word, and no special token
    assert encode_texts(spelled, ["the cat sang"])[0][-1] == spelled.convert_tokens_to_ids("sang")
    assert encode_texts(spelled, ["the cat sang"]) == [spelled("the cat sang", add_special_tokens=False)["input_ids"]]
