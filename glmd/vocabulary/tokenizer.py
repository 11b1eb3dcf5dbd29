"""Build, save and load the tokenizer of a student with a compressed vocabulary.

    tokenizer = compress_tokenizer(teacher_tokenizer, vocabulary)
    save_tokenizer(tokenizer, folder)
    tokenizer = load_tokenizer(folder)

The folder's tokenizer.json is a stock tokenizer over the kept tokens; the source tokenizer and the map lie
beside it. Importing this module makes AutoTokenizer give the exact class for such folders.
"""

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from glmd.errors import ModelError, disk_error
from glmd.vocabulary.selection import merge_parts
from glmd.vocabulary.tokenization_glmd import LOADING_ONLY, SOURCE_TOKENIZER_FILE, TOKEN_MAP_FILE, GlmdTokenizer
from glmd.vocabulary.vocabulary import Vocabulary

__all__ = [
    "GlmdTokenizer",
    "compress_tokenizer",
    "load_tokenizer",
    "require_fast",
    "require_tokenizer",
    "save_tokenizer",
    "source_tokenizer",
    "stock_tokenizer",
    "tokenizer_fingerprint",
    "vocabulary_of",
]

# Legacy vocabulary files: beside a trimmed tokenizer.json they would be a second, contradicting source of ids.
_LEGACY_FILES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
# A tokenizer class that overrides one of these adds logic to its backend, which a trimmed backend would lose.
_CLASS_LOGIC = (
    "__call__",
    "_encode_plus",
    "_decode",
    "decode",
    "tokenize",
    "_convert_encoding",
    "_switch_to_input_mode",
)


# Arguments of a source tokenizer that say where it came from, what the last call did, or what tokenizer.json says.
_OF_THE_SOURCE = (
    *LOADING_ONLY,
    *("name_or_path", "backend", "tokenizer_class", "processor_class", "vocab_file", "merges_file", "tokenizer_file"),
    *("special_tokens_map_file", "from_slow", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of"),
    *("add_bos_token", "add_eos_token", "unk_id"),
)


class _RegistrationConfig(PreTrainedConfig):
    """AutoTokenizer.register wants a config class; the class's name is all that is used here."""

    model_type = "glmd_tokenizer"


AutoTokenizer.register(_RegistrationConfig, tokenizer_class=GlmdTokenizer, exist_ok=True)


def compress_tokenizer(tokenizer: TokenizersBackend, vocabulary: Vocabulary) -> TokenizersBackend:
    """The student's tokenizer: `tokenizer`, then the vocabulary's map. The identity returns `tokenizer` itself."""
    require_fast(tokenizer)
    if vocabulary.source_size != len(tokenizer):
        raise ModelError(f"the vocabulary maps {vocabulary.source_size} tokens, the tokenizer has {len(tokenizer)}")
    if vocabulary.is_identity:
        return tokenizer
    _refuse_class_logic(tokenizer)
    source = _plain_backend(tokenizer)
    student = Tokenizer.from_str(json.dumps(_trim(json.loads(source.to_str()), vocabulary)))
    compressed = GlmdTokenizer(
        tokenizer_object=student,
        source_tokenizer_object=source,
        token_map=vocabulary.token_map.tolist(),
        **_settings(tokenizer),
    )
    _verify(compressed, tokenizer, vocabulary)
    return compressed


def stock_tokenizer(tokenizer: GlmdTokenizer) -> TokenizersBackend:
    """What plain AutoTokenizer gives without glmd: kept tokens alone, rare words cut into smaller ones of them."""
    return TokenizersBackend(tokenizer_object=_plain_backend(tokenizer), **_settings(tokenizer))


def source_tokenizer(tokenizer: GlmdTokenizer) -> TokenizersBackend:
    """The teacher's tokenizer, as a tokenizer of its own."""
    return TokenizersBackend(tokenizer_object=_plain_backend(tokenizer.source_tokenizer), **_settings(tokenizer))


def vocabulary_of(tokenizer: GlmdTokenizer) -> Vocabulary:
    """The kept tokens and the map of a student's tokenizer."""
    source_ids = tokenizer.source_tokenizer.get_vocab()
    kept = [source_ids[token] for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    return Vocabulary(np.array(kept), np.array(tokenizer.token_map))


def save_tokenizer(tokenizer: TokenizersBackend, folder: Path | str) -> None:
    """Write the tokenizer's files into `folder`, each under a temporary name first. Saving again changes no byte."""
    folder = Path(folder)
    is_exact = isinstance(tokenizer, GlmdTokenizer)
    unwanted = _LEGACY_FILES if is_exact else (TOKEN_MAP_FILE, SOURCE_TOKENIZER_FILE)
    for name in unwanted:
        if (folder / name).exists():
            raise ModelError(f"{folder / name} belongs to another tokenizer; save into a fresh folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for name in LOADING_ONLY:
        tokenizer.init_kwargs.pop(name, None)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as temporary:
        tokenizer.save_pretrained(temporary)
        for path in sorted(Path(temporary).rglob("*")):
            if path.is_file():
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)


def load_tokenizer(folder: Path | str, **kwargs: Any) -> Any:
    """The tokenizer of a folder (or hub name): the mapped one where the folder has a token map.

    kwargs: passed to `from_pretrained` (revision, trust_remote_code, ...).
    """
    kwargs.setdefault("trust_remote_code", False)  # unset, it would ask on the terminal
    folder = Path(folder) if Path(folder).is_dir() else folder
    if isinstance(folder, Path) and _wants_exact(folder):
        try:
            return GlmdTokenizer.from_pretrained(str(folder), **kwargs)
        except (ValueError, KeyError, OSError) as error:
            raise ModelError(f"{folder}: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **kwargs)
    except (ValueError, KeyError, OSError) as error:
        if "trust_remote_code=True" in str(error):
            raise ModelError(f"{folder}: its tokenizer brings Python code of its own, which is not run") from None
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: no tokenizer could be loaded: {reason}") from error
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over every token and its id, and over the map where there is one.

    Tokenizers of equal fingerprint give each id the same meaning; their sizes alone would not say so.
    """
    content: list[Any] = [sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))]
    if isinstance(tokenizer, GlmdTokenizer):
        content += [tokenizer_fingerprint(tokenizer.source_tokenizer), tokenizer.token_map]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def without_rows(tokenizer: Any, rows: int) -> list[str]:
    """Take from a tokenizer the added tokens whose ids are none of a model's rows, and return them.

    Gemma 3's smaller models have no vector for the image token of their family's tokenizer. Text that spells one is
    read as its letters from then on; what had such a token as its role has none. Raises ModelError where a token that
    every text gets has no row; one that is no added token stays, and is refused with its model.
    """
    beyond = {str(token) for i, token in tokenizer.added_tokens_decoder.items() if i >= rows}
    if not beyond:
        return []
    backend = _plain_backend(tokenizer)
    state = json.loads(backend.to_str())
    framed = beyond.intersection(tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"]))
    if framed:
        raise ModelError(f"its tokenizer puts {min(framed)!r} into every text, for which the model has no row")
    state["added_tokens"] = [each for each in state["added_tokens"] if each["content"] not in beyond]
    entries = state["model"]["vocab"]
    kept = [each for each in entries if (each if isinstance(each, str) else each[0]) not in beyond]
    state["model"]["vocab"] = {each: entries[each] for each in kept} if isinstance(entries, dict) else kept
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    for holder in (tokenizer._special_tokens_map, tokenizer.init_kwargs):
        for name, token in holder.items():
            if isinstance(token, (str, AddedToken)) and str(token) in beyond:
                holder[name] = None
    tokenizer._extra_special_tokens = [each for each in tokenizer._extra_special_tokens if str(each) not in beyond]
    for name in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"):
        tokenizer.init_kwargs.pop(name, None)
    return sorted(beyond)


def require_reloadable(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot be saved, or reads texts in another way when it is opened again."""
    texts = ["", *tokenizer.batch_decode([[i] for i in range(0, len(tokenizer), max(1, len(tokenizer) // 100))])]
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(copy.deepcopy(tokenizer), folder)
            again = load_tokenizer(folder)
    except Exception as error:  # whatever a class raises in its own saving
        if disk_error(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{type(tokenizer).__name__} cannot be saved and opened again: {reason}") from None
    for text in texts:
        if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ModelError(
                f"{type(tokenizer).__name__} reads {text!r:.40} in another way after it was saved and opened"
            )


def require_tokenizer(tokenizer: Any, *, mask: bool) -> None:
    """Refuse a tokenizer that cannot serve: slow, without a pad token, or (if `mask`) without a mask token."""
    require_fast(tokenizer)
    name = type(tokenizer).__name__
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{name} has no pad token; set one before use, for example tokenizer.pad_token = tokenizer.eos_token"
        )
    if mask and tokenizer.mask_token_id is None:
        raise ModelError(f"{name} has no mask token; masked training needs one, a causal objective does not")


def require_fast(tokenizer: Any) -> None:
    """Refuse a tokenizer that has no tokenizer.json behind it."""
    if not isinstance(tokenizer, TokenizersBackend):
        raise ModelError(
            f"{type(tokenizer).__name__} is not backed by the tokenizers library; convert it to a tokenizer.json first"
        )
    if dropout := getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise ModelError(
            f"{type(tokenizer).__name__}: tokenizer.json has a dropout of {dropout}: no text would be cut alike twice; "
            "set it to null"
        )


def _wants_exact(folder: Path) -> bool:
    """Whether the folder was saved by us, be it complete or not: a lost map must not pass for an ordinary folder."""
    if (folder / TOKEN_MAP_FILE).exists():
        return True
    config = folder / "tokenizer_config.json"
    if not config.exists():
        return False
    saved = json.loads(config.read_text(encoding="utf-8"))
    return isinstance(saved, dict) and saved.get("tokenizer_class") == GlmdTokenizer.__name__


def _refuse_class_logic(tokenizer: TokenizersBackend) -> None:
    if isinstance(tokenizer, GlmdTokenizer):
        raise ModelError("the tokenizer is compressed already, a student's; give the model that it was made from")
    for name in getattr(tokenizer.backend_tokenizer, "__dict__", ()):
        raise ModelError(
            f"{type(tokenizer).__name__} replaces {name} of its backend, which a trimmed tokenizer would lose; "
            "it is not supported"
        )
    for cls in type(tokenizer).__mro__:
        if cls is TokenizersBackend:
            return
        for name in _CLASS_LOGIC:
            if name in vars(cls):
                raise ModelError(
                    f"{cls.__name__} overrides {name}, which a trimmed tokenizer would lose; it is not supported"
                )


def _plain_backend(tokenizer: TokenizersBackend) -> Tokenizer:
    """A copy of the backend without padding and truncation, which some files carry from their last use."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _settings(tokenizer: TokenizersBackend) -> dict[str, Any]:
    """What the class of the source tokenizer set around its backend, and the plain settings of its own."""
    own = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, (bool, int, float, str))}
    settings: dict[str, Any] = {name: value for name, value in own.items() if name not in _OF_THE_SOURCE} | {
        name: getattr(tokenizer, name)
        for name in (
            "model_max_length",
            "padding_side",
            "truncation_side",
            "model_input_names",
            "clean_up_tokenization_spaces",
            "split_special_tokens",
        )
    }
    for name in ("chat_template", "response_template", "chat_control_tokens"):
        if getattr(tokenizer, name, None) is not None:
            settings[name] = getattr(tokenizer, name)
    settings |= {name: token for name, token in tokenizer._special_tokens_map.items() if token is not None}
    if tokenizer._extra_special_tokens:
        settings["extra_special_tokens"] = list(tokenizer._extra_special_tokens)
    return copy.deepcopy(settings)


def _trim(source: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The parsed tokenizer.json over the kept tokens, with student ids."""
    family = source["model"].get("type")
    if family not in _TRIM_MODEL:
        raise ModelError(f"tokenizers of type {family} cannot be trimmed yet; supported: {', '.join(_TRIM_MODEL)}")
    student_id = {int(source_id): i for i, source_id in enumerate(vocabulary.kept_ids)}
    for token in source["added_tokens"]:
        if token["id"] not in student_id:
            raise ModelError(f"the vocabulary drops {token['content']!r}, a special or added token; it must be kept")
    _TRIM_MODEL[family](source["model"], student_id, source["added_tokens"])
    for token in source["added_tokens"]:
        token["id"] = student_id[token["id"]]
    _renumber_post_processor(source.get("post_processor"), student_id)
    return source


def _trim_wordpiece(model: dict[str, Any], student_id: dict[int, int], added_tokens: list[dict[str, Any]]) -> None:
    model["vocab"] = _kept_entries(model["vocab"], student_id, added_tokens)
    if model["unk_token"] not in model["vocab"]:
        raise ModelError(f"the vocabulary drops the unknown token {model['unk_token']!r}; it must be kept")


def _kept_entries(
    entries: dict[str, int], student_id: dict[int, int], added_tokens: list[dict[str, Any]]
) -> dict[str, int]:
    """Token -> student id, in the order of ids.

    Added tokens become entries too: the library would number those it does not find by their place in a list.
    """
    kept = {token: student_id[source_id] for token, source_id in entries.items() if source_id in student_id}
    kept |= {token["content"]: student_id[token["id"]] for token in added_tokens}
    return dict(sorted(kept.items(), key=lambda item: item[1]))


def _trim_bpe(model: dict[str, Any], student_id: dict[int, int], added_tokens: list[dict[str, Any]]) -> None:
    parts = merge_parts(model)
    unreachable = [i for i in parts if i in student_id and not all(part in student_id for part in parts[i])]
    model["vocab"] = kept = _kept_entries(model["vocab"], student_id, added_tokens)
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    model["merges"] = [[a, b] for a, b in pairs if a in kept and b in kept and a + b in kept]
    if model.get("unk_token") is not None and model["unk_token"] not in kept:
        raise ModelError(f"the vocabulary drops the unknown token {model['unk_token']!r}; it must be kept")
    if unreachable:
        # Kept by count without what they are merged from: whole words are then looked up before merging.
        model["ignore_merges"] = True


def _trim_unigram(model: dict[str, Any], student_id: dict[int, int], added_tokens: list[dict[str, Any]]) -> None:
    if model.get("unk_id") is not None and model["unk_id"] not in student_id:
        raise ModelError(f"the vocabulary drops the unknown token {model['vocab'][model['unk_id']][0]!r}; keep it")
    entries = dict(enumerate(map(tuple, model["vocab"])))
    lowest = min((score for _, score in entries.values()), default=0.0)
    # Ids are places in this list. What is added after it has no score; it is found before the model is asked.
    entries |= {token["id"]: (token["content"], lowest) for token in added_tokens if token["id"] not in entries}
    model["vocab"] = [list(entries[source_id]) for source_id in student_id]
    if model.get("unk_id") is not None:
        model["unk_id"] = student_id[model["unk_id"]]


_TRIM_MODEL: dict[str, Callable[[dict[str, Any], dict[int, int], list[dict[str, Any]]], None]] = {
    "WordPiece": _trim_wordpiece,
    "BPE": _trim_bpe,
    "Unigram": _trim_unigram,
}


def _renumber_post_processor(post_processor: dict[str, Any] | None, student_id: dict[int, int]) -> None:
    """Renumber in place the special tokens that a post-processor inserts."""
    if post_processor is None:
        return
    kind = post_processor["type"]
    if kind == "TemplateProcessing":
        for token in post_processor["special_tokens"].values():
            token["ids"] = [student_id[i] for i in token["ids"]]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            token, source_id = post_processor[name]
            post_processor[name] = [token, student_id[source_id]]
    elif kind == "Sequence":
        for part in post_processor["processors"]:
            _renumber_post_processor(part, student_id)
    elif kind != "ByteLevel":
        raise ModelError(f"tokenizer.json: post_processor of type {kind} is unknown; it may hold ids to renumber")


def _verify(compressed: GlmdTokenizer, source: TokenizersBackend, vocabulary: Vocabulary) -> None:
    """Check what every later step relies on: kept tokens have their ids, special tokens are the same tokens."""
    source_vocabulary = source.get_vocab()
    kept = {token: vocabulary.token_map[i] for token, i in source_vocabulary.items() if vocabulary.is_kept(i)}
    if compressed.get_vocab() != kept:
        raise ModelError(f"the trimmed tokenizer has {len(compressed)} tokens, {vocabulary.size} were to be kept")
    mapped = np.asarray(compressed.token_map)
    if not np.array_equal(mapped, vocabulary.token_map):
        raise ModelError(
            f"{int((mapped != vocabulary.token_map).sum())} ids are mapped otherwise than the vocabulary says"
        )
    for name, token in source.special_tokens_map.items():
        if isinstance(token, str) and getattr(compressed, name) != token:
            raise ModelError(f"the trimmed tokenizer has {name} {getattr(compressed, name)!r} instead of {token!r}")
