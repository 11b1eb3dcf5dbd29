"""Split any Hugging Face model into backbone, head transform and final linear map, with hardly any code per model.

A model runs by its own forward. Two things are exchanged for the time of one call: the backbone, by outputs
already computed, so that one backbone forward feeds a task head and an LM head; and the forward of the final
linear map, by a function that sees the hidden states before it, so that N x V logits need never exist.
MobileBERT's map is two weights that its head joins and multiplies by itself: there the head's forward is exchanged.
Some models scale or cap their logits after the map; that is a part of it here.

    split = Split(model)
    inputs = split.inputs(batch)
    outputs = split.run_backbone(inputs)
    logits = Split(classifier).run_head(outputs, inputs=inputs)
    loss = split.run_head(outputs, final_linear=lambda hidden, head: head.logits(hidden).sum())
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmd.errors import ConfigError, ModelError
from glmd.losses.head import Head
from glmd.losses.logits import LogitScaling
from glmd.models.attention_masks import masks_of
from glmd.vocabulary.slicing import own_matrices, tie_weights

# Fields of a config that say what is done to the logits after the map (Cohere's, Granite's, Falcon H1's), as a factor.
FACTORS: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,
    "logits_scaling": lambda value: 1 / value,
    "lm_head_multiplier": lambda value: value,
}


FinalLinear = Callable[[Tensor, Head], Any]


LMKind = Literal["masked", "causal", "encoder-decoder", "blank-infilling"]
HALVES = ("encoder", "decoder")  # the parts of an encoder-decoder


def backbone(model: nn.Module) -> nn.Module:
    """What is under the head: an encoder, a decoder, or both; of a bare model itself. Raises ModelError for none."""
    if is_bare(model):
        return model
    name = backbone_name(model)
    return model.get_submodule(name) if name else _assembled(model)


def backbone_name(model: nn.Module) -> str:
    """The attribute that holds the backbone: base_model_prefix, or else the only transformers model inside.

    "" where the model holds the parts of its backbone itself, as T5 its encoder and its decoder, or is one.
    """
    if is_bare(model):
        return ""
    name = getattr(model, "base_model_prefix", "")
    if name and isinstance(getattr(model, name, None), nn.Module):
        return str(name)
    inside = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(inside) == 1:
        return inside[0]
    if set(inside) == set(HALVES):
        return ""
    raise ModelError(f"{type(model).__name__} has no backbone under base_model_prefix; it is not supported yet")


def backbone_prefix(model: nn.Module) -> str:
    """With what the names of a backbone's parts begin in the model."""
    name = backbone_name(model)
    return f"{name}." if name else ""


def _assembled(model: Any) -> nn.Module:
    """The base model that transformers has for a class, of the parts that the class holds itself.

    It is kept beside the model, and is no module of it: its parts are.
    """
    whole: Any = model.__dict__.get("_assembled_backbone")
    if whole is None:
        from transformers import AutoModel

        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            whole = AutoModel.from_config(model.config)
        strange = [name for name, part in whole.named_children() if type(part) is not type(getattr(model, name, None))]
        if strange or any(True for _ in whole.parameters(recurse=False)):
            raise ModelError(f"{type(model).__name__} is not made of the parts of its base model; it is not supported")
        model.__dict__["_assembled_backbone"] = whole
    for name in dict(whole.named_children()):
        whole._modules[name] = model._modules[name]
    return whole


def lm_kind(config: Any) -> LMKind:
    """How a language model of this config predicts tokens."""
    if is_causal(config):
        return "causal"
    if config.model_type == "glmd_glm":
        return "blank-infilling"
    return "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "masked"


TASK_HEADS = ("SequenceClassification", "MultipleChoice", "TokenClassification", "QuestionAnswering")


def task_class(config: Any) -> str | None:
    """The class that a config names, where it has a task's head in place of one that predicts tokens, or no head."""
    names, bare = getattr(config, "architectures", None) or (), bare_class(config)
    return next((name for name in names if name.endswith(TASK_HEADS) or name == bare), None)


def bare_class(config: Any) -> str | None:
    """The class of a model of this config without any head; None where transformers has none of one text alone."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    name: Any = MODEL_MAPPING_NAMES.get(getattr(config, "model_type", ""))
    is_pair = getattr(config, "is_encoder_decoder", False)
    return name if isinstance(name, str) and "For" not in name and not is_pair else None


def is_encoder(config: Any) -> bool:
    """Whether a config names a model without any head, as a sentence encoder is one."""
    name = task_class(config)
    return name is not None and name == bare_class(config)


def is_bare(model: Any) -> bool:
    """Whether a model has no head itself."""
    return type(model).__name__ == bare_class(getattr(model, "config", None))


def is_causal(config: Any) -> bool:
    """Whether a model of this config predicts the next token: by the architecture that the config names.

    Whether it keeps to that is proved when it is loaded (`probes`). A class that transformers has in both of its lists,
    as XLM's, is a masked LM.
    """
    return any(_is_causal_class(name) for name in getattr(config, "architectures", None) or ())


@cache
def _is_causal_class(name: str) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return False
    # A class that came with its checkpoint is in no list.
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith(("ForCausalLM", "LMHeadModel"))


def final_linear(model: nn.Module) -> Head:
    """The map from hidden states to vocabulary. Raises ModelError where there is none or it is not one linear map."""
    return _linear_map(model, _output_embeddings(model), _joining_head(model), _added_bias(model))


def logit_scaling(config: Any) -> LogitScaling:
    """What a model of this config does to its logits after the final linear map."""
    given = {name: getattr(config, name, None) for name in FACTORS}
    factors = [FACTORS[name](value) for name, value in given.items() if isinstance(value, (int, float))]
    return LogitScaling(float(math.prod(factors)), getattr(config, "final_logit_softcapping", None))


ADDED_BIAS = "final_logits_bias"  # (1, V) that BART and its kin add to what their final map gives


def _added_bias(model: nn.Module) -> Tensor | None:
    return model._buffers.get(ADDED_BIAS)


def _linear_map(model: Any, linear: nn.Linear, head: Any, added: Tensor | None) -> Head:
    if head is not None:
        return _joined(head, model.config)
    bias: Tensor | None = linear.bias
    if added is not None:
        bias = added[0] if bias is None else bias + added[0]
    return Head(linear.weight, bias, logit_scaling(model.config))


def _output_embeddings(model: nn.Module) -> nn.Linear:
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if linear is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings; a masked or causal LM is needed")
    if not isinstance(linear, nn.Linear):
        raise ModelError(f"{type(model).__name__}: the final map is a {type(linear).__name__}, not one linear map")
    return linear


def _joining_head(model: Any) -> Any:
    """MobileBERT's head, which multiplies by the final map in its own forward and never calls it; None for others."""
    return model.cls.predictions if model.config.model_type == "mobilebert" else None


def _joined(head: Any, config: Any) -> Head:
    """MobileBERT's final map: the word embeddings and a second weight, side by side."""
    weight, pad = head.decoder.weight, config.pad_token_id
    if pad is not None and weight.requires_grad:
        # The last word of a text has padding for its neighbor, or nothing, by the length of the batch's longest. A
        # student's vector of [PAD] begins as zeros, which is what stands for nothing, and has to stay so.
        weight = weight.index_copy(0, torch.tensor([pad], device=weight.device), weight[pad : pad + 1].detach())
    return Head(torch.cat([weight, head.dense.weight.t()], dim=1), head.decoder.bias)


def share_backbone(model: nn.Module, other: nn.Module) -> None:
    """Let `other` use the backbone of `model`, tied output embeddings included. Both must have the same class of it."""
    ours, theirs = backbone(model), backbone(other)
    if type(ours) is not type(theirs):
        raise ModelError(f"{type(model).__name__} and {type(other).__name__} have different backbones")
    name, own = backbone_name(other), own_matrices(other)
    for part, module in [(name, ours)] if name else ours.named_children():
        setattr(other, part, module)
    tie_weights(other, own)


def _placeholder(outputs: Any) -> Tensor:
    hidden = outputs[0]
    return torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)


class _Stub(nn.Module):
    """Stands where a backbone stood and returns what it returned, called itself or by a part (OPT's decoder)."""

    def __init__(self, outputs: Any, real: nn.Module) -> None:
        super().__init__()
        self.outputs, self.__dict__["real"] = outputs, real  # not a module of this one

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["real"], name)
        return _Stub(self.outputs, found) if isinstance(found, PreTrainedModel) else found

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.outputs


class Split:
    """A model as backbone, head transform and final linear map, looked up once.

    It holds no weights of its own and is no module. A deep copy of what holds it and the model is of the copied model.
    Raises ModelError for a model without a backbone that can be told.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, body = model, backbone(model)
        self.is_causal = is_causal(model.config)
        self.is_encoder_decoder = lm_kind(model.config) == "encoder-decoder"
        parameters: Mapping[str, Any] = inspect.signature(body.forward).parameters
        if "input_ids" not in parameters:  # a wrapper that hands on what it is given, as BART's decoder has
            parameters = inspect.signature(model.forward).parameters
        self.columns = frozenset(parameters) - {"labels"}
        self.compiled: Any = None  # what is called in the backbone's place
        # BERT can be a decoder too, and would say so when its layers are run again in the backward.
        self.keeps_keys = self.is_causal or "use_cache" in parameters

    @property
    def backbone(self) -> nn.Module:
        """The encoder under the head; of two models that share one, the same module."""
        return backbone(self.model)

    @property
    def head(self) -> Head:
        """The final linear map. Raises ModelError where there is none or it is not one linear map."""
        return final_linear(self.model)

    def inputs(self, batch: Mapping[str, Tensor], token_map: Tensor | None = None) -> dict[str, Tensor]:
        """The columns of a batch that the backbone's forward names, in the ids that token_map gives, if any.

        Texts that share a row are told by their `text_positions`, which begin anew with each: as `position_ids`, and
        without a mask, transformers lets no token of a text see another's, and padding sees itself alone.
        A decoder beside an encoder reads what it is to say (`target_ids`, or the text itself where there are none), one
        place later. It needs no mask of padding: no earlier position sees what comes at the end.
        """
        batch = in_own_ids(batch, token_map)
        found = {name: column for name, column in batch.items() if name in self.columns}
        if "text_positions" in batch:
            found.pop("attention_mask", None)
            found["position_ids"] = batch["text_positions"]
        if self.is_encoder_decoder:
            found["decoder_input_ids"] = self._shifted(batch.get("target_ids", batch["input_ids"]))
        return found

    @cached_property
    def _shifted(self) -> Callable[[Tensor], Tensor]:
        """The model's own way to what a decoder reads from what it is to say: a token that begins it stands before it.

        `probes` proves that it is what the model makes of labels.
        """
        name = "prepare_decoder_input_ids_from_labels"
        shift: Callable[[Tensor], Tensor] | None = getattr(self.model, name, None)
        if shift is None:  # that of the language model, which needs no weights for it
            from transformers import AutoModelForSeq2SeqLM

            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                shift = getattr(AutoModelForSeq2SeqLM.from_config(self.model.config), name, None)
        start = getattr(self.model.config, "decoder_start_token_id", None)
        if shift is not None:
            return shift
        if start is None:
            raise ModelError(f"{type(self.model).__name__}: its config has no decoder_start_token_id; set it there")
        return lambda ids: torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)

    def run_backbone(self, inputs: Mapping[str, Tensor], *, is_full: bool | None = None, **asked: Any) -> Any:
        """The backbone's outputs. A decoder keeps no keys and values: nothing is generated.

        is_full: whether no row has padding; None: not known, so that models look. asked: more arguments.
        """
        call = self.backbone if self.compiled is None else self.compiled
        with nullcontext() if is_full is None else masks_of(is_full=is_full):
            return call(**inputs, **({"use_cache": False} if self.keeps_keys else {}), **asked)

    def compile(self, *, dynamic: bool) -> None:
        """Run the backbone in training by torch.compile from now on; weights and names stay those of the model.

        Raises ConfigError at the first call where that cannot be done.
        """
        from torch._dynamo.exc import TorchDynamoException

        body, name = torch.compile(self.backbone, dynamic=dynamic), type(self.model).__name__

        def call(**given: Any) -> Any:
            try:
                return body(**given)
            except TorchDynamoException as error:
                reason = str(error).strip().partition("\n")[0]
                raise ConfigError(f"torch_compile: {name} cannot be compiled here ({reason}); remove it") from error

        self.compiled = call

    def run_head(
        self, outputs: Any, *, inputs: Mapping[str, Tensor] | None = None, final_linear: FinalLinear | None = None
    ) -> Any:
        """Run the model above its backbone on the backbone's `outputs` and return its `logits`.

        inputs: what the backbone was given; a task head that averages over tokens (ModernBERT), or looks for the last
            one (GPT-2), must know the pads.
        final_linear: called inside the own `__call__` of the final linear map, or of the head that joins it (so that
            FSDP hooks have gathered the weight), in place of its forward; what it returns is returned.
        """
        assert not is_bare(self.model), "nothing is above it"
        with _replaced_forward(self.model, final_linear) as returned, _stub_backbone(self.model, outputs):
            # The stub ignores its input, but a model's forward asks for ids.
            logits = self.model(**(inputs or {"input_ids": _placeholder(outputs)})).logits
        return returned[0] if returned else logits

    def hidden_before_final(self, outputs: Any) -> Tensor:
        """(B, S, H) hidden states that the final linear map would see."""
        hidden: Tensor = self.run_head(outputs, final_linear=lambda hidden, _: hidden)
        return hidden


ID_COLUMNS = ("input_ids", "target_ids")  # of a batch, which a model reads


def in_own_ids(batch: Mapping[str, Tensor], token_map: Tensor | None) -> Mapping[str, Tensor]:
    """A batch of source ids in those of a model, by its (V,) map; itself where there is no map."""
    if token_map is None:
        return batch
    return {**batch, **{name: token_map[batch[name]] for name in ID_COLUMNS if name in batch}}


@contextmanager
def _stub_backbone(model: nn.Module, outputs: Any) -> Iterator[None]:
    name = backbone_name(model)
    said = {name: outputs}
    if not name:
        from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

        read = BaseModelOutput(last_hidden_state=outputs.encoder_last_hidden_state)
        said = {
            "encoder": read,
            "decoder": BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=outputs.last_hidden_state),
        }
    with ExitStack() as stack:
        for part, its_outputs in said.items():
            real = model._modules[part]
            stack.callback(model._modules.__setitem__, part, real)
            model._modules[part] = _Stub(its_outputs, real)  # type: ignore[arg-type]
        yield


@contextmanager
def _replaced_forward(model: nn.Module, function: FinalLinear | None) -> Iterator[list[Any]]:
    returned: list[Any] = []
    if function is None:
        yield returned
        return
    linear, head = _output_embeddings(model), _joining_head(model)
    caller: Any = linear if head is None else head
    added = _added_bias(model)
    # Placement over several devices puts a forward of its own on the instance; it must be there again afterwards.
    own = caller.__dict__.get("forward")

    def forward(hidden: Tensor) -> Any:
        if head is not None:
            hidden = head.transform(hidden)
        returned.append(function(hidden, _linear_map(model, linear, head, added)))
        # The model may go on to index or reshape its logits: hand it something of that form.
        return hidden

    caller.forward = forward
    if added is not None:  # which would not fit to what it is handed
        model._buffers[ADDED_BIAS] = added.new_zeros(1)
    try:
        yield returned
    finally:
        if added is not None:
            model._buffers[ADDED_BIAS] = added
        del caller.forward  # the class's own forward shows again
        if own is not None:
            caller.forward = own
    if not returned:
        raise ModelError(f"{type(model).__name__} never calls its output embeddings; it is not supported")


def split_parameters(model: Any, vocabulary_names: set[str]) -> dict[str, int]:
    """Parameters in all, in tensors with a vocabulary axis, and in the body; the width of a token's embedding.

    Tied ones count once.
    """
    total = sum(p.numel() for p in model.parameters())
    vocabulary = sum(p.numel() for name, p in model.named_parameters() if name in vocabulary_names)
    width = model.get_input_embeddings().weight.shape[1]
    return {"total": total, "vocabulary": vocabulary, "body": total - vocabulary, "embedding_size": width}
