"""Attention as it is called, against what transformers gives of it, for encoders and decoders of several kinds."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from glmd.distillation.teacher import run_and_read
from glmd.errors import ModelError
from glmd.models.attention_calls import AttentionCalls, key_value_heads, prove_attention
from glmd.models.heads import Split

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {}),
    "albert": ("AlbertForMaskedLM", {"embedding_size": 8}),  # one layer, run three times
    "electra": ("ElectraForMaskedLM", {"embedding_size": 8}),
    "mobilebert": ("MobileBertForMaskedLM", {"embedding_size": 8, "intra_bottleneck_size": 16}),
    # Windows of four tokens in two of three layers.
    "modernbert": ("ModernBertForMaskedLM", {"local_attention": 4, "pad_token_id": 0, "cls_token_id": 1}),
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", {"n_positions": 32}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}),
}


def model_of(name: str) -> Any:
    head, more = BODIES[name]
    model_class = getattr(transformers, head)
    torch.manual_seed(0)
    settings = {**SIZES, "max_position_embeddings": 32, **more}
    model = model_class(model_class.config_class(**settings)).double().eval()
    for parameter in model.parameters():  # else attention is as good as uniform
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs_of(*, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:], mask[2, 2:] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


# ModernBERT's eager attention gives nan where a pad sees nothing.
CASES = [(name, padded) for name in BODIES for padded in (False, True) if (name, padded) != ("modernbert", True)]


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_probabilities_of_valid_tokens_are_those_of_the_models_eager_attention(name: str, padded: bool) -> None:
    model, inputs = model_of(name), inputs_of(padded=padded)
    split, numbers = Split(model), range(SIZES["num_hidden_layers"])
    asked = {"attentions": numbers, "attention_scores": numbers}
    _, read = run_and_read(split, inputs, asked, is_full=not padded)
    model.set_attn_implementation("eager")
    own = split.run_backbone(inputs, output_attentions=True).attentions
    valid = inputs["attention_mask"].bool()
    for number in numbers:
        found = read("attentions", number)
        torch.testing.assert_close(found[valid], own[number].transpose(1, 2)[valid], rtol=1e-5, atol=1e-6)
        scores = read("attention_scores", number)[valid]
        torch.testing.assert_close(scores.softmax(-1), found[valid])
        assert scores.isneginf().eq(own[number].transpose(1, 2)[valid] == 0).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_inputs_of_attention_give_the_layers_output(name: str, padded: bool) -> None:
    """And keys and values have as many heads as the model has, whether a mask makes it repeat them or not."""
    model, inputs = model_of(name), inputs_of(padded=padded)
    split = Split(model)
    with AttentionCalls() as calls:
        split.run_backbone(inputs, is_full=not padded)
    heads, shared = SIZES["num_attention_heads"], key_value_heads(model.config)
    for call in calls.layers:
        queries, keys, values = (call.read(each, shared) for each in ("queries", "keys", "values"))
        assert queries.shape[:3] == (3, 9, heads) and keys.shape[:3] == values.shape[:3] == (3, 9, shared)
        repeated = [each.transpose(1, 2).repeat_interleave(heads // shared, 1) for each in (keys, values)]
        found = call.scores().softmax(-1) @ repeated[1]
        plain = torch.nn.functional.scaled_dot_product_attention(
            queries.transpose(1, 2), *repeated, attn_mask=call.mask, is_causal=call.is_causal, scale=call.scale
        )
        valid = inputs["attention_mask"].bool()
        torch.testing.assert_close(found.transpose(1, 2)[valid], plain.transpose(1, 2)[valid])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_added_to_scores_counts_and_hides_what_it_lowers_to_the_least_number(dtype: torch.dtype) -> None:
    """A bias by distance, as ALiBi's, beside keys hidden by -inf, and others as transformers hides them."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=generator).to(dtype) for _ in range(3))
    places = torch.arange(5)
    mask = (-(places[:, None] - places).abs() * torch.tensor([0.5, 1, 2])[:, None, None]).to(dtype)
    mask = mask.expand(2, -1, -1, -1).clone()
    mask[0, ..., 3], mask[0, ..., 4] = -torch.inf, torch.finfo(dtype).min
    with AttentionCalls() as calls:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    scores = calls.layers[0].scores()
    plain = query.to(scores) @ key.to(scores).transpose(-1, -2) / 2 + mask
    torch.testing.assert_close(scores[1], plain[1])
    torch.testing.assert_close(scores[0, ..., :3], plain[0, ..., :3])
    assert scores[0, ..., 3:].isneginf().all() and scores[..., :3].isfinite().all() and scores[1].isfinite().all()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype.itemsize > 2 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(scores.softmax(-1) @ value.to(scores), output.to(scores), **tolerance)


def test_probabilities_under_a_mask_that_a_user_adds_are_those_of_eager_attention() -> None:
    model, inputs = model_of("bert"), inputs_of(padded=False)
    added = torch.randn(3, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    added[..., 0, 5] = torch.finfo(torch.float64).min
    with AttentionCalls() as calls:
        model.bert(inputs["input_ids"], attention_mask=added)
    found = [each.read("attentions", 4).transpose(1, 2) for each in calls.layers]
    model.set_attn_implementation("eager")
    own = model.bert(inputs["input_ids"], attention_mask=added, output_attentions=True).attentions
    torch.testing.assert_close(found, [*own])
    assert all(not each[:, :, 0, 5].any() for each in found)


@pytest.mark.parametrize("name", ["bert", "llama", "modernbert"])
def test_gradients_flow_through_what_is_read_also_where_layers_are_run_again(name: str) -> None:
    found = []
    for recomputes in (False, True):
        model, inputs = model_of(name).train(), inputs_of(padded=True)
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        _, read = run_and_read(Split(model), inputs, {"values": [1], "attentions": [2]}, is_full=False)
        valid = inputs["attention_mask"].bool()
        torch.manual_seed(0)
        (read("values", 1)[valid].square().sum() + read("attentions", 2)[valid].square().sum()).backward()
        found.append([None if p.grad is None else p.grad for p in model.parameters()])
    assert any(each is not None and each.any() for each in found[0])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, theirs)


def test_attention_that_is_not_called_once_a_layer_is_refused() -> None:
    model = model_of("bert")
    model.bert.encoder.layer[1].attention.self.forward = lambda hidden, *_, **__: (hidden, None)
    with pytest.raises(ModelError, match="2 calls of attention in 3 layers"):
        prove_attention(model, inside=True, training=False)
