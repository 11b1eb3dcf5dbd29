"""A task as a cloze of a GLM: one mask token for the blank, and what fills it, token by token, behind the text.

rows = blank_rows(examples, tokenizer, max_length=256)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from glmd.data.blank_infilling import GlmTokens, glm_tokens
from glmd.errors import DataError
from glmd.losses.labels import IGNORED_LABEL
from glmd.tasks.cloze import candidate_ids, count_blanks, encoded_clozes, owners_of, place, refuse_marks
from glmd.tasks.examples import TaskExample
from glmd.tasks.rows import Rows


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
    refuse_marks(examples, [tokenizer.mask_token])
    # Of each row what part B predicts.
    fillings = candidate_ids(examples, tokenizer)
    if score_end and examples[0].choices:
        fillings = [[*filling, ids.end] for filling in fillings]
    owners = owners_of(examples)
    lengths = np.array([len(filling) for filling in fillings])
    tokens: list[Any] = [None] * len(owners)
    truncated = [False] * len(owners)
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        mine = [owners[i] for i in chosen]
        blanks = [[tokenizer.mask_token] * count_blanks(example.texts[choice]) for example, choice in mine]
        contexts = encoded_clozes(mine, blanks, tokenizer, max_length, int(length))
        for i, row, is_cut in zip(chosen, contexts.tokens, contexts.truncated, strict=True):
            tokens[i], truncated[i] = _row(row["input_ids"], fillings[i], ids, owners[i][0], max_length), is_cut
    return Rows(tokens, truncated, {})


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
