"""A corpus as tokens on disk: tokenized once, kept as one memory-mapped row of ids."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glmd.data.corpus import _sha256, corpus_fingerprint, read_documents
from glmd.errors import DataError, DiskError, ModelError, RunError
from glmd.storage import link_files, write_atomically

logger = logging.getLogger(__name__)


STORE_VERSION = 2


def reading_fingerprint(tokenizer: Any) -> str:
    """sha256 of every token with its id, and of how probes are cut (case, accents, white space, merges).

    Not of the tokenizer's files: truncation settings and library versions change those and no token.
    """
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    # Its own words, because a small closed vocabulary cuts every foreign text to unknown tokens alike.
    own = " ".join(word for word, _ in words[:: -(-len(words) // 1000)])
    foreign = "Größe naïve ÀÉ don't 3.14 CamelCase  two\tspaces\nnew line 東京 привет \U0001f600 unhappily re-doing"
    probes = encode_texts(tokenizer, [own, own.lower(), own.upper(), foreign])
    return hashlib.sha256(json.dumps([words, probes]).encode()).hexdigest()


class TokenStore:
    """The ids of a corpus on disk: documents one after another, a separator between two.

    Reads are memory-mapped; a pickled store holds only its place, so loader workers copy no tokens.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    @property
    def num_tokens(self) -> int:
        """Ids in the store, separators included."""
        return int(self.manifest["num_tokens"])

    @cached_property
    def tokens(self) -> np.memmap:
        """(num_tokens,) source ids, uint16 or int32, read-only."""
        return np.memmap(self.folder / "tokens.bin", dtype=_dtype(self.manifest), mode="r")

    def num_blocks(self, block_length: int) -> int:
        """Blocks of `block_length` consecutive ids; a shorter last one counts."""
        if block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {block_length}")
        return -(-self.num_tokens // block_length)

    def block(self, index: int, block_length: int) -> np.ndarray:
        """(block_length,) int64 source ids; the last block may be shorter."""
        if not 0 <= index < self.num_blocks(block_length):
            raise IndexError(f"block {index} of {self.num_blocks(block_length)}")
        return self.tokens[index * block_length : (index + 1) * block_length].astype(np.int64)

    def counts(self, vocab_size: int, *, weights: Sequence[float] = ()) -> np.ndarray:
        """(V,) int64: how often each id stands in the store, separators included.

        weights: one for each source, its share of the count whatever its size; the counts still add up to about the
            tokens there are, and an id that is seen counts at least once.
        """
        if not weights:
            return self._counts(0, self.num_tokens, vocab_size)
        ends: list[int] = self.manifest["source_ends"]
        if len(weights) != len(ends):
            raise ValueError(f"{len(weights)} weights for {len(ends)} sources")
        counts = np.zeros(vocab_size)
        for weight, start, end in zip(weights, [0, *ends], ends, strict=False):
            own = self._counts(start, end, vocab_size)
            counts += own * (weight / sum(weights) * self.num_tokens / max(1, end - start))
        return np.maximum(counts.round(), counts > 0).astype(np.int64)

    def _counts(self, first: int, stop: int, vocab_size: int) -> np.ndarray:
        counts = np.zeros(vocab_size, dtype=np.int64)
        step = 1 << 22  # bincount makes int64 of what it is given: 32 MB at a time
        for start in range(first, stop, step):
            chunk = np.bincount(self.tokens[start : min(start + step, stop)], minlength=vocab_size)
            if len(chunk) > vocab_size:
                raise DataError(
                    f"{self.folder}: holds token {len(chunk) - 1}, but the vocabulary has {vocab_size}; "
                    "the tokenizer and the model do not belong together"
                )
            counts += chunk
        return counts


def open_token_store(folder: str | Path) -> TokenStore:
    """Open a finished store. Raises RunError if there is none, or its files are not whole."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _NoWholeStore(f"{folder}: holds no finished token store") from None
    except (OSError, ValueError) as error:
        raise _NoWholeStore(f"{path}: cannot be read ({error})") from None
    try:
        if manifest["version"] != STORE_VERSION:
            raise RunError(
                f"{folder}: the token store has version {manifest['version']}, not {STORE_VERSION}; "
                "delete the folder to build it again"
            )
        missing = {"num_documents", "sha256", "fingerprint"} - manifest.keys()
        if missing:
            raise KeyError(*missing)
        expected = manifest["num_tokens"] * _dtype(manifest).itemsize
        size = (path.parent / "tokens.bin").stat().st_size
    except (KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise _NoWholeStore(f"{folder}: the token store is damaged ({error})") from None
    if size != expected:
        raise _NoWholeStore(f"{folder}: the token store is damaged (tokens.bin has {size} bytes, not {expected})")
    return TokenStore(path.parent, manifest)


def build_token_store(
    folder: str | Path,
    sources: Sequence[str],
    tokenizer: Any,
    *,
    text_field: str = "text",
    fingerprint: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Tokenize the sources into `folder`, or reuse the store that is there if it has the same origin.

    tokenizer: the source tokenizer. Special words that stand in the text are cut like any other tokens.
    A store that was cut short or damaged is built again; one of another corpus, tokenizer or text field is
    refused with RunError. One process builds.
    fingerprint: `corpus_fingerprint` of the sources, where that is known: it reads them whole.
    """
    folder = Path(folder)
    made_from = {
        "corpus": corpus_fingerprint(sources) if fingerprint is None else fingerprint,
        "tokenizer": reading_fingerprint(tokenizer),
        "text_field": text_field,
    }
    store = _reusable_store(folder, made_from)
    documents = [read_documents([source], text_field=text_field) for source in sources]
    return store or _write_store(folder, documents, tokenizer, made_from, sources)


class _NoWholeStore(RunError):
    """There is no store, or a damaged one: nothing is lost by building it again."""


def _reusable_store(folder: Path, fingerprint: dict[str, Any]) -> TokenStore | None:
    try:
        store = open_token_store(folder)
        if _sha256(folder / "tokens.bin") != store.manifest["sha256"]:
            raise _NoWholeStore(f"{folder}: the token store is damaged (sha256 of tokens.bin)")
        _require_origin(store, fingerprint)
    except _NoWholeStore as error:
        if (folder / "manifest.json").exists():
            logger.warning("%s; building it again", error)
        return None
    logger.info("%s: reusing %d tokens", folder, store.num_tokens)
    return store


def require_same_store(folder: Path, corpus: Mapping[str, Any], tokenizer: Any, *, text_field: str) -> None:
    """Refuse a folder with the store of another corpus, tokenizer or text field, as building there would.

    corpus: by `corpus_fingerprint`. Raises RunError.
    """
    try:
        store = open_token_store(folder)
    except _NoWholeStore:  # which is built again
        return
    fingerprint = {"corpus": corpus, "tokenizer": reading_fingerprint(tokenizer), "text_field": text_field}
    _require_origin(store, fingerprint)


def take_over_store(
    folder: Path, others: Iterable[Path], corpus: Mapping[str, Any], tokenizer: Any, *, text_field: str
) -> None:
    """Have the same store in `folder` that one of the others holds, if one does and `folder` has none."""
    for other in others:
        if (folder / "manifest.json").exists():
            return
        try:
            require_same_store(other, corpus, tokenizer, text_field=text_field)
            open_token_store(other)
        except RunError:
            continue
        link_files(other, folder, ["tokens.bin", "manifest.json"])


def _require_origin(store: TokenStore, fingerprint: dict[str, Any]) -> None:
    if store.manifest["fingerprint"] != fingerprint:
        other = _difference(store.manifest["fingerprint"], fingerprint)
        raise RunError(
            f"{store.folder}: the token store was made from another {other}; "
            "choose another folder, or delete this one to build it again"
        )


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    if old["tokenizer"] != new["tokenizer"]:
        return "tokenizer"
    if old["text_field"] != new["text_field"]:
        return f"text_field ({old['text_field']!r}, now {new['text_field']!r})"
    pairs = itertools.zip_longest(old["corpus"]["sources"], new["corpus"]["sources"])
    before, now = next((before, now) for before, now in pairs if before != now)
    names = [source.get("name") or source.get("hub") if source else "nothing" for source in (before, now)]
    return f"corpus ({names[0]} changed)" if names[0] == names[1] else f"corpus ({names[0]}, now {names[1]})"


def _write_store(
    folder: Path,
    documents: Sequence[Iterable[str]],
    tokenizer: Any,
    fingerprint: dict[str, Any],
    sources: Sequence[str],
) -> TokenStore:
    """The manifest is renamed into place last: a process killed before that leaves no store."""
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if separator is None:
        raise ModelError("the tokenizer has neither a sep_token nor an eos_token to put between documents; set one")
    manifest_path, tokens_path = folder / "manifest.json", folder / "tokens.bin"
    temporary = folder / "tokens.bin.tmp"
    # Ids go up to the largest one given, which a tokenizer with gaps puts beyond its length.
    dtype = np.dtype("<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<i4")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest_path.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            counted = _write_tokens(file, documents, tokenizer, separator, dtype)
            file.flush()
            os.fsync(file.fileno())
        if counted["num_documents"] == 0:
            raise DataError(f"{', '.join(map(str, sources))}: no text in {counted['num_empty_documents']} documents")
        manifest = {
            "version": STORE_VERSION,
            **counted,
            "dtype": {2: "uint16", 4: "int32"}[dtype.itemsize],
            "separator_id": separator,
            "fingerprint": fingerprint,
        }
        os.replace(temporary, tokens_path)
        write_atomically(manifest_path, json.dumps(manifest, indent=2))
    except OSError as error:
        raise DiskError(f"{folder}: the token store cannot be written ({error.strerror})") from error
    finally:
        if temporary.exists():
            temporary.unlink()
    logger.info("corpus: %d tokens, %d documents, %d empty ones skipped", *list(counted.values())[:3])
    return open_token_store(folder)


def _write_tokens(
    file: BinaryIO,
    documents: Sequence[Iterable[str]],
    tokenizer: Any,
    separator: int,
    dtype: np.dtype,
) -> dict[str, Any]:
    """Tokenize each source's documents in batches into an open file; how much of what was written, and its sha256."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    num_tokens = num_documents = num_empty = 0
    ends = [0] * len(documents)
    batches = ((i, batch) for i, source in enumerate(documents) for batch in _batches(source))
    # disable=None: no bar unless stderr is a terminal.
    with tqdm(unit=" documents", desc="tokenizing", disable=None) as progress:
        for source, batch in batches:
            encoded = [ids for ids in encode_texts(tokenizer, [text for text in batch if text.strip()]) if ids]
            num_empty += len(batch) - len(encoded)
            pieces: list[list[int]] = []
            for ids in encoded:
                pieces += [[separator], ids] if num_documents else [ids]
                num_documents += 1
            row = np.fromiter(itertools.chain.from_iterable(pieces), dtype=np.int64)
            assert row.size == 0 or row.max() <= np.iinfo(dtype).max, (row.max(), dtype)
            data = row.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            num_tokens += row.size
            ends[source:] = [num_tokens] * (len(ends) - source)
            progress.update(len(batch))
    return {
        "num_tokens": num_tokens,
        "num_documents": num_documents,
        "num_empty_documents": num_empty,
        "source_ends": ends,
        "sha256": digest.hexdigest(),
    }


def _batches(documents: Iterable[str], *, characters: int = 1_000_000, length: int = 1000) -> Iterator[list[str]]:
    """Lists of documents, cut by their text and not by number alone: one may hold ten million letters."""
    batch: list[str] = []
    total = 0
    for document in documents:
        batch.append(document)
        total += len(document)
        if total >= characters or len(batch) >= length:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids without special tokens: a text that writes [MASK] or </s> means these letters, not the token."""
    if not texts:
        return []
    if _encodes_as_its_backend(tokenizer):
        # The same without offsets, which nobody asks for and which one core alone would turn into Python's lists.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        found = [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return _without_spelled(tokenizer, found)
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model's input is what a document may be
    )
    return _without_spelled(tokenizer, encoded["input_ids"])


def _without_spelled(tokenizer: Any, texts: list[list[int]]) -> list[list[int]]:
    """The unknown token in the place of a special one that a text spells, where the model of a tokenizer has it as a
    piece, as T5's has </s> and its sentinels.
    """
    unknown = tokenizer.unk_token_id
    # Added tokens that are not special, as runs of spaces, are texts of their own.
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = {*tokenizer.all_special_ids, *added} - {unknown}
    if unknown is None or not special:
        return texts
    return [[unknown if i in special else i for i in ids] if not special.isdisjoint(ids) else ids for ids in texts]


def _encodes_as_its_backend(tokenizer: Any) -> bool:
    """Whether no code of a tokenizer's own stands between a text and its Rust tokenizer."""
    from transformers import PreTrainedTokenizerFast

    plain, own = PreTrainedTokenizerFast, type(tokenizer)
    return issubclass(own, plain) and (own.__call__, own._encode_plus) == (plain.__call__, plain._encode_plus)


def _dtype(manifest: Mapping[str, Any]) -> np.dtype:
    return np.dtype({"uint16": "<u2", "int32": "<i4"}[manifest["dtype"]])
