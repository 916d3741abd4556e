"""Choice of device and number format."""

import ctypes

import pytest
import torch

from config.errors import UsageError
from models.device import keep_freed_memory, pick_device, resolve_dtype, should_compile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_cuda_is_taken_when_it_is_there_and_asked_for_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU and pick_device("cpu") == CPU
    with pytest.raises(UsageError, match="use device=cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == CUDA and pick_device("cuda") == CUDA and pick_device("cpu") == CPU


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    expected = "bfloat16" if native else "float32"
    assert resolve_dtype("auto", CPU) == expected and resolve_dtype("auto", CUDA) == expected
    assert resolve_dtype("float64", CPU) == "float64"


@pytest.mark.parametrize(("variable", "compiles"), [(None, True), ("", True), ("0", True), ("1", False), ("true", False)])
def test_the_environment_turns_compilation_off(monkeypatch: pytest.MonkeyPatch, variable: str | None, compiles: bool) -> None:
    if variable is None:
        monkeypatch.delenv("DISABLE_COMPILE", raising=False)
    else:
        monkeypatch.setenv("DISABLE_COMPILE", variable)
    assert should_compile(True, CUDA) == compiles
    assert not should_compile(False, CUDA) and not should_compile(True, CPU)


def test_a_machine_without_glibc_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def missing(name: str) -> None:
        asked.append(name)
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    keep_freed_memory()
    assert asked == ["libc.so.6"]
