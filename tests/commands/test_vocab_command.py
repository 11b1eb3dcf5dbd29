"""`glmd vocab`: what each keep ratio covers and saves, against plain counting and the models themselves."""

import builtins
import json

import numpy as np
import pytest
import transformers
from families import CLASSES

from glmd.cli import main
from glmd.commands.vocab import HELD_OUT, Curve, Point, budget_curve, curve_json, curve_table, examples
from glmd.vocabulary.selection import choose_kept_ids, must_keep_ids, parts_to_keep
from glmd.vocabulary.slicing import parameters_by_vocabulary, slice_model
from glmd.vocabulary.tokenizer import compress_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary


def vocab(models, name: str, *arguments: object) -> int:
    return main(["vocab", str(models / "corpus.txt"), "--teacher", str(models / name), *map(str, arguments)])


@pytest.mark.parametrize(("name", "ratio"), [("RobertaForMaskedLM", 0.85), ("T5ForConditionalGeneration", 0.7)])
def test_a_point_says_what_plain_counting_says(name, ratio, models):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / name)
    lines = (models / "corpus.txt").read_text().splitlines()
    judged = [line for i, line in enumerate(lines) if i % HELD_OUT == HELD_OUT - 1]
    curve = budget_curve(str(models / name), [str(models / "corpus.txt")], ratios=[ratio, 1.0, 0.01])
    assert [point.keep_ratio for point in curve.points] == [1.0, ratio], "0.01 is less than must be kept"
    whole, part = curve.points
    assert (whole.coverage, whole.inflation, whole.tokens) == (1.0, 0.0, len(tokenizer))
    # The kept ones again, the plain way: what the mapped tokenizer of such a vocabulary leaves unmapped.
    counts = np.zeros(len(tokenizer), dtype=int)
    for i, line in enumerate(lines):
        for token in tokenizer(line, add_special_tokens=False)["input_ids"] if i % HELD_OUT != HELD_OUT - 1 else ():
            counts[token] += 1
    kept = choose_kept_ids(counts, must_keep_ids(tokenizer), keep_ratio=ratio, parts=parts_to_keep(tokenizer, "closed"))
    ids = [i for line in judged for i in tokenizer(line, add_special_tokens=False)["input_ids"]]
    assert part.tokens == len(kept) and part.coverage == pytest.approx(np.isin(ids, kept).mean())
    token_map = np.zeros(len(tokenizer), dtype=int) + len(kept) - 1
    token_map[kept] = np.arange(len(kept))
    plain = compress_tokenizer(tokenizer, Vocabulary(kept, token_map)).backend_tokenizer
    longer = sum(len(plain.encode(line, add_special_tokens=False).ids) for line in judged)
    assert part.inflation == pytest.approx(longer / len(ids) - 1) and part.inflation > 0
    assert (curve.counted, curve.held_out) == (counts.sum(), len(ids))


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_are_those_of_the_model_that_compress_would_write(name, models):
    model = getattr(transformers, name).from_pretrained(models / name)
    size = model.config.vocab_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / name)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    dropped = [i for i in range(size) if i not in special][-7:]
    kept = np.setdiff1d(np.arange(size), dropped)
    token_map = np.zeros(size, dtype=int)
    token_map[kept] = np.arange(size - 7)
    vocabulary = Vocabulary(kept, token_map)
    student = slice_model(model, vocabulary)
    total, of_vocabulary = parameters_by_vocabulary(model.config, size - 7)
    assert total == student.num_parameters()
    whole, all_words = parameters_by_vocabulary(model.config, size)
    assert whole == model.num_parameters() and whole - total == all_words - of_vocabulary > 0


def curve(*points: tuple[float, float]) -> Curve:
    made = tuple(Point(ratio, 1, coverage, 0.0, 1, 1) for ratio, coverage in points)
    return Curve(made, counted=1, held_out=1, used=1, source_size=1, must_keep=1, counts=np.ones(1))


def test_the_knee_is_the_point_farthest_above_the_line_between_the_ends():
    assert curve((1.0, 1.0), (0.5, 0.98), (0.3, 0.95), (0.1, 0.5)).knee.keep_ratio == 0.3
    assert curve((1.0, 1.0), (0.6, 0.95), (0.1, 0.8)).knee.keep_ratio == 0.6
    assert curve((1.0, 1.0)).knee.keep_ratio == 1.0


def test_the_most_frequent_dropped_tokens_are_shown_with_their_targets(models):
    model = str(models / "GPT2LMHeadModel")
    counted = budget_curve(model, [str(models / "corpus.txt")], ratios=[1.0]).counts
    rows = examples(model, counted, 0.9, mapping="cosine", selection="closed", top=4)
    counts = [count for _, _, count in rows]
    assert len(rows) == 4 and counts == sorted(counts, reverse=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "GPT2LMHeadModel")
    assert all(tokenizer.convert_tokens_to_ids(token) is not None for row in rows for token in row[:2])


def test_the_command_prints_a_table_and_writes_json_and_picture(models, tmp_path, capsys):
    paths = (tmp_path / "curve.json", tmp_path / "curve.png")
    arguments = ("--keep-ratios", 0.8, 0.9, 1, "--examples", 3, "--json", paths[0], "--picture", paths[1])
    assert vocab(models, "GPT2LMHeadModel", *arguments) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith(("| 0.", "| 1 "))]
    assert len(rows) == 3 and "At 0." in out and out.count("*") >= 2
    saved = json.loads(paths[0].read_text())
    assert [point["keep_ratio"] for point in saved["points"]] == [1.0, 0.9, 0.8] and saved["knee"] in (0.8, 0.9, 1.0)
    assert paths[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep-ratios", "0"], "--keep-ratios must be in (0, 1], got 0.0"),
        (["--keep-ratios", "0.01", "0.02"], "the tokens that must be kept are more than each; begin at 0.65"),
        (["--json", "absent/curve.json"], "absent/curve.json: its folder is not there; choose another"),
        (["--selection", "free"], "selection free has no effect: tokens of Unigram are not merged"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments, says, models, capsys):
    name = "T5EncoderModel" if "free" in arguments else "GPT2LMHeadModel"
    assert vocab(models, name, *arguments) == 2
    assert says in capsys.readouterr().err


def test_a_picture_needs_matplotlib_and_a_free_place(models, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken.png").write_text("mine")
    assert vocab(models, "GPT2LMHeadModel", "--picture", tmp_path / "taken.png") == 2
    assert "taken.png: exists already; choose another" in capsys.readouterr().err
    assert vocab(models, "GPT2LMHeadModel", "--keep-ratios", "1", "--picture", tmp_path / "curve.doc") == 2
    assert "curve.doc" in capsys.readouterr().err
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert vocab(models, "GPT2LMHeadModel", "--picture", tmp_path / "curve.png") == 2
    assert "--picture needs matplotlib; pip install 'glmd[plots]'" in capsys.readouterr().err


def test_a_corpus_of_a_few_lines_is_refused(models, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("the cat\n" * 9)
    assert main(["vocab", str(tmp_path / "short.txt"), "--teacher", str(models / "GPT2LMHeadModel")]) == 2
    assert "corpus: 9 lines are too few; at least 10 are needed" in capsys.readouterr().err


def test_unknown_tokens_are_no_coverage(tiny, tmp_path, caplog):
    (tmp_path / "foreign.txt").write_text("東 京 語\n" * 40)
    known = [line for line in tiny.corpus.read_text().splitlines() if line][:50]
    model = str(tiny.teacher)
    (whole,) = budget_curve(model, [str(tmp_path / "foreign.txt")], ratios=[1.0]).points
    assert whole.coverage == 0 and "100.00 % of the text are unknown to the tokenizer ([UNK])" in caplog.text
    caplog.clear()
    (tmp_path / "half.txt").write_text("".join(f"{line}\n{line} 東 京\n" for line in known))
    curve = budget_curve(model, [str(tmp_path / "half.txt")], ratios=[1.0])
    assert 0 < curve.unknown < 1 and curve.points[0].coverage == pytest.approx(1 - curve.unknown)
    table = curve_table(curve)
    assert f"{curve.unknown:.2%} are unknown to the tokenizer, whatever is kept" in table
    assert [grid_point.strip() for grid_point in table.splitlines()[2].split("|")[3:5]] == [
        f"{1 - curve.unknown:.2%}",
        "0.00%",
    ]
    assert json.loads(curve_json(curve))["unknown"] == curve.unknown


def test_what_bytes_spell_is_not_unknown(models, tmp_path, caplog):
    (tmp_path / "foreign.txt").write_text("東 京 語\n" * 40)
    curve = budget_curve(str(models / "GPT2LMHeadModel"), [str(tmp_path / "foreign.txt")], ratios=[1.0])
    assert curve.unknown == 0 and curve.points[0].coverage == 1 and "unknown" not in caplog.text
