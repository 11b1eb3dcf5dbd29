"""Encoder-decoders: the loss of what a decoder says, against stock models run by hand in float64; copies of layers."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from glmd.config import StudentConfig
from glmd.data.batches import Collate, Examples, Grid
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher
from glmd.errors import ConfigError, GlmdError
from glmd.models import probes
from glmd.models.heads import Split, backbone, share_backbone
from glmd.models.layers import layer_stacks
from glmd.models.probes import prove_language_model, prove_task_model
from glmd.models.student import build_student
from glmd.vocabulary.slicing import own_matrices, slice_model, tie_weights
from glmd.vocabulary.vocabulary import Vocabulary

V, C = 30, 3
KEPT = np.array([0, 1, 2, 3, 4, *range(6, V, 2)])
VOCABULARY = Vocabulary(KEPT, np.where(np.isin(np.arange(V), KEPT), np.searchsorted(KEPT, np.arange(V)), 7))
ALL = Vocabulary.identity(V)
WORDS = Term("lm_logits", "kl_divergence", options={"temperature": 2.0})
LABELS = Term("lm_labels", "hard_cross_entropy", tokens="masked")
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 4,
      "relative_attention_num_buckets": 4,
      "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
BART = {"d_model": 16, "encoder_layers": 4, "decoder_layers": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32,
        "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5 1.0": ("T5", T5),
    "t5 1.1": ("T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("Bart", BART),
    "mbart": ("MBart", BART),  # whose decoder begins with the last token of what it is to say
}


def model_of(family: str, head: str = "ForConditionalGeneration", seed: int = 0) -> Any:
    name, fields = FAMILIES[family]
    torch.manual_seed(seed)
    plain = {"dropout_rate" if name == "T5" else "dropout": 0.0, "num_labels": C}
    model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(vocab_size=V, **fields, **plain))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    if family == "t5 1.1" and hasattr(model, "lm_head"):  # whose files hold two matrices, whatever its config says
        tie_weights(model, ["lm_head.weight"])
        model.lm_head.weight.data.normal_()
    return model.double().eval()


def batch_of(
    rows: list[tuple[list[int], list[int], list[int]]], pads: tuple[int, int] = (0, 0), pad_id: int = 0
) -> Any:
    """From (what is read, what is said, labels), with so many more pads in the encoder's grid and in the decoder's."""
    read, said = (
        Grid.of([dict(zip(names, map(np.array, row[part]), strict=True)) for row in rows])
        for names, part in ((("input_ids",), slice(0, 1)), (("target_ids", "lm_labels"), slice(1, 3)))
    )
    batch = Collate(pad_id)(Examples(read.lengths, read.tokens, {"example_id": np.arange(len(rows))}, said))
    fill = {"input_ids": pad_id, "target_ids": pad_id, "lm_labels": -100}
    for name, more in {**dict.fromkeys(("input_ids", "attention_mask"), pads[0]),
                       **dict.fromkeys(("target_ids", "lm_labels", "predicts"), pads[1])}.items():  # fmt: skip
        batch[name] = nn.functional.pad(batch[name], (0, more), value=fill.get(name, 0))
    for name, places in (("positions", batch["predicts"]), ("labeled_positions", batch["lm_labels"] >= 0)):
        batch[name] = places.flatten().nonzero()[:, 0]
    return batch


def drawn_rows() -> list[tuple[list[int], list[int], list[int]]]:
    rng = np.random.default_rng(0)
    rows = []
    for read, said in ((9, 4), (5, 6), (3, 2)):
        ids = rng.integers(4, V, said).tolist()
        rows.append(
            ([*rng.integers(4, V, read - 1).tolist(), 2], ids, [i if n % 2 else -100 for n, i in enumerate(ids)])
        )
    return rows


def loss_of(distiller: Distiller, teacher: OnlineTeacher, batch: Any) -> Tensor:
    objective = distiller.objective
    sums = distiller(batch, teacher(batch))
    return objective.total(objective.means(sums, objective.counts(batch)), 0.5)


def distiller_of(family: str) -> tuple[Distiller, OnlineTeacher, Any, Any]:
    whole = model_of(family)
    student = build_student(whole, VOCABULARY, StudentConfig(2, num_decoder_layers=1), seed=0).double().eval()
    distiller = Distiller(Objective((WORDS, LABELS)), VOCABULARY.token_map, language_model=student)
    return distiller, OnlineTeacher(model_of(family), None, VOCABULARY), student, whole


def plain_loss(student: Any, teacher: Any, rows: Any) -> Tensor:
    """Row by row, with transformers' own `labels`, which it shifts itself: no padding, no batch, no chunk."""
    divergences, losses = [], []
    for read, said, labels in rows:
        logits = []
        for model, ids in ((student, VOCABULARY.token_map), (teacher, np.arange(V))):
            given = {"input_ids": ids[read], "labels": ids[said]}
            logits.append(model(**{name: torch.tensor(each)[None] for name, each in given.items()}).logits[0])
        ours, theirs = logits[0], logits[1].detach()[:, torch.from_numpy(KEPT)]
        log_p, log_q = (theirs / 2).log_softmax(-1), (ours / 2).log_softmax(-1)
        divergences += ((log_p.exp() * (log_p - log_q)).sum(-1) * 4).unbind()
        chosen = [i for i, label in enumerate(labels) if label != -100]
        words = torch.from_numpy(VOCABULARY.token_map[np.array(labels)[chosen]])
        losses += nn.functional.cross_entropy(ours[chosen], words, reduction="none").unbind()
    return torch.stack(divergences).mean() + torch.stack(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_stock_models_row_by_row(family) -> None:
    distiller, teacher, student, whole = distiller_of(family)
    rows, pad = drawn_rows(), student.config.pad_token_id
    named = {name: each for name, each in student.named_parameters() if each.requires_grad}
    found = loss_of(distiller, teacher, batch_of(rows, pad_id=pad))
    ours = torch.autograd.grad(found, [*named.values()], allow_unused=True)
    expected = plain_loss(student, whole, rows)
    theirs = torch.autograd.grad(expected, [*named.values()], allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for name, a, b in zip(named, ours, theirs, strict=True):
        zero = torch.zeros_like(named[name])
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-6, atol=1e-10, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_of_either_side_changes_nothing_and_has_no_gradient(family) -> None:
    distiller, teacher, student, _ = distiller_of(family)
    rows, pad = drawn_rows(), student.config.pad_token_id
    losses, gradients = [], []
    for pads in ((0, 0), (3, 0), (0, 4), (2, 5)):
        batch = batch_of(rows, pads, pad_id=pad)
        losses.append(loss_of(distiller, teacher, batch))
        weight = student.get_input_embeddings().weight
        gradients.append(torch.autograd.grad(losses[-1], weight)[0])
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-6, atol=1e-10)
    states: list[Tensor] = []
    outputs = Split(student).run_backbone(Split(student).inputs(batch, torch.from_numpy(VOCABULARY.token_map)))
    outputs.encoder_last_hidden_state.retain_grad(), outputs.last_hidden_state.retain_grad()
    states = [outputs.encoder_last_hidden_state, outputs.last_hidden_state]
    hidden = Split(student).hidden_before_final(outputs).flatten(0, 1)[batch["positions"]]
    hidden.square().sum().backward()
    for state, valid in zip(states, (batch["attention_mask"].bool(), batch["predicts"]), strict=True):
        assert state.grad is not None and (state.grad[~valid] == 0).all() and (state.grad[valid] != 0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_with_all_layers_and_tokens_is_its_teacher_and_loses_nothing(family) -> None:
    whole = model_of(family)
    student = build_student(whole.float(), ALL, StudentConfig(), seed=0).double().eval()
    batch = batch_of(drawn_rows(), pad_id=student.config.pad_token_id)
    distiller = Distiller(Objective((WORDS,)), ALL.token_map, language_model=student)
    assert loss_of(distiller, OnlineTeacher(whole.double(), None, ALL), batch).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_half_begins_with_the_layers_that_are_chosen_for_it(family) -> None:
    """And what the first layer of T5 alone has, its table of distances, is the teacher's."""
    whole = model_of(family).float()
    # Where the encoder's last layer is not the teacher's, decoder layers are proved on what the teacher's encoder gave.
    build_student(whole, VOCABULARY, StudentConfig(2, "first", num_decoder_layers=2), seed=0)
    shape = StudentConfig(2, [1, 3], num_decoder_layers=1, decoder_initialization="last")
    student = build_student(whole, VOCABULARY, shape, seed=0)
    (of_encoder, of_decoder), (encoder, decoder) = (
        [next(iter(lists.values())) for lists in layer_stacks(model)] for model in (student, whole)
    )
    assert (len(of_encoder), len(of_decoder)) == (2, 1) and (len(encoder), len(decoder)) == (4, 3)
    for copy, original in zip((*of_encoder, *of_decoder), (encoder[1], encoder[3], decoder[2]), strict=True):
        theirs = original.state_dict()
        for name, tensor in copy.state_dict().items():
            expected = theirs[name] if name in theirs else encoder[0].state_dict().get(name)
            if "relative_attention_bias" in name:
                expected = (encoder if copy in of_encoder else decoder)[0].state_dict()[name]
            assert torch.equal(tensor, expected), name
    again = type(student)(student.config)
    again.load_state_dict(student.state_dict())
    prove_language_model(again.eval())
    own = {"lm_head.weight"} if family == "t5 1.1" else set()
    assert own_matrices(student) == own_matrices(whole) == own


def test_without_a_number_of_its_own_the_decoder_has_as_many_layers_as_the_encoder_or_as_the_teachers() -> None:
    whole = model_of("bart").float()
    for shape, expected in (
        (StudentConfig(3), (3, 3)),
        (StudentConfig(), (4, 3)),
        (StudentConfig(2, "scratch"), (2, 2)),
    ):
        config = build_student(whole, ALL, shape, seed=0).config
        assert (config.encoder_layers, config.decoder_layers) == expected
    of_halves = layer_stacks(build_student(whole, ALL, StudentConfig(3), seed=0))
    assert [[*lists] for lists in of_halves] == [["model.encoder.layers"], ["model.decoder.layers"]]
    with pytest.raises(ConfigError, match=r"1 to 3 layers .*got 4"):
        build_student(whole, ALL, StudentConfig(4), seed=0)
    with pytest.raises(ConfigError, match=r"decoder_initialization names 1 layers, num_decoder_layers is 2"):
        build_student(whole, ALL, StudentConfig(2, decoder_initialization=[0]), seed=0)
    masked = transformers.BertConfig(vocab_size=V, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    bert = transformers.BertForMaskedLM(masked)
    with pytest.raises(ConfigError, match="num_decoder_layers has no effect: the teacher is no encoder-decoder"):
        build_student(bert, ALL, StudentConfig(1, num_decoder_layers=1), seed=0)


def test_a_decoder_that_looks_ahead_and_a_pad_that_is_seen_are_refused(monkeypatch) -> None:
    model = model_of("bart").float()
    prove_language_model(model)
    layer = type(model.model.decoder.layers[0])
    forward = layer.forward

    def ahead(self, hidden_states, *arguments, **options):
        return forward(self, hidden_states + hidden_states.flip(1), *arguments, **options)

    monkeypatch.setattr(layer, "forward", ahead)
    monkeypatch.setattr(probes, "_require_padding_unseen", lambda *_: None)  # which would find it too
    with pytest.raises(GlmdError, match="the last token changes the logits"):
        prove_language_model(model)
    monkeypatch.undo()
    encoder = type(model.model.encoder)
    monkeypatch.setattr(encoder, "forward", _without_mask(encoder.forward))
    with pytest.raises(GlmdError, match="padding changes its output"):
        prove_language_model(model)


def _without_mask(forward):
    return lambda self, input_ids=None, attention_mask=None, **options: forward(self, input_ids=input_ids, **options)


def test_a_decoder_that_begins_with_what_it_says_last_is_asked_no_cloze() -> None:
    for family in ("t5 1.0", "bart"):
        probes.prove_answers_unseen(model_of(family))
    with pytest.raises(GlmdError, match="begins with the last token of what it is to say, which would be the answer"):
        probes.prove_answers_unseen(model_of("mbart"))


@pytest.mark.parametrize("family", ["t5 1.1", "bart"])
def test_a_classifier_and_a_language_model_run_on_one_backbone(family) -> None:
    """T5's language model holds the parts of its backbone itself, its classifier holds the backbone."""
    words, classifier = model_of(family), model_of(family, "ForSequenceClassification", seed=1)
    prove_task_model(classifier)
    share_backbone(classifier, words)
    assert [*backbone(words).parameters()] == [*backbone(classifier).parameters()]
    rows, pad = drawn_rows(), words.config.pad_token_id
    end = words.config.eos_token_id
    batch = batch_of([([*read[:-1], end], read, read) for read, *_ in rows], pad_id=pad)
    del batch["target_ids"]
    split, other = Split(classifier), Split(words)
    inputs = split.inputs(batch)
    outputs = split.run_backbone(inputs)
    for i, (read, *_) in enumerate(rows):
        ids = torch.tensor([*read[:-1], end])[None]
        torch.testing.assert_close(split.run_head(outputs, inputs=inputs)[i], classifier(input_ids=ids).logits[0])
        alone = words(input_ids=ids, decoder_input_ids=inputs["decoder_input_ids"][i : i + 1, : ids.shape[1]]).logits[0]
        torch.testing.assert_close(other.head.logits(other.hidden_before_final(outputs)[i, : ids.shape[1]]), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_it_writes_the_same_text_where_no_dropped_token_occurs(family) -> None:
    whole = model_of(family).float()
    ids = torch.tensor([[5, 9, 11, 2]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}
    said = whole.generate(ids, **options)[0].tolist()
    names = {0, 1, 2, 3, *ids[0].tolist(), *said}
    kept = np.array(sorted(names | set(range(0, V, 7))))
    vocabulary = Vocabulary(kept, np.where(np.isin(np.arange(V), kept), np.searchsorted(kept, np.arange(V)), 0))
    small = slice_model(whole, vocabulary)
    again = small.generate(torch.from_numpy(vocabulary.token_map)[ids], **options)[0]
    assert len(kept) < V and kept[again].tolist() == said
