"""The stages of a run, in order: each is skipped when it is complete, and continued when it was interrupted.

    results = run("configs/runs/minilm-superglue.yaml", teacher="MODEL")

run folder: config.yaml, log.jsonl, corpus/, vocabulary/, teacher/, pretraining/, tasks/TASK/..., results.json
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from glmd.config import FLOAT16_HEADS, GROWING, RunConfig
from glmd.config_file import differences, load_config, to_dict
from glmd.data.corpus import corpus_fingerprint
from glmd.errors import ConfigError, RunError
from glmd.losses.linear import allow_triton, triton_problem
from glmd.models.export import stranger_ahead
from glmd.models.loading import each_proved_once
from glmd.pipeline.context import Context
from glmd.pipeline.data import open_corpus, warn_of_equal_candidates
from glmd.pipeline.exports import prove_exports
from glmd.pipeline.rows import row_of
from glmd.pipeline.run_folder import RunFolder, require_free_folder, with_dtype_of
from glmd.pipeline.run_stage import run_stage
from glmd.pipeline.teacher_caches import make_caches, refuse_foreign, refuse_stale, require_room, to_come
from glmd.planning.limits import require_sizes_and_room
from glmd.planning.plan import corpus_sources, make_plan
from glmd.planning.stages import TEACHER, Stage
from glmd.reporting.report import best_grid_points, concerns
from glmd.runtime import phases
from glmd.runtime.determinism import (
    NO_EFFECT,
    NO_TF32,
    NOT_PROMISED,
    cublas_workspace,
    has_tensor_float32,
    same_bits,
    tensor_float32,
)
from glmd.runtime.phases import known_objects_set_aside, phase
from glmd.runtime.processes import (
    TRAINING_PATIENCE,
    are_ranks_kept,
    gathered,
    is_main,
    number_of_ranks,
    on_main,
    together,
    wait,
)
from glmd.storage import full_disk_refused, write_atomically
from glmd.training.fsdp import end_sharding, require_sound_launch, take_up_sharding
from glmd.version import __version__

logger = logging.getLogger(__name__)
# Steps before a run's end at which the process that proves its exports begins. It imports for five seconds, and then
# holds some 0.4 GB until it is told the folders.
NEAR_THE_END = 1000


def run(
    config: RunConfig | str | Path | Mapping[str, Any] | None = None, *overrides: str, **changes: Any
) -> dict[str, Any]:
    """Run every stage that is not complete, and return the results (also in results.json).

        run("minilm-superglue", "pretraining.max_steps=100", teacher="MODEL", output_dir="runs/mine")

    config: what `load_config` returns, or takes: a file, the name of one in configs/runs, a mapping. overrides and
        changes: as `load_config` takes them.
    Raises GlmdError with one line for whatever cannot be done; SystemExit 143 or 130 after a signal.
    """
    if not isinstance(config, RunConfig) or overrides or changes:
        config = load_config(config, overrides, **changes)
    return run_beside(config)


def run_beside(config: RunConfig, siblings: Sequence[Path] = ()) -> dict[str, Any]:
    """`run` that makes no stage again which is complete in another run, made from the same.

    siblings: folders of such runs, which nobody works in meanwhile.
    """
    try:
        with phase("rest"), prepared_run(config, siblings=siblings) as context, ExitStack() as held:
            return _run_stages(context, held)
    finally:
        phases.forget()


def _run_stages(context: Context, held: ExitStack) -> dict[str, Any]:
    """`run` of a prepared run. held: what is to end with it."""
    rows, recorded, is_ahead = [], on_main(lambda: _recorded(context)), False
    near = _near_the_end(context)
    for stage in context.stages:
        if stage.path in near and is_main() and not is_ahead:
            held.enter_context(stranger_ahead())  # by the end it has imported what it needs
            is_ahead = True
        warn_of_equal_candidates(context, stage)
        result = complete(context, stage)
        if stage.kind != "vocabulary":
            rows.append(row_of(context.config, stage, result, context.processes))
        if stage.kind == "task_teacher":
            for each in concerns(rows[-1:]):
                logger.warning("%s", each)
        refuse_stale(context, stage.path)
    results: dict[str, Any] = {"glmd": __version__, "parameters": context.plan.parameters, "rows": rows}
    if context.plan.teaches_task_alone:
        results["parameters_of"] = "model of the task"
    results["of"] = {key: to_dict(context.config)[key] for key in GROWING}
    if context.config.sweep:
        results["best_grid_points"] = best_grid_points(results)
    # First the results: a week of training is not lost to a folder that does not load.
    _write_results(context, results | {"exports_verified": False})
    on_main(lambda: prove_exports(context))
    results["exports_verified"] = True
    # Of a start that found everything done, nothing is written: the seconds are those of the last one that did not.
    is_same = {**recorded, "seconds": None} == json.loads(json.dumps(results | {"seconds": None}))
    results["seconds"] = recorded["seconds"] if is_same else on_main(phases.seconds)
    return _write_results(context, results)


def _near_the_end(context: Context) -> list[str]:
    """Paths of the stages to come that begin less than so many steps, or three stages, before the run's end."""
    near: list[str] = []
    steps = 0
    for stage in reversed([each for each in context.stages if not context.is_complete(each)]):
        steps += stage.settings.steps(len(stage.examples), context.processes) if stage.settings is not None else 0
        if len(near) >= 3 and steps > NEAR_THE_END:
            break
        near.append(stage.path)
    return near


def _recorded(context: Context) -> dict[str, Any]:
    """The results of the run's last start; empty where it wrote none, or they are damaged or of another version."""
    try:
        found = json.loads((context.run_folder.path / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "seconds" in found else {}


def make_cache(config: RunConfig) -> None:
    """Do what a run does up to its `teacher.cache`, and make that. Raises GlmdError, one line."""
    if config.teacher.cache is None:
        raise ConfigError("teacher.cache is missing; give teacher.cache=FOLDER")
    with prepared_run(config, makes_caches=True) as context:
        teachers = {path for stage in context.stages if stage.cached for path in stage.teachers}
        for path in context.language_models:
            make_caches(context, path)
        for stage in context.stages:
            if stage.trains_teacher and (stage.path in teachers or stage.path == TEACHER):
                complete(context, stage)
                make_caches(context, stage.path)


def complete(context: Context, stage: Stage) -> dict[str, Any]:
    """What a stage found, now or when it was run."""
    return context.run_folder.complete(context.folder(stage), context.inputs(stage), lambda: run_stage(context, stage))


def _write_results(context: Context, results: dict[str, Any]) -> dict[str, Any]:
    path = context.run_folder.path / "results.json"
    on_main(lambda: write_atomically(path, json.dumps(results, indent=1)))
    return results


@contextmanager
def prepared_run(config: RunConfig, *, makes_caches: bool = False, siblings: Sequence[Path] = ()) -> Iterator[Context]:
    """A checked run with its corpus, in its folder, which is held as long.

    siblings: as in `run_beside`. makes_caches: all caches of the plan are to be made, not those alone that stages will
        read.
    """
    config = with_dtype_of(config)
    folder = require_free_folder(config)
    with (
        full_disk_refused(folder),
        cublas_workspace(config.deterministic),
        _accelerator(config) as accelerator,
        known_objects_set_aside(),
        each_proved_once(),
    ):
        if config.mixed_precision == "fp16":
            logger.info("mixed_precision fp16: %s", FLOAT16_HEADS)
        if not config.deterministic:
            logger.info(NOT_PROMISED if accelerator.device.type == "cuda" else NO_EFFECT)
        if config.tf32 and not has_tensor_float32(accelerator.device):
            logger.info(NO_TF32)
        _require_one_config(config)
        run_folder = RunFolder(folder, siblings)
        with run_folder.lock():
            with phase("synthetic data"):
                synthetic = _build_synthetic(folder) if config.data.synthetic else None
            with phase("checks"):
                plan = together(lambda: make_plan(config, synthetic=synthetic, hash_corpus=False, try_out=is_main()))
                on_main(lambda: require_sizes_and_room(plan, synthetic, number_of_ranks()))
                sources = corpus_sources(config, synthetic)
                if sources:  # of which one process reads all
                    plan = replace(plan, corpus=on_main(lambda: corpus_fingerprint(sources)))
            run_folder.record_config(config)
            if config.report_to:  # not before: a tracker's files would make the folder of a refused run a foreign one
                accelerator.init_trackers("glmd")
            context = Context(plan, run_folder, accelerator)
            refuse_foreign(context)
            open_corpus(context, synthetic)
            for path in context.language_models:
                refuse_stale(context, path)
            require_room(context, context.stages if makes_caches else to_come(context))
            yield context


@contextmanager
def _accelerator(config: RunConfig) -> Iterator[Accelerator]:
    """Accelerate's state for this run, and torch's as it is wanted."""
    with phase("device"):
        accelerator = _open_device(config)
    try:
        with same_bits(accelerator.device, config.deterministic), tensor_float32(accelerator.device, config.tf32):
            yield accelerator
    finally:
        if are_ranks_kept():
            for tracker in accelerator.trackers:
                tracker.finish()
        else:
            accelerator.end_training()
        end_sharding(accelerator)
        AcceleratorState._reset_state()  # else the next run of this process could have no other mixed_precision


def _open_device(config: RunConfig) -> Accelerator:
    """Meet the other ranks. Refuses N launched processes that did not become N ranks."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        # Its launcher for one process is given a port only where more were asked for.
        raise RunError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu; "
            "launch as in docs/multi-gpu.md"
        )
    require_sound_launch(os.environ, config.mixed_precision, compiles=config.torch_compile)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            log_with=list(config.report_to) or None,
            project_dir=config.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TRAINING_PATIENCE)],
        )
    except ValueError as error:  # ranks that cannot meet, or a precision or tracker that this machine has not
        _require_ranks(launched, 1 if "MASTER_ADDR" in str(error) else launched)
        raise ConfigError(f"mixed_precision {config.mixed_precision}, report_to {config.report_to}: {error}") from None
    _require_ranks(launched, accelerator.num_processes)
    wait()
    _agree_on_kernels(accelerator.device)
    take_up_sharding(accelerator, os.environ)
    torch.zeros(1, device=accelerator.device)  # a GPU is opened by its first tensor
    return accelerator


def _require_one_config(config: RunConfig) -> None:
    """Refuse ranks that were launched with different configs, which would wait for one another."""
    first, *others = gathered(to_dict(config))
    for rank, theirs in enumerate(others, start=1):
        changed = differences(first, theirs)
        if changed:
            raise RunError(
                f"rank {rank} was given another config than rank 0 ({'; '.join(changed)}); give all the same"
            )


def _agree_on_kernels(device: torch.device) -> None:
    """Run the loss in one way on all ranks: one that has only the slow one would have the others wait."""
    allow_triton(True)
    if device.type != "cuda" or number_of_ranks() == 1:
        return
    mine = [triton_problem(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for rank, problems in enumerate(gathered(mine)):
        for problem in filter(None, problems):
            allow_triton(False)
            logger.warning("Triton does not work on rank %d (%s): the loss runs in plain torch on all", rank, problem)


def _require_ranks(launched: int, ranks: int) -> None:
    if ranks != launched:
        found = f"{launched} processes were launched, but they are {ranks} ranks"
        raise RunError(f"{found}; launch as in docs/multi-gpu.md") from None


def _build_synthetic(folder: Path) -> Path:
    from glmd.data.synthetic import build_synthetic

    place = folder / "synthetic"

    def build() -> None:
        for leftover in folder.glob(".synthetic-*"):  # of a start that was killed; the folder is locked for this one
            shutil.rmtree(leftover)
        build_synthetic(place)

    on_main(build)
    return place
