"""Decoding with cached keys and values against recomputing every position for every token: same weights, same dtype, one run.

    python benchmarks/decoding.py [--positions 512 --act-steps 16 --repeats 3]

Ours: generation/engine.py. Naive (benchmarks/naive.py): a forward over all positions so far and all ACT steps for each token, then
logits at the last position. The two take turns in one process. Log-probabilities of both are compared at full depth and at one ACT
step, where rounding isn't yet amplified by an untrained recursion. Last line: JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import benchmark_config, parser, peak_memory_bytes, synthetic_example, use_threads
from benchmarks.naive import NaiveTRM
from generation.engine import DecodedTokens, Engine, Prompt
from models.act import RecursiveModel
from models.device import keep_freed_memory
from models.layers import Linear
from models.losses import log_probs

# Random weights must not end an answer, so no id ends one.
_NO_EOS = -1
# fp32 is the decoding contract's bound at one ACT step; deeper, an untrained recursion amplifies rounding.
_TOLERANCE_AT_ONE_STEP = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.2}


class Comparison:
    """One prompt of random ids a row, decoded by both sides."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        config = benchmark_config(
            [
                f"arch.forward_dtype={arguments.dtype}",
                f"arch.halt_max_steps={arguments.act_steps}",
                f"dataset.seq_len={arguments.positions + 1}",
                *arguments.overrides,
            ]
        )
        self.arguments = arguments
        self.model = RecursiveModel(config.arch, arguments.vocabulary, seed=arguments.seed)
        # Both sides then read weights of the same dtype, and neither casts.
        self.model.cast_for_inference()
        self.naive = NaiveTRM(self.model)
        examples = [
            synthetic_example(arguments.seed, row, arguments.positions, arguments.vocabulary) for row in range(arguments.batch)
        ]
        # The first token decoded completes `positions` positions, and is what both sides are compared on.
        length = arguments.positions - 1
        self.prompts = [Prompt(e.ids[:length].astype(np.int64), np.zeros(length, np.int64)) for e in examples]

    def engine(self, act_steps: int) -> Engine:
        """Ours."""
        return Engine(self.model, eos_id=_NO_EOS, act_steps=act_steps)

    def decoding(self, act_steps: int, tokens: int) -> tuple[Iterator[DecodedTokens], Tensor]:
        """Prefill: the decoding under way and the `positions` ids [B, T] that the next log-probabilities depend on."""
        decoding = self.engine(act_steps).decode(self.prompts, [tokens] * len(self.prompts))
        first = next(decoding)
        prompt_BT = torch.from_numpy(np.stack([prompt.ids for prompt in self.prompts]))
        return decoding, torch.cat((prompt_BT, first.ids_B.unsqueeze(1)), dim=1)

    @torch.inference_mode()
    def recomputed(self, ids_BT: Tensor, act_steps: int) -> Tensor:
        """Naive: log-probabilities [B, V] after the last position."""
        logits_BV = self.naive.next_token_logits(ids_BT, act_steps)
        return log_probs(logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)), self.model.config.loss)

    def difference(self, act_steps: int) -> float:
        """Largest difference of the two sides' log-probabilities, nats."""
        decoding, ids_BT = self.decoding(act_steps, tokens=2)
        return float((next(decoding).logp_BV - self.recomputed(ids_BT, act_steps)).abs().max())

    def weight_bytes_per_token(self) -> int:
        """Bytes of matrices that decoding a token reads: those of every level call of every ACT step, and the head once."""

        def of(module: torch.nn.Module) -> int:
            return sum(m.weight.nbytes for m in module.modules() if isinstance(m, Linear))

        levels = sum(of(self.model.get_submodule(level)) for level in self.model.level_calls)
        act_steps: int = self.arguments.act_steps
        return levels * act_steps + of(self.model.lm_head)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prefill, then let the sides take turns: one token the naive way, several of ours."""
    threads = use_threads(arguments.threads)
    comparison = Comparison(arguments)
    act_steps, batch, positions = arguments.act_steps, arguments.batch, arguments.positions
    at_one_step = comparison.difference(act_steps=1)
    print(f"1 ACT step: log-probabilities differ by at most {at_one_step:.1e}", flush=True)
    dtype = comparison.model.config.forward_dtype
    tolerance = _TOLERANCE_AT_ONE_STEP[dtype]
    if not at_one_step <= tolerance:
        raise RuntimeError(f"the sides disagree by {at_one_step:.1e} nats at one ACT step, more than {tolerance:.1e}")

    started = time.perf_counter()
    decoding, ids_BT = comparison.decoding(act_steps, tokens=2 + arguments.repeats * arguments.tokens)
    seconds = time.perf_counter() - started
    print(f"prefill of {batch} x {positions - 1} positions, {act_steps} ACT steps: {seconds:.2f} s", flush=True)
    # Not timed: it is compared, it warms up, and the cache grows in it.
    logp_BV = next(decoding).logp_BV
    seconds_ours, seconds_naive = [], []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        recomputed_BV = comparison.recomputed(ids_BT, act_steps)
        seconds_naive.append(time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(arguments.tokens):
            next(decoding)
        seconds_ours.append((time.perf_counter() - started) / arguments.tokens)
        print(f"naive {seconds_naive[-1] * 1e3:9.1f} ms a token, ours {seconds_ours[-1] * 1e3:8.1f} ms a token", flush=True)

    ours, naive = statistics.median(seconds_ours), statistics.median(seconds_naive)
    weight_bytes = comparison.weight_bytes_per_token()
    cache_bytes = comparison.engine(act_steps).cache_bytes(batch, positions)
    return {
        "ratio": naive / ours,
        "dtype": dtype,
        "batch": batch,
        "threads": threads,
        "positions": positions,
        "act_steps": act_steps,
        "ms_per_token_ours": ours * 1e3,
        "ms_per_token_naive": naive * 1e3,
        "cache_bytes": cache_bytes,
        "weight_bytes_per_token": weight_bytes,
        "weight_gigabytes_per_second": weight_bytes / ours / 1e9,
        "weight_and_cache_gigabytes_per_second": (weight_bytes + cache_bytes) / ours / 1e9,
        "max_difference_one_step": at_one_step,
        "max_difference": float((logp_BV - recomputed_BV).abs().max()),
        "same_argmax": bool((logp_BV.argmax(-1) == recomputed_BV.argmax(-1)).all()),
        "peak_memory_bytes": peak_memory_bytes(),
        "repeats": arguments.repeats,
        "torch": torch.__version__,
    }


def main() -> None:
    """Parse, compare, print."""
    flags = parser(__doc__)
    flags.set_defaults(dtype="float32", repeats=3)
    flags.add_argument("--batch", type=int, default=1, help="rows; a token is then one a row")
    flags.add_argument("--positions", "--seq-len", type=int, default=512, help="positions so far")
    flags.add_argument("--act-steps", type=int, default=16)
    flags.add_argument("--tokens", type=int, default=4, help="tokens of ours behind one timing")
    arguments = flags.parse_args()
    keep_freed_memory()
    print(json.dumps(compare(arguments)))


if __name__ == "__main__":
    main()
