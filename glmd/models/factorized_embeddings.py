"""Students whose embeddings are narrower than their hidden states, in a stock architecture that has such.

    config = narrow_config(teacher.config, "electra")       # or "mobilebert"
    copy_around_layers(student, teacher)                    # embeddings and LM head; layers are copied as they are

`electra` is the paper's +al, ALBERT's factorization: K x E vectors and a linear map from E to H. Of the two stock
architectures that have it ELECTRA carries a BERT: its layers are BERT's by name and number, where ALBERT's are one
group under names of its own; its LM head is one linear map after a transform, and it has heads for classes and choices.
`mobilebert` is +mo: a token's embedding of E enters beside those of its neighbors, and the output uses all H. Without
bottlenecks and stacked feed-forward networks, and with plain normalization, MobileBERT's layers are BERT's too.
"""

import copy
from typing import Any

import torch

from glmd.errors import ConfigError
from glmd.models.heads import is_causal

EMBEDDING_SIZE = 128  # of ELECTRA, ALBERT and MobileBERT as they were published
# Fields that mean the same in a BERT and in both architectures; the first must be equal where weights are copied.
_SHAPES = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
)
_SHARED = (
    *_SHAPES,
    "vocab_size",
    "num_hidden_layers",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)
# What makes layers of the architecture BERT's.
_AS_IN_BERT: dict[str, dict[str, Any]] = {
    "electra": {},
    "mobilebert": {
        "use_bottleneck": False,
        "num_feedforward_networks": 1,
        "normalization_type": "layer_norm",
        "trigram_input": True,
    },
}


def narrow_config(teacher_config: Any, architecture: str) -> Any:
    """The config of such a student, before its own changes. Raises ConfigError but for a BERT that reads both ways."""
    from transformers import CONFIG_MAPPING

    kind = "causal" if is_causal(teacher_config) else teacher_config.model_type
    if kind != "bert":
        own = "; use its own student.config.embedding_size" if hasattr(teacher_config, "embedding_size") else ""
        raise ConfigError(
            f"student.architecture {architecture} carries students of bert teachers, this one is {kind}; remove it{own}"
        )
    fields: dict[str, Any] = {name: copy.deepcopy(getattr(teacher_config, name)) for name in _SHARED}
    fields |= _AS_IN_BERT[architecture] | {"embedding_size": EMBEDDING_SIZE}
    return CONFIG_MAPPING[architecture](**fields)


def check_narrow(config: Any, teacher_config: Any, *, copies: bool) -> None:
    """Refuse a narrow student's config, after its changes, that is not narrow, or if it `copies`, not the teacher's."""
    if not 1 <= config.embedding_size < config.hidden_size:
        raise ConfigError(
            f"student.config.embedding_size is {config.embedding_size}, hidden_size {config.hidden_size}: with "
            f"student.architecture {config.model_type} give one in [1, {config.hidden_size - 1}]"
        )
    needed = {name: getattr(teacher_config, name) for name in _SHAPES} | _AS_IN_BERT[config.model_type]
    for name, value in needed.items() if copies else ():
        if getattr(config, name) != value:
            raise ConfigError(
                f"student.initialization: student.config.{name} is {getattr(config, name)!r}, to copy layers of the "
                f"teacher it must be {value!r}; otherwise use scratch"
            )


@torch.no_grad()
def copy_around_layers(student: Any, teacher: Any) -> None:
    """Bring a narrow student's embeddings and LM head as near to those of `teacher`, a BERT, as their width allows.

    So a 3-layer ELECTRA of a 6-layer MiniLM begins 4.3 nats a token from its teacher; with both drawn over the same
    layers it began at 8.9 and was at 6.8 after 150 steps of 8 x 64 tokens.
    """
    start = {"electra": _copy_to_electra, "mobilebert": _copy_to_mobilebert}[student.config.model_type]
    start(student, teacher.bert.embeddings, teacher.cls.predictions)


def _copy_to_electra(student: Any, embeddings: Any, head: Any) -> None:
    """Vectors as their best E coordinates, and the maps from and to them as BERT's in these coordinates.

    With D (H, E) orthonormal, W ~ W D D^T; D are the first eigenvectors of W^T W (truncated SVD). Normalization stands
    on either side of D: both divide by a vector's own length, which D nearly keeps but for the width.
    """
    words = embeddings.word_embeddings.weight.double()
    directions = torch.linalg.eigh(words.T @ words).eigenvectors.flip(1)[:, : student.config.embedding_size]
    ours, widening = student.electra.embeddings, (directions.shape[0] / directions.shape[1]) ** 0.5
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        getattr(ours, name).weight.copy_(getattr(embeddings, name).weight.double() @ directions)
    norm, project = embeddings.LayerNorm, student.electra.embeddings_project
    project.weight.copy_(widening * norm.weight.double()[:, None] * directions)
    project.bias.copy_(norm.bias)
    dense, norm, predictions = head.transform.dense, head.transform.LayerNorm, student.generator_predictions
    inward = widening * directions.T * norm.weight.double()
    predictions.dense.weight.copy_(inward @ dense.weight.double())
    predictions.dense.bias.copy_(inward @ dense.bias.double())
    predictions.LayerNorm.weight.fill_(inward.square().sum().sqrt() / inward.shape[1] ** 0.5)
    predictions.LayerNorm.bias.copy_(directions.T @ norm.bias.double())
    student.generator_lm_head.bias.copy_(head.decoder.bias)


def _copy_to_mobilebert(student: Any, embeddings: Any, head: Any) -> None:
    """The head is BERT's own. The input has the first E columns of each vector, as in the paper's code, and the map of
    the middle one of three finds the others by least squares; positions, types and normalization are BERT's.
    """
    words, size = embeddings.word_embeddings.weight.double(), student.config.embedding_size
    ours, predictions = student.mobilebert.embeddings, student.cls.predictions
    ours.word_embeddings.weight.copy_(words[:, :size])
    if student.config.pad_token_id is not None:
        ours.word_embeddings.weight[student.config.pad_token_id] = 0  # as beyond the end of a text: see heads.py
    predictions.dense.weight.copy_(words[:, size:].T)
    ours.embedding_transformation.weight.zero_()
    ours.embedding_transformation.weight[:, size : 2 * size] = torch.linalg.lstsq(words[:, :size], words).solution.T
    ours.embedding_transformation.bias.zero_()
    for name in ("position_embeddings", "token_type_embeddings", "LayerNorm"):
        getattr(ours, name).load_state_dict(getattr(embeddings, name).state_dict())
    predictions.transform.load_state_dict(head.transform.state_dict())
    predictions.bias.copy_(head.decoder.bias)
