"""SuperGLUE's own forms of rows, turned into the flat rows of the hub's aps/super_glue and checked.

    for where, row in flat_rows("multirc", official_row, "MultiRC/val.jsonl:7"):
        row = checked("multirc", row, where)       # paragraph, question, answer, label, idx

`flat_rows` is for the official files, whose rows may be nested; a hub row is flat already. Both pass `checked`. A form
without an entry in a table below needs nothing: its rows are flat and their texts are all there is.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from glmd.data.noun_phrases import OPENERS, noun_phrases
from glmd.errors import DataError
from glmd.strict_yaml import suggestion

Form = Literal["flat", "axg", "copa", "multirc", "record", "wic", "wsc"]
Row = dict[str, Any]
# Four official answers of MultiRC are empty texts; elsewhere an empty field is a mistake.
MAY_BE_BLANK = {"multirc": ("answer",)}
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def flat_rows(form: Form, row: Row, where: str) -> Iterator[tuple[str, Row]]:
    """Each flat row of an official row, with the place to name in an error. Raises DataError."""
    if form in _FLATTEN:
        yield from _FLATTEN[form](row, where)
    else:
        yield where, row


def checked(form: Form, row: Row, where: str) -> Row:
    """The flat row, with the fields that a template may use besides the hub's. Raises DataError."""
    return _CHECK[form](row, where) if form in _CHECK else row


def _part(row: Row, key: str, kind: type, where: str, within: str = "") -> Any:
    """row[key], which must be of a kind; `within` is the path of the row in the line."""
    if key not in row:
        raise DataError(f"{where}: field '{within}{key}' is missing{suggestion(key, map(str, row))}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: field '{within}{key}' must be {_KINDS[kind]}, got {str(value)[:60]!r}")
    return value


def _parts(row: Row, key: str, where: str, within: str = "") -> Iterator[tuple[str, Row]]:
    """The objects of the list row[key], at least one, each with its path."""
    listed = _part(row, key, list, where, within)
    if not listed:
        raise DataError(f"{where}: field '{within}{key}' is an empty list; at least one is needed")
    for i, each in enumerate(listed):
        path = f"{within}{key}[{i}]"
        if not isinstance(each, dict):
            raise DataError(f"{where}: field '{path}' must be an object, got {str(each)[:60]!r}")
        yield path, each


# MultiRC: a line is a paragraph with questions with answers; a flat row is an answer.


def _flat_multirc(row: Row, where: str) -> Iterator[tuple[str, Row]]:
    passage = _part(row, "passage", dict, where)
    paragraph = _part(passage, "text", str, where, "passage.")
    seen: dict[int, str] = {}
    for question_path, question in _parts(passage, "questions", where, "passage."):
        number = _part(question, "idx", int, where, f"{question_path}.")
        if seen.setdefault(number, question_path) != question_path:
            found = f"field '{question_path}.idx' is {number}, as in {seen[number]}"
            raise DataError(f"{where}: {found}; the answers of both would be one group")
        for path, answer in _parts(question, "answers", where, f"{question_path}."):
            flat = {
                "paragraph": paragraph,
                "question": _part(question, "question", str, where, f"{question_path}."),
                "answer": _part(answer, "text", str, where, f"{path}."),
                "idx": {
                    "paragraph": _part(row, "idx", int, where),
                    "question": number,
                    "answer": _part(answer, "idx", int, where, f"{path}."),
                },
            }
            yield f"{where}: {path}", flat | ({"label": answer["label"]} if "label" in answer else {})


# ReCoRD: a line is a passage with the places of its entities and with queries; a flat row is a query.


def _flat_record(row: Row, where: str) -> Iterator[tuple[str, Row]]:
    passage = _part(row, "passage", dict, where)
    text = _part(passage, "text", str, where, "passage.")
    spans = sorted(
        (_official_span(each, text, where, path) for path, each in _parts(passage, "entities", where, "passage.")),
        key=lambda span: span[0],
    )
    entities = [text[start:end] for start, end in spans]
    for path, query in _parts(row, "qas", where):
        answers = []
        for answer_path, answer in _parts(query, "answers", where, f"{path}.") if query.get("answers") else ():
            start, end = _official_span(answer, text, where, answer_path)
            answers.append(_part(answer, "text", str, where, f"{answer_path}."))
            if text[start:end] != answers[-1]:
                raise DataError(
                    f"{where}: field '{answer_path}' is {answers[-1][:60]!r}, "
                    f"but the passage has {text[start:end][:60]!r} there"
                )
        flat = {
            "passage": text,
            "query": _part(query, "query", str, where, f"{path}."),
            "entities": entities,
            "entity_spans": {"text": entities, "start": [s for s, _ in spans], "end": [e for _, e in spans]},
            "answers": sorted(set(answers)),
            "idx": {
                "passage": _part(row, "idx", int, where),
                "query": _part(query, "idx", int, where, f"{path}."),
            },
        }
        yield f"{where}: {path}", flat


def _official_span(span: Row, text: str, where: str, path: str) -> tuple[int, int]:
    """Start and end as Python slices have them; the official end is the last character's."""
    start, end = (_part(span, key, int, where, f"{path}.") for key in ("start", "end"))
    if not 0 <= start <= end < len(text):
        raise DataError(
            f"{where}: field '{path}' runs from {start} to {end}, "
            f"which is outside the passage of {len(text)} characters (0 to {len(text) - 1})"
        )
    return start, end + 1


def _checked_record(row: Row, where: str) -> Row:
    spans = row.get("entity_spans")
    if spans is not None:
        if isinstance(spans, list):  # the hub's rows hold one object of lists or a list of objects
            spans = {key: [_part(each, key, object, where, "entity_spans.") for each in spans] for key in _SPAN}
        columns = [_part(spans, key, list, where, "entity_spans.") for key in _SPAN]
        for i, (text, start, end) in enumerate(zip(*columns, strict=True)):
            if row["passage"][start:end] != text:
                raise DataError(
                    f"{where}: field 'entity_spans[{i}]': the passage has no {text!r} from {start} to {end}"
                )
    # The hub lists entities in the order of a set, which is none: one order for both sources.
    return row | {"entities": sorted(set(_texts(row, "entities", where)))}


_SPAN = ("text", "start", "end")


def _texts(row: Row, key: str, where: str) -> list[str]:
    values: list[str] = _part(row, key, list, where)
    for i, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: field '{key}[{i}]' must be text, got {str(value)[:60]!r}")
    return values


# WSC: a line holds a text and a target, two spans with the index of their first word; flat: the spans as fields.


def _flat_wsc(row: Row, where: str) -> Iterator[tuple[str, Row]]:
    target = _part(row, "target", dict, where)
    flat = {key: value for key, value in row.items() if key != "target"}
    text = _part(row, "text", str, where)
    for span in ("span1", "span2"):
        flat[f"{span}_index"] = index = _part(target, f"{span}_index", int, where, "target.")
        flat[f"{span}_text"] = _as_in_text(text, index, _part(target, f"{span}_text", str, where, "target."))
    yield where, flat


def _as_in_text(text: str, index: int, span: str) -> str:
    """The span as the text spells it, as in the hub's wsc.fixed; unchanged where the text interrupts it."""
    if span in text:
        return span
    words = span.rstrip(".").split()
    begin = re.match(r"\s*" + r"\S+\s+" * max(index, 0), text)
    found = begin and re.compile(r"\s+".join(map(re.escape, words)), re.IGNORECASE).search(text, begin.end())
    return found.group() if found else span


def _checked_wsc(row: Row, where: str) -> Row:
    text = _part(row, "text", str, where)
    words = list(re.finditer(r"\S+", text))
    for name in ("span1", "span2"):
        index, span = _part(row, f"{name}_index", int, where), _part(row, f"{name}_text", str, where)
        if not 0 <= index < len(words):
            raise DataError(f"{where}: field '{name}_index' is {index}, but the text has {len(words)} words (from 0)")
        # Case and attached punctuation differ in many official rows, and in a few other words stand between.
        rest = iter(_WORD.findall(text[words[index].start() :].casefold()))
        wanted = _WORD.findall(span.casefold())
        if not wanted or next(rest, None) != wanted[0] or not all(word in rest for word in wanted[1:]):
            there = words[index].group()
            raise DataError(f"{where}: field '{name}_text' is {span[:60]!r}, but the text's word {index} is {there!r}")
    word = words[row["span2_index"]]
    pronoun = re.compile(re.escape(row["span2_text"]), re.IGNORECASE).search(text, word.start(), word.end()) or word
    marked = f"{text[: pronoun.start()]}*{pronoun.group()}*{text[pronoun.end() :]}"
    return row | {"marked_text": marked, "candidates": _wsc_candidates(row, marked, where)}


def _wsc_candidates(row: Row, marked: str, where: str) -> list[str]:
    """span1_text, of which a row asks, and what else the pronoun may stand for.

    The paper's come from a file of its authors: a row's own `candidates` are taken where it has any.
    """
    asked, given = row["span1_text"], row.get("candidates")
    # The pronoun's stars keep it out of every phrase that is found.
    others = noun_phrases(marked) if given is None or given == [] else _texts(row, "candidates", where)
    taken = [_bare(text) for text in (row["span2_text"], asked)]
    kept = [asked]
    for each in others:
        words = _bare(each)
        # Another name for the same would be as right: the old cat, cat. Of given ones only the very same is.
        if words.strip() and not any(words == t or (not given and (words in t or t in words)) for t in taken):
            taken.append(words)
            kept.append(each)
    if given and len(kept) == 1:
        raise DataError(
            f"{where}: field 'candidates' has nothing besides {asked[:60]!r}, of which the row asks; add others"
        )
    return kept


def _bare(phrase: str) -> str:
    """The words of a phrase without capitals, signs and an opening article or possessive, a space around each."""
    words = _WORD.findall(phrase.casefold())
    return f" {' '.join(words[1:] if len(words) > 1 and words[0] in OPENERS else words)} "


_WORD = re.compile(r"\w+")


# Flat in both sources, with a field to check or to fill in.


def _checked_copa(row: Row, where: str) -> Row:
    question = _part(row, "question", str, where)
    if question not in ("cause", "effect"):
        raise DataError(f"{where}: field 'question' must be cause or effect, got {question[:60]!r}")
    statement = _part(row, "premise", str, where).strip().rstrip(".!")
    return row | {"statement": statement, "connective": {"cause": "because", "effect": "so"}[question]}


def _checked_wic(row: Row, where: str) -> Row:
    for number in "12":
        sentence = _part(row, f"sentence{number}", str, where)
        if f"start{number}" in row or f"end{number}" in row:
            start, end = (_part(row, f"{key}{number}", int, where) for key in ("start", "end"))
            if not 0 <= start < end <= len(sentence):
                raise DataError(
                    f"{where}: fields 'start{number}' and 'end{number}' are {start} and {end}, "
                    f"which is no part of sentence{number} with its {len(sentence)} characters"
                )
    return row


def _checked_axg(row: Row, where: str) -> Row:
    # The two of a pair follow each other, as jiant's scorer of the benchmark (jiant/metrics/winogender_metrics.py)
    # takes them; a wrong pair would show in its two hypotheses. The official file's pair_id differs within a pair,
    # and the hub's rows have none.
    return row | {"pair": _part(row, "idx", int, where) // 2}


_FLATTEN: dict[str, Callable[[Row, str], Iterator[tuple[str, Row]]]] = {
    "multirc": _flat_multirc,
    "record": _flat_record,
    "wsc": _flat_wsc,
}
_CHECK: dict[str, Callable[[Row, str], Row]] = {
    "axg": _checked_axg,
    "copa": _checked_copa,
    "record": _checked_record,
    "wic": _checked_wic,
    "wsc": _checked_wsc,
}
