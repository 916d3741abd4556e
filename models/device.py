"""The device and number format of this machine. Knows no model."""

import contextlib
import ctypes
import os
import resource
import shutil
import sys
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from config.errors import UsageError
from config.schema import ArchConfig

# glibc's mallopt(3) parameters.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_KEEP_BYTES = 2**31 - 1
# ru_maxrss counts KiB on Linux, bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def pick_device(name: str) -> torch.device:
    """The device for `name`; auto: the first of cuda (also ROCm), mps (Apple) and cpu. Raises UsageError."""
    there_is = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there_is.items() if is_there)
    if not there_is[name]:
        raise UsageError(
            f"device={name}, but torch sees no {name.upper()} device: use device=cpu, or check the driver and the torch build"
        )
    if name == "cuda":
        # cuDNN's attention takes a tenth of a second to plan for every new shape of rows.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 matrix products."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def resolve_dtype(forward_dtype: str, device: torch.device) -> str:
    """Resolve `forward_dtype`. auto: bfloat16 if `device` multiplies it natively, else float32."""
    if forward_dtype != "auto":
        return forward_dtype
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and cpu_multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def resolve_arch(arch: ArchConfig, device: torch.device) -> ArchConfig:
    """`arch` with `forward_dtype` resolved."""
    return arch.model_copy(update={"forward_dtype": resolve_dtype(arch.forward_dtype, device)})


def has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile needs on a CPU is installed."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def should_compile(wanted: Literal["auto"] | bool, device: torch.device) -> bool:
    """Whether to torch.compile: as `wanted` (auto: on CUDA), unless DISABLE_COMPILE is set and not 0.

    Raises UsageError on a CPU without a C++ compiler; torch would fail only in the middle of a step.
    """
    if os.environ.get("DISABLE_COMPILE", "0") not in ("", "0"):
        return False
    if wanted == "auto":
        return device.type == "cuda"
    if wanted and device.type == "cpu" and not has_compiler():
        raise UsageError("compile=true on a CPU needs a C++ compiler: install g++, name one in the variable CXX, or leave it out")
    return wanted


def set_matmul_precision(tf32: bool, device: torch.device) -> None:
    """Allow or forbid TF32 for float32 matrix products on CUDA. Nothing else changes."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory in bytes: of this process, and of tensors on a CUDA device."""
    peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT}
    if device.type == "cuda":
        peak["cuda_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def memory_in_all(device: torch.device) -> int:
    """Total memory of `device`, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def on_device(array: npt.ArrayLike, device: torch.device) -> torch.Tensor:
    """Copy a host array, or numbers, to `device`; to a GPU asynchronously, from pinned memory."""
    tensor = torch.from_numpy(np.asarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_freed_memory() -> None:
    """Make glibc, if there is one, keep freed memory: by default every large tensor needs new pages."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Allocate large tensors on the heap: freeing an mmap always returns its memory.
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
