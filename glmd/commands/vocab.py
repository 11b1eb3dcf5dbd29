"""What a vocabulary costs and what it covers: the curve by which to choose a keep ratio.

    curve = budget_curve("bert-base-uncased", ["text/"], ratios=RATIOS)
    print(curve_table(curve))
    print(curve.knee)

Nine of ten lines of the corpus are counted, the tenth is what the vocabularies are judged by.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glmd.data.corpus import read_documents, require_corpus
from glmd.errors import ConfigError, DataError, ModelError
from glmd.models.loading import load_model_as_saved, load_model_config, require_model
from glmd.models.source_tokenizer import load_source_tokenizer
from glmd.reporting.report import markdown_table
from glmd.storage import write_problem
from glmd.vocabulary.build import build_vocabulary, report_unknown
from glmd.vocabulary.selection import choose_kept_ids, must_keep_ids, parts_to_keep, unknown_id
from glmd.vocabulary.slicing import parameters_by_vocabulary
from glmd.vocabulary.tokenizer import compress_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
HELD_OUT = 10  # every tenth line
INFLATION_LINES = 20_000  # held-out lines that every vocabulary's stock tokenizer cuts
BATCH = 1000


@dataclass(frozen=True)
class Point:
    """A vocabulary of `tokens` tokens. Shares are of the held-out text's running tokens."""

    keep_ratio: float
    tokens: int
    coverage: float  # share of tokens that are kept; the others are mapped, or unknown whatever is kept
    inflation: float  # tokens of the stock tokenizer over those of the source, minus 1
    parameters: int  # of the whole model
    vocabulary_parameters: int


@dataclass(frozen=True)
class Curve:
    """Points by falling ratio. counted, held_out: running tokens. must_keep: tokens that no budget may drop."""

    points: tuple[Point, ...]
    counted: int
    held_out: int
    used: int  # different tokens that the counted text uses
    source_size: int
    must_keep: int
    counts: np.ndarray = field(compare=False, repr=False)  # (V,) of the counted text
    unknown: float = 0.0  # share of held-out tokens that the source tokenizer cannot spell

    @property
    def knee(self) -> Point:
        """Where the curve of coverage over ratio is farthest above the line between its ends (Kneedle, 2011)."""
        first, last = self.points[-1], self.points[0]
        slope = (last.coverage - first.coverage) / max(last.keep_ratio - first.keep_ratio, 1e-9)
        return max(self.points, key=lambda p: p.coverage - first.coverage - slope * (p.keep_ratio - first.keep_ratio))


def budget_curve(
    teacher: str,
    corpus: Sequence[str],
    *,
    ratios: Sequence[float] = RATIOS,
    text_field: str = "text",
    selection: str = "closed",
) -> Curve:
    """Coverage, length and size for each ratio that the must-keep tokens leave possible.

    teacher: folder or hub id with any head; its weights are not loaded.
    Raises GlmdError with one line.
    """
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise ConfigError(f"--keep-ratios must be in (0, 1], got {ratio}")
    require_model(teacher, field="teacher")
    require_corpus(corpus, text_field)
    config, tokenizer = load_model_config(teacher), load_source_tokenizer(teacher, kind=None)
    counts, held_out, lines = _count(tokenizer, corpus, text_field)
    must_keep, parts = must_keep_ids(tokenizer), parts_to_keep(tokenizer, selection)
    source_lengths = _lengths(tokenizer, lines)
    unknown = unknown_id(tokenizer)
    unknown_share = 0.0 if unknown is None else float(held_out[unknown] / held_out.sum())
    report_unknown(tokenizer, unknown_share)
    points = []
    for ratio in sorted(set(ratios), reverse=True):
        try:
            kept_ids = choose_kept_ids(counts, must_keep, keep_ratio=ratio, parts=parts)
        except ModelError:
            continue
        inflation = _lengths(_stock(tokenizer, kept_ids), lines) / source_lengths - 1
        total, of_vocabulary = parameters_by_vocabulary(config, len(kept_ids))
        coverage = float(held_out[kept_ids].sum() / held_out.sum()) - unknown_share  # the unknown token is always kept
        points.append(Point(ratio, len(kept_ids), coverage, inflation, total, of_vocabulary))
    if not points:
        smallest = len(must_keep) / len(tokenizer)
        raise ConfigError(f"--keep-ratios: the tokens that must be kept are more than each; begin at {smallest:.2f}")
    used = int((counts > 0).sum())
    totals = int(counts.sum()), int(held_out.sum())
    return Curve(tuple(points), *totals, used, len(tokenizer), len(must_keep), counts, unknown_share)


def examples(
    teacher: str, counts: np.ndarray, keep_ratio: float, *, mapping: str, selection: str, top: int
) -> list[tuple[str, str, int]]:
    """(dropped token, the kept one it is mapped onto, how often it was counted), the most frequent first.

    counts: (V,) of a curve.
    """
    tokenizer = load_source_tokenizer(teacher, kind=None)
    embeddings = load_model_as_saved(teacher).get_input_embeddings().weight.detach().float()
    vocabulary = build_vocabulary(
        tokenizer, embeddings, counts, keep_ratio=keep_ratio, selection=selection, mapping=mapping
    )
    dropped = vocabulary.dropped_ids
    frequent = dropped[np.argsort(-counts[dropped], kind="stable")[:top]]
    targets = vocabulary.kept_ids[vocabulary.token_map[frequent]]
    names = (tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in (frequent, targets))
    return list(zip(*names, counts[frequent].tolist(), strict=True))


def curve_table(curve: Curve) -> str:
    """Markdown, with the knee marked."""
    full = curve.points[0]
    header = [
        "keep ratio",
        "tokens",
        "kept text",
        "mapped",
        "longer without glmd",
        "vocabulary",
        "whole model",
        "saved",
    ]
    body = []
    for point in curve.points:
        saved = full.parameters - point.parameters
        body.append(
            [
                f"{point.keep_ratio:g}" + (" *" if point == curve.knee else ""),
                f"{point.tokens:,}",
                f"{point.coverage:.2%}",
                f"{max(0.0, 1 - point.coverage - curve.unknown):.2%}",
                f"{point.inflation:+.2%}",
                f"{point.vocabulary_parameters / 1e6:.2f} M",
                f"{point.parameters / 1e6:.2f} M",
                f"{saved * 4 / 1e6:,.0f} MB ({saved / full.parameters:.0%})",
            ]
        )
    unknown = f"{curve.unknown:.2%} are unknown to the tokenizer, whatever is kept. " if curve.unknown else ""
    note = (
        f"{curve.counted:,} tokens were counted, {curve.held_out:,} held out. They use {curve.used:,} of "
        f"{curve.source_size:,} tokens; {curve.must_keep:,} must be kept in any case. MB are of float32. "
        f"{unknown}* the knee: beyond {curve.knee.keep_ratio:g} a token more covers less than the average one."
    )
    return f"{markdown_table(header, body)}\n\n{note}"


def curve_json(curve: Curve) -> str:
    fields = asdict(curve)
    del fields["counts"]
    return json.dumps({**fields, "knee": curve.knee.keep_ratio}, indent=1) + "\n"


def draw_curve(curve: Curve, path: Path) -> None:
    """A picture of the curve. Raises ConfigError without matplotlib, or for a kind of file it does not write."""
    require_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    left = figure.subplots()
    ratios = [point.keep_ratio for point in curve.points]
    left.plot(
        ratios, [100 * point.coverage for point in curve.points], "o-", color="tab:blue", label="text kept as it is"
    )
    left.axvline(curve.knee.keep_ratio, color="gray", linestyle=":", label=f"knee at {curve.knee.keep_ratio:g}")
    left.set(xlabel="share of tokens kept", ylabel="% of running tokens", ylim=(None, 100.5))
    right = left.twinx()
    sizes = [point.parameters / 1e6 for point in curve.points]
    right.plot(ratios, sizes, "s--", color="tab:orange", label="parameters of the model")
    right.set(ylabel="million parameters", ylim=(0, None))
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="lower right")
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"--picture {path}: {str(error).splitlines()[0]}") from None


def examples_table(rows: list[tuple[str, str, int]]) -> str:
    return markdown_table(["dropped", "reads as", "seen"], [[a, b, f"{count:,}"] for a, b, count in rows])


def require_free_file(path: Path | None) -> None:
    """Refuse a place where no file can be written, or where there is one."""
    if path is not None:
        problem = "exists already" if path.exists() else write_problem(path.parent)
        if problem is not None or not path.parent.is_dir():
            raise ConfigError(f"{path}: {problem or 'its folder is not there'}; choose another")


def require_plots() -> None:
    """Refuse a picture where there is nothing to draw it with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--picture needs matplotlib; pip install 'glmd[plots]', or leave it out") from None


def _count(tokenizer: Any, corpus: Sequence[str], text_field: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(V,) counts of nine lines of ten, (V,) counts of the tenth, and some of these lines."""
    counts, held_out = (np.zeros(len(tokenizer), dtype=np.int64) for _ in range(2))
    kept_lines: list[str] = []
    batches: tuple[list[str], list[str]] = ([], [])
    number = -1
    for number, line in enumerate(
        line
        for document in read_documents(corpus, text_field=text_field)
        for line in document.splitlines()
        if line.strip()
    ):
        is_held_out = number % HELD_OUT == HELD_OUT - 1
        batches[is_held_out].append(line)
        if is_held_out and len(kept_lines) < INFLATION_LINES:
            kept_lines.append(line)
        for batch, into in zip(batches, (counts, held_out), strict=True):
            if len(batch) == BATCH:
                _add(tokenizer, batch, into)
    for batch, into in zip(batches, (counts, held_out), strict=True):
        _add(tokenizer, batch, into)
    if kept_lines and not held_out.sum():
        raise DataError("corpus: its held-out lines give no tokens; give text that the tokenizer can read")
    if not kept_lines:
        raise DataError(f"corpus: {number + 1} lines are too few; at least {HELD_OUT} are needed, one to judge by")
    return counts, held_out, kept_lines


def _add(tokenizer: Any, batch: list[str], counts: np.ndarray) -> None:
    for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"] if batch else ():
        counts += np.bincount(ids, minlength=len(counts)) if ids else 0
    batch.clear()


def _lengths(tokenizer: Any, lines: list[str]) -> int:
    """Tokens of all lines."""
    parts = (lines[first : first + BATCH] for first in range(0, len(lines), BATCH))
    return sum(
        len(ids) for part in parts for ids in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    )


def _stock(tokenizer: Any, kept_ids: np.ndarray) -> Any:
    """What plain AutoTokenizer would give for these tokens; where the others go makes no difference to it."""
    from transformers import PreTrainedTokenizerFast

    if len(kept_ids) == len(tokenizer):
        return tokenizer
    compressed = compress_tokenizer(tokenizer, Vocabulary.unmapped(kept_ids, len(tokenizer)))
    return PreTrainedTokenizerFast(tokenizer_object=compressed.backend_tokenizer)
