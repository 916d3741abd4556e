"""Where and in which number format a model runs on this machine. Knows no model."""

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
    """The device for `name` auto, cpu, cuda (ROCm, too) or mps (Apple). Auto: the first of cuda, mps and cpu that there is.

    Raises UsageError if a device is asked for and there is none.
    """
    there_is = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there_is.items() if is_there)
    if not there_is[name]:
        raise UsageError(
            f"device={name}, but torch sees no {name.upper()} device: use device=cpu, or check the driver and the torch build"
        )
    return torch.device(name)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 numbers."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def resolve_dtype(forward_dtype: str, device: torch.device) -> str:
    """`forward_dtype`, with auto decided: bfloat16 where a CPU or a CUDA device multiplies it natively, else float32."""
    if forward_dtype != "auto":
        return forward_dtype
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and cpu_multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def resolve_arch(arch: ArchConfig, device: torch.device) -> ArchConfig:
    """`arch` with its number format decided, as `resolve_dtype` does."""
    return arch.model_copy(update={"forward_dtype": resolve_dtype(arch.forward_dtype, device)})


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile needs on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def should_compile(wanted: Literal["auto"] | bool, device: torch.device) -> bool:
    """Whether to torch.compile: `wanted` (auto: on CUDA), and the environment variable DISABLE_COMPILE is not set (or is 0).

    Raises UsageError if it is wanted on a CPU and there is no C++ compiler, which torch would find out in the middle of a step.
    """
    if os.environ.get("DISABLE_COMPILE", "0") not in ("", "0"):
        return False
    if wanted == "auto":
        return device.type == "cuda"
    if wanted and device.type == "cpu" and not has_compiler():
        raise UsageError("compile=true on a CPU needs a C++ compiler: install g++, name one in the variable CXX, or leave it out")
    return wanted


def set_matmul_precision(tf32: bool, device: torch.device) -> None:
    """Whether CUDA may multiply float32 matrices in TF32; other devices and number formats are left alone."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory held so far, in bytes: by this process, torch's libraries included, and by tensors on a CUDA device."""
    peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT}
    if device.type == "cuda":
        peak["cuda_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def memory_in_all(device: torch.device) -> int:
    """Bytes of memory of `device`, in use or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def on_device(array: npt.ArrayLike, device: torch.device) -> torch.Tensor:
    """A host array, or numbers that make one, on `device`; to a GPU it goes from pinned memory, while the host goes on."""
    tensor = torch.from_numpy(np.asarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: by default it returns every large tensor to the system, and each new one pays for fresh pages.

    Does nothing where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Large tensors come from the heap, too: memory mapped for one is unmapped when it is freed, whatever the trim threshold.
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
