"""The families that `scripts/families.py` tries: a small model of each, trained a little, and its own tokenizer.

    make_family(FAMILIES["qwen3"], folder, texts)      # a folder as the published one, in small

Tokenizers are those of `family_tokenizers.py`. Configs have the published one's fields but for sizes; ids of tokens are
given by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from family_tokenizers import LLAMA3, O200K, QWEN, TOKENS, byte_level, gemma, spm_bpe, unigram, wordpiece
from transformers import AddedToken

HIDDEN, HEAD = 64, 16
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
WIDE = {"initializer_range": 0.3}  # drawn weights whose predictions follow the context
GROUPED = {"num_key_value_heads": 2, "head_dim": HEAD}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A published model in small.

    model, tokenizer: its class, and what makes its tokenizer in a folder, given texts.
    fields: of its config; names of tokens stand for their ids in fields of ids.
    rows: how many more rows it has than its tokenizer has tokens. generation: fields of its generation config.
    """

    published: str
    model: str
    tokenizer: Callable[[Path, list[str]], Any]
    fields: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def is_decoder(self) -> bool:
        return self.model.endswith("CausalLM")


def make_family(family: Family, folder: Path, texts: list[str], *, steps: int) -> None:
    """Write the family's model, trained for some steps on the texts, and its tokenizer."""
    folder.mkdir(parents=True)
    family.tokenizer(folder, texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model_class = getattr(transformers, family.model)
    named = _with_ids(family.fields, tokenizer)
    sizes = SIZES | ({} if family.is_decoder else WIDE) | {"vocab_size": len(tokenizer) + family.rows}
    config = model_class.config_class(**sizes | named)
    torch.manual_seed(0)
    model = model_class(config).eval()
    if family.is_decoder:
        train(model, tokenizer, texts, steps)
    if family.generation:
        model.generation_config = transformers.GenerationConfig(**_with_ids(family.generation, tokenizer))
    model.save_pretrained(folder)


def _with_ids(fields: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Names of tokens in fields of ids, as ids."""

    def read(name: str, value: Any) -> Any:
        if not name.endswith("_token_id") or value is None:
            return value
        return [read(name, each) for each in value] if isinstance(value, list) else tokenizer.get_vocab()[value]

    return {name: read(name, value) for name, value in fields.items()}


def train(model: Any, tokenizer: Any, texts: list[str], steps: int, *, rows: int = 16, length: int = 48) -> None:
    """A decoder, from drawn weights. (An encoder as small as these learns no more than how frequent tokens are.)"""
    ids = torch.tensor([i for text in texts for i in tokenizer(text + "\n", add_special_tokens=False)["input_ids"]])
    ids = ids[ids < model.config.vocab_size]  # a text may name a token without a row
    ids = ids[: len(ids) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (rows,), generator=generator)]
        model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def longrope(factors: int, partial: float = 1.0) -> dict[str, Any]:
    """Phi's, with a factor for each pair of rotated dimensions."""
    lists = {"short_factor": [1.0 + i / 10 for i in range(factors)], "long_factor": [2.0 + i for i in range(factors)]}
    more = {"original_max_position_embeddings": 256, "partial_rotary_factor": partial}
    return {"rope_type": "longrope", "rope_theta": 1e4, **lists, **more}


LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in range(8))
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", *RESERVED)
PHI = tuple(AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("system", "user", "assistant", "end"))
FRENCH_SPECIAL = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>"]

LIKE_ROBERTA = {
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": "<s>",
    "eos_token_id": "</s>",
    "pad_token_id": "<pad>",
}
FAMILIES = {
    "glm-4": Family(
        "THUDM/GLM-4-9B-0414",
        "Glm4ForCausalLM",
        byte_level(
            LLAMA3,
            special=("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
                     "<|assistant|>", "<|observation|>"),
            plain=("<think>", "</think>"), frame=(["[gMASK]", "<sop>"], []), ignore_merges=True,
            eos_token="<|user|>", pad_token="<|endoftext|>", padding_side="left", model_max_length=512,
            chat_template="[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
                          "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ),
        {**GROUPED, "attention_bias": True, "rope_parameters": rope(1e4, partial_rotary_factor=0.5),
         "eos_token_id": ["<|endoftext|>", "<|user|>", "<|observation|>"], "pad_token_id": "<|endoftext|>"},
        rows=40,
        generation={**SAMPLING, "eos_token_id": ["<|endoftext|>", "<|user|>", "<|observation|>"],
                    "pad_token_id": "<|endoftext|>"},
    ),
    "qwen3": Family(
        "Qwen/Qwen3-0.6B",
        "Qwen3ForCausalLM",
        byte_level(
            QWEN, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            plain=("<tool_call>", "</tool_call>", "<think>", "</think>"), class_name="Qwen2Tokenizer", nfc=True,
            eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512, chat_template=CHATML,
            add_bos_token=False, add_prefix_space=False,
        ),
        {**GROUPED, "head_dim": 32, "tie_word_embeddings": True, "max_window_layers": 4, "rope_parameters": rope(1e6),
         "bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"},
        rows=40,
        generation={**SAMPLING, "top_k": 20, "bos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>",
                    "eos_token_id": ["<|im_end|>", "<|endoftext|>"]},
    ),
    "gemma-3": Family(
        "google/gemma-3-1b-it",
        "Gemma3ForCausalLM",
        gemma(beyond=("<image_soft_token>",), chat_template=GEMMA_CHAT, eos_token="<end_of_turn>", mask_token=None),
        {**GROUPED, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
         "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": rope(1e6), "sliding_attention": rope(1e4)},
         "pad_token_id": "<pad>", "bos_token_id": "<bos>", "eos_token_id": ["<eos>", "<end_of_turn>"]},
        rows=-1,  # <image_soft_token>, of the larger ones' tokenizer
        generation={"do_sample": True, "top_k": 64, "top_p": 0.95, "bos_token_id": "<bos>", "pad_token_id": "<pad>",
                    "eos_token_id": ["<eos>", "<end_of_turn>"], "cache_implementation": "hybrid"},
    ),
    "gemma-3n": Family(
        "google/gemma-3n-E2B-it",
        "Gemma3nForCausalLM",
        gemma(chat_template=GEMMA_CHAT, eos_token="<end_of_turn>", mask_token=None),
        {**GROUPED, "num_key_value_heads": 1, "vocab_size_per_layer_input": TOKENS, "hidden_size_per_layer_input": 8,
         "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2, "sliding_window": 16,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
         "intermediate_size": [128] * 4, "rope_parameters":
         {"full_attention": rope(1e6), "sliding_attention": rope(1e4)}, "pad_token_id": "<pad>",
         "bos_token_id": "<bos>", "eos_token_id": ["<eos>", "<end_of_turn>"], "final_logit_softcapping": 30.0},
    ),
    "llama-3.2": Family(
        "meta-llama/Llama-3.2-1B-Instruct",
        "LlamaForCausalLM",
        byte_level(
            LLAMA3, special=HEADERS, frame=(["<|begin_of_text|>"], []), ignore_merges=True, model_max_length=512,
            bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA_CHAT,
        ),
        {**GROUPED, "tie_word_embeddings": True, "bos_token_id": "<|begin_of_text|>",
         "eos_token_id": ["<|end_of_text|>", "<|eot_id|>"],
         "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        generation={**SAMPLING, "bos_token_id": "<|begin_of_text|>", "eos_token_id": ["<|end_of_text|>", "<|eot_id|>"]},
    ),
    "smollm3": Family(
        "HuggingFaceTB/SmolLM3-3B",
        "SmolLM3ForCausalLM",
        byte_level(
            LLAMA3, special=("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", *RESERVED),
            plain=("<think>", "</think>"), ignore_merges=True, eos_token="<|im_end|>", pad_token="<|im_end|>",
            model_max_length=512,
            chat_template="{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
                          "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n"
                          "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
        ),
        {**GROUPED, "tie_word_embeddings": True, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4,
         "rope_parameters": rope(5e6), "bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|im_end|>",
         "pad_token_id": "<|end_of_text|>"},
        generation={**SAMPLING, "bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|im_end|>",
                    "pad_token_id": "<|end_of_text|>"},
    ),
    "olmo-2": Family(
        "allenai/OLMo-2-0425-1B",
        "Olmo2ForCausalLM",
        byte_level(
            LLAMA3, special=("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"), plain=("|||IP_ADDRESS|||",),
            class_name="GPT2Tokenizer", bos_token="<|endoftext|>", eos_token="<|endoftext|>",
            unk_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=512, add_prefix_space=False,
        ),
        {"num_key_value_heads": 4, "rope_parameters": rope(5e5), "eos_token_id": "<|endoftext|>",
         "pad_token_id": "<|pad|>"},
        rows=40,
    ),
    "phi-3": Family(
        "microsoft/Phi-3-mini-128k-instruct",
        "Phi3ForCausalLM",
        spm_bpe(
            added=(AddedToken("<|endoftext|>", special=True), *PHI), pad_token="<|endoftext|>",
            eos_token="<|endoftext|>", add_bos_token=False, model_max_length=512, chat_template=PHI_CHAT,
        ),
        {"num_key_value_heads": 4, "sliding_window": 32, "rope_parameters": longrope(HEAD // 2),
         "original_max_position_embeddings": 256, "bos_token_id": "<s>", "eos_token_id": "<|endoftext|>",
         "pad_token_id": "<|endoftext|>"},
        rows=40,
        generation={"bos_token_id": "<s>", "eos_token_id": ["<|endoftext|>", "<|end|>", "<|assistant|>"],
                    "pad_token_id": "<|endoftext|>"},
    ),
    "phi-4": Family(
        "microsoft/Phi-4-mini-instruct",
        "Phi3ForCausalLM",
        byte_level(
            O200K, special=("<|endoftext|>", *PHI), class_name="GPT2Tokenizer", bos_token="<|endoftext|>",
            eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=512,
            chat_template=PHI_CHAT,
        ),
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "sliding_window": 256,
         "rope_parameters": longrope(6, 0.75), "original_max_position_embeddings": 256,
         "bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>"},
        rows=30,
        generation={"bos_token_id": "<|endoftext|>", "eos_token_id": ["<|end|>", "<|endoftext|>"],
                    "pad_token_id": "<|endoftext|>"},
    ),
    "mistral": Family(
        "mistralai/Mistral-7B-Instruct-v0.1",
        "MistralForCausalLM",
        spm_bpe(add_bos_token=True, model_max_length=512, chat_template=MISTRAL_CHAT, legacy=True),
        {"num_key_value_heads": 2, "sliding_window": 16, "rope_parameters": rope(1e4), "bos_token_id": "<s>",
         "eos_token_id": "</s>"},
        generation={"bos_token_id": "<s>", "eos_token_id": "</s>"},
    ),
    "modernbert": Family(
        "answerdotai/ModernBERT-base",
        "ModernBertForMaskedLM",
        byte_level(
            special=("[UNK]", "[CLS]", "[SEP]", "[PAD]", AddedToken("[MASK]", lstrip=True, special=True)),
            plain=("|||EMAIL_ADDRESS|||", "  ", "    ", "[unused0]"), frame=(["[CLS]"], ["[SEP]"]), nfc=True,
            cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]",
            model_max_length=512,
        ),
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
         "local_attention": 16, "rope_parameters": {"full_attention": rope(1.6e5), "sliding_attention": rope(1e4)},
         "classifier_pooling": "mean", "pad_token_id": "[PAD]", "bos_token_id": "[CLS]", "eos_token_id": "[SEP]",
         "cls_token_id": "[CLS]", "sep_token_id": "[SEP]"},
    ),
    "mmbert": Family(
        "jhu-clsp/mmBERT-base",
        "ModernBertForMaskedLM",
        gemma(cls_token="<bos>", sep_token="<eos>", mask_token="<mask>", add_eos_token=True),
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
         "local_attention": 16, "rope_parameters": {"full_attention": rope(1.6e5), "sliding_attention": rope(1.6e5)},
         "pad_token_id": "<pad>", "bos_token_id": "<bos>", "eos_token_id": "<eos>", "cls_token_id": "<bos>",
         "sep_token_id": "<eos>"},
    ),
    "deberta-v3": Family(
        "microsoft/deberta-v3-base",
        "DebertaV2ForMaskedLM",
        unigram(
            "DebertaV2Tokenizer", "spm.model", keep_json=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
            settings={"do_lower_case": False, "model_max_length": 512, "vocab_type": "spm"},
        ),
        {"relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True,
         "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
         "pad_token_id": "[PAD]", "max_relative_positions": -1, "layer_norm_eps": 1e-7},
        rows=40,
    ),
    "xlm-r": Family(
        "FacebookAI/xlm-roberta-base",
        "XLMRobertaForMaskedLM",
        unigram("XLMRobertaTokenizer", "sentencepiece.bpe.model", settings={"model_max_length": 512}),
        LIKE_ROBERTA,
    ),
    "camembert": Family(
        "almanach/camembert-base",
        "CamembertForMaskedLM",
        unigram("CamembertTokenizer", "sentencepiece.bpe.model", settings={"model_max_length": 512}),
        LIKE_ROBERTA,
    ),
    "electra": Family(
        "google/electra-small-generator",
        "ElectraForMaskedLM",
        wordpiece,
        {"embedding_size": 32, "pad_token_id": "[PAD]"},
    ),
}  # fmt: skip
NOTES = (
    "NeoBERT (chandar-lab/NeoBERT) is not in transformers: its folder brings Python code, which only "
    "`teacher.trust_remote_code: true` runs. It was not tried.",
    "ELECTRA and DeBERTa v3 were pretrained as discriminators, which have no masked LM head: of ELECTRA the generators "
    "(google/electra-small-generator) are teachers, of DeBERTa v3 a checkpoint that was trained on as a masked LM. "
    "(With `legacy: false` in its config no module is the final map, which is refused.)",
    "Llama, Phi, OLMo, SmolLM3, GLM-4 and Mistral have no tokenizer class of their own: `AutoTokenizer` reads their "
    "tokenizer.json as it is. Of a compressed Llama or SmolLM3 it wants `trust_remote_code=True` "
    "([vocabulary.md](vocabulary.md#loading-the-tokenizer)).",
    "Gemma 3's models of text alone have no row for `<image_soft_token>`, which is left out with a warning.",
    "SmolLM3's config names another pad token than its tokenizer, which a causal LM does not read.",
)
