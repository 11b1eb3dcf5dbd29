"""A corpus: documents streamed from files or the hub, tokenized once, kept as one memory-mapped row of ids.

    store = build_token_store(Path("runs/base/corpus"), ["text/", "more.jsonl"], tokenizer)
    store.block(0, 510)     # the first 510 source ids; the caller adds [CLS] and [SEP]

Ids are those of the source tokenizer, because the teacher needs them; the student's ids follow from them by a
table. Memory stays constant: the largest document (at most 16 MB) and one batch of text.
"""

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from glmd.data.jsonl import read_jsonl, read_lines
from glmd.errors import DataError, DiskError, ModelError, RunError
from glmd.strict_yaml import suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_DOCUMENT_CHARACTERS = 16_000_000
STORE_VERSION = 2
TEXT_FIELD = "text"  # the default
SUFFIXES = (".txt", ".jsonl")
PEEK_DOCUMENTS, PEEK_CHARACTERS = 1000, 1_000_000  # of each source, read before anything is begun

logger = logging.getLogger(__name__)


def read_documents(sources: Sequence[str], *, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of all sources, in order. Sources are checked at once, contents as they stream.

    sources: each one of
        a .txt file: a paragraph a line, a blank line ends a document;
        a .jsonl file: a document a row, in `text_field`;
        a folder: its .txt and .jsonl files by name, without subfolders and hidden files;
        a data set of the hub, split train: `name`, `name:config` or `owner/name:config`. The config is often
        `default`; without one, `owner/name` is taken for a path.
    Raises DataError naming source, line and field.
    """
    return itertools.chain.from_iterable(_documents(each, text_field) for each in _resolve(sources))


def require_corpus(sources: Sequence[str], text_field: str, *, store: Path | None = None) -> None:
    """Refuse what reading would refuse, by the first documents of each source, of hub data sets too. Raises DataError.

    No source at all is no corpus, which not every run needs. A text_field where no source has fields is refused.
    store: where a token store is or will be. Once it is there, the hub is not asked: the run may go on without it.
    """
    if not sources and text_field == TEXT_FIELD:
        return
    resolved = _resolve(sources)
    if text_field != TEXT_FIELD and all(isinstance(each, Path) and each.suffix.lower() == ".txt" for each in resolved):
        raise DataError(f"text_field {text_field!r} has no effect: the corpus is .txt files alone; remove it")
    if store is not None and (store / "manifest.json").is_file():
        resolved = [each for each in resolved if isinstance(each, Path)]
    blank = [_is_blank(_documents(each, text_field)) for each in resolved]
    if blank and all(blank):
        raise DataError(f"{', '.join(map(str, sources))}: no text in any document; name another text_field or corpus")


def _is_blank(documents: Iterator[str]) -> bool:
    """Whether a source was read to its end and holds no text; only its beginning is read."""
    is_blank, characters = True, 0
    for number, document in enumerate(documents, start=1):
        is_blank = is_blank and not document.strip()
        characters += len(document)
        if number >= PEEK_DOCUMENTS or characters >= PEEK_CHARACTERS:
            return False
    return is_blank


def corpus_fingerprint(sources: Sequence[str]) -> dict[str, Any]:
    """What the sources hold: name, size and sha256 of each file in order; of a hub data set only its id."""
    return {
        "sources": [_file_identity(each) if isinstance(each, Path) else {"hub": each} for each in _resolve(sources)]
    }


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of every word with its id, and of how probes are cut (case, accents, white space, merges).

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
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text_field: str = "text",
    fingerprint: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Tokenize the sources into `folder`, or reuse the store that is there if it has the same origin.

    tokenizer: the source tokenizer. Special words that stand in the text are cut like any other words.
    A store that was cut short or damaged is built again; one of another corpus, tokenizer or text field is
    refused with RunError. One process builds.
    fingerprint: `corpus_fingerprint` of the sources, where that is known: it reads them whole.
    """
    folder = Path(folder)
    made_from = {
        "corpus": corpus_fingerprint(sources) if fingerprint is None else fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
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


def require_same_store(
    folder: Path, corpus: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", *, text_field: str
) -> None:
    """Refuse a folder with the store of another corpus, tokenizer or text field, as building there would.

    corpus: by `corpus_fingerprint`. Raises RunError.
    """
    try:
        store = open_token_store(folder)
    except _NoWholeStore:  # which is built again
        return
    fingerprint = {"corpus": corpus, "tokenizer": tokenizer_fingerprint(tokenizer), "text_field": text_field}
    _require_origin(store, fingerprint)


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
    tokenizer: "PreTrainedTokenizerBase",
    fingerprint: dict[str, Any],
    sources: Sequence[str],
) -> TokenStore:
    """The manifest is renamed into place last: a process killed before that leaves no store."""
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if separator is None:
        raise ModelError("the tokenizer has neither a sep_token nor an eos_token to put between documents; set one")
    manifest_path, tokens_path = folder / "manifest.json", folder / "tokens.bin"
    temporary = [folder / "tokens.bin.tmp", folder / "manifest.json.tmp"]
    # Ids go up to the largest one given, which a tokenizer with gaps puts beyond its length.
    dtype = np.dtype("<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<i4")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest_path.unlink(missing_ok=True)
        with temporary[0].open("wb") as file:
            counted = _write_tokens(file, documents, tokenizer, separator, dtype)
            _flush(file)
        if counted["num_documents"] == 0:
            raise DataError(f"{', '.join(map(str, sources))}: no text in {counted['num_empty_documents']} documents")
        manifest = {
            "version": STORE_VERSION,
            **counted,
            "dtype": {2: "uint16", 4: "int32"}[dtype.itemsize],
            "separator_id": separator,
            "fingerprint": fingerprint,
        }
        with temporary[1].open("wb") as file:
            file.write(json.dumps(manifest, indent=2).encode())
            _flush(file)
        os.replace(temporary[0], tokens_path)
        os.replace(temporary[1], manifest_path)
    except OSError as error:
        raise DiskError(f"{folder}: the token store cannot be written ({error.strerror})") from error
    finally:
        for path in temporary:
            if path.exists():
                path.unlink()
    logger.info("corpus: %d tokens, %d documents, %d empty ones skipped", *list(counted.values())[:3])
    return open_token_store(folder)


def _write_tokens(
    file: BinaryIO,
    documents: Sequence[Iterable[str]],
    tokenizer: "PreTrainedTokenizerBase",
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


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Ids without special tokens: a text that writes [MASK] or </s> means these letters, not the token."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model's input is what a document may be
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _resolve(sources: Sequence[str]) -> list[Path | str]:
    """Every source as files that exist, or as a hub id."""
    if isinstance(sources, (str, Path)) or not sources:
        raise DataError(f"corpus: a list of files, folders or data sets is needed, got {sources!r}")
    return [each for source in sources for each in _resolve_one(str(source))]


def _resolve_one(source: str) -> list[Path] | list[str]:
    path = Path(os.path.expanduser(source))  # Path.expanduser fails for an unknown ~user
    if source.strip() and path.is_dir():
        return _text_files(source, path)
    if source.strip() and path.exists():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"{source}: a corpus file ends in .txt or .jsonl, not in {path.suffix or 'nothing'}; "
                "unpack or convert it, or give the id of a data set of the hub"
            )
        if not path.is_file():
            raise DataError(
                f"{source}: is neither a file nor a folder; give a .txt or .jsonl file, or a folder of them"
            )
        return [path]
    if path.is_symlink():
        raise _dead_link(path)
    if _hub_id(source):
        return [source]
    hint = "; for a data set of the hub write owner/name:config" if re.fullmatch(r"[\w-]+/[\w.-]+", source) else ""
    raise DataError(f"{source if source.strip() else repr(source)}: no such file or folder{hint}")


def _text_files(source: str, folder: Path) -> list[Path]:
    try:
        everything = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from None
    files = [p for p in everything if _is_text(p) and not p.is_dir()]
    for path in files:
        if path.is_symlink() and not path.exists():
            raise _dead_link(path)
    files = [path for path in files if path.is_file()]
    if not files:
        held = ", ".join(f"{p.name}/" if p.is_dir() else p.name for p in everything[:8]) or "nothing"
        raise DataError(
            f"{source}: the folder holds no .txt or .jsonl file; it holds {held}. Unpack or convert files, and name "
            "subfolders by themselves"
        )
    return files


def _dead_link(path: Path) -> DataError:
    return DataError(f"{path}: is a link to {os.readlink(path)}, where nothing can be read; mend it, or name the text")


def _is_text(path: Path) -> bool:
    # Hidden files are nobody's text: macOS leaves a binary ._name.txt beside each name.txt on foreign disks.
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _hub_id(source: str) -> tuple[str, str | None] | None:
    """(name, config) where the source can be a hub data set and is no likely path."""
    match = re.fullmatch(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::(\w[\w.-]*))?", source)
    if match is None or source.lower().endswith(SUFFIXES):
        return None
    name, config = match.groups()
    return None if config is None and re.search("[/.]", name) else (name, config)


def _documents(source: Path | str, text_field: str) -> Iterator[str]:
    if isinstance(source, Path):
        return _read_jsonl(source, text_field) if source.suffix.lower() == ".jsonl" else _read_text(source)
    name, config = _hub_id(source) or (source, None)
    return _read_hub(name, config, text_field)


def _read_text(path: Path) -> Iterator[str]:
    paragraphs: list[str] = []
    size = num_documents = 0
    for line_number, line in itertools.chain(read_lines(path), [(0, "")]):  # the file's end ends a document
        if "\0" in line:
            raise DataError(
                f"{path}:{line_number}: holds a NUL byte and is no text; save the file as UTF-8, or remove it"
            )
        if line.strip():
            paragraphs.append(line)
            size += len(line) + 1
            if size > MAX_DOCUMENT_CHARACTERS:
                limit = f"{MAX_DOCUMENT_CHARACTERS // 10**6} million characters"
                raise DataError(
                    f"{path}:{line_number}: the document is longer than {limit}; "
                    "put a blank line after each document, or use .jsonl"
                )
        elif paragraphs:
            yield "\n".join(paragraphs)
            num_documents += 1
            paragraphs, size = [], 0
    if num_documents == 0:
        raise DataError(f"{path}: the file holds no text")


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    for line_number, row in read_jsonl(path):
        yield _text_of(row, text_field, f"{path}:{line_number}")


def _read_hub(name: str, config: str | None, text_field: str) -> Iterator[str]:
    source = f"{name}:{config}" if config else name
    try:
        from datasets import load_dataset

        rows = iter(load_dataset(name, config, split="train", streaming=True))
    except Exception as error:  # whatever the hub's client raises, the remedy is the same
        raise _unreachable(source, error) from error
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreachable(source, error) from error
        if row is None:
            return
        yield _text_of(row, text_field, f"{source} row {number}")


def _unreachable(source: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return DataError(
        f"{source}: no such file or folder, and the hub gave no data set ({type(error).__name__}: {reason}); "
        "give a .txt or .jsonl file, or a folder of them"
    )


def _text_of(row: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in row:
        raise DataError(f"{where}: field {text_field!r} is missing{suggestion(text_field, map(str, row))}")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} must be text, got {repr(text)[:40]}")
    return text


def _file_identity(path: Path) -> dict[str, Any]:
    # The name without its folder, so that a corpus may move.
    return {"name": path.name, "size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _dtype(manifest: Mapping[str, Any]) -> np.dtype:
    return np.dtype({"uint16": "<u2", "int32": "<i4"}[manifest["dtype"]])


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
