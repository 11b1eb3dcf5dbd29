"""The memory of this machine, and the least that a model needs of it.

fits = memory_of_this_machine() * USABLE // forward_bytes(config, 512)     # texts of 512 tokens
"""

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

USABLE = 0.9  # of a device's memory; the rest is the allocator's gaps, the libraries' own buffers and the context


def memory_of_this_machine() -> float:
    """Bytes of its GPU, or of what this process may have of its main memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    found += [float(limit)] if limit != resource.RLIM_INFINITY else []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        path = Path("/sys/fs/cgroup") / name
        with suppress(OSError, ValueError):  # not there, or "max"
            found.append(float(int(path.read_text(encoding="ascii"))))
    return min(found)


def forward_bytes(config: Any, tokens: int) -> int:
    """What a text takes at least while it goes through a layer of a model: hidden states beside those within."""
    config = config.get_text_config()
    width, within = (getattr(config, name, None) for name in ("hidden_size", "intermediate_size"))
    width = width if isinstance(width, int) else 1  # a few configs have a width for each layer, or none
    return 4 * tokens * (2 * width + (within if isinstance(within, int) else 4 * width))
