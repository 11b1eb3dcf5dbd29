"""YAML and typed values, strictly: what a file says is what the program gets, or one line says why not.

Duplicate keys, unknown keys, aliases and oversized files are errors; `1e-4` is a float.

    settings = build(StageConfig, load_yaml(path), where="run.yaml: pretraining")
"""

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from glmd.errors import ConfigError, suggestion

MAX_BYTES = 1_000_000
T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and aliases, and reads `1e-4` as a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError(f"line {mark.line + 1}: aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"line {line}: key {key!r} is not text; quote it")
            if key in seen:
                raise ConfigError(f"line {line}: key {key!r} stands twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes no, off and yes for truth values; `mixed_precision: no` and a label `yes` mean the words.
_BOOL = "tag:yaml.org,2002:bool"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which the loader would read as a number."""


# YAML 1.1 wants a dot in a float, so PyYAML reads 1e-4 as text. The JSON-like rule below is what people mean.
for _each in (_StrictLoader, _StrictDumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
        list("-+0123456789."),
    )


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads back to equal values, in their order."""
    return yaml.dump(values, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=1000)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document. Raises ConfigError that begins with `where`."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{place}: not valid YAML ({reason})") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file. Raises ConfigError naming the file (and line)."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: a configuration has at most {MAX_BYTES} bytes")
    try:
        value = parse_yaml(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is needed, got {_kind(value)}")
    return value


def build(cls: type[T], values: Any, where: str) -> T:
    """Make the dataclass `cls` from a mapping, checking every key and type.

    A class may define `shorthand(value)` to accept something other than a mapping. Raises ConfigError
    that begins with `where` and the dotted key.
    """
    if isinstance(values, cls):
        return values
    if hasattr(cls, "shorthand"):
        values = cls.shorthand(values)  # type: ignore[attr-defined]
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a mapping is needed, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        place = _join(where, key)
        if key not in names:
            raise ConfigError(f"{place} is unknown{suggestion(str(key), names)}")
        arguments[key] = coerce(hints[key], value, place)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and field.name not in arguments:
            raise ConfigError(f"{_join(where, field.name)} is missing")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{_join(where, str(error))}") from None


def coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, without guessing: an int may become a float, nothing else changes."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(hint, value, where)
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        # 1 == True in Python, so the type is compared too.
        if not any(value == option and type(value) is type(option) for option in allowed):
            raise ConfigError(f"{where} must be one of {', '.join(map(str, allowed))}; got {value!r}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return origin(coerce(item, each, f"{where}[{i}]") for i, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a mapping, got {value!r}")
        item = typing.get_args(hint)[1]
        return {key: coerce(item, each, _join(where, key)) for key, each in value.items()}
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint in (int, float) and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {_NAMES.get(hint, hint)}, got {value!r}")


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _coerce_union(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return coerce(option, value, where)
        except ConfigError as error:
            errors.append(str(error))
    # Of several refusals the one for the kind of value that was given is the useful one.
    raise ConfigError(errors[-1] if isinstance(value, (dict, list)) else errors[0])


def _join(where: str, key: str) -> str:
    if not where:
        return key
    return f"{where} {key}" if where.endswith(":") else f"{where}.{key}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def configs_root() -> Path:
    """The folder with `methods/`, `tasks/`, `runs/`."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def named_file(kind: str, name: str) -> Path:
    """The YAML of a built-in `kind` (methods, tasks, runs), or the user's own file if `name` is a path.

    Built-in names are compared without case. Raises ConfigError with the nearest name.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{name}: no such file")
        return path
    known = {path.stem: path for path in sorted((configs_root() / kind).glob("*.yaml"))}
    for stem, path in known.items():
        if stem.lower() == name.lower():
            return path
    if Path(name).exists():
        what = "a folder" if Path(name).is_dir() else "a file of another name"
        raise ConfigError(f"{name} is {what}; give a .yaml file, or the name of one in configs/{kind}")
    raise ConfigError(f"{kind[:-1]} {name!r} is unknown{suggestion(name, known)}")
