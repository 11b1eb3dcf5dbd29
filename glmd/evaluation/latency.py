"""How long a model takes to answer, on this machine.

latency = measured_latency("runs/mine/tasks/RTE/seed-0/task_soft_labels/student", known={})     # ms by batch
"""

import json
import statistics
import time
from pathlib import Path

import torch

from glmd.models.loading import load_model_as_saved

BATCHES = (1, 32)
LENGTH = 64  # tokens of each text, or as many as the model has positions for
REPEATS = 7


@torch.inference_mode()
def measured_latency(folder: Path, known: dict[str, dict[str, float]]) -> dict[str, float]:
    """Milliseconds of a forward, the median of seven, by the batch: texts of 64 tokens, on a GPU where there is one.

    known: what was measured before, by shape; models of one config are measured once, and are added to it.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)
    if not _is_latency(known.get(shape)):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model_as_saved(str(folder)).eval().to(device)
        length = min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
        known[shape] = {str(batch): _median(model, batch, length, device) for batch in BATCHES}
    return known[shape]


def _is_latency(found: object) -> bool:
    """Whether it is what was measured before, and nothing that a file was damaged to."""
    return isinstance(found, dict) and bool(found) and all(isinstance(each, (int, float)) for each in found.values())


def _median(model: torch.nn.Module, batch: int, length: int, device: torch.device) -> float:
    ids = torch.ones(batch, length, dtype=torch.long, device=device)
    if "MultipleChoice" in type(model).__name__:
        ids = ids[:, None]
    taken = []
    for _ in range(REPEATS + 1):  # the first warms up
        began = time.perf_counter()
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - began) * 1000)
    return round(statistics.median(taken[1:]), 2)
