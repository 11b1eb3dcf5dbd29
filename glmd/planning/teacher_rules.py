"""From whom a run's students learn: one teacher or several, assistants between, and what of that has no sense.

    count = teachers_of_task(config, method, "RTE")

From names and numbers alone, as all rules.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from glmd.config import RunConfig
from glmd.distillation.methods import load_method
from glmd.distillation.objective import Objective
from glmd.errors import ConfigError, ModelError
from glmd.task_files import POOLINGS, task_files
from glmd.tasks.columns import Columns, task_of_columns
from glmd.tasks.forms import problem_of
from glmd.tasks.sentences import task_of_sentences
from glmd.tasks.tasks import SENTENCES, ProblemType, Task, load_task


def task_of(config: RunConfig, name: str) -> Task:
    """The task under a key of `tasks`: of columns or from its own YAML if it names them, else one that comes with glmd.

    Of columns the labels are those of the training file, in the order of the first model that is named for the task, by
    which it is also told what kind of answers there are.
    """
    columns = columns_of(config, name)
    if columns is None:
        task = load_task(config.tasks[name].get("definition") or name, config.casting)
        if task.problem_type == SENTENCES:  # its pooling is what the encoder's folder says
            raise ConfigError(f"tasks.{name}.definition: a task of sentences has none; name its columns: text")
        return task
    train, models = config.tasks[name].get("train"), config.teacher.of_task(name)
    classes, problem = None, config.tasks[name].get("problem_type")
    if problem in (None, SENTENCES) and (encoder := _sentence_encoder(config)) is not None:
        return _of_sentences(config, name, columns, encoder)
    files = task_files(config.tasks[name], f"tasks.{name}")
    for key in ("val_text", "prompt", "pooling"):
        if getattr(files, key) is not None:
            raise ConfigError(f"tasks.{name}.{key} has no effect: teacher.model is no sentence encoder; remove it")
    if problem == SENTENCES or files.label is None:
        what = "label is missing: the column of the answers" if problem is None else f"problem_type is {problem}"
        raise ConfigError(
            f"tasks.{name}.{what}; without labels sentences are learned, from a sentence encoder as teacher"
        )
    if models:
        from glmd.models.loading import load_model_config, require_model

        require_model(models[0], field=f"teacher.tasks.{name}")
        teacher = load_model_config(models[0])
        classes = tuple(str(teacher.id2label[i]) for i in sorted(teacher.id2label))
        problem = problem or problem_of(teacher)
    path = Path(train).expanduser() if train is not None else None
    stamp = (path.stat().st_mtime_ns, path.stat().st_size) if path is not None and path.is_file() else None
    return _of_columns(name, columns, train, classes, config.casting, problem, stamp)


def _sentence_encoder(config: RunConfig) -> str | None:
    """The teacher's folder or hub id, where it is a model without a head."""
    from glmd.models.heads import is_encoder

    found = _teacher_config(config)
    return config.teacher.model if found is not None and is_encoder(found) else None


def _teacher_config(config: RunConfig) -> Any:
    """The config of `teacher.model`; None where it names no model, or a folder without one, which is refused later."""
    from glmd.models.loading import looks_local

    teacher, stamp = config.teacher, None
    if teacher.model is None:
        return None
    if looks_local(teacher.model):
        path = Path(teacher.model) / "config.json"
        if not path.is_file():
            return None
        stamp = (path.stat().st_mtime_ns, path.stat().st_size, path.with_name("modules.json").is_file())
    return _read_config(teacher.model, teacher.revision, teacher.trust_remote_code, stamp)


@lru_cache(maxsize=64)
def _read_config(model: str, revision: str | None, trusted: bool, stamp: tuple[int, ...] | None) -> Any:
    """It is asked for many times, and not changed. stamp: what tells local files from what they were."""
    from glmd.models.loading import load_model_config

    return load_model_config(model, revision=revision, trust_remote_code=trusted)


def _of_sentences(config: RunConfig, name: str, columns: Columns, encoder: str) -> Task:
    """The task of learning an encoder's vectors. Raises ConfigError for what its folder or the columns do not say."""
    from glmd.models.companions import encoder_pooling

    files = task_files(config.tasks[name], f"tasks.{name}")
    try:
        pooling = encoder_pooling(encoder, files.pooling)  # type: ignore[arg-type]
    except ModelError as error:
        raise ConfigError(f"tasks.{name}: {error}") from None
    if pooling is None:
        raise ConfigError(
            f"tasks.{name}.pooling is missing: {encoder} has no modules.json that says how it makes a vector; give "
            f"{', '.join(POOLINGS)}"
        )
    sides = [files.val_text] if isinstance(files.val_text, str) else files.val_text
    if columns.labels:
        raise ConfigError(
            f"tasks.{name}.label names {len(columns.labels)} columns; name that of the similarities of val"
        )
    if columns.label and len(sides or columns.texts) < 2:
        key = "val_text" if sides is None or files.text_pair is None else "text_pair"
        raise ConfigError(
            f"tasks.{name}.label {columns.label}: how similar two texts are, and val has one column of them; name both "
            f"in {key}, or remove label"
        )
    prompt = pooling.prompt or "" if files.prompt is None else files.prompt
    return task_of_sentences(name, columns, pooling, val_fields=sides or (), prompt=prompt)


def with_task_model(config: RunConfig) -> RunConfig:
    """The config of a run whose `teacher.model` is a task model, which then is the fine-tuned teacher of its task too.

    Students are made of it, head and all, and learn its answers. Raises ConfigError for what only a language model
    could teach. A config with a language model stays as it is.
    """
    from glmd.models.heads import is_encoder, task_class

    teacher, found = config.teacher, _teacher_config(config)
    name = None if found is None else task_class(found)
    if name is None:
        return config
    model = str(teacher.model)
    what = f"teacher.model {model} holds a {name}, which predicts no tokens"
    base = f"teacher=BASE teacher.tasks.{next(iter(config.trained_tasks), 'TASK')}={model}"
    method = load_method(config.method)
    words = [
        stage for stage, each in method.items() if stage == "pretraining" or "head" in each.needs | each.teacher_needs
    ]
    if words and is_encoder(found):
        raise ConfigError(
            f"{what}, and method {config.method} compares them in {' and '.join(words)}; give method=embeddings, which "
            "learns its vectors of sentences"
        )
    if words:
        raise ConfigError(
            f"{what}, and method {config.method} compares them in {' and '.join(words)}; give the language model that "
            f"it was made from, and it for its task: {base}; or method=soft-labels, which learns its answers alone"
        )
    for is_given, key in (
        (config.casting != "head", f"casting {config.casting}"),
        (bool(teacher.ensemble), "teacher.ensemble"),
        (config.student.architecture is not None, f"student.architecture {config.student.architecture}"),
    ):
        if is_given and is_encoder(found):
            raise ConfigError(f"{key}: {what}; remove it")
        if is_given:
            raise ConfigError(f"{key}: {what}; give the language model that it was made from: {base}")
    tasks = {task: teacher.of_task(task) or [model] for task in config.trained_tasks}
    others = [task for task, models in tasks.items() if models[0] != model]
    if others or len(tasks) != 1:
        named = f"teacher.tasks.{others[0]} names another" if others else f"there are {len(tasks)} tasks"
        raise ConfigError(f"{what} but answers to one task, and {named}; give a run of its own to each, or {base}")
    (task,) = tasks
    return replace(config, teacher=replace(teacher, tasks={task: model, **teacher.tasks}))


def follows_teacher(config: RunConfig, name: str) -> bool:
    """Whether the labels of a task of columns, or what its answers are, are those that a named model's config tells."""
    from glmd.models.loading import load_model_config

    models, task = config.teacher.of_task(name), task_of(config, name)
    if not models:
        return False
    teacher = load_model_config(models[0])
    names = [str(teacher.id2label[i]) for i in sorted(teacher.id2label)]
    return task.problem_type == "regression" or names == [str(label) for label in task.labels]


def columns_of(config: RunConfig, name: str) -> Columns | None:
    """The columns that a task is made of, where it is."""
    files = task_files(config.tasks[name], f"tasks.{name}")
    if files.text is None:
        return None
    try:
        several = tuple(files.label) if isinstance(files.label, list) else ()
        return Columns(files.text, "" if several else files.label or "", files.text_pair, several)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"tasks.{name}: {error}") from None


@lru_cache(maxsize=64)
def _of_columns(
    name: str,
    columns: Columns,
    train: str | None,
    classes: tuple[str, ...] | None,
    casting: str,
    problem: ProblemType | None,
    stamp: tuple[int, int] | None,
) -> Task:
    """The task is asked for many times; its file is read once. stamp: what tells a file from what it was."""
    return task_of_columns(name, columns, train, classes=classes, casting=casting, problem_type=problem)


def passes(method: dict[str, Objective]) -> list[str]:
    """The stages of a method over a task, in their order."""
    return [name for name in method if name != "pretraining"]


def fine_tunes_teacher(config: RunConfig, method: dict[str, Objective], name: str) -> bool:
    """Whether a teacher of the task is not named."""
    return len(config.teacher.of_task(name)) < teachers_of_task(config, method, name)


def teachers_of_task(config: RunConfig, method: dict[str, Objective], task: str) -> int:
    """How many teachers the stages over a task learn from."""
    if not any(method[name].further_needs for name in passes(method)):
        return 1
    return max(len(config.teacher.ensemble) + 1, len(config.teacher.of_task(task)))


def learns_from_train(config: RunConfig, method: dict[str, Objective], name: str) -> bool:
    """Whether any model of the run is trained on the task's training examples."""
    is_own = not config.tasks[name].get("inputs")
    return is_own or fine_tunes_teacher(config, method, name) or config.controls.hard_labels


def check_ensemble(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse further teachers that nothing would be asked of, and a method that weighs several where there is one."""
    teacher = config.teacher
    reading = [stage for stage in method if stage == "pretraining" or config.tasks]
    asking = [stage for stage in reading if method[stage].further_needs]
    if teacher.ensemble and not asking:
        raise ConfigError(
            f"teacher.ensemble has no effect: method {config.method} compares nothing with further teachers; remove it"
        )
    for stage in asking:
        intervention = method[stage].intervention
        if teacher.ensemble and intervention is not None and intervention.kind.changes_teacher:
            raise ConfigError(
                f"teacher.ensemble: the intervention {intervention.name} of method {config.method} in {stage} changes "
                "what one teacher says; remove one of the two"
            )
    places = [Path(each).resolve() for each in (teacher.model, *teacher.ensemble) if each and Path(each).is_dir()]
    if len(set(places)) < len(places):
        raise ConfigError(f"teacher.ensemble names a folder twice, or teacher.model: {', '.join(teacher.ensemble)}")
    for task in config.tasks:
        named = teacher.of_task(task)
        if len(named) > teachers_of_task(config, method, task):
            raise ConfigError(
                f"teacher.tasks.{task} names {len(named)} models, but method {config.method} compares nothing on tasks "
                "with further teachers; name one"
            )
        words = [stage for stage in asking if stage != "pretraining" and "head" in method[stage].further_needs]
        if words and len(named) > 1 and not teacher.ensemble:
            raise ConfigError(
                f"teacher.tasks.{task} names {len(named)} models, but {words[0]} compares LM logits, which they have "
                "none of: name their language models in teacher.ensemble"
            )
    for task in config.tasks:
        weighing = [stage for stage in reading if stage != "pretraining" and method[stage].weighs_teachers]
        if weighing and not task_of(config, task).has_one_answer:
            raise ConfigError(
                f"tasks.{task}: method {config.method} weighs teachers in {weighing[0]} by one answer to each example; "
                "leave it out, or give another method"
            )
        learned = [stage for stage in reading if stage != "pretraining" and method[stage].learns_weights]
        if learned and task_of(config, task).is_choice:
            raise ConfigError(
                f"tasks.{task}: the policy of method {config.method} in {learned[0]} chooses teachers by classes, and "
                "this task has choices; leave it out"
            )
    for stage in reading:
        most = [teachers_of_task(config, method, task) for task in config.tasks] if stage != "pretraining" else []
        there = min(most, default=len(teacher.ensemble) + 1) + len(config.assistants)
        if method[stage].weighs_teachers and there == 1:
            if not method[stage].asks_assistants:
                raise ConfigError(
                    f"method {config.method} learns from assistants in {stage}, and there are none; give some"
                )
            also = "" if stage == "pretraining" else ", or a list of models for each task in teacher.tasks"
            raise ConfigError(
                f"method {config.method} weighs several teachers in {stage}, and there is one; name others in "
                f"teacher.ensemble{also}, or give assistants"
            )


def check_assistants(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse assistants beside other further teachers, without effect, and a vocabulary that teaches nobody."""
    if config.assistants and not any(objective.teacher_needs for objective in method.values()):
        raise ConfigError(f"assistants have no effect: method {config.method} asks nothing of a teacher; remove them")
    several = [task for task in config.tasks if len(config.teacher.of_task(task)) > 1]
    if config.assistants and (config.teacher.ensemble or several):
        raise ConfigError("assistants and teacher.ensemble are both given; keep one")
    own = [i for i, each in enumerate(config.assistants, start=1) if each.vocabulary == "student"]
    if own and config.controls.full_vocabulary:
        raise ConfigError(
            f"assistants[{own[0] - 1}].vocabulary student: it cannot teach the control with the full vocabulary; give "
            "full, or controls.full_vocabulary=false"
        )
    later = [i for i in range(1, len(config.assistants) + 1) if own and i > own[0] and i not in own]
    if later:
        raise ConfigError(
            f"assistants[{later[0] - 1}].vocabulary full: the assistant before it has the student's tokens alone, and "
            "cannot teach others; give student"
        )
