"""Tokenizers of GLMs, small: of BERT's kind and of GPT-2's."""

from typing import Any

from families import byte_level_bpe
from tokenizers import Tokenizer
from transformers import BertTokenizer, PreTrainedTokenizerFast

from glmd.models.glm.tokenizer import glm_tokenizer

WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "river",
    "sang",
    "ran",
    "light",
    "dark",
    "green",
    "over",
    "under",
    "blue",
    "stone",
    "paper",
    "yes",
    "no",
    "maybe",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece() -> BertTokenizer:
    tokens = [*SPECIAL, *WORDS, ".", "?", ",", "##s", "##er", "##ing"]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=64)


def gpt2() -> PreTrainedTokenizerFast:
    state = byte_level_bpe().backend_tokenizer.to_str()
    backend = Tokenizer.from_str(state.replace("<|end|>", "<|endoftext|>").replace("<|pad|>", "<|other|>"))
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, unk_token=end, model_max_length=64)


def wordpiece_glm() -> Any:
    return glm_tokenizer(wordpiece())


def bpe_glm() -> Any:
    return glm_tokenizer(gpt2())
