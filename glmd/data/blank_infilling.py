"""GLM's blank infilling (arXiv:2103.10360, section 2.1) as a pure function of (seed, epoch, example id, choice).

    infilling = blank_infilling_for(tokenizer, seed=0)
    examples = infilling.corrupt(examples, np.stack([epochs, example_ids, choices], axis=1))

A row `[CLS] tokens [SEP]` becomes part A, in which each drawn span is one mask token, and part B, the spans in drawn
order, each behind a start-of-piece. What becomes of a row is a hash of these counters, computed for all rows of a batch
at once. So nothing about a row depends on what else is in its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from glmd.data.batches import Examples, positions_in_rows
from glmd.data.masking import draw, row_states
from glmd.errors import ConfigError
from glmd.losses.labels import IGNORED_LABEL

SCHEME = 1  # raised by hand whenever other spans are drawn: a cache of teachers' outputs is of one
MEAN_SPAN, LONGEST_SPAN = 3, 39  # tokens; lengths are Poisson's without 0 and without what is longer, as published
START, END = "<|startofpiece|>", "<|endofpiece|>"
_LEVEL, _LENGTHS, _PERMUTATION, _PLACES, _SENTENCES, _ORDER = range(6)  # what a row's streams of draws are for


class GlmTokens(NamedTuple):
    """Ids of a GLM's tokenizer. Blanks of sentences and of documents have masks of their own in the 2B and 10B."""

    mask: int
    start: int
    end: int
    sentence_mask: int
    document_mask: int


def glm_tokens(tokenizer: Any) -> GlmTokens:
    """The ids of mask, start-of-piece and end-of-piece. Raises ConfigError naming what a tokenizer has not."""
    known = tokenizer.get_vocab()
    mask = tokenizer.mask_token
    missing = [name for name in (START, END) if name not in known] + ["a mask token"] * (mask is None)
    if missing:
        raise ConfigError(
            f"blank infilling needs {START}, {END} and a mask token; {type(tokenizer).__name__} lacks "
            f"{' and '.join(missing)}; give a GLM (glmd convert-glm writes one with its tokenizer)"
        )
    masks = [known.get(name, known[mask]) for name in ("[sMASK]", "[gMASK]")]
    return GlmTokens(known[mask], known[START], known[END], *masks)


def sentence_end_ids(tokenizer: Any) -> np.ndarray:
    """The ids of tokens that end a sentence, as published: those with one of . ? ! ; : or a line end in them."""
    special = set(tokenizer.all_special_ids)
    # Byte-level BPE writes a line end as Ċ.
    ends = {i for token, i in tokenizer.get_vocab().items() if any(sign in token for sign in ".?!;:\nĊ")}
    return np.array(sorted(ends - special), dtype=np.int64)


@dataclass(frozen=True)
class BlankInfilling:
    """Rows of ids into rows to fill blanks of. Each row is of one of the paper's levels, drawn by probability.

    Of tokens: spans of about three tokens that do not touch, `ratio` of the row's tokens in all, at least one; the last
    length that is drawn is shortened to that. Of sentences: whole ones, in drawn order, until they are `ratio`. Of
    documents: one span of 50 % to 100 % of the longest text between special tokens. A special token is in no span; one
    within a drawn span parts it in two blanks.
    """

    tokens: GlmTokens
    special_ids: np.ndarray
    seed: int
    ratio: float = 0.15
    sentence_probability: float = 0.0
    document_probability: float = 0.0
    sentence_end_ids: Sequence[int] | np.ndarray = ()
    num_maskings: int | None = None  # how many versions of a row there are; epochs take them in turn

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 0.5:
            raise ConfigError(f"ratio must be in (0, 0.5], got {self.ratio}: spans that do not touch need room between")
        shares = self.sentence_probability, self.document_probability
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigError(
                f"sentence_probability {shares[0]} and document_probability {shares[1]} must be at least 0, together "
                "at most 1"
            )
        if self.sentence_probability and not len(self.sentence_end_ids):
            raise ConfigError("sentence_probability needs sentence_end_ids, the tokens that end one; none are given")

    def num_targets(self, length: int) -> int:
        """Tokens that a row of so many becomes at most, each of which is predicted from: two more for each blank."""
        return length + 2 * max(1, int(self.ratio * length))

    def corrupt(self, examples: Examples, keys: np.ndarray) -> Examples:
        """Examples whose token columns are those of a GLM, for `input_ids` of framed rows.

        keys: (R, k) as of Masking. Columns, (T,) each: input_ids,
        position_ids, block_position_ids, context_mask (1 in part A) and lm_labels, of part B the next token of its
        blank, in the end the end-of-piece, of part A -100.
        """
        ids, lengths = examples.tokens["input_ids"], examples.lengths
        levels, spans = self._spans(ids, lengths, row_states(keys, self.seed, self.num_maskings))
        masks = np.array([self.tokens.mask, self.tokens.sentence_mask, self.tokens.document_mask])
        new_lengths, columns = self._columns(ids, lengths, spans, masks[levels])
        return replace(examples, lengths=new_lengths, tokens=columns)

    def _spans(self, ids: np.ndarray, lengths: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, "_Spans"]:
        """(R,) the level of each row, 0 tokens, 1 sentences, 2 documents; and where spans are."""
        rows = np.repeat(np.arange(len(lengths)), lengths)
        is_free = ~np.isin(ids, self.special_ids)
        drawn = draw(states, _LEVEL) / 2.0**64
        levels = np.where(drawn < self.document_probability, 2, 0)
        levels[(levels == 0) & (drawn < self.document_probability + self.sentence_probability)] = 1
        span_of = np.full(len(ids), -1)  # the number of a token's span in its row
        if (levels == 1).any():
            chosen = is_free & (levels == 1)[rows]
            span_of[chosen] = self._sentences(ids, rows, chosen, states)
        if (levels == 2).any():
            # Of a document only its longest text can be in the span: it must not reach over a special token.
            of_documents = (levels == 2)[rows]
            is_free[of_documents] = _longest_runs(rows[of_documents], is_free[of_documents])
        chosen = is_free & (levels != 1)[rows]
        span_of[chosen] = self._drawn_spans(rows[chosen], levels, states)
        hidden, changes = span_of >= 0, _changes(span_of, rows)
        starts = np.flatnonzero(hidden & changes)
        sizes = np.diff(np.append(np.flatnonzero(changes), len(ids)))[hidden[changes]]
        owners = rows[starts]
        order = self._shuffled(owners, _ORDER, states)
        return levels, _Spans(hidden, starts, sizes, owners, order)

    def _shuffled(self, owners: np.ndarray, purpose: int, states: np.ndarray) -> np.ndarray:
        """The order of things, each of a row in `owners`, that draws the things of each row anew."""
        numbers = positions_in_rows(np.bincount(owners, minlength=len(states)))
        return np.lexsort((draw(draw(states, purpose)[owners], numbers), owners))

    def _drawn_spans(self, rows: np.ndarray, levels: np.ndarray, states: np.ndarray) -> np.ndarray:
        """For tokens that may be in spans, of rows one after another: a token's span in its row by number, or -1."""
        room = np.bincount(rows, minlength=len(levels))  # (R,)
        share = np.maximum(1, (self.ratio * room).astype(np.int64))
        half = -(-room // 2)
        of_document = half + _uniform(draw(draw(states, _LENGTHS), 0), room - half)
        share = np.minimum(np.where(levels == 2, of_document, share), room)
        most = int(np.where(levels == 2, 1, share).max(initial=0))
        if most == 0:
            return np.full(len(rows), -1)
        numbers = np.arange(most, dtype=np.uint64)

        def stream(purpose: int) -> np.ndarray:
            return draw(draw(states, purpose)[:, None], numbers[None])  # (R, most)

        sizes = 1 + np.searchsorted(self._length_bounds, stream(_LENGTHS), side="right")
        sizes[levels == 2, 0] = of_document[levels == 2]
        before = np.cumsum(sizes, axis=1) - sizes
        sizes = np.clip(share[:, None] - before, 0, sizes)
        count = (sizes > 0).sum(1)
        # In another order, so that the shortened one is not always the last; those of size 0 stay behind.
        keys = np.where(sizes > 0, stream(_PERMUTATION) >> 1, np.uint64(2**64 - 1))
        sizes = np.take_along_axis(sizes, np.argsort(keys, axis=1, kind="stable"), axis=1)
        # Between two spans is a token at least. What is left of the row is shared out before and between them.
        slack = room - share - np.maximum(count - 1, 0)
        gaps = np.where(sizes > 0, _uniform(stream(_PLACES), slack[:, None]), 2**62)
        starts = np.sort(gaps, axis=1) + np.cumsum(sizes, axis=1) - sizes + np.arange(most)
        flat = (np.cumsum(room) - room)[:, None] + starts
        chosen = sizes > 0
        found = np.full(len(rows), -1)
        within = positions_in_rows(sizes[chosen])
        found[np.repeat(flat[chosen], sizes[chosen]) + within] = np.repeat(
            np.broadcast_to(np.arange(most), sizes.shape)[chosen], sizes[chosen]
        )
        return found

    @cached_property
    def _length_bounds(self) -> np.ndarray:
        """(LONGEST_SPAN - 1,) uint64 draws from which on a span has 2, 3, ... tokens."""
        factors = MEAN_SPAN / np.arange(2, LONGEST_SPAN + 1)
        chances = np.cumprod([1.0, *factors])
        # A double has 53 bits, and 1 has no place among the draws.
        bits = np.cumsum(chances)[:-1] / chances.sum() * 2.0**53
        return np.minimum(bits, 2.0**53 - 1).astype(np.uint64) << 11

    def _sentences(self, ids: np.ndarray, rows: np.ndarray, chosen: np.ndarray, states: np.ndarray) -> np.ndarray:
        """For the chosen tokens the number of their sentence in the batch if it is hidden, else -1."""
        places = np.flatnonzero(chosen)
        # A sentence begins with a row, behind the end of one, and behind a special token.
        begins = _changes(rows[places])
        begins[1:] |= np.isin(ids[places[:-1]], self.sentence_end_ids) | (np.diff(places) > 1)
        sentence, owners = np.cumsum(begins) - 1, rows[places[begins]]
        sizes = np.bincount(sentence, minlength=1)[: len(owners)]
        order = self._shuffled(owners, _SENTENCES, states)
        # In drawn order: how many tokens the sentences of a row before this one hide.
        so_far = np.cumsum(sizes[order]) - sizes[order]
        so_far -= np.maximum.accumulate(np.where(_changes(owners[order]), so_far, 0))
        share = np.maximum(1, (self.ratio * np.bincount(rows[places], minlength=len(states))).astype(np.int64))
        is_hidden = np.zeros(len(sizes), dtype=bool)
        is_hidden[order] = so_far < share[owners[order]]
        return np.where(is_hidden[sentence], sentence, -1)

    def _columns(
        self, ids: np.ndarray, lengths: np.ndarray, spans: "_Spans", masks: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """New (R,) lengths, and (T,) columns. masks: (R,) the mask token of each row."""
        kept = ~spans.hidden
        kept[spans.starts] = True
        rows = np.repeat(np.arange(len(lengths)), lengths)
        context = np.bincount(rows[kept], minlength=len(lengths))  # (R,) tokens of part A
        infilled = np.bincount(spans.rows, weights=spans.sizes + 1, minlength=len(lengths)).astype(np.int64)
        new_lengths = context + infilled
        begin = np.cumsum(new_lengths) - new_lengths
        position = positions_in_rows(context)
        in_context = np.repeat(begin, context) + position
        columns = {
            name: np.zeros(new_lengths.sum(), dtype=np.int64)
            for name in ("input_ids", "position_ids", "block_position_ids", "context_mask")
        }
        columns["lm_labels"] = np.full(new_lengths.sum(), IGNORED_LABEL, dtype=np.int64)
        masked = ids.copy()
        masked[spans.starts] = masks[spans.rows]
        columns["input_ids"][in_context] = masked[kept]
        columns["position_ids"][in_context] = position
        columns["context_mask"][in_context] = 1
        if len(spans.starts):
            place = np.cumsum(kept) - 1  # of a kept token among all of part A
            starts, sizes = spans.starts[spans.order], spans.sizes[spans.order]
            within = positions_in_rows(sizes + 1)
            of_row = positions_in_rows(infilled[infilled > 0])
            target = np.repeat(begin + context, infilled) + of_row
            columns["position_ids"][target] = np.repeat(position[place[starts]], sizes + 1)
            columns["block_position_ids"][target] = within + 1
            token = np.repeat(starts, sizes + 1) + within  # the one that is predicted; one too far at a span's end
            is_end = within == np.repeat(sizes, sizes + 1)
            columns["lm_labels"][target] = np.where(is_end, self.tokens.end, ids[np.minimum(token, len(ids) - 1)])
            columns["input_ids"][target] = np.where(within == 0, self.tokens.start, ids[token - 1])
        return new_lengths, columns


def blank_infilling_for(tokenizer: Any, seed: int, **options: Any) -> BlankInfilling:
    """The blank infilling of a GLM's tokenizer. options: fields of BlankInfilling from `ratio` on.

    Raises ConfigError for a tokenizer of another model, and for options that cannot be.
    """
    special = np.unique(np.array(tokenizer.all_special_ids, dtype=np.int64))
    if options.get("sentence_probability"):
        options = {"sentence_end_ids": sentence_end_ids(tokenizer), **options}
    return BlankInfilling(glm_tokens(tokenizer), special, seed, **options)


class _Spans(NamedTuple):
    """Spans of all rows in their order in the text; `order` is that of part B.

    hidden: (T,) which tokens are in one. starts: where each begins among them.
    """

    hidden: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray
    order: np.ndarray


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Where one of some columns differs from the entry before; there is a change at the beginning."""
    found = np.ones(len(columns[0]), dtype=bool)
    found[1:] = np.any([each[1:] != each[:-1] for each in columns], axis=0)
    return found


def _uniform(draws: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to `largest`, of draws of 64 bits, as good as equally likely."""
    return ((draws >> 32) * (largest + 1).astype(np.uint64) >> 32).astype(np.int64)


def _longest_runs(rows: np.ndarray, is_free: np.ndarray) -> np.ndarray:
    """Which tokens are of the longest run of free ones in their row, of equal ones the first."""
    begins = _changes(rows, is_free)
    run, owners = np.cumsum(begins) - 1, rows[begins]
    sizes = np.bincount(run, weights=is_free)
    order = np.lexsort((-sizes, owners))  # stable: of equal ones the first stands first
    is_longest = np.zeros(len(sizes), dtype=bool)
    is_longest[order[_changes(owners[order])]] = True
    return is_free & is_longest[run]
