"""Scores do not depend on how examples are put into batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import class_form
from transformers import BertConfig, BertForMultipleChoice, BertForSequenceClassification, BertTokenizer

from glmd.data.batches import Collate
from glmd.evaluation.scoring import predict
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import TaskExample
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("batch_size", [3, 7, 64])
def test_logits_are_in_the_rows_order_and_those_of_each_row_alone(
    tiny: Any, accelerator: Accelerator, choices: bool, batch_size: int
) -> None:
    tokenizer, rng = BertTokenizer.from_pretrained(tiny.teacher), np.random.default_rng(0)
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and len(word) == 4]
    texts = [" ".join(rng.choice(words, int(rng.integers(1, 20)))) for _ in range(60)]
    examples = [
        TaskExample(i, tuple((text, "x") for text in texts[3 * i : 3 * i + (2 + i % 2 if choices else 1)]), 0)
        for i in range(20)
    ]
    if choices:
        examples = [TaskExample(e.example_id, e.texts, 0, choices=tuple("abc"[: len(e.texts)])) for e in examples]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model: Any = (BertForMultipleChoice if choices else BertForSequenceClassification)(config).eval()
    form = task_form(load_task("COPA"), kind="masked") if choices else class_form()
    data = TaskDataset(examples, form, tokenizer, max_length=32)
    got = predict(model, data, Collate(0), token_map=None, accelerator=accelerator, batch_size=batch_size)
    assert len(got) == len(examples)
    with torch.no_grad():
        for i, example in enumerate(examples):
            rows = tokenizer(
                [a for a, _ in example.texts], ["x"] * len(example.texts), padding=True, return_tensors="pt"
            )
            rows = {name: each[None] if choices else each for name, each in rows.items()}
            expected = model(**rows).logits[0]
            np.testing.assert_allclose(got[i][: len(expected)], expected, rtol=1e-4, atol=1e-5)
            assert np.isneginf(got[i][len(expected) :]).all()


def test_an_example_is_read_by_the_folders_own_length(finished, tmp_path, caplog):
    """As its card says, else as the task does, in either case as far as its positions go."""
    import shutil

    from glmd.commands.evaluate import _length
    from glmd.errors import ModelError
    from glmd.tasks.tasks import load_task

    rte = load_task("RTE")
    student = shutil.copytree(finished.folder / "tasks/RTE/seed-0/task_soft_labels/student", tmp_path / "student")
    with caplog.at_level("INFO", "glmd"):
        assert _length(str(student), rte, None) == 32
    assert "reads 32 tokens of an example, as its card says; --max-length gives another" in caplog.text
    card = student / "README.md"
    card.write_text(card.read_text().replace("- max_length: 32", "- max_length: 320"))
    assert _length(str(student), rte, None) == 64, "as many as it has positions"
    card.unlink()
    assert _length(str(student), rte, None) == 64 < rte.max_length
    assert _length(str(student), rte, 40) == 40
    with pytest.raises(ModelError, match="65 tokens are more than its 64 positions; give --max-length 64"):
        _length(str(student), rte, 65)


def test_a_batch_to_evaluate_beyond_the_memory_is_refused_with_one_that_fits(finished, tiny, monkeypatch):
    from glmd.commands.evaluate import evaluate_folder
    from glmd.errors import ConfigError

    student = finished.folder / "tasks/RTE/seed-0/task_soft_labels/student"
    with pytest.raises(ConfigError, match="--batch-size 0: give at least 1"):
        evaluate_folder(student, "RTE", tiny.superglue, batch_size=0)
    monkeypatch.setattr("glmd.commands.evaluate.memory_of_this_machine", lambda: 1e5)
    with pytest.raises(ConfigError, match=r"--batch-size 1,000,000,000: of 32 tokens about 10 fit; give at most 10"):
        evaluate_folder(student, "RTE", tiny.superglue, batch_size=10**9)
    assert evaluate_folder(student, "RTE", tiny.superglue, batch_size=10)["examples"] == 12
