"""The tokenizer of a model as its folder has it, checked to have what distillation needs.

tokenizer = load_source_tokenizer("bert-base-uncased")
"""

import logging
from pathlib import Path
from typing import Any

from glmd.data.blank_infilling import glm_tokens
from glmd.data.infilling import infilling_for
from glmd.errors import ModelError
from glmd.models.heads import LMKind
from glmd.models.loading import from_pretrained, load_model_config, looks_local

logger = logging.getLogger(__name__)
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "tekken.json")  # *.model: sentencepiece's


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer can be read from."""
    return any(path.is_file() for pattern in TOKENIZER_FILES for path in folder.glob(pattern))


def load_source_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, kind: LMKind | None = "masked"
) -> Any:
    """The teacher's tokenizer, checked to have what distillation needs.

    kind: of the teacher. A masked LM needs a pad, mask, cls and sep token, an encoder-decoder a pad token and what
    stands for a span that is left out; for a causal LM, and where none is to be trained, one that cuts text will do.
    Added tokens for which the folder's model has no row are left out.
    """
    from transformers import AutoTokenizer

    from glmd.vocabulary.tokenizer import require_fast, require_tokenizer

    if looks_local(name) and not holds_tokenizer(Path(name)):
        # AutoTokenizer would make an empty one of the model's class and say nothing.
        raise ModelError(
            f"{name}: holds no tokenizer ({', '.join(TOKENIZER_FILES[:2])}, ...); save the teacher's there"
        )
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = from_pretrained(AutoTokenizer, name, **options)
    if not looks_local(name) or (Path(name) / "config.json").is_file():
        leave_out_tokens_without_rows(tokenizer, name, load_model_config(name, **options))
    if kind in ("causal", None):
        require_fast(tokenizer)
        return tokenizer
    if kind == "encoder-decoder":
        require_tokenizer(tokenizer, mask=False)
        infilling_for(tokenizer, None, 0)  # refuses a tokenizer that has nothing for a span
        return tokenizer
    if kind == "blank-infilling":
        require_tokenizer(tokenizer, mask=True)
        glm_tokens(tokenizer)
        return tokenizer
    require_tokenizer(tokenizer, mask=True)
    for role in ("cls_token", "sep_token"):
        if getattr(tokenizer, role) is None:
            raise ModelError(f"{name}: the tokenizer has no {role}; only BERT-like tokenizers are supported yet")
    return tokenizer


def leave_out_tokens_without_rows(tokenizer: Any, name: str, config: Any) -> None:
    """Take from the tokenizer of a model, a folder or hub id, what the model has no row for, and say so.

    Raises ModelError where every text would have such a token.
    """
    from glmd.vocabulary.tokenizer import require_fast, without_rows

    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int) or len(tokenizer) <= rows:
        return
    require_fast(tokenizer)
    try:
        left_out = without_rows(tokenizer, rows)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    if left_out:
        logger.warning("%s: its model has no row for the token %s, which is left out", name, ", ".join(left_out))
