"""The published GLMs: shapes, sizes and tokens.

config = published_config("110M")
"""

from dataclasses import dataclass
from typing import Any

from glmd.errors import ConfigError, suggestion
from glmd.models.glm.modeling_glmd_glm import GlmdGlmConfig

HEAD_SIZE = 64  # of all that were published


@dataclass(frozen=True)
class PublishedGlm:
    """One of the released models. parameters: as its name says. Its rows of tokens are a multiple of 128."""

    parameters: float
    num_hidden_layers: int
    hidden_size: int
    max_position_embeddings: int
    tokens: str  # "wordpiece", or "bpe"

    def config(self) -> GlmdGlmConfig:
        return GlmdGlmConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.hidden_size // HEAD_SIZE,
            max_position_embeddings=self.max_position_embeddings,
            architectures=["GlmdGlmForBlankInfilling"],
            **TOKEN_IDS[self.tokens],
        )


# Ids of bert-base-uncased's and GPT-2's tokenizers with GLM's tokens behind their own.
TOKEN_IDS: dict[str, dict[str, Any]] = {
    "wordpiece": {
        "vocab_size": 30592,
        "pad_token_id": 0,
        "mask_token_id": 103,
        "bos_token_id": 30522,
        "eos_token_id": 30523,
    },
    "bpe": {
        "vocab_size": 50304,
        "pad_token_id": 50256,
        "mask_token_id": 50260,
        "bos_token_id": 50257,
        "eos_token_id": 50258,
    },
}
PUBLISHED = {
    "110M": PublishedGlm(110e6, 12, 768, 512, "wordpiece"),  # glm-base-blank
    "340M": PublishedGlm(335e6, 24, 1024, 512, "wordpiece"),  # glm-large-blank; the paper's 340M
    "2B": PublishedGlm(2e9, 36, 2048, 1024, "bpe"),  # glm-2b
    "10B": PublishedGlm(10e9, 48, 4096, 1024, "bpe"),  # glm-10b-1024
}


def published_config(size: str) -> GlmdGlmConfig:
    """The config of a published model by its size. Raises ConfigError for one that is unknown."""
    if size not in PUBLISHED:
        raise ConfigError(f"--size {size} is no published GLM{suggestion(size, PUBLISHED)}")
    return PUBLISHED[size].config()
