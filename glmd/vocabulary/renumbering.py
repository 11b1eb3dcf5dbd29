"""Ids in a model's configs, renumbered to a vocabulary."""

import copy
import logging
import re
from typing import Any

from glmd.errors import ModelError
from glmd.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class Expansion:
    """A vocabulary read backwards: each source token has the row of its target, and student ids become source ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.kept_ids, self.token_map = vocabulary.token_map, vocabulary.kept_ids
        self.size, self.source_size = vocabulary.source_size, vocabulary.size

    def is_kept(self, _: int) -> bool:
        return True


Rows = Vocabulary | Expansion


def _config_parts(config: Any) -> list[Any]:
    """The configuration itself and every configuration inside it."""
    from transformers import PreTrainedConfig

    parts = [config]
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            parts += _config_parts(value)
    return parts


# Fields that hold one id or a list of ids of the text vocabulary.
_ID_FIELD = re.compile(
    "(pad|bos|eos|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos|blank|eod|question|system|user|assistant"
    "|prev_sot|no_timestamps|image|video|audio|timestamp|bo[ia]|eo[ia]|(image|video|vision|audio)_(start|end|bos|eos|pad))"
    "_token_(ids?|index|idx)"
    "|(pad|bos|eos|unk|mask)_index"  # XLM's
)


# Fields that look like ids but are none of the above: to copy or to map them unread would be a guess.
_ID_LIKE = re.compile(
    "(?!.*layer).*(token_ids?|token_index|token_idx|tokens_ids?|(^|_)(bos|eos|pad|sep|cls|mask|unk|start|end|newline|patch)_(id|index))"
    "|(lang|task)_to_id"
)


_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def renumber_config(config: Any, vocabulary: Rows) -> Any:
    """A copy of a model's configuration with vocab_size K and every token id, its parts' too, as a student id.

    Raises ModelError naming the field for an id that is dropped or out of range, and for a field that looks like
    an id but is not known: a stale id is wrong without a sound.
    """
    renumbered = copy.deepcopy(config)
    for part in _config_parts(renumbered):
        _renumber_fields(part, vocabulary, type(part).__name__)
        specific: dict[str, Any] = getattr(part, "task_specific_params", None) or {}
        for task, fields in specific.items():
            if isinstance(fields, dict):
                specific[task] = {
                    name: _renumber_field(name, value, vocabulary, f"{type(part).__name__}.task_specific_params.{task}")
                    for name, value in fields.items()
                }
    _set_rows(renumbered, vocabulary.size)
    return renumbered


def renumber_generation_config(generation_config: Any, vocabulary: Rows) -> Any:
    """A copy of a generation configuration with student ids. Suppressed tokens that no longer exist are left out."""
    renumbered = copy.deepcopy(generation_config)
    _renumber_fields(renumbered, vocabulary, type(renumbered).__name__)
    return renumbered


def token_id_fields(holder: Any) -> list[tuple[str, int]]:
    """(field, id) of every token id in a model's configuration and its parts, or in a generation configuration."""
    parts = _config_parts(holder) if hasattr(holder, "get_text_config") else [holder]
    found = []
    for part in parts:
        for name, value in vars(part).items():
            if _ID_FIELD.fullmatch(name.removeprefix("_")):
                ids = value if isinstance(value, (list, tuple)) else [value]
                found += [(f"{type(part).__name__}.{name}", i) for i in ids if isinstance(i, int)]
    return found


def named_ids(*holders: Any) -> set[int]:
    """The token ids that a model's configuration, and its generation configuration if there is one, name."""
    return {i for holder in holders if holder is not None for _, i in token_id_fields(holder)}


def _renumber_fields(holder: Any, vocabulary: Rows, place: str) -> None:
    for name, value in list(vars(holder).items()):
        new = _renumber_field(name, value, vocabulary, place)
        if new is not value:
            setattr(holder, name, new)


def _renumber_field(name: str, value: Any, vocabulary: Rows, place: str) -> Any:
    """The value of one field in student ids; the value itself where it holds no ids."""
    place = f"{place}.{name}"
    if value is None or isinstance(value, bool):
        return value
    if name in _SUPPRESSED:
        # A dropped token cannot be produced: mapped onto another, it would forbid that one.
        return type(value)(_student_id(i, vocabulary, place) for i in value if _is_kept(i, vocabulary, place))
    if name in ("bad_words_ids", "sequence_bias"):
        return _renumber_sequences(value, vocabulary, place)
    if name == "forced_decoder_ids":
        return [[position, None if i is None else _student_id(i, vocabulary, place)] for position, i in value]
    if name == "force_words_ids" or _ID_FIELD.fullmatch(name.removeprefix("_")):
        return _renumber_nested(value, vocabulary, place)
    if _ID_LIKE.fullmatch(name):
        raise ModelError(f"{place} = {value!r} looks like a token id, but glmd does not know it; set it to None first")
    return value


def _renumber_nested(value: Any, vocabulary: Rows, place: str) -> Any:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return type(value)(_renumber_nested(item, vocabulary, place) for item in value)
    return _student_id(value, vocabulary, place)


def _renumber_sequences(value: Any, vocabulary: Rows, place: str) -> Any:
    """Token sequences, with a bias each or without. A sequence with a dropped token cannot occur and is left out."""
    if isinstance(value, dict):
        return dict(_renumber_sequences(list(value.items()), vocabulary, place))
    kept = []
    for entry in value:
        has_bias = len(entry) == 2 and isinstance(entry[0], (list, tuple))
        sequence = entry[0] if has_bias else entry
        if not all(_is_kept(i, vocabulary, place) for i in sequence):
            logger.warning("%s: %s is left out, it holds a dropped token", place, list(sequence))
            continue
        ids = type(sequence)(_student_id(i, vocabulary, place) for i in sequence)
        kept.append(type(entry)((ids, entry[1])) if has_bias else ids)
    return kept


def _is_kept(source_id: Any, vocabulary: Rows, place: str) -> bool:
    if isinstance(source_id, bool) or not isinstance(source_id, int):
        raise ModelError(f"{place}: {source_id!r} is no token id")
    if not 0 <= source_id < vocabulary.source_size:
        raise ModelError(
            f"{place} = {source_id} is no id of the tokenizer (0 to {vocabulary.source_size - 1}); "
            "set it to None or to the tokenizer's id first"
        )
    return vocabulary.is_kept(source_id)


def _student_id(source_id: Any, vocabulary: Rows, place: str) -> int:
    if not _is_kept(source_id, vocabulary, place):
        raise ModelError(
            f"{place} = {source_id} is a dropped token; keep it through keep_words, or set the field to None"
        )
    return int(vocabulary.token_map[source_id])


def _set_rows(config: Any, rows: int) -> None:
    """Set vocab_size wherever the configuration or a part of it has the same one."""
    old = _config_rows(config)
    for part in _config_parts(config):
        for name in ("vocab_size", "decoder_vocab_size"):
            if getattr(part, name, None) == old:
                setattr(part, name, rows)


def _config_rows(config: Any) -> int:
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int) or rows < 1:
        raise ModelError(f"{type(config).__name__} has no vocab_size; its vocabulary cannot be found")
    return rows
