"""The cost of a training step and a decoded token, against device peaks and the naive way."""

import argparse
import contextlib
import functools
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.benchmark import Timer

from benchmarks.common import ORIGINAL, SyntheticRows, benchmark_config, flop_counter, trainer_on
from benchmarks.cuda.scale import (
    COMPILING_SECONDS,
    ENGINES,
    Case,
    Figures,
    Found,
    Scale,
    engine_options,
    free_memory,
    no_engine_warnings,
    peak_gigabytes,
    synchronize,
    timed_steps,
    training_config,
    varied_lengths,
)
from benchmarks.decoding import Setting
from benchmarks.train_step import Naive


def seconds_of(work: Callable[[], object]) -> float:
    """Mean time of `work` after a warm-up, with waiting for the device."""
    return float(Timer("work()", globals={"work": work}).timeit(10).mean)


def device_peaks(scale: Scale) -> Figures:
    """The device's peaks: bfloat16 products of random matrices, and copies (read + write)."""
    a, b = (torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * scale.matrix**3 / seconds_of(lambda: torch.mm(a, b))
    source, target = a.float(), b.float()
    copy = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
    return {"matrices": f"{scale.matrix}^3, bfloat16", "matmul TFLOP/s": matmul / 1e12, "copy GB/s": copy / 1e9}


def host_waits(scale: Scale, step: Callable[[], object]) -> str:
    """How often and where the host waited for the device during `step`, from torch's warnings."""
    if scale.device == "cpu":
        return "needs CUDA"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return f"{len(places)}: {', '.join(sorted(set(places)))}"


def dearest_kernels(scale: Scale, step: Callable[[], object], most: int = 10) -> list[Figures]:
    """The kernels (on a CPU: operators) that took the most device time in `step`."""
    on_cuda = scale.device == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profile:
        step()
        synchronize(scale)
    time_of = attrgetter("self_device_time_total" if on_cuda else "self_cpu_time_total")
    # Ranges that torch marks on the device, such as an optimizer's step, aren't kernels.
    marked = ("Optimizer.", "Torch-Compiled", "##", "ProfilerStep")
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == wanted and not event.key.startswith(marked)]
    total = sum(map(time_of, events)) or 1.0
    return [
        {"kernel": f"`{event.key[:90]}`", "calls": event.count, "ms": time_of(event) / 1e3, "share": time_of(event) / total}
        for event in sorted(events, key=time_of, reverse=True)[:most]
    ]


def ratio(value: float | None, found: Found, case: str, figure: str) -> float | None:
    """`value` divided by the figure of an earlier case, if both exist."""
    return None if value is None or case not in found else value / found[case][figure]


# Fixed, so that cases are comparable with each other and with earlier figures.
_ONE_ACT_STEP = "arch.halt_max_steps=1"


def training_cost(
    scale: Scale,
    found: Found,
    counted_in: str,
    overrides: Sequence[str],
    original: Sequence[str] = (ORIGINAL, _ONE_ACT_STEP),
    compiled: bool = False,
    varied: bool = False,
) -> Figures:
    """The real Trainer's step. Rows are full, or vary in length like SlimOrca's.

    FLOPs per token are counted here, unless by the uncompiled case `counted_in`.
    """
    torch._dynamo.reset()
    config = training_config(scale, overrides, original)
    varying = varied_lengths(scale.positions)
    rows = SyntheticRows(config, scale.vocabulary, varying if varied else None)
    steps = trainer_on(config, rows, scale.vocabulary, compiled=compiled).steps()
    warm_up, _ = timed_steps(steps, scale.steps if varied else 3, scale)
    seconds, results = timed_steps(steps, scale.steps, scale)
    median = statistics.median(seconds)
    totals = {name: sum(int(result.sums[name]) for result in results) for name in ("tokens", "supervised")}
    pace = totals["tokens"] / sum(seconds)
    gigabytes = peak_gigabytes(scale)
    waits = host_waits(scale, lambda: next(steps))
    kernels = dearest_kernels(scale, lambda: next(steps))
    counted: float | None = None
    compiling: Figures = {}
    if compiled:
        rows.length = varying
        graphs = torch._dynamo.utils.counters["stats"]
        timed_steps(steps, scale.steps, scale)
        before = graphs["unique_graphs"]
        timed_steps(steps, scale.steps, scale)
        compiling = {"compile s": sum(warm_up) - len(warm_up) * median, "graphs": before}
        compiling["graphs after settling"] = graphs["unique_graphs"] - before
    if counted_in in found:
        counted = found[counted_in]["MFLOP/token"]
    elif not compiled:
        with flop_counter() as counter:
            result = next(steps)
        counted = counter.get_total_flops() / int(result.sums["tokens"]) / 1e6
    teraflops = None if counted is None else counted * pace / 1e6
    return {
        "ms": median * 1e3,
        "tokens/s": pace,
        "supervised/s": totals["supervised"] / sum(seconds),
        "MFLOP/token": counted,
        "TFLOP/s": teraflops,
        "of peak": ratio(teraflops, found, "device", "matmul TFLOP/s"),
        "to naive": ratio(pace, found, "naive", "naive tokens/s"),
        "GB": gigabytes,
        "loss": float(results[-1].sums["nll"]) / results[-1].weight,
        "host waits": waits,
        **compiling,
        "most expensive kernels of a step": kernels,
    }


def naive_cost(scale: Scale) -> Figures:
    """benchmarks/naive.py's step in float32 at the largest batch that fits, of ours and its halves."""
    batch = scale.batch
    while True:
        size = [f"dataset.seq_len={scale.positions}", f"global_batch_size={batch}"]
        config = benchmark_config([*scale.arch, *size, "arch.forward_dtype=float32", _ONE_ACT_STEP], scale.device)
        with contextlib.suppress(torch.OutOfMemoryError):
            naive = Naive(config, scale.vocabulary)
            seconds, _ = timed_steps(iter(naive.step, None), 4, scale)
            median = statistics.median(seconds[1:])
            pace = batch * scale.positions / median
            return {"batch": batch, "naive ms": median * 1e3, "naive tokens/s": pace, "GB": peak_gigabytes(scale)}
        if batch == 1:
            raise RuntimeError("not even one row fits")
        batch, naive = batch // 2, None  # type: ignore[assignment]
        free_memory(scale)


def train_step(scale: Scale) -> Iterator[Case]:
    """A training step by the original's network, one ACT step of 21 level calls, and by the default: medians; host waits of one.

    FLOPs are the model's: matrix products and all of attention's square, counted in uncompiled code, without what activation
    checkpointing computes again. Naive: float32, and float64 stablemax over all positions where ours has softmax. Graphs: made by
    torch.compile, and of these after a dozen steps of varied lengths.
    """
    causal, prefix = "causal, eager", "prefix bucketed, varied lengths, eager"
    recomputing = ["arch.activation_checkpointing=true"]

    def training(name: str, counted_in: str, *overrides: str, **kind: Any) -> Case:
        seconds = COMPILING_SECONDS if kind.get("compiled") else 40
        return Case(name, lambda found: training_cost(scale, found, counted_in, overrides, **kind), seconds)

    def of_prefix(packing: str, **kind: Any) -> Case:
        name = f"prefix {packing}, varied lengths, {'compiled' if kind.get('compiled') else 'eager'}"
        return training(name, prefix, "arch.attention=prefix", f"packing={packing}", varied=True, **kind)

    yield Case("device", lambda _: device_peaks(scale))
    yield Case("naive", lambda _: naive_cost(scale), 45)
    yield training(causal, causal)
    yield training("causal, compiled", causal, compiled=True)
    yield training("default, eager", "default, eager", original=())
    yield training("default, compiled", "default, eager", original=(), compiled=True)
    yield of_prefix("bucketed")
    yield of_prefix("bucketed", compiled=True)
    yield training("causal, eager, activation checkpointing", causal, *recomputing)
    yield training("causal, compiled, activation checkpointing", causal, *recomputing, compiled=True)
    yield of_prefix("packed", compiled=True)


def decoding(scale: Scale) -> Iterator[Case]:
    """Greedy decoding after a number of known positions; ms per token of every row.

    The limit: bytes of weights and cache that a token reads, over the copy bandwidth. Recomputation: every position anew for each
    token, one row. First s: prompts and the first tokens, with what is compiled and recorded then.
    """

    @functools.cache
    def setting(batch: int) -> Setting:
        arguments = argparse.Namespace(overrides=scale.arch, vocabulary=scale.vocabulary, seed=0, compile=False)
        shape = {"batch": batch, "positions": scale.positions, "act_steps": max(scale.act_steps)}
        made = Setting(arguments, dtype="auto", device=scale.device, **shape)
        made.compared_ids = 0
        return made

    def cost(engine: str, batch: int, act_steps: int, found: Found) -> Figures:
        rows, warm_up, timed = setting(batch), 4, 4  # warm up beyond 512 positions, where graphs are recorded again
        rows.engine_options = engine_options(engine, scale)
        started = time.perf_counter()
        with no_engine_warnings():
            under_way = rows.decoding(1 + warm_up + 3 * timed, act_steps=act_steps)
            for _ in range(warm_up):
                under_way.next()
            first = time.perf_counter() - started
            seconds = statistics.median(under_way.seconds(timed) for _ in range(3))
        read = sum(rows.bytes_per_token(act_steps))
        alone = batch / seconds if batch == 1 else None
        return {
            "engine": engine,
            "batch": batch,
            "ACT steps": act_steps,
            "tokens/s": batch / seconds,
            "ms": seconds * 1e3,
            "MB read": read / 1e6,
            "of limit": ratio(read / seconds / 1e9, found, "device", "copy GB/s"),
            "to recomputation": ratio(alone, found, f"recomputation, {act_steps} ACT steps", "recomputed tokens/s"),
            "first s": first,
        }

    def recomputation(act_steps: int, found: Found) -> Figures:
        alone = setting(1)
        ids_BT = torch.from_numpy(alone.prompts[0].ids[None])
        seconds, _ = timed_steps(iter(lambda: alone.recomputed(ids_BT, act_steps), None), 4, scale)
        return {"recomputed tokens/s": 1 / statistics.median(seconds[1:])}

    yield Case("device", lambda _: device_peaks(scale))
    for act_steps in scale.act_steps:
        yield Case(f"recomputation, {act_steps} ACT steps", functools.partial(recomputation, act_steps))
    for engine in ENGINES:
        seconds = COMPILING_SECONDS if engine == "compiled graphs" else 60
        for batch, act_steps in itertools.product(scale.batches[: 1 if engine == "eager" else None], scale.act_steps):
            name = f"{engine}, batch {batch}, {act_steps} ACT steps"
            yield Case(name, functools.partial(cost, engine, batch, act_steps), seconds)
