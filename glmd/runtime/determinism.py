"""On CUDA the same bits from run to run, and from a run that was killed and started again.

    with cublas_workspace(config.deterministic):           # before CUDA starts
        ...
        with same_bits(device, config.deterministic):      # as long as the run takes; torch is afterwards as it was

What asks the order of additions of chance there: the backward of attention, of embeddings and of indexing, and cuBLAS,
which shares out its workspace. torch's strict switch has flash and memory-efficient attention add in one order; cuDNN's
has none and is left out. Our kernel has a program for each row and shares no sum. A CPU needs none of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from glmd.errors import ConfigError

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
FLASH = "FLASH_ATTENTION_DETERMINISTIC"  # transformers reads it and asks the flash-attention package for that
WORKSPACES = (":4096:8", ":16:8")  # those that NVIDIA says give the same bits; the second is slower and smaller
NOT_PROMISED = (
    "deterministic: false, so equal runs, and one that was killed, end in weights that differ in their last bits"
)
NO_TF32 = "tf32: true has no effect on this device, which has no such products"
NO_EFFECT = "deterministic: false has no effect on this device, and nothing is the faster for it"


@contextmanager
def cublas_workspace(wanted: bool) -> Iterator[None]:
    """Tell cuBLAS by its variable, which it reads as it starts. Raises ConfigError where another value is set."""
    given = os.environ.get(VARIABLE)
    if not wanted or not torch.cuda.is_available():
        yield
        return
    if given is not None and given not in WORKSPACES:
        raise ConfigError(
            f"{VARIABLE}={given} does not give the same bits twice; unset it or give {WORKSPACES[0]}, or give "
            "deterministic: false"
        )
    os.environ[VARIABLE] = given or WORKSPACES[0]
    _forget_workspaces()  # of a process that has used cuBLAS before
    try:
        yield
    finally:
        if given is None:
            del os.environ[VARIABLE]
        _forget_workspaces()


@contextmanager
def same_bits(device: torch.device, wanted: bool) -> Iterator[None]:
    """Use algorithms that add in one order. Raises ConfigError where a model needs another."""
    if not wanted or device.type != "cuda":
        yield
        return
    flash = os.environ.get(FLASH)
    memory: Any = torch.utils.deterministic
    mode, filled = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    cudnn, sdp = torch.backends.cudnn, torch.backends.cuda.cudnn_sdp_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        os.environ[FLASH] = "1"
        torch.use_deterministic_algorithms(True)  # strict: where it only warns, attention keeps its ways
        memory.fill_uninitialized_memory = False  # a help for finding faults, and slow
        cudnn.deterministic, cudnn.benchmark = True, False
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise ConfigError(
            f"deterministic: {operation} of this model has no form on a GPU that gives the same bits twice; give "
            "deterministic: false, and equal runs may differ in the last bits of their weights"
        ) from error
    finally:
        os.environ.pop(FLASH)
        os.environ |= {} if flash is None else {FLASH: flash}
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = filled
        cudnn.deterministic, cudnn.benchmark = flags
        torch.backends.cuda.enable_cudnn_sdp(sdp)


@contextmanager
def tensor_float32(device: torch.device, wanted: bool) -> Iterator[None]:
    """Let products of float32 matrices be rounded to TF32 on a GPU that has it."""
    before = torch.get_float32_matmul_precision()
    if wanted and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_tensor_float32(device: torch.device) -> bool:
    """Whether that changes anything there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def is_repeatable(device: torch.device) -> bool:
    """Whether what is computed on the device gives the same bits again."""
    return device.type == "cpu" or (device.type == "cuda" and torch.are_deterministic_algorithms_enabled())


def _forget_workspaces() -> None:
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()
