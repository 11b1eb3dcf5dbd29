"""The work of one stage: its models, its data, training, scores, export.

    result = run_stage(context, stage)

The stages that it begins from and learns from are complete.
"""

import gc
import logging
import shutil
from dataclasses import asdict, replace
from typing import Any

import torch

from glmd.config import TeacherConfig
from glmd.data.sampling import loader_workers
from glmd.distillation.distiller import Distiller
from glmd.distillation.teacher import TeacherOutputs, first_of
from glmd.losses.linear import triton_problem
from glmd.models.attention import attention_of
from glmd.models.heads import split_parameters
from glmd.models.loading import compared_embeddings, load_language_model
from glmd.models.probes import prove_texts_apart
from glmd.models.student import build_student
from glmd.models.weight_headers import stored_embeddings
from glmd.pipeline.analysis import LayerDistances, is_analyzed, told
from glmd.pipeline.context import Context
from glmd.pipeline.data import token_counts, training_data
from glmd.pipeline.exports import export_stage
from glmd.pipeline.scores import (
    quantization_error,
    score_language_model,
    score_task,
    teacher_answers,
    teacher_bits,
    whole_answers,
)
from glmd.pipeline.teacher_caches import cached_teacher
from glmd.pipeline.teachers import live_teacher, load_fine_tuned
from glmd.planning.rules import live_stages
from glmd.planning.stages import TEACHER, TRIMMED, Stage
from glmd.runtime.phases import phase
from glmd.runtime.processes import number_of_ranks, on_main, together
from glmd.tasks.forms import class_logits
from glmd.tasks.loading import load_classifier
from glmd.tasks.tasks import SENTENCES
from glmd.training.fsdp import is_sharded
from glmd.training.trainer import Evaluate, Teacher, Trainer
from glmd.vocabulary.build import build_vocabulary
from glmd.vocabulary.slicing import ids_to_keep, slice_model, vocabulary_axes

logger = logging.getLogger(__name__)


def run_stage(context: Context, stage: Stage) -> dict[str, Any]:
    """Do the work of a stage, and return what it found, for its record and its row of the results."""
    if stage.kind == "vocabulary":
        on_main(lambda: choose_vocabulary(context, stage))
        return {}
    if stage.settings is None and stage.task is not None:
        settings = context.config.stage("task_teacher", stage.task.task.name)  # how a model is scored
        scored = replace(stage, settings=settings)
        if stage.kind in TRIMMED:
            return trim(context, scored)
        return score_task(context, scored, load_fine_tuned(context, stage), keeps=True)
    language_model, task_model = start(context, stage)
    model = language_model if stage.leaves_language_model else task_model
    result: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    if not stage.trains_teacher and (stage.task is None or not stage.leaves_language_model):
        result["parameters"] = _counted(model)
    if stage.settings is not None:
        teacher = load_teacher(context, stage)
        context.at_hand = None
        # Whose words the model's are scored against.
        compared = first_of(teacher) if stage.leaves_language_model and stage.asks_lm_logits else None
        if stage.teacher == TEACHER and context.config.teacher.quantization and compared is not None:
            result["quantization"] = quantization_error(context, stage, context.whole_answers, compared)
        bits = {} if compared is None else teacher_bits(context, stage, compared)
        if compared is not None:
            result["lm_scores_before"] = score_language_model(context, stage, model, compared)
        elif not stage.leaves_language_model and not stage.trains_teacher:
            teacher_answers(context, stage)  # now, while nothing else fills the memory
            if stage.task is not None and stage.task.task.problem_type == SENTENCES:
                result["metrics_before"] = score_task(context, stage, model)["metrics"]
        result["training"] = train(context, stage, language_model, task_model, teacher)
        if is_analyzed(context, stage):
            result["layer_distances"] = on_main(lambda: told(context, stage))
        if compared is not None:
            result["lm_scores"] = metrics = score_language_model(context, stage, model, compared) | bits
    if not stage.leaves_language_model:
        scores = score_task(context, stage, model, keeps=True)
        shown = {"agreement with the teacher": scores["agreement"]} if "agreement" in scores else {}
        metrics = scores.get("metrics", {}) | shown
        config = context.config.teacher
        if stage.trains_teacher and (config.dtype != "float32" or config.quantization):
            # The folder's own scores are on its card, those of the table are of the precision that it teaches in.
            export_stage(context, stage, model, metrics)
            return result | score_task(context, stage, load_fine_tuned(context, stage), keeps=True)
        result |= scores
    export_stage(context, stage, model, metrics)
    return result


@phase("vocabulary")
def choose_vocabulary(context: Context, stage: Stage) -> None:
    """The tokens that students keep, by their count in corpus and tasks and by the teacher's embeddings."""
    assert stage.teacher is not None, "whose embeddings are compared"
    settings = context.config.vocabulary
    teacher = whole(context.language_model(stage.teacher))
    embeddings, model = stored_embeddings(teacher, settings.similarity)
    if embeddings is None:
        model = _base_model(context, teacher)
        embeddings = compared_embeddings(model, settings.similarity)
    ids = ids_to_keep(model.config, getattr(model, "generation_config", None))
    counts = token_counts(context)
    built = build_vocabulary(context.plan.tokenizer, embeddings, counts, keep_ids=ids, **settings.choice)
    built.save(context.folder(stage))


def trim(context: Context, stage: Stage) -> dict[str, Any]:
    """Leave the model that a stage begins from with the student's tokens, as it is otherwise, and score it."""
    assert stage.task is not None and stage.start is not None, "a stage of a task"
    model = slice_model(load_classifier(context.model(stage.start), stage.task.task), context.vocabulary(stage))
    scores = score_task(context, stage, model, keeps=True)
    export_stage(context, stage, model, scores.get("metrics", {}) | {"agreement with the teacher": scores["agreement"]})
    return {"parameters": _counted(model)} | scores


def _counted(model: Any) -> dict[str, int]:
    return split_parameters(model, set(vocabulary_axes(model.config, type(model))))


@phase("loading")
def start(context: Context, stage: Stage) -> tuple[Any, Any]:
    """(language model, task model) as they are before training; None for one that nothing is asked of."""
    if stage.kind == "teacher":
        from transformers import BertForMaskedLM

        torch.manual_seed(stage.seed)
        return BertForMaskedLM(context.plan.teacher_config), None
    if stage.start is None:
        taught = context.language_model(TEACHER)
        is_read_by_all = number_of_ranks() == 1 or (stage.teacher == TEACHER and whole(taught) == taught)
        return (_student if is_read_by_all else _from_main)(context, stage), None
    name, task_model, teacher = context.model(stage.start), None, context.config.teacher
    if stage.task is not None and (not stage.leaves_language_model or "task_head" in stage.needs):
        remote = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
        torch.manual_seed(stage.seed)
        options: dict[str, Any] = remote if stage.start == TEACHER else {}
        task_model = load_classifier(name, stage.task.task, new_head=True, **options)
    if not stage.leaves_language_model and "head" not in stage.needs:
        return None, task_model
    is_both = task_model is not None and not context.form(stage).has_own_head
    return task_model if is_both else load_language_model(TeacherConfig(name, dtype="float32")), task_model


def _student(context: Context, stage: Stage) -> Any:
    """A new student of the teacher's layers, whoever it learns from."""
    wide = whole(context.language_model(TEACHER))  # so that copied weights are not rounded
    source = _base_model(context, wide)
    context.whole_answers = whole_answers(context, stage, source)
    student = build_student(source, context.vocabulary(stage), context.student(stage), seed=stage.seed)
    if wide == context.language_model(TEACHER):
        context.at_hand = wide, source  # the teacher itself, which is not loaded again
    del source
    gc.collect()  # models hold themselves in cycles, and the teacher is loaded next
    return student


def _from_main(context: Context, stage: Stage) -> Any:
    """The same where no other rank needs the teacher in float32, which is twice what it will teach in."""
    folder = context.folder(stage) / "start"
    on_main(lambda: _student(context, stage).save_pretrained(folder))
    student = together(lambda: _base_model(context, TeacherConfig(str(folder), dtype="float32")))
    on_main(lambda: shutil.rmtree(folder))
    return student


def _base_model(context: Context, model: TeacherConfig) -> Any:
    """A language model, or in a run whose teacher is none a model of its task."""
    if not context.plan.teaches_task_alone:
        return load_language_model(model)
    assert model.model is not None, "named by the config"
    (task,) = context.plan.tasks.values()
    remote: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    return load_classifier(model.model, task.task, **remote)


def whole(teacher: TeacherConfig) -> TeacherConfig:
    """The teacher as its files have it, whatever it is rounded to while it teaches."""
    return replace(teacher, dtype="float32", quantization=None)


def load_teacher(context: Context, stage: Stage) -> Teacher | None:
    """What a stage learns from, and is scored against, live or from the cache; None where nothing is asked of it."""
    if stage.teacher is None or not (stage.asks_lm_logits or stage.teacher_needs):
        return None
    if stage.cached:
        return cached_teacher(context, stage)
    why = live_stages(context.config, context.plan.method).get(stage.kind)
    if context.config.teacher.cache is not None and why is not None and stage.kind not in context.said:
        context.said.add(stage.kind)
        logger.info("teacher.cache: %s %s; the live teacher serves it", stage.kind, why)
    return live_teacher(context, stage, context.vocabulary(stage))


@phase("training")
def train(
    context: Context, stage: Stage, language_model: Any, task_model: Any, teacher: Teacher | None
) -> dict[str, Any]:
    """Train the given student in place, from the stage's newest checkpoint if there is one."""
    accelerator, token_map = context.accelerator, context.vocabulary(stage).token_map
    assert is_sharded(accelerator) == context.is_sharded, "Accelerate has lost its state"
    assert stage.objective is not None, "the stage trains"
    logits = context.form(stage).logits if stage.task is not None else class_logits
    distiller = Distiller(
        stage.objective,
        token_map,
        language_model=language_model,
        classifier=task_model,
        task_logits=logits,
        num_classes=0 if stage.task is None else stage.task.task.num_classes,
    )
    if stage.task is None and context.plan.packs:
        for split in distiller.splits:
            prove_texts_apart(split.model)
    if accelerator.device.type == "cuda" and "head" in stage.needs:
        with phase("kernel"):  # the first step would compile and try it; what this answers is kept
            triton_problem(
                accelerator.device, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            )
    trainer = Trainer(
        accelerator,
        context.folder(stage),
        stage.path,
        stage.training.spread(context.processes, accelerator.num_processes),
        stage.seed,
        context.log,
        loader_workers(context.config.dataloader_num_workers, accelerator.device),
        evaluation(context, stage, teacher),
        LayerDistances(context, stage, teacher) if teacher is not None and is_analyzed(context, stage) else None,
        compiles=context.config.torch_compile,
        replays=context.config.cuda_graphs,
    )
    models = (split.model for split in distiller.splits)
    with attention_of(*models, implementation=context.config.attn_implementation):
        result = trainer.run(distiller, teacher or _silent, training_data(context, stage), context.collate)
    del trainer  # with what its graphs hold
    accelerator.free_memory()
    return asdict(result)


def evaluation(context: Context, stage: Stage, teacher: Teacher | None) -> Evaluate | None:
    """What ranks the checkpoints of a stage of a task; None keeps the last one."""
    selection = context.config.selection
    if selection == "last" or stage.task is None:
        return None
    if stage.leaves_language_model:
        if teacher is None or not stage.asks_lm_logits:  # nothing ranks layers, or predictions of labels
            return None
        compared = first_of(teacher)
        return lambda distiller: (
            -score_language_model(context, stage, distiller.language_model, compared)["kl_divergence"]
        )
    if selection == "best":
        metric = stage.task.task.metrics[0]
        return lambda distiller: float(score_task(context, stage, distiller.splits[0].model)["metrics"][metric])
    if stage.trains_teacher or stage.is_control:
        return None
    return lambda distiller: float(score_task(context, stage, distiller.splits[0].model)["agreement"])


def _silent(_: Any) -> TeacherOutputs:
    """The teacher of stages that have none."""
    return TeacherOutputs()
