"""Files beside a model that say how it is used: those of sentence-transformers go with it, others are named.

    companions = find_companions("all-MiniLM-L6-v2")      # a folder or hub id
    companions.texts                                       # ["query: ", ...], which such a folder puts before texts
    companions.copy_to(Path("smaller"))

Without them a compressed encoder would be pooled in another way, and nothing would say so.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from glmd.errors import ModelError
from glmd.models.loading import looks_local

MODULES = "modules.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
# Parts of a sentence encoder that see vectors alone, so that the vocabulary is none of their business.
WITHOUT_VOCABULARY = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
# What the model and its tokenizer are made of, what is written again, and what describes a training.
OF_THE_MODEL = (
    *(
        "config.json",
        "generation_config.json",
        "*.safetensors*",
        "*.bin*",
        "*.pt",
        "*.pth",
        "*.h5",
        "*.msgpack",
        "*.onnx",
    ),
    *("tokenizer*", "token*.json", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.*", "additional_chat_templates", "README.md", "LICENSE*", ".*", "export_probe.json", "*.py"),
    *("source_tokenizer.json", "training_args*", "trainer_state.json", "optimizer*", "scheduler*", "all_results.json"),
)


@dataclass(frozen=True)
class Companions:
    """Files below `folder` that go with a model, texts that they put before inputs, and files that stay behind."""

    folder: Path | None = None
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()  # of parts, which may be empty and are wanted all the same
    texts: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = field(default=())

    def copy_to(self, target: Path) -> None:
        for name in self.folders:
            (target / name).mkdir(parents=True, exist_ok=True)
        for name in self.files:
            assert self.folder is not None, "files lie in a folder"
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, target / name)


def find_companions(model: str) -> Companions:
    """What lies beside a model, of a folder or hub id.

    Raises ModelError where modules.json cannot be read, leads out of the folder, or names a part that may depend on
    the vocabulary.
    """
    folder = Path(model) if looks_local(model) else _downloaded(model)
    if folder is None:
        return Companions()
    parts = _parts(folder / MODULES) if (folder / MODULES).is_file() else []
    named = [path.name for pattern in SETTINGS for path in sorted(folder.glob(pattern))] if parts else []
    inside = [path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file()]
    files = [*([MODULES] if parts else []), *named, *(path.relative_to(folder).as_posix() for path in inside)]
    known = {*files, *(PurePosixPath(part).parts[0] for part in parts)}
    others = [
        p for p in sorted(folder.iterdir()) if not any(PurePosixPath(p.name).match(each) for each in OF_THE_MODEL)
    ]
    return Companions(
        folder,
        tuple(files),
        tuple(parts),
        _prompts(folder / SETTINGS[0]) if parts else (),
        tuple(path.name for path in others if path.name not in known),
    )


def _parts(path: Path) -> list[str]:
    """Folders of the parts that modules.json names, but for the model's own."""
    try:
        modules = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in _json(path)]
    except (KeyError, TypeError):
        raise ModelError(f"{path}: not a list of modules as sentence-transformers writes it") from None
    for kind, where in modules:
        if kind not in WITHOUT_VOCABULARY:
            raise ModelError(
                f"{path}: names a {kind}, which may depend on the vocabulary; supported are "
                f"{', '.join(WITHOUT_VOCABULARY)}"
            )
        if Path(where).is_absolute() or ".." in Path(where).parts:
            raise ModelError(f"{path}: names {where!r}, which is outside the folder")
    return [where for _, where in modules if where]


def _prompts(path: Path) -> tuple[str, ...]:
    prompts = _json(path).get("prompts") if path.is_file() else None
    return tuple(str(each) for each in prompts.values() if each) if isinstance(prompts, dict) else ()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None


def _downloaded(model: str) -> Path | None:
    """A hub model's files of this kind; None where the hub is not reached and none are in the cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=[MODULES, *SETTINGS, "[0-9]_*/*"]))
    except Exception:  # the model itself is then loaded, or refused with its reason
        return None
