"""Vocabulary compression alone: a model with any head, fewer tokens, no training.

print(compress_model("bert-base-uncased", "bert-half", corpus=["text/"], keep_ratio=0.5))
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glmd.commands.verify import special_ids
from glmd.config import VocabularyConfig
from glmd.data.conversations import ConversationReader
from glmd.data.corpus import TEXT_FIELD, require_corpus
from glmd.data.token_store import build_token_store
from glmd.errors import ConfigError, ModelError
from glmd.models.card import ModelCard, opens_plainly
from glmd.models.companions import find_companions
from glmd.models.export import check_exports, export_model, prove_slice, require_free_output
from glmd.models.loading import compared_embeddings, load_model_as_saved, load_model_config, require_model
from glmd.models.pooling import MODULES
from glmd.models.source_tokenizer import load_source_tokenizer
from glmd.planning.plan import kept_size
from glmd.public import public
from glmd.strict_yaml import build
from glmd.vocabulary.build import build_vocabulary
from glmd.vocabulary.slicing import ids_to_keep, slice_model
from glmd.vocabulary.tokenizer import compress_tokenizer

logger = logging.getLogger(__name__)


@public
def compress_model(
    model: str | Path,
    output: str | Path,
    *,
    corpus: str | Path | Sequence[str | Path],
    text_field: str = "text",
    messages_field: str | None = None,
    **vocabulary_settings: Any,
) -> str:
    """Keep the most frequent tokens of `corpus`, map the others, and write the cut model to `output`.

    corpus: text, jsonl or Parquet files, folders, or a data set's id; one or several. messages_field: of rows that
        hold conversations, which the model's chat template renders, in place of texts.
    vocabulary_settings: the fields of VocabularyConfig; keep_ratio or size is needed.
    Returns a summary. Raises GlmdError with one line.
    """
    model, output = str(model), Path(output)
    sources = [str(each) for each in ([corpus] if isinstance(corpus, (str, Path)) else corpus)]
    given = {key: value for key, value in vocabulary_settings.items() if value is not None}
    settings = build(VocabularyConfig, given, where="")
    if settings.keep_ratio is None and settings.size is None:
        raise ConfigError("--keep-ratio is missing; 0.5 keeps half of the tokens (or give --size)")
    if settings.corpus_weights and not len(settings.corpus_weights) == len(sources) > 1:
        found = f"{len(settings.corpus_weights)} numbers for {len(sources)} sources"
        raise ConfigError(f"--corpus-weights: {found}; give one for each of two or more")
    for name in ("teacher_mass", "teacher_reads"):
        if getattr(settings, name) != getattr(VocabularyConfig, name):
            raise ConfigError(f"{name} has no effect without training; remove it")
    if messages_field is not None and text_field != TEXT_FIELD:
        raise ConfigError("--text-field has no effect beside --messages-field; remove one of them")
    require_free_output(output)
    require_model(model, field="model")
    if messages_field is None:
        require_corpus(sources, text_field)
    tokenizer, reader = load_source_tokenizer(model, kind=None), None
    if messages_field is not None:
        reader = ConversationReader(tokenizer, messages_field, loss_on="all", name=model)
        reader.require(sources)
    companions = find_companions(model)
    # Refuses what cannot be, before text is counted and the model loaded.
    kept_size(settings, tokenizer, texts=companions.texts, ids=ids_to_keep(load_model_config(model)))
    with tempfile.TemporaryDirectory() as temporary:
        store = build_token_store(temporary, sources, tokenizer, text_field=text_field, conversations=reader)
        counts = store.counts(len(tokenizer), weights=settings.corpus_weights)
    source = load_model_as_saved(model)
    embeddings = compared_embeddings(source, settings.similarity)
    ids = ids_to_keep(source.config, getattr(source, "generation_config", None))
    vocabulary = build_vocabulary(
        tokenizer, embeddings.float(), counts, keep_texts=companions.texts, keep_ids=ids, **settings.choice
    )
    student = slice_model(source, vocabulary)
    prove_slice(source, student, torch.from_numpy(vocabulary.kept_ids))
    facts = {"kept tokens": f"{vocabulary.size:,} of {vocabulary.source_size:,}", "mapping": settings.mapping}
    card = ModelCard(
        f"{Path(model).name} with {vocabulary.size:,} tokens",
        model,
        "Vocabulary compressed by glmd, without training.",
        facts,
        exact_tokenizer=not vocabulary.is_identity,
        auto_class=type(student).__name__,
        is_encoder=MODULES in companions.files,
    )
    compressed = compress_tokenizer(tokenizer, vocabulary)
    export_model(student, compressed, output, card=card, companions=companions)
    check_exports([output])
    try:
        special_ids(compressed, student.config, getattr(student, "generation_config", None))
    except ModelError as error:  # as in the source, whose ids these are
        logger.warning("%s: %s; so it is in the source: set the id there, else `glmd verify` fails", output, error)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (source, student))
    covered = f"{vocabulary.coverage:.2%} of the corpus"
    unknown = f", {vocabulary.unknown_share:.2%} of it unknown to the tokenizer" if vocabulary.unknown_share else ""
    is_plain = vocabulary.is_identity or opens_plainly(student.config)
    plainly = "" if is_plain else ", its tokenizer with trust_remote_code=True; `glmd export --kind stock` does without"
    left = f"; not carried along: {', '.join(companions.left_behind)}" if companions.left_behind else ""
    return (
        f"{output}: {type(student).__name__}, {vocabulary.size:,} of {vocabulary.source_size:,} tokens "
        f"({covered}{unknown}), {after:,} of {before:,} parameters; loads with stock transformers{plainly}{left}"
    )
