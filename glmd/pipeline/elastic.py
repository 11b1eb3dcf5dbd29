"""A run that goes on with another number of processes."""

import math
from pathlib import Path

from glmd.errors import RunError
from glmd.pipeline.run_folder import begun_with, is_complete
from glmd.planning.plan import Plan
from glmd.planning.stages import stages
from glmd.stage_config import StageConfig


def require_shareable(plan: Plan, begun: int, processes: int) -> None:
    """Refuse a number of processes that cannot share the steps which `begun` of them would have made.

    Stages that are complete are not asked. Raises ConfigError.
    """
    for settings in _to_come(plan, begun):
        settings.spread(begun, processes)


def processes_of(plan: Plan, launched: int | None) -> tuple[int, list[str]]:
    """The number of processes that the plan's batch sizes speak of, and what to say of others.

    launched: by whom this was asked; None where it was not launched. Raises GlmdError where a run so launched would.
    """
    config = plan.config
    begun = begun_with(Path(config.output_dir))
    if begun is None:
        require_shareable(plan, launched or 1, launched or 1)
        return launched or 1, []
    number, sharding = begun
    how = f"processes the run was begun with {number}" + (f", by {sharding}" if sharding else "")
    if not config.elastic:
        if launched not in (None, number):
            found = f"output_dir {config.output_dir} was begun with {number} processes, not {launched}"
            raise RunError(f"{found}; launch {number}, or give elastic: true")
        return number, [f"{how}, and goes on with as many"]
    require_shareable(plan, number, launched or number)
    # Every step of every stage has to be shared out evenly.
    steps = [settings.gradient_accumulation_steps * number for settings in _to_come(plan, number)]
    others = [str(each) for each in range(1, math.gcd(*steps) + 1) if math.gcd(*steps) % each == 0]
    return number, [f"{how}, and goes on with {', '.join(others)}" if steps else f"{how}, and is complete"]


def _to_come(plan: Plan, processes: int) -> list[StageConfig]:
    folder = Path(plan.config.output_dir)
    found = [(stage.settings, folder / stage.path) for stage in stages(plan, processes)]
    return [settings for settings, place in found if settings is not None and not is_complete(place)]
