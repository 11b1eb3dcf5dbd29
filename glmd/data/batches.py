"""From stored tokens and task examples to batches, as pure functions of (seed, epoch, example id).

Nothing depends on how often something was called before: a resumed run, another number of loader workers and a
cached teacher all see the same batches.

    loader = batch_loader(BlockDataset(store, tokenizer, ...), steps=StepPlan(...), start_step=120)
    for micro_batches in loader: ...   # one list of micro-batches for each optimizer step
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmd.losses.labels import IGNORED_LABEL

CHUNK = 1000  # texts that are tokenized at once: their ids are Python numbers for a moment, ten times the size
Key = tuple[int, int]  # (epoch, example id)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Collate:
    """Pad a list of examples to the longest of them. `pad_id` fills input_ids, 0 the masks, -100 the labels.

    Token columns are (B, S), or (R, S) with R rows for the choices of B examples one after another; `num_choices` (B,)
    then says how many are whose. `predicts` (B, S) bool is where words are predicted, which losses and scores look at:
    all tokens of masked and causal LMs. `attention_mask` is for models.
    """

    pad_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        fill = {"input_ids": self.pad_id, "lm_labels": IGNORED_LABEL, "cloze_ids": IGNORED_LABEL}
        batch: Batch = {}
        for name, first in examples[0].items():
            if isinstance(first, int):
                batch[name] = torch.tensor([example[name] for example in examples])
            else:
                rows = [row for e in examples for row in (e[name] if isinstance(e[name], list) else [e[name]])]
                batch[name] = _padded(rows, fill.get(name, 0))
                if name == "input_ids":
                    lengths = torch.tensor([len(row) for row in rows])
        batch["predicts"] = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        batch["attention_mask"] = batch["predicts"].long()
        return batch


def _padded(rows: list[np.ndarray], fill: int) -> Tensor:
    """(R, S) from R rows of at most S ids."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded)
