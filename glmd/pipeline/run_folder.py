"""A run on disk: one folder, one run at a time, and a record of every stage that says what it was made from.

    with run_folder.lock():
        result = run_folder.complete(place, inputs, work)     # runs `work` once, ever

Only the main process reads and writes records; all ranks decide alike.
"""

import gc
import json
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from glmd.config import GROWING, RunConfig
from glmd.config_file import differences, dump_config, load_config, to_dict
from glmd.errors import ConfigError, RunError
from glmd.models.loading import model_fingerprint
from glmd.planning.rules import with_dtype
from glmd.runtime.phases import phase
from glmd.runtime.processes import is_main, on_main
from glmd.storage import describe_files, files_problem, link_files, locked, write_atomically, write_problem

logger = logging.getLogger(__name__)

# Keys that say how a run is watched and kept, not what it computes: and how much is tolerated, which a run that stopped
# at a bad example is continued with, or what memory is saved, with which one continues that had not enough.
WATCHING_KEYS = (
    "*.logging_steps",
    "*.save_steps",
    "*.save_total_limit",
    "*.per_device_eval_batch_size",
    "*.skip_nonfinite",
    "*.gradient_checkpointing",
)
# Keys that add to a run, or change where and with how many workers it runs. A task cannot be added: the vocabulary
# counts its text. Whether a stage learns from a cache is in its own record; where that lies makes no difference.
GROWING_KEYS = (
    *WATCHING_KEYS,
    "output_dir",
    *GROWING,
    "report_to",
    "dataloader_num_workers",
    "cuda_graphs",
    "elastic",
    "teacher.cache",
    "teacher.cached_stages",
)
COMPARISON = "comparison.yaml"  # what lies in the folder of a comparison
# What may lie in a folder before its run has begun.
BEFORE_THE_RUN = {"lock", "synthetic", "config.yaml.tmp"}
# What lies in a stage's folder and is not its result: its own record, and the way there.
ON_THE_WAY = ("stage.json", "checkpoints", "best")
# A model card is its reader's to edit.
FREE_TO_CHANGE = "README.md"


def with_dtype_of(config: RunConfig) -> RunConfig:
    """The config with `teacher.dtype: auto` decided: as the run in its folder was begun with, else for this machine."""
    recorded, found = Path(config.output_dir) / "config.yaml", None
    with suppress(ConfigError, OSError):  # `require_free_folder` says so
        if config.teacher.dtype == "auto" and recorded.is_file():
            found = load_config(recorded).teacher.dtype
    return with_dtype(config, None if found == "auto" else found)


def require_free_folder(config: RunConfig) -> Path:
    """The run folder, if it can be written and is empty or holds this run.

    Raises RunError naming what is in the way, or every setting that differs.
    """
    folder = Path(config.output_dir)
    problem = write_problem(folder)
    if problem is not None:
        raise RunError(f"output_dir {config.output_dir} {problem}; choose another".replace("\0", "\\0"))
    if (folder / COMPARISON).is_file():
        raise RunError(f"output_dir {folder} holds a comparison, which `glmd compare` goes on with; choose another")
    if not folder.exists() or {path.name for path in folder.iterdir()} <= BEFORE_THE_RUN:
        return folder
    recorded = folder / "config.yaml"
    if not recorded.exists():
        if not (folder / "lock").is_file():
            raise RunError(f"output_dir {folder} is not empty and holds no run; choose another output_dir")
        return folder  # a run that lost its config: what each stage was made from is in its own record
    try:
        old, new = to_dict(load_config(recorded)), to_dict(config)
    except ConfigError as error:
        raise RunError(f"{error}; delete {recorded}, and each stage is compared by its own record") from None
    changed = differences(old, new, ignore=[*GROWING_KEYS, *_numbers_of_steps(old)])
    if changed:
        raise RunError(
            f"output_dir {folder} holds another run ({'; '.join(changed)}); choose another, or change it back"
        )
    return folder


class RunFolder:
    """The folder of a run, as all ranks see it. `left` is what its complete stages left, by the stage's folder.

    siblings: folders of other runs. A stage that is complete in one of them, made from the same inputs, is not made
    again.
    """

    def __init__(self, path: Path, siblings: Sequence[Path] = ()) -> None:
        self.path, self.siblings = path, siblings
        self.left: dict[Path, dict[str, dict[str, Any]]] = {}
        self._fingerprints: dict[tuple[str, str | None], str] = {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this run. Raises RunError naming the process that has it."""

        def refuse(holder: str) -> None:
            raise RunError(f"output_dir {self.path} is in use by {holder}")

        def take() -> None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = f"cannot be written ({error.strerror})"
                raise RunError(f"output_dir {self.path} {reason}; choose another") from None
            held.enter_context(locked(self.path / "lock", refuse))

        with ExitStack() as held:
            on_main(take)
            yield

    def record_config(self, config: RunConfig) -> None:
        on_main(lambda: write_atomically(self.path / "config.yaml", dump_config(config)))

    def name(self, place: Path) -> str:
        """A stage's folder as it is called in logs: tasks/RTE/seed-0/task_lm."""
        return place.relative_to(self.path).as_posix()

    def complete(self, place: Path, inputs: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`work()`, or its recorded result if the stage is complete.

        inputs: everything the result depends on. A stage that was begun from other inputs is refused with a
        field-by-field difference, but for more steps that change none that was made; one that was interrupted is
        begun again and finds its own checkpoints; one that is complete, but whose files are not what it left, is
        refused with the folder to delete.
        """
        path = place / "stage.json"
        inputs = json.loads(json.dumps(inputs))
        record = on_main(lambda: _read_record(path) or self._taken_over(place, inputs))
        if record is not None:
            is_longer = not record["complete"] and only_goes_on(record["inputs"], inputs)
            ignore = [*WATCHING_KEYS, *(["stage.max_steps"] if is_longer else [])]
            changed = differences(record["inputs"], inputs, ignore=ignore)
            if changed:
                found = f"{place} was made from other inputs ({'; '.join(changed)})"
                raise RunError(f"{found}; change them back, or delete {place} to make it again")
            if record["complete"]:
                with phase("files"):
                    problem = on_main(lambda: files_problem(place, record["files"]))
                if problem:
                    found = f"{place} is not what the complete stage left ({problem})"
                    raise RunError(f"{found}; delete {place} to make it again")
                self.left[place] = record["files"]
                self._forget_the_way(place)  # a kill may have come before it was
                logger.info("%s: complete, skipped", self.name(place))
                result: dict[str, Any] = record["result"]
                return result
        self._write(path, {"complete": False, "inputs": inputs})
        began = time.monotonic()
        result = work()
        result["seconds"] = round(time.monotonic() - began, 1)
        commit = on_main(code_commit)
        result |= {"commit": commit} if commit else {}
        with phase("files"):
            self.left[place] = on_main(lambda: _result_files(place))
        self._write(path, {"complete": True, "inputs": inputs, "result": result, "files": self.left[place]})
        gc.collect()  # models hold themselves in cycles: gigabytes that would stay for the next stage
        self._forget_the_way(place)
        return result

    def _taken_over(self, place: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a sibling's stage of the same name and inputs, whose files are then here too; None without."""
        for sibling in self.siblings:
            source = sibling / place.relative_to(self.path)
            try:
                record = _read_record(source / "stage.json")
            except RunError:  # which that run will say
                continue
            if record is None or not record["complete"] or differences(record["inputs"], inputs, ignore=WATCHING_KEYS):
                continue
            if files_problem(source, record["files"]):
                continue
            cards = [each.relative_to(source).as_posix() for each in source.rglob(FREE_TO_CHANGE)]
            link_files(source, place, record["files"])
            for name in cards:  # of its own, which may be edited
                (place / name).write_bytes((source / name).read_bytes())
            write_atomically(place / "stage.json", json.dumps(record, indent=1))
            logger.info("%s: taken from %s, which made it from the same", self.name(place), sibling)
            return record
        return None

    def _forget_the_way(self, place: Path) -> None:
        """What a finished stage leaves is its model; the way there is no longer needed."""
        if is_main():
            for name in ("checkpoints", "best"):
                shutil.rmtree(place / name, ignore_errors=True)

    def is_complete(self, place: Path) -> bool:
        """Whether a stage will be skipped, or refused."""
        return bool(on_main(lambda: is_complete(place)))

    @phase("files")
    def fingerprint(self, model: str, revision: str | None = None) -> str:
        """`model_fingerprint`, of each model once: many stages start from one, and none changes after its stage.

        What a stage left was hashed as it ended, or as it was found complete.
        """
        if (model, revision) not in self._fingerprints:
            known = {place / name: each["sha256"] for place, files in self.left.items() for name, each in files.items()}
            self._fingerprints[model, revision] = on_main(lambda: model_fingerprint(model, revision, known=known))
        return self._fingerprints[model, revision]

    def _write(self, path: Path, record: dict[str, Any]) -> None:
        on_main(lambda: write_atomically(path, json.dumps(record, indent=1)))


def _numbers_of_steps(config: dict[str, Any]) -> list[str]:
    """The keys of a config that a stage may grow by: its own record decides, when its turn comes."""
    names = ("pretraining", "task_teacher", "task_lm", "task_soft_labels")
    stages = {name: config[name] for name in names} | {"teacher.pretraining": config["teacher"]["pretraining"] or {}}
    # Those of a method's own differ from task_soft_labels.
    own = config.get("stages", {})
    stages |= {f"stages.{name}": {**config["task_soft_labels"], **changes} for name, changes in own.items()}
    return [f"{name}.max_steps" for name, stage in stages.items() if _is_steady(stage)]


def _is_steady(stage: dict[str, Any]) -> bool:
    """Whether the learning rate of a step does not depend on how many there will be."""
    return stage.get("lr_scheduler_type") == "constant" and stage.get("warmup_ratio") == 0


def only_goes_on(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a stage gets more steps, and those that it has made would be the same."""
    before, after = old.get("stage") or {}, new.get("stage") or {}
    were, are = before.get("max_steps") or 0, after.get("max_steps") or 0
    is_fading = old.get("changes", False) or any(isinstance(term["weight"], dict) for term in old.get("terms", []))
    # The end of a stage is scored too: a best checkpoint chosen there would not be one of the longer stage.
    return bool(_is_steady(before) and not is_fading and new.get("selection") == "last" and 0 < were < are)


@cache
def code_commit() -> str:
    """The commit of a checkout that glmd runs from, `+` behind it where files differ; empty where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    found = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            told = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if told.returncode:
            return ""
        found.append(told.stdout.strip())
    return found[0] + ("+" if found[1] else "")


def begun_with(folder: Path) -> tuple[int, str | None] | None:
    """The number of processes that a run's first stage was begun with, and how they shared out the student."""
    records = (_read_record(path) for path in sorted(folder.rglob("stage.json")))
    found = (record["inputs"] for record in records if record and "processes" in record["inputs"])
    return next(((int(inputs["processes"]), inputs.get("sharding")) for inputs in found), None)


def is_complete(place: Path) -> bool:
    """Whether the stage in this folder has ended."""
    record = _read_record(place / "stage.json")
    return record is not None and bool(record["complete"])


def _read_record(path: Path) -> dict[str, Any] | None:
    """A stage's record, or None before it has begun. Raises RunError where it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        groups = [record["inputs"], *([record["result"], record["files"]] if record["complete"] else [])]
        files = record["files"].values() if record["complete"] else ()
        if not all(isinstance(each, dict) for each in [record, *groups]):
            raise TypeError("not the record of a stage")
        if not all({"size", "sha256"} <= each.keys() for each in files):
            raise TypeError("not a list of files")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"cannot be read ({type(error).__name__}: {error})"
        raise RunError(f"{path} {reason}; delete {path.parent} to make the stage again") from None
    return dict(record)


def _result_files(place: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of what a stage left, by name: model folders or vocabulary files, but for model cards."""
    found = [path for path in sorted(place.rglob("*")) if path.is_file() and path.name != FREE_TO_CHANGE]
    wanted = [path for path in found if path.relative_to(place).parts[0] not in ON_THE_WAY and path.suffix != ".tmp"]
    return describe_files(place, wanted)
