"""No score, soft label or answer comes of a number that is not finite."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import class_form
from test_trainer import TASK, C, V, distiller_of, model_of, teacher_of, train
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertTokenizer,
)

from glmd.cli import main
from glmd.data.batches import Collate
from glmd.distillation.teacher import OnlineTeacher, unsound_examples
from glmd.errors import NumericsError
from glmd.evaluation.bits_per_byte import text_bits
from glmd.evaluation.scoring import predict, score_lm
from glmd.losses.finite import examples_of_tokens, require_finite, spoiled
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import TaskExample
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task
from glmd.vocabulary.vocabulary import Vocabulary

NAN, INF = math.nan, math.inf


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_answer_that_is_not_finite_is_refused_with_model_and_example(value: float) -> None:
    require_finite("students/a", {0: [1.0, 2.0], 1: [3.0]})
    with pytest.raises(NumericsError, match=rf"students/a: logits {value} of example 4 .* and of 1 others") as refused:
        require_finite("students/a", {7: [value], 4: [0.0, value], 1: [3.0]})
    assert "\n" not in str(refused.value)


def test_logits_that_are_not_finite_are_made_nan_and_absent_choices_stay() -> None:
    logits = torch.tensor([[1.0, -INF], [INF, 2.0], [-INF, 0.0], [NAN, 3.0]])
    assert spoiled(logits, None).isnan().tolist() == [[False, True], [True, False], [True, False], [True, False]]
    ours = spoiled(logits, torch.tensor([1, 2, 2, 2]))
    assert ours[0].tolist() == [1.0, -INF] and ours.isnan().any(1).tolist() == [False, True, True, True]


def test_every_token_knows_its_example() -> None:
    batch = {"example_id": torch.tensor([5, 2]), "predicts": torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()}
    assert examples_of_tokens(batch).tolist() == [5, 5, 2]
    batch |= {"num_choices": torch.tensor([2, 1]), "predicts": torch.tensor([[1, 1], [1, 0], [1, 0]]).bool()}
    assert examples_of_tokens(batch).tolist() == [5, 5, 5, 2]


def test_a_teacher_whose_soft_label_is_not_finite_stops_the_stage_and_is_named_by_example(tmp_path: Path) -> None:
    """A class of -inf has probability 0, of which the loss alone would make a finite number."""
    teacher = OnlineTeacher(None, model_of(BertForSequenceClassification, 2, 1), Vocabulary.identity(V))
    teacher.classifier.classifier.bias.data[0] = -INF  # type: ignore[union-attr]
    with pytest.raises(NumericsError, match=r"The teacher's outputs for \[[\d, ]+\] are not finite; check the teacher"):
        train(tmp_path, distiller=distiller_of(TASK), teacher=teacher)


def test_examples_of_which_hidden_states_are_not_finite_are_found() -> None:
    teacher = teacher_of()
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "predicts": torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
        "example_id": torch.tensor([3, 11]),
        "positions": torch.tensor([0, 1, 2, 3, 4]),
    }
    outputs = teacher(batch)
    assert unsound_examples(outputs, batch) == []
    outputs.hidden_states[4, 1] = INF  # type: ignore[index]
    assert unsound_examples(outputs, batch) == [11]


def test_scores_of_words_that_are_not_finite_are_refused(tiny: Any, accelerator: Accelerator) -> None:
    tokenizer = BertTokenizer.from_pretrained(tiny.teacher)
    data = TaskDataset([TaskExample(i, (("a b", "c"),), 0) for i in range(5)], class_form(), tokenizer, max_length=16)
    student = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=1)).eval()
    teacher = OnlineTeacher(BertForMaskedLM(student.config), None, Vocabulary.identity(len(tokenizer)))
    student.cls.predictions.bias.data[3] = NAN
    with pytest.raises(NumericsError, match=r"student and teacher: the predictions of example 0"):
        score_lm(student, teacher, data, Collate(0), token_map=np.arange(len(tokenizer)), accelerator=accelerator)


def test_bits_that_are_not_finite_are_refused(accelerator: Accelerator) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    model.transformer.wte.weight.data[7] = NAN
    texts = [[1, 2], [3, 7], [4, 5]]
    with pytest.raises(NumericsError, match="of example 0"):
        text_bits(model, texts, start=[0], max_length=8, accelerator=accelerator)


def test_only_the_choices_that_an_example_has_not_may_be_infinite(tiny: Any, accelerator: Accelerator) -> None:
    tokenizer = BertTokenizer.from_pretrained(tiny.teacher)
    examples = [
        TaskExample(i, tuple(("a", "b") for _ in range(2 + i % 2)), 0, choices=tuple("abc"[: 2 + i % 2]))
        for i in range(4)
    ]

    def answers(value: float) -> np.ndarray:
        model = BertForMultipleChoice(BertConfig.from_pretrained(tiny.teacher))
        last = torch.tensor([[value]])
        model.classifier.register_forward_hook(lambda _, given, logits: torch.cat([logits[:-1] * 0, last]))
        data = TaskDataset(examples, task_form(load_task("COPA"), kind="masked"), tokenizer, max_length=16)
        return predict(model, data, Collate(0), token_map=None, accelerator=accelerator, name="m")

    assert np.isneginf(answers(1.0)).sum() == 2
    with pytest.raises(NumericsError, match=r"m: logits -inf of example \d"):
        answers(-INF)


@pytest.fixture
def overflowing(tiny: Any, tmp_path: Path) -> Any:
    """`overflowing(scale)`: a classifier in a float16 file whose activations exceed float16, at last float32 too."""

    def make(scale: float) -> Path:
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=C
        )
        config.id2label, config.label2id = (
            {0: "entailment", 1: "not_entailment"},
            {"entailment": 0, "not_entailment": 1},
        )
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            model.bert.embeddings.LayerNorm.weight.fill_(scale)
            model.bert.encoder.layer[0].intermediate.dense.weight *= scale
            model.bert.encoder.layer[0].output.LayerNorm.weight.fill_(scale)
            model.bert.pooler.dense.weight *= 100
            model.classifier.weight.fill_(6e4)
            model.classifier.bias[0] = 6e4
        folder = tmp_path / "overflowing"
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_folder_of_half_precision_is_scored_in_float32(
    tiny: Any, overflowing: Any, tmp_path: Path, capsys: Any, command: str
) -> None:
    folder = overflowing(5e4)
    with torch.no_grad():
        ids = torch.arange(5, 12)[None]
        half = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float16)
        assert not half(input_ids=ids).logits.isfinite().all(), "what is tried here is no overflow"
    assert main(arguments(command, folder, tiny, tmp_path)) == 0, capsys.readouterr().err
    if command == "predict":
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_folder_whose_answers_are_not_finite_has_no_score_and_no_answers(
    tiny: Any, overflowing: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    folder = overflowing(1.0)
    real = BertForSequenceClassification.forward

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        outputs = real(self, *given, **named)
        if len(outputs.logits) > 3:  # not for the few ids by which a model is proved
            outputs.logits[0] *= INF
        return outputs

    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    assert main(arguments(command, folder, tiny, tmp_path)) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and f"NumericsError: {folder}: logits" in said.err
    assert not (tmp_path / "answers.jsonl").exists()


def arguments(command: str, folder: Path, tiny: Any, place: Path) -> list[str]:
    if command == "evaluate":
        data = tiny.superglue / "RTE"
        return ["evaluate", str(folder), "--task", "RTE", "--data", str(data.parent), "--max-length", "32"]
    rows = [json.loads(line) for line in (tiny.superglue / "RTE" / "val.jsonl").read_text().splitlines()]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--file", str(place / "rows.jsonl"), "--output", str(place / "answers.jsonl"), "--max-length", "32"]
    return ["predict", str(folder), "--task", "RTE", *given]
