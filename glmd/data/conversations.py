"""Conversations as text: rendered by the tokenizer's chat template, with the tokens that are an assistant's.

    reader = ConversationReader(tokenizer, "messages")
    encoded = reader.encode(list(reader.read(["chats.jsonl"])))     # ids, and which of them an assistant says

A row is TRL's conversational form: `{"messages": [{"role": "user", "content": "..."}, ...]}`, with `tools` where the
template is to be told of some. Where a turn of the assistant lies is what the template marks by `{% generation %}`;
of a template without marks it is proved on each conversation, or the conversation is refused.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from glmd.data.corpus import PEEK_CHARACTERS, PEEK_DOCUMENTS, read_rows, resolve
from glmd.data.encoding import reading_fingerprint
from glmd.errors import ConfigError, DataError, suggestion

LossOn = Literal["assistant", "all"]
SCHEME = 1  # raised by hand whenever other tokens are called an assistant's
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Conversation:
    """The messages of a row, as the template reads them, and where the row stands."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    def __len__(self) -> int:
        """Characters of all contents."""
        return sum(len(each["content"]) for each in self.messages)

    @property
    def num_bytes(self) -> int:
        """Of all contents, in UTF-8."""
        return sum(len(each["content"].encode()) for each in self.messages)


class Encoded(NamedTuple):
    """A conversation in tokens. ids: (S,). is_assistant: (S,) bool, the tokens that an assistant says."""

    ids: np.ndarray
    is_assistant: np.ndarray


class UnplacedTurns(DataError):
    """Which part of a conversation is the assistant's cannot be told."""


class ConversationReader:
    """Reads conversations with a tokenizer's chat template.

    field: of a row that holds the messages. loss_on: with `all` a conversation whose turns of the assistant cannot be
    told is read all the same, `is_placed` is then false and no token is called an assistant's. name: of the tokenizer,
    in refusals. Raises ConfigError for a tokenizer without chat template, or without places of tokens in a text.
    """

    def __init__(self, tokenizer: Any, field: str, *, loss_on: LossOn = "assistant", name: str = "teacher") -> None:
        self.tokenizer, self.field, self.loss_on, self.is_placed = tokenizer, field, loss_on, True
        self.unplaced = ""  # why, of the first conversation
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as error:  # it has none, or several and none of them is the default
            reason = str(error).split(". ")[0][:120]
            found = f"{name}: its tokenizer has no chat template to render conversations with ({reason})"
            raise ConfigError(f"{found}; save one with it, or give texts") from None
        if not tokenizer.is_fast:
            raise ConfigError(f"{name}: its tokenizer does not say where a token stands in a text; give a fast one")
        self.has_marks = MARKED.search(self.template) is not None
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.special = {*tokenizer.all_special_tokens, *added}

    def record(self) -> dict[str, Any]:
        """What the tokens depend on, besides the rows."""
        template = hashlib.sha256(self.template.encode()).hexdigest()
        settings = {"messages_field": self.field, "chat_template": template, "scheme": SCHEME, "loss_on": self.loss_on}
        return {"tokenizer": reading_fingerprint(self.tokenizer), **settings}

    def read(self, sources: Sequence[str]) -> Iterator[Conversation]:
        """The conversations of all sources, in order. Raises DataError naming source, line and what is wrong."""
        for where, row in read_rows(sources):
            yield conversation_of(row, self.field, where)

    def require(self, sources: Sequence[str], *, store: Path | None = None) -> None:
        """Refuse what reading would refuse, by the first conversations of each source.

        store: where a token store is or will be; once it is there the hub is not asked.
        """
        for source in resolve(sources):
            if not isinstance(source, Path) and store is not None and (store / "manifest.json").is_file():
                continue
            characters, batch = 0, []
            for each in itertools.islice(self.read([str(source)]), PEEK_DOCUMENTS):
                batch.append(each)
                characters += len(each)
                if characters >= PEEK_CHARACTERS:
                    break
            self.encode(batch)

    def texts(self, conversations: Sequence[Conversation]) -> list[tuple[str, list[tuple[int, int]]]]:
        """Each conversation as the template writes it, and from where to where in it an assistant speaks.

        White space that the template puts behind the last special token of a turn, as ChatML a line's end behind
        <|im_end|>, is nobody's unless it is marked: a model has ended its turn before. Raises DataError for what the
        template refuses, and where nobody can tell.
        """
        return [self._rendered_with_turns(each) for each in conversations]

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """The tokens that `apply_chat_template` gives, and which of them are the assistant's.

        A token is so where any of its characters is, as transformers counts them. Raises DataError as `texts` does.
        """
        found = self.texts(conversations)
        if not found:
            return []
        texts = [text for text, _ in found]
        made = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = zip(conversations, found, made["input_ids"], made["offset_mapping"], strict=True)
        return [self._encoded(each.where, turns, ids, places) for each, (_, turns), ids, places in rows]

    def _encoded(
        self, where: str, turns: list[tuple[int, int]], ids: list[int], places: list[tuple[int, int]]
    ) -> Encoded:
        if not ids:
            raise DataError(f"{where}: the chat template writes nothing of the conversation; remove the row")
        is_assistant = tokens_within(places, turns)
        if self.loss_on == "assistant" and not is_assistant.any():
            raise DataError(f"{where}: the chat template writes no token of the assistant's; remove the row")
        return Encoded(np.array(ids, dtype=np.int64), is_assistant)

    def _rendered_with_turns(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """A conversation's text, and from where to where in it the assistant's turns are."""
        text = self._rendered(conversation, len(conversation.messages))
        said = [each["content"].strip() for each in conversation.messages]
        if any(said) and not any(each and each in text for each in said):
            found = f"{conversation.where}: the chat template writes the content of no message"
            raise DataError(f"{found}; it may be one for contents in parts: save a template for texts")
        try:
            return text, self._turns(conversation, text) if self.is_placed else []
        except UnplacedTurns as error:
            if self.loss_on == "assistant":
                raise
            self.is_placed, self.unplaced = False, str(error)
            return text, []

    def _rendered(self, conversation: Conversation, stop: int, *, prompts: bool = False) -> str:
        """The first messages of a conversation as text; prompts: with the beginning of an answer."""
        messages, tools = conversation.messages[:stop], conversation.tools
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompts
            )
        except Exception as error:  # whatever a template raises
            whole = stop == len(conversation.messages) and not prompts
            part = "it" if whole else f"its first {stop} messages, which is how the assistant's turns are found"
            reason = " ".join(str(error).split())[:200]
            raise (DataError if whole else UnplacedTurns)(
                f"{conversation.where}: the chat template does not render {part} ({type(error).__name__}: {reason}); "
                + ("mend or remove the row" if whole else _remedy(self))
            ) from None
        return text

    def _turns(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        if self.has_marks:
            return self._marked_turns(conversation, text)
        answers = [i for i, each in enumerate(conversation.messages) if each["role"] == "assistant"]
        return [self._without_end(text, *self._turn(conversation, text, i)) for i in answers]

    def _without_end(self, text: str, first: int, stop: int) -> tuple[int, int]:
        """A turn without white space behind its last special token."""
        ends = [text.rfind(token, first, stop) + len(token) for token in self.special if token in text[first:stop]]
        last = max(ends, default=stop)
        return first, stop if text[last:stop].strip() else last

    def _marked_turns(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[conversation.messages],
            tools=conversation.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (marked,), (turns,) = rendered
        if marked != text:
            raise UnplacedTurns(
                f"{conversation.where}: the chat template's marks are those of another text; {_remedy(self)}"
            )
        found = [(first, stop) for first, stop in turns if stop > first]
        if not found:
            raise UnplacedTurns(
                f"{conversation.where}: the chat template's {{% generation %}} marks no turn of the assistant; "
                + _remedy(self)
            )
        return found

    def _turn(self, conversation: Conversation, text: str, number: int) -> tuple[int, int]:
        """From where to where in the text one message is, which the assistant says.

        It begins where the messages before it end, with the beginning of an answer. It ends with what the same message
        ends with as the last one of a conversation; templates that leave out thoughts of earlier turns (Qwen3) write
        then less of it. Both must be found in the text, and in one way.
        """
        if number == 0:
            raise UnplacedTurns(
                f"{conversation.where}: begins with an answer, so where it begins cannot be told; {_remedy(self)}"
            )
        before = self._rendered(conversation, number, prompts=True)
        alone = self._rendered(conversation, number + 1)
        if text.startswith(before) and alone.startswith(before):
            rest, turn = text[len(before) :], alone[len(before) :]
            if turn and rest.startswith(turn):
                return len(before), len(before) + len(turn)
            lengths = [n for n in range(1, min(len(rest), len(turn)) + 1) if rest[n - 1] == turn[-1]]
            fitting = [n for n in lengths if rest.startswith(turn[len(turn) - n :])]
            if len(fitting) == 1:
                return len(before), len(before) + fitting[0]
        raise UnplacedTurns(
            f"{conversation.where}: the chat template writes message {number + 1} otherwise within the conversation "
            f"than at its end, so which tokens the assistant says cannot be told; {_remedy(self)}"
        )


def tokens_within(places: Sequence[tuple[int, int]], turns: Iterable[tuple[int, int]]) -> np.ndarray:
    """(S,) bool: which tokens have a character in one of the turns, each from where to where in the text.

    places: of each token, as a tokenizer's offsets. These may leave out the white space that a token begins with, so
    that a token begins where the one before it ends.
    """
    offsets = np.array(places, dtype=np.int64).reshape(-1, 2)
    starts = np.minimum(offsets[:, 0], np.append(0, offsets[:-1, 1]))
    ends = np.maximum(offsets[:, 1], starts + 1)
    found = np.zeros(len(offsets), dtype=bool)
    for first, stop in turns:
        found |= (starts < stop) & (ends > first) & (first < stop)
    return found


def _remedy(reader: ConversationReader) -> str:
    marks = "" if reader.has_marks else "save a template with {% generation %} marks, "
    return f"{marks}remove the row, or give data.loss_on=all"


def conversation_of(row: dict[str, Any], field: str, where: str) -> Conversation:
    """The conversation of a row. Raises DataError for one that is none, or in which no assistant speaks."""
    if field not in row:
        raise DataError(f"{where}: field {field!r} is missing{suggestion(field, map(str, row))}")
    given, tools = row[field], row.get("tools")
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: field {field!r} must be a list of messages, got {repr(given)[:40]}")
    messages = []
    for number, message in enumerate(given, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {number} must have role and content, got {repr(message)[:40]}")
        for key in ("role", "content"):
            value = message.get(key)
            if not isinstance(value, str):
                held = f"got {repr(value)[:40]}" if key in message else f"it has {', '.join(map(str, message))}"
                raise DataError(f"{where}: {key} of message {number} must be text; {held}")
        messages.append({key: value for key, value in message.items() if value is not None})
    roles = [*dict.fromkeys(each["role"] for each in messages)]
    if "assistant" not in roles:
        raise DataError(f"{where}: no message has the role assistant, only {', '.join(roles)}; remove or rename them")
    if isinstance(tools, str):  # TRL's form for the hub, whose columns have one type
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DataError(f"{where}: field 'tools' is no JSON, got {tools[:40]!r}") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: field 'tools' must be a list, got {repr(tools)[:40]}")
    return Conversation(where, messages, tools or None)
