"""Is an exported folder what it says it is? One line for each property, found out by loading it.

    checks = verify_folder("student")
    print("\n".join(check.line() for check in checks))

For every folder of a model and its tokenizer; of a compressed one also the map and the source tokenizer are held
against the rest.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from glmd.errors import GlmdError, ModelError
from glmd.models.card import PROBE
from glmd.models.export import check_exports
from glmd.models.glm import CODE as GLM_CODE
from glmd.models.heads import lm_kind
from glmd.models.loading import load_model_as_saved, load_model_config, require_model, require_weight_files
from glmd.public import public
from glmd.storage import file_sha256
from glmd.vocabulary import tokenization_glmd
from glmd.vocabulary.renumbering import token_id_fields
from glmd.vocabulary.slicing import vocabulary_axes
from glmd.vocabulary.tokenization_glmd import SOURCE_TOKENIZER_FILE, TOKEN_MAP_FILE
from glmd.vocabulary.tokenizer import load_tokenizer, save_tokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two spaces, a\ttab; naïve café — 猫 🙂 1984 and 3.14159!",
    "antidisestablishmentarianism x" * 3,
    "",
)


@dataclass(frozen=True)
class Check:
    """A property of a folder, and what is wrong with it: None where it holds."""

    name: str
    found: str
    problem: str | None = None

    def line(self) -> str:
        return f"FAIL  {self.name}: {self.problem}" if self.problem else f"ok    {self.name}: {self.found}"


@public
def verify_folder(folder: str | Path) -> list[Check]:
    """Every check on a local folder, in order. Raises ModelError where it holds no model at all."""
    folder = Path(folder)
    require_model(str(folder), field="folder")
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; verify reads local folders")
    subject = _Subject(folder)
    checks = []
    said: dict[str, str] = {}  # problem -> the check that met it first
    for name, check in _CHECKS.items():
        try:
            found = check(subject)
        except Exception as error:  # whatever breaks, breaks this check: that is what it is for
            reason = " ".join(str(error).split())[:300]
            shown = reason if isinstance(error, GlmdError) else f"{type(error).__name__}: {reason}"
            # A part that does not load fails every check that needs it: it is one problem, told once.
            checks.append(Check(name, "", f"not told, for the reason at {said[shown]!r}" if shown in said else shown))
            said.setdefault(shown, name)
        else:
            if found is not None:
                checks.append(Check(name, found))
    return checks


class _Subject:
    """A folder, its parts loaded when a check first asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_compressed = (folder / TOKEN_MAP_FILE).exists() or (folder / SOURCE_TOKENIZER_FILE).exists()

    @cached_property
    def config(self) -> Any:
        return load_model_config(str(self.folder))

    @cached_property
    def generation_config(self) -> Any:
        from transformers import GenerationConfig

        has_own = (self.folder / "generation_config.json").is_file()
        return GenerationConfig.from_pretrained(str(self.folder)) if has_own else None

    @cached_property
    def model(self) -> Any:
        require_weight_files(str(self.folder))
        return load_model_as_saved(str(self.folder))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @cached_property
    def pipeline(self) -> dict[str, Any]:
        """tokenizer.json as it stands."""
        parsed: dict[str, Any] = json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8"))
        return parsed


def _weights(subject: _Subject) -> str:
    model = subject.model
    probe = subject.folder / PROBE
    if probe.exists():
        for name, sha256 in json.loads(probe.read_text(encoding="utf-8"))["weights"].items():
            if file_sha256(subject.folder / name) != sha256:
                raise ModelError(f"{name} is not the file that was exported (sha256 differs)")
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, complete and finite"


def _rows(subject: _Subject) -> str:
    size, rows = len(subject.tokenizer), subject.config.get_text_config().vocab_size
    if size != rows:
        raise ModelError(f"the tokenizer has {size} tokens, the model {rows} rows")
    axes = vocabulary_axes(subject.model.config, type(subject.model))
    return f"{size:,} tokens, and as many rows in {', '.join(sorted(axes))}"


def _ids(subject: _Subject) -> str:
    size = len(subject.tokenizer)
    model = subject.pipeline["model"]
    entries = model["vocab"] if isinstance(model["vocab"], dict) else {}
    twice = [i for i, count in Counter(entries.values()).items() if count > 1]
    if twice:
        names = ", ".join(repr(token) for token, i in entries.items() if i == twice[0])
        raise ModelError(f"tokenizer.json gives id {twice[0]} to {names}")
    if sorted(subject.tokenizer.get_vocab().values()) != list(range(size)):
        raise ModelError(f"the tokenizer's ids are not 0 to {size - 1}, each once")
    return f"0 to {size - 1:,}, each once"


def _no_leftovers(subject: _Subject) -> str:
    for name in ("padding", "truncation"):
        if subject.pipeline.get(name) is not None:
            raise ModelError(f"tokenizer.json holds {name} from its last use, which every later call would get")
    return "no padding or truncation in tokenizer.json"


def _special_ids(subject: _Subject) -> str:
    return special_ids(subject.tokenizer, subject.config, subject.generation_config)


def special_ids(tokenizer: Any, config: Any, generation: Any | None) -> str:
    """The names of the ids in both configs. Raises ModelError for one that is no special token, or another."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    fields = token_id_fields(config) + (token_id_fields(generation) if generation is not None else [])
    for field, token_id in fields:
        if not 0 <= token_id < len(tokenizer):
            raise ModelError(f"{field} is {token_id}, the tokenizer has {len(tokenizer)} tokens")
        if token_id not in special:
            raise ModelError(f"{field} is {token_id}, the ordinary token {tokenizer.convert_ids_to_tokens(token_id)!r}")
    for role in ("pad", "cls", "sep", "mask"):
        ours, theirs = (getattr(each, f"{role}_token_id", None) for each in (config, tokenizer))
        # What pads a causal LM's texts is masked, and its config's pad token is not read.
        is_unread = role == "pad" and lm_kind(config) == "causal"
        if isinstance(ours, int) and theirs is not None and ours != theirs and not is_unread:
            raise ModelError(f"the config's {role}_token_id is {ours}, the tokenizer's is {theirs}")
    names = ", ".join(sorted({field.rpartition(".")[2] for field, _ in fields}))
    return f"each id of the configs is that of a special token ({names})" if names else "the configs hold none"


def _exact(subject: _Subject) -> str | None:
    """The student's tokens are the source's kept ones under their mapped ids, and text is cut as the source cuts it."""
    if not subject.is_compressed:
        return None
    exact = subject.tokenizer
    source, token_map, entries = exact.source_tokenizer, exact.token_map, exact.get_vocab()
    kept = {token: token_map[i] for token, i in source.get_vocab().items() if entries.get(token) is not None}
    for token, student_id in kept.items():
        if entries[token] != student_id:
            raise ModelError(
                f"tokenizer.json gives {token!r} id {entries[token]}, token_map.json maps it to {student_id}"
            )
    if len(kept) != len(entries):
        stranger = min(set(entries) - set(kept))
        raise ModelError(f"tokenizer.json has {stranger!r}, which source_tokenizer.json has not")
    for text in TEXTS:
        if exact(text)["input_ids"] != [token_map[i] for i in source(text)["input_ids"]]:
            raise ModelError(f"{text[:40]!r} is not cut as the source tokenizer cuts it")
    dropped = len(token_map) - len(entries)
    return (
        f"text is cut as by the source tokenizer; {dropped:,} of its {len(token_map):,} tokens are mapped onto others"
    )


def _round_trip(subject: _Subject) -> str:
    tokenizer = subject.tokenizer
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        if tokenizer.convert_tokens_to_ids(pieces) != ids:
            raise ModelError(f"{text[:40]!r}: its tokens are not those of its ids")
        tokenizer.decode(ids)
    return "ids to tokens and back give the same ids"


def _saved_again(subject: _Subject) -> str:
    """Loaded and saved, nothing changes: a tokenizer that breaks on the next save would break at its user's."""
    with tempfile.TemporaryDirectory() as temporary:
        again = Path(temporary)
        save_tokenizer(subject.tokenizer, again)
        subject.model.save_pretrained(again)
        # Of a folder that others wrote, the same content may stand in other bytes.
        written = [path for path in sorted(again.rglob("*")) if path.is_file()]
        for path in written if (subject.folder / PROBE).exists() else ():
            name = path.relative_to(again).as_posix()  # named chat templates have a folder of their own
            if name in ("config.json", "tokenization_glmd.py"):  # hold the version of their writer
                continue
            if not (subject.folder / name).is_file():
                raise ModelError(f"saving it again adds {name}")
            if file_sha256(path) != file_sha256(subject.folder / name):
                raise ModelError(f"saving it again changes {name}")
        reloaded = load_tokenizer(again)
        for text in TEXTS:
            if reloaded(text)["input_ids"] != subject.tokenizer(text)["input_ids"]:
                raise ModelError(f"{text[:40]!r} is cut otherwise after saving again")
        if reloaded.chat_template != subject.tokenizer.chat_template:
            raise ModelError("saving it again changes its chat template")
    return "nothing changes"


def _code(subject: _Subject) -> str | None:
    """Files that trust_remote_code would run, which nothing here does."""
    own = {path.name: path for path in (Path(tokenization_glmd.__file__), GLM_CODE)}
    found = sorted(subject.folder.glob("*.py"))
    strange = [p.name for p in found if p.name not in own or p.read_bytes() != own[p.name].read_bytes()]
    if strange:
        return f"{', '.join(strange)}: not this glmd's; read it before trust_remote_code runs it"
    return f"{', '.join(path.name for path in found)}: as this glmd writes it" if found else None


def _without_glmd(subject: _Subject) -> str | None:
    if not (subject.folder / PROBE).exists():
        if subject.is_compressed:
            raise ModelError(f"{PROBE} is missing, which holds what the model said before export")
        return None
    check_exports([subject.folder])
    return "a fresh process with transformers alone loads it and gets the same output as before export"


_CHECKS: dict[str, Callable[[_Subject], str | None]] = {
    "weights": _weights,
    "tokenizer ids": _ids,
    "rows": _rows,
    "nothing left over": _no_leftovers,
    "special ids": _special_ids,
    "mapped tokenizer": _exact,
    "round trip": _round_trip,
    "saved again": _saved_again,
    "code": _code,
    "without glmd": _without_glmd,
}
