"""What a training step and a decoded token cost, beside what the device can do and the naive way."""

import argparse
import collections
import contextlib
import functools
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.common import SyntheticRows, benchmark_config, flop_counter, trainer_on
from benchmarks.cuda.scale import (
    ENGINES,
    Case,
    Figures,
    Scale,
    decoding_warnings,
    free_memory,
    peak_gigabytes,
    synchronize,
    timed_steps,
    training_config,
    varied_lengths,
)
from benchmarks.decoding import Setting
from benchmarks.train_step import Naive
from generation.engine import cache_bytes


def seconds_of(scale: Scale, work: Callable[[], object], repeats: int = 10) -> float:
    """Mean time of `work`, by events on a CUDA device; the first runs are not timed."""
    for _ in range(3):
        work()
    if scale.device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / repeats / 1e3
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - started) / repeats


def device_peaks(scale: Scale) -> Figures:
    """What the device can do: products of square bfloat16 matrices of random data, and copies, reads and writes counted."""
    a, b = (torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * scale.matrix**3 / seconds_of(scale, lambda: torch.mm(a, b))
    source = torch.ones(scale.copied_bytes // 4, device=scale.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds_of(scale, lambda: target.copy_(source))
    return {"matrices": f"{scale.matrix}^3, bfloat16", "matmul TFLOP/s": matmul / 1e12, "copy GB/s": copy / 1e9}


def host_waits(step: Callable[[], object]) -> list[Figures]:
    """Where the host waited for the device during `step`, as torch warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return [{"place": place, "waits": count} for place, count in collections.Counter(found).items()]


def dearest_kernels(scale: Scale, step: Callable[[], object], most: int = 10) -> list[Figures]:
    """The kernels (on a CPU: operators) that took most of the device's time in `step`."""
    on_cuda = scale.device == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profile:
        step()
        synchronize(scale)
    # Ranges that torch marks on the device, an optimizer's step for one, aren't kernels.
    marked = ("Optimizer.", "Torch-Compiled", "##", "ProfilerStep")
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    time_of = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = [event for event in profile.key_averages() if event.device_type == wanted and not event.key.startswith(marked)]
    events.sort(key=lambda event: -getattr(event, time_of))
    total = sum(getattr(event, time_of) for event in events) or 1.0
    return [
        {
            "kernel": f"`{event.key[:90]}`",
            "calls": event.count,
            "ms": getattr(event, time_of) / 1e3,
            "share": getattr(event, time_of) / total,
        }
        for event in events[:most]
    ]


def training_cost(scale: Scale, overrides: Sequence[str], compiled: bool = False, varied: bool = False) -> Figures:
    """The real Trainer's step. Rows are full, or varied in length as SlimOrca's are."""
    torch._dynamo.reset()
    config = training_config(scale, overrides)
    varying = varied_lengths(scale.positions)
    rows = SyntheticRows(config, scale.vocabulary, varying if varied else None)
    steps = trainer_on(config, rows, scale.vocabulary, compiled=compiled).steps()
    warm_up, _ = timed_steps(steps, scale.settling if varied else 3, scale)
    seconds, results = timed_steps(steps, scale.steps, scale)
    median = statistics.median(seconds)
    totals = {name: sum(int(result.sums[name]) for result in results) for name in ("tokens", "supervised", "attended")}
    figures: Figures = {
        "dtype": config.arch.forward_dtype,
        "ms": median * 1e3,
        "from": min(seconds) * 1e3,
        "to": max(seconds) * 1e3,
        "tokens/s": totals["tokens"] / sum(seconds),
        "supervised/s": totals["supervised"] / sum(seconds),
        "TFLOP/s": None,
        "of peak": None,
        "to naive": None,
        "GB": peak_gigabytes(scale),
        "padding": 1 - totals["tokens"] / totals["attended"],
        "loss": float(results[-1].sums["nll"]) / results[-1].weight,
    }
    waits = host_waits(lambda: next(steps)) if scale.device == "cuda" else []
    figures["waits"] = sum(place["waits"] for place in waits) if scale.device == "cuda" else "needs CUDA"
    kernels = dearest_kernels(scale, lambda: next(steps))
    if compiled:
        rows.length = varying
        graphs = torch._dynamo.utils.counters["stats"]
        timed_steps(steps, scale.settling, scale)
        before = graphs["unique_graphs"]
        timed_steps(steps, scale.watched, scale)
        figures["compile s"] = sum(warm_up) - len(warm_up) * median
        figures |= {"graphs": before, "graphs after settling": graphs["unique_graphs"] - before}
    else:
        with flop_counter() as counter:
            result = next(steps)
        figures["MFLOP/token"] = counter.get_total_flops() / int(result.sums["tokens"]) / 1e6
    return figures | {"host waits": waits, "most expensive kernels of a step": kernels}


def naive_cost(scale: Scale) -> Figures:
    """benchmarks/naive.py's step in float32 at the largest batch that fits, of ours and its halves."""
    batch = scale.batch
    while True:
        size = [f"dataset.seq_len={scale.positions}", f"global_batch_size={batch}"]
        config = benchmark_config([*scale.arch, *size, "arch.forward_dtype=float32"], scale.device)
        with contextlib.suppress(torch.OutOfMemoryError):
            naive = Naive(config, scale.vocabulary)
            naive.step()
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                naive.step()
                synchronize(scale)
                seconds.append(time.perf_counter() - started)
            median = statistics.median(seconds)
            return {
                "batch": batch,
                "naive ms": median * 1e3,
                "naive tokens/s": batch * scale.positions / median,
                "GB": peak_gigabytes(scale),
            }
        if batch == 1:
            raise RuntimeError("not even one row fits")
        batch, naive = batch // 2, None  # type: ignore[assignment]
        free_memory(scale)


def train_step(scale: Scale) -> Iterator[Case]:
    """The default architecture's training step: the median, and the host waits of one step.

    FLOPs are the model's: matrix products and all of attention's square, counted in uncompiled code, without what activation
    checkpointing computes again. Naive: float32, and float64 stablemax over all positions where ours has softmax. Graphs: made by
    torch.compile, and of these after ten steps of varied lengths.
    """
    prefix = {packing: ["arch.attention=prefix", f"packing={packing}"] for packing in ("bucketed", "packed")}
    recomputing = ["arch.activation_checkpointing=true"]

    def training(name: str, seconds: float, overrides: Sequence[str] = (), **kind: bool) -> Case:
        return Case(name, lambda: training_cost(scale, overrides, **kind), seconds)

    yield Case("device", lambda: device_peaks(scale))
    yield training("causal, eager", 40)
    yield training("causal, compiled", 100, compiled=True)
    yield Case("naive", lambda: naive_cost(scale), 45)
    yield training("causal, eager, activation checkpointing", 40, recomputing)
    yield training("prefix bucketed, varied lengths, eager", 40, prefix["bucketed"], varied=True)
    yield training("prefix bucketed, varied lengths, compiled", 70, prefix["bucketed"], compiled=True, varied=True)
    yield training("causal, compiled, activation checkpointing", 60, recomputing, compiled=True)
    yield training("prefix packed, varied lengths, compiled", 70, prefix["packed"], compiled=True, varied=True)


def compare_training(cases: Mapping[str, Figures]) -> None:
    """Add what needs several cases, where they are there."""
    for name, figures in cases.items():
        if "tokens/s" in figures:
            counted = cases.get("prefix bucketed, varied lengths, eager" if "prefix" in name else "causal, eager")
            if counted is not None:
                figures["TFLOP/s"] = counted["MFLOP/token"] * figures["tokens/s"] / 1e6
            if "naive" in cases:
                figures["to naive"] = figures["tokens/s"] / cases["naive"]["naive tokens/s"]
            if "device" in cases and figures["TFLOP/s"] is not None:
                figures["of peak"] = figures["TFLOP/s"] / cases["device"]["matmul TFLOP/s"]


def decoding(scale: Scale) -> Iterator[Case]:
    """Greedy decoding where so many positions are known; ms of a token of every row.

    The limit: bytes of weights and cache that a token reads, over the copy bandwidth. Recomputation: every position anew for each
    token, one row. First s: prompts and the first tokens, with what is compiled and recorded then.
    """
    settings: dict[int, Setting] = {}

    def setting(batch: int) -> Setting:
        if batch not in settings:
            arguments = argparse.Namespace(overrides=scale.arch, vocabulary=scale.vocabulary, seed=0, compile=False)
            shape = {"batch": batch, "positions": scale.positions, "act_steps": max(scale.act_steps)}
            settings[batch] = Setting(arguments, dtype="auto", device=scale.device, **shape)
            settings[batch].compared_ids = 0
        return settings[batch]

    def cost(engine: str, batch: int, act_steps: int) -> Figures:
        rows, warm_up = setting(batch), 4  # beyond 512 positions, where graphs are made anew
        rows.engine_options = ENGINES[engine]
        figures: Figures = {}
        started = time.perf_counter()
        with decoding_warnings(figures):
            under_way = rows.decoding(1 + warm_up + 3 * scale.tokens, act_steps=act_steps)
            for _ in range(warm_up):
                under_way.next()
            first = time.perf_counter() - started
            seconds = statistics.median(under_way.seconds(scale.tokens) for _ in range(3))
        read = rows.weight_bytes_per_token(act_steps) + cache_bytes(rows.model, act_steps, batch, scale.positions)
        return figures | {
            "engine": engine,
            "batch": batch,
            "ACT steps": act_steps,
            "tokens/s": batch / seconds,
            "ms": seconds * 1e3,
            "MB read": read / 1e6,
            "of limit": None,
            "to recomputation": None,
            "first s": first,
        }

    def recomputation(act_steps: int) -> Figures:
        alone, seconds = setting(1), []
        for _ in range(4):
            started = time.perf_counter()
            float(alone.recomputed(torch.from_numpy(alone.prompts[0].ids[None]), act_steps)[0, 0])
            seconds.append(time.perf_counter() - started)
        return {"recomputed tokens/s": 1 / statistics.median(seconds[1:])}

    yield Case("device", lambda: device_peaks(scale))
    for act_steps in scale.act_steps:
        yield Case(f"recomputation, {act_steps} ACT steps", functools.partial(recomputation, act_steps))
    for engine in ENGINES:
        for batch, act_steps in itertools.product(scale.batches[: 1 if engine == "eager" else None], scale.act_steps):
            name = f"{engine}, batch {batch}, {act_steps} ACT steps"
            yield Case(name, functools.partial(cost, engine, batch, act_steps), 60)


def compare_decoding(cases: Mapping[str, Figures]) -> None:
    """Add what needs several cases, where they are there."""
    for figures in cases.values():
        if "engine" in figures:
            recomputed = cases.get(f"recomputation, {figures['ACT steps']} ACT steps")
            if recomputed is not None and figures["batch"] == 1:
                figures["to recomputation"] = figures["tokens/s"] / recomputed["recomputed tokens/s"]
            if "device" in cases:
                figures["of limit"] = figures["MB read"] / cases["device"]["copy GB/s"] / figures["ms"]
