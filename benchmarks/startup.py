"""What a run takes that hardly trains: `glmd run` of several checkouts, each in processes of its own, alternating.

    python benchmarks/startup.py --checkout OLD --checkout . MODEL --corpus TEXT --superglue FOLDER --rounds 3
    python benchmarks/startup.py --checkout OLD --checkout .          # the quickstart, two steps a stage

Prints seconds of the wall clock and of all processors, children included: medians, and what each round gave. The phases
are the last run's own account, of checkouts that keep one.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("pretraining", "task_teacher", "task_lm", "task_soft_labels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a masked LM; without one the quickstart is run")
    parser.add_argument("--checkout", action="append", required=True, type=Path)
    parser.add_argument("--corpus", help="with MODEL")
    parser.add_argument("--superglue", help="with MODEL: a folder with RTE")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    words = ["quickstart", "teacher.pretraining.max_steps=2", "data.eval_blocks=8"]
    if options.model is not None:
        words = ["minilm-superglue", f"teacher={options.model}", f"data.corpus={options.corpus}", "tasks={RTE: {}}"]
        words += [f"data.superglue={options.superglue}", "data.eval_blocks=8", "mixed_precision=no"]
        words += [f"{stage}.max_length=32" for stage in STAGES]
    words += [f"{stage}.max_steps=2" for stage in STAGES] + [f"{stage}.num_train_epochs=" for stage in STAGES[1:]]
    words += [f"{stage}.per_device_train_batch_size=2" for stage in STAGES]
    found: dict[Path, list[tuple[float, float]]] = {checkout: [] for checkout in options.checkout}
    for _ in range(options.rounds):
        for checkout, taken in found.items():
            with tempfile.TemporaryDirectory() as folder:
                taken.append(seconds_of(checkout, [*words, f"output_dir={folder}/run"]))
                results = json.loads((Path(folder) / "run" / "results.json").read_text(encoding="utf-8"))
            shown = ", ".join(f"{name} {each:.1f}" for name, each in results.get("seconds", {}).items())
            print(f"{checkout}: {taken[-1][0]:.1f} s, of processors {taken[-1][1]:.1f}; {shown}", flush=True)
    for checkout, taken in found.items():
        wall, processors = (statistics.median(each) for each in zip(*taken, strict=True))
        print(f"{checkout}: median {wall:.1f} s, of processors {processors:.1f}")


def seconds_of(checkout: Path, words: list[str]) -> tuple[float, float]:
    """(wall clock, user and system time) of `glmd run WORDS` with the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "glmd", "run", *words]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: ended with {done.returncode}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, processors


if __name__ == "__main__":
    main()
