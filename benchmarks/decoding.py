"""Decoding with a KV cache against recomputing every position for every token: same weights, one
run.

    python benchmarks/decoding.py [--only alone batch flat --repeats 3]

Ours: generation/engine.py, compiled (`--no-compile`: not). Naive (benchmarks/naive.py): a forward
over all positions so far and all ACT steps for each token, then logits at the last position. The
sides take turns in one process. Three comparisons:

alone: one row, `--positions` so far, `--act-steps`: `ratio` in float32 on both sides, `ratio_best`
ours in its best number format. batch: `--batch` rows, `--positions` so far, `--batch-act-steps`,
bfloat16 on both sides: `ratio_batch16`, tokens a second. flat: time of a token at
`--flat-positions` so far with room for `--far` positions, relative to room for `--near`.

Log-probabilities of both sides are compared at full depth and at one ACT step, where an untrained
recursion doesn't amplify rounding yet. Last line: JSON.
"""

import argparse
import collections
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import benchmark_config, parser, peak_memory_bytes, synthetic_example, use_threads
from benchmarks.naive import NaiveTRM
from config.errors import one_clear_message
from generation.engine import Engine, Prompt, Request, Token, cache_bytes
from models.act import RecursiveModel
from models.device import has_compiler, keep_freed_memory, pick_device, should_compile
from models.layers import Linear
from models.losses import log_probs

# No id ends an answer: random weights must not.
_NO_EOS = -1
_COMPARED_IDS = 50
# fp32 is the decoding contract's bound at one ACT step; deeper, an untrained recursion amplifies rounding.
_TOLERANCE_AT_ONE_STEP = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.2}


class Setting:
    """A model in one number format, its naive counterpart, and a random prompt for each row."""

    def __init__(
        self, arguments: argparse.Namespace, *, dtype: str, batch: int, positions: int, act_steps: int, device: str = "cpu"
    ) -> None:
        config = benchmark_config([f"arch.forward_dtype={dtype}", f"arch.halt_max_steps={act_steps}", *arguments.overrides], device)
        self.model = RecursiveModel(config.arch, arguments.vocabulary, seed=arguments.seed).to(pick_device(device))
        # Both sides read weights of the same dtype, without casts.
        self.model.cast_for_inference()
        self.naive = NaiveTRM(self.model)
        self.dtype = self.model.config.forward_dtype
        self.batch, self.positions, self.act_steps = batch, positions, act_steps
        self.engine_options: dict[str, Any] = {"compiled": arguments.compile}
        self.compared_ids = _COMPARED_IDS
        rows = [synthetic_example(arguments.seed, row, positions, arguments.vocabulary) for row in range(batch)]
        # The first token completes `positions` positions; the sides are compared on the second.
        length = positions - 1
        self.prompts = [Prompt(row.ids[:length].astype(np.int64), np.zeros(length, np.int64)) for row in rows]

    def decoding(self, tokens: int, *, act_steps: int | None = None, room: int | None = None) -> "Decoding":
        """Prefilled: `positions` ids in each row are known."""
        return Decoding(self, act_steps or self.act_steps, tokens, room or self.positions + tokens)

    @torch.inference_mode()
    def recomputed(self, ids_BT: Tensor, act_steps: int | None = None) -> Tensor:
        """Naive: log-probabilities [B, V] after the last position."""
        logits_BV = self.naive.next_token_logits(ids_BT.to(self.model.device), act_steps or self.act_steps)
        return log_probs(logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)), self.model.config.loss)

    def difference(self, act_steps: int) -> float:
        """Largest difference of the two sides' log-probabilities, nats, over the most probable ids."""
        decoding = self.decoding(2, act_steps=act_steps)
        tokens, logp_BV = decoding.next(), self.recomputed(decoding.ids_BT, act_steps)
        return max(abs(logp - float(logp_BV[t.request, token])) for t in tokens for token, logp in t.candidates)

    def bytes_per_token(self, act_steps: int | None = None) -> tuple[int, int]:
        """Bytes that a token of every row reads: of matrices (in every level call, and the head once), and of the cache."""

        def of(module: torch.nn.Module) -> int:
            return sum(m.weight.nbytes for m in module.modules() if isinstance(m, Linear))

        steps = act_steps or self.act_steps
        levels = sum(of(self.model.get_submodule(level)) for level in self.model.level_calls)
        return levels * steps + of(self.model.lm_head), cache_bytes(self.model, steps, self.batch, self.positions)


class Decoding:
    """Our engine, one token of every row at a time."""

    def __init__(self, setting: Setting, act_steps: int, tokens: int, room: int) -> None:
        self._engine = Engine(
            setting.model, eos_id=_NO_EOS, act_steps=act_steps, rows=setting.batch, positions=room, **setting.engine_options
        )
        self._ready: list[collections.deque[Token]] = [collections.deque() for _ in setting.prompts]
        for prompt in setting.prompts:
            self._engine.submit(Request(prompt, tokens, top=setting.compared_ids))
        first = self.next()
        prompts_BT = torch.from_numpy(np.stack([prompt.ids for prompt in setting.prompts]))
        self.ids_BT = torch.cat((prompts_BT, torch.tensor([[token.id] for token in first])), dim=1)

    def next(self) -> list[Token]:
        """One token of every row, in the order of rows."""
        while not all(self._ready):
            for token in self._engine.tick():
                self._ready[token.request].append(token)
        return [ready.popleft() for ready in self._ready]

    def seconds(self, tokens: int) -> float:
        """Time of a token of every row, over `tokens` of them."""
        started = time.perf_counter()
        for _ in range(tokens):
            self.next()
        return (time.perf_counter() - started) / tokens


def turns(arguments: argparse.Namespace, ours: list[Setting], naive: Setting) -> tuple[list[float], float, dict[str, Any]]:
    """Median seconds per token of all rows for `ours` and `naive`, in turns; their agreement."""
    at_one_step = {setting.dtype: setting.difference(act_steps=1) for setting in ours}
    for dtype, difference in at_one_step.items():
        if not difference <= _TOLERANCE_AT_ONE_STEP[dtype]:
            raise RuntimeError(
                f"{dtype}: the sides differ by {difference:.1e} nats at one ACT step, over {_TOLERANCE_AT_ONE_STEP[dtype]}"
            )
    decodings = [setting.decoding(3 + arguments.repeats * arguments.tokens) for setting in ours]
    # The first tokens are compared and warm up; they aren't timed.
    tokens = [decoding.next() for decoding in decodings]
    seconds: list[list[float]] = [[] for _ in ours]
    seconds_naive = []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        logp_BV = naive.recomputed(decodings[0].ids_BT)
        seconds_naive.append(time.perf_counter() - started)
        for place, decoding in enumerate(decodings):
            seconds[place].append(decoding.seconds(arguments.tokens))
        shown = ", ".join(f"{setting.dtype} {times[-1] * 1e3:.1f}" for setting, times in zip(ours, seconds, strict=True))
        print(f"naive {naive.dtype} {seconds_naive[-1] * 1e3:.1f} ms, ours {shown} ms", flush=True)
    checks = {
        "difference_one_step": max(at_one_step.values()),
        "difference": max(abs(t.logp - float(logp_BV[t.request, t.id])) for t in tokens[0]),
        "same_argmax": [token.id for token in tokens[0]] == logp_BV.argmax(-1).tolist(),
    }
    return [statistics.median(times) for times in seconds], statistics.median(seconds_naive), checks


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row, deep."""
    shape = {"batch": 1, "positions": arguments.positions, "act_steps": arguments.act_steps}
    same = Setting(arguments, dtype=arguments.dtype or "float32", **shape)
    best = Setting(arguments, dtype="auto", **shape)
    (ours, ours_best), naive, checks = turns(arguments, [same, best], same)
    read, kept = best.bytes_per_token()
    return {
        **shape,
        "ratio": naive / ours,
        "ratio_best": naive / ours_best,
        "dtype": same.dtype,
        "dtype_best": best.dtype,
        "ms_per_token_naive": naive * 1e3,
        "ms_per_token_ours": ours * 1e3,
        "ms_per_token_best": ours_best * 1e3,
        "weight_bytes_per_token_best": read,
        "cache_bytes_best": kept,
        "gigabytes_per_second": sum(same.bytes_per_token()) / ours / 1e9,
        "gigabytes_per_second_best": (read + kept) / ours_best / 1e9,
        **checks,
    }


def batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Several rows, fewer ACT steps."""
    shape = {"batch": arguments.batch, "positions": arguments.positions, "act_steps": arguments.batch_act_steps}
    setting = Setting(arguments, dtype=arguments.dtype or "auto", **shape)
    (ours,), naive, checks = turns(arguments, [setting], setting)
    return {
        **shape,
        f"ratio_batch{arguments.batch}": naive / ours,
        "dtype": setting.dtype,
        "tokens_per_second_ours": arguments.batch / ours,
        "tokens_per_second_naive": arguments.batch / naive,
        **checks,
    }


def flat(arguments: argparse.Namespace) -> dict[str, Any]:
    """Whether unused room costs time."""
    setting = Setting(arguments, dtype="auto", batch=1, positions=arguments.flat_positions, act_steps=arguments.act_steps)
    tokens = 2 + arguments.tokens * arguments.flat_repeats
    rooms = {room: setting.decoding(tokens, room=getattr(arguments, room) + tokens) for room in ("near", "far")}
    for decoding in rooms.values():
        decoding.next()
    seconds: dict[str, list[float]] = {"near": [], "far": []}
    for repeat in range(arguments.flat_repeats):
        # In turns, each first as often as second.
        for room in ("near", "far") if repeat % 2 else ("far", "near"):
            seconds[room].append(rooms[room].seconds(arguments.tokens))
    of_near, of_far = (statistics.median(times) for times in seconds.values())
    return {
        "positions": arguments.flat_positions,
        "flatness": of_far / of_near,
        "ms_per_token_near": of_near * 1e3,
        "room_near": arguments.near,
        "room_far": arguments.far,
    }


COMPARISONS = {"alone": alone, "batch": batch, "flat": flat}


def main() -> None:
    """Parse, compare, print."""
    flags = parser(__doc__, "dtype", "threads", "repeats", "seed", "vocabulary", "overrides")
    flags.set_defaults(repeats=3)
    flags.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="some of the comparisons")
    flags.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=has_compiler(),
        help="ours with generation.compile; default: if there is a C++ compiler",
    )
    flags.add_argument("--positions", "--seq-len", type=int, default=512, help="positions so far")
    flags.add_argument("--act-steps", type=int, default=16, help="alone and flat: ACT steps a token")
    flags.add_argument("--batch", type=int, default=16, help="batch: rows; a token is then one a row")
    flags.add_argument("--batch-act-steps", type=int, default=4, help="batch: ACT steps a token")
    flags.add_argument("--tokens", type=int, default=4, help="tokens of ours behind one timing")
    flags.add_argument("--flat-positions", type=int, default=64)
    flags.add_argument("--near", type=int, default=512)
    flags.add_argument("--far", type=int, default=4096)
    flags.add_argument("--flat-repeats", type=int, default=8)
    arguments = flags.parse_args()
    arguments.compile = should_compile(arguments.compile, torch.device("cpu"))
    keep_freed_memory()
    report: dict[str, Any] = {"threads": use_threads(arguments.threads), "compiled": arguments.compile}
    report |= {"repeats": arguments.repeats, "torch": torch.__version__}
    for name in arguments.only:
        found = COMPARISONS[name](arguments)
        print(f"{name}: {json.dumps(found)}", flush=True)
        # The main figures are top-level keys, the others are under the comparison's name.
        headline = {key: value for key, value in found.items() if key.startswith("ratio") or key == "flatness"}
        report |= headline | {name: {key: value for key, value in found.items() if key not in headline}}
    report["peak_memory_bytes"] = peak_memory_bytes()
    print(json.dumps(report))


if __name__ == "__main__":
    with one_clear_message():
        main()
