"""Kill a small run again and again, then compare its students with those of a run that nothing disturbed.

    python benchmarks/soak.py --kills 100 --seed 0
    python benchmarks/soak.py --config my.yaml pretraining.max_steps=20 --kills 20

Each start of the run lives for a random time and ends in one of four ways: SIGKILL, SIGTERM, SIGKILL with the newest
checkpoint cut short, or a disk that takes no file beyond a random size (RLIMIT_FSIZE). The same command follows, until
the run is complete; then the next round begins in a new folder. Without --config it is the embedded default, made tiny.
Exit code 1: weights that differ by a bit, or an end that is neither of these nor a refusal of one line.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the last bits of a sum depend on it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # children are forked
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIZES = "{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32, "
LITTLE = "{max_steps: 40, per_device_train_batch_size: 4, learning_rate: 1e-3, max_length: 32, mlm_probability: 0.3, "
OFTEN = "logging_steps: 10, save_steps: 4}"
TASK = "{max_steps: 40, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, max_length: 64, " + OFTEN
# The embedded default: every stage, both controls, in seconds.
TINY = (
    "teacher.scratch=" + SIZES + "max_position_embeddings: 128}",
    "teacher.pretraining=" + LITTLE + OFTEN,
    "pretraining=" + LITTLE + OFTEN,
    *(f"{stage}={TASK}" for stage in ("task_teacher", "task_lm", "task_soft_labels")),
    "tasks=[RTE]",
    "student.num_hidden_layers=1",
    "data.eval_blocks=4",
)
ENDS = ("kill -9", "SIGTERM", "cut checkpoint", "full disk")
# Killed, stopped by the signal before or after training took it, refused, full disk.
NORMAL = {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 4}


@dataclass
class Counts:
    """What happened so far."""

    ends: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    rounds: int = 0
    resumes: int = 0  # starts in a folder that an earlier one had begun
    from_checkpoint: int = 0  # of them, those that went on inside of a stage
    refusals: int = 0  # all checkpoints of a stage damaged: deleted, as the message says
    torn_bytes: int = 0  # of unfinished files and folders that a start left behind
    cut_bytes: int = 0  # that this program took from checkpoints
    problems: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a YAML or a name of configs/runs (default: the embedded default, made tiny)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=20, help="end after this many, and the end of their run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lives", type=float, default=6.0, help="lives of a run on average; its seconds / this")
    parser.add_argument("--no-proof", action="store_true", help="spare the proof of exports in a fresh process")
    options = parser.parse_args(arguments)
    run = ["run", options.config or "quickstart", *(TINY if options.config is None else ()), *options.overrides]
    _import_everything(spare_proof=options.no_proof)
    with tempfile.TemporaryDirectory(prefix="glmd-soak-") as folder:
        return _soak(Path(folder), run, options.kills, random.Random(options.seed), options.lives)


def _soak(folder: Path, run: list[str], kills: int, chance: random.Random, lives: float) -> int:
    began, counts = time.monotonic(), Counts()
    undisturbed = folder / "undisturbed"
    code = _wait(_start([*run, f"output_dir={undisturbed}"], folder / "output"))
    if code != 0:
        print((folder / "output").read_text(errors="replace")[-2000:], f"the undisturbed run ended with {code}")
        return 1
    seconds = time.monotonic() - began
    expected = _students(undisturbed)
    largest = max(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    print(f"undisturbed: {seconds:.0f} s, {len(expected)} students, {sum(map(len, expected.values())):,} bytes")
    while sum(counts.ends.values()) < kills and not counts.problems:
        place = folder / f"round-{counts.rounds}"
        _round(place, run, counts, chance, seconds / lives, largest, kills)
        counts.rounds += 1
        found = _students(place)
        different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        counts.problems += [f"round {counts.rounds}: {name} differs" for name in different]
        left = sorted(_files(place) ^ _files(undisturbed))
        counts.problems += [f"round {counts.rounds}: {name} is in one of both runs alone" for name in left]
        print(f"round {counts.rounds}: {dict(counts.ends)}, {len(different)} students differ", flush=True)
        shutil.rmtree(place)
    _report(counts, time.monotonic() - began)
    return 1 if counts.problems else 0


def _round(
    place: Path, run: list[str], counts: Counts, chance: random.Random, mean_life: float, largest: int, kills: int
) -> None:
    """One run to its end, killed on the way. Bound, because a run that never ends is a failure too."""
    output = place.with_suffix(".output")
    for _ in range(500):
        counts.resumes += place.exists()
        end = chance.choice(ENDS) if sum(counts.ends.values()) < kills else None
        # The logarithm of a size is drawn: small files are many, and large ones few.
        limit = int(largest ** chance.uniform(0.3, 1.0)) if end == "full disk" else None
        child = _start([*run, f"output_dir={place}"], output, limit)
        code = _wait(child, after=chance.expovariate(1 / mean_life) if end and limit is None else None, end=end)
        text = output.read_text(encoding="utf-8", errors="replace")
        counts.from_checkpoint += text.count(": continues after step ")
        if code == 0:
            return
        if code == 2 and "checkpoints are damaged; delete the folder" in text:
            # Said in one line, and what it says works.
            checkpoints = Path(text.rpartition("RunError: ")[2].partition(": all ")[0])
            shutil.rmtree(checkpoints)
            counts.refusals += 1
            continue
        counts.ends[end or "none"] += 1
        counts.codes[code] += 1
        if code not in NORMAL or "Traceback" in text or (code == 4 and text.count("glmd: DiskError: ") != 1):
            counts.problems.append(f"{end}, limit {limit}: exit code {code}: {text[-3000:]}")
            return
        counts.torn_bytes += sum(_bytes(path) for path in place.rglob("*.tmp"))
        if end == "cut checkpoint":
            counts.cut_bytes += _cut_newest(place, chance)
    counts.problems.append("the run did not end in 500 starts")


def _start(arguments: list[str], output: Path, limit: int | None = None) -> int:
    """`glmd ARGUMENTS` in a child that is forked, so that imports are paid once. Returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if limit is not None:  # its own output is a file as well: pipe it through a process without limit
            reader, writer = os.pipe()
            if os.fork() == 0:
                os.close(writer)
                while data := os.read(reader, 65536):
                    os.write(1, data)
                os._exit(0)
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.close(writer)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        from glmd.cli import main as glmd

        code = glmd(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, after: float | None = None, end: str | None = None) -> int:
    """The child's exit code, or minus its signal; with `after` it is killed when so many seconds have passed."""
    until = time.monotonic() + after if after is not None else None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() > until:
            os.kill(child, signal.SIGTERM if end == "SIGTERM" else signal.SIGKILL)
            until = None
        time.sleep(0.005)


def _cut_newest(place: Path, chance: random.Random) -> int:
    """Cut a random file of the newest checkpoint anywhere. Returns how many bytes that took."""
    found = [path for path in place.rglob("checkpoints/step-*") if path.is_dir() and path.suffix != ".tmp"]
    if not found:
        return 0
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    path = chance.choice(sorted(newest.iterdir()))
    size = path.stat().st_size
    os.truncate(path, chance.randrange(size) if size else 0)
    return size - path.stat().st_size


def _students(run: Path) -> dict[str, bytes]:
    """The weights of every exported model, by their place in the run."""
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(run.rglob("model.safetensors"))}


def _files(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def _bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file())


def _report(counts: Counts, seconds: float) -> None:
    total = sum(counts.ends.values())
    print(f"{counts.rounds} rounds, {total} ends ({json.dumps(counts.ends)}), exit codes {dict(counts.codes)}")
    print(f"{counts.resumes} resumes, {counts.from_checkpoint} from a checkpoint, {counts.refusals} refusals obeyed")
    print(f"bytes lost: {counts.torn_bytes:,} in unfinished files, {counts.cut_bytes:,} cut from checkpoints")
    print(f"{seconds:.0f} s")
    print("\n".join(counts.problems) or "every student is bit for bit that of the undisturbed run")


def _import_everything(*, spare_proof: bool) -> None:
    """What a child would import otherwise, each for seconds."""
    import transformers
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertForMaskedLM

    import glmd.pipeline.exports
    import glmd.pipeline.run

    assert all((AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertForMaskedLM))
    assert transformers.BertForSequenceClassification is not None
    if spare_proof:
        glmd.pipeline.exports.check_exports = lambda folders: None  # type: ignore[attr-defined]
        glmd.pipeline.run.stranger_ahead = nullcontext  # type: ignore[assignment]


if __name__ == "__main__":
    sys.exit(main())
