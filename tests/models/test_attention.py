"""Another implementation of attention gives what transformers' choice gives, or is refused with what would work."""

from typing import Any

import numpy as np
import pytest
import torch
from test_attention_masks import CASES
from transformers import masking_utils

from glmd.data.batches import Batch, with_positions
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher
from glmd.errors import ConfigError, ModelError
from glmd.models.attention import attention_of, chosen_by_transformers, prove_implementation, set_attention
from glmd.models.attention_masks import masks_of
from glmd.vocabulary.vocabulary import Vocabulary

WORDS = Objective((Term("lm_logits", "kl_divergence", options={"temperature": 2.0}),))


def pair(name: str) -> tuple[Any, Any]:
    """Student and teacher with other weights."""
    head, config = CASES[name]
    torch.manual_seed(0)
    return head(config).eval(), head(config).eval()


def batch_of(pads: int) -> Batch:
    ids = torch.arange(5, 29).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 12 - pads :] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask, "predicts": mask.bool(), "example_id": torch.arange(2)}
    return with_positions(batch)


@torch.no_grad()
def loss_of(name: str, batch: Batch, implementation: str | None) -> torch.Tensor:
    student, teacher = pair(name)
    vocabulary = Vocabulary.identity(99)
    distiller = Distiller(WORDS, vocabulary.token_map, language_model=student).eval()
    online = OnlineTeacher(teacher, None, vocabulary)
    with attention_of(student, teacher, implementation=implementation):
        return distiller(batch, online(batch)).sum()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_the_loss_is_that_of_transformers_choice_and_pads_change_nothing(name: str, implementation: str) -> None:
    """flex_attention by its own formula: torch compiles it for seconds, and has no backward of it on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        for pads in (0, 5):
            expected = loss_of(name, batch_of(pads), None)
            torch.testing.assert_close(loss_of(name, batch_of(pads), implementation), expected, rtol=1e-5, atol=1e-5)
        short = batch_of(0)
        wide = {k: torch.nn.functional.pad(v, (0, 9)) for k, v in short.items() if v.ndim == 2}
        longer = loss_of(name, with_positions(short | wide), implementation)
        torch.testing.assert_close(longer, loss_of(name, short, implementation), rtol=1e-5, atol=1e-5)


def test_a_model_has_its_own_attention_again_and_no_config_says_what_it_had() -> None:
    model, _ = pair("bidirectional")

    def fail() -> None:
        with attention_of(model, implementation="eager"):
            assert model.config._attn_implementation == "eager"
            assert "eager" not in model.config.to_json_string(use_diff=False)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.config._attn_implementation == chosen_by_transformers(model) == "sdpa"


def test_what_a_class_or_this_machine_has_not_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("bidirectional")
    with pytest.raises(ConfigError, match=r"^attn_implementation nonsense: Specified .*give another, or remove it$"):
        set_attention(model, "nonsense")
    monkeypatch.setattr(type(model), "_supports_flex_attn", False)
    with pytest.raises(ConfigError, match="does not support an attention implementation through torch's flex_attent"):
        set_attention(model, "flex_attention")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ConfigError, match="computes attention by sdpa, which cannot be exchanged; remove it"):
        set_attention(model, "eager")
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_sees_pads_or_cannot_be_trained_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("bidirectional")
    prove_implementation(model, "eager", half=None, trains=True)
    prove_implementation(model, "eager", half=torch.bfloat16, trains=True)
    uncompiled = torch.compiler.set_stance("force_eager")
    with (
        uncompiled,
        pytest.raises(ModelError, match=r"flex_attention .ValueError: .* not support `dropout`.*or remove it"),
    ):
        prove_implementation(model, "flex_attention", half=None, trains=True)
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "eager", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"attn_implementation eager changes its output .relative difference"):
        prove_implementation(model, "eager", half=None, trains=False)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("is_full", [True, False])
def test_flash_attention_is_given_the_mask_of_padding_or_none(is_full: bool) -> None:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = is_full
    given = {"batch_size": 2, "q_length": 12, "kv_length": 12, "attention_mask": mask}
    functions = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    expected = functions["flash_attention_2"](**given)
    with masks_of(is_full=is_full):
        found = functions["flash_attention_2"](**given)
    assert (found is None) == (expected is None) == is_full
    assert is_full or np.array_equal(found, mask)
