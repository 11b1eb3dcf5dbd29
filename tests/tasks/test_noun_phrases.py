"""Noun phrases by small words alone: what they are, and how many of a real task they find."""

import json

import pytest

from glmd.tasks.noun_phrases import noun_phrases
from glmd.tasks.superglue import flat_rows


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("The trophy does not fit in Ann's brown case.", ["The trophy", "Ann", "Ann's brown case"]),
        ("Mr. Bell gave his two sons three very old books", ["Mr. Bell", "two sons"]),
        ("She's here, and I saw it.", []),
        ("a cat and the cat, A cat", ["a cat", "the cat"]),
        ("", []),
        ("the", []),
        ("Ann Lee met Bob Ray Day Lee May.", ["Ann Lee", "Bob Ray Day", "Lee"]),
    ],
)
def test_noun_phrases_are_articles_with_words_and_names(text, phrases):
    assert noun_phrases(text) == phrases


def test_every_phrase_stands_in_the_text_as_it_is_given():
    text = "When Zoë\u2019s dog ran, the  big\ndog-cart of my uncle\u2019s friend broke."
    found = noun_phrases(text)
    assert found and all(phrase in text for phrase in found)


@pytest.mark.real
def test_most_phrases_that_wsc_asks_about_are_found(shared):
    lines = (shared / "data/fewglue/WSC/unlabeled.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines for _, row in flat_rows("wsc", json.loads(line), "row")]
    bare = [f" {row['span1_text'].casefold().removeprefix('the ').removeprefix('a ')} " for row in rows]
    found = sum(
        any(asked in f" {phrase.casefold()} " for phrase in noun_phrases(row["text"]))
        for asked, row in zip(bare, rows, strict=True)
    )
    assert found / len(rows) > 0.9
