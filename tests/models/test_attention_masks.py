"""Attention without a mask where nothing is hidden, traced or not."""

from typing import Any

import pytest
import torch
import transformers.masking_utils
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from glmd.models.attention_masks import masks_of
from glmd.models.heads import Split

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[Any, Any]] = {
    "bidirectional": (BertForMaskedLM, BertConfig(**SHAPE)),
    "causal": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "causal and local": (MistralForCausalLM, MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4)),
    "local": (ModernBertForMaskedLM, ModernBertConfig(**SHAPE, local_attention=4, cls_token_id=1, sep_token_id=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_full_rows_need_no_mask_and_give_what_a_mask_of_ones_gives_traced_or_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, config = CASES[name]
    torch.manual_seed(0)
    split, ids = Split(head(config).eval()), torch.arange(5, 29).reshape(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = split.run_backbone(split.inputs(batch))[0]
        assert torch.equal(split.run_backbone(split.inputs(batch), is_full=True)[0], expected)
        monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *_: True)
        assert torch.equal(split.run_backbone(split.inputs(batch), is_full=True)[0], expected)
    has_local = "local" in name
    made = []
    real = transformers.masking_utils.sdpa_mask
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", lambda *a, **k: made.append(k) or real(*a, **k))
    with torch.no_grad():
        split.run_backbone(split.inputs(batch), is_full=True)
    assert bool(made) == has_local, "a window hides what padding does not"


@pytest.mark.parametrize("name", CASES)
def test_padded_rows_have_the_mask_of_transformers_without_a_look_at_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, config = CASES[name]
    torch.manual_seed(0)
    split, ids = Split(head(config).eval()), torch.arange(5, 29).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = split.run_backbone(split.inputs(batch))[0]
        for look in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
            monkeypatch.setattr(transformers.masking_utils, look, lambda *_: pytest.fail("looks at the mask"))
        found = split.run_backbone(split.inputs(batch), is_full=False)[0]
    assert torch.equal(found[mask == 1], expected[mask == 1])


def test_what_transformers_does_by_itself_is_there_again_afterwards() -> None:
    functions = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    before = functions["sdpa"]

    def fails() -> None:
        with masks_of(is_full=True):
            assert functions["sdpa"] is not before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert functions["sdpa"] is before
