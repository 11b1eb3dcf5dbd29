"""Load teachers and students, and refuse what would be silently wrong.

    model = load_language_model(TeacherConfig("bert-base-uncased"))

A local folder is checked before the hub is asked; only safetensors are read; weights that the checkpoint does not
hold, or that are not finite, are an error, since `from_pretrained` would go on with random ones.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from glmd.config import TeacherConfig
from glmd.errors import GlmdError, ModelError, counted
from glmd.models.heads import TASK_HEADS, bare_class, is_encoder, lm_kind, task_class
from glmd.models.pooling import MODULES, read_modules
from glmd.models.probes import prove_language_model, silence_padding
from glmd.models.quantization import quantized_loading
from glmd.storage import file_sha256
from glmd.vocabulary.slicing import model_class_of

logger = logging.getLogger(__name__)
# No pickles; and shapes that differ are refused here with their names, not there with a pointer to a report.
WEIGHTS: dict[str, Any] = {
    "use_safetensors": True,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
}
# What was proved within `each_proved_once`: files, class, precision and proof -> whether the pad's vector was silenced
_known: dict[tuple[Any, ...], bool] | None = None


def looks_local(name: str) -> bool:
    """Whether a model name is meant as a path: it exists, is absolute or dotted, or has more than one slash."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def require_model(name: str, *, field: str = "teacher.model") -> None:
    """Refuse a local folder that is not there or holds no model, as that of a stage in progress. A hub id passes."""
    if not looks_local(name):
        return
    folder = Path(name)
    if not folder.is_dir() and folder.name in ("student", "model") and (folder.parent / "checkpoints").is_dir():
        raise ModelError(
            f"{field}: the stage at {folder.parent} is in progress and has left no {folder.name} yet; give its run's "
            "`glmd run` again, which goes on to the end"
        )
    if not folder.is_dir():
        raise ModelError(f"{field}: {name} is no folder; give a folder with config.json, or a hub id")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{field}: {name} has no config.json; give a folder saved by save_pretrained")


def require_weight_files(name: str) -> None:
    """Refuse a local folder whose weights are absent or cut short; reads the heads of the files. A hub id passes."""
    from safetensors import SafetensorError, safe_open

    if not looks_local(name):
        return
    folder = Path(name)
    names = _require_safe_index(folder) or ["model.safetensors"]
    for each in names:
        if not (folder / each).is_file():
            raise ModelError(f"{name}: holds no {each}; save the model with save_pretrained (pickles are not read)")
        try:
            with safe_open(folder / each, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder / each}: is damaged ({error}); copy it again") from None


def load_model_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's config, without weights. That of a sentence encoder names the class without a head, as it is used."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, name, revision=revision, trust_remote_code=trust_remote_code)
    bare = bare_class(config)
    if bare is not None and bare not in (config.architectures or ()) and is_pooled(name, revision):
        config.architectures = [bare]
    return config


def is_pooled(name: str, revision: str | None = None) -> bool:
    """Whether modules.json beside a model, of a folder or hub id, says that its last states become one vector."""
    from transformers.utils.hub import cached_file

    place: Any = Path(name) / MODULES
    if not looks_local(name):
        place = cached_file(
            name,
            MODULES,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    kinds = [each.kind for each in read_modules(Path(place))] if place is not None and Path(place).is_file() else []
    return kinds[:1] == ["Transformer"] and "Pooling" in kinds


def language_model_class(config: Any) -> Any:
    """The auto class of a teacher's language model."""
    import transformers

    names = {"causal": "CausalLM", "encoder-decoder": "Seq2SeqLM"}
    return getattr(transformers, f"AutoModelFor{names.get(lm_kind(config), 'MaskedLM')}")


def base_class(config: Any) -> Any:
    """The auto class of what a student is made from: of the task's head that the config names, or a language model."""
    import transformers

    name = task_class(config) or ""
    if is_encoder(config):
        return transformers.AutoModel
    heads = [head for head in TASK_HEADS if name.endswith(head)]
    return getattr(transformers, f"AutoModelFor{heads[0]}") if heads else language_model_class(config)


def auto_class_name(name: str) -> str:
    """The auto class that opens a folder of a model whose class has this name, or the name itself where none does."""
    from transformers.models.auto import modeling_auto

    # BART's is in the list of masked LMs too.
    if name == "GlmdGlmForBlankInfilling":
        return "AutoModelForMaskedLM"
    for head in ("Seq2SeqLM", "MaskedLM", "CausalLM", *TASK_HEADS):
        words = re.sub("(?<=[a-z])(?=[A-Z])", "_", head.replace("Seq2SeqLM", "SeqToSeqCausalLM")).upper()
        if name in getattr(modeling_auto, f"MODEL_FOR_{words}_MAPPING_NAMES").values():
            return f"AutoModelFor{head}"
    return name


def load_language_model(teacher: TeacherConfig, *, device: torch.device | str = "cpu") -> Any:
    """A masked or causal LM with a trained head, in the teacher's dtype and quantization, in evaluation mode.

    A plan has decided what dtype `auto` is; outside of one it is float32. device: where a quantized one is made; others
    are on the CPU, in the dtype of their files without memory of their own but for what the file system keeps.
    """
    assert teacher.model is not None, "checked before"
    dtype = torch.float32 if teacher.dtype == "auto" else getattr(torch, teacher.dtype)
    options: dict[str, Any] = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
    config = load_model_config(teacher.model, **options)
    auto_class = language_model_class(config)
    if teacher.quantization is not None:
        options |= quantized_loading(teacher.quantization, config, auto_class, dtype=dtype, device=device)
    model, info = from_pretrained(auto_class, teacher.model, dtype=dtype, **WEIGHTS, **options)
    require_complete(model, info, teacher.model, allowed_missing=())
    proved(model.eval(), prove_language_model, teacher.model)  # first, as it refuses a model without output embeddings
    _require_tied(model, teacher.model)
    return model


def _require_tied(model: Any, name: str) -> None:
    """Refuse two matrices of embeddings that the config calls one: saved again, one of them would be gone."""
    ours, theirs = (each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings()))
    if is_tied(model) and not torch.equal(ours, theirs):
        raise not_tied(name)


def is_tied(model: Any) -> bool:
    """Whether input and output embeddings are one matrix in a new model of this class and config.

    Not every class does what its config says: Luke's and BigBird-Pegasus' decoder keep two. Not every config can say
    that they are two: T5's says one, whatever it is told, and a file that holds two is right all the same.
    """
    if not getattr(model.config, "tie_word_embeddings", False) or not _can_untie(model.config):
        return False
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        new = type(model)(model.config)
    return new.get_input_embeddings().weight is new.get_output_embeddings().weight


def _can_untie(config: Any) -> bool:
    told = {**config.to_dict(), "tie_word_embeddings": False}
    return not getattr(type(config)(**told), "tie_word_embeddings", False)


def not_tied(name: str) -> ModelError:
    """What is said of two such matrices."""
    return ModelError(
        f"{name}: its config says tie_word_embeddings, but its weights hold two different matrices; set it to "
        "false in config.json"
    )


def proved(model: Any, prove: Callable[[Any], None], name: str | None = None) -> None:
    """`prove(model)`, with a vector of zeros for the pad token where nothing else stands in the way.

    name: of the folder whose weights the model has, all of them. Within `each_proved_once` what was proved of the same
    files holds for the next model that they are loaded into.
    """
    files = None if name is None else _files(name)
    key = files, type(model), model.dtype, prove.__qualname__
    if files is None or _known is None:
        _prove_or_silence(model, prove)
    elif key not in _known:
        _known[key] = _prove_or_silence(model, prove)
    elif _known[key]:
        silence_padding(model)


def _prove_or_silence(model: Any, prove: Callable[[Any], None]) -> bool:
    """`proved` of a model of which nothing is known; whether the pad's vector was set to zero for it."""
    try:
        prove(model)
    except ModelError as error:
        if not silence_padding(model):
            raise
        try:
            prove(model)
        except ModelError:
            raise error from None
        logger.warning(
            "%s: the vector of its pad token, which the last token of a text can see, is set to zero",
            type(model).__name__,
        )
        return True
    return False


@contextmanager
def each_proved_once() -> Iterator[None]:
    """As long as a run takes: its stages load the same folders again and again."""
    global _known
    before, _known = _known, {}
    try:
        yield
    finally:
        _known = before


def _files(name: str) -> tuple[tuple[str, int, int, int], ...] | None:
    """Which files a local folder's model is, as they are now; None for a hub id."""
    if not Path(name).is_dir():
        return None
    found = ((path, path.stat()) for path in sorted([Path(name, "config.json"), *Path(name).glob("*.safetensors")]))
    return tuple((str(path), file.st_ino, file.st_size, file.st_mtime_ns) for path, file in found)


def compared_embeddings(model: Any, similarity: str) -> nn.Parameter:
    """(rows, H) the embeddings by which dropped tokens are mapped, of the model's `input` or `output`.

    Raises ModelError where it has none, or where the output's are the input's.
    """
    name, given = type(model).__name__, model.get_input_embeddings()
    if given is None:
        raise ModelError(f"{name} has no input embeddings")
    if similarity == "output":
        output = model.get_output_embeddings()
        if output is None:
            raise ModelError(f"vocabulary.similarity output: {name} predicts no tokens; give input")
        if output.weight is given.weight:
            raise ModelError(f"vocabulary.similarity output has no effect: {name} has one matrix for both; remove it")
        given = output
    weight: nn.Parameter = given.weight
    return weight


def load_model_as_saved(name: str) -> Any:
    """A model of the class that its config names, with whatever head it has."""
    config = load_model_config(name)
    architecture = (config.architectures or [None])[0]
    model_class = model_class_of(config)
    if model_class is None:
        raise ModelError(f"{name}: its config names the architecture {architecture!r}, which transformers has not")
    model, info = from_pretrained(model_class, name, **WEIGHTS, trust_remote_code=False)
    require_complete(model, info, name, allowed_missing=())
    return model.eval()


def model_positions(config: Any) -> int | None:
    """How many tokens a model can read at once; None where its positions have no end.

    In a table whose first rows are those of padding, as RoBERTa's, positions count from its padding_idx + 1.
    """
    from transformers import AutoModel

    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet says -1
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            modules = list(AutoModel.from_config(config).named_modules())
    except Exception:  # whatever a config's own code raises: such a model does not load either, and is refused there
        return positions
    for name, module in modules:
        padding = getattr(module, "padding_idx", None)
        is_table = isinstance(module, nn.Embedding) and "osition" in name + type(module).__name__
        if is_table and padding is not None and module.num_embeddings == positions:
            return positions - padding - 1
    return positions


def model_fingerprint(
    name: str, revision: str | None = None, *, known: Mapping[Path, str] = MappingProxyType({})
) -> str:
    """sha256 over a local folder's config and weights; for a hub id its commit.

    known: files -> their sha256, of those that need not be read again.
    """
    folder = Path(name)
    if not folder.is_dir():
        commit = getattr(load_model_config(name, revision=revision), "_commit_hash", None)
        return f"{name}@{commit or revision}"
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(known.get(path) or file_sha256(path)))
    return digest.hexdigest()


def from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """`auto_class.from_pretrained` with its many errors as one line."""
    import glmd.models.glm  # noqa: F401  # the auto classes know it from then on

    options.setdefault("trust_remote_code", False)  # unset, it would ask on the terminal, and wait for an answer
    try:
        _require_safe_index(Path(name))
        return auto_class.from_pretrained(name, **options)
    except GlmdError:
        raise
    except Exception as error:  # from_pretrained raises OSError, ValueError, SafetensorError, HTTP errors, ...
        if "trust_remote_code=True" in str(error):
            raise ModelError(
                f"{name}: brings Python code of its own, which is not run; read it, and give "
                "teacher.trust_remote_code: true if it is a run's teacher"
            ) from None
        reason = " ".join(str(error).split())[:300]
        hint = "" if looks_local(name) else "; without internet give a local folder"
        raise ModelError(f"{name}: cannot be loaded as {auto_class.__name__} ({reason}){hint}") from error


def _require_safe_index(folder: Path) -> list[str]:
    """The weight files that an index names, if there is one. Refuses those outside: from_pretrained would follow."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        raise ModelError(f"{index}: not a weight index") from None
    for each in names:
        if Path(each).name != each:
            raise ModelError(f"{index}: names {each!r}, which is outside the folder")
    return sorted(names)


# Parts of a backbone that some classes have and others of the same model have not.
_UNREAD = re.compile(r"\.pooler\.|position_ids$|token_type_ids$")


def require_complete(model: nn.Module, info: dict[str, Any], name: str, *, allowed_missing: tuple[str, ...]) -> None:
    require_keys(model, info, name, allowed_missing=allowed_missing)
    for key, tensor in model.state_dict().items():
        # Of the smallest and the largest: one pass, without a second tensor, and nan is both.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ModelError(f"{name}: {key} holds values that are not finite")


def require_keys(model: nn.Module, info: dict[str, Any], name: str, *, allowed_missing: tuple[str, ...]) -> None:
    """Refuse a folder whose weights are not those of the model, by name and shape, as from_pretrained found them."""
    missing = [key for key in info["missing_keys"] if not any(part in key for part in allowed_missing)]
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise ModelError(
            f"{name}: {type(model).__name__} needs {counted(len(missing), 'weight')} that it does not hold ({shown}); "
            "they would be random"
        )
    if info["mismatched_keys"]:
        raise ModelError(f"{name}: weights of another shape than its config says: {min(info['mismatched_keys'])}")
    # Other heads may be left behind; a layer that is, is a config that belongs to another model.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    unread = [key for key in info["unexpected_keys"] if key.startswith(prefix) and not _UNREAD.search(key)]
    if unread:
        raise ModelError(
            f"{name}: holds {counted(len(unread), 'weight')} that its config has no place for ({min(unread)}); "
            "is num_hidden_layers that of these weights?"
        )
