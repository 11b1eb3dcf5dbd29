"""log.jsonl: one line per logging step of every stage, and the same for a person and for trackers."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from glmd.storage import write_atomically

logger = logging.getLogger(__name__)


class RunLog:
    """Appends rows to `path` on the main process, prints them, and passes them to Accelerate's trackers."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        self._is_tracked = True

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. NaN and infinity are written as they are, never hidden."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        # tqdm.write keeps a progress bar in one piece.
        tqdm.write(_line(row), file=sys.stderr)
        numbers = {f"{row['stage']}/{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        if self._is_tracked:
            try:
                self.accelerator.log(numbers, step=row["step"])
            except Exception as error:  # a tracker is somebody else's server: days of training do not hang on it
                self._is_tracked = False
                logger.warning("report_to: %s; the run goes on without it, %s has all rows", error, self.path)

    def drop_after(self, stage: str, step: int) -> None:
        """Forget a stage's rows after `step`: those steps are about to be run again."""
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the process was killed in the middle of this line
                continue
            if row["stage"] != stage or row["step"] <= step:
                kept.append(line + "\n")
        write_atomically(self.path, "".join(kept))


def _line(row: dict[str, Any]) -> str:
    """`pretraining  step 50/400  loss 1.234  ...` for a terminal."""
    parts = [
        row["stage"],
        f"step {row['step']}/{row['max_steps']}" if "max_steps" in row else f"step {row['step']}",
    ]
    for key, value in row.items():
        if key == "learning_rate":
            parts.append(f"lr {value:.2e}")
        elif key == "tokens_per_second":
            parts.append(f"{value} tokens/s")
        elif isinstance(value, list):
            parts.append(
                f"{key} [{', '.join(f'{each:.4g}' if isinstance(each, float) else str(each) for each in value)}]"
            )
        elif key not in ("stage", "step", "max_steps", "seconds"):
            parts.append(f"{key} {value:.4g}")
    return "  ".join(parts)
