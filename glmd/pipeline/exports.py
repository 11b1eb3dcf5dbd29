"""The folders that a run leaves: models with their cards, each proved once in a fresh process."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmd.models.card import PROBE, ModelCard
from glmd.models.companions import Companions, encoder_companions, encoder_pooling
from glmd.models.export import check_exports, export_model
from glmd.models.heads import is_bare
from glmd.models.loading import auto_class_name
from glmd.pipeline.context import Context
from glmd.pipeline.rows import selection_of
from glmd.planning.stages import Stage
from glmd.runtime.phases import phase
from glmd.runtime.processes import on_main
from glmd.storage import write_atomically
from glmd.tasks.told import facts_of
from glmd.version import __version__

PROVED = "exports_checked.json"  # in a run's folder: what each was when it was proved
# Title of a card, and what the model was made from.
_TOLD: dict[str, tuple[str, str]] = {
    "teacher": ("Teacher trained from scratch", "masked tokens of the corpus"),
    "task_teacher": ("Teacher fine-tuned on {task}", "the labels of {task}"),
    "pretraining": ("Student", "the teacher's word prediction on the corpus"),
    "task_lm": ("Student", "the fine-tuned teacher's word prediction on {task}"),
    "task_soft_labels": ("Student for {task}", "the fine-tuned teacher's answers on {task}"),
    "hard_labels": ("Student for {task}", "the labels of {task}, as a control"),
    "trim_only": ("Teacher for {task} with fewer tokens", "the fine-tuned teacher without training, as a control"),
    "trim_after": ("Student for {task}", "a student with all tokens, which lost some of them without training"),
}


@phase("exports")
def export_stage(context: Context, stage: Stage, model: Any, metrics: Mapping[str, float]) -> None:
    """Write the model of a stage with its card."""
    config, tokenizer = context.config, context.tokenizer(stage)
    base, task = config.teacher.model, stage.task.task.name if stage.task is not None else None
    given = [*config.data.corpus] or ([] if task is None else [str(config.tasks[task].get("train") or "")])
    sources = [Path(each).name if Path(each).exists() else each for each in given if each]
    facts = {
        "teacher": "trained from scratch" if base is None else Path(base).name if Path(base).exists() else base,
        "method": config.method,
        **({"data": "a generated world of facts"} if config.data.synthetic else {}),
        **({"data": ", ".join(sources)} if sources else {}),
        "glmd": __version__,
        "seed": str(stage.seed),
    }
    if not stage.leaves_language_model:
        assert stage.task is not None, "a stage of a task"
        facts |= {"max_length": str(stage.length), **facts_of(stage.task.task)}
    if not stage.leaves_language_model and not stage.trains_teacher:
        facts |= {"checkpoint": selection_of(config, stage), "scored on": f"{task} val"}
    own = "Student" if stage.leaves_language_model else "Student for {task}", f"{stage.kind} of method {config.method}"
    if is_bare(model) and stage.kind == stage.last and not stage.is_control:
        own = "Student of a sentence encoder", "the teacher's vectors of the sentences of {task}"
    told = own if is_bare(model) and not stage.is_control else _TOLD.get(stage.kind, own)
    title, made_from = (text.format(task=task) for text in told)
    if stage.settings is None and not stage.is_control:
        made_from = "layers and tokens of the teacher, without training"
    card = ModelCard(
        title,
        base or "",
        f"Made by glmd from {made_from}.",
        facts,
        dict(metrics),
        exact_tokenizer=tokenizer is not context.plan.tokenizer,
        auto_class=auto_class_name(type(model).__name__),
        task=None if stage.leaves_language_model or is_bare(model) else task,
        is_encoder=is_bare(model),
    )
    folder = context.folder(stage) / ("model" if stage.trains_teacher else "student")
    companions = _companions(context, model)
    on_main(lambda: export_model(model, tokenizer, folder, card=card, companions=companions))


def _companions(context: Context, model: Any) -> Companions | None:
    """What makes a sentence encoder of a model without a head."""
    if not is_bare(model):
        return None
    (task,) = context.plan.tasks.values()
    files, teacher = context.config.tasks[task.task.name], str(context.config.teacher.model)
    pooling = encoder_pooling(teacher, files.get("pooling"))
    assert pooling is not None, "the task was made by it"
    return encoder_companions(teacher, pooling, model.config.get_text_config().hidden_size)


@phase("proof of exports")
def prove_exports(context: Context) -> None:
    """Prove every exported folder of the run in a fresh process, each once."""
    root = context.run_folder.path
    proved = {name: stamp for each in (*context.run_folder.siblings, root) for name, stamp in _proved(each).items()}
    stamps = {}
    for place, files in context.run_folder.left.items():
        for probe in [place / name for name in files if Path(name).name == PROBE]:
            stamp = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
            stamps[probe.parent.relative_to(root).as_posix()] = stamp
    check_exports([root / name for name, stamp in sorted(stamps.items()) if proved.get(name) != stamp])
    write_atomically(root / PROVED, json.dumps(stamps, indent=1))


def _proved(run: Path) -> dict[str, str]:
    """What was proved of a run, by the names of its folders. Nothing yet, or damaged: then all are proved again."""
    try:
        return dict(json.loads((run / PROVED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
