"""JSON lines: what is accepted, and the line a reader gets for what is not."""

import json
import logging
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmd.data import jsonl
from glmd.data.jsonl import read_jsonl
from glmd.errors import DataError


@pytest.fixture
def write(tmp_path: Path):
    def write(content: bytes | str) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), values, max_size=4), min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    ascii_only=st.booleans(),
)
def test_rows_come_back_as_the_json_module_reads_them(tmp_path_factory, rows, end, bom, ascii_only):
    path = tmp_path_factory.getbasetemp() / "property.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    assert list(read_jsonl(path)) == [(i, row) for i, row in enumerate(rows, start=1)]


def test_a_file_without_a_last_line_end_is_whole(write):
    assert list(read_jsonl(write('{"a": 1}\n{"a": 2}'))) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_line_separator_inside_text_does_not_break_the_line(write):
    row = {"text": "one\u2028two\x85three"}
    assert list(read_jsonl(write(json.dumps(row, ensure_ascii=False)))) == [(1, row)]


def test_blank_lines_keep_their_number_and_are_counted(write, caplog):
    path = write('\r\n{"a": 1}\n  \n\n{"a": 2}\n')
    with caplog.at_level(logging.INFO, logger="glmd"):
        assert list(read_jsonl(path)) == [(2, {"a": 1}), (5, {"a": 2})]
    assert "skipped 3 blank lines" in caplog.text


def test_rows_before_a_bad_line_are_read_one_at_a_time(write):
    rows = read_jsonl(write('{"a": 1}\n{"a": '))
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError):
        next(rows)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"a": 1', "not valid JSON"),
        ('{"a": "cut', "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1} {"a": 2}', "one object a line"),
        ("[1, 2]", "got a list"),
        ('"text"', "got text"),
        ("3", "got a number"),
        ("true", "got true or false"),
        ("null", "got null"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' stands twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' stands twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": [-Infinity]}', "-Infinity is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": ' + "9" * 5000 + "}", "4300"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udc00": 1}', "surrogate"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "deeper than 64"),
        ('{"a":' * 100_000, "deeper than 64"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(write, line, says):
    path = write('{"a": 0}\n\n' + line + "\n")
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert says in message


def test_nesting_to_the_limit_and_escaped_characters_are_fine(write):
    deep = '{"a": ' + "[" * 63 + "]" * 63 + "}"
    brackets_in_text = json.dumps({"a": "[{" * 1000})
    emoji = '{"a": "\\ud83d\\ude00"}'
    rows = [row for _, row in read_jsonl(write(f"{deep}\n{brackets_in_text}\n{emoji}"))]
    assert rows[1] == {"a": "[{" * 1000}
    assert rows[2] == {"a": "\U0001f600"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_byte_that_is_not_utf8_is_named_by_its_offset_in_the_file(write, encoding):
    first = b'{"a": 0}\n'
    content = first + '{"a": "\u00e9"}\n'.encode(encoding)
    with pytest.raises(UnicodeDecodeError) as plain:
        content.decode()
    path = write(content)
    assert refusal(path).startswith(f"{path}:2: not UTF-8 at byte {plain.value.start};")


def test_a_line_may_be_as_long_as_the_limit_and_not_longer(write, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1_000_000)
    line = b'{"a": "' + b"x" * (1_000_000 - 10) + b'"}\n'
    assert len(line) == 1_000_000
    assert len(list(read_jsonl(write(line)))) == 1
    path = write(line + b" " + line)
    assert refusal(path) == f"{path}:2: the line is longer than 1 MB; split it"


def test_a_file_that_is_one_long_line_is_refused_before_it_fills_the_memory(write, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1_000_000)
    path = write(b"x" * 30_000_000)
    tracemalloc.start()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_a_byte_order_mark_is_one_only_at_the_start_of_a_file(write):
    lines = list(jsonl.read_lines(write("\ufefffirst\n\ufeffsecond\r\n")))
    assert lines == [(1, "first"), (2, "\ufeffsecond")]


@pytest.mark.parametrize("content", ["", "\n\r\n", "\ufeff"])
def test_a_file_without_rows_is_refused(write, content):
    path = write(content)
    assert refusal(path) == f"{path}: the file holds no rows"


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    assert refusal(tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'}: cannot be read (No such file or directory)"
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"
