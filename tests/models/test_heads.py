"""Models split into backbone, head and final linear map, against the models' own forward, in float64."""

import copy
from typing import Any

import pytest
import torch
import transformers
from families import cloze_form
from torch import Tensor, nn

from glmd.errors import ModelError
from glmd.losses.head import Head
from glmd.losses.linear import linear_distillation_loss
from glmd.losses.logits import kl_divergence
from glmd.models.heads import Split, backbone, final_linear, share_backbone
from glmd.models.probes import prove_language_model
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task

V, C = 40, 3
TRANSFORMER = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FIELDS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "Electra": {"embedding_size": 8},
    "Albert": {"embedding_size": 8},
    "DistilBert": {},
    "ModernBert": {"cls_token_id": 1, "sep_token_id": 2, "classifier_pooling": "mean"},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "GPT2": {},
    "Llama": {"num_key_value_heads": 1},
    "Gemma2": {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 5.0},
    "Cohere": {"num_key_value_heads": 1, "logit_scale": 0.5},
    "Granite": {"num_key_value_heads": 1, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "MobileBert": {"embedding_size": 10, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    "T5": {"d_kv": 8, "decoder_start_token_id": 0},
    "Bart": {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 32, "decoder_attention_heads": 2},
}
LANGUAGE_MODELS = {
    **{name: f"{name}ForMaskedLM" for name in FIELDS},
    **{name: f"{name}ForCausalLM" for name in ("Llama", "Gemma2", "Cohere", "Granite")},
    "GPT2": "GPT2LMHeadModel",
    **{name: f"{name}ForConditionalGeneration" for name in ("T5", "Bart")},
}
MASKED = ("Bert", "Roberta", "Electra", "Albert", "DistilBert", "ModernBert", "DebertaV2", "MobileBert")
SCALED = ("Gemma2", "Cohere", "Granite")
SPLIT = (*MASKED, "GPT2", "Llama", *SCALED)


def model_of(name: str, head: str | None = None, *, seed: int = 0) -> Any:
    """A random language model of the family, or one with the head `head`, in evaluation mode and float64."""
    config = getattr(transformers, f"{name}Config")(**TRANSFORMER, **FIELDS[name], num_labels=C)
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}{head}" if head else LANGUAGE_MODELS[name])(config).eval().double()


def padded_inputs() -> dict[str, Tensor]:
    """Three rows of 7, 4 and 1 tokens."""
    ids = torch.randint(5, V, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def gradients(model: nn.Module, logits: Tensor) -> list[Tensor]:
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    parameters = list(model.parameters())
    found = torch.autograd.grad((logits * factors).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("name", [name for name in MASKED if hasattr(transformers, f"{name}ForMultipleChoice")])
def test_choices_of_unequal_number_score_as_the_stock_model_scores_each_example(name: str) -> None:
    model, inputs, num_choices = model_of(name, "ForMultipleChoice"), padded_inputs(), torch.tensor([1, 2])
    choices = task_form(load_task("COPA"), kind="masked")
    logits = choices.logits(Split(model), backbone(model)(**inputs), inputs, {"num_choices": num_choices})
    for row, rows in zip(logits, (slice(0, 1), slice(1, 3)), strict=True):
        alone = model(**{key: each[None, rows] for key, each in inputs.items()}).logits[0]
        torch.testing.assert_close(row[: len(alone)], alone)
    assert logits[0, 1] == -torch.inf
    exists = logits > -torch.inf
    expected = torch.cat(
        [model(**{key: each[None, i : i + 1] for key, each in inputs.items()}).logits for i in range(3)]
    )
    ours = gradients(model, logits[exists])
    for got, wanted in zip(ours, gradients(model, expected[:, 0]), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", SPLIT)
def test_hidden_states_times_the_final_map_are_the_models_own_logits(name: str) -> None:
    model, inputs = model_of(name), padded_inputs()
    model.config.pad_token_id = None  # else a MobileBERT keeps the vector of [PAD] as it is: see below
    expected = model(**inputs).logits
    hidden = Split(model).hidden_before_final(backbone(model)(**inputs))
    linear = final_linear(model)
    logits = linear.logits(hidden)
    torch.testing.assert_close(logits, expected)
    assert expected.std() > 0.1, "the logits say something"
    torch.testing.assert_close(gradients(model, logits), gradients(model, expected), atol=1e-10, rtol=1e-8)
    prove_language_model(model)


def test_the_distillation_loss_of_a_mobilebert_reaches_both_parts_of_its_final_map() -> None:
    """The chunked loss within the head's call, against plain logits of the stock model."""
    model, inputs = model_of("MobileBert"), padded_inputs()
    valid, generator = inputs["attention_mask"].bool(), torch.Generator().manual_seed(2)
    theirs, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (int(valid.sum()), V))

    def loss_of(hidden: Tensor, head: Head) -> Tensor:
        return linear_distillation_loss(hidden[valid], head, theirs, Head(weight), temperature=3.0)

    ours = Split(model).run_head(backbone(model)(**inputs), final_linear=loss_of)
    expected = kl_divergence(model(**inputs).logits[valid], theirs @ weight.T, temperature=3.0).sum()
    torch.testing.assert_close(ours, expected)
    names = [name for name, _ in model.named_parameters()]
    got, wanted = (
        dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True)) for loss in (ours, expected)
    )
    embeddings = "mobilebert.embeddings.word_embeddings.weight"
    assert got[embeddings][0].eq(0).all() and not wanted[embeddings][0].eq(0).any(), "[PAD] alone is kept as it is"
    got[embeddings][0] = wanted[embeddings][0]
    torch.testing.assert_close(got, wanted)
    assert got["cls.predictions.dense.weight"].abs().max() > 1e-3


def test_a_mobilebert_whose_pad_vector_is_zero_does_not_see_more_padding() -> None:
    model, inputs = model_of("MobileBert"), padded_inputs()
    assert model.get_input_embeddings().weight[0].eq(0).all(), "as it begins"
    longer = {name: nn.functional.pad(each, (0, 3)) for name, each in inputs.items()}
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**longer).logits[:, :7][valid], model(**inputs).logits[valid])


@pytest.mark.parametrize("name", SPLIT)
def test_a_head_on_the_backbones_outputs_gives_the_models_own_logits(name: str) -> None:
    model, inputs = model_of(name), padded_inputs()
    expected = model(**inputs).logits
    assert torch.equal(Split(model).run_head(backbone(model)(**inputs)), expected)


@pytest.mark.parametrize("name", SCALED)
def test_the_loss_and_gradient_of_scaled_or_capped_logits_are_those_of_the_whole_models(name: str) -> None:
    """Student and teacher of the family; and a student equal to its teacher loses nothing."""
    teacher, student, inputs = model_of(name), model_of(name, seed=1), padded_inputs()
    valid = inputs["attention_mask"].bool()
    theirs = Split(teacher).hidden_before_final(backbone(teacher)(**inputs))[valid]
    teacher_head = final_linear(teacher)

    def loss_of(hidden: Tensor, head: Head) -> Tensor:
        constant = teacher_head._replace(weight=teacher_head.weight.detach())
        return linear_distillation_loss(hidden[valid], head, theirs.detach(), constant, temperature=3.0)

    for model in (student, teacher):
        ours = Split(model).run_head(backbone(model)(**inputs), final_linear=loss_of)
        logits = [each(**inputs).logits[valid] for each in (model, teacher)]
        expected = kl_divergence(logits[0], logits[1].detach(), temperature=3.0).sum()
        torch.testing.assert_close(ours, expected)
        got, wanted = (torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, expected))
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)
        assert (ours.item() > 0.1) == (model is student)
        assert (max(each.abs().max().item() for each in got) > 1e-3) == (model is student)


def test_a_decoder_whose_config_does_not_say_how_it_begins_is_refused_with_the_field() -> None:
    model = model_of("T5")
    prove_language_model(model)  # which has it
    del model.config.decoder_start_token_id
    with pytest.raises(ModelError, match=r"no attribute 'decoder_start_token_id'\); set what that names in its config"):
        prove_language_model(model)


def test_a_model_whose_head_asks_its_backbone_for_more_than_outputs_is_refused_by_name() -> None:
    """As Falcon-H1, whose backbone holds what its logits are multiplied by."""

    class Asking(transformers.LlamaForCausalLM):
        def forward(self, **inputs: Any) -> Any:
            outputs = super().forward(**inputs)
            outputs.logits = outputs.logits * self.model.lm_head_multiplier
            return outputs

    model = model_of("Llama")
    model.__class__, model.model.lm_head_multiplier = Asking, 2.0
    with pytest.raises(ModelError, match=r"Asking: .* its head is more than one linear map"):
        prove_language_model(model)


def test_a_model_without_output_embeddings_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="BertForSequenceClassification has no output embeddings"):
        prove_language_model(model_of("Bert", "ForSequenceClassification"))


def test_a_model_without_a_head_is_its_own_backbone() -> None:
    model = model_of("Bert", "Model")
    assert backbone(model) is model


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_the_backbone_of_an_encoder_decoder_is_its_base_model_of_its_own_parts(name: str) -> None:
    """T5's class holds the parts itself, and has no base model."""
    model = model_of(name)
    whole = backbone(model)
    assert type(whole).__name__ == f"{name}Model" and backbone(model) is whole
    assert whole.encoder is model.get_encoder() and whole.decoder is model.get_decoder()
    assert not any("assembled" in key for key in model.state_dict())


def test_a_final_map_that_is_no_linear_map_is_refused() -> None:
    model = model_of("Bert")
    model.cls.predictions.decoder = nn.Sequential(model.get_output_embeddings())
    with pytest.raises(ModelError, match="a Sequential, not one linear map"):
        final_linear(model)


def test_a_model_of_nan_weights_is_refused() -> None:
    model = model_of("Bert")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(ModelError, match="nan"):
        prove_language_model(model)


@pytest.mark.parametrize("name", [*MASKED, "GPT2"])
def test_a_task_head_fed_with_backbone_outputs_is_the_classifier(name: str) -> None:
    classifier, inputs = model_of(name, "ForSequenceClassification"), padded_inputs()
    expected = classifier(**inputs).logits
    logits = Split(classifier).run_head(backbone(classifier)(**inputs), inputs=inputs)
    assert logits.shape == (3, C)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradients(classifier, logits), gradients(classifier, expected))


@pytest.mark.parametrize("name", MASKED)
def test_one_backbone_feeds_both_heads_and_its_embeddings_stay_tied(name: str) -> None:
    classifier, language_model = model_of(name, "ForSequenceClassification"), model_of(name, seed=1)
    inputs = padded_inputs()
    expected = classifier(**inputs).logits
    share_backbone(classifier, language_model)
    assert backbone(language_model) is backbone(classifier)
    embedding = classifier.get_input_embeddings().weight
    assert language_model.get_output_embeddings().weight is embedding
    assert language_model.get_input_embeddings().weight is embedding
    outputs = backbone(classifier)(**inputs)
    torch.testing.assert_close(Split(classifier).run_head(outputs, inputs=inputs), expected)
    torch.testing.assert_close(Split(language_model).run_head(outputs), language_model(**inputs).logits)


def test_backbones_of_two_classes_are_not_shared() -> None:
    with pytest.raises(ModelError, match="ElectraForSequenceClassification and BertForMaskedLM have different"):
        share_backbone(model_of("Electra", "ForSequenceClassification"), model_of("Bert"))


def fails(*_: Any) -> Any:
    raise KeyError("on purpose")


@pytest.mark.parametrize("function", [None, lambda hidden, linear: hidden.sum(), fails])
def test_the_model_is_as_before_after_a_call_also_when_the_function_raises(function: Any) -> None:
    model, inputs = model_of("Bert"), padded_inputs()
    expected, modules = model(**inputs).logits, dict(model.named_modules())
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    outputs = backbone(model)(**inputs)
    try:
        Split(model).run_head(outputs, final_linear=function)
    except KeyError:
        assert function is fails
    assert dict(model.named_modules()) == modules
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(model(**inputs).logits, expected)


def test_the_model_is_as_before_when_the_head_itself_raises() -> None:
    model, inputs = model_of("Bert"), padded_inputs()
    expected, outputs = model(**inputs).logits, backbone(model)(**inputs)
    with pytest.raises(RuntimeError):
        Split(model).run_head((outputs[0][..., :5],))
    assert torch.equal(model(**inputs).logits, expected)


def test_a_model_that_never_calls_its_final_map_is_refused_and_left_as_it_was() -> None:
    """As MobileBERT, were it not handled by name."""
    model, inputs = model_of("MobileBert"), padded_inputs()
    model.config.model_type = "another"
    expected = model(**inputs).logits
    with pytest.raises(ModelError, match="never calls its output embeddings"):
        Split(model).hidden_before_final(backbone(model)(**inputs))
    assert torch.equal(model(**inputs).logits, expected)


def test_a_forward_that_somebody_put_on_the_final_map_is_there_afterwards() -> None:
    model, inputs = model_of("Bert"), padded_inputs()
    linear = model.get_output_embeddings()
    linear.forward = lambda hidden: 2 * nn.functional.linear(hidden, linear.weight, linear.bias)
    doubled = model(**inputs).logits
    Split(model).hidden_before_final(backbone(model)(**inputs))
    assert torch.equal(model(**inputs).logits, doubled)


def test_what_the_function_returns_is_returned_and_it_sees_the_map_within_its_call() -> None:
    model, inputs = model_of("Bert"), padded_inputs()
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda linear, args: seen.append(args[0].shape))
    answer = Split(model).run_head(backbone(model)(**inputs), final_linear=lambda hidden, head: (head, hidden.shape))
    (linear, shape), expected = answer, final_linear(model)
    assert linear.weight is expected.weight and linear.bias is expected.bias and shape == (3, 7, 16)
    assert seen == [(3, 7, 16)], "the hooks of the map ran, so sharded weights would have been gathered"


@pytest.mark.parametrize("name", ["Bert", "MobileBert", "Gemma2", "Granite"])
def test_verbalizers_in_a_blank_score_as_the_models_own_logits_there(name: str) -> None:
    model, inputs = model_of(name), padded_inputs()
    places, words = torch.tensor([5, 1, 0]), torch.tensor([[7, 9], [7, 9], [7, 9]])
    cloze_ids = torch.full((3, 7), -100).scatter(1, places[:, None], 0)
    token_map = torch.arange(V).flip(0)  # the words under other numbers, as a compressed student has them
    for own_ids, ids in ((None, words), (token_map, token_map[words])):
        batch = {"cloze_ids": cloze_ids, "verbalizers": words}
        logits = cloze_form().logits(Split(model), backbone(model)(**inputs), inputs, batch, own_ids)
        expected = model(**inputs).logits[torch.arange(3), places].gather(1, ids)
        torch.testing.assert_close(logits, expected)
        for got, wanted in zip(gradients(model, logits), gradients(model, expected), strict=True):
            torch.testing.assert_close(got, wanted)


def test_candidates_in_a_blank_score_the_sum_of_their_tokens_log_probabilities() -> None:
    """Example 0 has the candidates of rows 0 and 1, of two tokens and one; example 1 has that of row 2."""
    model, inputs = model_of("Bert"), padded_inputs()
    blanks = {(0, 2): 7, (0, 3): 9, (1, 1): 11, (2, 0): 8}
    cloze_ids = torch.full((3, 7), -100)
    for place, word in blanks.items():
        cloze_ids[place] = word
    batch = {"cloze_ids": cloze_ids, "num_choices": torch.tensor([2, 1])}
    token_map = torch.arange(V).flip(0)
    logits = cloze_form().logits(Split(model), backbone(model)(**inputs), inputs, batch, token_map)
    log_probabilities = model(**inputs).logits.log_softmax(-1)
    rows = [
        sum(log_probabilities[(*at, V - 1 - word)] for at, word in blanks.items() if at[0] == row) for row in range(3)
    ]
    expected = torch.stack(rows)
    torch.testing.assert_close(logits[logits > -torch.inf], expected)
    assert logits[1, 1] == -torch.inf
    ours = gradients(model, logits[logits > -torch.inf])
    for got, wanted in zip(ours, gradients(model, expected), strict=True):
        torch.testing.assert_close(got, wanted)
    batch["mean_over_tokens"] = torch.ones(2, dtype=torch.long)
    means = cloze_form().logits(Split(model), backbone(model)(**inputs), inputs, batch, token_map)
    torch.testing.assert_close(means[means > -torch.inf], expected / torch.tensor([2.0, 1.0, 1.0]))


def test_a_split_gives_a_model_the_columns_that_its_forward_names_and_no_others() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    batch = dict.fromkeys((*names, "lm_labels", "labels", "example_id", "predicts"), ids)
    assert set(Split(model_of("Bert")).inputs(batch)) == set(names)
    assert set(Split(model_of("ModernBert")).inputs(batch)) == set(names) - {"token_type_ids"}
    decoder = transformers.BartForCausalLM(
        transformers.BartConfig(d_model=8, decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=8, vocab_size=V)
    )
    assert set(Split(decoder).inputs(batch)) == {"input_ids", "attention_mask"}, "its wrapper names nothing"


def test_a_copy_of_two_models_and_their_splits_is_of_the_copied_models() -> None:
    """As sharding makes one: training it must leave the original, which is evaluated and exported, as it is."""
    classifier, language_model, inputs = (
        model_of("Bert", "ForSequenceClassification"),
        model_of("Bert"),
        padded_inputs(),
    )
    share_backbone(classifier, language_model)
    splits = [Split(classifier), Split(language_model)]
    models, copied = copy.deepcopy(([classifier, language_model], splits))
    assert [each.model for each in copied] == models and models[0] is not classifier
    assert copied[0].backbone is copied[1].backbone is not splits[0].backbone
    before = splits[1].hidden_before_final(splits[0].run_backbone(inputs))
    with torch.no_grad():
        models[0].get_input_embeddings().weight.mul_(2)
    torch.testing.assert_close(splits[1].hidden_before_final(splits[0].run_backbone(inputs)), before)
    after = copied[1].hidden_before_final(copied[0].run_backbone(inputs))
    assert not torch.allclose(after, before)
