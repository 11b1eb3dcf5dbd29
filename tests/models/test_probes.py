"""What is assumed of a model is proved when it is loaded: models for which it does not hold are refused in one line."""

import copy
import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_heads import FIELDS, LANGUAGE_MODELS, MASKED, SPLIT, TRANSFORMER, model_of
from torch import nn

from glmd.commands.compress import compress_model
from glmd.commands.evaluate import evaluate_text
from glmd.config import StudentConfig, TeacherConfig
from glmd.data.blocks import block_frame
from glmd.errors import ConfigError, GlmdError, ModelError
from glmd.models.heads import backbone, is_causal, logit_scaling
from glmd.models.loading import load_language_model, model_positions
from glmd.models.probes import prove_config, prove_language_model, prove_task_model, silence_padding
from glmd.models.student import build_student, saved_and_reopened, student_model_config
from glmd.models.trial import try_student
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.vocabulary.build import build_vocabulary
from glmd.vocabulary.renumbering import named_ids, renumber_config
from glmd.vocabulary.selection import must_keep_ids
from glmd.vocabulary.slicing import vocabulary_axes
from glmd.vocabulary.tokenizer import load_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary

V = TRANSFORMER["vocab_size"]


def small(name: str, head: str, **fields: Any) -> Any:
    """A random model of a class of transformers, in evaluation mode; `fields` over those of all."""
    config = getattr(transformers, f"{name}Config")(**{**TRANSFORMER, **FIELDS.get(name, {}), **fields})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}{head}")(config).eval()


# --- Heads, padding, causality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT)
def test_stock_language_models_pass(name: str) -> None:
    model = model_of(name)
    silence_padding(model)
    prove_language_model(model)


@pytest.mark.parametrize("name", [*MASKED, "GPT2", "Llama"])
def test_stock_classifiers_pass(name: str) -> None:
    model = model_of(name, "ForSequenceClassification")
    silence_padding(model)
    prove_task_model(model)


def test_multiple_choice_models_pass() -> None:
    prove_task_model(model_of("Bert", "ForMultipleChoice"))


def test_a_head_that_does_more_than_one_linear_map_is_refused() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, **inputs: Any) -> Any:
            outputs = super().forward(**inputs)
            outputs.logits = outputs.logits + 0.1 * outputs.logits.square()
            return outputs

    model = model_of("Llama")
    model.__class__ = Shifted
    with pytest.raises(ModelError, match=r"Shifted: hidden states times .* differ from its logits .* not supported"):
        prove_language_model(model)


def test_a_head_with_a_bias_of_its_own_behind_the_map_is_refused_in_one_line() -> None:
    model = small("Esm", "ForMaskedLM", mask_token_id=4, position_embedding_type="absolute")
    with pytest.raises(ModelError, match="EsmForMaskedLM: its head does not run on its backbone's outputs alone"):
        prove_language_model(model)


def test_a_task_head_that_acts_before_its_backbone_is_refused() -> None:
    """Longformer's marks its first token for global attention; trained without that, it would be scored with it."""
    fields = {"attention_window": [4, 4], "sep_token_id": 2, "max_position_embeddings": 64}
    model = small("Longformer", "ForSequenceClassification", **fields)
    with pytest.raises(ModelError, match=r"Longformer.* task head on its backbone's outputs differs from its own"):
        prove_task_model(model)
    prove_language_model(small("Longformer", "ForMaskedLM", **fields))


def test_a_model_that_reads_padding_is_refused() -> None:
    with pytest.raises(ModelError, match="FNetForMaskedLM: padding changes its output"):
        prove_language_model(small("FNet", "ForMaskedLM"))
    with pytest.raises(ModelError, match="FNetForSequenceClassification: padding changes its output"):
        prove_task_model(small("FNet", "ForSequenceClassification"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_no_reason_to_refuse(dtype: torch.dtype) -> None:
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 2, "num_hidden_layers": 4}
    for model in (small("Mixtral", "ForCausalLM", **mixture), small("Bert", "ForMaskedLM")):
        prove_language_model(model.to(dtype))

    class Deaf(transformers.BertModel):
        def forward(self, input_ids: Any, attention_mask: Any = None, **rest: Any) -> Any:
            return super().forward(input_ids, **rest)

    deaf = small("Bert", "ForMaskedLM", initializer_range=1.0).to(dtype)
    deaf.bert.__class__ = Deaf
    with pytest.raises(ModelError, match="padding changes its output"):
        prove_language_model(deaf)
    model = small("Llama", "ForCausalLM", is_causal=False, num_key_value_heads=2, initializer_range=1.0).to(dtype)
    model.config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(ModelError, match="last token changes the logits of earlier ones"):
        prove_language_model(model)


def test_a_mobilebert_whose_pad_vector_is_not_zero_is_mended() -> None:
    model = small("MobileBert", "ForMaskedLM")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 1.0
    with pytest.raises(ModelError, match="padding changes its output"):
        prove_language_model(model)
    assert silence_padding(model)
    prove_language_model(model)
    assert not silence_padding(model), "it is zero already"


@pytest.mark.parametrize(
    ("name", "head", "fields"),
    [("Llama", "ForCausalLM", {"is_causal": False}), ("Bert", "LMHeadModel", {"is_decoder": False})],
)
def test_a_causal_lm_that_sees_the_future_is_refused(name: str, head: str, fields: dict[str, Any]) -> None:
    model = small(name, head, **fields)
    model.config.architectures = [type(model).__name__]
    with pytest.raises(ModelError, match=rf"{type(model).__name__}: .* last token changes the logits of earlier ones"):
        prove_language_model(model)


def test_a_bert_that_is_a_decoder_is_causal() -> None:
    model = small("Bert", "LMHeadModel", is_decoder=True)
    model.config.architectures = ["BertLMHeadModel"]
    prove_language_model(model)


@pytest.mark.parametrize(
    ("architecture", "causal"),
    [
        ("GPT2LMHeadModel", True),
        ("BertGenerationDecoder", True),
        ("ReformerModelWithLMHead", True),
        ("SomebodysForCausalLM", True),
        ("XLMWithLMHeadModel", False),
        ("BertForMaskedLM", False),
        ("LlamaForSequenceClassification", False),
    ],
)
def test_which_classes_are_causal_is_asked_of_transformers(architecture: str, causal: bool) -> None:
    assert is_causal(transformers.BertConfig(architectures=[architecture])) is causal


def test_logits_that_are_not_finite_are_refused() -> None:
    model = model_of("Bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight *= 1e300
    with pytest.raises(ModelError, match="logits that are not finite"):
        prove_language_model(model)


def test_a_model_that_gives_another_output_each_time_is_refused_as_such() -> None:
    model = model_of("Bert")
    model.bert.encoder.layer[0].register_forward_hook(lambda _, __, output: output + torch.rand_like(output))
    with pytest.raises(ModelError, match="another output each time"):
        prove_language_model(model)


def test_a_model_whose_forward_changes_it_is_refused_by_what_changes() -> None:
    """BigBird takes up full attention for good when it meets a short text."""
    model = small("BigBird", "ForMaskedLM", attention_type="block_sparse", block_size=4, num_random_blocks=1)
    with pytest.raises(ModelError, match=r"a forward changes .*attention_type.*block_sparse.* before"):
        prove_language_model(model)
    prove_language_model(small("BigBird", "ForMaskedLM", attention_type="original_full"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("refused", [True, False])
def test_a_model_is_after_its_proof_as_before(training: bool, refused: bool) -> None:
    model = small("FNet" if refused else "Bert", "ForMaskedLM").train(training)
    before, attributes = copy.deepcopy(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    config = model.config.to_dict()
    try:
        prove_language_model(model)
        assert not refused
    except ModelError:
        assert refused
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.config.to_dict() == config and all(p.grad is None for p in model.parameters())


def test_a_scale_of_logits_is_found_by_the_field_of_the_config() -> None:
    for name, factor in (("Cohere", 0.5), ("Granite", 1 / 3), ("Gemma2", 1.0)):
        config = model_of(name).config
        config.model_type = "another"
        assert logit_scaling(config).factor == pytest.approx(factor)


def test_a_model_is_proved_by_its_config_and_the_random_numbers_of_others_stay() -> None:
    state = torch.get_rng_state()
    config = transformers.FNetConfig(**TRANSFORMER)
    with pytest.raises(ModelError, match="padding changes its output"):
        prove_config(config, transformers.AutoModelForMaskedLM, prove_language_model)
    prove_config(config, transformers.AutoModelForMaskedLM, prove_language_model, most=1000)  # too large to be tried
    assert torch.equal(torch.get_rng_state(), state)


# --- Positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, 30)
            for name in ("Roberta", "XLMRoberta", "Camembert", "MPNet", "Data2VecText", "RobertaPreLayerNorm")
        ),
        *((name, 32) for name in ("Bert", "Electra", "DistilBert", "GPT2", "OPT", "Llama", "ModernBert")),
        ("BigBird", 32),
    ],
)
def test_positions_are_counted_in_the_position_table(name: str, expected: int) -> None:
    config = getattr(transformers, f"{name}Config")(**{**TRANSFORMER, "pad_token_id": 1, **FIELDS.get(name, {})})
    assert model_positions(config) == expected
    model = getattr(transformers, f"{name}Model")(config).eval()
    model(input_ids=torch.full((1, expected), 5))
    if expected == 30:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, expected + 1), 5))


def test_a_model_whose_positions_have_no_end_has_none() -> None:
    assert model_positions(transformers.MambaConfig(vocab_size=V)) is None


# --- Copied layers, and configs that come back --------------------------------------------------------------------

DECODER = {"num_hidden_layers": 4, "num_key_value_heads": 2}


def student_of(teacher: Any, layers: Any = "uniform", **fields: Any) -> Any:
    identity = Vocabulary.identity(teacher.config.vocab_size)
    return build_student(teacher, identity, StudentConfig(2, layers, config=fields), seed=0)


def test_settings_of_single_layers_follow_the_copied_ones() -> None:
    teacher = small("SmolLM3", "ForCausalLM", **DECODER, no_rope_layer_interval=2)
    assert teacher.config.no_rope_layers == [1, 0, 1, 0]
    assert student_of(teacher).config.no_rope_layers == [0, 0]
    assert student_of(teacher, [0, 3]).config.no_rope_layers == [1, 0]
    again = saved_and_reopened(student_of(teacher).config)
    assert again.no_rope_layers == [0, 0] and again.num_hidden_layers == 2


def test_kinds_of_attention_follow_the_copied_layers() -> None:
    teacher = small("Gemma2", "ForCausalLM", **DECODER, sliding_window=3, query_pre_attn_scalar=8)
    assert student_of(teacher).config.layer_types == ["full_attention"] * 2
    gpt_neo = {"num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]], "window_size": 4}
    fields = {
        key: value for key, value in TRANSFORMER.items() if key not in ("num_hidden_layers", "num_attention_heads")
    }
    config = transformers.GPTNeoConfig(**fields, **gpt_neo)
    torch.manual_seed(0)
    student = student_of(transformers.GPTNeoForCausalLM(config).eval())
    assert student.config.attention_layers == saved_and_reopened(student.config).attention_layers == ["local", "local"]


def test_a_layer_that_the_student_would_run_with_another_setting_is_refused() -> None:
    teacher = small("SmolLM3", "ForCausalLM", **DECODER, no_rope_layer_interval=2)
    with pytest.raises(ConfigError, match=r"layer 0 of the student, a copy of .* layer 1, would have .*use_rope 1 in"):
        student_of(teacher, no_rope_layers=[1, 1])


def test_a_copied_layer_is_run_against_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the layer's number within a forward shows in no attribute."""
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    stock = layer.forward

    def forward(self: Any, hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
        return stock(self, hidden_states, **rest) * (1 + self.self_attn.layer_idx)

    monkeypatch.setattr(layer, "forward", forward)
    teacher = small("Llama", "ForCausalLM", **DECODER)
    with pytest.raises(ModelError, match="layer 0 of the student is a copy of the teacher's layer 1 and gives another"):
        student_of(teacher)
    student_of(teacher, "first")
    student_of(teacher, "scratch")


def test_what_the_students_forward_hands_to_a_copied_layer_is_proved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model that takes the mask of a layer from its number, unseen by the layer."""
    body = transformers.models.llama.modeling_llama.LlamaModel
    stock, kinds = body.forward, {4: [1.0, 2.0, 1.0, 2.0], 2: [1.0, 2.0]}

    def forward(self: Any, *args: Any, **rest: Any) -> Any:
        def scaled(layer: Any, given: Any, more: Any) -> Any:
            factor = kinds[len(self.layers)][layer.self_attn.layer_idx]
            return given, more | {"position_embeddings": tuple(factor * each for each in more["position_embeddings"])}

        hooks = [layer.register_forward_pre_hook(scaled, with_kwargs=True) for layer in self.layers]
        try:
            return stock(self, *args, **rest)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(body, "forward", forward)
    teacher = small("Llama", "ForCausalLM", **DECODER)
    with pytest.raises(ModelError, match="layer 0 of the student is a copy of the teacher's layer 1 and gives another"):
        student_of(teacher)
    student_of(teacher, [0, 3])


def test_a_number_of_the_config_that_a_layer_takes_by_its_number_is_seen_before_any_weight() -> None:
    teacher = small("GPT2", "LMHeadModel", num_hidden_layers=4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ConfigError, match=r"layer 0 of the student, a copy .* would have attn.scaling .* in place of"):
        student_of(teacher)
    student_of(teacher, "first")


def test_each_of_several_lists_of_layers_is_copied() -> None:
    fields = {"emb_dim": 16, "n_layers": 4, "n_heads": 2, "max_position_embeddings": 32, "pad_index": 0}
    torch.manual_seed(0)
    teacher = transformers.XLMWithLMHeadModel(transformers.XLMConfig(vocab_size=V, **fields, init_std=0.3)).eval()
    teacher.config.architectures = ["XLMWithLMHeadModel"]
    student, theirs = student_of(teacher), teacher.state_dict()
    for part in ("attentions", "layer_norm1", "ffns", "layer_norm2"):
        copied = {k: v for k, v in student.state_dict().items() if f".{part}." in k}
        assert copied
        for key, value in copied.items():
            assert torch.equal(
                value, theirs[key.replace(f"{part}.1", f"{part}.3").replace(f"{part}.0", f"{part}.1")]
            ), key


def test_a_config_that_cannot_be_saved_and_opened_again_is_refused() -> None:
    config = transformers.GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]])
    with pytest.raises(ConfigError, match=r"GPTNeoConfig .* cannot be saved and opened again .*attention"):
        saved_and_reopened(student_model_config(config, StudentConfig(2, config={"attention_layers": ["local"]})))


# --- Rows are not tokens ------------------------------------------------------------------------------------------


def test_rows_beyond_the_tokenizer_are_dropped_when_every_token_is_kept() -> None:
    teacher = small("Llama", "ForCausalLM", num_hidden_layers=4)
    student = build_student(teacher, Vocabulary.identity(V - 5), StudentConfig(2), seed=0)
    assert student.config.vocab_size == V - 5 == student.get_input_embeddings().weight.shape[0]
    assert torch.equal(student.get_output_embeddings().weight, teacher.get_output_embeddings().weight[: V - 5])


def test_a_student_has_two_matrices_where_the_teacher_has_though_its_config_calls_them_one() -> None:
    teacher = small("Llama", "ForCausalLM", num_hidden_layers=4, tie_word_embeddings=False)
    teacher.config.tie_word_embeddings = True
    for size in (V, V - 5):
        student = build_student(teacher, Vocabulary.identity(size), StudentConfig(2), seed=0)
        for ours, theirs in zip(
            *([m.get_input_embeddings(), m.get_output_embeddings()] for m in (student, teacher)), strict=True
        ):
            assert torch.equal(ours.weight, theirs.weight[:size])


# --- In a plan ----------------------------------------------------------------------------------------------------


def test_check_refuses_a_teacher_that_no_student_can_follow(tiny: Any, tmp_path: Any) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny.teacher)
    model = transformers.FNetForMaskedLM(
        transformers.FNetConfig(**{**TRANSFORMER, "vocab_size": config.vocab_size, "max_position_embeddings": 64})
    )
    folder = tmp_path / "fnet"
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny.teacher).save_pretrained(folder)
    with pytest.raises(GlmdError, match="FNetForMaskedLM: padding changes its output"):
        make_plan(tiny.config(tmp_path / "run", f"teacher={folder}"))


def test_state_of_modules_that_hold_no_buffers_is_looked_at() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls = self.calls + 1
            return super().forward(x)

    model = model_of("Bert")
    model.bert.encoder.layer[0].output.dense.__class__ = Counting
    model.bert.encoder.layer[0].output.dense.calls = 0
    with pytest.raises(ModelError, match=r"a forward changes bert.encoder.layer.0.output.dense.calls"):
        prove_language_model(model)
    assert LANGUAGE_MODELS["Bert"] == "BertForMaskedLM"


# --- Families that were refused or broken without need ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16}),  # its head calls a part of its backbone
        ("Bart", {"decoder_ffn_dim": 32, "is_decoder": True}),
        (
            "FalconH1",
            {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "head_dim": 8, "mamba_d_state": 4}
            | {"lm_head_multiplier": 3.0},
        ),
    ],
)
def test_a_head_that_looks_into_its_backbone_is_split(name: str, fields: dict[str, Any]) -> None:
    model = small(name, "ForCausalLM", num_key_value_heads=2, **fields)
    model.config.architectures = [type(model).__name__]
    prove_language_model(model)


def test_a_backbone_that_stands_elsewhere_than_its_class_says_is_found() -> None:
    """Llama 4's prefix is that of the model with pictures."""
    model = model_of("Llama")
    model.__class__ = type("Elsewhere", (transformers.LlamaForCausalLM,), {"base_model_prefix": "language_model"})
    assert backbone(model) is model.model
    prove_language_model(model)
    model.other = transformers.LlamaModel(model.config)
    with pytest.raises(ModelError, match="Elsewhere has no backbone under base_model_prefix"):
        backbone(model)


def test_a_decoder_with_the_config_of_an_encoder_decoder_gets_fewer_layers() -> None:
    teacher = small("Bart", "ForCausalLM", encoder_layers=4, decoder_layers=4, is_decoder=True, num_hidden_layers=4)
    student = student_of(teacher)
    assert len(student.model.decoder.layers) == 2 == student.config.decoder_layers


def test_settings_by_the_number_of_a_layer_follow_the_copied_layers() -> None:
    config = transformers.BertConfig(num_hidden_layers=4)
    config.of_some = {"1": "one", "3": "three"}
    student = student_model_config(config, StudentConfig(2, [0, 3]))
    assert student.of_some == {1: "three"}
    config.of_some = {"9": "no layer's"}
    assert student_model_config(config, StudentConfig(2, [0, 3])).of_some == {"9": "no layer's"}


def test_a_number_of_layers_that_a_config_does_not_take_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"student.num_hidden_layers: FunnelConfig does not take it \(.*block_sizes"):
        student_model_config(transformers.FunnelConfig(), StudentConfig(2))


def test_a_model_that_loses_weights_in_its_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Youtu, whose folder loses the vector of its pad token."""
    stock = transformers.BertForMaskedLM.from_pretrained.__func__

    def forgetful(cls: Any, *args: Any, **rest: Any) -> Any:
        model = stock(cls, *args, **rest)
        with torch.no_grad():
            model.get_input_embeddings().weight[0] = 0
        return model

    config = transformers.BertConfig(**TRANSFORMER)
    prove_config(config, transformers.AutoModelForMaskedLM, prove_language_model)
    monkeypatch.setattr(transformers.BertForMaskedLM, "from_pretrained", classmethod(forgetful))
    with pytest.raises(ModelError, match=r"saved and opened again, it has another bert.embeddings.word_embeddings"):
        prove_config(config, transformers.AutoModelForMaskedLM, prove_language_model)


def test_a_model_that_cannot_be_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Reformer, which trains on texts of one length alone."""
    stock = transformers.BertForMaskedLM.forward

    def forward(self: Any, *args: Any, **rest: Any) -> Any:
        if self.training:
            raise ValueError("one length alone")
        return stock(self, *args, **rest)

    monkeypatch.setattr(transformers.BertForMaskedLM, "forward", forward)
    config = transformers.BertConfig(**TRANSFORMER)
    with pytest.raises(ModelError, match=r"it cannot be trained \(ValueError: one length alone\)"):
        prove_config(config, transformers.AutoModelForMaskedLM, prove_language_model)


def test_a_table_whose_ids_are_an_input_of_their_own_is_none_of_tokens() -> None:
    axes = vocabulary_axes(
        transformers.ErnieConfig(**TRANSFORMER, task_type_vocab_size=3), transformers.ErnieForMaskedLM
    )
    assert {name for name in axes if "task_type" in name} == set() and axes
    config = transformers.RoCBertConfig(**TRANSFORMER, pronunciation_vocab_size=V, shape_vocab_size=V)
    with pytest.raises(ModelError, match=r"depends on the vocabulary otherwise|second table"):
        vocabulary_axes(transformers.MarianConfig(**TRANSFORMER, decoder_vocab_size=V + 1), transformers.MarianMTModel)
    assert vocabulary_axes(config, transformers.RoCBertForMaskedLM)


def test_the_number_of_a_layer_is_no_token_id() -> None:
    config = transformers.BertConfig(**TRANSFORMER)
    config.moe_layer_start_index = 1
    assert renumber_config(config, Vocabulary.identity(V)).moe_layer_start_index == 1
    config.start_index = 1
    with pytest.raises(ModelError, match="start_index = 1 looks like a token id"):
        renumber_config(config, Vocabulary.identity(V))


def test_two_matrices_that_the_config_calls_one_are_refused_when_a_teacher_is_loaded(tiny: Any, tmp_path: Any) -> None:
    model = small("Llama", "ForCausalLM", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    load_language_model(TeacherConfig(str(tmp_path)))
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(ModelError, match="its config says tie_word_embeddings, but its weights hold two different"):
        load_language_model(TeacherConfig(str(tmp_path)))


def test_the_pad_vector_of_a_loaded_mobilebert_is_set_to_zero_and_that_is_said(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = small("MobileBert", "ForMaskedLM")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 1.0
    model.save_pretrained(tmp_path)
    loaded = load_language_model(TeacherConfig(str(tmp_path)))
    assert not loaded.get_input_embeddings().weight[0].any()
    assert "the vector of its pad token" in caplog.text


def test_a_model_of_several_parts_is_refused_in_one_line(tiny: Any, tmp_path: Any) -> None:
    transformers.Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path / "several")
    transformers.AutoTokenizer.from_pretrained(tiny.teacher).save_pretrained(tmp_path / "several")
    with pytest.raises(ConfigError, match="Gemma3Config has no vocab_size of its own; a model of text alone is needed"):
        make_plan(tiny.config(tmp_path / "run", f"teacher={tmp_path / 'several'}", "casting=cloze"))


# --- The frame of a text ------------------------------------------------------------------------------------------


def test_the_frame_of_a_text_is_found_without_the_letter_a() -> None:
    letters = "กขคงจ"
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokenizer = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(entries)})
    before, after = block_frame(tokenizer)
    assert (before.tolist(), after.tolist()) == ([2], [3])
    without = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(entries[:5])})
    with pytest.raises(ModelError, match="what it puts before and after a text cannot be told"):
        block_frame(without)


def test_a_teacher_that_cannot_serve_is_refused_before_the_corpus_is_read(
    tiny: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its weights alone show, `check` does not see."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny.teacher, folder)
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("glmd.pipeline.data.build_token_store", lambda *_, **__: pytest.fail("the corpus was read"))
    config = tiny.config(tmp_path / "run", f"teacher={folder}")
    make_plan(config)
    with pytest.raises(ModelError, match="holds values that are not finite"):
        run(config)


def test_check_refuses_more_tokens_than_a_table_of_another_name_has_rows(tiny: Any, tmp_path: Any) -> None:
    """MPT's limit is max_seq_len, which no common field repeats."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.teacher)
    fields = {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": len(tokenizer), "max_seq_len": 12}
    config = transformers.MptConfig(**fields, architectures=["MptForCausalLM"])
    with pytest.raises(ModelError, match=r"MptForCausalLM: it does not read 16 tokens at once .*smaller max_length"):
        prove_config(config, transformers.AutoModelForCausalLM, prove_language_model, length=16)
    prove_config(config, transformers.AutoModelForCausalLM, prove_language_model, length=12)


def test_text_is_not_scored_by_a_model_that_sees_the_future(models: Path, tmp_path: Path) -> None:
    source = models / "LlamaForCausalLM"
    config = transformers.AutoConfig.from_pretrained(source)
    config.is_causal = False
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="last token changes the logits of earlier ones"):
        evaluate_text(str(tmp_path), [str(models / "corpus.txt")], max_length=None)


def test_a_task_head_on_another_backbone_than_the_words_is_refused_in_check(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(transformers.BertModel):
        pass

    def with_other_backbone(self: Any, config: Any) -> None:
        stock(self, config)
        self.bert.__class__ = Other

    stock = transformers.BertForSequenceClassification.__init__
    config = transformers.BertConfig(**TRANSFORMER, architectures=["BertForMaskedLM"])
    arguments = {"length": 16, "task_heads": {"SequenceClassification"}}
    try_student(StudentConfig(1), config, **arguments)
    monkeypatch.setattr(transformers.BertForSequenceClassification, "__init__", with_other_backbone)
    with pytest.raises(ConfigError, match="have different backbones"):
        try_student(StudentConfig(1), config, **arguments)
    fields = {**TRANSFORMER, "max_position_embeddings": 64, "attention_window": [4, 4], "sep_token_id": 2}
    longformer = transformers.LongformerConfig(**fields)
    with pytest.raises(ConfigError, match=r"Longformer.* task head on its backbone's outputs differs"):
        try_student(StudentConfig(2), longformer, **arguments)


def test_what_a_config_changes_by_wish_is_no_reason_to_refuse_a_copied_layer() -> None:
    teacher = small("Bert", "ForMaskedLM", num_hidden_layers=4)
    student = student_of(teacher, hidden_dropout_prob=0.0, layer_norm_eps=1e-3, hidden_act="relu")
    assert student.bert.encoder.layer[0].output.LayerNorm.eps == 1e-3
    for i, j in enumerate((1, 3)):
        theirs = teacher.bert.encoder.layer[j].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in student.bert.encoder.layer[i].state_dict().items())
    assert teacher.config.hidden_act == "gelu"


def test_a_config_that_comes_back_changed_is_refused_by_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = transformers.BertConfig.from_pretrained.__func__

    def changing(cls: Any, *args: Any, **rest: Any) -> Any:
        config = stock(cls, *args, **rest)
        config.layer_norm_eps = 1.0
        return config

    assert saved_and_reopened(transformers.BertConfig()).layer_norm_eps == 1e-12
    monkeypatch.setattr(transformers.BertConfig, "from_pretrained", classmethod(changing))
    with pytest.raises(ConfigError, match=r"BertConfig.layer_norm_eps is 1e-12 and comes back from its file as 1.0"):
        saved_and_reopened(transformers.BertConfig())


@pytest.mark.parametrize(
    "name",
    [
        "glmd.models.student.saved_and_reopened",
        "glmd.vocabulary.tokenizer.require_reloadable",
        "glmd.models.trial.prove_config",
    ],
)
def test_check_opens_again_what_an_export_would_write(
    name: str, tiny: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ModelError("on purpose")

    monkeypatch.setattr(name, refuse)
    with pytest.raises(GlmdError, match="on purpose"):
        make_plan(tiny.config(tmp_path / "run"))


def test_a_change_that_alters_what_copied_layers_compute_is_said(caplog: pytest.LogCaptureFixture) -> None:
    teacher = small("Bert", "ForMaskedLM", num_hidden_layers=4)
    student_of(teacher, hidden_dropout_prob=0.0)
    assert "give other outputs" not in caplog.text
    student_of(teacher, num_attention_heads=4)
    assert "student.config num_attention_heads: the copied layers give other outputs than the teacher's" in caplog.text


def test_gradients_that_are_not_finite_are_refused_in_check(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = transformers.BertForMaskedLM.forward

    def forward(self: Any, *args: Any, **rest: Any) -> Any:
        outputs = stock(self, *args, **rest)
        if self.training:
            outputs.logits = outputs.logits * float("inf")
        return outputs

    monkeypatch.setattr(transformers.BertForMaskedLM, "forward", forward)
    config = transformers.BertConfig(**TRANSFORMER)
    with pytest.raises(ModelError, match="its gradients are not finite in training"):
        prove_config(config, transformers.AutoModelForMaskedLM, prove_language_model)


@pytest.mark.parametrize("where", ["tokenizer", "student", "trial"])
def test_a_full_disk_is_not_taken_for_a_model_that_does_not_come_back(
    where: str, tiny: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    owners = {"tokenizer": transformers.PreTrainedTokenizerFast, "student": transformers.BertConfig}
    owner = owners.get(where, transformers.BertForMaskedLM)
    monkeypatch.setattr(owner, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        make_plan(tiny.config(tmp_path / "run"))


def test_check_refuses_a_model_whose_forward_changes_it() -> None:
    config = transformers.BigBirdConfig(**{**TRANSFORMER, "attention_type": "block_sparse", "block_size": 4})
    with pytest.raises(ModelError, match=r"a forward changes .*attention_type"):
        prove_config(config, transformers.AutoModelForMaskedLM, prove_language_model)


def test_ids_that_a_config_names_are_kept_whatever_the_text_says(tiny: Any, tmp_path: Any) -> None:
    """An ordinary token as pad would be stale if it were dropped; whether it is must not hang on the corpus."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    last = len(tokenizer) - 1  # the rarest word
    config = transformers.AutoConfig.from_pretrained(folder)
    counts, vectors = np.arange(last + 1)[::-1].copy(), np.random.default_rng(0).normal(size=(last + 1, 4))
    for ids, kept in (((), False), (named_ids(config, None), False), ([last, 10**6], True)):
        vocabulary = build_vocabulary(tokenizer, vectors, counts, keep_ratio=0.6, mapping="cosine", keep_ids=ids)
        assert vocabulary.is_kept(last) is kept and vocabulary.size == int(0.6 * (last + 1))
    config.bos_token_id = last
    assert last in named_ids(config) and must_keep_ids(tokenizer, ids=named_ids(config)) >= {last}


def test_a_field_that_looks_like_an_id_is_no_hindrance_where_no_id_moves(tiny: Any) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny.teacher)
    config.start_index = 1
    arguments = {"length": 16}
    with pytest.raises(ModelError, match="start_index = 1 looks like a token id"):
        try_student(StudentConfig(1), config, **arguments)
    try_student(StudentConfig(1), config, **arguments, is_whole=True)


@pytest.fixture
def odd_pad(tiny: Any, tmp_path: Path) -> Path:
    """`tiny`'s teacher, whose config takes its rarest word for the sign of padding."""
    folder = tmp_path / "odd"
    shutil.copytree(tiny.teacher, folder)
    text, tokenizer = tiny.corpus.read_text(), transformers.AutoTokenizer.from_pretrained(folder)
    words = [token for token in tokenizer.get_vocab() if token.isalpha() and len(token) == 4]
    config = transformers.AutoConfig.from_pretrained(folder)
    config.pad_token_id = tokenizer.convert_tokens_to_ids(min(words, key=lambda word: (text.count(word), word)))
    config.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_run_and_compress_keep_an_ordinary_token_that_the_config_names(
    odd_pad: Path, tiny: Any, tmp_path: Path, trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    wanted = transformers.AutoConfig.from_pretrained(odd_pad).pad_token_id
    run(tiny.config(tmp_path / "run", f"teacher={odd_pad}", "tasks={}", "pretraining.max_steps=1"))
    assert Vocabulary.load(tmp_path / "run" / "vocabulary").is_kept(wanted)
    compress_model(odd_pad, tmp_path / "small", corpus=[tiny.corpus], keep_ratio=0.6)
    student = transformers.AutoConfig.from_pretrained(tmp_path / "small").pad_token_id
    assert load_tokenizer(tmp_path / "small").token_map[wanted] == student


def test_check_counts_the_ids_of_the_config_among_those_that_must_be_kept(
    odd_pad: Path, tiny: Any, tmp_path: Path
) -> None:
    required = len(must_keep_ids(transformers.AutoTokenizer.from_pretrained(tiny.teacher)))
    settings = ("tasks={}", f"vocabulary={{size: {required}}}")
    make_plan(tiny.config(tmp_path / "run", *settings))
    with pytest.raises(ConfigError, match=f"{required} of .* tokens would be kept, but {required + 1} must be"):
        make_plan(tiny.config(tmp_path / "run", f"teacher={odd_pad}", *settings))


def test_a_class_that_keeps_two_matrices_though_its_config_says_one_is_taken_as_it_is(tmp_path: Any) -> None:
    from transformers import LukeConfig, LukeForMaskedLM

    from glmd.models.weight_headers import require_language_model

    config = LukeConfig(
        vocab_size=20, entity_vocab_size=4, hidden_size=8, entity_emb_size=8, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=8,
    )  # fmt: skip
    assert config.tie_word_embeddings
    LukeForMaskedLM(config).save_pretrained(tmp_path)
    require_language_model(str(tmp_path), field="teacher.model")
