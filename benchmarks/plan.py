"""What `glmd plan` says of a pretraining step against such a step: memory, FLOPs, seconds, in one process.

    python benchmarks/plan.py CONFIG [key=value ...]

The step is the run's own distiller, teacher and optimizer with random weights of the plan's shapes. Its memory is what
torch's allocator hands out, from the profiler, over a step of one micro-batch and one of two: only in the second are
there gradients while activations are made, which the plan counts with. One token is padding, so that models make masks.
"""

import argparse
import time
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from glmd.config_file import load_config
from glmd.distillation.distiller import Distiller
from glmd.distillation.teacher import OnlineTeacher
from glmd.models.loading import language_model_class
from glmd.planning.plan import make_plan
from glmd.planning.run_cost import Layout, run_cost
from glmd.planning.step_cost import MORE_FLOPS
from glmd.training.optimizer import make_optimizer
from glmd.vocabulary.vocabulary import Vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    plan = make_plan(load_config(arguments.config, ["controls.hard_labels=false", *arguments.overrides]))
    stage, objective = plan.config.pretraining, plan.method["pretraining"]
    first = run_cost(plan, Layout(), measure=True)
    predicted = next(each for each in first.stages if each.name == "pretraining")

    kept = np.arange(plan.kept_size)
    vocabulary = Vocabulary(kept, np.minimum(np.arange(plan.source_size), plan.kept_size - 1))
    student = language_model_class(plan.student_config).from_config(plan.student_config, dtype=torch.float32)
    source = language_model_class(plan.teacher_config).from_config(
        plan.teacher_config, dtype=getattr(torch, plan.config.teacher.dtype)
    )
    distiller = Distiller(objective, vocabulary.token_map, language_model=student)
    teacher, optimizer = OnlineTeacher(source, None, vocabulary), make_optimizer(distiller, stage)
    shape = (stage.per_device_train_batch_size, stage.max_length or 0)
    ids = torch.randint(plan.source_size, shape)
    labels = torch.where(torch.rand(shape) < (stage.mlm_probability or 0), ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "lm_labels": labels}
    batch["attention_mask"][-1, -1] = 0
    batch["predicts"] = batch["attention_mask"].bool()
    is_mixed = plan.config.mixed_precision != "no"

    def step(micro_batches: int = 1) -> float:
        began = time.perf_counter()
        for _ in range(micro_batches):
            outputs = teacher(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
                loss = distiller(batch, outputs).sum()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    step()  # makes the optimizer's state
    held = {
        "teacher": sum(each.nbytes for each in [*source.parameters(), *source.buffers()]),
        "student": sum(p.nbytes for p in student.parameters()),
        "AdamW": sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
    }
    print(f"{plan.teacher_config.model_type} {plan.parameters['teacher']['total']:,} to ", end="")
    print(f"{plan.parameters['student']['total']:,} parameters, {shape[0]} texts of {shape[1]} tokens, ", end="")
    print(f"{plan.config.mixed_precision}; torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| | plan | step | ratio |\n|---|---|---|---|")
    for name, size in held.items():
        line(f"{name}, MB", predicted.memory[name] / 1e6, size / 1e6)
    resident = sum(predicted.memory[name] for name in ("teacher", "head", "student", "AdamW"))
    for number in (1, 2):
        peak = allocated_at_peak(lambda count=number: step(count))
        line(
            f"all that training adds to them, {number} micro-batches, MB",
            (predicted.memory["in all"] - resident) / 1e6,
            peak / 1e6,
        )
    with FlopCounterMode(display=False) as flops:
        flops.flop_registry |= MORE_FLOPS
        step()
    accumulated = stage.gradient_accumulation_steps
    line("GFLOP of a micro-batch", predicted.step_flops / accumulated / 1e9, flops.get_total_flops() / 1e9)
    taken = median(step(accumulated) for _ in range(arguments.rounds))
    assert predicted.step_seconds is not None, "was measured"
    line("seconds of a step", predicted.step_seconds, taken)


def allocated_at_peak(work: Any) -> int:
    """The most bytes that `work` had at once, beyond those before it, by the profiler's record of the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    sizes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    return int(np.cumsum(sizes).max())


def line(name: str, predicted: float, found: float) -> None:
    print(f"| {name} | {predicted:.4g} | {found:.4g} | {predicted / found:.3f} |")


if __name__ == "__main__":
    main()
