"""A run's YAML: read with its defaults and dotted overrides, written back, and compared."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmd.config import (
    ControlsConfig,
    DataConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    VocabularyConfig,
    _pretraining_defaults,
    _task_defaults,
)
from glmd.errors import ConfigError
from glmd.stage_config import StageConfig, require
from glmd.strict_yaml import build, dump_yaml, load_yaml, named_file, parse_yaml
from glmd.task_files import with_held_out


def words_of_file(path: str, field: str) -> list[str]:
    """The words of a text file with one on each line. Raises ConfigError naming the field."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8"
        raise ConfigError(f"{field}: {path} cannot be read ({reason}); give a file with a word a line") from None
    words = [line.strip() for line in lines if line.strip()]
    require(len(words) > 0, f"{field}: {path} holds no word")
    return words


def load_config(
    path: "str | Path | Mapping[str, Any] | RunConfig | None" = None,
    overrides: str | Iterable[str] | Mapping[str, Any] = (),
    **changes: Any,
) -> RunConfig:
    """Read a run's YAML (the embedded default without one) and apply overrides.

        load_config("minilm-superglue", ["pretraining.max_steps=100"], teacher="MODEL")
        load_config({"output_dir": "runs/mine", "teacher": "MODEL", ...})

    path: a file, the name of one in configs/runs, or what would stand in it as a mapping.
    overrides: `key.sub=value` texts (values are YAML), or a mapping of dotted keys to values.
    changes: values of whole top-level keys, `pretraining={"max_steps": 100}`; these win. A Path is taken as its text.
    Raises ConfigError naming file or override, key, value and remedy.
    """
    file, values, keys = read_values(path, overrides, **changes)
    require(
        "compare" not in values,
        f"{file}: compare is of a comparison of methods; `glmd compare` runs it, and `glmd check` shows it",
    )
    return config_of(values, file, keys)


def read_values(
    path: "str | Path | Mapping[str, Any] | RunConfig | None",
    overrides: str | Iterable[str] | Mapping[str, Any],
    **changes: Any,
) -> tuple[str, dict[str, Any], list[str]]:
    """What a config is called, its values as they are given, and the dotted keys of the overrides among them."""
    if isinstance(path, RunConfig):
        file, values = "config", to_dict(path)
    elif isinstance(path, Mapping):
        file, values = "config", {}
        for key, value in path.items():
            set_dotted(values, str(key), _plain(value))
    else:
        found = named_file("runs", str(path) if path is not None else "quickstart")
        file, values = str(found), load_yaml(found)
    texts = [overrides] if isinstance(overrides, str) else overrides
    pairs = list(texts.items()) if isinstance(texts, Mapping) else [_split_override(text) for text in texts]
    for key, value in [*pairs, *changes.items()]:
        set_dotted(values, key, _plain(value))
    return file, values, [key for key, _ in pairs]


def config_of(values: dict[str, Any], file: str, keys: Iterable[str] = ()) -> RunConfig:
    """The config that values make, which are changed. file: to name them by. keys: of overrides, named as such."""
    _fill_stage_defaults(values)
    if isinstance(values.get("tasks"), str):
        values["tasks"] = [values["tasks"]]
    if isinstance(values.get("tasks"), list):
        names = [str(task) for task in values["tasks"]]
        require(len(set(names)) == len(names), f"{file}: tasks names a task twice: {names}")
        values["tasks"] = {name: {} for name in names}
    if isinstance(values.get("tasks"), dict):
        values["tasks"] = {
            task: with_held_out(changes) if isinstance(changes, dict) else changes or {}
            for task, changes in values["tasks"].items()
        }
    if isinstance(values.get("data"), dict) and isinstance(values["data"].get("corpus"), str):
        values["data"]["corpus"] = [values["data"]["corpus"]]
    vocabulary = values.get("vocabulary")
    if isinstance(vocabulary, dict) and isinstance(vocabulary.get("keep_words"), str):
        # The words themselves are recorded with the run: the file may be another one when it is continued.
        words = words_of_file(vocabulary["keep_words"], f"{file}: vocabulary.keep_words")
        values["vocabulary"] = {**vocabulary, "keep_words": words}
    try:
        return build(RunConfig, values, where=f"{file}:")
    except ConfigError as error:
        raise _of_override(str(error), file, keys) from None


def _of_override(message: str, file: str, overrides: Iterable[str]) -> ConfigError:
    """The refusal of a value, which names the override in place of the file where one gave it."""
    place = message.removeprefix(f"{file}: ")
    unknown = place.partition(" is unknown")[0]  # a group of keys, perhaps, of which an override gave one
    is_given = any(re.match(rf"{re.escape(key)}\b", place) or key.startswith(f"{unknown}.") for key in overrides)
    return ConfigError(f"override {place}" if is_given else message)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain values, every default written out."""
    return dataclasses.asdict(config)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return dump_yaml(to_dict(config))


def config_keys(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key a run's YAML may hold; a test freezes this list."""
    keys = []
    for each in dataclasses.fields(cls):
        group = _GROUPS.get(each.name)
        keys += config_keys(group, f"{prefix}{each.name}.") if group else [prefix + each.name]
    return keys


def differences(old: Any, new: Any, *, prefix: str = "", ignore: Sequence[str] = ()) -> list[str]:
    """`key: old -> new` for every leaf that differs between two plain configs, but for ignored keys."""
    lines: list[str] = []
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            path = f"{prefix}.{key}" if prefix else str(key)
            if not _is_ignored(path, ignore):
                lines += differences(old.get(key), new.get(key), prefix=path, ignore=ignore)
    elif _are_alike(old, new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            lines += differences(*pair, prefix=f"{prefix}[{i}]", ignore=ignore)
    elif all(isinstance(each, str) and re.fullmatch("[0-9a-f]{64}", each) for each in (old, new)) and old != new:
        lines.append(f"{prefix} has changed")
    elif old != new:
        lines.append(f"{prefix}: {old!r} -> {new!r}")
    return lines


def _are_alike(old: Any, new: Any) -> bool:
    """Whether both are lists of as many mappings, which can be told apart one by one."""
    both = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    return both and all(isinstance(each, dict) for each in [*old, *new])


def _is_ignored(path: str, ignore: Sequence[str]) -> bool:
    """A pattern without a dot at its start names a whole key; `*.name` names a leaf anywhere."""
    return any(path == p or path.startswith(f"{p}.") or (p.startswith("*.") and path.endswith(p[1:])) for p in ignore)


_STAGE_FIELDS = ("pretraining", "task_teacher", "task_lm", "task_soft_labels")  # fields of RunConfig


_GROUPS: dict[str, type] = {
    "teacher": TeacherConfig,
    "student": StudentConfig,
    "vocabulary": VocabularyConfig,
    "data": DataConfig,
    "controls": ControlsConfig,
    **dict.fromkeys(_STAGE_FIELDS, StageConfig),
}


def _fill_stage_defaults(values: dict[str, Any]) -> None:
    """A stage in YAML changes that stage's own defaults, not those of StageConfig."""
    defaults = {"pretraining": _pretraining_defaults()} | dict.fromkeys(_STAGE_FIELDS[1:], _task_defaults())
    for name, default in defaults.items():
        given = values.get(name)
        if isinstance(given, dict):
            base = dataclasses.asdict(default)
            if given.get("max_steps") is not None or given.get("num_train_epochs") is not None:
                base.update(max_steps=None, num_train_epochs=None)
            values[name] = {**base, **given}


def _plain(value: Any) -> Any:
    """A value as YAML has it: paths as texts, tuples as lists; a copy."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _split_override(text: str) -> tuple[str, Any]:
    if not isinstance(text, str):
        raise ConfigError(f"override {text!r}: write key=value, for example pretraining.max_steps=100")
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
        raise ConfigError(f"override {text!r}: write key=value, for example pretraining.max_steps=100")
    return key, parse_yaml(value, f"override {key}") if value else None


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in values as they stand in a YAML. Raises ConfigError where a parent holds no keys."""
    *parents, leaf = key.split(".")
    for parent in parents:
        if parent == "teacher" and isinstance(values.get(parent), str):
            values[parent] = {"model": values[parent]}
        if parent == "compare" and isinstance(values.get(parent), str):
            values[parent] = {"of": values[parent]}
        if values.get(parent) is None:
            values[parent] = {}
        if isinstance(values[parent], list):
            values[parent] = {str(each): {} for each in values[parent]}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"override {key}: {parent} holds {values!r}, which has no keys")
    if leaf == "teacher" and isinstance(value, str) and isinstance(values.get(leaf), dict):
        # `teacher=PATH` replaces which model it is and keeps how it is loaded.
        values[leaf] = {
            **{k: v for k, v in values[leaf].items() if k not in ("scratch", "pretraining")},
            "model": value,
        }
    else:
        values[leaf] = value
