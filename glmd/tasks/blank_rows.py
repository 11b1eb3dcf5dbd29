"""A task as a cloze of a GLM: one mask token for the blank, and what fills it, token by token, behind the text.

rows = blank_rows(examples, tokenizer, max_length=256)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from glmd.data.blank_infilling import GlmTokens, glm_tokens
from glmd.errors import DataError
from glmd.losses.labels import IGNORED_LABEL
from glmd.tasks.cloze import candidate_ids, place, refuse_masks, with_masks
from glmd.tasks.examples import TaskExample
from glmd.tasks.rows import Rows, encoded, has_pairs
from glmd.tasks.tasks import BLANK


def blank_rows(examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int, score_end: bool = False) -> Rows:
    """Rows for a GLM (arXiv:2103.10360, section 2.3): part A the text, part B a start-of-piece and the blank's tokens.

    Columns of a row (S,): input_ids, position_ids, block_position_ids, context_mask, and cloze_ids, which stand in part
    B where the model predicts them: of a candidate the ids of its tokens, a 0 at the start-of-piece where a verbalizer
    comes. The last token of a candidate is predicted and not read. Both parts together have at most max_length tokens;
    the text without the blank loses its end for that. Raises DataError where the blank would be lost, and ConfigError
    for a tokenizer that is none of a GLM.

    score_end: a candidate's end-of-piece is predicted too, as the published code does; then the last token is read.
    """
    ids = glm_tokens(tokenizer)
    refuse_masks(examples, tokenizer)
    # Of each row what part B predicts.
    fillings = candidate_ids(examples, tokenizer)
    if score_end and examples[0].choices:
        fillings = [[*filling, ids.end] for filling in fillings]
    owners = [(example, choice) for example in examples for choice in range(len(example.texts))]
    lengths = np.array([len(filling) for filling in fillings])
    tokens: list[Any] = [None] * len(owners)
    truncated = [False] * len(owners)
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        contexts = _contexts([owners[i] for i in chosen], tokenizer, max_length, int(length))
        for i, row, is_cut in zip(chosen, contexts.tokens, contexts.truncated, strict=True):
            tokens[i], truncated[i] = _row(row["input_ids"], fillings[i], ids, owners[i][0], max_length), is_cut
    return Rows(tokens, truncated, {})


def _contexts(owners: Sequence[tuple[TaskExample, int]], tokenizer: Any, max_length: int, room: int) -> Rows:
    """Part A of some rows, with `room` left behind it."""
    given = [example.texts[choice] for example, choice in owners]
    firsts, seconds = ([with_masks(pair[side] or "", [0], tokenizer) for pair in given] for side in (0, 1))
    in_first, paired = BLANK in given[0][0], has_pairs([example for example, _ in owners])
    truncation = "longest_first" if not paired else "only_second" if in_first else "only_first"
    try:
        return encoded(firsts, seconds if paired else None, tokenizer, max_length - room, truncation)
    except (
        Exception
    ) as error:  # the tokenizers library has no class of its own for it, nor Python for a negative length
        kept = tokenizer(firsts if in_first else seconds, add_special_tokens=False, verbose=False)["input_ids"]
        longest = int(np.argmax([len(each) for each in kept]))
        found = f"the text around the blank has {len(kept[longest])} tokens and what fills it {room}"
        raise DataError(
            f"{place(owners[longest][0])}: {found}, too many for max_length {max_length}; give a larger one"
        ) from error


def _row(
    context: np.ndarray, filling: Sequence[int], ids: GlmTokens, example: TaskExample, max_length: int
) -> dict[str, np.ndarray]:
    """The columns of a row, from its part A and what is predicted in its part B."""
    masks = np.flatnonzero(context == ids.mask)
    length, size = len(context), len(filling)
    if len(masks) != 1 or length + size > max_length:
        raise DataError(f"{place(example)}: the blank has no room at max_length {max_length}; give a larger one")
    within = np.arange(1, size + 1)
    columns = {
        "input_ids": [*context, ids.start, *filling[:-1]],
        "position_ids": [*range(length), *[masks[0]] * size],
        "block_position_ids": [*[0] * length, *within],
        "context_mask": [*[1] * length, *[0] * size],
        "cloze_ids": [*[IGNORED_LABEL] * length, *filling],
    }
    return {name: np.array(column, dtype=np.int32) for name, column in columns.items()}
