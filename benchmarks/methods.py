"""What a step of each method costs beside GLMD's, in one process, in turn: the table of docs/methods.md.

    python benchmarks/methods.py --json docs/methods.json      # a quarter of an hour on two cores

A corpus step is one of `pretraining`, a task step the mean of a method's stages on a task. Both run the distiller and
the live teacher of training with drawn weights: BERT layers of 384 numbers and 12 heads, six of the teacher and three
of the student, 30,522 tokens of which half are kept; 8 texts of 64 tokens. A second teacher, where a method weighs
several, has three layers. Of each pair of timings the ratio is taken, and of these the median.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from glmd.distillation.methods import load_method
from glmd.distillation.objective import Objective
from glmd.planning.step_cost import Cast, timed
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task

SIZES = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
FOLDER = Path(__file__).parents[1] / "configs" / "methods"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("methods", nargs="*")
    given = parser.parse_args()
    names = given.methods or sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "embeddings")
    known = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.exists() else {}
    ours, ratios = load_method("glmd"), known.get("ratios", {})
    base = {"corpus": [ours["pretraining"]], "task": [ours["task_lm"], ours["task_soft_labels"]]}
    print("| method | corpus step | task step |\n| --- | --- | --- |")
    for name in names:
        method = load_method(name)
        stages = {
            "corpus": [each for stage, each in method.items() if stage == "pretraining"],
            "task": [each for stage, each in method.items() if stage != "pretraining"],
        }
        found = {}
        for kind, objectives in stages.items():
            if objectives:
                pairs = [
                    (seconds(objectives, kind, given), seconds(base[kind], kind, given)) for _ in range(given.rounds)
                ]
                found[kind] = statistics.median(mine / theirs for mine, theirs in pairs)
        ratios[name] = found
        print(f"| {name} | " + " | ".join(f"{found[k]:.2f}" if k in found else "-" for k in stages) + " |", flush=True)
        if given.json:
            write(given, ratios)


def write(given: argparse.Namespace, ratios: dict[str, dict[str, float]]) -> None:
    """What is measured so far, beside what the file had of other methods."""
    about = (
        "Seconds of a step beside those of `glmd` (`python benchmarks/methods.py`, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}): {given.examples} texts of "
        f"{given.length} tokens, six layers of 384 to three, half of 30,522 tokens; a task step is the mean of the "
        "stages on a task. Methods that weigh several teachers have a second one of three layers."
    )
    found = {"about": about, "ratios": dict(sorted(ratios.items()))}
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def seconds(objectives: list[Objective], kind: str, given: Any) -> float:
    """The mean of the stages' micro-batch and update."""
    student, teacher = (
        BertConfig(num_hidden_layers=layers, vocab_size=size, **SIZES) for layers, size in ((3, 15_261), (6, 30_522))
    )
    small = BertConfig(
        num_hidden_layers=3, vocab_size=30_522, **SIZES
    )  # a second teacher, where a method weighs several
    form = task_form(load_task("RTE", "head"), kind="masked") if kind == "task" else None
    totals = []
    for objective in objectives:
        masked = 0.15 if objective.needs_masking else 0.0
        further = (small,) if objective.asks_assistants else ()
        asked = teacher if objective.teacher_needs else None
        cast = Cast(objective, student, 30_522, asked, form=form, masked=masked, further=further)
        totals.append(sum(timed(cast, examples=given.examples, length=given.length)))
    return statistics.fmean(totals)


if __name__ == "__main__":
    main()
