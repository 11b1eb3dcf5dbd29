"""Small instruct models: a byte-level BPE with a chat template, a Llama of drawn weights, and their conversations."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from families import WORDS, byte_level_bpe
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same with the assistant's words and the end of its turn marked.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: the last answer has thoughts, empty ones too, and those of earlier answers are left out.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set words = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' "
    "if '</think>' in m.content else '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ words + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML's tokens, <|im_end|> is the end."""
    tokenizer = deepcopy(_trained())
    tokenizer.chat_template = template
    return tokenizer


@cache
def _trained() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def chat(*contents: str, system: str | None = None) -> dict:
    """A row: users and assistants take turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": each} for i, each in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def chats(count: int = 60) -> list[dict]:
    """Conversations of one to three answers, some with a system's words."""
    rng = np.random.default_rng(3)

    def words() -> str:
        return " ".join(WORDS[rank % len(WORDS)] for rank in rng.zipf(1.3, int(rng.integers(1, 7))))

    return [
        chat(*(words() for _ in range(2 * (i % 3 + 1))), system=words() if i % 4 == 0 else None) for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_instruct(root: Path) -> Path:
    """A folder with an instruct model and its tokenizer."""
    tokenizer, folder = chat_tokenizer(), root / "instruct"
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
