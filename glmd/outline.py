"""A plan for a person to read, as `glmd check` prints it: models, stages, steps.

print(describe(make_plan(config), world_size=1))
"""

from collections.abc import Iterator
from dataclasses import dataclass

from glmd.config import FLOAT16_HEADS, StageConfig, cell_name
from glmd.plan import Plan, TaskPlan
from glmd.resolution import task_stages


def describe(plan: Plan, world_size: int) -> str:
    """The plan for a person: models and how they split, stages with steps, examples and tokens at most."""
    config = plan.config
    lines = [
        f"teacher   {config.teacher.model or 'trained here from scratch'}",
        f"method    {config.method}",
        f"weights   {_precision(plan)}",
        "",
        f"{'parameters':<20}{'total':>14}{'vocabulary':>14}{'body':>14}{'layers':>8}{'words':>9}{'embedding':>11}",
    ]
    sides = (("teacher", plan.teacher_config, plan.source_size), ("student", plan.student_config, plan.kept_size))
    for name, model, words in sides:
        p = plan.parameters[name]
        counts = f"{p['total']:>14,}{p['vocabulary']:>14,}{p['body']:>14,}"
        lines.append(f"{name:<20}{counts}{model.num_hidden_layers:>8}{words:>9,}{p['embedding_size']:>11,}")
    swept = [f"{each}.{key} {values}" for each, keys in config.sweep.items() for key, values in keys.items()]
    lines += ["", f"{'stage':<20}{'steps':>9}{'batch':>7}{'length':>8}{'examples':>10}{'tokens at most':>17}"]
    lines += [_stage_line(stage, world_size) for stage in planned_stages(plan)]
    controls = [name for name, on in vars(config.controls).items() if on]
    lines += ["", f"seeds     {', '.join(map(str, config.seeds))}", f"controls  {', '.join(controls) or 'none'}"]
    lines += [f"sweep     {len(config.cells)} cells: {', '.join(swept)}"] if swept else []
    return "\n".join([*lines, f"output    {config.output_dir}"])


def _precision(plan: Plan) -> str:
    """In which precision weights are trained, the teacher runs, and what is otherwise than one may expect."""
    config, held = plan.config, getattr(plan.teacher_config, "dtype", None)
    kept = str(held).removeprefix("torch.") if held is not None else "float32"
    whose = f", though the teacher's file holds {kept}" if kept != "float32" and config.teacher.scratch is None else ""
    said = f"trained in float32{whose}; the teacher runs in {config.teacher.dtype}"
    return f"{said}; {FLOAT16_HEADS}" if config.mixed_precision == "fp16" else said


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run as it is planned. examples: None on a corpus, which is not counted yet."""

    kind: str  # teacher, task_teacher, pretraining, task_words, task_labels
    settings: StageConfig
    length: int  # tokens of a text, at most
    task: TaskPlan | None = None
    examples: int | None = None
    swept: str = ""  # what the cell of a sweep changes

    @property
    def name(self) -> str:
        return self.kind if self.task is None else f"{self.task.task.name} {self.kind}"


def planned_stages(plan: Plan) -> Iterator[PlannedStage]:
    """Every stage in order, but for seeds and controls."""
    config = plan.config
    if config.teacher.pretraining is not None:
        yield PlannedStage("teacher", config.teacher.pretraining, config.teacher.pretraining.max_length or 0)
    stages = {name: task_stages(config, plan.method, name) for name in plan.tasks}
    for name, task in plan.tasks.items():
        stage = stages[name].pop("task_teacher")
        if name not in config.teacher.tasks:
            length = stage.max_length or task.task.max_length
            yield PlannedStage("task_teacher", stage, length, task, len(task.train))
    if "pretraining" in plan.method:
        yield PlannedStage("pretraining", config.pretraining, config.pretraining.max_length or 0)
    for name, task in plan.tasks.items():
        for each in stages[name]:
            # A first pass is shared by the cells that differ in the second alone.
            cells = [{key: value for key, value in cell.items() if key.startswith(f"{each}.")} for cell in config.cells]
            for number, cell in enumerate(cells):
                if cell not in cells[:number]:
                    stage = config.stage(each, name, cell)
                    length = stage.max_length or task.task.max_length
                    swept = cell_name(cell).replace(f"{each}.", "")
                    yield PlannedStage(each, stage, length, task, len(task.inputs), swept)


def _stage_line(planned: PlannedStage, world_size: int) -> str:
    stage, length, examples = planned.settings, planned.length, planned.examples
    steps, batch = stage.steps(examples or 0, world_size), stage.global_batch_size(world_size)
    shown = f"{examples:,}" if examples is not None else "corpus"
    return f"{planned.name:<20}{steps:>9,}{batch:>7}{length:>8}{shown:>10}{steps * batch * length:>17,}" + (
        f"  {planned.swept}" if planned.swept else ""
    )
