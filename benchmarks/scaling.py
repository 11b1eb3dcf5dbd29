"""The cost of a training step, and of its loss alone, against length, vocabulary, batch, student and processes.

    python benchmarks/scaling.py --rounds 5 --picture docs/images/scaling.svg
    python benchmarks/scaling.py --axes processes --rounds 3

One size is changed at a time, the others stay those of the base. At each point the naive loop of step.py and our step
with and without bfloat16 alternate in one process; blocks are full, as those of a corpus are. "processes" shares one
global batch out to one process, by accumulation, and to two, by DDP over gloo, in launches that alternate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from linear_loss import resident_extra_mib
from step import Shape, make_variants

BASE = Shape(teacher_layers=6, student_layers=3, hidden_size=384, batch=8, length=128, pad=0.0, keep_ratio=0.5)
AXES: dict[str, tuple[str, list[Any]]] = {
    "length": ("tokens of a text", [32, 64, 128, 256]),
    "keep_ratio": ("share of words kept", [0.1, 0.25, 0.5, 1.0]),
    "batch": ("texts of a batch", [2, 8, 16]),
    "student_layers": ("layers of the student", [1, 3, 6]),
}
VARIANTS = ("naive fp32", "ours fp32", "ours bf16")
Row = dict[str, Any]  # axis, value, variant, step and loss in ms, peak in MiB


def measure(axis: str, value: Any, rounds: int, clock: Callable[[], float]) -> list[Row]:
    """A row for each variant at one point."""
    shape = replace(BASE, **{axis: value})
    peaks: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        variants = make_variants(shape, list(VARIANTS), clock, rounds, Path(folder))
        for number in range(rounds + 1):
            for name, variant in variants.items():
                variant.watch.step(variant.run)
                if number == 0:
                    peaks[name] = resident_extra_mib(partial(variant.watch.step, variant.run))
                    del variant.watch.steps[-1]
    point = {"axis": axis, "value": value}
    ms = {name: {key: 1000 * each.watch.median(key) for key in ("step", "loss")} for name, each in variants.items()}
    return [point | {"variant": name, "peak": peaks[name]} | times for name, times in ms.items()]


def print_table(axis: str, rows: list[Row]) -> None:
    print(f"\n| {AXES[axis][0]} | naive, ms | fp32, ms | bf16, ms | loss, fp32 / bf16 | speed-up | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for value in AXES[axis][1]:
        of = {row["variant"]: row for row in rows if (row["axis"], row["value"]) == (axis, value)}
        naive, fp32, bf16 = (of[name] for name in VARIANTS)
        speed = " / ".join(f"{naive['step'] / each['step']:.2f}" for each in (fp32, bf16))
        losses = f"{fp32['loss']:.0f} / {bf16['loss']:.0f}"
        peaks = " / ".join("" if each["peak"] is None else f"{each['peak']:.0f}" for each in (naive, fp32, bf16))
        steps = " | ".join(f"{each['step']:.0f}" for each in (naive, fp32, bf16))
        print(f"| {value} | {steps} | {losses} | {speed} | {peaks} |")


def draw(rows: list[Row], path: Path) -> None:
    """Time of a step and of its loss along each axis."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"  # text as text: half the file
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure, places = plt.subplots(1, len(axes), figsize=(3.2 * len(axes), 3), squeeze=False)
    colors = dict(zip(VARIANTS, ("#888888", "#1f77b4", "#d62728"), strict=True))
    for place, axis in zip(places[0], axes, strict=True):
        for name in VARIANTS:
            mine = [row for row in rows if (row["axis"], row["variant"]) == (axis, name)]
            place.plot([r["value"] for r in mine], [r["step"] for r in mine], "o-", color=colors[name], label=name)
            if name != "naive fp32":
                losses = [row["loss"] for row in mine]
                place.plot([row["value"] for row in mine], losses, ".:", color=colors[name], label=f"{name}, its loss")
        place.set_xlabel(AXES[axis][0])
        place.set_ylim(bottom=0)
    places[0][0].set_ylabel("ms a step")
    places[0][0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def compare_processes(rounds: int) -> None:
    """Print what two processes gain over one on the same global batch."""
    found: dict[int, list[Row]] = {1: [], 2: []}
    for _ in range(rounds):
        for processes, rows in found.items():
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            command = [*launch, __file__, "--as-rank"]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print("\n| processes | precision | micro-batches of 8 each | ms a step | speed-up | of which backward |")
    print("|---|---|---|---|---|---|")
    for name in VARIANTS[1:]:
        ms = {n: median(row[name]["step"] for row in rows) for n, rows in found.items()}
        for n, rows in found.items():
            backward = median(row[name]["backward"] for row in rows)
            precision = name.removeprefix("ours ")
            print(f"| {n} | {precision} | {2 // n} | {ms[n]:.0f} | {ms[1] / ms[n]:.2f} | {backward:.0f} |")


def run_as_rank() -> None:
    """Five steps in one of the processes; rank 0 prints the medians."""
    shape = replace(BASE, accumulation=2 // int(os.environ["WORLD_SIZE"]))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in VARIANTS[1:]:
            (variant,) = make_variants(shape, [name], time.perf_counter, 5, Path(folder)).values()
            for _ in range(6):
                variant.watch.step(variant.run)
            found[name] = {key: 1000 * variant.watch.median(key) for key in ("step", "backward")}
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)
    torch.distributed.barrier() if torch.distributed.is_initialized() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join([*AXES, "processes"]), help=f"of {', '.join(AXES)}, processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path, help="an .svg or .png")
    parser.add_argument("--rows", type=Path, help="a jsonl to add the rows to; tables and picture are of all in it")
    parser.add_argument("--cpu-time", action="store_true", help="the process's time, where the machine is busy")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        return run_as_rank()
    chosen = [axis for axis in arguments.axes.split(",") if axis]
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows: list[Row] = []
    if arguments.rows is not None and arguments.rows.exists():
        rows = [json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines()]
    for axis in chosen:
        for value in AXES[axis][1] if axis in AXES else ():
            # The base is a point of every axis, and measured once.
            known = [row for row in rows if row["value"] == getattr(BASE, row["axis"])][: len(VARIANTS)]
            if value == getattr(BASE, axis) and known:
                rows += [row | {"axis": axis, "value": value} for row in known]
            else:
                rows += measure(axis, value, arguments.rounds, clock)
    if arguments.rows is not None:
        arguments.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{BASE}; {'process' if arguments.cpu_time else 'wall'} time, median of {arguments.rounds} rounds; ", end="")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for axis in AXES:
        if any(row["axis"] == axis for row in rows):
            print_table(axis, rows)
    if "processes" in chosen:
        compare_processes(arguments.rounds)
    if arguments.picture is not None:
        draw(rows, arguments.picture)
    return None


if __name__ == "__main__":
    main()
