"""Students as ordinary Hugging Face folders, proved to load with stock transformers in a fresh process.

    export_model(student, tokenizer, folder, card=card)
    check_exports([folder])

A folder is written under a temporary name and renamed; with it goes a probe (ids and output) that a process
without glmd must reproduce.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glmd import storage
from glmd.errors import ModelError, RunError
from glmd.models.card import PROBE, ModelCard, card_text, opens_plainly
from glmd.models.companions import Companions
from glmd.models.glm import CODE as GLM_CODE
from glmd.models.heads import lm_kind
from glmd.storage import file_sha256, write_problem
from glmd.vocabulary.tokenizer import (
    save_tokenizer,
)

TOLERANCE = 1e-4  # of the largest output; what sums in another order do to float32 is a hundredth of it
NOISE = 1e-5  # of outputs that are all small

_waiting: list[subprocess.Popen[str]] = []  # the fresh process of the next `check_exports`, begun ahead


def export_model(
    model: Any, tokenizer: Any, folder: Path, *, card: ModelCard, companions: Companions | None = None
) -> None:
    """Write model, tokenizer, generation config where there is one, model card and probe to `folder`, replacing it.

    companions: what of the source goes along.
    """
    if hasattr(model.config, "embedding_size"):
        width = f"{model.config.embedding_size} (hidden_size {model.config.hidden_size})"
        card = replace(card, facts={**card.facts, "embedding_size": width})
    card = replace(card, opens_plainly=opens_plainly(model.config), is_glm=lm_kind(model.config) == "blank-infilling")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    was_training = model.training
    model.eval()
    model.save_pretrained(temporary)
    save_tokenizer(tokenizer, temporary)
    if companions is not None:
        companions.copy_to(temporary)
    (temporary / "README.md").write_text(card_text(card), encoding="utf-8")
    weights = {path.name: file_sha256(path) for path in sorted(temporary.glob("*.safetensors"))}
    proof = {**_probe(model), "tokens": len(tokenizer), "weights": weights}
    (temporary / PROBE).write_text(json.dumps(proof), encoding="utf-8")
    model.train(was_training)
    for path in temporary.rglob("*"):
        storage.sync_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    storage.sync_to_disk(folder.parent)


def require_free_output(folder: Path) -> None:
    """Refuse a folder for a model that is not empty or cannot be written. Leaves nothing behind."""
    problem = write_problem(folder)
    if problem is None and folder.exists() and any(folder.iterdir()):
        problem = "is not empty"
    elif problem is None and (not folder.name or folder.is_symlink() or folder.is_mount()):
        # A model is written under another name and renamed.
        problem = "cannot be replaced by a folder (it is the working folder, a link or a mount)"
    problem = problem or write_problem(folder.with_name(folder.name + ".tmp"))
    if problem is not None:
        raise RunError(f"{folder} {problem}; choose another folder".replace("\0", "\\0"))


def check_exports(folders: Sequence[Path]) -> None:
    """Load every folder in one fresh process that has transformers and not glmd, and compare its output.

    Raises ModelError naming the folder and what differs.
    """
    if not folders:
        return
    stranger = _waiting.pop() if _waiting else _begin_stranger()
    if stranger.poll() is not None:  # begun ahead and killed since, by a signal to the group or for its memory
        stranger.communicate()
        stranger = _begin_stranger()
    try:
        _, said = stranger.communicate(json.dumps([str(folder.resolve()) for folder in folders]))
    except BaseException:
        _end_stranger(stranger)
        raise
    if stranger.returncode != 0:
        lines = said.strip().splitlines() or ["no message"]
        places = tuple(str(folder.resolve()) for folder in folders)
        told = [line for line in lines if line.startswith(places)]  # others may have a last word, as Triton's library
        raise ModelError(f"an exported folder does not load with stock transformers: {(told or lines)[-1]}")


@contextmanager
def stranger_ahead() -> Iterator[None]:
    """Begin the fresh process of the next `check_exports` now, so that its imports are not waited for then."""
    _waiting.append(_begin_stranger())
    try:
        yield
    finally:
        while _waiting:
            _end_stranger(_waiting.pop())


def _end_stranger(stranger: subprocess.Popen[str]) -> None:
    stranger.kill()
    stranger.communicate()


def _begin_stranger() -> subprocess.Popen[str]:
    """A process without glmd, which ends with this one if it is told no folders."""
    # -P keeps the working folder off the path, so that a checkout of glmd there is not what makes it work.
    command = [sys.executable, "-P", "-c", _NO_GARBAGE + _STRANGER]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name in [name for name in environment if name.startswith(("ACCELERATE_", "TORCHELASTIC_"))]:
        del environment[name]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, env=environment, **pipes)


# Nothing of what is imported is garbage; looking for it, as Python ends too, takes two of the process's six seconds.
_NO_GARBAGE = "import atexit, gc; gc.disable(); atexit.register(gc.freeze)\n"
# What a stranger does with the folder. Kept free of glmd; of a GLM's code glmd's file is run, not the folder's.
_STRANGER = f"""
import importlib.util, json, sys, torch, transformers
def class_named(name):
    if hasattr(transformers, name):
        return getattr(transformers, name)
    spec = importlib.util.spec_from_file_location("modeling_glmd_glm", {str(GLM_CODE)!r})
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    transformers.AutoConfig.register(module.GlmdGlmConfig.model_type, module.GlmdGlmConfig, exist_ok=True)
    return getattr(module, name)
transformers.PreTrainedModel, transformers.AutoTokenizer  # imported before folders are asked for
def prove(folder):
    probe = json.load(open(folder + "/{PROBE}"))
    options = {{"output_loading_info": True, "dtype": torch.float32}}
    model, info = class_named(probe["class"]).from_pretrained(folder, **options)
    if info["missing_keys"] or info["unexpected_keys"]:
        sys.exit(f"{{folder}}: weights missing or unknown: {{info}}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError:  # of a few model types (llama) AutoTokenizer knows no ordinary class: this one is what it is
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    rows = model.config.get_text_config().vocab_size
    wanted = probe.get("tokens", rows)  # of a teacher that was fine-tuned there may be fewer than rows
    if len(tokenizer) != wanted or wanted > rows:
        sys.exit(f"{{folder}}: the tokenizer has {{len(tokenizer)}} tokens, the model {{rows}} rows for {{wanted}}")
    ids = torch.tensor(probe["input_ids"])
    decoder = {{"decoder_input_ids": ids}} if model.config.is_encoder_decoder else {{}}
    with torch.no_grad():
        output = model.eval()(input_ids=ids, **decoder)[0].flatten()[probe["places"]]
    expected = torch.tensor(probe["output"])
    error, largest = (output - expected).abs().max().item(), expected.abs().max().item()
    if not error <= {TOLERANCE} * largest + {NOISE}:
        sys.exit(f"{{folder}}: its output differs by {{error:.1e}} from those before export")
for folder in json.load(sys.stdin):
    try:
        prove(folder)
    except Exception as error:
        sys.exit(" ".join(f"{{folder}}: {{type(error).__name__}}: {{error}}".split()))
"""


def _probe(model: Any) -> dict[str, Any]:
    size = model.config.get_text_config().vocab_size
    # Spread over the vocabulary, and their output over all positions and words, so that swapped or missing rows show.
    ids = torch.linspace(0, size - 1, 16).long()
    end = getattr(model.config, "eos_token_id", None)
    if model.config.is_encoder_decoder and isinstance(end, int):  # a task head of theirs looks for the one end
        ids[ids == end] = (end + 1) % size
        ids[7::8] = end
    # A task head of a decoder without a pad token reads one text at a time.
    rows = 1 if getattr(model.config, "pad_token_id", None) is None else 2
    ids = ids.reshape((1, 2, 8) if "MultipleChoice" in type(model).__name__ else (rows, -1))
    output = _output(model, ids).flatten()
    places = torch.linspace(0, len(output) - 1, min(1024, len(output)), dtype=torch.float64).long()
    return {
        "class": type(model).__name__,
        "input_ids": ids.tolist(),
        "places": places.tolist(),
        "output": output[places].tolist(),
    }


@torch.no_grad()
def _output(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What a model with any head says of some ids, in float32 on the CPU, wherever and in whatever precision it is.

    A GPU, TF32 and half precision each round otherwise; where and how it is compared must be how it is made.
    """
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    device = model.device
    try:
        model.to("cpu")  # not a copy, for which the device may have no room
        is_wide = all(p.dtype == torch.float32 for p in model.parameters())
        twin = model if is_wide else copy.deepcopy(model).float()
        output: torch.Tensor = twin(input_ids=ids.cpu(), **decoder)[0]
    finally:
        model.to(device)
    return output


def prove_slice(source: Any, student: Any, kept_ids: torch.Tensor) -> None:
    """Compare a cut model, not trained yet, with its source on kept tokens. Raises ModelError naming the difference."""
    ids = torch.tensor(_probe(student)["input_ids"])
    _prove_equal(student, ids, source, kept_ids[ids], kept_ids)


def _prove_equal(
    model: Any, ids: torch.Tensor, other: Any, other_ids: torch.Tensor, words: torch.Tensor | None = None
) -> None:
    """Compare the outputs of two models on the same tokens under two numberings. words: those that `model` knows."""
    rows = other.config.get_text_config().vocab_size
    ours, theirs = _output(model, ids), _output(other, other_ids)
    if words is not None and theirs.shape[-1] == rows and ours.shape[-1] == len(words):
        theirs = theirs[..., words]
    error = (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
    if not error <= TOLERANCE:
        raise ModelError(
            f"{type(model).__name__}: its output differs with another vocabulary (relative difference {error:.1e}); "
            "something in it follows token ids otherwise than by rows, and it is not supported"
        )
