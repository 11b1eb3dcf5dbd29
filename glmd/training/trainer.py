"""The training loop, on Accelerate: one page that shows every line of a step.

    result = Trainer(accelerator, folder, settings, seed=0, ...).run(distiller, teacher, dataset, collate)

Order, masking and dropout are functions of (seed, step), so a run that is killed anywhere and started again
ends in the same weights, bit for bit.
"""

import copy
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from glmd.data.batches import Batch, Collate
from glmd.data.blocks import BlockDataset
from glmd.data.sampling import StepPlan, step_batches
from glmd.distillation.cached_teacher import CachedTeacher
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective
from glmd.distillation.schedules import learning_rate_factor
from glmd.distillation.teacher import AllOutputs, Ensemble, OnlineTeacher
from glmd.errors import NumericsError
from glmd.models.quantization import is_quantized
from glmd.runtime.determinism import is_repeatable
from glmd.runtime.interrupts import Interrupted, finishes_step
from glmd.runtime.processes import lost_ranks, on_main
from glmd.stage_config import StageConfig
from glmd.tasks.dataset import TrainingData
from glmd.training.ahead import Fed, ahead, to_device
from glmd.training.checkpoint import Checkpoint, load_agreed_checkpoint, save_checkpoint
from glmd.training.compiling import compiled
from glmd.training.fsdp import full_tensors, is_sharded, prepare_sharded
from glmd.training.graphs import MicroStep, Replayed
from glmd.training.log import RunLog
from glmd.training.meter import Meter
from glmd.training.nonfinite import Made, Progress, leave_out
from glmd.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from glmd.training.state import (
    code_of_a_step,
    copy_weights_into,
    load_trainable,
    require_same_code,
    trainable,
    warn_of_other_bits,
)

logger = logging.getLogger(__name__)
Teacher = Callable[[Batch], AllOutputs]
Evaluate = Callable[[Distiller], float]  # a score of the student as it stands, higher is better
Observe = Callable[[Distiller], dict[str, Any]]  # what a row of the log says of it beside
SIGNAL_NUMBERS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class TrainingResult:
    """How a stage ended."""

    steps: int
    seconds: float
    tokens_per_second: float
    losses: dict[str, float]  # mean of each term over the last logging interval
    best_step: int | None
    skipped: int  # steps that were left out because of `skip_nonfinite`


@dataclass
class Trainer:
    """One stage of training.

    folder: where `checkpoints/` lie. stage: its name in the log. evaluate: if given, called after each epoch, and
        the best weights are kept instead of the last. observe: asked before the first step and at each logging step,
        by the main process. compiles: backbones by torch.compile. replays: as CUDA graphs,
        where that can be done.
    """

    accelerator: Accelerator
    folder: Path
    stage: str
    settings: StageConfig
    seed: int
    log: RunLog
    num_workers: int = 0
    evaluate: Evaluate | None = None
    observe: Observe | None = None
    compiles: bool = False
    replays: bool = True
    progress: Progress = field(default_factory=Progress)
    received: list[int] = field(default_factory=list)  # signals that this process had
    stop: int = 0  # the signal that all ranks know of
    replayed: Replayed | None = None

    def run(self, distiller: Distiller, teacher: Teacher, dataset: TrainingData, collate: Collate) -> TrainingResult:
        """Train to the end, from the newest valid checkpoint if there is one. `distiller` holds the result.

        Raises NumericsError when losses or gradients of more than `skip_nonfinite` steps are not finite, Interrupted
        after a signal.
        """
        settings, accelerator = self.settings, self.accelerator
        # The blocks of a corpus of texts are of one length.
        lengths = None if settings.train_sampling_strategy == "random" else getattr(dataset, "lengths", None)
        assert lengths is not None or settings.train_sampling_strategy != "group_by_length", "refused by config"
        plan = StepPlan(
            len(dataset),
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
            self.seed,
            "random" if lengths is None else "group_by_length",
            lengths,
        )
        max_steps = settings.steps(len(dataset), accelerator.num_processes)
        steps_per_epoch = max(1, len(dataset) // plan.global_batch_size)
        distiller.learn_from(teacher, seed=self.seed)
        model, trained, optimizer = self._prepare(distiller)
        is_dynamic = not isinstance(dataset, BlockDataset)
        if not is_dynamic and self._may_replay(distiller.objective, teacher):
            self.replayed = Replayed(self._micro_step(model, teacher, 0.0), accelerator.device)
        checkpoint = load_agreed_checkpoint(self.folder / "checkpoints")
        if checkpoint is not None:
            self._restore(checkpoint, trained, optimizer)
        start_step, began = self.progress.step, time.monotonic() - self.progress.seconds
        self.log.drop_after(self.stage, start_step or -1)
        model.train()

        batches = step_batches(
            dataset, plan, collate, start_step=start_step, stop_step=max_steps, num_workers=self.num_workers
        )
        if start_step == 0:
            self._observe(distiller, 0)
        meter = Meter([term.name for term in distiller.objective.terms])
        bar = tqdm(
            total=max_steps,
            initial=start_step,
            desc=self.stage,
            unit="step",
            disable=not _show_bar(accelerator),
        )
        fed, before = ahead(batches, teacher, accelerator.device), None
        compiling = compiled([trained, teacher], is_dynamic) if self.compiles else nullcontext()
        recording = Replayed.attention() if self.replayed is not None else nullcontext()
        with bar, closing(batches), closing(fed), compiling, recording, lost_ranks(), finishes_step() as self.received:
            for step, micro_batches in enumerate(fed, start=start_step + 1):
                made = self._step(model, optimizer, teacher, micro_batches, step, max_steps)
                self._settle(before, meter, teacher)
                before = made
                bar.update()
                self.progress.step, self.progress.seconds = step, time.monotonic() - began
                logs, is_last = step % settings.logging_steps == 0, step == max_steps
                evaluates = self.evaluate is not None and (step % steps_per_epoch == 0 or is_last)
                saves = step % settings.save_steps == 0 and not is_last
                stop = self._signal(is_last=is_last)
                if stop or logs or is_last or evaluates or saves or self._waits:
                    self._settle(before, meter, teacher)
                    before, stop = None, self._signal()
                if logs or is_last:
                    self._log(meter, distiller, step, max_steps, optimizer)
                    with meter.paused():
                        self._observe(distiller, step)
                if evaluates:
                    with meter.paused():
                        copy_weights_into(distiller, trained)
                        self._keep_best(distiller)
                        model.train()
                        if trained is not distiller:
                            distiller.to("cpu")
                if saves or stop:
                    with meter.paused():
                        self._save(trained, optimizer)
                if stop:
                    if self.accelerator.is_main_process:
                        logger.warning("step %d is saved; the same command goes on from there", step)
                    raise Interrupted(128 + stop)
        if self.evaluate is None:
            copy_weights_into(distiller, trained)
        else:
            best = load_agreed_checkpoint(self.folder / "best")
            assert best is not None, "the last step was evaluated"
            load_trainable(distiller, best.tensors["model"])
        return TrainingResult(
            max_steps,
            self.progress.seconds,
            meter.tokens_per_second,
            meter.last,
            self.progress.best_step,
            self.progress.skipped,
        )

    def _prepare(self, distiller: Distiller) -> tuple[nn.Module, Distiller, Any]:
        """The wrapped model, the distiller in it, and the optimizer of that.

        Sharded, it is another than the given one, which stays whole, on the CPU, for evaluation and export.
        """
        accelerator = self.accelerator
        if accelerator.scaler is not None:
            # A new one for each stage: the loss scale that another ended with is not known to a run that is resumed.
            accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
        if self.settings.gradient_checkpointing:
            distiller.recompute_activations()
        if not is_sharded(accelerator):
            optimizer = make_optimizer(distiller.to(accelerator.device), self.settings)
            model, prepared = accelerator.prepare(distiller, optimizer)
            return model, distiller, prepared
        trained = copy.deepcopy(distiller.to("cpu"))
        model, prepared = prepare_sharded(accelerator, trained, make_optimizer(trained, self.settings))
        return model, trained, prepared

    def _may_replay(self, objective: Objective, teacher: Teacher) -> bool:
        """Whether a micro-step reads nothing on the host that changes from one to the next; says why it does."""
        accelerator = self.accelerator
        if not self.replays or accelerator.device.type != "cuda":
            return False
        live = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
        against = {
            "several processes": accelerator.num_processes > 1,
            "mixed_precision fp16": accelerator.scaler is not None,
            "gradient_checkpointing": self.settings.gradient_checkpointing,
            "a teacher of another kind": not isinstance(teacher, OnlineTeacher | CachedTeacher | Ensemble),
            "several teachers from a cache": len(live) > 1
            and not all(isinstance(each, OnlineTeacher) for each in live),
            "teacher.quantization": any(is_quantized(each.base) for each in live if isinstance(each, OnlineTeacher)),
            "an intervention, a weight or loss that changes, or a term on masked tokens": not objective.is_constant,
        }
        found = [name for name, holds in against.items() if holds]
        if found:
            logger.info("%s: steps are not replayed as CUDA graphs: %s", self.stage, ", ".join(found))
        return not found

    @property
    def _waits(self) -> bool:
        """Whether the host looks at each step before the optimizer does, which cannot be told on the device."""
        is_told = self.accelerator.device.type in ("cpu", "cuda")
        return not is_told or self.accelerator.scaler is not None or is_sharded(self.accelerator)

    def _micro_step(self, model: nn.Module, teacher: Teacher, progress: float) -> MicroStep:
        """Forward and backward of a micro-batch. It returns each term's sum times its factor (terms,)."""
        accelerator, objective = self.accelerator, self.accelerator.unwrap_model(model).objective

        def micro_step(batch: Batch, outputs: AllOutputs | None, factors: Tensor) -> Tensor:
            given = teacher(batch) if outputs is None else outputs
            with accelerator.autocast():  # DDP's forward has its own, a sharded one has not
                part: Tensor = model(batch, given, progress, factors)
            accelerator.backward(objective.total(part, progress))
            return part.detach()

        return micro_step

    def _step(
        self,
        model: nn.Module,
        optimizer: Any,
        teacher: Teacher,
        micro_batches: list[Fed],
        step: int,
        max_steps: int,
    ) -> Made:
        """One optimizer step over all micro-batches of all ranks, as far as the host is concerned.

        Without `_waits` a step that is not finite is left out by the optimizer's own kernel.
        """
        accelerator, objective = self.accelerator, self.accelerator.unwrap_model(model).objective
        world_size, device = accelerator.num_processes, accelerator.device
        progress = (step - 1) / max(1, max_steps - 1)
        # float32 is exact to 16 million tokens a step, and the one that every device has.
        counts = sum(objective.counts(fed.batch) for fed in micro_batches).float()
        told = torch.tensor([float(number in self.received) for number in SIGNAL_NUMBERS])
        if world_size > 1:
            shared = reduce(to_device(torch.cat([counts, told]), device), "sum")
            counts, told = shared.split([len(counts), len(told)])
        # DDP and FSDP average gradients over ranks; the global count already divides by all of them.
        factors = to_device(world_size / counts.clamp(min=1), device)
        sums = torch.zeros(len(objective.terms), device=device)
        micro_step = self.replayed or self._micro_step(model, teacher, progress)
        for i, fed in enumerate(micro_batches):
            # Dropout is a function of (seed, micro-step, rank): nothing remembers what was drawn before.
            torch.manual_seed(_mix(self.seed, (step * len(micro_batches) + i) * world_size + accelerator.process_index))
            last = i == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                batch = objective.columns(fed.on_device) if self.replayed else fed.on_device
                sums += micro_step(batch, fed.teacher_outputs, factors)
        means = (reduce(sums, "sum") if world_size > 1 else sums) / world_size
        norm = accelerator.clip_grad_norm_(model.parameters(), self.settings.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        factor = learning_rate_factor(
            step / max_steps,
            kind=self.settings.lr_scheduler_type,
            warmup_ratio=self.settings.warmup_ratio,
            min_ratio=self.settings.min_lr_ratio,
        )
        for group in optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * factor
        # fp16's scaler skips a step with infinite gradients by itself.
        finite = torch.isfinite(means).all()
        if accelerator.scaler is None:
            finite &= torch.isfinite(norm)
        if not self._waits:
            optimizer.optimizer.found_inf, optimizer.optimizer.grad_scale = (~finite).float(), None
        if not self._waits or finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=self.replayed is None)
        left_out = (~finite).float()[None]
        status = torch.cat([left_out, told]) if world_size > 1 else left_out
        status = status.to("cpu", non_blocking=device.type == "cuda")
        is_there = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return Made(step, micro_batches, means, norm, status, is_there)

    def _settle(self, made: Made | None, meter: Meter, teacher: Teacher) -> None:
        """Read what became of a step."""
        if made is None:
            return
        if made.is_there is not None:
            made.is_there.synchronize()
        left_out, *told = made.status.tolist()
        if self.accelerator.num_processes > 1:
            self.stop = max(self.stop, *(n if count else 0 for n, count in zip(SIGNAL_NUMBERS, told, strict=True)))
        if left_out:
            leave_out(made, self.stage, self.settings.skip_nonfinite, self.progress, teacher, self.log)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.update()  # else it would take the next gradients for unscaled ones
        else:
            meter.add(made.means, sum(len(fed.batch["positions"]) for fed in made.micro_batches))

    def _log(self, meter: Meter, distiller: Distiller, step: int, max_steps: int, optimizer: Any) -> None:
        # Ranks may have texts of different length.
        tokens = torch.tensor(float(meter.tokens), device=self.accelerator.device)
        losses = meter.read(float(reduce(tokens, "sum") if self.accelerator.num_processes > 1 else tokens))
        weighted = distiller.objective.total(torch.tensor(list(losses.values())), (step - 1) / max(1, max_steps - 1))
        row = {
            "stage": self.stage,
            "step": step,
            "max_steps": max_steps,
            "loss": float(weighted),
            **losses,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "tokens_per_second": round(meter.tokens_per_second),
            "seconds": round(self.progress.seconds, 1),
        }
        self.log.write(row)

    def _observe(self, distiller: Distiller, step: int) -> None:
        if self.observe is not None and self.accelerator.is_main_process:
            self.log.write({"stage": self.stage, "step": step, **self.observe(distiller)})

    def _keep_best(self, distiller: Distiller) -> None:
        assert self.evaluate is not None
        score = self.evaluate(distiller)
        self.log.write({"stage": self.stage, "step": self.progress.step, "score": score})
        if not math.isfinite(score):
            raise NumericsError(
                f"{self.stage}: step {self.progress.step}: the score that the best checkpoint is chosen by is {score}; "
                "check the teacher's answers on val, or give selection=last"
            )
        progress = self.progress

        def best_now() -> tuple[float | None, int | None]:
            if progress.best_score is not None and score <= progress.best_score:
                return progress.best_score, progress.best_step
            tensors = {"model": trainable(distiller)}
            save_checkpoint(self.folder / "best", progress.step, tensors, {"score": score}, keep=1)
            return score, progress.step

        progress.best_score, progress.best_step = on_main(best_now)

    def _save(self, distiller: Distiller, optimizer: Any) -> None:
        scaler = self.accelerator.scaler
        self.progress.scaler = scaler.state_dict() if scaler is not None else None
        is_main = self.accelerator.is_main_process
        groups = {"model": trainable(distiller), "optimizer": optimizer_tensors(distiller, optimizer)}
        tensors = {name: full_tensors(group, wanted=is_main) for name, group in groups.items()}
        folder, keep = self.folder / "checkpoints", self.settings.save_total_limit
        state = {
            "progress": vars(self.progress),
            "models": distiller.describe(),
            "threads": torch.get_num_threads(),
            "repeatable": is_repeatable(self.accelerator.device),
            "code": code_of_a_step(),
        }
        on_main(lambda: save_checkpoint(folder, self.progress.step, tensors, state, keep=keep))

    def _restore(self, checkpoint: Checkpoint, distiller: Distiller, optimizer: Any) -> None:
        require_same_code(self.stage, self.folder, checkpoint)
        self.progress = Progress(**checkpoint.state["progress"])
        load_trainable(distiller, checkpoint.tensors["model"])
        load_optimizer(distiller, optimizer, checkpoint.tensors["optimizer"])
        if self.progress.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.progress.scaler)
        self._restore_best()
        warn_of_other_bits(self.stage, checkpoint.state, self.accelerator.device)
        logger.info("%s: continues after step %d of %s", self.stage, self.progress.step, checkpoint.path)

    def _restore_best(self) -> None:
        """Forget best weights of steps that are run again."""
        folder, best = self.folder / "best", self.progress.best_step

        def is_there() -> bool:
            for path in folder.glob("step-*"):
                if int(path.name.removeprefix("step-").removesuffix(".tmp")) > self.progress.step:
                    shutil.rmtree(path)
            return best is not None and (folder / f"step-{best:06d}").is_dir()

        if not on_main(is_there):
            # The forgotten ones had taken its place, and may score otherwise this time: choose among what is to come.
            self.progress.best_score = self.progress.best_step = None

    def _signal(self, *, is_last: bool = False) -> int:
        """The signal that any rank received, known to all; 0 for none.

        Ranks tell one another as a step begins, and read it a step later; after the last one they ask.
        """
        if self.accelerator.num_processes == 1:
            return max(self.received, default=0)
        if is_last:
            mine = torch.tensor([max(self.received, default=0)], device=self.accelerator.device)
            self.stop = int(torch.stack(list(self.accelerator.gather(mine))).max())
        return self.stop


def _mix(seed: int, counter: int) -> int:
    """A 63-bit seed from two counters (splitmix64), far apart for neighbors."""
    z = (seed * 0x9E3779B97F4A7C15 + counter * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1


def _show_bar(accelerator: Accelerator) -> bool:
    return accelerator.is_main_process and sys.stderr.isatty()
