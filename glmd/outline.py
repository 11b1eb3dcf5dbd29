"""A plan for a person to read, as `glmd check` prints it: models, stages, steps.

print(describe(make_plan(config), world_size=1))
"""

from collections.abc import Iterator

from glmd.config import StageConfig, cell_name
from glmd.plan import Plan, task_stages


def describe(plan: Plan, world_size: int) -> str:
    """The plan for a person: models and how they split, stages with steps, examples and tokens at most."""
    config = plan.config
    lines = [
        f"teacher   {config.teacher.model or 'trained here from scratch'}",
        f"method    {config.method}",
        "",
        f"{'parameters':<20}{'total':>14}{'vocabulary':>14}{'body':>14}{'layers':>8}{'words':>9}{'embedding':>11}",
    ]
    sides = (("teacher", plan.teacher_config, len(plan.tokenizer)), ("student", plan.student_config, plan.kept_size))
    for name, model, words in sides:
        p = plan.parameters[name]
        counts = f"{p['total']:>14,}{p['vocabulary']:>14,}{p['body']:>14,}"
        lines.append(f"{name:<20}{counts}{model.num_hidden_layers:>8}{words:>9,}{p['embedding_size']:>11,}")
    swept = [f"{each}.{key} {values}" for each, keys in config.sweep.items() for key, values in keys.items()]
    lines += ["", f"{'stage':<20}{'steps':>9}{'batch':>7}{'length':>8}{'examples':>10}{'tokens at most':>17}"]
    lines += [_stage_line(*stage, world_size) for stage in _stages(plan)]
    controls = [name for name, on in vars(config.controls).items() if on]
    lines += ["", f"seeds     {', '.join(map(str, config.seeds))}", f"controls  {', '.join(controls) or 'none'}"]
    lines += [f"sweep     {len(config.cells)} cells: {', '.join(swept)}"] if swept else []
    return "\n".join([*lines, f"output    {config.output_dir}"])


def _stages(plan: Plan) -> Iterator[tuple[str, StageConfig, int, int | None, str]]:
    """(name, settings, length, examples, what a sweep changes) of each stage, in order; a corpus is not counted yet."""
    config = plan.config
    if config.teacher.pretraining is not None:
        yield "teacher", config.teacher.pretraining, config.teacher.pretraining.max_length or 0, None, ""
    stages = {name: task_stages(config, plan.method, name) for name in plan.tasks}
    for name, task in plan.tasks.items():
        stage = stages[name].pop("task_teacher")
        if name not in config.teacher.tasks:
            yield f"{name} task_teacher", stage, stage.max_length or task.task.max_length, len(task.train), ""
    if "pretraining" in plan.method:
        yield "pretraining", config.pretraining, config.pretraining.max_length or 0, None, ""
    for name, task in plan.tasks.items():
        for each in stages[name]:
            # A first pass is shared by the cells that differ in the second alone.
            cells = [{key: value for key, value in cell.items() if key.startswith(f"{each}.")} for cell in config.cells]
            for number, cell in enumerate(cells):
                if cell not in cells[:number]:
                    stage = config.stage(each, name, cell)
                    length = stage.max_length or task.task.max_length
                    yield f"{name} {each}", stage, length, len(task.inputs), cell_name(cell).replace(f"{each}.", "")


def _stage_line(name: str, stage: StageConfig, length: int, examples: int | None, swept: str, world_size: int) -> str:
    steps, batch = stage.steps(examples or 0, world_size), stage.global_batch_size(world_size)
    shown = f"{examples:,}" if examples is not None else "corpus"
    return f"{name:<20}{steps:>9,}{batch:>7}{length:>8}{shown:>10}{steps * batch * length:>17,}" + (
        f"  {swept}" if swept else ""
    )
