"""Export a checkpoint of a run, or a student in another kind of folder."""

from pathlib import Path
from typing import Any

import torch

from glmd.config_file import load_config
from glmd.errors import ModelError, RunError, suggestion
from glmd.models.card import ModelCard, told_by_card
from glmd.models.companions import find_companions
from glmd.models.export import _probe, _prove_equal, check_exports, export_model, require_free_output
from glmd.models.heads import is_bare
from glmd.models.loading import load_model_as_saved
from glmd.models.pooling import MODULES
from glmd.models.source_tokenizer import load_source_tokenizer
from glmd.public import public
from glmd.training.checkpoint import load_checkpoint
from glmd.vocabulary.slicing import expand_model, model_class_of, tie_weights
from glmd.vocabulary.tokenizer import (
    compress_tokenizer,
    load_tokenizer,
    source_tokenizer,
    stock_tokenizer,
    vocabulary_of,
)
from glmd.vocabulary.vocabulary import Vocabulary


@public
def export_folder(source: str | Path, output: str | Path, *, kind: str = "mapped") -> str:
    """Write a student as a model folder, and say in one line what it is.

    source: a stage of a run, whose newest checkpoint is taken, or a student's folder.
    kind: "mapped"; "stock": with the stock tokenizer alone; "expanded": with a row for each of the source's tokens
        again and the source's tokenizer, so that text is read exactly by nothing but stock parts.
    Raises RunError where the stage has no checkpoint or the output folder is taken, ModelError where the kind does not
    fit the model.
    """
    source, output = Path(source), Path(output)
    if kind not in _KINDS:
        raise RunError(f"--kind {kind!r} is unknown{suggestion(kind, _KINDS)}")
    require_free_output(output)
    if (source / "config.json").is_file():
        model, tokenizer = load_model_as_saved(str(source)), load_tokenizer(source)
        origin = f"the student in {source.resolve().parent.name}/{source.resolve().name}"
        if kind == "mapped":
            raise RunError(f"{source} is a model folder already; give --kind stock or expanded, or copy it")
    else:
        model, tokenizer, step = _of_checkpoint(source)
        origin = f"the student after step {step}"
    base_model, facts, metrics = told_by_card(source)
    if kind == "stock":  # what it scored holds for its exact tokenizer
        metrics = {}
    facts |= {"origin": origin, "kind": kind}
    if kind == "expanded":
        facts.pop("kept tokens", None)
    if kind != "mapped":
        if not getattr(tokenizer, "is_exact", False):
            raise ModelError(
                f"--kind {kind} has no effect: {source} keeps every token of its source, or has the stock tokenizer "
                "alone already; export from the student that it was made of"
            )
        if kind == "expanded":
            expanded = expand_model(model, vocabulary_of(tokenizer))
            ids = torch.tensor(_probe(expanded)["input_ids"])
            _prove_equal(expanded, ids, model, torch.tensor(tokenizer.token_map)[ids])
            model, tokenizer = expanded, source_tokenizer(tokenizer)
        else:
            tokenizer = stock_tokenizer(tokenizer)
    companions = None
    if is_bare(model):  # what makes a sentence encoder of it; a stage in progress has it where it began
        companions = find_companions(str(source if (source / "config.json").is_file() else _begun_from(source)))
    card = ModelCard(
        origin.capitalize(),
        base_model,
        _KINDS[kind],
        facts,
        metrics,
        exact_tokenizer=getattr(tokenizer, "is_exact", False),
        auto_class=type(model).__name__,
        is_encoder=companions is not None and MODULES in companions.files,
    )
    export_model(model, tokenizer, output, card=card, companions=companions)
    check_exports([output])
    return f"{output}: {origin}" + (f", {kind}" if kind != "mapped" else "")


_KINDS = {
    "mapped": "A student in its own vocabulary, with its mapped tokenizer.",
    "stock": "A student in its own vocabulary; rare words are cut into smaller tokens than those it was trained on.",
    "expanded": "A student with a row for each token of its teacher's tokenizer, which reads text exactly.",
}


def _of_checkpoint(stage: Path) -> tuple[Any, Any, int]:
    """Student, tokenizer and step of a stage's newest checkpoint."""
    import transformers

    checkpoint = load_checkpoint(stage / "checkpoints")
    if checkpoint is None:
        begun = [path.parent for path in sorted(stage.rglob("checkpoints"))]
        finished = [path for path in sorted(stage.rglob("student")) if (path / "config.json").is_file()]
        found = "; give one of its stages: " if begun else "; its finished students are " if finished else ""
        raise RunError(f"{stage}: no checkpoint{found}{', '.join(map(str, (begun or finished)[:4]))}")
    # A stage has one model, or two that share a backbone: the task head is then what it is trained for.
    name, described = max(checkpoint.state["models"].items(), key=lambda item: item[0] == "classifier")
    config_class = transformers.CONFIG_MAPPING[described["config"]["model_type"]]
    model_config = config_class.from_dict(described["config"] | {"architectures": [described["class"]]})
    model: Any = model_class_of(model_config)(model_config)
    held = checkpoint.tensors["model"]
    tie_weights(model, [each for each in model.all_tied_weights_keys if f"{name}.{each}" in held])
    tensors = checkpoint.tensors["model"]
    # A checkpoint holds what learns. The rest, of a model without a head, is as it began.
    begun = load_model_as_saved(str(_begun_from(stage))).state_dict() if is_bare(model) else {}
    for key, parameter in model.named_parameters():
        # Of two models that share a backbone the first one's name is the one it was saved under.
        names = [each for each in (f"{name}.{key}", f"language_model.{key}") if each in tensors]
        parameter.data.copy_(tensors[names[0]] if names else begun[key])
    return model.eval(), _run_tokenizer(stage, model.config.vocab_size), int(checkpoint.state["progress"]["step"])


def _root(stage: Path) -> Path:
    root = next((each for each in stage.resolve().parents if (each / "config.yaml").is_file()), None)
    if root is None:
        raise RunError(f"{stage} is not inside a run folder (none above it has config.yaml)")
    return root


def _begun_from(stage: Path) -> Path:
    """The student that a stage on a task begins from, in a run of a sentence encoder."""
    root = _root(stage)
    parts = stage.resolve().relative_to(root).parts
    before = parts[: parts.index("tasks")] if "tasks" in parts else ()
    return root.joinpath(*before, "pretraining", "student")


def _run_tokenizer(stage: Path, vocab_size: int) -> Any:
    """The tokenizer of a run's students with `vocab_size` words."""
    root = _root(stage)
    teacher = load_config(root / "config.yaml").teacher
    place = teacher.model or str(root / "synthetic" / "tokenizer")
    options: dict[str, Any] = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
    source = load_source_tokenizer(place, kind=None, **options)
    vocabulary = Vocabulary.load(root / "vocabulary")
    return compress_tokenizer(source, vocabulary) if vocabulary.size == vocab_size else source
