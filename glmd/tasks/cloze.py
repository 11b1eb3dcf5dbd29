"""A task as a cloze: which ids fill it, how a masked or causal LM reads it, and what its logits are.

rows = cloze_rows(examples, tokenizer, max_length=256)             # mask tokens for a masked LM
rows = continuation_rows(examples, tokenizer, max_length=256)      # text to go on from for a causal one
rows = infilling_rows(examples, tokenizer, max_length=256)         # text and what is left out, for encoder and decoder
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmd.data.blocks import block_frame
from glmd.data.infilling import sentinel_ids
from glmd.errors import ConfigError, DataError
from glmd.losses.head import Head
from glmd.losses.labels import IGNORED_LABEL
from glmd.tasks.examples import TaskExample
from glmd.tasks.rows import Rows, encoded, has_pairs
from glmd.tasks.tasks import BLANK, Task


def cloze_rows(examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
    """Rows for a masked LM: the cloze becomes mask tokens, one for each token that fills it.

    `cloze_ids` of a row have there the ids that fill it (0 for a verbalizer), elsewhere -100. The text without the
    cloze loses its end at max_length. Raises DataError where the cloze would be truncated.
    """
    refuse_marks(examples, [tokenizer.mask_token])
    fillings, owners = candidate_ids(examples, tokenizer), owners_of(examples)
    counts = [count_blanks(example.texts[choice]) for example, choice in owners]
    blanks = [[tokenizer.mask_token * len(each)] * count for each, count in zip(fillings, counts, strict=True)]
    rows = encoded_clozes(owners, blanks, tokenizer, max_length)
    for row, filling, count, (example, _) in zip(rows.tokens, fillings, counts, owners, strict=True):
        places, expected = row["input_ids"] == tokenizer.mask_token_id, filling * count
        if places.sum() != len(expected):
            found = f"{places.sum()} of the {len(expected)} tokens of the blank are left at max_length {max_length}"
            raise DataError(f"{place(example)}: {found}; give a larger max_length")
        row["cloze_ids"] = np.full(len(places), IGNORED_LABEL, dtype=np.int32)
        row["cloze_ids"][places] = expected
    return rows


def infilling_rows(examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
    """Rows for an encoder-decoder: each blank of the cloze is one sentinel, or mask token, to the encoder.

    `target_ids` is what the decoder says, as in pretraining: sentinels, each before what fills it; or with a mask token
    the text up to the end of the last blank. `cloze_ids` of it are the ids that fill the blanks (0 for a verbalizer,
    which is said last), elsewhere -100. The text without the cloze loses its end at max_length. Raises DataError where
    the cloze would be truncated.
    """
    sentinels = sentinel_ids(tokenizer)
    names = [tokenizer.mask_token] if not len(sentinels) else tokenizer.convert_ids_to_tokens(sentinels.tolist())
    refuse_marks(examples, names)
    fillings, owners = candidate_ids(examples, tokenizer), owners_of(examples)
    counts = [count_blanks(example.texts[choice]) for example, choice in owners]
    if len(sentinels) and max(counts) > len(sentinels):
        example, _ = owners[int(np.argmax(counts))]
        raise DataError(f"{place(example)}: {max(counts)} blanks, and the tokenizer has {len(sentinels)} sentinels")
    blanks = [names[:count] if len(sentinels) else names * count for count in counts]
    rows = encoded_clozes(owners, blanks, tokenizer, max_length)
    marks = sentinels if len(sentinels) else np.array([tokenizer.mask_token_id])
    for row, filling, count, (example, _) in zip(rows.tokens, fillings, counts, owners, strict=True):
        ids = row["input_ids"]
        places = np.flatnonzero(np.isin(ids, marks))
        if len(places) != count:
            found = f"{len(places)} of {count} blanks are left at max_length {max_length}"
            raise DataError(f"{place(example)}: {found}; give a larger max_length")
        starts = [0, *(places[:-1] + 1)]
        before = [ids[i : i + 1] if len(sentinels) else ids[start:i] for start, i in zip(starts, places, strict=True)]
        parts = [part for each in before for part in (each, np.array(filling, dtype=np.int32))]
        scored = [np.full(len(part), i % 2 == 1) for i, part in enumerate(parts)]
        row["target_ids"] = np.concatenate(parts).astype(np.int32)
        row["cloze_ids"] = np.where(np.concatenate(scored), row["target_ids"], IGNORED_LABEL).astype(np.int32)
    return rows


def owners_of(examples: Sequence[TaskExample]) -> list[tuple[TaskExample, int]]:
    """Of each row its example, and which of its choices."""
    return [(example, choice) for example in examples for choice in range(len(example.texts))]


def count_blanks(texts: tuple[str, str | None]) -> int:
    return sum((text or "").count(BLANK) for text in texts)


def encoded_clozes(
    owners: Sequence[tuple[TaskExample, int]],
    blanks: Sequence[list[str]],
    tokenizer: Any,
    max_length: int,
    room: int = 0,
) -> Rows:
    """The tokenizer's rows of clozes, with these texts in the place of each row's blanks, one after another.

    owners: of each row its example, and which of its choices. room: tokens that are left for what comes behind a row.
    Raises DataError where the text around a blank has too many tokens.
    """
    given = [example.texts[choice] for example, choice in owners]
    filled = [_with_blanks(pair, each) for pair, each in zip(given, blanks, strict=True)]
    firsts, seconds = ([pair[side] for pair in filled] for side in (0, 1))
    in_first, paired = BLANK in given[0][0], has_pairs([owners[0][0]])
    truncation = "longest_first" if not paired else "only_second" if in_first else "only_first"
    try:
        rows = encoded(firsts, seconds if paired else None, tokenizer, max_length - room, truncation)
    except Exception as error:  # the tokenizers library has no class of its own for it
        kept = tokenizer(firsts if in_first else seconds, add_special_tokens=False, verbose=False)["input_ids"]
        longest = int(np.argmax([len(ids) for ids in kept]))
        found = f"the text around the blank has {len(kept[longest])} tokens" + (
            f" and what fills it {room}" if room else ""
        )
        where = place(owners[longest][0])
        raise DataError(f"{where}: {found}, too many for max_length {max_length}; give a larger one") from error
    return rows


def continuation_rows(examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
    """Rows for a model that predicts each token from those before it.

    The text with the blank comes last, whatever its place in the pair, after a line end; the other loses its end at
    max_length. A row's `cloze_ids` stand one place early, where the model says them: of a candidate those of its tokens
    and of all that follows the blank (arXiv:1806.02847, partial scoring); a 0 where a verbalizer would come next, after
    which the text ends, as nothing later bears on it. Raises DataError where the asking text alone is too long.
    """
    start, _ = block_frame(tokenizer)
    owners = [(example, choice) for example in examples for choice in (example.choices or ("",))]
    others, before, whole = [], [], []
    for (example, choice), (text, pair) in zip(owners, (each for e in examples for each in e.texts), strict=True):
        other, asking = (text, pair) if BLANK in (pair or "") else (pair or "", text)
        asking = ("\n" if other else "") + str(asking)
        others.append(other)
        before.append(asking.partition(BLANK)[0].removesuffix(" "))
        whole.append(asking.replace(BLANK, choice) if example.choices else before[-1])
    if examples[0].choices:
        candidate_ids(examples, tokenizer)  # refuses one without tokens
    rows: list[dict[str, np.ndarray]] = []
    cut = []
    columns = [_ids(texts, tokenizer) for texts in (others, before, whole)]
    for (example, _), given, context, asked in zip(owners, *columns, strict=True):
        # Where the candidate begins: a token that spans the border is its first one.
        border = next(
            (i for i, pair in enumerate(zip(context, asked, strict=False)) if pair[0] != pair[1]), len(context)
        )
        scored = asked[border:]
        room = max_length - len(start) - len(asked)
        if room < 0:
            found = f"the text around the blank has {len(asked)} tokens"
            raise DataError(f"{place(example)}: {found}, too many for max_length {max_length}; give a larger one")
        row = np.array([*start, *given[:room], *asked], dtype=np.int32)
        first_scored = len(row) - len(scored) - 1
        if first_scored < 0:
            raise DataError(
                f"{place(example)}: nothing stands before the blank for a causal model to go on from; write text there"
            )
        cut.append(len(given) > room)
        cloze_ids = np.full(len(row), IGNORED_LABEL, dtype=np.int32)
        cloze_ids[first_scored : first_scored + max(1, len(scored))] = scored or [0]
        rows.append({"input_ids": row, "cloze_ids": cloze_ids})
    return Rows(rows, cut, {})


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def verbalizer_ids(task: Task, tokenizer: Any) -> tuple[int, ...]:
    """The ids of a task's verbalizers. Raises ConfigError for a word that is not one known token of its own."""
    ids: list[int] = []
    for word in task.verbalizers:
        (pieces,) = ids_in_text([word], tokenizer)
        if len(pieces) != 1 or pieces[0] in tokenizer.all_special_ids:
            shown = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(pieces)))
            raise ConfigError(
                f"task {task.name}: cloze.verbalizers: {word!r} is not one word of the vocabulary ({shown})"
            )
        _refuse_dropped(task, word, tokenizer, pieces[0])
        ids += pieces
    if len(set(ids)) < len(ids):
        raise ConfigError(
            f"task {task.name}: cloze.verbalizers: {', '.join(task.verbalizers)} are one token to the tokenizer"
        )
    return tuple(ids)


def _refuse_dropped(task: Task, word: str, tokenizer: Any, token_id: int) -> None:
    """A compressed vocabulary reads a word that it dropped as another one, which would be scored in its place."""
    source = getattr(tokenizer, "source_tokenizer", None)
    if source is not None:
        original = source.convert_ids_to_tokens(ids_in_text([word], source)[0][0])
        kept = tokenizer.convert_ids_to_tokens(token_id)
        if original != kept:
            found = f"{word!r} was dropped from this vocabulary, which reads {kept!r} for it"
            raise ConfigError(
                f"task {task.name}: cloze.verbalizers: {found}; choose kept tokens, or vocabulary.keep_words"
            )


def candidate_ids(examples: Sequence[TaskExample], tokenizer: Any) -> list[list[int]]:
    """For each row the ids of the candidate that fills its blank; one 0 where a verbalizer will."""
    candidates = [choice for example in examples for choice in example.choices]
    if not candidates:
        return [[0]] * len(examples)
    fillings = ids_in_text(candidates, tokenizer)
    owners = (example for example in examples for _ in example.choices)
    for example, candidate, filling in zip(owners, candidates, fillings, strict=True):
        if not filling:
            raise DataError(f"{place(example)}: the candidate {candidate!r} has no tokens, so it cannot fill a blank")
    return fillings


def ids_in_text(words: list[str], tokenizer: Any) -> list[list[int]]:
    """The ids of each word as it stands within a text: after a space, where a tokenizer has other tokens for that."""
    spaced = [f" {word}" for word in words]
    both = (tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in (spaced, words))
    # Where a space would be a token of its own, the word has the same tokens without it.
    return [after if len(after) <= len(alone) else alone for after, alone in zip(*both, strict=True)]


def refuse_marks(examples: Sequence[TaskExample], marks: Collection[str]) -> None:
    """A blank is known by its tokens, so a text must bring none of its own."""
    for example in examples:
        texts = [text or "" for pair in example.texts for text in pair]
        for mark in marks:
            if any(mark in text for text in (*texts, *example.choices)):
                found = f"the text holds {mark}, which the model would take for the blank"
                raise DataError(f"{place(example)}: {found}; remove it")


def place(example: TaskExample) -> str:
    return example.where or f"example {example.example_id} (idx {example.idx})"


def _with_blanks(texts: tuple[str, str | None], marks: list[str]) -> list[str]:
    """Both texts with the marks in the place of their blanks, one after another."""
    # The space before a blank belongs to what fills it (`ids_in_text`); not every mask token takes it along.
    coming = iter(marks)
    return [re.sub(f" ?{BLANK}", lambda _: next(coming), text or "") for text in texts]


def cloze_logits(batch: Mapping[str, Tensor], token_map: Tensor | None, hidden: Tensor, linear: Head) -> Tensor:
    """From hidden states (R, S, H): (B, C) logits of the verbalizers, or (R, 1) log-probabilities of the candidates."""
    is_blank = batch["cloze_ids"] >= 0
    in_blank = hidden[is_blank]
    if "verbalizers" in batch:
        words = batch["verbalizers"] if token_map is None else token_map[batch["verbalizers"]]
        logits = (in_blank[:, None] * linear.weight[words]).sum(-1)
        return linear.scaling(logits if linear.bias is None else logits + linear.bias[words])
    ids = batch["cloze_ids"][is_blank]
    words = ids if token_map is None else token_map[ids]
    logits = linear.logits(in_blank)
    of_tokens = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(1, words[:, None])
    rows = is_blank.nonzero()[:, 0]
    sums = of_tokens.new_zeros(len(hidden), 1).index_add(0, rows, of_tokens)
    return sums / is_blank.sum(1, keepdim=True) if "mean_over_tokens" in batch else sums
