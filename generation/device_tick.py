"""The engine's tick as functions of tensors of fixed shape that live on the device, so that CUDA can replay it as a graph.

A graph is one launch for thousands of small kernels. What it holds may not wait for the host, and reads and writes the same
memory every time: so a row's position, ACT step, depth and threshold are tensors here, and rows are those of the first slots,
running or not. What an idle one computes is read by nobody. Ids only; requests and sampling are the engine's. Shape suffixes as in
models/layers.py.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.act import RecursiveModel
from models.cache import KVCache
from models.layers import Mask, Rotary
from models.losses import argmax, log_probs
from models.recursive_reasoning.base import States

log = logging.getLogger(__name__)

# A graph is made for each power of two of rows and of positions read, from this one on.
_FEWEST_POSITIONS = 64
# What a replay may differ by from the same kernels launched one by one, of the largest number.
_TOLERANCE = 1e-2

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function, which it need not run, and gives one that does the same to the same tensors."""


def graph_recorder() -> Recorder:
    """Records functions as CUDA graphs, which share the memory of what they compute in between."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may talk to the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
        replay: Callable[[], None] = graph.replay
        return replay

    return record


def run_and_record(function: Callable[[], None], written: Sequence[Tensor], record: Recorder) -> Callable[[], None]:
    """Run `function`, which writes to the tensors `written`, and return what is to be run in its place from now on.

    That is its recording if it gives the same, else the function itself; why is logged.
    """
    before = [tensor.clone() for tensor in written]
    function()
    expected = [tensor.clone() for tensor in written]
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(old)
    try:
        replay = record(function)
        replay()
        worst = max(_difference(*pair) for pair in zip(written, expected, strict=True))
        if worst <= _TOLERANCE:
            return replay
        problem = f"a replay differs by {worst:.2g} of the largest number"
    except RuntimeError as error:
        problem = str(error)
    log.warning("no CUDA graph: decoding launches its kernels one by one, which is slower (%s)", problem)
    for tensor, new in zip(written, expected, strict=True):
        tensor.copy_(new)
    return function


def _difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


class DeviceTick:
    """What rows work on, and what a tick does to it."""

    def __init__(
        self, model: RecursiveModel, cache: KVCache, states: States, x_B1D: Tensor, rotary: Rotary | None, record: Recorder
    ) -> None:
        """Latent `states` [B, 1, D] and embedding of every row's token, which are written in place; tables of every position."""
        self._model = model
        self._cache = cache
        self._states = states
        self._x_B1D = x_B1D
        self._rotary = rotary
        self._record = record
        self._replays: dict[tuple[object, ...], Callable[[], None]] = {}
        rows, device = len(x_B1D), x_B1D.device
        exact = torch.promote_types(model.dtype, torch.float32)
        self._positions_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self._act_steps_B = torch.zeros_like(self._positions_B)
        self._depths_B = torch.ones_like(self._positions_B)
        self._thresholds_B = torch.zeros(rows, dtype=exact, device=device)
        self._chosen_3B = torch.zeros(3, rows, dtype=torch.float64, device=device)
        self.output_BD = torch.zeros_like(x_B1D[:, 0])
        """Output of each row's last ACT step."""
        self.ready_B = torch.zeros(rows, dtype=torch.bool, device=device)
        """Whether each row's token has come to its depth or halted."""

    def enter(self, slot: int, position: int, depth: int, halt_threshold: float | None) -> None:
        """A request enters a row: its prompt ends at `position`; its first token `begin`s next."""
        self._positions_B[slot] = position
        self._depths_B[slot] = depth
        self._thresholds_B[slot] = math.inf if halt_threshold is None else halt_threshold

    def begin(self, slots_R: Tensor) -> None:
        """The rows of these slots begin their next token; the engine writes its embedding and states."""
        self._positions_B[slots_R] += 1
        self._act_steps_B[slots_R] = 0

    def step(self, rows: int, past: int) -> None:
        """One ACT step of the rows of the first `rows` slots, whose tokens stand at position `past` at most."""
        rows = self._round_up(rows, 1, len(self.ready_B))
        past = self._round_up(past, _FEWEST_POSITIONS, self._cache.buffer.shape[-2])
        self._run(("step", rows, past), functools.partial(self._step, rows, past))

    def choose(self, rows: int) -> tuple[list[int], list[float], list[bool]]:
        """The most probable id of each of the first `rows` rows, its log p in nats, and whether the row was ready.

        Rows that were ready begin the token chosen; of the others, what is returned means nothing. Waits for the device.
        """
        rounded = self._round_up(rows, 1, len(self.ready_B))
        self._run(("choose", rounded), functools.partial(self._choose, rounded))
        ids, logps, ready = self._chosen_3B[:, :rows].tolist()
        return [int(number) for number in ids], logps, [bool(flag) for flag in ready]

    @staticmethod
    def _round_up(number: int, fewest: int, most: int) -> int:
        return min(max(fewest, 1 << (number - 1).bit_length()), most)

    def _run(self, key: tuple[object, ...], function: Callable[[], None]) -> None:
        replay = self._replays.get(key)
        if replay is None:
            written = (
                *self._states,
                self._x_B1D,
                self._positions_B,
                self._act_steps_B,
                self.output_BD,
                self.ready_B,
                self._chosen_3B,
            )
            self._replays[key] = run_and_record(function, written, self._record)
        else:
            replay()

    def _step(self, rows: int, past: int) -> None:
        model, cache = self._model, self._cache
        _, most_steps, *_, positions, _ = cache.buffer.shape
        # Idle rows count on.
        act_steps_B = self._act_steps_B[:rows].clamp(max=most_steps - 1)
        positions_B = self._positions_B[:rows].clamp(max=positions - 1)
        rotary = None
        if self._rotary is not None:
            rotary = Rotary(*(table.index_select(0, positions_B).unsqueeze(1) for table in self._rotary))
        lanes = cache.extend_together(torch.arange(rows, device=positions_B.device), act_steps_B, positions_B, past)
        states, output_B1D = model.act_step(
            tuple(state[:rows] for state in self._states), self._x_B1D[:rows], rotary, Mask(), lanes
        )
        for kept, new in zip(self._states, states, strict=True):
            kept[:rows] = new
        output_BD = output_B1D[:, 0]
        self.output_BD[:rows] = output_BD
        halts_B = model.halting_probability(output_BD, act_steps_B) > self._thresholds_B[:rows]
        self._act_steps_B[:rows] += 1
        self.ready_B[:rows] = halts_B | (self._act_steps_B[:rows] >= self._depths_B[:rows])

    def _choose(self, rows: int) -> None:
        model, ready_B = self._model, self.ready_B[:rows]
        logits_BV = model.logits(self.output_BD[:rows])
        ids_B = argmax(logits_BV)
        logp_B = log_probs(logits_BV, model.config.loss).gather(1, ids_B.unsqueeze(1)).squeeze(1)
        self._chosen_3B[:, :rows] = torch.stack([part.double() for part in (ids_B, logp_B, ready_B)])
        ready_B11 = ready_B[:, None, None]
        self._x_B1D[:rows] = torch.where(ready_B11, model.embed(ids_B).unsqueeze(1), self._x_B1D[:rows])
        for kept, initial in zip(self._states, model.initial_states(rows, 1), strict=True):
            kept[:rows] = torch.where(ready_B11, initial, kept[:rows])
        self._positions_B[:rows] += ready_B
        self._act_steps_B[:rows] *= ~ready_B
