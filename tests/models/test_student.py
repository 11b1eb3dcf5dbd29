"""A student against the teacher it is made of, in float64."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from glmd.config import StudentConfig
from glmd.errors import ConfigError, GlmdError
from glmd.models.probes import silence_padding
from glmd.models.student import build_student, chosen_layers
from glmd.vocabulary.vocabulary import Vocabulary

V, L = 40, 6
FIELDS = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
EXTRA: dict[str, dict[str, Any]] = {
    "Electra": {"embedding_size": 8},
    "ModernBert": {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "sliding_window": 2},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "MobileBert": {"embedding_size": 6, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
}
FAMILIES = ("Bert", "Roberta", "DistilBert", *EXTRA)
# Every second token is kept, and with them all special ones; the others go round.
KEPT = np.array([0, 1, 2, 3, 4, *range(6, V, 2)])
CUT = Vocabulary(KEPT, np.where(np.isin(np.arange(V), KEPT), np.searchsorted(KEPT, np.arange(V)), 5))
ALL = Vocabulary.identity(V)


def teacher_of(name: str = "Bert", head: str = "ForMaskedLM") -> Any:
    """A random teacher whose vectors, biases and normalizations too differ from their first values."""
    config = getattr(transformers, f"{name}Config")(**FIELDS, **EXTRA.get(name, {}))
    torch.manual_seed(0)
    model = getattr(transformers, name + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if name == "MobileBert":  # its last token sees the vector of padding
        silence_padding(model)
    return model


def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of rows of 9, 5 and 2 tokens in float64."""
    mask = (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()
    with torch.no_grad():
        logits: torch.Tensor = model.double().eval()(input_ids=input_ids, attention_mask=mask).logits
    return logits[mask.bool()]


def random_ids(allowed: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).choice(allowed, (3, 9)))


@pytest.mark.parametrize("name", [*FAMILIES, "Albert"])
def test_a_student_with_all_layers_and_all_words_is_the_teacher(name: str) -> None:
    teacher = teacher_of(name)
    if name == "Albert":  # its layers share weights, so there is no list of them to copy from
        with pytest.raises(ConfigError, match="no list of 6 layers"):
            build_student(teacher, ALL, StudentConfig(), seed=0)
        return
    student = build_student(teacher, ALL, StudentConfig(), seed=0)
    ids = random_ids(np.arange(3, V))
    assert type(student) is type(teacher) and student is not teacher
    torch.testing.assert_close(logits_of(student, ids), logits_of(teacher, ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_before_training_the_logits_of_kept_words_are_the_teachers(name: str) -> None:
    teacher = teacher_of(name)
    student = build_student(teacher, CUT, StudentConfig(), seed=0)
    ids = random_ids(KEPT[3:])
    ours = logits_of(student, torch.from_numpy(CUT.token_map)[ids])
    assert student.config.vocab_size == len(KEPT) == ours.shape[-1]
    torch.testing.assert_close(ours, logits_of(teacher, ids)[:, KEPT])


def test_building_a_student_leaves_the_teacher_as_it_was() -> None:
    teacher = teacher_of()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    config = teacher.config.to_dict()
    student = build_student(teacher, CUT, StudentConfig(3), seed=0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.config.to_dict() == config


@pytest.mark.parametrize(
    ("initialization", "layers"),
    [("uniform", [1, 3, 5]), ("first", [0, 1, 2]), ("last", [3, 4, 5]), ("even", [0, 2, 4]), ([0, 4, 5], [0, 4, 5])],
)
@pytest.mark.parametrize("name", ["Bert", "DistilBert", "ModernBert"])
def test_a_student_holds_the_layers_it_names_and_all_else(name: str, initialization: Any, layers: list[int]) -> None:
    teacher = teacher_of(name)
    if name == "ModernBert" and layers[0]:  # its layer 0 has no normalization before its attention
        with pytest.raises(ConfigError, match=r"layer 0 of the student, a copy .* would have attn_norm .* Identity"):
            build_student(teacher, ALL, StudentConfig(3, initialization), seed=0)
        return
    student = build_student(teacher, ALL, StudentConfig(3, initialization), seed=0)
    assert student.config.num_hidden_layers == 3
    theirs = teacher.state_dict()
    for key, tensor in student.state_dict().items():
        origin = re.sub(r"\.(\d+)\.", lambda match: f".{layers[int(match[1])]}.", key)
        assert torch.equal(tensor, theirs[origin]), key


def test_fewer_layers_give_the_logits_of_a_teacher_whose_other_layers_are_skipped() -> None:
    teacher, ids = teacher_of(), random_ids(KEPT[3:])
    student = build_student(teacher, CUT, StudentConfig(2, "last"), seed=0)
    teacher.bert.encoder.layer = teacher.bert.encoder.layer[-2:]
    expected = logits_of(teacher, ids)[:, KEPT]
    torch.testing.assert_close(logits_of(student, torch.from_numpy(CUT.token_map)[ids]), expected)


def test_the_output_embeddings_of_a_student_are_tied_to_its_input_embeddings() -> None:
    for config in (StudentConfig(2), StudentConfig(2, "scratch")):
        student = build_student(teacher_of(), CUT, config, seed=0)
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_a_list_of_layer_kinds_follows_the_chosen_layers() -> None:
    teacher = teacher_of("ModernBert")
    kinds = teacher.config.layer_types
    assert len(set(kinds)) == 2
    # Layer 0 has no normalization before its attention, so a student begins with it.
    student = build_student(teacher, ALL, StudentConfig(3, [0, 3, 5]), seed=0)
    assert student.config.layer_types == [kinds[0], kinds[3], kinds[5]]
    assert teacher.config.layer_types == kinds
    scratch = build_student(teacher, ALL, StudentConfig(4, "scratch"), seed=0)
    assert scratch.config.layer_types == kinds[:4]


# Other widths


def test_another_width_cannot_be_copied_and_says_what_can() -> None:
    config = StudentConfig(2, config={"intermediate_size": 24})
    with pytest.raises(ConfigError, match=r"student.initialization: .*\(24, 16\), the teacher's is \(32, 16\).*scr"):
        build_student(teacher_of(), ALL, config, seed=0)


def test_a_narrower_student_is_made_from_scratch() -> None:
    narrow = {"hidden_size": 8, "intermediate_size": 24, "hidden_dropout_prob": 0.3}
    student = build_student(teacher_of(), CUT, StudentConfig(2, "scratch", narrow), seed=0)
    assert student.get_input_embeddings().weight.shape == (len(KEPT), 8)
    assert student.config.hidden_dropout_prob == 0.3
    assert logits_of(student, torch.from_numpy(CUT.token_map)[random_ids(KEPT[3:])]).isfinite().all()


def test_a_scratch_student_is_given_by_its_seed_and_copies_nothing() -> None:
    teacher, config = teacher_of(), StudentConfig(2, "scratch")
    first, again, other = (build_student(teacher, ALL, config, seed=seed) for seed in (0, 0, 1))
    weights = [model.get_input_embeddings().weight for model in (first, again, other, teacher)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])


def test_a_student_is_float32_whatever_the_teacher_is() -> None:
    for config in (StudentConfig(2), StudentConfig(2, "scratch")):
        student = build_student(teacher_of().to(torch.bfloat16), CUT, config, seed=0)
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
        assert student.config.dtype in ("float32", torch.float32)


# Refusals


def test_a_field_that_the_architecture_has_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"student.config.hiden_size is unknown to bert; did you mean hidden_size\?"):
        build_student(teacher_of(), ALL, StudentConfig(2, "scratch", {"hiden_size": 8}), seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StudentConfig(7), "1 to 6 layers"),
        (StudentConfig(3, [0, 1]), "names 2 layers, num_hidden_layers is 3"),
        (StudentConfig(2, [0, 6]), "6 is no teacher layer"),
        (StudentConfig(2, [1, 1]), "different layers"),
    ],
)
def test_layers_that_the_teacher_has_not_are_refused(config: StudentConfig, message: str) -> None:
    with pytest.raises(GlmdError, match=message):
        build_student(teacher_of(), ALL, config, seed=0)


def test_from_scratch_no_layers_are_chosen() -> None:
    assert chosen_layers(StudentConfig(3, "scratch"), teacher_of().config) is None
