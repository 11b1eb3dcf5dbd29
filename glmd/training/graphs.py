"""A micro-step of one shape as a CUDA graph: hundreds of kernels that the host starts with one call.

    with Replayed.attention():
        micro_step = Replayed(micro_step, device)       # batch, outputs, factors -> (terms,) sums

The kernels are those of the same call without a graph, in their order, so that the weights are the same, bit for bit.
A small model's step is then as long as the device needs, where a host that starts each kernel takes several times that.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from glmd.data.batches import Batch
from glmd.distillation.teacher import AllOutputs, TeacherOutputs
from glmd.errors import RunError

logger = logging.getLogger(__name__)
WARM = 3  # calls of a shape without a graph, in which libraries find their kernels and take their memory
MOST = 2  # shapes that have a graph; each keeps the activations of its own
MicroStep = Callable[[Batch, AllOutputs | None, Tensor], Tensor]
Shape = tuple[tuple[str, torch.Size, torch.dtype], ...]


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]  # which it reads, where they were when it was recorded
    sums: Tensor


class Replayed:
    """A micro-step that is recorded when a shape comes for the fourth time, and replayed from then on.

    It must leave gradients where they are. One in which the host waits for the device, as that of a mixture of experts,
    is found out before and never recorded, which is said once.
    """

    def __init__(self, micro_step: MicroStep, device: torch.device) -> None:
        self.micro_step, self.stream = micro_step, torch.cuda.Stream(device)
        self.seen: Counter[Shape] = Counter()
        self.recorded: dict[Shape, _Recorded] = {}
        self.may_record = True

    @staticmethod
    @contextmanager
    def attention() -> Iterator[None]:
        """Leave out cuDNN's attention, which cannot be recorded; flash attention can."""
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)

    def __call__(self, batch: Batch, outputs: AllOutputs | None, factors: Tensor) -> Tensor:
        """The sums, which the next call may overwrite. The seed of dropout is set by whoever calls.

        Raises RunError where recording fails, after which a process cannot go on.
        """
        inputs = _inputs(batch, outputs, factors)
        shape: Shape = tuple((name, each.shape, each.dtype) for name, each in sorted(inputs.items()))
        self.seen[shape] += 1
        is_new = shape not in self.recorded and self.may_record and len(self.recorded) < MOST
        if is_new and self.seen[shape] == WARM:
            return self._watched(batch, outputs, factors)
        if is_new and self.seen[shape] > WARM:
            self._record(shape, batch, outputs, factors)
        recorded = self.recorded.get(shape)
        if recorded is None:
            return self._unrecorded(batch, outputs, factors)
        for name, each in recorded.inputs.items():
            each.copy_(inputs[name])
        recorded.graph.replay()
        return recorded.sums

    def _unrecorded(self, batch: Batch, outputs: AllOutputs | None, factors: Tensor) -> Tensor:
        """On the stream that graphs are recorded on: autograd adds up a gradient where it was first asked for."""
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            sums = self.micro_step(batch, outputs, factors)
        now.wait_stream(self.stream)
        return sums

    def _watched(self, batch: Batch, outputs: AllOutputs | None, factors: Tensor) -> Tensor:
        """The same, and find out whether the host waits for the device, of which torch warns then."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                sums = self._unrecorded(batch, outputs, factors)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if any("synchronizing CUDA operation" in str(each.message) for each in said):
            self.may_record = False
            logger.info("steps are not replayed as a CUDA graph: in one of them the host waits for the device")
        return sums

    def _record(self, shape: Shape, batch: Batch, outputs: AllOutputs | None, factors: Tensor) -> None:
        inputs = {name: each.clone() for name, each in _inputs(batch, outputs, factors).items()}
        kept_batch = {name: inputs[f"batch.{name}"] for name in batch}
        kept_outputs = outputs
        if outputs is not None:
            assert isinstance(outputs, TeacherOutputs), "several cached teachers are not replayed"
            kept_outputs = replace(
                outputs, hidden_states=inputs.get("hidden_states"), task_logits=inputs.get("task_logits")
            )
        graph, state = torch.cuda.CUDAGraph(), torch.cuda.get_rng_state()
        try:
            # Other threads read the next step meanwhile, and pin memory, which is none of this one's.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                sums = self.micro_step(kept_batch, kept_outputs, inputs["factors"])
        except RuntimeError as error:
            # torch's generator then takes itself for one that is being recorded, and fails sooner or later.
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"steps of this model cannot be recorded as a CUDA graph ({reason}); give cuda_graphs=false, and the "
                "same command goes on from the last checkpoint"
            ) from error
        torch.cuda.set_rng_state(state)
        self.recorded[shape] = _Recorded(graph, inputs, sums)


def _inputs(batch: Batch, outputs: AllOutputs | None, factors: Tensor) -> dict[str, Tensor]:
    """All tensors that differ from call to call."""
    found = {f"batch.{name}": each for name, each in batch.items()} | {"factors": factors}
    if outputs is not None:
        found |= {
            name: each for name in ("hidden_states", "task_logits") if (each := getattr(outputs, name)) is not None
        }
    return found
