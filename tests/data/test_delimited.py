"""Files of commas, semicolons and tabs: read as the csv module writes them, or refused by file and line."""

import csv
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmd.data.delimited import open_delimited
from glmd.errors import DataError
from glmd.tasks.examples import read_split
from glmd.tasks.tasks import Task, label_of_text


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "rows.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read(path):
    return list(open_delimited(path).rows())


def refusal(path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1), st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"]))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, rows, separator, line_end):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator, lineterminator=line_end).writerows([("body", "stars"), ("a", "b"), *rows])
    filled = [each for each in [("a", "b"), *rows] if any(field.strip() for field in each)]
    assert [tuple(row.values()) for _, row in read(path)] == filled


ROWS = [(2, {"body": "good, really", "stars": "5"}), (3, {"body": 'a\n"b"', "stars": "1"})]
GOOD = {
    "commas": 'body,stars\n"good, really",5\n"a\n""b""",1\n',
    "no last line end": 'body,stars\n"good, really",5\n"a\n""b""",1',
    "semicolons": 'body;stars\ngood, really;5\n"a\n""b""";1\n',
    "tabs": 'body\tstars\ngood, really\t5\n"a\n""b"""\t1\n',
    "Windows line ends": 'body,stars\r\n"good, really",5\r\n"a\r\n""b""",1\r\n',
    "a byte-order mark": '\ufeffbody,stars\n"good, really",5\n"a\n""b""",1\n',
    "a mark and a quoted header": '\ufeff"body","stars"\n"good, really",5\n"a\n""b""",1\n',
    "empty rows at the end": 'body,stars\n"good, really",5\n"a\n""b""",1\n\n,\n , \n',
    "white space around names": ' body , stars\n"good, really",5\n"a\n""b""",1\n',
    "an index without a name": ',body,stars\n0,"good, really",5\n1,"a\n""b""",1\n',
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD)
def test_an_odd_file_gives_the_rows_of_a_plain_one(write, content):
    assert read(write(content)) == ROWS


def test_empty_rows_keep_the_numbers_of_others_and_are_counted(write, caplog):
    caplog.set_level(logging.INFO)
    path = write("\nbody;stars\n\na;1\n;\nb;2\n")
    assert read(path) == [(4, {"body": "a", "stars": "1"}), (6, {"body": "b", "stars": "2"})]
    assert f"{path}: skipped 2 empty rows" in caplog.text
    assert f"{path}: its 2 columns are separated by semicolons" in caplog.text


def test_a_field_of_ten_megabytes_is_read(write):
    assert len(read(write("body,stars\n" + "x" * 10**7 + ",1\n"))[0][1]["body"]) == 10**7


BAD = {
    "few fields": ("a,b,c\n1,2,3\n1,2\n", ":3: the row has 2 fields, the header 3, separated by commas"),
    "many fields": ("body,stars\ngood, really,5\n", ":2: the row has 3 fields, the header 2"),
    "in other lines": ('a;b\n"x\ny";1\n1;2;3\n', ":4: the row has 3 fields, the header 2, separated by semicolons"),
    "an open quote": ('a,b\n1,2\n"x,3\n4,5\n', ":3: a quote is opened in this row and never closed"),
    "a lone quote": ('a,b\n"x" y,3\n', ":2: text follows a closing quote"),
    "a name twice": ("body,stars,body\na,1,b\n", ":1: column 'body' stands twice in the header"),
    "two separators": ("a,b;c\n1,2;3\n", ":1: commas and semicolons split the header into 2 columns each"),
    "a long field": ("a,b\n" + '"' + ("x" * 10**6 + "\n") * 17 + '",1\n', ":2: a field is longer than 16 MB"),
    "a long line": ("a,b\n" + "x" * 17_000_000 + ",1\n", ":2: the line is longer than 16 MB"),
    "not UTF-8": (b"a,b\ncaf\xe9,1\n", ":2: not UTF-8 at byte 7"),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), ":1: not UTF-8 at byte 0"),
    "a NUL": ("a,b\nx\0y,1\n", ":2: holds a NUL"),
    "lone carriage returns": ("a,b\r1,2\r", ":1: a carriage return stands alone"),
    "a header alone": ("a,b\n", ": the file holds no rows below its header"),
    "a row alone": ("a,5\n", ": the file holds no rows below its header; '5' in its first line looks like data"),
    "nothing": ("", ": the file is empty"),
    "blank lines": ("\n\n", ": the file is empty"),
}


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_by_file_and_line(write, content, says):
    path = write(content)
    assert refusal(path).startswith(f"{path}{says}")


# As rows of a task

TASK = Task("Reviews", ("body",), "{body}", ("accuracy",), 64, labels=("bad", "good"), label_field="verdict")


def examples(task, path, *, require_labels=True):
    return [
        (each.texts[0][0], each.label) for each in read_split(task, str(path), "val", require_labels=require_labels)
    ]


def read_refusal(task, path, **options) -> str:
    with pytest.raises(DataError) as caught:
        examples(task, path, **options)
    return str(caught.value)


def test_a_task_reads_a_file_of_texts_as_it_reads_jsonl(write, tmp_path):
    jsonl = write('{"body": "a", "verdict": "good"}\n{"body": "b", "verdict": null}\n', "rows.jsonl")
    for name in ("rows.csv", "ROWS.TSV", "Reviews/val.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path = write("body\tverdict\na\tgood\nb\t\n", name)
        assert examples(TASK, path, require_labels=False) == examples(TASK, jsonl, require_labels=False)
    assert len(examples(TASK, tmp_path, require_labels=False)) == 2
    assert read_refusal(TASK, path) == f'{path}:3: field \'verdict\' must be one of "bad", "good"; the row has none'


def test_a_column_that_is_not_there_is_named_with_the_nearest(write):
    path = write("Body,verdict\na,good\n")
    assert read_refusal(TASK, path) == f"{path}:1: there is no column 'body'; did you mean Body?"
    path = write("body,Verdikt\na,good\n")
    assert read_refusal(TASK, path) == f"{path}:1: there is no column 'verdict'; did you mean Verdikt?"
    assert examples(TASK, path, require_labels=False) == [("a", None)]


def test_a_file_without_header_is_said_to_be_one(write):
    message = read_refusal(TASK, write("I liked it,5\nI did not,1\n"))
    assert message.endswith(":1: there is no column 'body'; known: 5, I liked it; '5' in its first line looks like data"
                            ": name the columns there")  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "text", "meant"),
    [
        ((1, 2), "1", 1),
        ((1, 2), "1.0", 1),
        ((1, 2), " 2 ", 2),
        ((1, 2), "1.5", "1.5"),
        (("1", "2"), "1.0", "1"),
        (("1", "1.0"), "1.0", "1.0"),
        (("1", "1.0"), "1.00", "1.00"),  # either may be meant
        ((False, True), "TRUE", True),
        ((False, True), "0", False),
        (("bad", "Good"), "good", "Good"),
        (("good", "Good"), "GOOD", "GOOD"),
        (("good", "Good"), "Good", "Good"),
        (("-1", "1"), "-1", "-1"),
        (("bad", "good"), "-1", None),
        (("bad", "good"), "", None),
        (("bad", "good"), "NA", "NA"),
    ],
)
def test_a_text_means_the_one_label_that_it_is_another_form_of(labels, text, meant):
    found = label_of_text(labels, text)
    assert found == meant and type(found) is type(meant)


def test_other_labels_and_blank_texts_are_refused_by_line(write):
    path = write('body,verdict\n"a\nb",good\nc,fine\n')
    message = f'{path}:4: field \'verdict\' must be one of "bad", "good"; got "fine"'
    assert read_refusal(TASK, path) == message
    path = write("body,verdict\na,good\n ,bad\n")
    assert read_refusal(TASK, path).startswith(f"{path}:3: field 'body' is blank")


def test_an_idx_is_the_number_that_it_says(write):
    path = write("body,verdict,idx\na,good,7\nb,bad,007\nc,bad,\n")
    assert [each.idx for each in read_split(TASK, str(path), "val", require_labels=True)] == [7, "007", None]
