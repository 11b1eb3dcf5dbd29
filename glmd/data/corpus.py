"""A corpus: documents streamed from files or the hub, tokenized once, kept as one memory-mapped row of ids.

    store = build_token_store(Path("runs/base/corpus"), ["text/", "more.jsonl"], tokenizer)
    store.block(0, 510)     # the first 510 source ids; the caller adds [CLS] and [SEP]

Ids are those of the source tokenizer, because the teacher needs them; the student's ids follow from them by a
table. Memory stays constant: the largest document (at most 16 MB) and one batch of text.
"""

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glmd.data.jsonl import read_jsonl, read_lines
from glmd.data.tables import parquet_rows
from glmd.errors import DataError, suggestion

MAX_DOCUMENT_CHARACTERS = 16_000_000
TEXT_FIELD = "text"  # the default
SUFFIXES = (".txt", ".jsonl", ".parquet")
FILES = ".txt, .jsonl or .parquet"
Row = tuple[str, dict[str, Any]]  # where a row stands, to name in a refusal, and the row
PEEK_DOCUMENTS, PEEK_CHARACTERS = 1000, 1_000_000  # of each source, read before anything is begun

logger = logging.getLogger(__name__)


def read_documents(sources: Sequence[str], *, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of all sources, in order. Sources are checked at once, contents as they stream.

    sources: each one of
        a .txt file: a paragraph a line, a blank line ends a document;
        a .jsonl or .parquet file: a document a row, in `text_field`;
        a folder: its .txt, .jsonl and .parquet files by name, without subfolders and hidden files;
        a data set of the hub, split train: `name`, `name:config` or `owner/name:config`. The config is often
        `default`; without one, `owner/name` is taken for a path.
    Raises DataError naming source, line and field.
    """
    return itertools.chain.from_iterable(_documents(each, text_field) for each in resolve(sources))


def read_rows(sources: Sequence[str]) -> Iterator[Row]:
    """Yield where each row of all sources stands, and the row, in order: of the sources of `read_documents` those that
    have rows. Raises DataError, of a .txt file too.
    """
    return itertools.chain.from_iterable(_rows(each) for each in resolve(sources))


def require_corpus(sources: Sequence[str], text_field: str, *, store: Path | None = None) -> None:
    """Refuse what reading would refuse, by the first documents of each source, of hub data sets too. Raises DataError.

    No source at all is no corpus, which not every run needs. A text_field where no source has fields is refused.
    store: where a token store is or will be. Once it is there, the hub is not asked: the run may go on without it.
    """
    if not sources and text_field == TEXT_FIELD:
        return
    resolved = resolve(sources)
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
    return {"sources": [_file_identity(each) if isinstance(each, Path) else {"hub": each} for each in resolve(sources)]}


def resolve(sources: Sequence[str]) -> list[Path | str]:
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
                f"{source}: a corpus file ends in {FILES}, not in {path.suffix or 'nothing'}; "
                "unpack or convert it, or give the id of a data set of the hub"
            )
        if not path.is_file():
            raise DataError(f"{source}: is neither a file nor a folder; give a {FILES} file, or a folder of them")
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
            f"{source}: the folder holds no {FILES} file; it holds {held}. Unpack or convert files, and name "
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
    if isinstance(source, Path) and source.suffix.lower() == ".txt":
        return _read_text(source)
    return (_text_of(row, text_field, where) for where, row in _rows(source))


def _rows(source: Path | str) -> Iterator[Row]:
    if not isinstance(source, Path):
        return _read_hub(*(_hub_id(source) or (source, None)))
    if source.suffix.lower() == ".jsonl":
        return ((f"{source}:{line_number}", row) for line_number, row in read_jsonl(source))
    if source.suffix.lower() == ".parquet":
        return parquet_rows([source])
    raise DataError(f"{source}: a line of text has no fields; give .jsonl, .parquet or a data set of the hub")


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


def _read_hub(name: str, config: str | None) -> Iterator[Row]:
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
        yield f"{source} row {number}", row


def _unreachable(source: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return DataError(
        f"{source}: no such file or folder, and the hub gave no data set ({type(error).__name__}: {reason}); "
        f"give a {FILES} file, or a folder of them"
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
