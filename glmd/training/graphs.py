"""A micro-step of one shape as a CUDA graph: hundreds of kernels that the host starts with one call.

    micro_step = Replayed(micro_step, device)       # batch, outputs, factors -> (terms,) sums

The kernels are those of the same call without a graph, in their order, so that the weights are the same, bit for bit.
A small model's step is then as long as the device needs, where a host that starts each kernel takes several times that.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from glmd.data.batches import Batch
from glmd.distillation.teacher import TeacherOutputs

logger = logging.getLogger(__name__)
WARM = 3  # calls of a shape without a graph, in which libraries find their kernels and take their memory
MOST = 2  # shapes that have a graph; each keeps the activations of its own
MicroStep = Callable[[Batch, TeacherOutputs | None, Tensor], Tensor]
Shape = tuple[tuple[str, torch.Size, torch.dtype], ...]


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]  # which it reads, where they were when it was recorded
    sums: Tensor


class Replayed:
    """A micro-step that is recorded when a shape comes for the fourth time, and replayed from then on.

    It must read nothing on the host that changes, and leave gradients where they are. A model for which that cannot be
    done goes on as before, which is said once.
    """

    def __init__(self, micro_step: MicroStep, device: torch.device) -> None:
        self.micro_step, self.stream = micro_step, torch.cuda.Stream(device)
        self.seen: Counter[Shape] = Counter()
        self.recorded: dict[Shape, _Recorded] = {}
        self.most = MOST

    def __call__(self, batch: Batch, outputs: TeacherOutputs | None, factors: Tensor) -> Tensor:
        """The sums, which the next call may overwrite. The seed of dropout is set by whoever calls."""
        inputs = _inputs(batch, outputs, factors)
        shape: Shape = tuple((name, each.shape, each.dtype) for name, each in sorted(inputs.items()))
        self.seen[shape] += 1
        if shape not in self.recorded and self.seen[shape] > WARM and len(self.recorded) < self.most:
            self._record(shape, batch, outputs, factors)
        recorded = self.recorded.get(shape)
        now = torch.cuda.current_stream()
        if recorded is None:
            # On the stream that graphs are recorded on: autograd adds up a gradient where it was first asked for.
            self.stream.wait_stream(now)
            with torch.cuda.stream(self.stream):
                sums = self.micro_step(batch, outputs, factors)
            now.wait_stream(self.stream)
            return sums
        for name, each in recorded.inputs.items():
            each.copy_(inputs[name])
        recorded.graph.replay()
        return recorded.sums

    def _record(self, shape: Shape, batch: Batch, outputs: TeacherOutputs | None, factors: Tensor) -> None:
        inputs = {name: each.clone() for name, each in _inputs(batch, outputs, factors).items()}
        kept_batch = {name: inputs[f"batch.{name}"] for name in batch}
        kept_outputs = outputs
        if outputs is not None:
            kept_outputs = replace(
                outputs, hidden_states=inputs.get("hidden_states"), task_logits=inputs.get("task_logits")
            )
        graph, state = torch.cuda.CUDAGraph(), torch.cuda.get_rng_state()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                sums = self.micro_step(kept_batch, kept_outputs, inputs["factors"])
        except RuntimeError as error:
            self.most = 0
            torch.cuda.synchronize()
            reason = str(error).partition("\n")[0]
            logger.warning("steps are not replayed as a CUDA graph, and the host starts each kernel: %s", reason)
        else:
            self.recorded[shape] = _Recorded(graph, inputs, sums)
        torch.cuda.set_rng_state(state)


def _inputs(batch: Batch, outputs: TeacherOutputs | None, factors: Tensor) -> dict[str, Tensor]:
    """All tensors that differ from call to call."""
    found = {f"batch.{name}": each for name, each in batch.items()} | {"factors": factors}
    if outputs is not None:
        found |= {
            name: each for name in ("hidden_states", "task_logits") if (each := getattr(outputs, name)) is not None
        }
    return found
