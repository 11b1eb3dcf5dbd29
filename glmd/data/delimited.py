"""Tables as text, .csv and .tsv, read strictly: every refusal names the file, the line and what is wrong with it.

    table = open_delimited("reviews.csv")       # its first line names the columns
    for line_number, row in table.rows():       # {"body": "...", "stars": "5"}
        ...

Rows stream. Columns are separated by commas, semicolons or tabs, whichever the header is. Fields that hold the
separator, a quote or a line end stand in quotes, and a quote inside of one is written twice. Byte-order mark, CRLF and
empty rows are fine.
"""

import csv
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from glmd.data.jsonl import MAX_LINE_BYTES, read_lines
from glmd.errors import DataError, counted, suggestion

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
LONG_NAME = 100  # characters of a column's name; more are text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delimited:
    """A file whose header has been read.

    columns: names in their order, white space in them made one space; "" for one without a name, which no row has.
    line: of the header, from 1.
    """

    path: Path
    separator: str
    columns: tuple[str, ...]
    line: int

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield (1-based line number at which it begins, fields) for every row in which any field is filled.

        Raises DataError `path:line: ...` for a row of another number of fields than the header's, quotes that are
        not closed or go on, a lone carriage return, NUL, text that is not UTF-8, a line or field over 16 MB, and for a
        file without rows.
        """
        num_rows = num_empty = 0
        for line, record in _records(self.path, self.separator):
            if line <= self.line:
                continue
            if not any(field.strip() for field in record):
                num_empty += 1
                continue
            if len(record) != len(self.columns):
                raise DataError(
                    f"{self.path}:{line}: the row has {counted(len(record), 'field')}, the header "
                    f"{len(self.columns)}, separated by {SEPARATORS[self.separator]}; quote a field that holds one"
                )
            num_rows += 1
            yield line, record
        if num_rows == 0:
            raise DataError(f"{self.path}: the file holds no rows below its header{self._doubt()}")
        if num_empty:
            logger.info("%s: skipped %s", self.path, counted(num_empty, "empty row"))

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield (line number, column -> field) as `records` does."""
        for line, record in self.records():
            yield line, {name: field for name, field in zip(self.columns, record, strict=True) if name}

    def require(self, names: Iterable[str]) -> None:
        """Refuse a file that lacks a column, with the nearest name."""
        for name in names:
            if name not in self.columns:
                found = suggestion(name, (each[:40] for each in self.columns if each))
                raise DataError(f"{self.path}:{self.line}: there is no column {name!r}{found}{self._doubt()}")

    def _doubt(self) -> str:
        """What is said of a first line that may be a row."""
        data = [each for each in self.columns if re.fullmatch(r"[-+]?\d+([.,]\d+)?", each) or len(each) > LONG_NAME]
        return f"; {data[0][:40]!r} in its first line looks like data: name the columns there" if data else ""


def open_delimited(path: str | Path) -> Delimited:
    """Read the header. Raises DataError for one that is missing, has a name twice or may be split in two ways."""
    path = Path(path)
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    headers: dict[str, tuple[int, list[str]]] = {}
    refusal = None
    for separator in (usual, *(each for each in SEPARATORS if each != usual)):
        try:
            headers[separator] = next(each for each in _records(path, separator) if any(map(str.strip, each[1])))
        except StopIteration:
            raise DataError(f"{path}: the file is empty; its first line must name the columns") from None
        except DataError as error:  # quotes that another separator may end
            refusal = refusal or error
    if not headers:
        assert refusal is not None, "each separator gives a header or a refusal"
        raise refusal
    most = max(len(names) for _, names in headers.values())
    fitting = [each for each, (_, names) in headers.items() if len(names) == most]
    if most > 1 and len(fitting) > 1:
        raise DataError(
            f"{path}:{headers[fitting[0]][0]}: {' and '.join(SEPARATORS[each] for each in fitting)} split the header "
            f"into {most} columns each; quote the names that hold one of them"
        )
    line, found = headers[fitting[0]]
    columns = tuple(" ".join(each.split()) for each in found)
    for i, name in enumerate(columns):
        if name and name in columns[:i]:
            raise DataError(f"{path}:{line}: column {name[:40]!r} stands twice in the header; rename one")
    if fitting[0] != usual:
        _say(f"{path}: its {counted(len(columns), 'column')} are separated by {SEPARATORS[fitting[0]]}")
    return Delimited(path, fitting[0], columns, line)


@lru_cache(maxsize=64)
def _say(found: str) -> None:
    """Once in a process: a file is read for its labels, its rows and more."""
    logger.info("%s", found)


def _records(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number at which it begins, fields) of every row, the header too."""
    # The limit is the module's own for the whole process, and only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader(_lines(path), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = next((ours for theirs, ours in _REASONS.items() if theirs in str(error)), str(error))
            raise DataError(f"{path}:{line}: {reason}") from None
        yield line, record


def _lines(path: Path) -> Iterator[str]:
    """Lines that all end in one newline, as those within quotes shall."""
    for number, line in read_lines(path):
        if "\0" in line:
            raise DataError(f"{path}:{number}: holds a NUL, which is no character of a text; save the file as UTF-8")
        yield line + "\n"


# A part of what the csv module says, and what is said here.
_REASONS = {
    "unexpected end of data": "a quote is opened in this row and never closed",
    "expected after": 'text follows a closing quote; a quote inside of a quoted field is written twice, ""',
    "new-line character": "a carriage return stands alone in the row; end lines by \\n or \\r\\n, and quote others",
    "field larger": f"a field is longer than {MAX_LINE_BYTES // 10**6} MB; a quote may be missing, or split it",
}
