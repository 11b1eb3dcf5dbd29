"""A small world that makes its own data: a corpus and two tasks about invented people, and a tokenizer for them.

    build_synthetic(Path("world"), seed=0)   # corpus.txt, superglue/{RTE,BoolQ}/*.jsonl, tokenizer/, manifest.json

A person has a craft, a home, a birthplace, a beast, a market day and a friend. Every sentence puts one of these
facts into a phrasing, and often into a frame that affirms or denies it. Names are made of syllables and drawn with a
long tail. The corpus teaches the language and how the world is: what a potter works with, in which shire a town
lies. RTE asks whether a premise implies a sentence, BoolQ asks about a passage; half of the answers are no, because
the text denies the fact, tells another value or (RTE) does not tell it.

Held out: corpus, train, val and test tell of four disjoint sets of people, so no fact about a person in val occurs
in train or in the corpus. The last phrasing of every fact and the last frame of both kinds never occur in train; val
and test use them like the others. They do occur in the corpus, about other people.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from random import Random
from string import ascii_lowercase, digits, punctuation
from typing import Any, TypeVar

from glmd.errors import DataError, DiskError

T = TypeVar("T")

VERSION = 1  # raised when the bytes change
PEOPLE = {"corpus": 5000, "train": 3000, "val": 800, "test": 300}
LIVES = 7000  # documents of the corpus; besides, every town has one
EXAMPLES = {"train": 2500, "val": 800, "test": 300}  # of each task; train is as small as RTE's
FACTS_TOLD = {"RTE": (1, 1, 2), "BoolQ": (1, 2)}  # in a text; each entry is equally likely, here and below
WHY_NOT = {"RTE": ["denied"] * 8 + ["wrong", "untold"], "BoolQ": ["denied"] * 9 + ["wrong"]}  # of a false claim
MINIMUM_COUNT = 3  # a word that the corpus uses less often is written in pieces
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _words(text: str) -> list[str]:
    return text.split()


# Who; what they make, of what, with what. No word serves two crafts, so each word implies the other three.
_CRAFT_WORDS = _words("""
    potter pots clay wheel   weaver cloth wool loom   baker loaves flour oven
    smith nails iron anvil   mason walls stone chisel   carpenter tables oak saw
    cooper barrels ash hoop   tanner hides bark vat   cobbler boots leather awl
    tailor coats linen needle   brewer ale barley kettle   vintner wine grapes press
    miller meal wheat millstone   dairyman cheese milk churn   beekeeper honey wax hive
    fisher nets twine boat   thatcher roofs reed ladder   glazier windows glass pipe
    chandler candles tallow mould   ropemaker ropes hemp hook   basketmaker baskets willow knife
    dyer dyes madder cauldron   printer books paper ink   painter pictures canvas brush
    goldsmith rings gold tongs   tinker pans tin solder   bellfounder bells bronze furnace
    clockmaker clocks brass spring   luthier fiddles maple glue   hatter hats felt block
    glover gloves kid shears   saddler saddles pigskin stitch   wheelwright carts elm spokeshave
    charcoaler charcoal alder axe   salter salt brine pan   soapmaker soap lye paddle
    papermaker cards rags sieve   furrier cloaks fur comb   lacemaker lace silk bobbin
    cutler blades steel grindstone
""")
CRAFTS = [tuple(_CRAFT_WORDS[start : start + 4]) for start in range(0, len(_CRAFT_WORDS), 4)]
BEASTS = _words(
    "goat cow horse dog cat hen goose duck sheep pig donkey mule rabbit pigeon hawk ferret raven hound pony swan"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ONSETS = _words("b br c d dr f fr g gl gr h j k l m n p pr r s st t tr v w")
VOWELS = _words("a e i o u ae ea")
CODAS = ["", *_words("l n r s m nd rn ld sk")]
NAMES = {  # how many names of a kind there are, and how they end
    "first name": (400, _words("a ia ena ette isa o an ric us in")),
    "surname": (800, _words("son er ell ock ard man well")),
    "town": (600, _words("ford wick by ham ton mere dale beck stead")),
    "river": (120, _words("en ow ey")),
    "shire": (24, ["shire"]),
}

# fact -> (statement, question) phrasings; the last is held out of train. {n} is the name, {v} the value.
PHRASINGS = {
    "craft": [
        ("{n} is a {v}", "is {n} a {v}"),
        ("{n} works as a {v}", "does {n} work as a {v}"),
        ("{n} has long been a {v}", "has {n} long been a {v}"),
        ("by trade {n} is a {v}", "is {n} a {v} by trade"),
        ("{n} earns a living as a {v}", "does {n} earn a living as a {v}"),
    ],
    "goods": [
        ("{n} makes {v}", "does {n} make {v}"),
        ("{n} sells {v} of good quality", "does {n} sell {v}"),
        ("people buy {v} from {n}", "do people buy {v} from {n}"),
        ("{n} is known for fine {v}", "is {n} known for fine {v}"),
    ],
    "material": [
        ("{n} works with {v}", "does {n} work with {v}"),
        ("{n} needs {v} every week", "does {n} need {v} every week"),
        ("the workshop of {n} is full of {v}", "is the workshop of {n} full of {v}"),
        ("{n} knows all about {v}", "does {n} know all about {v}"),
    ],
    "tool": [
        ("{n} owns a fine {v}", "does {n} own a {v}"),
        ("{n} uses a {v} all day", "does {n} use a {v}"),
        ("{n} cannot work without a {v}", "does the work of {n} call for a {v}"),
    ],
    "home": [
        ("{n} lives in {v}", "does {n} live in {v}"),
        ("{n} has a house in {v}", "does {n} have a house in {v}"),
        ("the home of {n} is in {v}", "is the home of {n} in {v}"),
        ("{n} settled in {v}", "did {n} settle in {v}"),
    ],
    "birthplace": [
        ("{n} was born in {v}", "was {n} born in {v}"),
        ("{n} comes from {v}", "does {n} come from {v}"),
        ("{n} grew up in {v}", "did {n} grow up in {v}"),
        ("{n} spent a childhood in {v}", "did {n} spend a childhood in {v}"),
    ],
    "beast": [
        ("{n} keeps a {v}", "does {n} keep a {v}"),
        ("{n} has a {v} at home", "does {n} have a {v} at home"),
        ("{n} feeds an old {v}", "does {n} feed a {v}"),
        ("{n} is fond of a {v}", "is {n} fond of a {v}"),
    ],
    "day": [
        ("{n} goes to market on {v}", "does {n} go to market on {v}"),
        ("{n} visits the market every {v}", "does {n} visit the market every {v}"),
        ("on {v} {n} is at the market", "is {n} at the market on {v}"),
        ("{n} never misses the {v} market", "does {n} go to the {v} market"),
    ],
    "friend": [
        ("{n} is a friend of {v}", "is {n} a friend of {v}"),
        ("{n} often meets {v}", "does {n} often meet {v}"),
        ("{n} trusts {v}", "does {n} trust {v}"),
        ("{n} likes to talk to {v}", "does {n} like to talk to {v}"),
    ],
}
# A frame affirms or denies the statement {s}; the last of each is held out of train.
FRAMES = {
    True: [
        "{s}",
        "it is true that {s}",
        "the clerk confirms that {s}",
        "everyone knows that {s}",
        "we all agree that {s}",
        "it is certain that {s}",
    ],
    False: [
        "it is false that {s}",
        "it is not true that {s}",
        "the clerk denies that {s}",
        "nobody thinks that {s}",
        "we do not agree that {s}",
        "it is a lie that {s}",
    ],
}
PHRASINGS["shire"] = PHRASINGS["home"]
# What is told of a topic implies its other facts: a craft's words imply each other, a town implies its shire.
TOPICS = {
    "craft": ["craft", "goods", "material", "tool"],
    "home": ["home", "shire"],
    "birthplace": ["birthplace"],
    "beast": ["beast"],
    "day": ["day"],
    "friend": ["friend"],
}


@dataclass(frozen=True)
class Person:
    """A full name and the value of every fact, spelled as in running text."""

    name: str
    facts: dict[str, str]


class Draw:
    """Random draws made of `Random.random` alone, whose sequence Python promises to keep."""

    def __init__(self, seed: str) -> None:
        self.random = Random(seed).random

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def tail(self, items: Sequence[T]) -> T:
        """Item number r, counted from 0, with weight 1 / (r + 8)."""
        cumulative = _tail_weights(len(items))
        return items[bisect(cumulative, self.random() * cumulative[-1], hi=len(items) - 1)]

    def tail_but(self, items: Sequence[T], excluded: T) -> T:
        while (item := self.tail(items)) == excluded:
            pass
        return item

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return sorted(items, key=lambda _: self.random())


@lru_cache
def _tail_weights(length: int) -> list[float]:
    return list(accumulate(1 / (rank + 8) for rank in range(length)))


class World:
    """Names, geography and people, all drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self.draw = Draw(f"world {seed}")
        self.names = self._make_names()
        self.shire_of = {town: self.draw.pick(self.names["shire"]) for town in self.names["town"]}
        self.river_of = {town: self.draw.pick(self.names["river"]) for town in self.names["town"]}
        self.people = self._make_people()

    def _make_names(self) -> dict[str, list[str]]:
        """Invented names of every kind, no two alike and none an English word used here."""
        english = {word for pairs in PHRASINGS.values() for pair in pairs for text in pair for word in text.split()}
        taken = {word.lower() for word in english.union(BEASTS, DAYS, *CRAFTS)}
        names: dict[str, list[str]] = {}
        for kind, (number, endings) in NAMES.items():
            names[kind] = []
            while len(names[kind]) < number:
                name = "".join(self.draw.pick(part) for part in (ONSETS, VOWELS, CODAS, endings))
                if name not in taken:
                    taken.add(name)
                    names[kind].append(name.capitalize())
        return names

    def _make_people(self) -> dict[str, list[Person]]:
        """The people of every split; a full name, friends included, belongs to one split only."""
        people: dict[str, list[Person]] = {}
        taken: set[str] = set()
        for split, number in PEOPLE.items():
            names: list[str] = []
            while len(names) < number:
                name = f"{self.draw.tail(self.names['first name'])} {self.draw.tail(self.names['surname'])}"
                if name not in taken:
                    taken.add(name)
                    names.append(name)
            people[split] = [Person(name, self._make_facts(name, names)) for name in names]
        return people

    def _make_facts(self, name: str, names: list[str]) -> dict[str, str]:
        facts = dict(zip(TOPICS["craft"], self.draw.tail(CRAFTS), strict=True))
        facts["home"] = self.draw.tail(self.names["town"])
        facts["shire"] = self.shire_of[facts["home"]]
        facts["birthplace"] = self.draw.tail_but(self.names["town"], facts["home"])
        facts["beast"], facts["day"] = self.draw.tail(BEASTS), self.draw.pick(DAYS)
        facts["friend"] = self.draw.tail_but(names, name)
        return facts

    def wrong_value(self, split: str, person: Person, fact: str) -> str:
        """Drawn as the right values are, because it is right for somebody else."""
        while (value := self.draw.pick(self.people[split]).facts[fact]) in (person.facts[fact], person.name):
            pass
        return value

    def phrasing(self, split: str, fact: str) -> tuple[str, str]:
        """A (statement, question) pair; train never meets the last one."""
        return self.draw.pick(PHRASINGS[fact][: -1 if split == "train" else None])

    def statement(self, split: str, subject: str, fact: str, value: str, *, affirmed: bool) -> str:
        """A statement in a frame; half of what is affirmed is said plainly."""
        frames = FRAMES[affirmed][: -1 if split == "train" else None]
        frame = "{s}" if affirmed and self.draw.random() < 0.5 else self.draw.pick(frames)
        return _sentence(frame.format(s=self.phrasing(split, fact)[0].format(n=subject, v=value)))

    def documents(self) -> Iterator[list[str]]:
        """Lives and towns; a document is a list of paragraphs."""
        people = self.people["corpus"]
        for number in range(LIVES):
            topics = self.draw.shuffled(list(TOPICS))
            person = people[number % len(people)]
            yield [self._paragraph(person, topics[start : start + 2]) for start in (0, 2)]
        for town in self.names["town"]:
            river, shire = self.river_of[town], self.shire_of[town]
            yield [f"{town} lies on the {river} in {shire}. The people of {town} are proud of {shire}."]

    def _paragraph(self, person: Person, topics: list[str]) -> str:
        """Every topic twice, in other words: what was affirmed stands, what was denied is put right."""
        sentences, subject = [], person.name
        for topic in topics:
            first, second = (self.draw.shuffled(TOPICS[topic]) * 2)[:2]
            affirmed = self.draw.random() < 0.6
            value = person.facts[first] if affirmed else self.wrong_value("corpus", person, first)
            sentences.append(self.statement("corpus", subject, first, value, affirmed=affirmed))
            subject = self.draw.pick([person.name, person.name.split()[0]])
            sentences.append(self.statement("corpus", subject, second, person.facts[second], affirmed=True))
        return " ".join(sentences)

    def example(self, task: str, split: str, label: bool) -> tuple[str, str, str, str]:
        """A text about one person and a claim: (text, name, fact, value). `label`: the text implies the claim."""
        person = self.draw.pick(self.people[split])
        topics = self.draw.shuffled(list(TOPICS))
        told = topics[: self.draw.pick(FACTS_TOLD[task])]
        reason = "told" if label else self.draw.pick(WHY_NOT[task])
        topic = topics[-1] if reason == "untold" else self.draw.pick(told)
        fact = self.draw.pick(TOPICS[topic])
        value = person.facts[fact] if reason in ("told", "untold") else self.wrong_value(split, person, fact)
        sentences, subject = [], person.name
        for each in told:
            if each != topic:
                affirmed, told_fact = self.draw.random() < 0.5, self.draw.pick(TOPICS[each])
                told_value = person.facts[told_fact] if affirmed else self.wrong_value(split, person, told_fact)
            elif reason == "denied":
                affirmed, told_fact, told_value = False, fact, value
            else:  # a shire does not tell the town, so of a home the town is told
                affirmed, told_fact = True, topic if topic == "home" else self.draw.pick(TOPICS[topic])
                told_value = person.facts[told_fact]
            sentences.append(self.statement(split, subject, told_fact, told_value, affirmed=affirmed))
            subject = person.name.split()[0]
        return " ".join(sentences), person.name, fact, value

    def rows(self, task: str, split: str) -> Iterator[dict[str, Any]]:
        """Examples with SuperGLUE's fields, as many true as false; test has no labels."""
        labels = self.draw.shuffled([True, False] * (EXAMPLES[split] // 2))
        for number, label in enumerate(labels):
            text, name, fact, value = self.example(task, split, label)
            statement, question = (each.format(n=name, v=value) for each in self.phrasing(split, fact))
            if task == "RTE":
                row: dict[str, Any] = {"premise": text, "hypothesis": _sentence(statement)}
                answer: dict[str, Any] = {"label": "entailment" if label else "not_entailment"}
            else:
                row, answer = {"question": question.lower(), "passage": text}, {"label": label}
            yield row | (answer if split != "test" else {}) | {"idx": number}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def make_vocabulary(documents: list[list[str]]) -> list[str]:
    """Special tokens, the corpus's words by count and then by letters, every character, the names' endings.

    No trainer: an entry's place follows from counts and letters alone, never from the order of a hash table.
    """
    text = " ".join(paragraph for document in documents for paragraph in document).lower()
    counts = Counter(re.findall(r"\w+|[^\w\s]", text))
    words = sorted((word for word, count in counts.items() if count >= MINIMUM_COUNT), key=lambda w: (-counts[w], w))
    characters = sorted(set(text) - {" "} | set(ascii_lowercase + digits + punctuation))
    endings = sorted({ending for _, endings in NAMES.values() for ending in endings})
    pieces = characters + [f"##{piece}" for piece in characters + endings]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *words, *pieces]))


def build_synthetic(folder: Path, *, seed: int = 0) -> None:
    """Write the world of a seed into `folder`, or leave the one that is there whole.

    The same seed gives the same bytes on every machine. `folder` appears at once and complete: it is written under a
    temporary name beside it. Raises DataError if something else is there, DiskError if it cannot be written.
    """
    folder = Path(folder)
    identity = {"version": VERSION, "seed": seed}
    if folder.exists():
        _check(folder, identity)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_world(place, seed)
        digests = {name: _digest(place / name) for name in _files(place)}
        (place / "manifest.json").write_bytes(_json(identity | {"files": digests}, indent=2))
        place.chmod(0o755)  # mkdtemp's folders are private
        os.rename(place, folder)
    except OSError as error:
        if not folder.exists():
            raise DiskError(f"{folder}: the world cannot be written ({error})") from None
        _check(folder, identity)  # somebody else was faster
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write_world(place: Path, seed: int) -> None:
    world = World(seed)
    documents = list(world.documents())
    corpus = "".join("".join(f"{paragraph}\n" for paragraph in document) + "\n" for document in documents)
    (place / "corpus.txt").write_bytes(corpus.encode())
    for task in FACTS_TOLD:
        (place / "superglue" / task).mkdir(parents=True)
        for split in EXAMPLES:
            rows = b"".join(_json(row) for row in world.rows(task, split))
            (place / "superglue" / task / f"{split}.jsonl").write_bytes(rows)
    (place / "tokenizer").mkdir()
    vocabulary = "".join(f"{token}\n" for token in make_vocabulary(documents))
    (place / "tokenizer" / "vocab.txt").write_bytes(vocabulary.encode())
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (place / "tokenizer" / "tokenizer_config.json").write_bytes(_json(settings, indent=2))


def _check(folder: Path, identity: dict[str, int]) -> None:
    """Refuse a folder that is not this world, whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        whole = all(_digest(folder / name) == digest for name, digest in manifest["files"].items())
        same = {key: manifest[key] for key in identity} == identity
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = same = False
    if not (whole and same):
        raise DataError(
            f"{folder}: is not the whole world of seed {identity['seed']}; remove it, or name another folder"
        )


def _files(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent) + "\n").encode()
