"""A Python file of the user's, run with the files beside it that it imports, and what all of them were.

    module, files = run_own_file(Path("my_losses.py"))      # files: {"my_losses.py": sha256, "helpers.py": sha256}

What is run is what was hashed: no bytecode of an earlier file is used, and no module that another folder has under the
same name, or that was imported before a change.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

NOT_THEIRS = {"__main__", "glmd", *sys.stdlib_module_names}


def run_own_file(path: Path) -> tuple[ModuleType, dict[str, str]]:
    """The module of a file, and the sha256 of it and of what was imported from its folder, by their names there.

    The file itself comes first. What is installed is left out. Raises whatever the user's code raises.
    """
    name, beside = f"glmd_own_{path.stem}_{sha256_of(path)[:16]}", _Beside(path.parent)
    spec = importlib.util.spec_from_file_location(name, path, loader=_Read(name, str(path), beside))
    assert spec is not None and spec.loader is not None, "a Python file"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    with _imports_from(beside):
        spec.loader.exec_module(module)
    return module, {Path(os.path.relpath(file, path.parent)).as_posix(): each for file, each in beside.files.items()}


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Beside:
    """Finds a module in one folder before anywhere else, as for a script there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: set[str] = set()
        self.files: dict[str, str] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        root = name.partition(".")[0]
        if root in NOT_THEIRS or (path is not None and root not in self.names):
            return None
        spec = PathFinder.find_spec(name, path or ([str(self.folder)] if self.has(name) else None))
        if spec is None or (path is None and not self.has(name) and not self._is_below(spec)):
            return None
        self.names.add(name)
        if spec.origin is not None:
            is_source = isinstance(spec.loader, SourceFileLoader)
            self.files[spec.origin] = sha256_of(Path(spec.origin))
            spec.loader = _Read(name, spec.origin, self) if is_source else spec.loader
        return spec

    def has(self, name: str) -> bool:
        """Whether a name without dots is one here; a folder without __init__.py gives way to what is installed."""
        here, elsewhere = PathFinder.find_spec(name, [str(self.folder)]), PathFinder.find_spec(name)
        is_installed = elsewhere is not None and elsewhere.origin is not None
        return here is not None and (here.origin is not None or not is_installed)

    def _is_below(self, spec: ModuleSpec) -> bool:
        """Whether what the file put into Python's path itself is in its folder."""
        place = Path(spec.origin or "")
        return place.is_relative_to(self.folder) and not {"site-packages", "dist-packages"} & {*place.parts}


class _Read(SourceFileLoader):
    """Runs the very bytes that are hashed: cached bytecode may be of a file that has changed within its second."""

    def __init__(self, name: str, path: str, beside: _Beside) -> None:
        super().__init__(name, path)
        self.beside = beside

    def get_code(self, fullname: str) -> CodeType:
        data = self.get_data(self.path)
        self.beside.files[self.path] = hashlib.sha256(data).hexdigest()
        code: CodeType = self.source_to_code(data, self.path)
        return code


@contextmanager
def _imports_from(beside: _Beside) -> Iterator[None]:
    """Let modules be found beside, and take them out of Python's table again, with those that were there put back."""
    importlib.invalidate_caches()
    roots = {name.partition(".")[0] for name in sys.modules} - NOT_THEIRS
    roots = {name for name in roots if beside.has(name)}
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in roots}
    for name in before:
        del sys.modules[name]
    sys.meta_path.insert(0, beside)
    try:
        yield
    finally:
        sys.meta_path.remove(beside)
        for name in beside.names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
