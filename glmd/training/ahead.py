"""The next step's micro-batches on the device, and what a cache holds for them, while this step is computed.

    for micro_batches in ahead(batches, teacher, device): ...      # [Fed(batch, on_device, teacher_outputs), ...]

On a GPU a thread reads one step ahead and copies on a stream of its own; on a CPU nothing is gained by that.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glmd.data.batches import Batch
from glmd.distillation.cached_teacher import CachedTeacher
from glmd.distillation.teacher import AllOutputs, Ensemble, TeacherOutputs


class Fed(NamedTuple):
    """A micro-batch in host memory and on the device, with a cached teacher's outputs; of a live one, None."""

    batch: Batch
    on_device: Batch
    teacher_outputs: AllOutputs | None


def ahead(batches: Iterator[list[Batch]], teacher: Any, device: torch.device) -> Generator[list[Fed], None, None]:
    """Each step's micro-batches, fed. Whoever takes them closes `batches`."""
    several = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    cached = teacher if all(isinstance(each, CachedTeacher) for each in several) else None

    def feed(step: list[Batch]) -> list[Fed]:
        return [
            Fed(
                batch,
                {name: to_device(each, device) for name, each in batch.items()},
                None if cached is None else cached(batch),
            )
            for batch in step
        ]

    if device.type != "cuda":
        yield from map(feed, batches)
        return
    side, reader = torch.cuda.Stream(device), ThreadPoolExecutor(1, "glmd-ahead")

    def read() -> tuple[list[Fed], torch.cuda.Event] | None:
        with torch.cuda.device(device), torch.cuda.stream(side):
            step = next(batches, None)
            return None if step is None else (feed(step), side.record_event())

    found = read()  # in this thread, of which the loader's workers are children then: they end with their parent
    try:
        while found is not None:
            coming = reader.submit(read)
            step, is_there = found
            now = torch.cuda.current_stream(device)
            now.wait_event(is_there)
            _keep_for(now, step)
            yield step
            found = coming.result()
    finally:
        reader.shutdown(wait=True, cancel_futures=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for it: a copy to a GPU from pageable memory would."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def _keep_for(stream: torch.cuda.Stream, found: Any) -> None:
    """Let the memory of all tensors be free no sooner than the stream is through with them."""
    if isinstance(found, Tensor):
        if found.device.type == "cuda":
            found.record_stream(stream)
    elif isinstance(found, TeacherOutputs):
        _keep_for(stream, (found.hidden_states, found.task_logits))
    elif isinstance(found, dict | list | tuple):
        for each in found.values() if isinstance(found, dict) else found:
            _keep_for(stream, each)
