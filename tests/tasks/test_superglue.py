"""The official rows of SuperGLUE: the same examples from the files and from the hub, and what is refused."""

import json

import datasets
import pytest
import yaml
from datasets import ClassLabel, Features, Sequence, Value

from glmd.data.oddities import Oddities
from glmd.errors import DataError
from glmd.evaluation.metrics import score
from glmd.tasks.examples import read_split
from glmd.tasks.superglue import checked, flat_rows, span_index
from glmd.tasks.tasks import load_task

# A row of each task in its official form. Every nested one holds more than one flat row.
PASSAGE = "Zoë Ray met Ray in Oslo.\n@highlight\nOslo was cold"
OFFICIAL = {
    "BoolQ": [{"question": "is it", "passage": "It is -- so.", "idx": 1, "label": True}],
    "CB": [{"premise": "p", "hypothesis": "h", "label": "neutral", "idx": 2}],
    "COPA": [
        {"premise": "It fell.", "choice1": "I let go.", "choice2": "I ate.", "question": "cause", "label": 0, "idx": 1},
        {
            "premise": "I ate.",
            "choice1": "It fell.",
            "choice2": "I was full.",
            "question": "effect",
            "label": 1,
            "idx": 0,
        },
    ],
    "MultiRC": [
        {
            "idx": 4,
            "version": 1.1,
            "passage": {
                "text": "Ann ate. Bob slept.",
                "questions": [
                    {
                        "question": "Who ate?",
                        "idx": 40,
                        "answers": [{"text": "Ann", "idx": 400, "label": 1}, {"text": "", "idx": 401, "label": 0}],
                    },
                    {"question": "Who slept?", "idx": 41, "answers": [{"text": "Bob", "idx": 402, "label": 1}]},
                ],
            },
        }
    ],
    "ReCoRD": [
        {
            "source": "CNN",
            "idx": 5,
            "passage": {
                "text": PASSAGE,
                "entities": [
                    {"start": 19, "end": 22},
                    {"start": 0, "end": 6},
                    {"start": 12, "end": 14},
                    {"start": 36, "end": 39},
                ],
            },
            "qas": [
                {
                    "query": "@placeholder was there.",
                    "idx": 50,
                    "answers": [{"start": 12, "end": 14, "text": "Ray"}, {"start": 0, "end": 6, "text": "Zoë Ray"}],
                },
                {
                    "query": "They liked @placeholder",
                    "idx": 51,
                    "answers": [{"start": 19, "end": 22, "text": "Oslo"}, {"start": 36, "end": 39, "text": "Oslo"}],
                },
            ],
        }
    ],
    "RTE": [{"premise": "p", "hypothesis": "h", "label": "not_entailment", "idx": 7}],
    "WiC": [
        {
            "word": "run",
            "sentence1": "They ran.",
            "sentence2": "Run",
            "start1": 5,
            "end1": 8,
            "start2": 0,
            "end2": 3,
            "version": 1.1,
            "idx": 8,
            "label": True,
        }
    ],
    "WSC": [
        {
            "text": 'The old cat saw  a dog, and the dog saw it, "because it barked."',
            "target": {"span1_text": "the old\ncat.", "span1_index": 0, "span2_text": "It", "span2_index": 10},
            "idx": 9,
            "label": True,
        }
    ],
    "AXb": [{"sentence1": "s", "sentence2": "t", "logic": "Negation", "label": "entailment", "idx": 10}],
    "AXg": [
        {"premise": "He did.", "hypothesis": "Ann did.", "label": "not_entailment", "pair_id": 551, "idx": 0},
        {"premise": "She did.", "hypothesis": "Ann did.", "label": "entailment", "pair_id": 553, "idx": 1},
        {"premise": "She ran.", "hypothesis": "Bob ran.", "label": "entailment", "pair_id": 17, "idx": 2},
    ],
}

# The hub's columns, from the loading script of aps/super_glue (version 1.0.3).
TEXT, NUMBER = Value("string"), Value("int32")
COLUMNS = {
    "BoolQ": {"question": TEXT, "passage": TEXT},
    "CB": {"premise": TEXT, "hypothesis": TEXT},
    "COPA": {"premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT},
    "MultiRC": {"paragraph": TEXT, "question": TEXT, "answer": TEXT},
    "ReCoRD": {
        "passage": TEXT,
        "query": TEXT,
        "entities": Sequence(TEXT),
        "entity_spans": Sequence({"text": TEXT, "start": NUMBER, "end": NUMBER}),
        "answers": Sequence(TEXT),
    },
    "RTE": {"premise": TEXT, "hypothesis": TEXT},
    "WiC": {
        "word": TEXT,
        "sentence1": TEXT,
        "sentence2": TEXT,
        "start1": NUMBER,
        "start2": NUMBER,
        "end1": NUMBER,
        "end2": NUMBER,
    },
    "WSC": {"text": TEXT, "span1_index": NUMBER, "span2_index": NUMBER, "span1_text": TEXT, "span2_text": TEXT},
    "AXb": {"sentence1": TEXT, "sentence2": TEXT},
    "AXg": {"premise": TEXT, "hypothesis": TEXT},
}
TRUTH, IMPLIED = ["False", "True"], ["entailment", "not_entailment"]
LABELS = {"CB": ["entailment", "contradiction", "neutral"], "COPA": ["choice1", "choice2"]}
LABELS |= {"BoolQ": TRUTH, "MultiRC": TRUTH, "WiC": TRUTH, "WSC": TRUTH, "RTE": IMPLIED, "AXb": IMPLIED, "AXg": IMPLIED}
IDX = {
    "MultiRC": {"paragraph": NUMBER, "question": NUMBER, "answer": NUMBER},
    "ReCoRD": {"passage": NUMBER, "query": NUMBER},
}


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hub_features(name: str) -> Features:
    label = {} if name == "ReCoRD" else {"label": ClassLabel(names=LABELS[name])}
    return Features({**COLUMNS[name], "idx": IDX.get(name, NUMBER), **label})


def hub_rows(name: str, rows: list[dict]) -> list[dict]:
    """What the hub makes of official rows, as plainly as it can be said."""
    flat = []
    for row in rows:
        if name == "MultiRC":
            for question in row["passage"]["questions"]:
                flat += [
                    {
                        "paragraph": row["passage"]["text"],
                        "question": question["question"],
                        "answer": answer["text"],
                        "label": answer.get("label"),
                        "idx": {"paragraph": row["idx"], "question": question["idx"], "answer": answer["idx"]},
                    }
                    for answer in question["answers"]
                ]
        elif name == "ReCoRD":
            text = row["passage"]["text"]
            ends = {each["start"]: each["end"] + 1 for each in row["passage"]["entities"]}
            entities = [text[start : ends[start]] for start in sorted(ends)]
            spans = {"text": entities, "start": sorted(ends), "end": [ends[start] for start in sorted(ends)]}
            flat += [
                {
                    "passage": text,
                    "query": query["query"],
                    "entities": list(set(entities)),  # in any order
                    "entity_spans": spans,
                    "answers": sorted({answer["text"] for answer in query.get("answers", [])}),
                    "idx": {"passage": row["idx"], "query": query["idx"]},
                }
                for query in row["qas"]
            ]
        else:
            row = {**row, **row.get("target", {})}
            if name == "WSC":
                for span in ("span1_text", "span2_text"):
                    row[span] = as_in_text(row["text"], row[span])
            flat.append({key: row.get(key) for key in (*COLUMNS[name], "idx", "label")})
    for row in flat:
        if name != "ReCoRD":
            label = row["label"]
            # Where labels are words or truth values they are the classes' names; where numbers, the class numbers.
            row["label"] = -1 if label is None else label if type(label) is int else LABELS[name].index(str(label))
    return flat


def as_in_text(text: str, span: str) -> str:
    """wsc.fixed: a span that is no part of the text gets the text's case (and loses its full stop)."""
    bare = " ".join(span.rstrip(".").split())
    start = text.lower().find(bare.lower())
    return span if span in text or start < 0 else text[start : start + len(bare)]


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Official rows of a task, written as a SuperGLUE folder and as the hub's parquet. The two sources."""
    load_dataset = datasets.load_dataset

    def load(source, *arguments, **options):
        assert source == "aps/super_glue"
        return load_dataset(str(tmp_path / "hub"), *arguments, **options, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)

    def write(name: str, rows: list[dict]) -> tuple[str, str]:
        task = load_task(name)
        official = tmp_path / "official" / task.folder / "test.jsonl"
        official.parent.mkdir(parents=True)
        official.write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = datasets.Dataset.from_list(hub_rows(name, rows), features=hub_features(name))
        table.to_parquet(str(tmp_path / "hub" / task.hub_name / "test.parquet"))
        files = [{"split": "test", "path": f"{task.hub_name}/test.parquet"}]
        front = yaml.safe_dump({"configs": [{"config_name": task.hub_name, "data_files": files}]})
        (tmp_path / "hub" / "README.md").write_text(f"---\n{front}---\n")
        return str(tmp_path / "official"), "aps/super_glue"

    return write


def without_labels(value):
    if isinstance(value, dict):
        return {key: without_labels(each) for key, each in value.items() if key not in ("label", "answers")} | (
            {"answers": [without_labels(each) for each in value["answers"]]}
            if value.get("answers") and "idx" in value["answers"][0]  # of MultiRC, not the right ones of ReCoRD
            else {}
        )
    return [without_labels(each) for each in value] if isinstance(value, list) else value


# The two sources


def groups(examples) -> list[int]:
    """For each example, the first one of its group: the hub may name groups differently."""
    return [[e.group for e in examples].index(example.group) for example in examples]


def assert_equal_examples(task, official: str, hub: str, *, require_labels: bool) -> None:
    for training in (False, True):
        read = {"split": "test", "require_labels": require_labels, "training": training}
        ours, theirs = read_split(task, official, **read), read_split(task, hub, **read)
        fields = ("example_id", "texts", "label", "idx", "choices", "answers")
        assert [[getattr(e, f) for f in fields] for e in ours] == [[getattr(e, f) for f in fields] for e in theirs]
        assert groups(ours) == groups(theirs)


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_the_files_and_the_hub_give_the_same_examples(put, name):
    assert_equal_examples(load_task(name), *put(name, OFFICIAL[name]), require_labels=True)


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_the_files_and_the_hub_give_the_same_examples_without_labels(put, name):
    official, hub = put(name, without_labels(OFFICIAL[name]))
    assert_equal_examples(load_task(name), official, hub, require_labels=False)
    assert {e.label for e in read_split(load_task(name), hub, "test", require_labels=False)} == {None}


@pytest.mark.parametrize("name", ["MultiRC", "ReCoRD", "WSC"])
def test_a_flat_row_has_the_hubs_fields(name):
    task = load_task(name)
    flat = [row for official in OFFICIAL[name] for _, row in flat_rows(task.rows, official, "file:1")]
    expected = hub_rows(name, OFFICIAL[name])
    assert len(flat) == len(expected) == {"MultiRC": 3, "ReCoRD": 2, "WSC": 1}[name]
    for ours, theirs in zip(flat, expected, strict=True):
        assert ours.keys() == theirs.keys()
        if name == "ReCoRD":
            ours["entities"], theirs["entities"] = sorted(set(ours["entities"])), sorted(theirs["entities"])
        assert ours == theirs


# What a model reads


def read(name: str, rows: list[dict], tmp_path, **options):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_split(load_task(name), str(path), "val", **{"require_labels": True, **options})


def test_copa_asks_for_the_cause_or_the_effect(tmp_path):
    cause, effect = read("COPA", OFFICIAL["COPA"], tmp_path)
    assert cause.texts == (
        ("It fell. What was the cause?", "I let go."),
        ("It fell. What was the cause?", "I ate."),
    )
    assert effect.texts[1] == ("I ate. What was the effect?", "I was full.")
    assert (cause.label, effect.label) == (0, 1)


def test_multirc_has_an_example_for_each_answer_in_the_group_of_its_question(tmp_path):
    examples = read("MultiRC", OFFICIAL["MultiRC"], tmp_path)
    assert [e.texts[0][1] for e in examples] == ["Who ate? Ann", "Who ate? ", "Who slept? Bob"]
    assert {e.texts[0][0] for e in examples} == {"Ann ate. Bob slept."}
    assert [e.label for e in examples] == [1, 0, 1]
    assert [e.group for e in examples] == [(4, 40), (4, 40), (4, 41)]


def test_record_puts_each_entity_into_the_query(tmp_path):
    first, second = read("ReCoRD", OFFICIAL["ReCoRD"], tmp_path)
    assert first.choices == second.choices == ("Oslo", "Ray", "Zoë Ray")
    assert first.texts == tuple((PASSAGE, f"{name} was there.") for name in first.choices)
    assert second.texts[0] == (PASSAGE, "They liked Oslo")
    assert (first.answers, first.label) == (("Ray", "Zoë Ray"), 1)
    assert (second.answers, second.label) == (("Oslo",), 0)


def test_wsc_marks_the_pronoun_that_is_meant_and_leaves_the_text_as_it_is(tmp_path):
    (example,) = read("WSC", OFFICIAL["WSC"], tmp_path)
    text = 'The old cat saw  a dog, and the dog saw *it*, "because it barked."'
    assert example.texts == ((text, "it refers to The old cat"), (text, "it refers to a dog"))


def wsc(label: bool | None, **more) -> list[dict]:
    (row,) = OFFICIAL["WSC"]
    return [{**row, "label": label, **more}]


def test_wsc_asks_whether_the_first_candidate_is_the_right_one(tmp_path):
    for label, answers in ((True, ("The old cat",)), (False, ()), (None, ())):
        (example,) = read("WSC", wsc(label), tmp_path, require_labels=label is not None)
        assert (example.choices, example.answers) == (("The old cat", "a dog"), answers)
        assert example.label == (None if label is None else int(label))


def test_wsc_learns_from_labels_only_where_the_right_candidate_is_told(tmp_path):
    (example,) = read("WSC", wsc(True), tmp_path, training=True)
    assert (example.choices[example.label], set(example.choices)) == ("The old cat", {"The old cat", "a dog"})
    found = refusal(read, "WSC", wsc(False), tmp_path, training=True)
    assert found.endswith("WSC has no rows labeled true to learn from in val")
    for label in (True, False, None):  # inputs teach the same with labels and without
        (example,) = read("WSC", wsc(label), tmp_path, training=True, require_labels=False)
        assert (set(example.choices), example.label) == ({"The old cat", "a dog"}, None)


def test_wsc_takes_the_candidates_of_a_row_before_its_own_and_no_name_twice(tmp_path):
    names = ["the cat", "A bird", "an old cat", "The Bird", "it", "two fish"]
    (example,) = read("WSC", wsc(True, candidates=names), tmp_path)
    assert example.choices == ("The old cat", "the cat", "A bird", "two fish")
    assert "field 'candidates[1]' must be text" in refusal(read, "WSC", wsc(True, candidates=["a", 2]), tmp_path)
    assert "field 'candidates' must be a list" in refusal(read, "WSC", wsc(True, candidates="a"), tmp_path)


@pytest.mark.parametrize("names", [["the old cat"], ["Old cat", "THE OLD CAT"], ["it", "It"], ["!!!"]])
def test_candidates_that_leave_no_choice_are_refused(names, tmp_path):
    found = refusal(read, "WSC", wsc(True, candidates=names), tmp_path)
    assert found.endswith("field 'candidates' has nothing besides 'The old cat', of which the row asks; add others")


def test_rows_whose_text_leaves_no_choice_are_counted_in_a_warning(tmp_path, caplog):
    target = {"span1_text": "The drain", "span1_index": 0, "span2_text": "It", "span2_index": 5}
    row = {"text": "The drain is clogged often. It has to go.", "target": target, "label": True, "idx": 0}
    (example,) = read("WSC", [row], tmp_path)
    assert example.choices == ("The drain",) and "in 1 of 1 rows nothing but the phrase" in caplog.text


def test_a_phrase_that_the_pronoun_opens_is_no_candidate(tmp_path):
    target = {"span1_text": "Ann", "span1_index": 0, "span2_text": "his", "span2_index": 4}
    row = {"text": "Ann told Bob that his old key was lost.", "target": target, "label": False, "idx": 0}
    assert read("WSC", [row], tmp_path)[0].choices == ("Ann", "Bob")


@pytest.mark.parametrize(
    ("text", "index", "span", "marked"),
    [
        ('Ann said: "He left."', 2, "he", 'Ann said: "*He* left."'),
        ('Ann saw him," he said.', 2, "him", 'Ann saw *him*," he said.'),
        ("It rained; it stopped", 2, "It", "It rained; *it* stopped"),
        ("that\u00a0it is", 1, "it", "that\u00a0*it* is"),
    ],
)
def test_a_pronoun_is_marked_without_its_punctuation(text, index, span, marked):
    row = {"text": text, "target": {"span1_text": text.split()[0], "span1_index": 0, "span2_text": span}}
    row["target"]["span2_index"] = index
    ((where, flat),) = flat_rows("wsc", row, "file:1")
    assert checked("wsc", flat, where)["marked_text"] == marked


def test_a_wsc_span_may_be_interrupted_in_the_text():
    target = {"span1_text": "Ann and Bob", "span1_index": 1, "span2_text": "they", "span2_index": 9}
    text = "When Ann, who ran, met Cleo and Bob again, they laughed."
    ((where, flat),) = flat_rows("wsc", {"text": text, "target": target}, "file:1")
    assert (flat["span1_text"], flat["span2_text"]) == ("Ann and Bob", "they")
    assert "*they* laughed" in checked("wsc", flat, where)["marked_text"]


def test_a_wsc_span_that_is_in_the_text_anywhere_keeps_its_spelling():
    target = {"span1_text": "the cat", "span1_index": 0, "span2_text": "it", "span2_index": 3}
    ((_, flat),) = flat_rows("wsc", {"text": "The cat knew it was the cat.", "target": target}, "file:1")
    assert flat["span1_text"] == "the cat"  # as in the hub's wsc.fixed


def test_a_pair_of_axg_is_known_without_its_number_from_the_place():
    rows = [checked("axg", {"idx": i, "hypothesis": "h"}, "file:1") for i in range(4)]
    assert [row["pair"] for row in rows] == [0, 0, 1, 1]
    assert checked("axg", {"idx": 3, "pair_id": 9}, "file:1")["pair"] == 1, "the official numbers differ in a pair"


# Refusals


def changed(row, path: str, value):
    """A deep copy with the value at `a.0.b` replaced; ... removes it."""
    copy = json.loads(json.dumps(row))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner = copy
    for part in parents:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return copy


WRONG = [
    ("BoolQ", "label", "yes", "field 'label' must be one of false, true; got \"yes\""),
    (
        "CB",
        "label",
        "entailed",
        'field \'label\' must be one of "entailment", "contradiction", "neutral"; got "entailed"',
    ),
    ("COPA", "label", 2, "field 'label' must be one of 0, 1; got 2"),
    ("COPA", "question", "reason", "field 'question' must be cause or effect, got 'reason'"),
    ("COPA", "question", ..., "field 'question' is missing"),
    ("COPA", "choice2", ..., "field 'choice2' is missing; did you mean choice1?"),
    ("MultiRC", "passage", ..., "field 'passage' is missing; known: idx, version"),
    ("MultiRC", "passage", "text", "field 'passage' must be an object, got 'text'"),
    ("MultiRC", "idx", ..., "field 'idx' is missing"),
    ("MultiRC", "passage.questions", {}, "field 'passage.questions' must be a list, got '{}'"),
    ("MultiRC", "passage.questions.1", "Who?", "field 'passage.questions[1]' must be an object, got 'Who?'"),
    ("MultiRC", "passage.questions.1.idx", 40, "field 'passage.questions[1].idx' is 40, as in passage.questions[0]"),
    ("MultiRC", "passage.questions.1.idx", True, "field 'passage.questions[1].idx' must be a whole number, got 'True'"),
    ("MultiRC", "passage.questions.0.answers", ..., "field 'passage.questions[0].answers' is missing"),
    ("MultiRC", "passage.questions.0.answers.1.text", 3, "field 'passage.questions[0].answers[1].text' must be text"),
    (
        "MultiRC",
        "passage.questions.0.answers.1.label",
        2,
        "passage.questions[0].answers[1]: field 'label' must be one of 0, 1; got 2",
    ),
    ("MultiRC", "passage.questions.0.answers.1.idx", 400, "as in "),
    ("ReCoRD", "passage.entities", ..., "field 'passage.entities' is missing"),
    ("ReCoRD", "passage.entities", [], "field 'passage.entities' holds no part of the passage; at least one is needed"),
    ("BoolQ", "passage", 3, "field 'passage' must be text, got 3"),
    ("ReCoRD", "passage.entities.2.end", ..., "field 'passage.entities[2].end' is missing"),
    ("ReCoRD", "qas.0.query", "Ray was there.", "qas[0]: '@placeholder' stands in none of the fields passage, query"),
    ("ReCoRD", "qas.1.answers", ..., "qas[1]: field 'answers' must list the right candidates; the row has none"),
    ("ReCoRD", "qas.1.idx", 50, "qas[1]: field 'idx' is"),
    ("WiC", "end2", ..., "field 'end2' is missing"),
    ("WSC", "target", ..., "field 'target' is missing"),
    ("WSC", "target.span1_text", ..., "field 'target.span1_text' is missing; did you mean span2_text?"),
    ("WSC", "target.span1_text", "the old fox", "field 'span1_text' is 'the old fox', which stands nowhere in the"),
    ("WSC", "target.span2_text", "i", "field 'span2_text' is 'i', which stands nowhere in the text"),
    ("WSC", "target.span2_text", "", "field 'span2_text' is '', which stands nowhere in the text"),
    ("WSC", "label", "True", "field 'label' must be one of false, true; got \"True\""),
    ("AXg", "hypothesis", ..., "field 'hypothesis' is missing"),
]


@pytest.mark.parametrize(("name", "path", "value", "says"), WRONG)
def test_a_row_that_cannot_serve_is_named_by_line_and_field(tmp_path, name, path, value, says):
    good = OFFICIAL[name][0]
    assert read(name, [good], tmp_path)
    message = refusal(read, name, [{**good, "idx": 1000}, changed(good, path, value)], tmp_path)
    assert message.startswith(f"{tmp_path / name}.jsonl:2: ")
    assert says in message


def test_positions_that_a_wic_row_does_not_give_are_not_asked_for(tmp_path):
    row = {key: OFFICIAL["WiC"][0][key] for key in ("word", "sentence1", "sentence2", "label")}
    assert read("WiC", [row], tmp_path)[0].texts == (("run: They ran.", "Run"),)


# Oddities: what a few official rows have wrong, counted in one warning

ODD = [
    ("BoolQ", "passage", "", "field 'passage' is blank"),
    ("MultiRC", "passage.questions.0.question", " ", "field 'question' is blank"),
    ("MultiRC", "passage.questions", [], "a passage has no questions"),
    ("MultiRC", "passage.questions.0.answers", [], "a question has no answers"),
    ("ReCoRD", "qas", [], "a passage has no queries"),
    ("ReCoRD", "passage.entities.0.end", len(PASSAGE), "an entity lies outside its passage and is left out"),
    ("ReCoRD", "passage.entities.0.start", -1, "an entity lies outside its passage"),
    ("ReCoRD", "passage.entities.0.start", 23, "an entity lies outside its passage"),
    ("ReCoRD", "qas.0.answers.1.end", 99, "an answer does not stand where its row says"),
    ("ReCoRD", "qas.0.answers.0.text", "Roy", "an answer is none of the entities"),
    ("WiC", "end1", 10, "the place of the word is no part of its sentence"),
    ("WiC", "start2", 3, "the place of the word is no part of its sentence"),
    ("WiC", "start1", -1, "the place of the word is no part of its sentence"),
    ("WSC", "target.span1_index", 14, "a span stands at another word than its index says"),
    ("WSC", "target.span1_index", -1, "a span stands at another word"),
    ("WSC", "target.span1_text", "old cat", "a span stands at another word"),
    ("WSC", "target.span2_index", 9, "a span stands at another word"),
    ("WSC", "target.span2_index", 13, "a span stands at another word"),
]


@pytest.mark.parametrize(("name", "path", "value", "says"), ODD)
def test_an_odd_official_row_is_read_and_counted_in_one_warning(tmp_path, caplog, name, path, value, says):
    good = OFFICIAL[name][0]
    plain = read(name, [good], tmp_path)
    caplog.clear()
    odd = changed(good, path, value)
    odd = {**odd, "idx": 1000} if name != "ReCoRD" else changed(changed(odd, "idx", 9), "qas", odd["qas"][:1])
    examples = read(name, [good, odd], tmp_path)
    assert [each.texts for each in examples[: len(plain)]] == [each.texts for each in plain]
    warnings = [record.getMessage() for record in caplog.records if "odd" in record.getMessage()]
    assert len(warnings) == 1 and says in warnings[0] and f"{tmp_path / name}.jsonl:2" in warnings[0]


@pytest.mark.parametrize(
    ("text", "index", "span", "expected"),
    [
        ("They want to use it , and it broke .", 3, "it", 4),  # as in an official row: one word off
        ("It is cold and it is wet", 3, "it", 4),
        ("It is cold and it is wet", 1, "It", 0),
        ("a it b it c", 2, "it", 3),  # equally near: the later
        ("the cat and the dog", 0, "the dog", 3),  # rather in one piece than interrupted
        ("Lev Kamen, his friend, and Gregor Zino met", 0, "Kamen and Zino", 1),
        ("Lev Kamen, his friend, and Gregor Zino met", 3, "Kamen and Zino", None),
        ("it", 40, "IT!", 0),
        ("the old cat", 0, "cats", None),
        ("the old cat", 0, " ", None),
    ],
)
def test_a_wsc_span_is_taken_where_it_stands_nearest(text, index, span, expected):
    assert span_index(text, index, span) == expected


def test_a_span_that_is_one_word_off_gives_the_same_example(tmp_path):
    (row,) = OFFICIAL["WSC"]
    off = changed(row, "target.span2_index", 9)
    assert read("WSC", [off], tmp_path)[0].texts == read("WSC", [row], tmp_path)[0].texts


def test_an_answer_that_is_no_entity_is_scored_and_not_trained_on(tmp_path):
    task, row = load_task("ReCoRD"), changed(OFFICIAL["ReCoRD"][0], "qas.0.answers", [{"text": "Roy"}])
    first, second = read("ReCoRD", [row], tmp_path)
    assert (first.label, first.answers, first.is_labeled) == (None, ("Roy",), True)
    assert score(task, [0, 0], [first, second])["record_exact_match"] == 0.5
    assert {e.idx["query"] for e in read("ReCoRD", [row], tmp_path, training=True)} == {51}


@pytest.mark.parametrize("as_objects", [False, True])
def test_an_entity_of_the_hub_that_stands_elsewhere_is_counted(as_objects):
    row, _ = hub_rows("ReCoRD", OFFICIAL["ReCoRD"])

    def check(columns):
        objects = [dict(zip(columns, span, strict=True)) for span in zip(*columns.values(), strict=True)]
        oddities = Oddities()
        flat = checked("record", row | {"entity_spans": objects if as_objects else columns}, "hub row 1", oddities)
        assert flat["entities"] == ["Oslo", "Ray", "Zoë Ray"]
        return oddities.counts.total()

    assert check(row["entity_spans"]) == 0
    assert check({**row["entity_spans"], "end": [7, 14, 23, 40]}) == 1


def test_an_older_hub_file_without_places_of_entities_serves():
    row, _ = hub_rows("ReCoRD", OFFICIAL["ReCoRD"])
    del row["entity_spans"]
    assert checked("record", row, "hub row 1")["entities"] == ["Oslo", "Ray", "Zoë Ray"]


# The real files


@pytest.mark.real
@pytest.mark.parametrize("name", ["COPA", "MultiRC", "ReCoRD", "WiC", "WSC"])
@pytest.mark.parametrize("file", ["train", "dev32"])
def test_the_real_rows_are_the_same_through_the_hub(shared, put, name, file):
    path = shared / "data" / "fewglue" / name / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert_equal_examples(load_task(name), *put(name, rows), require_labels=True)


@pytest.mark.real
@pytest.mark.parametrize("file", ["train", "dev32", "unlabeled"])
def test_every_real_wsc_text_is_marked_once_at_the_pronoun(shared, file):
    source = str(shared / "data" / "fewglue" / "WSC" / f"{file}.jsonl")
    for example in read_split(load_task("WSC"), source, "train", require_labels=False):
        text, pair = example.texts[0]
        before, pronoun, after = text.split("*")
        assert pronoun == pair.split(" refers to ")[0]
        assert pair.endswith(f" refers to {example.choices[0]}")
        assert not (before[-1:] + after[:1]).isalnum()
