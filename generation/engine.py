"""Continuous batching with a KV cache: decodes many requests at once. Ids in, ids out; knows no
text and no tokenizer.

A tick is one ACT step of every running row. A row whose token has halted chooses its id, and begins
the next token in the next tick. So tokens that halt early cost less, and nothing is moved. When an
answer has ended its row is free, and waiting requests enter. At a fixed number of ACT steps the result equals full
recomputation. With a halting threshold, each token of an assistant halts on its own, also in
earlier answers; prompt segments take all steps. Shape suffixes as in models/layers.py; P prompts, R
rows that choose an id.
"""

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from config.errors import UsageError
from dataset.text.packing import tokens_in_rows
from generation.device_tick import DeviceTick, Recorder, act_step_kernel, graph_recorder
from generation.sampling import GREEDY, Sampler, Sampling
from models.act import DTYPES, RecursiveModel
from models.cache import KVCache
from models.device import on_device
from models.layers import Rotary, TokenRows

# Like models/layers.TOKEN_MULTIPLE, but finer: prompts are short, and more padding would cost more
# than new kernels.
_PROMPT_TOKEN_MULTIPLE = 8
# Where rows may be at different ACT steps, requests enter when this fraction of the rows is free, or
# a row for each that waits: prompts cost less together.
_FREE_TO_ADMIT = 1 / 4
# But no request waits beside a free row for longer than this many tokens take at full depth.
_MOST_TOKENS_TO_WAIT = 4


@dataclass(frozen=True)
class Prompt:
    """Ids of a history and an assistant's tag, and their prompt segments (0: assistant text)."""

    ids: np.ndarray
    segment: np.ndarray


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how."""

    prompt: Prompt
    max_new_tokens: int
    sampling: Sampling = GREEDY
    sample: int = 0
    """Number of this sample among those of one prompt. Each number draws differently."""
    act_steps: int | None = None
    """Maximum number of ACT steps per token; None: the engine's."""
    halt_threshold: float | None = None
    """A token halts once its halting probability exceeds this; None: no early halting."""
    top: int = 0
    """How many of the most probable ids to report with each token."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of one request."""

    request: int
    id: int
    logp: float
    """log p of the id under the model, in nats, before temperature and truncation."""
    act_steps: int
    """ACT steps that it took."""
    finish: Literal["stop", "length"] | None
    """stop: it is the EOS. length: the request's limit of tokens is reached."""
    candidates: tuple[tuple[int, float], ...] = ()
    """The `top` most probable ids and their log p."""


@dataclass
class _Row:
    """The state of a running row."""

    number: int
    request: Request
    depth: int
    position: int = 0
    """Position of the current token."""
    act_step: int = 0
    """ACT steps that it has taken."""
    generated: int = 0
    """Tokens generated so far."""


def lane_count(model: RecursiveModel) -> int:
    """Lanes of one ACT step: one for each layer of each level call."""
    return sum(model.recursion.levels[level] for level in model.level_calls)


def cache_bytes(model: RecursiveModel, act_steps: int, rows: int, positions: int) -> int:
    """Size of a KV cache for `rows` rows of `positions` positions, in bytes."""
    element = DTYPES[model.config.forward_dtype].itemsize
    return act_steps * lane_count(model) * 2 * rows * positions * model.config.num_heads * model.config.head_dim * element


def rows_that_fit(model: RecursiveModel, act_steps: int, positions: int, budget_gb: float, most: int) -> int:
    """How many rows, at most `most`, fit in a KV cache of `budget_gb` GB (10^9 bytes).

    Raises UsageError if not even one fits, before anything is allocated.
    """
    one = cache_bytes(model, act_steps, 1, positions)
    rows = min(most, int(budget_gb * 1e9) // one)
    if rows < 1:
        raise UsageError(
            f"generation.kv_budget_gb {budget_gb:g} has no room for one row: {positions} positions at {act_steps} ACT steps take "
            f"{one / 1e9:.2f} GB of keys and values; raise it, or lower the ACT steps or the number of output tokens"
        )
    return rows


class Engine:
    """Decodes with one set of weights, which must not change during its lifetime."""

    def __init__(
        self,
        model: RecursiveModel,
        *,
        eos_id: int,
        act_steps: int,
        rows: int,
        positions: int,
        compiled: bool = False,
        record: Recorder | None = None,
    ) -> None:
        """rows: requests that run at the same time. positions: limit of a request's prompt and new
        tokens, without the last one.

        compiled: torch.compile the decoding of new tokens, once for a single row and once for
        several. Compiled code keeps its own copy of the weights.

        record: run ticks as functions of fixed shapes, recorded by this. None: on CUDA record CUDA
        graphs, with the fused kernel of an ACT step if there is one; on other devices record
        nothing.
        """
        self.model = model
        self.eos_id = eos_id
        self.act_steps = act_steps
        self.positions = positions
        self._cache = KVCache(
            rows=rows,
            act_steps=act_steps,
            lanes=lane_count(model),
            heads=model.config.num_heads,
            positions=positions,
            head_dim=model.config.head_dim,
            dtype=model.dtype,
            device=model.device,
            compiled=compiled,
        )
        self._sampler = Sampler(rows, model.vocab_size, model.config.loss, model.device)
        self._rows: list[_Row | None] = [None] * rows
        self._waiting: collections.OrderedDict[int, Request] = collections.OrderedDict()
        self._numbers = itertools.count()
        self._ticks_waited = 0
        """Ticks since a row became free for requests that wait."""
        # For each row: latent states, embedding of the current token, output of the last ACT step.
        vectors = (len(model.recursion.initial_states) + 2, rows, 1, model.config.hidden_size)
        self._vectors = torch.zeros(vectors, dtype=model.dtype, device=model.device)
        self._states, self._x = self._vectors[:-2].unbind(), self._vectors[-2]
        # The padding of a prompt may be beyond the last position; see `tokens_in_rows`.
        self._rotary = model.rotary(torch.arange(positions + _PROMPT_TOKEN_MULTIPLE))
        kernel = None
        if record is None and model.device.type == "cuda":
            record, kernel = graph_recorder(), act_step_kernel(model, self._cache, self._vectors, self._rotary)
        self._on_device: DeviceTick | None = None
        if record is not None:
            self._on_device = DeviceTick(model, self._cache, self._vectors, self._rotary, record, kernel)

    @property
    def running(self) -> int:
        """Number of running requests."""
        return sum(row is not None for row in self._rows)

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return self.running > 0 or self.waiting > 0

    def submit(self, request: Request) -> int:
        """Queue a request. Returns its number, which is in its tokens."""
        length = len(request.prompt.ids)
        depth = request.act_steps or self.act_steps
        if not length or request.max_new_tokens < 1:
            raise ValueError(f"a request needs a prompt and at least 1 new token, found {length} and {request.max_new_tokens}")
        if length + request.max_new_tokens - 1 > self.positions or depth > self.act_steps:
            raise ValueError(
                f"{length} + {request.max_new_tokens} tokens at {depth} ACT steps don't fit {self.positions} positions at "
                f"{self.act_steps} steps"
            )
        number = next(self._numbers)
        self._waiting[number] = request
        return number

    def cancel(self, number: int) -> None:
        """Drop a request, waiting or running. Does nothing for a finished one."""
        self._waiting.pop(number, None)
        self._rows = [None if row is not None and row.number == number else row for row in self._rows]

    @torch.inference_mode()
    def tick(self) -> list[Token]:
        """Admit waiting requests, then run one ACT step of all running rows: the new tokens."""
        tokens = self._admit() if self._waiting else []
        running = [slot for slot, row in enumerate(self._rows) if row is not None]
        if running:
            tokens += self._step(running) if self._on_device is None else self._step_on_device(self._on_device, running)
        return tokens

    def _step(self, slots: list[int]) -> list[Token]:
        """Run one ACT step of the rows in these slots, in ascending order. Returns the new tokens."""
        model = self.model
        rows = self._rows_in(slots)
        act_steps, positions = [row.act_step for row in rows], [row.position for row in rows]
        # Without free slots in between, use views, not copies.
        is_whole = len(slots) == slots[-1] + 1
        index_B = slice(len(slots)) if is_whole else on_device(slots, model.device)
        states, output_BTD = model.act_step(
            tuple(state[index_B] for state in self._states),
            self._x[index_B],
            self._rotary_at(positions),
            self._cache.extend(slots, act_steps, positions),
        )
        for kept, new in zip(self._states, states, strict=True):
            kept[index_B] = new
        output_BD = output_BTD[:, 0]
        done = self._advance(slots, self._halting(output_BD, rows))
        if not done:
            return []
        output_RD = output_BD if len(done) == len(slots) else output_BD[on_device(done, model.device)]
        return self._choose_tokens([slots[place] for place in done], model.logits(output_RD))

    def _step_on_device(self, tick: DeviceTick, slots: list[int]) -> list[Token]:
        """`_step` by functions of fixed shapes, which waits for the device once a token, and once a tick where
        tokens may halt.
        """
        rows = self._rows_in(slots)
        may_halt = any(row.request.halt_threshold is not None for row in rows)
        tick.step(slots[-1] + 1, max(row.position for row in rows), may_halt)
        if not may_halt and all(row.act_step + 1 < row.depth for row in rows):
            for row in rows:
                row.act_step += 1
            return []
        if any(row.request.top or row.request.sampling.needs_sampler for row in rows):
            ready = tick.ready_B.tolist() if may_halt else [False] * len(tick.ready_B)
            done_slots = [slots[place] for place in self._advance(slots, [ready[slot] for slot in slots])]
            if not done_slots:
                return []
            return self._choose_tokens(
                done_slots, self.model.logits(self._vectors[-1, on_device(done_slots, self.model.device), 0])
            )
        ids, logps, ready = tick.choose(slots[-1] + 1)
        done_slots = [slots[place] for place in self._advance(slots, [ready[slot] for slot in slots])]
        return [self._emit(slot, ids[slot], logps[slot]) for slot in done_slots]

    def _advance(self, slots: Sequence[int], halts: Sequence[bool] | np.ndarray) -> list[int]:
        """Count an ACT step of these rows. Returns the places of those whose token takes no further one."""
        done = []
        for place, (slot, row) in enumerate(zip(slots, self._rows_in(slots), strict=True)):
            row.act_step += 1
            if row.act_step < row.depth and halts[place]:
                self._cache.carry_halted(slot, row.position, row.act_step - 1, row.depth)
            if row.act_step == row.depth or halts[place]:
                done.append(place)
        return done

    def _halting(self, output_BD: Tensor, rows: Sequence[_Row]) -> np.ndarray:
        """Whether each row's token halts by its threshold (bool[B])."""
        thresholds = [row.request.halt_threshold for row in rows]
        if all(threshold is None for threshold in thresholds):
            return np.zeros(len(rows), bool)
        act_steps_B = on_device([row.act_step for row in rows], self.model.device)
        probability_B = self.model.halting_probability(output_BD, act_steps_B).cpu().numpy()
        return probability_B > np.array([np.inf if bound is None else bound for bound in thresholds], probability_B.dtype)

    def _choose_tokens(self, slots: Sequence[int], logits_RV: Tensor) -> list[Token]:
        """Choose the next token of each of these rows, and begin the one after it."""
        model = self.model
        rows = self._rows_in(slots)
        top = max(row.request.top for row in rows)
        slots_R = on_device(slots, model.device)
        chosen = self._sampler.choose(torch.tensor(slots), logits_RV, with_logp=top > 0)
        logp_RK, ids_RK = chosen.logp_R.unsqueeze(1), chosen.ids_R.unsqueeze(1)
        if chosen.logp_RV is not None:
            best = torch.topk(chosen.logp_RV, min(top, model.vocab_size))
            logp_RK, ids_RK = torch.cat((logp_RK, best.values), dim=1), torch.cat((ids_RK, best.indices), dim=1)
        # In one transfer, because each waits for the device. Floats hold ids up to 2**24.
        logps, ids = torch.stack((logp_RK, ids_RK.to(logp_RK.dtype))).tolist()
        tokens = []
        for place, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            token_id, *candidate_ids = map(int, ids[place])
            logp, *candidate_logps = logps[place]
            candidates = tuple(zip(candidate_ids, candidate_logps, strict=True))[: row.request.top]
            tokens.append(self._emit(slot, token_id, logp, candidates))
        self._x[slots_R] = model.embed(chosen.ids_R).unsqueeze(1)
        for kept, initial in zip(self._states, model.initial_states(len(slots), 1), strict=True):
            kept[slots_R] = initial
        if self._on_device is not None:
            self._on_device.begin(slots_R)
        return tokens

    def _emit(self, slot: int, token_id: int, logp: float, candidates: tuple[tuple[int, float], ...] = ()) -> Token:
        """The row's new token. The row advances to the next position, or is free if the answer has ended."""
        (row,) = self._rows_in([slot])
        row.generated += 1
        finish: Literal["stop", "length"] | None = None
        if token_id == self.eos_id:
            finish = "stop"
        elif row.generated == row.request.max_new_tokens:
            finish = "length"
        token = Token(row.number, token_id, logp, row.act_step, finish, candidates)
        row.position, row.act_step = row.position + 1, 0
        if finish is not None:
            self._rows[slot] = None
        return token

    def _admit(self) -> list[Token]:
        """Admit waiting requests: prefill their prompts and choose their first tokens."""
        running = [row for row in self._rows if row is not None]
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        in_phase = len({(row.depth, row.act_step) for row in running}) == 1
        in_phase = in_phase and all(row.request.halt_threshold is None for row in running)
        if in_phase and running[0].act_step > 0:
            # Waiting a few ticks keeps all rows at the same ACT step, so the vocabulary head runs
            # once for all of them.
            return []
        is_enough = len(free) >= min(len(self._waiting), int(len(self._rows) * _FREE_TO_ADMIT))
        if running and not in_phase and not is_enough and self._ticks_waited < _MOST_TOKENS_TO_WAIT * self.act_steps:
            self._ticks_waited += bool(free)
            return []
        self._ticks_waited = 0
        entering: dict[tuple[int, float | None], list[tuple[int, _Row]]] = {}
        for slot in free[: len(self._waiting)]:
            number, request = self._waiting.popitem(last=False)
            depth = request.act_steps or self.act_steps
            row = _Row(number, request, depth, position=len(request.prompt.ids) - 1, act_step=depth)
            self._rows[slot] = row
            if self._on_device is not None:
                self._on_device.enter(slot, row.position, depth, request.halt_threshold)
            self._sampler.admit(slot, request.sampling, request.sample, request.prompt.ids.tolist())
            entering.setdefault((depth, request.halt_threshold), []).append((slot, row))
        tokens = []
        for (depth, threshold), places in entering.items():
            slots = [slot for slot, _ in places]
            output_RD, steps_R = self._prefill(slots, [row.request.prompt for _, row in places], depth, threshold)
            if threshold is not None:
                # If the prompt ends in assistant text, its last token may have halted early.
                for (_, row), steps in zip(places, steps_R.tolist(), strict=True):
                    row.act_step = steps
            tokens += self._choose_tokens(slots, self.model.logits(output_RD))
        return tokens

    def _prefill(
        self, slots: list[int], prompts: Sequence[Prompt], act_steps: int, halt_threshold: float | None
    ) -> tuple[Tensor, Tensor]:
        """Run whole prompts, equal ones only once, and store their keys and values.

        Returns the output [B, D] at each prompt's last position and the ACT steps [B] that it took.
        """
        model, device = self.model, self.model.device
        distinct: dict[bytes, int] = {}
        source = [distinct.setdefault(prompt.ids.tobytes() + prompt.segment.tobytes(), len(distinct)) for prompt in prompts]
        of_prompt = [prompts[source.index(prompt)] for prompt in range(len(distinct))]
        lengths_P = np.array([len(prompt.ids) for prompt in of_prompt])
        # The tokens of all prompts are concatenated, without padding.
        index_N, width = tokens_in_rows(lengths_P, token_multiple=_PROMPT_TOKEN_MULTIPLE)
        begin_P = np.searchsorted(index_N, np.arange(len(of_prompt)) * width)
        ids_N, segments_N = np.zeros((2, len(index_N)), np.int64)
        spans = [slice(begin, begin + length) for begin, length in zip(begin_P.tolist(), lengths_P.tolist(), strict=True)]
        for span, prompt in zip(spans, of_prompt, strict=True):
            ids_N[span], segments_N[span] = prompt.ids, prompt.segment
        spans = [spans[place] for place in source]
        token_rows = TokenRows(on_device(index_N, device), len(of_prompt), width)
        segments = on_device(segments_N, device)
        refinement = model.refine(
            on_device(ids_N, device),
            None if self._rotary is None else self._rotary.at(token_rows.index_N % width),
            self._cache.fill(slots, spans, model.token_attention([token_rows], segments)),
            act_steps=act_steps,
            halt_threshold=halt_threshold,
            # Earlier answers halt by the same rule as new tokens.
            may_halt_BT=segments == 0,
        )
        taken, refined = collections.deque(enumerate(refinement, 1), maxlen=1).pop()
        if taken < act_steps:
            # All tokens halted: only a prompt without a prompt segment gets here. New tokens still
            # need their deeper steps.
            for slot, span in zip(slots, spans, strict=True):
                self._cache.carry_halted(slot, slice(span.stop - span.start), taken - 1, act_steps)
        last_B = on_device([span.stop - 1 for span in spans], device)
        return refined.output_BTD[last_B], refined.steps_BT[last_B]

    def _rows_in(self, slots: Sequence[int]) -> list[_Row]:
        return [row for slot in slots if (row := self._rows[slot]) is not None]

    def _rotary_at(self, positions: Sequence[int]) -> Rotary | None:
        return None if self._rotary is None else self._rotary.at(on_device(positions, self.model.device).unsqueeze(1))
