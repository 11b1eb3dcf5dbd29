"""Methods under matched conditions, as runs: a run's YAML with a group `compare` beside its own keys.

    comparison = load_comparison("quickstart", ["compare.methods=[glmd, kd, pkd]"])
    for arm in comparison.arms: ...        # each a RunConfig of its own

From names and numbers alone: no model, tokenizer or text is read.
"""

import copy
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from glmd.config import ControlsConfig, RunConfig
from glmd.config_file import config_of, read_values, set_dotted, to_dict
from glmd.distillation.methods import load_method
from glmd.errors import ConfigError, suggestion
from glmd.planning.teacher_rules import passes
from glmd.stage_config import require
from glmd.strict_yaml import build, load_yaml, named_file

# Methods that learn from labels alone, and how the table calls them.
CONTROL_METHODS = {
    "hard": "hard labels, pretrained without distillation",
    "hard-no-pretraining": "hard labels, not pretrained",
}
# Keys that are the same for all, or that the comparison sets.
NOT_IN_GRID = (
    *("compare", "controls", "method", "output_dir", "seeds", "sweep", "updates_of"),
    *("tasks", "untrained_tasks", "data", "data.superglue", "data.synthetic"),  # of other val sets scores are no match
)


@dataclass(frozen=True)
class CompareConfig:
    """What is compared. All else of the YAML is a run's, and the same for all."""

    methods: list[str] = field(default_factory=list)  # by name or path
    # The one whose difference to each is shown, which has the controls and whose updates all have; None: the first
    reference: str | None = None
    # Methods of labels alone, as controls: pretrained without distillation, and not pretrained
    control_methods: list[str] = field(default_factory=lambda: list(CONTROL_METHODS))
    # dotted key of the run -> values: all is done at every combination, {vocabulary.keep_ratio: [0.5, 0.25]}
    grid: dict[str, list[Any]] = field(default_factory=dict)
    # setting -> values, of each method's last stage on a task: the best combination on val is shown, which flatters all
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    # matched: over each task all methods have as many updates as the reference; own: as their stages' settings say
    budget: Literal["matched", "own"] = "matched"

    def __post_init__(self) -> None:
        require(len(self.methods) > 0, "methods is missing; name them, compare.methods=[glmd, kd]")
        both = [*self.methods, *self.control_methods]
        for name in both:
            require(both.count(name) == 1, f"methods and control_methods name {name} twice; keep one")
        for name in map(method_name, both):
            is_taken = not name or name.startswith(("teacher", "best constant answer")) or ": " in name
            require(not is_taken, f"methods names {name!r}, as rows of the table are called; rename it")
        names = [method_name(each).lower() for each in both]
        for name in names:
            require(names.count(name) == 1, f"methods has two of the name {name}; keep one, or rename a file")
        if self.reference is not None and self.reference not in self.methods:
            near = suggestion(self.reference, self.methods)
            raise ConfigError(f"reference {self.reference} is none of methods{near}")
        for key, values in self.grid.items():
            top = key if key.startswith("data") else key.partition(".")[0]
            if top in NOT_IN_GRID:
                instead = {"seeds": "give seeds", "sweep": "give compare.sweep", "method": "give compare.methods"}
                raise ConfigError(f"grid.{key} cannot vary; {instead.get(top, 'remove it')}")
            require(len(values) > 1, f"grid.{key} must list two or more values, got {values}")
            require(all(values.count(each) == 1 for each in values), f"grid.{key} has a value twice: {values}")


@dataclass(frozen=True)
class Arm:
    """One run of a comparison. kind: "control" where it learns from labels alone. point: of the grid, key -> value.

    is_reference: that its point's others are compared with. problems: task -> why the method cannot do it.
    """

    name: str
    kind: Literal["method", "control"]
    point: dict[str, Any]
    is_reference: bool
    config: RunConfig
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def without(self, problems: dict[str, str]) -> "Arm":
        """The arm that leaves tasks untrained, for these reasons."""
        return replace(self, problems=problems, config=replace(self.config, untrained_tasks=[*problems]))


@dataclass(frozen=True)
class Comparison:
    """arms: the reference first at each point of the grid. reference: its name at the first point.

    record: what the folder was begun with, and has to stay.
    """

    folder: Path
    settings: CompareConfig
    arms: list[Arm]
    reference: str
    record: dict[str, Any]


def load_comparison(
    path: str | Path | Mapping[str, Any] | None = None,
    overrides: str | Iterable[str] | Mapping[str, Any] = (),
    **changes: Any,
) -> Comparison:
    """Read a comparison's YAML, or any run's with `compare.methods` among the overrides, as `load_config` does.

    Raises ConfigError, one line.
    """
    file, values, keys = read_values(path, overrides, **changes)
    compare = _group(values.pop("compare", None), file)
    for name, instead in (("method", "compare.methods"), ("updates_of", "compare.budget")):
        require(not values.get(name), f"{file}: {name} has no effect in a comparison; give {instead}")
    reference = compare.reference or compare.methods[0]
    methods = {name: load_method(name) for name in [*compare.methods, *compare.control_methods]}
    sweep = _sweep(values.pop("sweep", None), compare, passes(methods[reference])[-1:], file)
    common = _plain_config(values, methods, file, keys)
    require(bool(common.tasks), f"{file}: tasks is empty; methods are compared by their scores on tasks: name one")
    ordered = [reference, *(name for name in methods if name != reference)]
    points = [dict(zip(compare.grid, each, strict=True)) for each in itertools.product(*compare.grid.values())]
    arms: list[Arm] = []
    for point, method in itertools.product(points, ordered):
        own = copy.deepcopy(values)
        for key, value in point.items():
            set_dotted(own, key, copy.deepcopy(value))
        where = f"{file}: compare.grid at {_told(point)}" if point else file
        _plain_config(own, methods, where, keys)
        is_matched = compare.budget == "matched" and method != reference
        with_stages_of = [methods[method], *([methods[reference]] if is_matched else [])]
        own["stages"] = {
            name: given
            for name, given in (own.get("stages") or {}).items()
            if any(name in each for each in with_stages_of)
        }
        _set_controls(own, is_reference=method == reference)
        own |= {"method": method, "updates_of": reference if is_matched else None}
        own["output_dir"] = str(Path(common.output_dir) / "runs" / _slug(method, point))
        if sweep and passes(methods[method]):
            own["sweep"] = {passes(methods[method])[-1]: dict(sweep)}
        kind: Literal["method", "control"] = "control" if method in compare.control_methods else "method"
        arm = Arm("", kind, point, method == reference, config_of(own, where, keys))
        is_new = all(record_of(each.config, whole=True) != record_of(arm.config, whole=True) for each in arms)
        if is_new:
            arms.append(replace(arm, name=_name(arm, compare)))
        elif kind == "method":
            raise ConfigError(f"compare.grid at {_told(point)} changes nothing for {method}; take one of both out")
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names), "values are shown whole where their names are alike"
    compare = replace(compare, sweep=sweep)
    first = {"first seed": common.seeds[0]}  # with which the teachers of tasks are fine-tuned
    record = {"compare": {"budget": compare.budget, "sweep": sweep, **first}, "config": record_of(common)}
    return Comparison(Path(common.output_dir), compare, arms, arms[0].name, record)


def _plain_config(values: dict[str, Any], methods: Mapping[str, Any], file: str, keys: Iterable[str]) -> RunConfig:
    """The run that all arms have in common. Refuses values of wrong types, and settings of stages that none has."""
    known = {stage for method in methods.values() for stage in method}
    for name in ("stages", "controls"):
        given = values.get(name)
        require(given is None or isinstance(given, dict), f"{file}: {name} must be a mapping of keys, got {given!r}")
    for stage in values.get("stages") or {}:
        require(stage in known, f"{file}: stages.{stage} is a stage of none of the methods{suggestion(stage, known)}")
    plain = copy.deepcopy(values) | {"stages": {}}
    return config_of(plain, file, keys)


def _name(arm: Arm, compare: CompareConfig) -> str:
    """What the table calls an arm: its method, and where a point of the grid is."""
    method = arm.config.method
    name = CONTROL_METHODS.get(method, method_name(method)) if arm.kind == "control" else method_name(method)
    for key, value in arm.point.items():
        # By the last part of a path, unless that of another value is the same.
        short = [_shown(other) for other in compare.grid[key]].count(_shown(value)) == 1
        name += f", {_key(key, arm.point)} {_shown(value) if short else value}"
    return name


def _told(point: Mapping[str, Any]) -> str:
    """A point of the grid for a refusal."""
    return ", ".join(f"{key}={value}" for key, value in point.items())


def _group(given: Any, file: str) -> CompareConfig:
    """The group `compare`: its keys, or the name of a YAML of them in configs/comparisons, or the path of one."""
    where = f"{file}: compare"
    given = {} if given is None else given
    if isinstance(given, str):
        found = named_file("comparisons", given)
        given, where = load_yaml(found), str(found)
    if isinstance(given, dict) and "of" in given:
        found = named_file("comparisons", str(given["of"]))
        given = load_yaml(found) | {key: value for key, value in given.items() if key != "of"}
    if isinstance(given, dict) and isinstance(given.get("grid"), dict):
        given = {**given, "grid": _flat(given["grid"])}
    return build(CompareConfig, given, where=where)


def _sweep(given: Any, compare: CompareConfig, last: list[str], file: str) -> dict[str, list[Any]]:
    """What is swept of each method's last stage: a run's own sweep of the reference's means that too."""
    if given is None or given == {}:
        return compare.sweep
    if compare.sweep or not isinstance(given, dict) or list(given) != last:
        raise ConfigError(
            f"{file}: sweep is of stages that not all methods have; give compare.sweep, of settings of each one's last"
        )
    return build(CompareConfig, {"methods": ["glmd"], "sweep": given[last[0]]}, where=file).sweep


def method_name(method: str) -> str:
    """A method by name or path, as tables call it."""
    return Path(method).stem if method.endswith((".yaml", ".yml")) else method


def _set_controls(values: dict[str, Any], *, is_reference: bool) -> None:
    """All controls for the reference but those that the YAML turns off, none for others."""
    given, vocabulary = values.get("controls") or {}, values.get("vocabulary") or {}
    is_whole = vocabulary.get("keep_ratio") == 1
    wanted = {name: is_reference and given.get(name, True) for name in vars(ControlsConfig())}
    if is_whole:
        wanted |= {"full_vocabulary": False, "trim_only": False, "trim_after": False}
    if "trim_after" not in given:
        wanted["trim_after"] = wanted["trim_after"] and wanted["full_vocabulary"]
    tasks = values["tasks"].values() if isinstance(values["tasks"], dict) else ()
    if any((changes or {}).get("inputs") for changes in tasks):
        wanted["hard_labels"] = given.get("hard_labels", True)  # with it labeled texts count for the vocabulary
    values["controls"] = wanted


def _flat(grid: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A grid by dotted keys, whether it was given by these or in groups."""
    found: dict[str, Any] = {}
    for key, value in grid.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def record_of(config: RunConfig, *, whole: bool = False) -> dict[str, Any]:
    """What of a run all arms of a comparison have alike; whole: all but where it lies, and its controls."""
    if whole:
        return {key: value for key, value in to_dict(config).items() if key not in ("output_dir", "controls")}
    varied = ("method", "output_dir", "controls", "seeds", "stages", "sweep", "updates_of")
    return {key: value for key, value in to_dict(config).items() if key not in varied}


def _key(key: str, point: Mapping[str, Any]) -> str:
    """The last part of a dotted key where it tells it from others."""
    short = key.rpartition(".")[2]
    return short if [each.rpartition(".")[2] for each in point].count(short) == 1 else key


def _shown(value: Any) -> str:
    """A value for people: of a path its name."""
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _slug(method: str, point: Mapping[str, Any]) -> str:
    """The name of an arm's folder, that of no other arm."""
    name = ",".join([method_name(method), *(f"{key}={_shown(value)}" for key, value in point.items())])
    plain = re.sub(r"[^A-Za-z0-9_.,=-]+", "_", name)[:120]
    whole = repr([str(named_file("methods", method)) if method_name(method) != method else method, *point.items()])
    is_exact = plain == name and not any(isinstance(value, str) and "/" in value for value in point.values())
    return plain if is_exact else f"{plain}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"
