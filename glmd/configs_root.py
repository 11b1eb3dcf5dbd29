"""Where the YAML files that come with glmd lie: inside the installed package, or beside it in a checkout."""

from pathlib import Path

from glmd.errors import ConfigError
from glmd.strict_yaml import suggestion


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
