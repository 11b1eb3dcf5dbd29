"""A corpus as tokens on disk: tokenized once, kept as one memory-mapped row of ids.

Of conversations a second row says which tokens are an assistant's, and where each conversation begins.
"""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from glmd.data.corpus import _sha256, corpus_fingerprint, read_documents
from glmd.data.encoding import encode_texts, reading_fingerprint
from glmd.errors import DataError, DiskError, ModelError, RunError
from glmd.storage import link_files, write_atomically

if TYPE_CHECKING:
    from glmd.data.conversations import ConversationReader

logger = logging.getLogger(__name__)

STORE_VERSION = 2
ASSISTANT, FIRST = 1, 2  # bits of a token's mark: an assistant says it; a conversation begins with it
MARKS = "marks.bin"


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

    @cached_property
    def marks(self) -> np.memmap:
        """(num_tokens,) uint8 of conversations: `ASSISTANT`, `FIRST`; read-only."""
        return np.memmap(self.folder / MARKS, dtype=np.uint8, mode="r")

    @cached_property
    def first_tokens(self) -> np.ndarray:
        """(conversations + 1,) where each conversation begins, and the end of the last one."""
        step = 1 << 22  # tokens whose marks are in memory at once
        starts = range(0, self.num_tokens, step)
        found = [start + np.flatnonzero(self.marks[start : start + step] & FIRST) for start in starts]
        return np.concatenate([*found, [self.num_tokens]])

    @property
    def has_roles(self) -> bool:
        """Whether it is known of conversations which tokens are an assistant's."""
        return bool(self.manifest.get("conversations", {}).get("has_roles", False))

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
        marked = (path.parent / MARKS).stat().st_size if "conversations" in manifest else manifest["num_tokens"]
    except (KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise _NoWholeStore(f"{folder}: the token store is damaged ({error})") from None
    if size != expected:
        raise _NoWholeStore(f"{folder}: the token store is damaged (tokens.bin has {size} bytes, not {expected})")
    if marked != manifest["num_tokens"]:
        raise _NoWholeStore(f"{folder}: the token store is damaged ({MARKS} has {marked} bytes)")
    return TokenStore(path.parent, manifest)


def build_token_store(
    folder: str | Path,
    sources: Sequence[str],
    tokenizer: Any,
    *,
    text_field: str = "text",
    conversations: "ConversationReader | None" = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Tokenize the sources into `folder`, or reuse the store that is there if it has the same origin.

    tokenizer: the source tokenizer. Special words that stand in the text are cut like any other tokens.
    A store that was cut short or damaged is built again; one of another corpus, tokenizer or text field is
    refused with RunError. One process builds.
    conversations: what reads the rows, where they are conversations and not texts.
    fingerprint: `corpus_fingerprint` of the sources, where that is known: it reads them whole.
    """
    folder = Path(folder)
    reader = conversations or TextReader(tokenizer, text_field)
    made_from = {"corpus": corpus_fingerprint(sources) if fingerprint is None else fingerprint, **reader.record()}
    return _reusable_store(folder, made_from) or _write_store(folder, sources, tokenizer, reader, made_from)


class TextReader:
    """Reads documents of text, as a corpus has them unless they are conversations: a `ConversationReader` for these."""

    def __init__(self, tokenizer: Any, text_field: str) -> None:
        self.tokenizer, self.text_field = tokenizer, text_field

    def record(self) -> dict[str, Any]:
        """What the tokens depend on, besides the documents."""
        return {"tokenizer": reading_fingerprint(self.tokenizer), "text_field": self.text_field}

    def read(self, sources: Sequence[str]) -> Iterator[str]:
        """As `read_documents`."""
        return read_documents(sources, text_field=self.text_field)

    def encode(self, documents: Sequence[str]) -> list[list[int]]:
        """Ids of each document that has any."""
        texts = [each for each in documents if each.strip()]
        return [ids for ids in encode_texts(self.tokenizer, texts) if ids]


class _NoWholeStore(RunError):
    """There is no store, or a damaged one: nothing is lost by building it again."""


def _reusable_store(folder: Path, fingerprint: dict[str, Any]) -> TokenStore | None:
    try:
        store = open_token_store(folder)
        sums = {"tokens.bin": store.manifest["sha256"]}
        if "conversations" in store.manifest:
            sums[MARKS] = store.manifest["conversations"]["sha256"]
        for name, expected in sums.items():
            if _sha256(folder / name) != expected:
                raise _NoWholeStore(f"{folder}: the token store is damaged (sha256 of {name})")
        _require_origin(store, fingerprint)
    except _NoWholeStore as error:
        if (folder / "manifest.json").exists():
            logger.warning("%s; building it again", error)
        return None
    logger.info("%s: reusing %d tokens", folder, store.num_tokens)
    return store


def require_same_store(
    folder: Path,
    corpus: Mapping[str, Any],
    tokenizer: Any,
    *,
    text_field: str,
    conversations: "ConversationReader | None" = None,
) -> None:
    """Refuse a folder with the store of another corpus, tokenizer or text field, as building there would.

    corpus: by `corpus_fingerprint`. Raises RunError.
    """
    try:
        store = open_token_store(folder)
    except _NoWholeStore:  # which is built again
        return
    reader = conversations or TextReader(tokenizer, text_field)
    _require_origin(store, {"corpus": corpus, **reader.record()})


def take_over_store(
    folder: Path,
    others: Iterable[Path],
    corpus: Mapping[str, Any],
    tokenizer: Any,
    *,
    text_field: str,
    conversations: "ConversationReader | None" = None,
) -> None:
    """Have the same store in `folder` that one of the others holds, if one does and `folder` has none."""
    for other in others:
        if (folder / "manifest.json").exists():
            return
        try:
            require_same_store(other, corpus, tokenizer, text_field=text_field, conversations=conversations)
            store = open_token_store(other)
        except RunError:
            continue
        marks = [MARKS] if "conversations" in store.manifest else []
        link_files(other, folder, ["tokens.bin", *marks, "manifest.json"])


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
    # Settings of texts, and of conversations, of which each has its own.
    for name in ("text_field", "messages_field", "chat_template", "loss_on", "scheme"):
        if old.get(name) != new.get(name):
            return f"{name} ({old.get(name)!r}, now {new.get(name)!r})"
    pairs = itertools.zip_longest(old["corpus"]["sources"], new["corpus"]["sources"])
    before, now = next((before, now) for before, now in pairs if before != now)
    names = [source.get("name") or source.get("hub") if source else "nothing" for source in (before, now)]
    return f"corpus ({names[0]} changed)" if names[0] == names[1] else f"corpus ({names[0]}, now {names[1]})"


def _write_store(
    folder: Path,
    sources: Sequence[str],
    tokenizer: Any,
    reader: "TextReader | ConversationReader",
    fingerprint: dict[str, Any],
) -> TokenStore:
    """The manifest is renamed into place last: a process killed before that leaves no store."""
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if separator is None:
        raise ModelError("the tokenizer has neither a sep_token nor an eos_token to put between documents; set one")
    manifest_path = folder / "manifest.json"
    names = ["tokens.bin", *([] if isinstance(reader, TextReader) else [MARKS])]
    # Ids go up to the largest one given, which a tokenizer with gaps puts beyond its length.
    dtype = np.dtype("<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<i4")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest_path.unlink(missing_ok=True)
        with ExitStack() as stack:
            files = [stack.enter_context((folder / f"{name}.tmp").open("wb")) for name in names]
            counted = _write_tokens(files, sources, reader, separator, dtype)
            for file in files:
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
        for name in names:
            os.replace(folder / f"{name}.tmp", folder / name)
        write_atomically(manifest_path, json.dumps(manifest, indent=2))
    except OSError as error:
        raise DiskError(f"{folder}: the token store cannot be written ({error.strerror})") from error
    finally:
        for temporary in [folder / f"{name}.tmp" for name in names]:
            if temporary.exists():
                temporary.unlink()
    logger.info("corpus: %d tokens, %d documents, %d empty ones skipped", *list(counted.values())[:3])
    return open_token_store(folder)


def _write_tokens(
    files: Sequence[BinaryIO],
    sources: Sequence[str],
    reader: "TextReader | ConversationReader",
    separator: int,
    dtype: np.dtype,
) -> dict[str, Any]:
    """Tokenize each source's documents in batches into open files; how much of what was written, and their sha256."""
    from tqdm import tqdm

    digests = [hashlib.sha256() for _ in files]
    num_tokens = num_documents = num_empty = 0
    ends = [0] * len(sources)
    batches = ((i, batch) for i, source in enumerate(sources) for batch in _batches(reader.read([source])))
    # disable=None: no bar unless stderr is a terminal.
    with tqdm(unit=" documents", desc="tokenizing", disable=None) as progress:
        for source, batch in batches:
            if isinstance(reader, TextReader):
                texts = reader.encode(batch)
                pieces = [piece for ids in texts for piece in ([separator], ids)]
                row = np.fromiter(
                    itertools.chain.from_iterable(pieces if num_documents else pieces[1:]), dtype=np.int64
                )
                columns, number = [row.astype(dtype)], len(texts)
            else:
                chats = reader.encode(batch)
                row = np.concatenate([each.ids for each in chats])
                marks = np.concatenate([_marks(each.is_assistant) for each in chats])
                columns, number = [row.astype(dtype), marks], len(chats)
            num_empty += len(batch) - number
            num_documents += number
            assert row.size == 0 or row.max() <= np.iinfo(dtype).max, (row.max(), dtype)
            for file, digest, column in zip(files, digests, columns, strict=True):
                data = column.tobytes()
                file.write(data)
                digest.update(data)
            num_tokens += row.size
            ends[source:] = [num_tokens] * (len(ends) - source)
            progress.update(len(batch))
    found = {
        "num_tokens": num_tokens,
        "num_documents": num_documents,
        "num_empty_documents": num_empty,
        "source_ends": ends,
        "sha256": digests[0].hexdigest(),
    }
    if not isinstance(reader, TextReader):
        if not reader.is_placed:
            logger.info("corpus: scores are not given by role: %s", reader.unplaced)
        found["conversations"] = {"sha256": digests[1].hexdigest(), "has_roles": reader.is_placed}
    return found


def _marks(is_assistant: np.ndarray) -> np.ndarray:
    """(S,) uint8 of one conversation."""
    marks = is_assistant * np.uint8(ASSISTANT)
    marks[0] |= FIRST
    return marks


def _batches(documents: Iterable[Any], *, characters: int = 1_000_000, length: int = 1000) -> Iterator[list[Any]]:
    """Lists of documents, cut by their text and not by number alone: one may hold ten million letters."""
    batch: list[Any] = []
    total = 0
    for document in documents:
        batch.append(document)
        total += len(document)
        if total >= characters or len(batch) >= length:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _dtype(manifest: Mapping[str, Any]) -> np.dtype:
    return np.dtype({"uint16": "<u2", "int32": "<i4"}[manifest["dtype"]])
