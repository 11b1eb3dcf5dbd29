"""Published checkpoints of GLM, in every form, give the logits of a plain forward that reads their keys."""

import argparse
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glm_cases import ROW, SIZES, as_row, plain_logits, published_checkpoint
from glm_tokenizers import bpe_glm, gpt2, wordpiece
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, BertTokenizer, GPT2Tokenizer

from glmd.cli import main
from glmd.commands.convert_glm import convert_glm
from glmd.data.blank_infilling import glm_tokens
from glmd.errors import ModelError
from glmd.models.glm.configuration import TOKEN_IDS
from glmd.models.glm.convert import converted_model
from glmd.models.glm.tokenizer import glm_tokenizer
from glmd.vocabulary.tokenizer import load_tokenizer


def saved(folder: Path, weights: dict[str, Any], form: str) -> Path:
    """The checkpoint in a form that it comes in, and what to give for it."""
    folder.mkdir()
    if form in ("file", "tracker"):
        beside = {  # as DeepSpeed and the GLM repository save them
            "args": argparse.Namespace(hidden_size=16),
            "random_rng_state": random.Random(0).getstate(),
            "np_rng_state": np.random.RandomState(0).get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "csr_tensor_module_names": set(),
        }
        place = folder / "1000" if form == "tracker" else folder
        place.mkdir(exist_ok=True)
        (folder / "latest").write_text("1000\n")
        torch.save({"module": weights, **beside}, place / "mp_rank_00_model_states.pt")
        return folder if form == "tracker" else place / "mp_rank_00_model_states.pt"
    if form == "hub":
        torch.save(weights, folder / "pytorch_model.bin")
    elif form == "safetensors":
        save_file({f"glm.{key}": value for key, value in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("form", ["file", "tracker", "hub", "safetensors"])
def test_a_converted_checkpoint_has_the_logits_of_its_published_keys(form, tmp_path):
    weights = published_checkpoint()
    model = converted_model(saved(tmp_path / "glm", weights, form), num_attention_heads=2)
    expected = plain_logits(weights, *ROW.values(), heads=2)
    assert model.dtype == torch.float64 and model.config.num_hidden_layers == SIZES["num_hidden_layers"]
    found = model(**as_row(padding=2)).logits[0, :11]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def weights():
    return published_checkpoint()


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda w: without(w, "transformer.layers.1.mlp.dense_4h_to_h.bias"),
            {},
            r"it lacks 1 key \(transformer.layers.1.mlp.dense_4h_to_h.bias\)",
        ),
        (
            lambda w: w | {"prompt_spell.spell": torch.zeros(2)},
            {},
            r"it has beside 1 key \(prompt_spell.spell\)",
        ),
        (
            lambda w: {"bert.embeddings.weight": torch.zeros(2)},
            {},
            r"lacks 17 keys \(.* and 14 more\) and has beside 1",
        ),
        (lambda w: w, {"num_attention_heads": None}, "hidden_size 16 is no multiple of 64"),
        (lambda w: w, {"num_attention_heads": 3}, "--num-attention-heads 3 does not divide its hidden_size 16"),
        (lambda w: w, {"size": "110M"}, "is no GLM of 110M: it has vocab_size 40 in place of 30592, hidden_size 16"),
        (
            lambda w: w | {"transformer.layers.0.attention.query_key_value.weight": torch.zeros(45, 16)},
            {},
            r"glm.layers.0.attention.query.weight would have shape \(15, 16\) in place of \(16, 16\)",
        ),
        (
            lambda w: w | {"transformer.final_layernorm.bias": torch.full((16,), torch.nan)},
            {},
            "transformer.final_layernorm.bias holds values that are not finite",
        ),
    ],
)
def test_what_is_no_published_glm_is_one_line_that_says_why(change, options, message, weights, tmp_path):
    path = saved(tmp_path / "glm", change(weights), "hub")
    with pytest.raises(ModelError, match=message) as refused:
        converted_model(path, **{"num_attention_heads": 2, **options})
    assert "\n" not in str(refused.value)


def test_a_file_that_an_old_numpy_wrote_is_read(weights, tmp_path):
    """Which names its own modules otherwise; the published ones are of 2021."""
    path = saved(tmp_path / "glm", weights, "file")
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    now, then = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert any(now in content or then in content for content in parts.values())
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content.replace(now, then))
    assert converted_model(path, num_attention_heads=2).config.hidden_size == 16


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_files_that_are_not_whole_weights_are_refused(weights, tmp_path, capsys):
    with pytest.raises(ModelError, match="no such file or folder"):
        converted_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no mp_rank_00_model_states.pt"):
        converted_model(tmp_path / "empty")
    path = saved(tmp_path / "parts", weights, "file")
    torch.save({"module": weights}, path.with_name("mp_rank_01_model_states.pt"))
    for given in (path, path.parent):
        (path.parent / "latest").unlink(missing_ok=True)
        with pytest.raises(ModelError, match=r"split over 2 parts of model parallelism; merge them with change_mp\.py"):
            converted_model(given)
    torch.save({"module": weights, "hook": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(ModelError, match="holds more than weights, and what it holds is not run"):
        converted_model(tmp_path / "harmful.pt")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot be read"):
        converted_model(tmp_path / "cut.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(ModelError, match="holds no weights"):
        converted_model(tmp_path / "tensor.pt")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_command_writes_a_folder_with_the_ids_of_its_tokenizer(kind, tmp_path, capsys):
    source = wordpiece() if kind == "wordpiece" else gpt2()
    source.save_pretrained(tmp_path / "source")
    rows = 64 if kind == "wordpiece" else 448
    checkpoint = saved(tmp_path / "glm", published_checkpoint({**SIZES, "vocab_size": rows}, torch.float16), "file")
    out = tmp_path / "out"
    words = ["convert-glm", str(checkpoint), str(out), "--tokenizer", str(tmp_path / "source")]
    assert main([*words, "--num-attention-heads", "2"]) == 0
    assert "a GLM of" in capsys.readouterr().out
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), load_tokenizer(out)
    assert model.dtype == torch.float16
    row = tokenizer("the cat [MASK] .", "under dark")["input_ids"]
    shown = tokenizer.convert_ids_to_tokens(row)
    end = "[PAD]" if kind == "wordpiece" else "<|endoftext|>"
    assert shown[0] == "[CLS]" and shown[-1] == end and shown.count("[SEP]") == 0
    assert row.count(model.config.mask_token_id) == 1 and model.config.pad_token_id == row[-1]
    pieces = [model.config.bos_token_id, model.config.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(pieces) == ["<|startofpiece|>", "<|endofpiece|>"]
    assert main([*words, "--num-attention-heads", "2"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path):
    checkpoint = saved(tmp_path / "glm", published_checkpoint(), "file")
    bpe_glm().save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match="40 rows of them; give the tokenizer that it was trained with"):
        convert_glm(checkpoint, tmp_path / "out", tokenizer=tmp_path / "source", num_attention_heads=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.parametrize(("kind", "folder"), [("wordpiece", "bert-base-uncased"), ("bpe", "gpt2")])
def test_real_tokenizers_give_the_ids_that_published_configs_name(kind, folder, shared):
    tokenizer_class = BertTokenizer if kind == "wordpiece" else GPT2Tokenizer
    source = tokenizer_class.from_pretrained(shared / "data/tokenizers" / folder)
    tokenizer, ids = glm_tokenizer(source), TOKEN_IDS[kind]
    found = glm_tokens(tokenizer)
    assert [found.mask, found.start, found.end, tokenizer.pad_token_id] == [
        ids[f"{name}_token_id"] for name in ("mask", "bos", "eos", "pad")
    ]
    assert len(tokenizer) <= ids["vocab_size"] < len(tokenizer) + 128
    row = tokenizer("The cat [MASK] on it.", "Yes, it did.")["input_ids"]
    assert row.count(found.mask) == 1 and row[-1] == tokenizer.pad_token_id
    text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.lower().replace(" ", "") == "thecatonit.yes,itdid."


def test_the_tokens_of_glm_stand_where_the_published_code_has_them():
    """Behind the 30,522 of BERT the two of a piece; behind the 50,257 of GPT-2 eight, and these two come first."""
    tokenizer, size = bpe_glm(), len(gpt2())
    expected = ["<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]"]
    assert tokenizer.convert_ids_to_tokens(list(range(size, size + 8))) == expected
    assert TOKEN_IDS["bpe"] == {
        "vocab_size": 50304,
        "pad_token_id": 50256,
        "mask_token_id": 50257 + expected.index("[MASK]"),
        "bos_token_id": 50257,
        "eos_token_id": 50258,
    }
    assert (TOKEN_IDS["wordpiece"]["bos_token_id"], TOKEN_IDS["wordpiece"]["eos_token_id"]) == (30522, 30523)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("garbage.pt", b"\x01\x02\x03", "cannot be read: it is no checkpoint of torch"),
        ("latest", b".", "is no checkpoint of a GLM"),
        ("model.safetensors.index.json", b"{", "is no checkpoint of a GLM"),
        ("model.safetensors.index.json", b'{"weight_map": [1]}', "is no checkpoint of a GLM"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as refused:
        converted_model(tmp_path / name if name.endswith(".pt") else tmp_path)
    assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value)


def test_a_layer_of_an_absurd_number_is_refused_at_once(tmp_path: Path) -> None:
    torch.save({"module": {"transformer.layers.99999999.mlp.dense_h_to_4h.weight": torch.zeros(2)}}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="names a layer 99999999; no GLM has more than 1000"):
        converted_model(tmp_path / "a.pt")
