"""The training loop, on Accelerate: one page that shows every line of a step.

    result = Trainer(accelerator, folder, settings, seed=0, ...).run(distiller, teacher, dataset, collate)

Order, masking and dropout are functions of (seed, step), so a run that is killed anywhere and started again
ends in the same weights, bit for bit.
"""

import copy
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from glmd.data.batches import Batch, Collate
from glmd.data.blocks import BlockDataset
from glmd.data.sampling import StepPlan, step_batches
from glmd.distillation.distiller import Distiller
from glmd.distillation.schedules import learning_rate_factor
from glmd.distillation.teacher import AllOutputs, unsound_examples
from glmd.errors import NumericsError, RunError
from glmd.runtime.determinism import is_repeatable
from glmd.runtime.interrupts import Interrupted, finishes_step
from glmd.runtime.processes import lost_ranks, on_main
from glmd.stage_config import StageConfig
from glmd.tasks.dataset import TaskDataset
from glmd.training.checkpoint import Checkpoint, load_agreed_checkpoint, save_checkpoint
from glmd.training.fsdp import full_tensors, is_sharded, prepare_sharded
from glmd.training.log import RunLog
from glmd.training.meter import Meter
from glmd.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from glmd.training.state import LIBRARIES, code_of_a_step, copy_weights_into, load_trainable, trainable

logger = logging.getLogger(__name__)
Teacher = Callable[[Batch], AllOutputs]
Evaluate = Callable[[Distiller], float]  # a score of the student as it stands, higher is better


@dataclass
class Progress:
    """What a checkpoint must remember beside tensors. JSON only."""

    step: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_step: int | None = None
    scaler: dict[str, Any] | None = None
    skipped: int = 0  # steps that were left out because of `skip_nonfinite`


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
        the best weights are kept instead of the last.
    """

    accelerator: Accelerator
    folder: Path
    stage: str
    settings: StageConfig
    seed: int
    log: RunLog
    num_workers: int = 0
    evaluate: Evaluate | None = None
    progress: Progress = field(default_factory=Progress)

    def run(
        self, distiller: Distiller, teacher: Teacher, dataset: BlockDataset | TaskDataset, collate: Collate
    ) -> TrainingResult:
        """Train to the end, from the newest valid checkpoint if there is one. `distiller` holds the result.

        Raises NumericsError when losses or gradients of more than `skip_nonfinite` steps are not finite, Interrupted
        after a signal.
        """
        settings, accelerator = self.settings, self.accelerator
        # The blocks of a corpus are of one length.
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
        checkpoint = load_agreed_checkpoint(self.folder / "checkpoints")
        if checkpoint is not None:
            self._restore(checkpoint, trained, optimizer)
        start_step, began = self.progress.step, time.monotonic() - self.progress.seconds
        self.log.drop_after(self.stage, start_step)
        model.train()

        batches = step_batches(
            dataset, plan, collate, start_step=start_step, stop_step=max_steps, num_workers=self.num_workers
        )
        meter = Meter([term.name for term in distiller.objective.terms])
        bar = tqdm(
            total=max_steps,
            initial=start_step,
            desc=self.stage,
            unit="step",
            disable=not _show_bar(accelerator),
        )
        with bar, closing(batches), lost_ranks(), finishes_step() as received:
            for step, micro_batches in enumerate(batches, start=start_step + 1):
                means = self._step(model, optimizer, teacher, micro_batches, step, max_steps)
                if means is not None:
                    meter.add(means, sum(int(batch["predicts"].sum()) for batch in micro_batches))
                bar.update()
                self.progress.step, self.progress.seconds = step, time.monotonic() - began
                if step % settings.logging_steps == 0 or step == max_steps:
                    self._log(meter, distiller, step, max_steps, optimizer)
                if self.evaluate is not None and (step % steps_per_epoch == 0 or step == max_steps):
                    with meter.paused():
                        copy_weights_into(distiller, trained)
                        self._keep_best(distiller)
                        model.train()
                        if trained is not distiller:
                            distiller.to("cpu")
                stop = self._agree_on_signal(received)
                if (step % settings.save_steps == 0 and step < max_steps) or stop:
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

    def _step(
        self,
        model: nn.Module,
        optimizer: Any,
        teacher: Teacher,
        micro_batches: list[Batch],
        step: int,
        max_steps: int,
    ) -> Tensor | None:
        """One optimizer step over all micro-batches of all ranks.

        Returns each term's global mean (terms,), or None for a step that was left out.
        """
        accelerator, objective = self.accelerator, self.accelerator.unwrap_model(model).objective
        world_size = accelerator.num_processes
        progress = (step - 1) / max(1, max_steps - 1)
        # float32 is exact to 16 million tokens a step, and the one that every device has.
        counts = sum(objective.counts(batch) for batch in micro_batches).float().to(accelerator.device)
        counts = reduce(counts, "sum") if world_size > 1 else counts
        sums = torch.zeros(len(objective.terms), device=accelerator.device)
        for i, batch in enumerate(micro_batches):
            # On the loader's batch: a cached teacher hashes its ids, which on the device it would have to wait for.
            teacher_outputs = teacher(batch)
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            # Dropout is a function of (seed, micro-step, rank): nothing remembers what was drawn before.
            torch.manual_seed(_mix(self.seed, (step * len(micro_batches) + i) * world_size + accelerator.process_index))
            last = i == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                with accelerator.autocast():  # DDP's forward has its own, a sharded one has not
                    part = model(batch, teacher_outputs, progress)
                # DDP and FSDP average gradients over ranks; the global count already divides by all of them.
                accelerator.backward(objective.total(objective.means(part, counts), progress) * world_size)
            sums += part.detach()
        sums = reduce(sums, "sum") if world_size > 1 else sums
        norm = accelerator.clip_grad_norm_(model.parameters(), self.settings.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        means = objective.means(sums, counts)
        factor = learning_rate_factor(
            step / max_steps,
            kind=self.settings.lr_scheduler_type,
            warmup_ratio=self.settings.warmup_ratio,
            min_ratio=self.settings.min_lr_ratio,
        )
        for group in optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * factor
        is_finite = self._is_finite(means, norm)
        if is_finite:
            optimizer.step()
        else:
            self._skip_or_stop(means, norm, step, micro_batches, teacher)
        optimizer.zero_grad()
        return means if is_finite else None

    def _is_finite(self, means: Tensor, norm: Tensor) -> bool:
        """Whether the optimizer may see this step. fp16's scaler skips one with infinite gradients by itself."""
        finite = torch.isfinite(means).all()
        if self.accelerator.scaler is None:
            finite &= torch.isfinite(norm)
        return bool(finite)

    def _skip_or_stop(
        self, means: Tensor, norm: Tensor, step: int, micro_batches: list[Batch], teacher: Teacher
    ) -> None:
        """Log the examples of all ranks, which have the same means and norm; stop where no more is tolerated."""
        ids: list[int] = gather_object([int(i) for batch in micro_batches for i in batch["example_id"]])
        losses, norm_value = means.tolist(), float(norm)
        found = {"stage": self.stage, "step": step, "losses": losses, "gradient_norm": norm_value, "examples": ids}
        self.log.write(found)
        self.progress.skipped += 1
        tolerated = self.settings.skip_nonfinite
        if self.progress.skipped > tolerated:
            unsound = gather_object([i for batch in micro_batches for i in unsound_examples(teacher(batch), batch)])
            raise NumericsError(
                f"{self.stage}: step {step}: loss {losses} or gradient norm {norm_value:g} is not finite; "
                f"examples {ids}; the last checkpoint is kept. "
                + (
                    f"The teacher's outputs for {sorted(set(unsound))} are not finite; check the teacher"
                    if unsound
                    else "Lower learning_rate or check the teacher"
                )
                + (f"; skip_nonfinite {tolerated} is used up" if tolerated else "")
            )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # else it would take the next gradients for unscaled ones
        logger.warning("%s: step %d is left out (%d of %d)", self.stage, step, self.progress.skipped, tolerated)

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
        self._require_same_code(checkpoint)
        self.progress = Progress(**checkpoint.state["progress"])
        load_trainable(distiller, checkpoint.tensors["model"])
        load_optimizer(distiller, optimizer, checkpoint.tensors["optimizer"])
        if self.progress.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.progress.scaler)
        self._restore_best()
        saved_by, threads = checkpoint.state["threads"], torch.get_num_threads()
        if self.accelerator.device.type == "cpu" and threads != saved_by:
            # Sums are split over them, so the last bits of the weights depend on their number.
            logger.warning(
                "%s: continues with %d CPU threads after %d; OMP_NUM_THREADS=%d would end in identical weights",
                self.stage,
                threads,
                saved_by,
                saved_by,
            )
        if not (checkpoint.state.get("repeatable", True) and is_repeatable(self.accelerator.device)):
            logger.warning(
                "%s: was begun, or continues, without deterministic algorithms; its weights will differ in their last "
                "bits from those of an uninterrupted run",
                self.stage,
            )
        logger.info("%s: continues after step %d of %s", self.stage, self.progress.step, checkpoint.path)

    def _require_same_code(self, checkpoint: Checkpoint) -> None:
        """Refuse to go on with other code of glmd; warn of other libraries, which may be gone for good."""
        before, now = checkpoint.state.get("code", {}), code_of_a_step()
        if before.get("step") != now["step"]:
            made = f"by training steps of version {before.get('step', 0)}, and this glmd makes those of {now['step']}"
            raise RunError(
                f"{self.stage}: {checkpoint.path} was made {made}; go on with the glmd that began it, or delete "
                f"{self.folder} to train the stage again"
            )
        for name in LIBRARIES:
            if before[name] != now[name]:
                logger.warning(
                    "%s: continues with %s %s after %s, which would end in identical weights",
                    self.stage,
                    name,
                    now[name],
                    before[name],
                )

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

    def _agree_on_signal(self, received: list[int]) -> int:
        """The signal that any rank received, known to all; 0 for none."""
        if self.accelerator.num_processes == 1:
            return max(received, default=0)
        mine = torch.tensor([max(received, default=0)], device=self.accelerator.device)
        return int(torch.stack(list(self.accelerator.gather(mine))).max())


def _mix(seed: int, counter: int) -> int:
    """A 63-bit seed from two counters (splitmix64), far apart for neighbors."""
    z = (seed * 0x9E3779B97F4A7C15 + counter * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1


def _show_bar(accelerator: Accelerator) -> bool:
    return accelerator.is_main_process and sys.stderr.isatty()
