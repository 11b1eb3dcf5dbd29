"""What is proved of a folder's weights is proved once in a run, and again of weights that changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from glmd.errors import ModelError
from glmd.models.loading import each_proved_once, proved


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    return shutil.copytree(tiny.teacher, tmp_path / "model")


def pad_of(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight[model.config.pad_token_id]


def test_the_same_weights_are_proved_once_in_a_run_and_changed_ones_again(folder: Path) -> None:
    asked: list[Any] = []

    def load(dtype: torch.dtype = torch.float32) -> None:
        proved(BertForMaskedLM.from_pretrained(folder, dtype=dtype), asked.append, str(folder))

    load(), load()
    assert len(asked) == 2, "outside of a run nothing is remembered"
    with each_proved_once():
        load(), load()
        assert len(asked) == 3
        load(torch.bfloat16)
        assert len(asked) == 4, "another precision rounds otherwise"
        weights = load_file(folder / "model.safetensors")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        load(), load()
        assert len(asked) == 5
        proved(BertForMaskedLM.from_pretrained(folder), asked.append)  # with a head of its own
        assert len(asked) == 6
    load()
    assert len(asked) == 7


def test_a_pad_that_is_silenced_for_the_proof_is_silenced_in_each_model_and_a_refusal_is_not_remembered(
    folder: Path,
) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][0] = 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def reads_pads(model: Any) -> None:
        if pad_of(model).any():
            raise ModelError("padding changes its output")

    def never(model: Any) -> None:
        raise ModelError("no")

    with each_proved_once():
        for _ in range(3):
            model = BertForMaskedLM.from_pretrained(folder)
            assert pad_of(model).any()
            proved(model, reads_pads, str(folder))
            assert not pad_of(model).any()
        for _ in range(2):
            with pytest.raises(ModelError, match="no"):
                proved(BertForMaskedLM.from_pretrained(folder), never, str(folder))
