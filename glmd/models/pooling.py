"""How a sentence encoder makes one vector of a text, as the files of sentence-transformers beside it say.

    pooling = pooling_of(Path("all-MiniLM-L6-v2"))             # Pooling("mean", normalizes=True)
    vectors = pooling(hidden_states, attention_mask)           # (R, S, H), (R, S) -> (R, H)

`modules.json` names the parts, `1_Pooling/config.json` says what is done to the last hidden states.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor
from torch.nn.functional import normalize

from glmd.errors import ModelError, suggestion

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
LENGTHS = "sentence_*_config.json"
PART = "1_Pooling"  # the folder of the part that pools, as sentence-transformers names it
# Parts of a sentence encoder that see vectors alone, so that the vocabulary is none of their business.
WITHOUT_VOCABULARY = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
Mode = Literal["mean", "cls", "last"]
# By the names of sentence-transformers: a key of its own each, later one key `pooling_mode` with shorter ones.
MODES: dict[str, Mode] = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}


class Module(NamedTuple):
    """A part of a sentence encoder: the last name of its class, and its folder, "" for the model itself."""

    kind: str
    path: str


@dataclass(frozen=True)
class Pooling:
    """What becomes of the last hidden states of a text: the mean of its tokens, or its first or last one.

    normalizes: whether vectors are brought to length 1. prompt: what is put before each text; None: the folder names no
    default. prompts: all that it names. max_length: tokens that it reads of a text; None: it does not say.
    """

    mode: Mode
    normalizes: bool = False
    prompt: str | None = None
    prompts: tuple[str, ...] = ()
    max_length: int | None = None

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """(R, S, H) last hidden states and (R, S) 1 at tokens -> (R, H) float32 or better; pads, which come last, have
        no part in it."""
        states = states.float() if states.element_size() < 4 else states
        if self.mode == "mean":
            weights = (mask / mask.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)
            # Not as a product with the mask: what stands at pads may be anything, infinite too.
            found = (states.masked_fill(mask[..., None] == 0, 0.0) * weights[..., None]).sum(1)
        else:
            place = mask.sum(1).sub(1).clamp(min=0) * (self.mode == "last")
            found = states.gather(1, place[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]
        return normalize(found, dim=-1) if self.normalizes else found

    def files(self, width: int) -> dict[str, Any]:
        """The files that say so to sentence-transformers, by name, and what stands in each. width: H."""
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self.normalizes else [])]
        paths = ["", PART, "2_Normalize"]
        places = zip(kinds, paths, strict=False)
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(places)
        ]
        modes = {f"pooling_mode_{key}": mode == self.mode for key, mode in MODES.items()}
        return {MODULES: modules, f"{PART}/config.json": {"word_embedding_dimension": width, **modes}}


def read_modules(path: Path) -> list[Module]:
    """The parts that a modules.json names. Raises ModelError where it cannot be read, or leads out of its folder."""
    try:
        found = [Module(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in _json(path)]
    except (KeyError, TypeError):
        raise ModelError(f"{path}: not a list of modules as sentence-transformers writes it") from None
    for each in found:
        if Path(each.path).is_absolute() or ".." in Path(each.path).parts:
            raise ModelError(f"{path}: names {each.path!r}, which is outside the folder")
    return found


def pooling_of(folder: Path, given: Mode | None = None) -> Pooling | None:
    """How the encoder in a folder pools; None where neither a file nor `given` says it.

    Raises ModelError naming the file for what is not supported, and for `given` beside a file that says it.
    """
    path, settings = folder / MODULES, _settings(folder)
    if not path.is_file():
        return None if given is None else Pooling(given, **settings)
    kinds = {each.kind: each for each in read_modules(path)}
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise ModelError(
            f"{path}: names a {others[0]}, which is not distilled; supported are Transformer, Pooling and Normalize. "
            "`glmd compress` takes it along"
        )
    if "Pooling" not in kinds:
        raise ModelError(f"{path}: names no Pooling, so there is no vector of a sentence to learn")
    place = folder / kinds["Pooling"].path / "config.json"
    if given is not None:
        raise ModelError(f"pooling has no effect: {place} says it; remove it")
    told = _json(place)
    if not isinstance(told, dict):
        raise ModelError(f"{place}: not a mapping as sentence-transformers writes it")
    if told.get("include_prompt", True) is False and settings["prompt"]:
        raise ModelError(f"{place}: include_prompt false leaves the prompt out of the vector, which is not supported")
    return Pooling(_mode(told, place), "Normalize" in kinds, **settings)


def _mode(told: dict[str, Any], place: Path) -> Mode:
    modes = [key.removeprefix("pooling_mode_") for key, is_on in told.items() if "pooling_mode_" in key and is_on]
    named = told.get("pooling_mode")
    modes = modes or ([named] if isinstance(named, str) else list(named or ()))
    # Without any, as sentence-transformers reads it.
    found: list[Any] = [MODES.get(each, each) for each in modes] or ["mean"]
    if len(found) != 1 or found[0] not in get_args(Mode):
        got = ", ".join(map(str, found))
        raise ModelError(f"{place}: pools by {got}; supported is one of {', '.join(get_args(Mode))}")
    mode: Mode = found[0]
    return mode


def _settings(folder: Path) -> dict[str, Any]:
    """Prompts and length, where files say them."""
    prompt, prompts = prompts_of(folder)
    lengths = [_json(path).get("max_seq_length") for path in sorted(folder.glob(LENGTHS))]
    length = next((each for each in lengths if isinstance(each, int)), None)
    return {"prompt": prompt, "prompts": prompts, "max_length": length}


def prompts_of(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """What the encoder in a folder puts before each text by default, and all texts that it can put there."""
    told = _json(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
    prompts, default = told.get("prompts"), told.get("default_prompt_name")
    prompts = prompts if isinstance(prompts, dict) else {}
    if default is not None and default not in prompts:
        hint = suggestion(str(default), prompts)
        raise ModelError(f"{folder / PROMPTS}: default_prompt_name {default!r} is none of its prompts{hint}")
    texts = tuple(str(each) for each in prompts.values() if each)
    return (None if default is None else str(prompts[default])), texts


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
