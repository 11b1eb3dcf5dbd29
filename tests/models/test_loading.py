"""A folder's tokenizer is that of its model; its weights are proved once in a run, and again where they changed."""

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, one_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForMaskedLM

from glmd.commands.evaluate import evaluate_text
from glmd.errors import ModelError
from glmd.models.loading import each_proved_once, proved
from glmd.models.source_tokenizer import holds_tokenizer, load_source_tokenizer
from glmd.planning.plan import is_config_alone
from glmd.vocabulary.tokenizer import load_tokenizer, save_tokenizer, without_rows


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


@pytest.mark.parametrize("family", one_of(FAMILIES))
def test_a_tokenizer_without_its_last_tokens_is_the_one_that_never_had_them(family: str, tmp_path: Path) -> None:
    twin = FAMILIES[family]()
    tokenizer = copy.deepcopy(twin)
    tokenizer.add_tokens(["later"])
    tokenizer.add_special_tokens({"extra_special_tokens": [*twin._extra_special_tokens, "<image>"]})
    if twin.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "<image>"})
    assert without_rows(tokenizer, len(tokenizer)) == []
    assert without_rows(tokenizer, len(twin)) == ["<image>", "later"]
    save_tokenizer(tokenizer, tmp_path)
    for each in (tokenizer, load_tokenizer(tmp_path)):
        assert each.get_vocab() == twin.get_vocab() and each.special_tokens_map == twin.special_tokens_map
        for text in ("the cat", "a <image> later, and later still<image>"):
            assert each(text)["input_ids"] == twin(text)["input_ids"]


def test_a_token_without_a_row_is_left_out_and_said_unless_every_text_begins_with_it(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the image token of Gemma 3's tokenizer, for which its models of text alone have no vector."""
    folder = shutil.copytree(models / "LlamaForCausalLM", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        assert len(load_source_tokenizer(str(folder), kind="causal")) == rows
    assert "its model has no row for the token <image>, which is left out" in caplog.text
    tokenizer.add_bos_token, tokenizer.bos_token = True, "<image>"
    tokenizer.update_post_processor()
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="puts '<image>' into every text, for which the model has no row"):
        load_source_tokenizer(str(folder), kind="causal")


def test_text_that_spells_a_token_without_a_row_is_scored_by_its_letters(models: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sang later than the bird")
    folder, scores = shutil.copytree(models / "LlamaForCausalLM", tmp_path / "model"), []
    for added in ([], ["later"]):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(added)
        tokenizer.save_pretrained(folder)
        scores.append(evaluate_text(folder, tmp_path / "text.txt", max_length=32))
    assert scores[0] == scores[1]


def test_a_folder_with_sentencepieces_file_alone_holds_a_tokenizer(tiny: Any, tmp_path: Path) -> None:
    """DeBERTa v3 is published with spm.model, ALBERT with spiece.model, and neither with a tokenizer.json."""
    for name in ("spm.model", "sentencepiece.bpe.model", "tokenizer.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        shutil.copy(tiny.teacher / "config.json", folder)
        assert is_config_alone(str(folder)) and not holds_tokenizer(folder)
        (folder / name).touch()
        assert holds_tokenizer(folder) and not is_config_alone(str(folder))
