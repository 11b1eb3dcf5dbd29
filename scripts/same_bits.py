"""Whether two checkouts of glmd train the same students: every weight file byte for byte, results but for renamed keys.

    python scripts/same_bits.py OLD NEW                         # the quickstart, in one process and in two
    python scripts/same_bits.py OLD NEW pretraining.max_steps=20 task_teacher.max_steps=20 --keep FOLDER

OLD and NEW are folders of checkouts; both run with this python, on one thread. What lies in FOLDER is not made again.
Overrides are spelled as NEW spells them. Exit code 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What 0.1.0 called otherwise, in the order in which it is replaced: folders, keys of results, and of configs.
RENAMED = {
    r"^synthetic\b": "world",
    r"(tasks/[^/]+)/task_teacher\b": r"\1/teacher",
    r"/task_lm(/|$)": r"/words\1",
    r"/task_soft_labels(/|$)": r"/labels\1",
    r"\btask_lm\.": "task_words.",  # folders of grid points
    r"\btask_soft_labels\.": "task_labels.",
}
OLD_KEYS = {"task_lm": "task_words", "task_soft_labels": "task_labels", "data.synthetic": "data.world"}
OLD_STAGES = {"task_soft_labels": "labels", "task_lm": "task_words"}
OLD_RESULTS = {"lm_scores": "words", "lm_scores_before": "words_before", "grid_point": "cell"}
OLD_TERMS = {"lm_logits": "word_logits", "lm_labels": "word_labels"}
# What differs from run to run, and what only one of them has.
IGNORED = {"seconds", "tokens_per_second", "glmd", "ordinary", "of", "exports_verified", "stock"}


def old_path(path: str) -> str:
    for new, old in RENAMED.items():
        path = re.sub(new, old, path)
    return path


def is_old(checkout: Path) -> bool:
    return not (checkout / "glmd" / "planning").is_dir()


def run(checkout: Path, folder: Path, processes: int, overrides: list[str]) -> Path:
    """The folder of a finished run of the checkout."""
    if (folder / "results.json").is_file():
        return folder
    if is_old(checkout):
        for new, old in OLD_KEYS.items():
            overrides = [re.sub(rf"\b{re.escape(new)}\b", old, each) for each in overrides]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "glmd"]
    if processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "glmd"]
    command = [*launch, "run", "quickstart", f"output_dir={folder}", *overrides]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return folder


def weights(folder: Path, *, rename: bool) -> dict[str, str]:
    """sha256 of every weight file below a run, by the path that 0.1.0 would have given it."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        found[old_path(name) if rename else name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def rows(folder: Path, *, rename: bool) -> list[Any]:
    """The rows of results.json with the keys of 0.1.0."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    return sorted((as_before(row) if rename else without(row) for row in found), key=json.dumps)


def without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without(each) for key, each in sorted(value.items()) if key not in IGNORED}
    return value


def as_before(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    found = {}
    for key, value in row.items():
        name = OLD_RESULTS.get(key, key)
        for new, old in (OLD_TERMS | OLD_KEYS).items():
            name = name.replace(new, old)
        found[name] = OLD_STAGES.get(value, value) if key == "stage" else as_before(value)
    return without(found)


def differences(old: Path, new: Path, *, rename: bool) -> list[str]:
    ours, theirs = weights(new, rename=rename), weights(old, rename=False)
    found = [f"{name}: only in one" for name in sorted(ours.keys() ^ theirs.keys())]
    found += [f"{name}: other bytes" for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]
    pairs = zip(rows(old, rename=False), rows(new, rename=rename), strict=False)
    return found + [f"results.json: {each}" for a, b in pairs for each in leaves(a, b)]


def leaves(old: Any, new: Any, path: str = "") -> list[str]:
    """`path: old -> new` of everything that differs in two plain values."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted({*old, *new}) for line in leaves(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--keep", type=Path, help="where the runs lie, to be used again (default: thrown away)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    is_same = True
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        for processes in options.processes:
            folders = []
            for name, checkout in (("old", options.old.resolve()), ("new", options.new.resolve())):
                folders.append(run(checkout, (root / f"{name}-{processes}").resolve(), processes, options.overrides))
            renames = is_old(options.old) and not is_old(options.new)
            found = differences(*folders, rename=renames)
            number = len(weights(folders[0], rename=False))
            print(f"{processes} process(es): {number} weight files, {len(found)} differences", *found, sep="\n  ")
            is_same &= not found
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
