"""The engine's tick as functions on device tensors of fixed shapes, which CUDA graphs can replay.

A graph launches thousands of small kernels at once. It must not wait for the host, and must use the
same memory every time. So a row's position, ACT step, depth and threshold are tensors here, and a
tick runs the first slots, busy or idle; results of idle ones are ignored. Ids only; requests and
sampling belong to the engine. Shape suffixes as in models/layers.py.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.act import RecursiveModel
from models.cache import KVCache
from models.layers import Rotary
from models.losses import argmax, log_probs

if TYPE_CHECKING:
    from models.decode_kernel import ActStepKernel

log = logging.getLogger(__name__)

# There is a graph for each power of two of rows and of positions read, from this minimum up.
_FEWEST_POSITIONS = 64
# Tolerated difference of an ACT step or a choice from the same computed without a graph: RMS of the
# difference over RMS of the result. In bfloat16, two correct ways through 42 blocks differ by 0.03,
# a wrong one by 1.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2}

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function, which it need not run; returns one that does the same to the same tensors."""


def graph_recorder() -> Recorder:
    """A recorder of CUDA graphs, which share memory for intermediate results."""
    make_pool = functools.cache(torch.cuda.graph_pool_handle)

    def record(function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device during the capture.
        with torch.cuda.graph(graph, pool=make_pool(), capture_error_mode="thread_local"):
            function()
        replay: Callable[[], None] = graph.replay
        return replay

    return record


def act_step_kernel(model: RecursiveModel, cache: KVCache, vectors: Tensor, rotary: Rotary | None) -> "ActStepKernel | None":
    """The fused kernel of the model's ACT step, for `DeviceTick`; None if there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    from models.decode_kernel import ActStepKernel

    if rotary is None or not ActStepKernel.knows(model):
        return None
    return ActStepKernel(model, cache, rotary, vectors.squeeze(2))


def run_and_record(
    ways: Mapping[str, Callable[[], None]], written: Sequence[Tensor], compared: Tensor, tolerance: float, record: Recorder
) -> Callable[[], None]:
    """Run the last of `ways`, named implementations of the same function, and return the one to run
    from now on.

    Returns a recording of the first way whose `compared` is within `tolerance` of the last way's,
    or else the last way without a recording. Rejected ways are logged. The ways write to the
    tensors `written`, including `compared`.
    """
    before = [tensor.clone() for tensor in written]
    plain = list(ways.values())[-1]
    plain()
    after = [tensor.clone() for tensor in written]
    expected = compared.clone()

    def restore(values: Sequence[Tensor]) -> None:
        for tensor, value in zip(written, values, strict=True):
            tensor.copy_(value)

    for name, way in ways.items():
        restore(before)
        # Any error of a compiler or driver: try the next way.
        try:
            # Compile and allocate before the capture.
            way()
            restore(before)
            replay = record(way)
            replay()
            difference = _relative_difference(compared, expected)
            if difference <= tolerance:
                return replay
            problem = f"it differs by {difference:.2g} of the result"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        log.warning("decoding on CUDA is slower than it could be: no graph of the %s (%s)", name, problem)
    restore(after)
    return plain


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    exact = torch.promote_types(found.dtype, torch.float32)
    found, expected = found.to(exact), expected.to(exact)
    return float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))


class DeviceTick:
    """The rows' state on the device, and the functions of a tick."""

    def __init__(
        self,
        model: RecursiveModel,
        cache: KVCache,
        vectors: Tensor,
        rotary: Rotary | None,
        record: Recorder,
        kernel: "ActStepKernel | None" = None,
    ) -> None:
        """vectors: [n + 2, B, 1, D], written in place: n latent states, token embedding and last
        output of each row.

        rotary: tables of every position. kernel: the fused kernel of an ACT step, used if it serves
        the number of rows.
        """
        self._model = model
        self._cache = cache
        self._vectors = vectors
        self._states, self._x_B1D, self._output_B1D = vectors[:-2].unbind(), vectors[-2], vectors[-1]
        self._rotary = rotary
        self._record = record
        self._kernel = kernel
        self._replays: dict[tuple[object, ...], Callable[[], None]] = {}
        rows, device = vectors.shape[1], vectors.device
        exact = torch.promote_types(model.dtype, torch.float32)
        self._positions_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self._act_steps_B = torch.zeros_like(self._positions_B)
        self._depths_B = torch.ones_like(self._positions_B)
        self._thresholds_B = torch.zeros(rows, dtype=exact, device=device)
        # Each row's id, its log p, and whether it was ready, for a single read. Floats represent
        # ids exactly up to 2**24.
        self._chosen_3B = torch.zeros(3, rows, dtype=exact, device=device)
        self.ready_B = torch.zeros(rows, dtype=torch.bool, device=device)
        """Whether each row's token is at its depth or has halted."""

    def enter(self, slot: int, position: int, depth: int, halt_threshold: float | None) -> None:
        """Put a request into a row. Its prompt ends at `position`; `begin` its first token next."""
        # fill_, because assigning a number copies it and waits for the device.
        self._positions_B[slot].fill_(position)
        self._depths_B[slot].fill_(depth)
        self._thresholds_B[slot].fill_(math.inf if halt_threshold is None else halt_threshold)

    def begin(self, slots_R: Tensor) -> None:
        """Begin the rows' next token; the engine writes its embedding and states."""
        self._positions_B[slots_R] += 1
        self._act_steps_B.index_fill_(0, slots_R, 0)

    def step(self, rows: int, past: int, may_halt: bool) -> None:
        """One ACT step of the first `rows` slots, whose tokens are at most at position `past`.

        may_halt: whether any row has a threshold.
        """
        rows = self._round_up(rows, 1, len(self.ready_B))
        past = self._round_up(past, _FEWEST_POSITIONS, self._cache.buffer.shape[-2])
        ways = {"level calls": functools.partial(self._step, self._level_calls, rows, past, may_halt)}
        if self._cache.is_compiled:
            compiled = functools.partial(self._level_calls, compiled=True)
            ways = {"compiled level calls": functools.partial(self._step, compiled, rows, past, may_halt)} | ways
        if self._kernel is not None and self._kernel.serves(rows):
            # The kernel reads only as many positions as a row has.
            past = self._cache.buffer.shape[-2]
            ways = {"kernel of an ACT step": functools.partial(self._step, self._kernel_call, rows, past, may_halt)} | ways
        self._run((rows, past, may_halt), ways, self._vectors, _TOLERANCE[self._model.dtype])

    def choose(self, rows: int) -> tuple[list[int], list[float], list[bool]]:
        """The most probable id of each of the first `rows` rows, its log p in nats, and whether the
        row was ready.

        Ready rows begin the chosen token; ignore the id and log p of other rows. Waits for the
        device.
        """
        rounded = self._round_up(rows, 1, len(self.ready_B))
        self._run(
            (rounded,), {"choice of ids": functools.partial(self._choose, rounded)}, self._chosen_3B, _TOLERANCE[torch.float32]
        )
        ids, logps, ready = self._chosen_3B[:, :rows].tolist()
        return [int(number) for number in ids], logps, [bool(flag) for flag in ready]

    @staticmethod
    def _round_up(number: int, fewest: int, most: int) -> int:
        return min(max(fewest, 1 << (number - 1).bit_length()), most)

    def _run(self, key: tuple[object, ...], ways: Mapping[str, Callable[[], None]], compared: Tensor, tolerance: float) -> None:
        replay = self._replays.get(key)
        if replay is None:
            written = (self._vectors, self._positions_B, self._act_steps_B, self.ready_B, self._chosen_3B)
            self._replays[key] = run_and_record(ways, written, compared, tolerance, self._record)
        else:
            replay()

    def _step(self, act_step: Callable[[int, int], None], rows: int, past: int, may_halt: bool) -> None:
        act_step(rows, past)
        act_steps_B = self._act_steps_B[:rows]
        if may_halt:
            halting_B = self._model.halting_probability(self._output_B1D[:rows, 0], act_steps_B)
        act_steps_B += 1
        ready_B = act_steps_B >= self._depths_B[:rows]
        self.ready_B[:rows] = ready_B | (halting_B > self._thresholds_B[:rows]) if may_halt else ready_B

    def _kernel_call(self, rows: int, past: int) -> None:
        assert self._kernel is not None
        self._kernel(rows, self._positions_B, self._act_steps_B)

    def _level_calls(self, rows: int, past: int, compiled: bool = False) -> None:
        _, most_steps, *_, positions, _ = self._cache.buffer.shape
        # Idle rows keep counting.
        act_steps_B = self._act_steps_B[:rows].clamp(max=most_steps - 1)
        positions_B = self._positions_B[:rows].clamp(max=positions - 1)
        rotary = None
        if self._rotary is not None:
            rotary = self._rotary.at(positions_B.unsqueeze(1))
        rows_B = torch.arange(rows, device=positions_B.device)
        states, output_B1D = self._model.act_step(
            tuple(state[:rows] for state in self._states),
            self._x_B1D[:rows],
            rotary,
            self._cache.extend_together(rows_B, act_steps_B, positions_B, past, compiled=compiled),
        )
        for kept, new in zip((*self._states, self._output_B1D), (*states, output_B1D), strict=True):
            kept[:rows] = new

    def _choose(self, rows: int) -> None:
        model, ready_B = self._model, self.ready_B[:rows]
        logits_BV = model.logits(self._output_B1D[:rows, 0])
        ids_B = argmax(logits_BV)
        logp_B = log_probs(logits_BV, model.config.loss).gather(1, ids_B.unsqueeze(1)).squeeze(1)
        self._chosen_3B[:, :rows] = torch.stack([part.to(self._chosen_3B.dtype) for part in (ids_B, logp_B, ready_B)])
        ready_B11 = ready_B[:, None, None]
        self._x_B1D[:rows] = torch.where(ready_B11, model.embed(ids_B).unsqueeze(1), self._x_B1D[:rows])
        for kept, initial in zip(self._states, model.initial_states(rows, 1), strict=True):
            kept[:rows] = torch.where(ready_B11, initial, kept[:rows])
        self._positions_B[:rows] += ready_B
        self._act_steps_B[:rows] *= ~ready_B
