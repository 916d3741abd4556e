"""The kernel of an ACT step gives what level calls give: run by Triton's interpreter, and compiled for a GPU that isn't there."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from generation.engine import Engine, Request, Token, lane_count
from models.act import RecursiveModel
from models.cache import KVCache
from models.layers import Rotary
from tests.test_device_tick import Recordings, assert_same
from tests.test_engine import NEVER, decode, make_prompts

pytest.importorskip("triton")
ModelFactory = Callable[..., RecursiveModel]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POST_NORM = ("arch.norm=post", "arch.qk_norm=false")
SMALL = ("arch.H_cycles=1", "arch.L_cycles=1", "arch.L_layers=1", "arch.forward_dtype=float32", *POST_NORM)
ONE_BLOCK = ("arch=transformers_baseline", "arch.H_layers=1", "arch.forward_dtype=float32", *POST_NORM)
# Heads of 4 channels of a state of 14: no size is a power of two.
ODD = ("arch.hidden_size=14", "arch.num_heads=3")


# 300 positions are more than a program of one row reads at once, and than one program of several reads.
@pytest.mark.parametrize(
    ("overrides", "rows", "positions"),
    [
        (SMALL, 1, 12),
        (SMALL, 3, 12),
        ((*SMALL, *ODD), 1, 12),
        ((*SMALL, *ODD, "arch=hrm", "arch.H_layers=2"), 2, 12),
        ((*SMALL, "arch=trm_hier6"), 1, 12),
        (ONE_BLOCK, 1, 600),
        (ONE_BLOCK, 2, 300),
        ((*SMALL, "arch.forward_dtype=bfloat16"), 1, 12),
        ((*SMALL, *ODD, "arch.qk_norm=true"), 1, 12),
        ((*SMALL, *ODD, "arch.qk_norm=true"), 3, 12),
        ((*SMALL, "arch.qk_norm=true", "arch.forward_dtype=bfloat16"), 1, 12),
    ],
)
def test_an_act_step_equals_level_calls(tiny_model: ModelFactory, overrides: tuple[str, ...], rows: int, positions: int) -> None:
    model = tiny_model(*overrides).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    steps, capacity = 3, rows + 1
    first, second = (
        KVCache(
            rows=capacity, act_steps=steps, lanes=lane_count(model), heads=model.config.num_heads, positions=positions,
            head_dim=model.config.head_dim, dtype=model.dtype, device=DEVICE,
        )
        for _ in range(2)
    )  # fmt: skip
    first.buffer.copy_(torch.randn(first.buffer.shape, generator=generator))
    second.buffer.copy_(first.buffer)
    states = len(model.recursion.initial_states)
    vectors = torch.randn(states + 2, capacity, model.config.hidden_size, generator=generator).to(DEVICE, model.dtype)
    positions_B = torch.tensor([positions - 1, 0, positions // 2][:rows], device=DEVICE)
    act_steps_B = torch.tensor([1, 2, 0][:rows], device=DEVICE)
    rotary = model.rotary(torch.arange(positions, device=DEVICE))
    assert rotary is not None
    attend = second.extend_together(torch.arange(rows, device=DEVICE), act_steps_B, positions_B, positions, compiled=False)
    from models.decode_kernel import ActStepKernel

    with torch.inference_mode():
        new_states, output = model.act_step(
            tuple(vectors[:states, :rows, None]),
            vectors[states, :rows, None],
            Rotary(rotary.cos[positions_B].unsqueeze(1), rotary.sin[positions_B].unsqueeze(1)),
            attend,
        )
        expected = vectors.clone()
        expected[:states, :rows] = torch.stack(new_states)[:, :, 0]
        expected[-1, :rows] = output[:, 0]
        ActStepKernel(model, first, rotary, vectors)(rows, positions_B, act_steps_B)
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.1
    torch.testing.assert_close(vectors, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(first.buffer, second.buffer, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("other", "knows"),
    [
        ("arch.qk_norm=true", True),
        ("arch.norm=pre", False),
        ("arch.pos_encodings=none", False),
        ("arch.forward_dtype=float64", False),
    ],
)
def test_it_is_for_models_that_it_computes(tiny_model: ModelFactory, other: str, knows: bool) -> None:
    from models.decode_kernel import ActStepKernel

    assert ActStepKernel.knows(tiny_model(*SMALL, other)) == knows


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there the engine takes it by itself")
def test_the_engine_decodes_with_it(tiny_model: ModelFactory, caplog: pytest.LogCaptureFixture) -> None:
    from models.decode_kernel import ActStepKernel

    model = tiny_model(*ONE_BLOCK, halt_scale=3.0)
    prompts = make_prompts((3, 5))
    requests = [Request(prompts[0], 3), Request(prompts[1], 4, halt_threshold=0.5)]
    engine = Engine(model, eos_id=NEVER, act_steps=2, rows=2, positions=9, record=Recordings())
    tick = engine._on_device
    assert tick is not None and engine._rotary is not None
    tick._kernel = ActStepKernel(model, engine._cache, engine._rotary, engine._vectors.squeeze(2))
    for request in requests:
        engine.submit(request)
    answers: list[list[Token]] = [[], []]
    while engine.busy:
        for token in engine.tick():
            answers[token.request].append(token)
    assert_same(answers, decode(model, requests, act_steps=2), tolerance=1e-5)
    assert not caplog.records, "no other way was taken"


def compile_for_h100(rows: int, dtype: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from models.decode_kernel import _act_step, block_sizes

    constants = {"VECTORS": 3, "TABLE": 5, "LANES": 42, "QK_NORM": True, "D": 512, "H": 8, "K": 64, "I": 1536}
    constants |= block_sizes(rows, 512, 8, 64, 1536)
    words = ("values", "qkv", "heard", "middle", "gated", "positions", "act_steps", "epochs")
    kinds = dict.fromkeys(words, "*i64") | dict.fromkeys(("blocks", "results"), "*i32") | dict.fromkeys(("cos", "sin"), "*fp32")
    kinds |= dict.fromkeys(("vectors", "w_qkv", "w_o", "w_gate_up", "w_down", "cache"), f"*{dtype}") | dict.fromkeys(
        constants, "constexpr"
    )
    signature = {name: kinds.get(name, "i32") for name in _act_step.arg_names}
    options = {"num_warps": 8, "launch_cooperative_grid": True}
    compiled = compile_kernel(ASTSource(_act_step, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_compiles_for_a_gpu(rows: int, dtype: str) -> None:
    code = f"from tests.test_decode_kernel import compile_for_h100; compile_for_h100({rows}, {dtype!r})"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "0"}, check=True)
