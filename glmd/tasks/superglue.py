"""SuperGLUE's own forms of rows, turned into the flat rows of the hub's aps/super_glue and checked.

    for where, row in flat_rows("multirc", official_row, "MultiRC/val.jsonl:7"):
        row = checked("multirc", row, where)       # paragraph, question, answer, label, idx

`flat_rows` is for the official files, whose rows may be nested; a hub row is flat already. Both pass `checked`. A form
without an entry in a table below needs nothing: its rows are flat and their texts are all there is. What is wrong in a
few official rows, and harms nothing, is counted in `Oddities` and read all the same.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from glmd.data.oddities import Oddities
from glmd.errors import DataError, suggestion
from glmd.tasks.noun_phrases import OPENERS, noun_phrases

Form = Literal["flat", "axg", "copa", "multirc", "record", "wic", "wsc"]
Row = dict[str, Any]
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def flat_rows(form: Form, row: Row, where: str, oddities: Oddities | None = None) -> Iterator[tuple[str, Row]]:
    """Each flat row of an official row, with the place to name in an error. Raises DataError."""
    if form in _FLATTEN and _FLAT_FIELD[form] not in row:
        yield from _FLATTEN[form](row, where, oddities or Oddities())
    else:
        yield where, row


def checked(form: Form, row: Row, where: str, oddities: Oddities | None = None) -> Row:
    """The flat row, with the fields that a template may use besides the hub's. Raises DataError."""
    return _CHECK[form](row, where, oddities or Oddities()) if form in _CHECK else row


def _part(row: Row, key: str, kind: type, where: str, within: str = "") -> Any:
    """row[key], which must be of a kind; `within` is the path of the row in the line."""
    if key not in row:
        raise DataError(f"{where}: field '{within}{key}' is missing{suggestion(key, map(str, row))}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: field '{within}{key}' must be {_KINDS[kind]}, got {str(value)[:60]!r}")
    return value


def _parts(row: Row, key: str, where: str, within: str = "") -> Iterator[tuple[str, Row]]:
    """The objects of the list row[key], each with its path."""
    for i, each in enumerate(_part(row, key, list, where, within)):
        path = f"{within}{key}[{i}]"
        if not isinstance(each, dict):
            raise DataError(f"{where}: field '{path}' must be an object, got {str(each)[:60]!r}")
        yield path, each


# MultiRC: a line is a paragraph with questions with answers; a flat row is an answer.


def _flat_multirc(row: Row, where: str, oddities: Oddities) -> Iterator[tuple[str, Row]]:
    passage = _part(row, "passage", dict, where)
    paragraph = _part(passage, "text", str, where, "passage.")
    seen: dict[int, str] = {}
    if passage.get("questions") == []:
        oddities.note("a passage has no questions", where)
    for question_path, question in _parts(passage, "questions", where, "passage."):
        if question.get("answers") == []:
            oddities.note("a question has no answers", where)
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


def _flat_record(row: Row, where: str, oddities: Oddities) -> Iterator[tuple[str, Row]]:
    passage = _part(row, "passage", dict, where)
    text = _part(passage, "text", str, where, "passage.")
    spans = _entity_spans(passage, text, where, oddities)
    entities = [text[start:end] for start, end in spans]
    if row.get("qas") == []:
        oddities.note("a passage has no queries", where)
    for path, query in _parts(row, "qas", where):
        answers = []
        for answer_path, answer in _parts(query, "answers", where, f"{path}.") if query.get("answers") else ():
            answers.append(_part(answer, "text", str, where, f"{answer_path}."))
            span = _official_span(answer, text, where, answer_path) if "start" in answer else None
            if span is None or text[slice(*span)] != answers[-1]:
                oddities.note("an answer does not stand where its row says", f"{where} {answer_path}")
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


def _entity_spans(passage: Row, text: str, where: str, oddities: Oddities) -> list[tuple[int, int]]:
    """Start and end of each entity, by place; without those that are no part of the text, or blank."""
    found = []
    for path, each in _parts(passage, "entities", where, "passage."):
        span = _official_span(each, text, where, path)
        if span is None or not text[slice(*span)].strip():
            oddities.note("an entity lies outside its passage and is left out", f"{where} {path}")
        else:
            found.append(span)
    if not found:
        raise DataError(f"{where}: field 'passage.entities' holds no part of the passage; at least one is needed")
    return sorted(found, key=lambda span: span[0])


def _official_span(span: Row, text: str, where: str, path: str) -> tuple[int, int] | None:
    """Start and end as Python slices have them; the official end is the last character's. None: outside the text."""
    start, end = (_part(span, key, int, where, f"{path}.") for key in ("start", "end"))
    return (start, end + 1) if 0 <= start <= end < len(text) else None


def _checked_record(row: Row, where: str, oddities: Oddities) -> Row:
    spans = row.get("entity_spans")
    if spans is not None:
        if isinstance(spans, list):  # the hub's rows hold one object of lists or a list of objects
            spans = {key: [_part(each, key, object, where, "entity_spans.") for each in spans] for key in _SPAN}
        columns = [_part(spans, key, list, where, "entity_spans.") for key in _SPAN]
        if any(row["passage"][start:end] != text for text, start, end in zip(*columns, strict=True)):
            oddities.note("an entity does not stand where its row says", where)
    # The hub lists entities in the order of a set, which is none: one order for both sources.
    entities = sorted(set(_texts(row, "entities", where)))
    answers = row.get("answers") or []
    if any(answer not in entities for answer in answers):
        oddities.note("an answer is none of the entities, so that nobody can choose it", where)
    return row | {"entities": entities}


_SPAN = ("text", "start", "end")


def _texts(row: Row, key: str, where: str) -> list[str]:
    values: list[str] = _part(row, key, list, where)
    for i, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: field '{key}[{i}]' must be text, got {str(value)[:60]!r}")
    return values


# WSC: a line holds a text and a target, two spans with the index of their first word; flat: the spans as fields.


def _flat_wsc(row: Row, where: str, oddities: Oddities) -> Iterator[tuple[str, Row]]:
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


def _checked_wsc(row: Row, where: str, oddities: Oddities) -> Row:
    text = _part(row, "text", str, where)
    found: Row = {}
    for name in ("span1", "span2"):
        given, span = _part(row, f"{name}_index", int, where), _part(row, f"{name}_text", str, where)
        index = span_index(text, given, span)
        if index is None:
            raise DataError(f"{where}: field '{name}_text' is {span[:60]!r}, which stands nowhere in the text")
        if index != given:
            oddities.note("a span stands at another word than its index says, and the nearest is taken", where)
        found |= {f"{name}_index": index, f"{name}_text": _as_in_text(text, index, span)}
    row = row | found
    word = list(re.finditer(r"\S+", text))[row["span2_index"]]
    pronoun = re.compile(re.escape(row["span2_text"]), re.IGNORECASE).search(text, word.start(), word.end()) or word
    marked = f"{text[: pronoun.start()]}*{pronoun.group()}*{text[pronoun.end() :]}"
    return row | {"marked_text": marked, "candidates": _wsc_candidates(row, marked, where)}


def span_index(text: str, index: int, span: str) -> int | None:
    """The word at which a span begins, nearest to its index; None where the text has it nowhere.

    Case and attached punctuation differ in many official rows, and in a few other words stand between: such a span
    counts only where the text has it nowhere in one piece, and no farther off than an official index is.
    """
    parts = [(i, part) for i, word in enumerate(text.casefold().split()) for part in _WORD.findall(word)]
    places, words = [i for i, _ in parts], [part for _, part in parts]
    wanted = _WORD.findall(span.casefold())
    starts = [j for j, word in enumerate(words) if wanted and word == wanted[0]]
    whole = [j for j in starts if words[j : j + len(wanted)] == wanted]
    interrupted = [j for j in starts if abs(places[j] - index) <= 1 and _in_order(wanted, words[j:])]
    found = whole or interrupted
    # Of two that are equally near, the later: where an official index is wrong, the span stands at the next word.
    return min((places[j] for j in found), key=lambda place: (abs(place - index), -place), default=None)


def _in_order(wanted: list[str], words: list[str]) -> bool:
    rest = iter(words)
    return all(word in rest for word in wanted)


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


def _checked_copa(row: Row, where: str, oddities: Oddities) -> Row:
    question = _part(row, "question", str, where)
    if question not in ("cause", "effect"):
        raise DataError(f"{where}: field 'question' must be cause or effect, got {question[:60]!r}")
    statement = _part(row, "premise", str, where).strip().rstrip(".!")
    return row | {"statement": statement, "connective": {"cause": "because", "effect": "so"}[question]}


def _checked_wic(row: Row, where: str, oddities: Oddities) -> Row:
    for number in "12":
        sentence = _part(row, f"sentence{number}", str, where)
        if f"start{number}" in row or f"end{number}" in row:
            start, end = (_part(row, f"{key}{number}", int, where) for key in ("start", "end"))
            if not 0 <= start < end <= len(sentence):  # no text depends on it
                oddities.note("the place of the word is no part of its sentence", where)
    return row


def _checked_axg(row: Row, where: str, oddities: Oddities) -> Row:
    # The two of a pair follow each other, as jiant's scorer of the benchmark (jiant/metrics/winogender_metrics.py)
    # takes them; a wrong pair would show in its two hypotheses. The official file's pair_id differs within a pair,
    # and the hub's rows have none.
    if "idx" not in row:
        raise DataError(f"{where}: field 'idx' is missing, by which the two rows of a pair find each other")
    return row | {"pair": _part(row, "idx", int, where) // 2}


_FLATTEN: dict[str, Callable[[Row, str, Oddities], Iterator[tuple[str, Row]]]] = {
    "multirc": _flat_multirc,
    "record": _flat_record,
    "wsc": _flat_wsc,
}
_FLAT_FIELD = {"multirc": "paragraph", "record": "query", "wsc": "span1_text"}  # of a row that is flat already
_CHECK: dict[str, Callable[[Row, str, Oddities], Row]] = {
    "axg": _checked_axg,
    "copa": _checked_copa,
    "record": _checked_record,
    "wic": _checked_wic,
    "wsc": _checked_wsc,
}
