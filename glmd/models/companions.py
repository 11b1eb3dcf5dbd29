"""Files beside a model that say how it is used: those of sentence-transformers go with it, others are named.

    companions = find_companions("all-MiniLM-L6-v2")      # a folder or hub id
    companions.texts                                       # ["query: ", ...], which such a folder puts before texts
    companions.copy_to(Path("smaller"))

Without them a compressed encoder would be pooled in another way, and nothing would say so.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from glmd.errors import ModelError
from glmd.models.loading import looks_local
from glmd.models.pooling import (
    LENGTHS,
    MODULES,
    PROMPTS,
    WITHOUT_VOCABULARY,
    Mode,
    Pooling,
    pooling_of,
    prompts_of,
    read_modules,
)

SETTINGS = (PROMPTS, LENGTHS)
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
    written: Mapping[str, str] = field(default_factory=dict)  # what stands in files that the folder has not

    def copy_to(self, target: Path) -> None:
        for name, text in self.written.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text, encoding="utf-8")
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
    folder = place_of(model)
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
        prompts_of(folder)[1] if parts else (),
        tuple(path.name for path in others if path.name not in known),
    )


def _parts(path: Path) -> list[str]:
    """Folders of the parts that modules.json names, but for the model's own."""
    modules = read_modules(path)
    for kind, _ in modules:
        if kind not in WITHOUT_VOCABULARY:
            raise ModelError(
                f"{path}: names a {kind}, which may depend on the vocabulary; supported are "
                f"{', '.join(WITHOUT_VOCABULARY)}"
            )
    return [where for _, where in modules if where]


def place_of(model: str) -> Path | None:
    """The folder of a model's companions, of a folder or hub id; None where the hub gives none."""
    return Path(model) if looks_local(model) else _downloaded(model)


def encoder_pooling(model: str, given: Mode | None = None) -> Pooling | None:
    """`pooling_of` a folder or hub id."""
    folder = place_of(model)
    return pooling_of(folder, given) if folder is not None else None if given is None else Pooling(given)


def encoder_companions(model: str, pooling: Pooling, width: int) -> Companions:
    """What goes with a student of a sentence encoder: its files, or such that say how it pools. width: H."""
    found = find_companions(model)
    told = {name: json.dumps(each, indent=2) for name, each in pooling.files(width).items()}
    return found if MODULES in found.files else replace(found, written=told)


@lru_cache(maxsize=16)
def _downloaded(model: str) -> Path | None:
    """A hub model's files of this kind; None where the hub is not reached and none are in the cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=[MODULES, *SETTINGS, "[0-9]_*/*"]))
    except Exception:  # the model itself is then loaded, or refused with its reason
        return None
