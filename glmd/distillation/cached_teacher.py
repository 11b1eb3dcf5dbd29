"""A teacher's outputs, read from disk: the same call as `OnlineTeacher`, without a forward.

    outputs = CachedOutputs(shards)                                # safetensors files that `TeacherCache` made
    teacher = CachedTeacher(outputs, language_model, vocabulary)   # batch -> TeacherOutputs

An example is found by a hash of all that a teacher reads of it, never by a position or a number: no order of the data,
split of a batch or resumption can give it another's answer, and one that is not there is an error.
"""

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from glmd.data.batches import TARGET_COLUMNS
from glmd.distillation.teacher import TeacherOutputs, sliced_head
from glmd.errors import DataError
from glmd.losses.head import Head
from glmd.tasks.forms import choice_logits
from glmd.vocabulary.vocabulary import Vocabulary

DIGEST = 16  # bytes of an example's name
# Columns that a teacher reads: of each row of an example, and of the example.
ROW_COLUMNS = (
    *("input_ids", "token_type_ids", "target_ids", "cloze_ids", "tagged"),
    *("position_ids", "block_position_ids", "context_mask"),  # GLM's
    "text_positions",  # of conversations that share a block
)
EXAMPLE_COLUMNS = ("verbalizers", "mean_over_tokens")
# bfloat16 has no twin in numpy; its bits, and float16's, are read as whole numbers.
BITS = {"F16": np.int16, "BF16": np.int16, "F32": np.float32}
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def example_spans(batch: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """First and last + 1 of the rows (R, S) of each example: one, or one for each choice."""
    rows = range(1, len(batch["input_ids"]) + 1)
    ends = accumulate(batch["num_choices"].tolist()) if "num_choices" in batch else rows
    return list(pairwise([0, *ends]))


def digests(batch: Mapping[str, Tensor]) -> list[bytes]:
    """The name of each example: a hash of its ids, masking, segments, choices and blanks, without padding.

    Where not every token predicts also of those that do.
    """
    read = batch["attention_mask"].sum(1).tolist()
    said = batch["predicts"].sum(1).tolist() if "target_ids" in batch else read
    rows = {name: batch[name].cpu().numpy().astype("<i4") for name in ROW_COLUMNS if name in batch}
    others = {name: batch[name].cpu().numpy().astype("<i4") for name in EXAMPLE_COLUMNS if name in batch}
    predicts = batch["predicts"].cpu().numpy()
    names = []
    for example, (first, stop) in enumerate(example_spans(batch)):
        # Lengths come first, so that no two examples run together to the same bytes.
        of_rows = [stop - first, *read[first:stop], *(said[first:stop] if said is not read else ())]
        found = hashlib.blake2b(np.array(of_rows, "<i4").tobytes(), digest_size=DIGEST)
        for name, ids in rows.items():
            lengths = said if name in TARGET_COLUMNS else read
            found.update(name.encode())
            for row in range(first, stop):
                found.update(ids[row, : lengths[row]].tobytes())
        parts = [predicts[row, : said[row]] for row in range(first, stop)]
        if not all(each.all() for each in parts):
            found.update(b"predicts" + b"".join(each.tobytes() for each in parts))
        for name, values in others.items():
            found.update(name.encode() + values[example].tobytes())
        names.append(found.digest())
    return names


class CachedOutputs:
    """Outputs for many examples, memory-mapped, found by their digests."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = [_Header(path) for path in shards]
        names = np.concatenate([shard.read("digests").reshape(-1) for shard in self.shards]).view(f"S{DIGEST}")
        self.first_rows = [0, *accumulate(shard.fields["digests"]["shape"][0] for shard in self.shards)]
        # Of examples that are equal the first one is taken.
        self.order = np.argsort(names, kind="stable")
        self.names = names[self.order]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the hidden states as they are kept."""
        return DTYPES[self.shards[0].fields["hidden_states"]["dtype"]]

    def __getitem__(self, digest: bytes) -> dict[str, np.ndarray]:
        """`hidden_states` (N, H) bits, `task_logits` (C,), of all its decisions: what is kept of an example.

        Raises KeyError for one that is not there.
        """
        name = np.array([digest], dtype=self.names.dtype)
        place = int(np.searchsorted(self.names, name)[0])
        if place == len(self.names) or self.names[place] != name[0]:
            raise KeyError(digest)
        row = int(self.order[place])
        number = bisect.bisect_right(self.first_rows, row) - 1
        return self.shards[number].of_row(row - self.first_rows[number])


class CachedTeacher:
    """A teacher that reads its outputs.

    language_model: whose head predicts tokens, cut to the vocabulary once; the model itself is not kept. None where
        only task logits are asked for. Hidden states come in the head's dtype.
    """

    def __init__(
        self,
        outputs: CachedOutputs,
        language_model: nn.Module | None,
        vocabulary: Vocabulary,
        *,
        merge_dropped: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.outputs, self.device = outputs, torch.device(device)
        self.head: Head | None = None
        if language_model is not None:
            self.head = sliced_head(language_model, vocabulary, merge_dropped=merge_dropped).to(device)

    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        """Look up each example of a batch, best one in host memory. Raises DataError for one that is not there."""
        found = []
        for i, digest in enumerate(digests(batch)):
            try:
                found.append(self.outputs[digest])
            except KeyError:
                text = f"example {int(batch['example_id'][i])}"
                raise DataError(f"teacher.cache holds no text that is {text} of this batch; delete it") from None
        kept = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
        hidden = logits = None
        if self.head is not None:
            stored = torch.from_numpy(kept["hidden_states"]).view(self.outputs.dtype)
            hidden = self._moved(stored).to(self.head.weight.dtype)
        if "task_logits" in kept:
            flat = torch.from_numpy(kept["task_logits"])
            is_choice = "num_choices" in batch
            decisions = int(batch["num_decisions"].sum()) if "num_decisions" in batch else len(found)
            table = choice_logits(flat[:, None], batch["num_choices"].cpu()) if is_choice else flat.view(decisions, -1)
            logits = self._moved(table)
        return TeacherOutputs(hidden, self.head, logits)

    def _moved(self, part: Tensor) -> Tensor:
        """To the device without waiting for it: a copy from pageable memory would."""
        return (part.pin_memory() if self.device.type == "cuda" else part).to(self.device, non_blocking=True)


class _Header:
    """Where the tensors of a safetensors file lie. safetensors itself keeps a file open for each one it maps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.fields = json.loads(file.read(length))
        self.start = 8 + length

    def read(self, name: str) -> np.ndarray:
        """A tensor of bytes or whole numbers, in memory."""
        begin, end = self.fields[name]["data_offsets"]
        dtype = np.dtype({"U8": np.uint8, "I64": np.int64}[self.fields[name]["dtype"]])
        return np.fromfile(self.path, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=self.start + begin)

    @cached_property
    def offsets(self) -> dict[str, np.ndarray]:
        return {name: self.read(name) for name in ("offsets", "logit_offsets") if name in self.fields}

    @cached_property
    def maps(self) -> dict[str, np.ndarray]:
        """The outputs, read as they are used."""
        return {
            name: np.memmap(
                self.path,
                dtype=BITS[field["dtype"]],
                mode="r",
                offset=self.start + field["data_offsets"][0],
                shape=tuple(field["shape"]),
            )
            for name, field in self.fields.items()
            if name in ("hidden_states", "task_logits")
        }

    def of_row(self, row: int) -> dict[str, np.ndarray]:
        found = {}
        for name, values in self.maps.items():
            offsets = self.offsets["logit_offsets" if name == "task_logits" else "offsets"]
            found[name] = values[offsets[row] : offsets[row + 1]]
        return found
