"""Choice of device and number format."""

import ctypes
import shutil
import sys

import pytest
import torch

from config.errors import UsageError
from models.device import keep_freed_memory, peak_memory, pick_device, resolve_dtype, set_matmul_precision, should_compile

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def test_cuda_is_taken_when_it_is_there_and_asked_for_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU and pick_device("cpu") == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(UsageError, match=f"no {name.upper()} device: use device=cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == MPS and pick_device("mps") == MPS and pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == CUDA and pick_device("cuda") == CUDA and pick_device("cpu") == CPU


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    expected = "bfloat16" if native else "float32"
    assert resolve_dtype("auto", CPU) == expected and resolve_dtype("auto", CUDA) == expected
    assert resolve_dtype("float64", CPU) == "float64" and resolve_dtype("auto", MPS) == "float32"


@pytest.mark.parametrize(("variable", "compiles"), [(None, True), ("", True), ("0", True), ("1", False), ("true", False)])
def test_the_environment_turns_compilation_off(monkeypatch: pytest.MonkeyPatch, variable: str | None, compiles: bool) -> None:
    if variable is None:
        monkeypatch.delenv("DISABLE_COMPILE", raising=False)
    else:
        monkeypatch.setenv("DISABLE_COMPILE", variable)
    assert should_compile("auto", CUDA) == should_compile(True, CUDA) == compiles
    assert not should_compile(False, CUDA) and not should_compile("auto", CPU)


def test_a_cpu_compiles_when_told_to_and_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISABLE_COMPILE", raising=False)
    monkeypatch.setenv("CXX", sys.executable)
    assert should_compile(True, CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="install g\\+\\+, name one in the variable CXX, or leave it out"):
        should_compile(True, CPU)


def test_tf32_is_for_cuda_and_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    for tf32 in (True, False):
        set_matmul_precision(tf32, CPU)
        set_matmul_precision(tf32, CUDA)
    assert chosen == ["high", "highest"]


def test_peak_memory_grows_with_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    before = peak_memory(CPU)
    assert before.keys() == {"peak_rss_bytes"} and before["peak_rss_bytes"] > 2**25
    held = torch.ones(before["peak_rss_bytes"] // 4 + 2**22)
    assert peak_memory(CPU)["peak_rss_bytes"] >= held.nbytes
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert peak_memory(CUDA)["cuda_peak_bytes"] == 7


def test_a_machine_without_glibc_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def missing(name: str) -> None:
        asked.append(name)
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    keep_freed_memory()
    assert asked == ["libc.so.6"]
