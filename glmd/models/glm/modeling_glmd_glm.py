"""GLM, the blank-infilling language model of arXiv:2103.10360, as a transformers model. Runs without glmd.

    model = GlmdGlmForBlankInfilling(GlmdGlmConfig())
    logits = model(input_ids=ids, context_mask=context, position_ids=places, block_position_ids=within).logits

A row is part A, a text in which one mask token stands for each blank, and then part B, the blanks' tokens, each blank
after a start-of-piece. Tokens of A see all of A. Tokens of B see A and what stands before them in B. A token of B has
its mask's place in A as its first position, and counts from 1 in its blank as its second.

The file goes into every folder that is saved, so that transformers alone opens it with trust_remote_code=True.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class GlmdGlmConfig(PreTrainedConfig):
    """Shape of a GLM; by default that of 110M parameters.

    Both tables of positions have max_position_embeddings + 1 rows. bos_token_id and eos_token_id are the start and the
    end of a piece.
    """

    model_type = "glmd_glm"

    def __init__(
        self,
        vocab_size: int = 30592,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        hidden_act: str = "gelu_new",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int = 512,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        mask_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        # After what the base class sets: not every version of transformers has these as fields of all configs.
        self.pad_token_id, self.mask_token_id = pad_token_id, mask_token_id
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.tie_word_embeddings = tie_word_embeddings


def blank_infilling_mask(attention_mask: Tensor | None, context_mask: Tensor | None) -> Tensor | None:
    """(R, S) masks -> (R, 1, S, S) bool, True where a query may look at a key; None where all may look everywhere.

    attention_mask: 1 for tokens, 0 for padding; None: no padding. context_mask: 1 in part A, 0 in B; None: all is A.
    """
    given = attention_mask if context_mask is None else context_mask
    if given is None:
        return None
    rows, length = given.shape
    seen = torch.ones(rows, 1, length, dtype=torch.bool, device=given.device)
    if context_mask is not None:
        # What stands before a token of part A is part A.
        earlier = torch.ones(length, length, dtype=torch.bool, device=given.device).tril()
        seen = context_mask.bool()[:, None, :] | earlier
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, :]
    # What a pad sees is of no account, but it has to see something: a softmax over nothing is nan.
    return (seen | torch.eye(length, dtype=torch.bool, device=given.device))[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that keeps its probabilities: (R, A, S, D) each -> (R, S, A, D), and (R, A, S, S)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    probabilities = nn.functional.dropout(probabilities, dropout, module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


class AddedLinear(nn.Linear):
    """The last map of an update that is added to the states. Of code that is not its own, transformers draws weights of
    modules that hold some, so that these are told by a class.
    """


class GlmdGlmAttention(nn.Module):
    is_causal = False

    def __init__(self, config: GlmdGlmConfig) -> None:
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {config.num_attention_heads}"
            )
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.dense = AddedLinear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(R, S, H) states -> (R, S, H), and the probabilities (R, A, S, S) where they are made."""
        shape = (*hidden_states.shape[:-1], -1, self.head_size)
        query, key, value = (
            linear(hidden_states).view(shape).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout_prob if self.training else 0.0
        mixed, probabilities = attend(
            self, query, key, value, mask, dropout=dropout, scaling=self.head_size**-0.5, is_causal=False
        )
        return self.dense(mixed.flatten(-2)), probabilities


class GlmdGlmMLP(nn.Module):
    def __init__(self, config: GlmdGlmConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = AddedLinear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        found: Tensor = self.down(self.activation(self.up(hidden_states)))
        return found


class GlmdGlmLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a layer norm of what it reads, added to the states."""

    def __init__(self, config: GlmdGlmConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GlmdGlmAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GlmdGlmMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        attended, probabilities = self.attention(self.input_layernorm(hidden_states), mask)
        hidden_states = hidden_states + self.dropout(attended)
        update = self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return hidden_states + update, probabilities


class GlmdGlmPreTrainedModel(PreTrainedModel):
    config_class = GlmdGlmConfig
    base_model_prefix = "glm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GlmdGlmLayer"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights, those that are added to the states smaller by the root of their number (2 a layer)."""
        super()._init_weights(module)
        if isinstance(module, AddedLinear):
            depth = math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range / depth)


class GlmdGlmModel(GlmdGlmPreTrainedModel):
    """The backbone. `last_hidden_state` (R, S, H) is behind the last layer norm."""

    def __init__(self, config: GlmdGlmConfig) -> None:
        super().__init__(config)
        positions = config.max_position_embeddings + 1
        self.word_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(positions, config.hidden_size)
        self.block_position_embeddings = nn.Embedding(positions, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([GlmdGlmLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        block_position_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """All inputs are (R, S); inputs_embeds (R, S, H) in place of ids. `blank_infilling_mask` says what masks mean.

        Without context_mask all is part A, without position_ids these are 0 to S - 1, without block_position_ids 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(states.shape[1], device=states.device)[None]
        if block_position_ids is None:
            block_position_ids = torch.zeros_like(position_ids)
        states = states + self.position_embeddings(position_ids) + self.block_position_embeddings(block_position_ids)
        states = self.dropout(states)
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = getattr(config, "output_hidden_states", False)
        if output_attentions is None:
            output_attentions = getattr(config, "output_attentions", False)
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError("attentions are given by attn_implementation eager alone")
        mask = blank_infilling_mask(attention_mask, context_mask)
        all_states, all_attentions = [], []
        for layer in self.layers:
            all_states.append(states)
            states, attentions = layer(states, mask)
            all_attentions.append(attentions)
        states = self.final_layernorm(states)
        return BaseModelOutput(
            last_hidden_state=states,
            hidden_states=(*all_states, states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class GlmdGlmForBlankInfilling(GlmdGlmPreTrainedModel):
    """GLM with its head: the word embeddings again, without a bias."""

    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GlmdGlmConfig) -> None:
        super().__init__(config)
        self.glm = GlmdGlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        block_position_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> MaskedLMOutput:
        """Inputs as those of the backbone. labels: (R, S) what each token predicts, the next one of its blank, or -100.

        The loss is the mean over labels.
        """
        outputs = self.glm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            block_position_ids=block_position_ids,
            context_mask=context_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


GlmdGlmConfig.register_for_auto_class()
GlmdGlmModel.register_for_auto_class("AutoModel")
GlmdGlmForBlankInfilling.register_for_auto_class("AutoModelForMaskedLM")
