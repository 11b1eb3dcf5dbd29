"""GLM as a model of transformers: masks, positions, sizes, and what glmd proves of a teacher and a student."""

import numpy as np
import pytest
import torch
from glm_cases import ROW, SIZES, as_row, tiny_glm
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from glmd.config import StudentConfig
from glmd.errors import ConfigError
from glmd.models.attention_calls import AttentionCalls, prove_attention
from glmd.models.glm import GlmdGlmConfig, GlmdGlmForBlankInfilling, GlmdGlmModel
from glmd.models.glm.configuration import PUBLISHED, published_config
from glmd.models.glm.modeling_glmd_glm import blank_infilling_mask
from glmd.models.heads import Split
from glmd.models.layers import layer_lists
from glmd.models.loading import language_model_class, model_positions
from glmd.models.probes import prove_attentions, prove_config, prove_language_model
from glmd.models.student import build_student, saved_and_reopened
from glmd.vocabulary.slicing import slice_model
from glmd.vocabulary.vocabulary import Vocabulary


def test_a_token_sees_what_the_paper_lets_it_see():
    """Part A all of A, part B all of A and what is before it; nothing sees padding but padding itself."""
    context = [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    tokens = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    found = blank_infilling_mask(torch.tensor(tokens), torch.tensor(context))
    for row in range(2):
        for query in range(6):
            for key in range(6):
                in_context = context[row][key] == 1
                expected = in_context or (context[row][query] == 0 and key <= query)
                expected = (expected and tokens[row][key] == 1) or key == query
                assert found[row, 0, query, key] == expected, (row, query, key)
    assert blank_infilling_mask(None, None) is None
    assert torch.equal(blank_infilling_mask(None, torch.tensor(context))[0], found[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_token_is_moved_by_one_that_it_does_not_see(implementation):
    model = tiny_glm()
    model.set_attn_implementation(implementation)
    own = model(**as_row()).logits[0]
    for changed in range(11):
        other = {**ROW, "input_ids": [30 if i == changed else token for i, token in enumerate(ROW["input_ids"])]}
        moved = (model(**as_row(other)).logits[0] - own).abs().amax(-1) > 1e-9
        seen = [ROW["context_mask"][changed] == 1 or changed <= i for i in range(11)]
        assert moved.tolist() == [i == changed or (s and (changed < 6 or i > 5)) for i, s in enumerate(seen)]


def test_padding_changes_nothing_and_has_no_gradient():
    model = tiny_glm(pad_token_id=None)
    gradients = []
    for padding in (0, 3):
        model.zero_grad()
        row = as_row(padding=padding)
        embeddings = model.get_input_embeddings()(row.pop("input_ids")).detach().requires_grad_()
        logits = model(**row, inputs_embeds=embeddings).logits[:, :11]
        logits.square().sum().backward()
        gradients.append((logits.detach(), embeddings.grad[:, :11], model.glm.layers[0].mlp.up.weight.grad.clone()))
        assert not embeddings.grad[:, 11:].any()
    for alone, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, alone, rtol=1e-10, atol=1e-10)


def test_without_its_columns_a_row_is_part_a_alone():
    model, ids = tiny_glm(), torch.tensor([[2, 11, 4, 12, 3]])
    plain = {"position_ids": [0, 1, 2, 3, 4], "block_position_ids": [0] * 5, "context_mask": [1] * 5}
    given = model(input_ids=ids, **{name: torch.tensor([each]) for name, each in plain.items()}).logits
    torch.testing.assert_close(model(ids).logits, given)


def test_eager_attention_gives_its_probabilities_and_the_same_logits():
    model = tiny_glm()
    fused = model(**as_row(padding=2)).logits[:, :11]
    with pytest.raises(ValueError, match="eager alone"):
        model(**as_row(), output_attentions=True)
    prove_attention(model, inside=True, training=False)
    with AttentionCalls() as calls:
        model.glm(**as_row(padding=2))
    model.set_attn_implementation("eager")
    found = model(**as_row(padding=2), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found.logits[:, :11], fused)
    prove_attentions(model, training=False)
    for heard, given in zip(calls.layers, found.attentions, strict=True):
        torch.testing.assert_close(heard.scores().softmax(-1), given)
    assert len(found.hidden_states) == SIZES["num_hidden_layers"] + 1
    torch.testing.assert_close(model.lm_head(found.hidden_states[-1]), found.logits)


def test_the_loss_is_the_mean_over_labels_as_they_stand():
    model, row = tiny_glm(), as_row()
    labels = torch.full((1, 11), -100)
    labels[0, 6:] = torch.tensor([21, 22, 6, 23, 6])
    found = model(**row, labels=labels)
    expected = -found.logits[0, 6:].log_softmax(-1)[range(5), labels[0, 6:]].mean()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_layers_run_again_in_the_backward_give_the_same_gradients():
    model = tiny_glm().train()
    gradients = []
    for again in (False, True):
        (model.gradient_checkpointing_enable if again else model.gradient_checkpointing_disable)()
        model.zero_grad()
        torch.manual_seed(3)
        model(**as_row()).logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


# The two large ones are called 2B and 10B.
PARAMETERS = {"110M": 109_338_624, "340M": 334_688_256, "2B": 1_920_122_880, "10B": 9_880_682_496}


@pytest.mark.parametrize("size", PUBLISHED)
def test_each_published_size_has_its_published_number_of_parameters(size):
    with torch.device("meta"):
        model = GlmdGlmForBlankInfilling(published_config(size))
    parameters = sum(each.numel() for each in model.parameters())
    assert parameters == PARAMETERS[size] == pytest.approx(PUBLISHED[size].parameters, rel=0.04)
    width, layers = PUBLISHED[size].hidden_size, PUBLISHED[size].num_hidden_layers
    tables = model.config.vocab_size + 2 * (PUBLISHED[size].max_position_embeddings + 1)
    assert parameters == tables * width + layers * (12 * width**2 + 13 * width) + 2 * width
    assert model.glm.layers[0].attention.head_size == 64


def test_a_size_that_was_not_published_is_refused():
    with pytest.raises(ConfigError, match="--size 110 is no published GLM"):
        published_config("110")


def test_what_is_added_to_the_states_begins_smaller_by_the_root_of_twice_the_layers():
    torch.manual_seed(0)
    model = GlmdGlmForBlankInfilling(GlmdGlmConfig(**{**SIZES, "hidden_size": 128, "num_hidden_layers": 8}))
    layer = model.glm.layers[3]
    for module, std in ((layer.attention.dense, 0.005), (layer.mlp.down, 0.005), (layer.attention.query, 0.02)):
        assert module.weight.std().item() == pytest.approx(std, rel=0.05) and not module.bias.any()


def test_glmd_proves_of_it_what_it_assumes_of_a_teacher(tmp_path):
    model = tiny_glm().float()
    prove_language_model(model)
    prove_config(model.config, AutoModelForMaskedLM, prove_language_model, length=30)
    assert list(layer_lists(model)) == ["glm.layers"]
    assert Split(model).columns >= {"input_ids", "attention_mask", *ROW}
    assert language_model_class(model.config) is AutoModelForMaskedLM
    assert model_positions(model.config) == 30
    assert saved_and_reopened(model.config).to_dict().keys() >= model.config.to_dict().keys() - {"auto_map"}


@pytest.fixture
def vocabulary() -> Vocabulary:
    """Every second token, and those that the config names."""
    kept = np.array(sorted({0, 2, 3, 4, 5, 6, *range(10, 40, 2)}))
    token_map = np.full(40, 1)
    token_map[kept] = np.arange(len(kept))
    return Vocabulary(kept, token_map)


def test_a_smaller_vocabulary_has_the_logits_of_its_tokens_and_their_ids(vocabulary):
    model = tiny_glm()
    row = as_row({**ROW, "input_ids": [2, 12, 4, 14, 4, 3, 5, 22, 24, 5, 26]})
    kept = torch.from_numpy(vocabulary.kept_ids)
    sliced = slice_model(model, vocabulary)
    ours = {**row, "input_ids": torch.from_numpy(vocabulary.token_map)[row["input_ids"]]}
    torch.testing.assert_close(sliced(**ours).logits, model(**row).logits[..., kept])
    ids = (sliced.config.mask_token_id, sliced.config.bos_token_id, sliced.config.eos_token_id)
    assert ids == (3, 4, 5) and sliced.config.vocab_size == len(kept)
    assert sliced.lm_head.weight is sliced.glm.word_embeddings.weight


@pytest.mark.parametrize("initialization", ["uniform", "scratch"])
def test_a_student_has_fewer_layers_and_tokens(vocabulary, initialization):
    teacher = tiny_glm().float()
    student = build_student(
        teacher, vocabulary, StudentConfig(num_hidden_layers=2, initialization=initialization), seed=0
    )
    assert len(student.glm.layers) == 2 and student.config.vocab_size == vocabulary.size
    same = torch.equal(student.glm.layers[0].mlp.up.weight, teacher.glm.layers[1].mlp.up.weight)
    assert same == (initialization == "uniform")


def test_a_folder_opens_with_glmd_and_with_the_code_that_it_brings(tmp_path, monkeypatch):
    model = tiny_glm()
    model.save_pretrained(tmp_path / "glm")
    row = as_row()
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "glm", dtype=torch.float64)
    assert (
        type(again) is GlmdGlmForBlankInfilling and type(AutoConfig.from_pretrained(tmp_path / "glm")) is GlmdGlmConfig
    )
    assert type(AutoModel.from_pretrained(tmp_path / "glm")) is GlmdGlmModel
    assert torch.equal(again(**row).logits, model(**row).logits)
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    theirs = dynamic.get_class_from_dynamic_module("modeling_glmd_glm.GlmdGlmForBlankInfilling", str(tmp_path / "glm"))
    assert theirs.__module__.startswith("transformers_modules")
    stranger = theirs.from_pretrained(tmp_path / "glm", dtype=torch.float64)
    assert torch.equal(stranger(**row).logits, model(**row).logits)
