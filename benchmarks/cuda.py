"""The check-up on a CUDA device: is it right there, how fast is it, what does it cost. One command, rehearsed on a CPU.

    python -m benchmarks.cuda [--minutes 8 --only smoke train_step --output FOLDER]
    python -m benchmarks.cuda --rehearse

Parts run one after the other, and each consists of cases with a time limit of their own. Cases run in processes of their own:
where one crashes or hangs, its message is kept and a new process goes on with the next. After every part, `--output` (default: the
environment variable OUT, else checkpoints/cuda) holds cuda.md, cuda.json, and what the processes wrote to stderr as PART.log.
`--rehearse` runs the same code on a CPU with tiny sizes; what only CUDA has says so.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import logging
import math
import os
import platform
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from artifacts.outputs import output_folder, write_json
from benchmarks.common import VOCABULARY, SyntheticRows, benchmark_config, flop_counter, synthetic_trainer
from benchmarks.cuda_report import markdown
from benchmarks.decoding import Setting
from benchmarks.train_step import Naive
from config.errors import UsageError, one_clear_message
from config.schema import user_path
from generation.device_tick import graph_recorder
from generation.engine import Engine, Prompt, Request, cache_bytes
from models.act import RecursiveModel
from models.device import keep_freed_memory, peak_memory
from models.losses import log_probs
from training.loop import StepResult

REPOSITORY = Path(__file__).resolve().parents[1]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured."""

    device: str = "cuda"
    smoke: tuple[str, ...] = ("arch.hidden_size=128", "arch.num_heads=4", "dataset.seq_len=160", "global_batch_size=6")
    """Settings of the smoke part: a float64 reference on the CPU takes a second, rows are longer than a block of FlexAttention."""
    arch: tuple[str, ...] = ()
    vocabulary: int = VOCABULARY
    batch: int = 48
    positions: int = 512
    steps: int = 12
    """Optimizer steps of a timing."""
    settling: int = 10
    """Optimizer steps on rows of varied lengths, after which nothing should compile any more."""
    watched: int = 20
    """Optimizer steps after these in which graphs are counted."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Rows decoded together."""
    act_steps: tuple[int, ...] = (1, 4, 16)
    tokens: int = 4
    """Of each row, behind one timing of decoding."""
    matrix: int = 8192
    copied_bytes: int = 2**31


REHEARSAL = Scale(
    device="cpu",
    smoke=("arch.hidden_size=128", "arch.num_heads=4", "dataset.seq_len=24", "global_batch_size=3"),
    arch=("arch.hidden_size=32", "arch.num_heads=2", "arch.H_cycles=2", "arch.L_cycles=2"),
    vocabulary=70,
    batch=4,
    positions=32,
    steps=2,
    settling=2,
    watched=2,
    batches=(1, 2),
    act_steps=(1, 2),
    tokens=2,
    matrix=128,
    copied_bytes=2**20,
)


@dataclass(frozen=True)
class Case:
    """Something to measure, which fails alone."""

    name: str
    measure: Callable[[], Figures]
    seconds: float = 30
    """It is stopped after so long."""


def synchronize(scale: Scale) -> None:
    """Wait until the device has done all that it was given."""
    if scale.device == "cuda":
        torch.cuda.synchronize()


def free_memory(scale: Scale) -> None:
    """Give back what nothing refers to any more, and measure the peak anew from here."""
    gc.collect()
    if scale.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# a. Is it right?
_SMALL_VOCABULARY = 300
# Recursion: its settings, and attention and packing of its second compiled case.
_RECURSIONS: dict[str, tuple[list[str], tuple[str, str]]] = {
    "trm": ([], ("prefix", "bucketed")),
    "trm_singlez": ([], ("causal", "off")),
    "trm_hier6": ([], ("causal", "packed")),
    "hrm": ([], ("prefix", "off")),
    # As at its default size, a head has 42 channels.
    "transformers_baseline": (["arch.hidden_size=168"], ("causal", "bucketed")),
}
# Largest relative errors against float64 of an untrained model: of two steps' losses, and of the first one's gradients by norm.
# Recursion amplifies rounding: on a CPU the largest are 5e-7 and 9e-6 in float32, 7e-4 and 0.1 in bfloat16.
_TOLERANCES = {"float32": (1e-5, 2e-4), "bfloat16": (5e-3, 0.2)}
_CACHED_TOLERANCE = 1e-4
"""Nats at one ACT step in float32, contract 5."""
# Cached bfloat16 may be so many times as far from float32 as recomputed bfloat16 is.
_CACHED_BFLOAT16 = 3.0


def two_steps(overrides: Sequence[str], dtype: str, device: str, *, compiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Losses per token of two optimizer steps; all gradients of the first, and those of the levels alone."""
    torch._dynamo.reset()
    config = benchmark_config(["lr_warmup_steps=0", f"arch.forward_dtype={dtype}", *overrides], device)
    rows = SyntheticRows(config, _SMALL_VOCABULARY, lambda i: varied_length(i, config.dataset.seq_len))
    trainer = synthetic_trainer(config, rows, _SMALL_VOCABULARY, compiled=compiled)
    steps = trainer.steps()
    results = [next(steps)]
    gradients = {name: p.grad.double().cpu().flatten() for name, p in trainer.model.named_parameters() if p.grad is not None}
    results.append(next(steps))
    losses = torch.tensor([float(result.sums["nll"]) / result.weight for result in results], dtype=torch.float64)
    return losses, torch.cat(list(gradients.values())), torch.cat([g for name, g in gradients.items() if "_level." in name])


def training_errors(overrides: Sequence[str], dtype: str, scale: Scale, *, compiled: bool = False) -> Figures:
    """Errors against float64 on the CPU; compiled code is also held against the uncompiled."""
    exact = two_steps(overrides, "float64", "cpu")
    found = two_steps(overrides, dtype, scale.device, compiled=compiled)
    eager = two_steps(overrides, dtype, scale.device) if compiled else None
    loss_tolerance, gradient_tolerance = _TOLERANCES[dtype]

    def relative(theirs: Tensor, ours: Tensor) -> float:
        return float((ours - theirs).norm() / theirs.norm())

    def errors(reference: tuple[Tensor, Tensor, Tensor]) -> Figures:
        loss = (found[0] / reference[0] - 1).abs().max()  # NaN where one is
        return {
            "loss": float(loss),
            "gradient": relative(reference[1], found[1]),
            "level_gradient": relative(reference[2], found[2]),
        }

    figures: Figures = {"errors": errors(exact), "tolerance": {"loss": loss_tolerance, "gradient": gradient_tolerance}}
    if eager is not None:
        figures["to_eager"] = errors(eager)
    error = figures["errors"]
    gradient = max(error["gradient"], error["level_gradient"])
    return figures | {"passed": error["loss"] <= loss_tolerance and gradient <= gradient_tolerance}


# How the engine decodes on CUDA: as it does by itself, with an ACT step of few rows in one kernel, all else in graphs; in graphs
# alone; and kernel by kernel.
ENGINES: dict[str, dict[str, Any]] = {
    "one kernel": {},
    "graphs": {"record": lambda tick: graph_recorder()(tick)} if torch.cuda.is_available() else {},
    "compiled graphs": {"compiled": True, **({"record": lambda tick: graph_recorder()(tick)} if torch.cuda.is_available() else {})},
    "eager": {"record": lambda tick: tick},
}


@contextlib.contextmanager
def graphs_made(figures: Figures) -> Iterator[None]:
    """Note in `figures` why, within the block, the engine didn't use graphs where it should have."""
    handler, log = logging.Handler(), logging.getLogger("generation.device_tick")
    messages: list[str] = []
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
    if messages:
        figures["error"] = messages[0]


@torch.inference_mode()
def decoding_errors(overrides: Sequence[str], scale: Scale, engine: str) -> Figures:
    """Cached decoding against recomputing whole rows, at one ACT step: largest differences of log p, nats."""
    models = {}
    for dtype in ("float32", "bfloat16"):
        config = benchmark_config([f"arch.forward_dtype={dtype}", "arch.attention=prefix", *overrides], scale.device)
        models[dtype] = RecursiveModel(config.arch, _SMALL_VOCABULARY).to(scale.device)
        models[dtype].cast_for_inference()

    def recomputed(dtype: str, ids: np.ndarray, prompt: int) -> Tensor:
        """log p [T, V] after the prompt's last id and those that follow."""
        model = models[dtype]
        ids_1T = torch.from_numpy(ids[None]).to(model.device)
        segments_1T = (torch.arange(len(ids), device=model.device) < prompt).long()[None]
        [refined] = model.refine(ids_1T, model.rotary(torch.arange(len(ids))), model.mask(segments_1T), act_steps=1)
        return log_probs(model.logits(refined.output_BTD[0, prompt - 1 :]), model.config.loss).double()

    tokens = 8
    prompts = [np.random.default_rng(row).integers(0, _SMALL_VOCABULARY, length) for row, length in enumerate((17, 5, 40))]
    # Without candidates, ids are chosen on the device.
    top = _SMALL_VOCABULARY if engine == "eager" else 0
    figures: Figures = {}
    for dtype, model in models.items():
        decoder = Engine(model, eos_id=-1, act_steps=1, rows=len(prompts), positions=64, **ENGINES[engine])
        for prompt in prompts:
            decoder.submit(Request(Prompt(prompt, np.ones_like(prompt)), tokens, top=top))
        given: list[list[Any]] = [[] for _ in prompts]
        with graphs_made(figures):
            while decoder.busy:
                for token in decoder.tick():
                    given[token.request].append(token)
        cached, rounding = list[Tensor](), list[Tensor]()
        for prompt, answer in zip(prompts, given, strict=True):
            ids = np.append(prompt, [token.id for token in answer[:-1]])
            exact_TV, same_TV = (recomputed(kind, ids, len(prompt)) for kind in ("float32", dtype))
            for place, token in enumerate(answer):
                found_ids, logps = zip((token.id, token.logp), *token.candidates, strict=True)
                against_V = (same_TV if dtype == "float32" else exact_TV)[place].cpu()
                cached.append((torch.tensor(logps, dtype=torch.float64) - against_V[list(found_ids)]).abs().max())
            rounding.append((same_TV - exact_TV).abs().max().cpu())
        figures[dtype] = {"cached": float(torch.stack(cached).max()), "rounding": float(torch.stack(rounding).max())}
    bound = _CACHED_BFLOAT16 * figures["bfloat16"]["rounding"]
    passed = figures["float32"]["cached"] <= _CACHED_TOLERANCE and figures["bfloat16"]["cached"] <= bound
    return figures | {"tolerance": {"float32": _CACHED_TOLERANCE, "bfloat16": bound}, "passed": passed}


def smoke(scale: Scale) -> Iterator[Case]:
    """Five cases at a time, one of each recursion: the processes of this part take one recursion each."""

    def sizes(name: str) -> list[str]:
        return [f"arch={name}", *scale.smoke, *_RECURSIONS[name][0]]

    def training(name: str, dtype: str, attention: str, packing: str, compiled: bool) -> Case:
        overrides = [*sizes(name), f"arch.attention={attention}", f"packing={packing}"]
        label = f"{name}: {dtype}, {attention}, packing {packing}, {'compiled' if compiled else 'eager'}"
        return Case(label, lambda: training_errors(overrides, dtype, scale, compiled=compiled), 90 if compiled else 30)

    def decoding(name: str, engine: str) -> Case:
        return Case(f"{name}: decoding, {engine}", lambda: decoding_errors(sizes(name), scale, engine), 60)

    for name in _RECURSIONS:
        yield training(name, "float32", "causal", "off", compiled=False)
    for name in _RECURSIONS:
        yield training(name, "bfloat16", "prefix", "packed", compiled=False)
    for engine, name in itertools.product(ENGINES, _RECURSIONS):
        yield decoding(name, engine)
    for name in _RECURSIONS:
        yield training(name, "bfloat16", "prefix", "packed", compiled=True)
    for name, (_, (attention, packing)) in _RECURSIONS.items():
        yield training(name, "float32", attention, packing, compiled=True)


# b. and c. What does it cost?
# SlimOrca's rows have a median of 178 ids and a mean of about 340.
_MEDIAN_LENGTH = 178
_LENGTH_SPREAD = math.sqrt(2 * math.log(340 / _MEDIAN_LENGTH))


def varied_length(index: int, most: int) -> int:
    """Positions of row `index`, spread as SlimOrca's are at 512 positions, cut at `most`."""
    length = np.random.default_rng(index).lognormal(math.log(_MEDIAN_LENGTH), _LENGTH_SPREAD)
    return max(2, min(most, round(length * most / 512)))


def seconds_of(scale: Scale, work: Callable[[], object], repeats: int = 10) -> float:
    """Mean time of `work`, by events on a CUDA device; the first runs are not timed."""
    for _ in range(3):
        work()
    synchronize(scale)
    if scale.device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / repeats / 1e3
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
    return {"matmul_flops_per_second": matmul, "copy_bytes_per_second": copy, "matrix": scale.matrix}


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def host_waits(step: Callable[[], object]) -> list[str]:
    """Where the host waited for the device during `step`, as torch warns of it: file and line."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits]


def dearest_kernels(scale: Scale, step: Callable[[], object], most: int = 10) -> list[Figures]:
    """The kernels (on a CPU: operators) that took most of the device's time in `step`: name, calls, ms."""
    on_cuda = scale.device == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if on_cuda else [activity.CPU]) as profile:
        step()
        synchronize(scale)

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if on_cuda else event.self_cpu_time_total)

    # Ranges that torch marks on the device, an optimizer's step for one, aren't kernels.
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = [
        event
        for event in profile.key_averages()
        if event.device_type == wanted and not event.key.startswith(("Optimizer.", "Torch-Compiled", "##", "ProfilerStep"))
    ]
    total = sum(map(microseconds, events))
    dearest = sorted(events, key=microseconds, reverse=True)[:most]
    return [
        {"name": event.key, "calls": event.count, "ms": microseconds(event) / 1e3, "share": microseconds(event) / max(total, 1e-9)}
        for event in dearest
    ]


def training_cost(scale: Scale, overrides: Sequence[str], *, compiled: bool = False, varied: bool = False) -> Figures:
    """The real Trainer's step. Rows are full, or varied in length as SlimOrca's are."""
    torch._dynamo.reset()
    size = [f"dataset.seq_len={scale.positions}", f"global_batch_size={scale.batch}"]
    config = benchmark_config([*scale.arch, *size, "arch.loss=softmax", *overrides], scale.device)

    def varying(index: int) -> int:
        return varied_length(index, scale.positions)

    rows = SyntheticRows(config, scale.vocabulary, varying if varied else None)
    steps = synthetic_trainer(config, rows, scale.vocabulary, compiled=compiled).steps()

    def timed() -> tuple[float, StepResult]:
        started = time.perf_counter()
        result = next(steps)
        synchronize(scale)
        return time.perf_counter() - started, result

    warm_up = [timed()[0] for _ in range(scale.settling if varied else 3)]
    measured = [timed() for _ in range(scale.steps)]
    seconds, results = [seconds for seconds, _ in measured], [result for _, result in measured]
    median = statistics.median(seconds)

    def per_second(name: str) -> float:
        return sum(int(result.sums[name]) for result in results) / sum(seconds)

    figures: Figures = {
        "dtype": config.arch.forward_dtype,
        "ms": median * 1e3,
        "ms_least_and_most": [min(seconds) * 1e3, max(seconds) * 1e3],
        "steps": scale.steps,
        "tokens_per_second": per_second("tokens"),
        "supervised_per_second": per_second("supervised"),
        "padding": 1 - per_second("tokens") / per_second("attended"),
        "peak_memory": peak_memory(torch.device(scale.device)),
        "loss_per_token": float(results[-1].sums["nll"]) / results[-1].weight,
    }
    figures["host_waits"] = host_waits(lambda: next(steps)) if scale.device == "cuda" else "needs CUDA"
    figures["kernels"] = dearest_kernels(scale, lambda: next(steps))
    if compiled:
        figures["compile_seconds"] = sum(warm_up) - len(warm_up) * median
        rows.length = varying
        for _ in range(scale.settling):
            next(steps)
        before = compiled_graphs()
        for _ in range(scale.watched):
            next(steps)
        figures |= {"graphs": before, "graphs_after_settling": compiled_graphs() - before}
    else:
        # The same for compiled code, in which torch can't count them.
        with flop_counter() as counter:
            result = next(steps)
        figures["flops_per_token"] = counter.get_total_flops() / int(result.sums["tokens"])
    return figures


def naive_cost(scale: Scale) -> Figures:
    """benchmarks/naive.py's step in float32 at the largest batch that fits, of ours and its halves."""
    batch = scale.batch
    while True:
        size = [f"dataset.seq_len={scale.positions}", f"global_batch_size={batch}"]
        config = benchmark_config([*scale.arch, *size, "arch.forward_dtype=float32"], scale.device)
        try:
            naive = Naive(config, scale.vocabulary)
            naive.step()
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                naive.step()
                synchronize(scale)
                seconds.append(time.perf_counter() - started)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        else:
            median = statistics.median(seconds)
            memory = peak_memory(torch.device(scale.device))
            tokens = batch * scale.positions / median
            return {"batch": batch, "ms": median * 1e3, "tokens_per_second": tokens, "peak_memory": memory}
        naive = None  # type: ignore[assignment]
        free_memory(scale)


def train_step(scale: Scale) -> Iterator[Case]:
    """The default architecture's training step; the report puts each beside the device's peak and the naive way."""
    recomputing = ["arch.activation_checkpointing=true"]

    def training(name: str, seconds: float, overrides: Sequence[str] = (), **kind: bool) -> Case:
        return Case(name, lambda: training_cost(scale, ["arch.halt_max_steps=1", *overrides], **kind), seconds)

    yield Case("device", lambda: device_peaks(scale))
    yield training("causal, eager", 40)
    yield training("causal, compiled", 100, compiled=True)
    yield Case("naive", lambda: naive_cost(scale), 45)
    yield training("causal, eager, activation checkpointing", 40, recomputing)
    yield training("prefix bucketed, varied lengths, eager", 40, ["arch.attention=prefix", "packing=bucketed"], varied=True)
    yield training("causal, varied lengths, eager", 40, varied=True)
    yield training("causal, compiled, activation checkpointing", 60, recomputing, compiled=True)
    for packing in ("bucketed", "packed"):
        overrides = ["arch.attention=prefix", f"packing={packing}"]
        yield training(f"prefix {packing}, varied lengths, compiled", 70, overrides, compiled=True, varied=True)


def decoding(scale: Scale) -> Iterator[Case]:
    """Tokens per second of the engine, the rows' prompts long enough that `positions` ids are known."""
    deepest = max(scale.act_steps)
    settings: dict[int, Setting] = {}

    def setting(batch: int) -> Setting:
        if batch not in settings:
            arguments = argparse.Namespace(overrides=scale.arch, vocabulary=scale.vocabulary, seed=0, compile=False)
            shape = {"batch": batch, "positions": scale.positions, "act_steps": deepest}
            settings[batch] = Setting(arguments, dtype="auto", device=scale.device, **shape)
        return settings[batch]

    def cost(engine: str, batch: int, act_steps: int) -> Figures:
        of_batch = setting(batch)
        of_batch.engine_options, of_batch.compared_ids = ENGINES[engine], 0
        started = time.perf_counter()
        warm_up = 4  # over the length that graphs are made for, 512
        under_way = of_batch.decoding(1 + warm_up + 3 * scale.tokens, act_steps=act_steps)
        for _ in range(warm_up):
            under_way.next()
        before = time.perf_counter() - started
        figures: Figures = {}
        with graphs_made(figures):
            seconds = statistics.median(under_way.seconds(scale.tokens) for _ in range(3))
        model = of_batch.model
        return figures | {
            "engine": engine,
            "batch": batch,
            "act_steps": act_steps,
            "ms_per_step": seconds * 1e3,
            "tokens_per_second": batch / seconds,
            "seconds_before": before,
            "weight_bytes": of_batch.weight_bytes_per_token(act_steps),
            "cache_bytes": cache_bytes(model, act_steps, batch, scale.positions),
        }

    def recomputation(act_steps: int) -> Figures:
        alone = setting(1)
        ids_1T = torch.from_numpy(alone.prompts[0].ids[None])
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            float(alone.recomputed(ids_1T, act_steps)[0, 0])
            seconds.append(time.perf_counter() - started)
        return {"act_steps": act_steps, "tokens_per_second": 1 / statistics.median(seconds[1:])}

    def timed(engine: str, batch: int, act_steps: int, limit: float) -> Case:
        return Case(f"{engine}, batch {batch}, {act_steps} ACT steps", lambda: cost(engine, batch, act_steps), limit)

    yield Case("device", lambda: device_peaks(scale))
    for engine in ENGINES:
        for act_steps in scale.act_steps:
            if engine == "eager":
                yield Case(f"recomputation, {act_steps} ACT steps", lambda steps=act_steps: recomputation(steps))  # type: ignore[misc]
        for batch, act_steps in itertools.product(scale.batches[: 1 if engine == "eager" else None], scale.act_steps):
            yield timed(engine, batch, act_steps, 30 if engine == "eager" else 60)


@dataclass(frozen=True)
class Part:
    """Some cases, the seconds that they should take, by which parts share the time, and how many processes take them."""

    cases: Callable[[Scale], Iterator[Case]]
    seconds: float
    processes: int = 1


# How a process ended; what a case is that it can't begin with; what it may take between two of them.
_ENDED, _START, _START_SECONDS = "the process ended", "start of a process", 90
NOT_RUN = "not run: no time left"

PARTS = {
    "smoke": Part(smoke, 90, processes=len(_RECURSIONS)),
    "train_step": Part(train_step, 150),
    "decoding": Part(decoding, 90),
}


def work(part: str, scale: Scale, share: int, done: Sequence[str]) -> None:
    """A process of `part`: the cases of its `share` that aren't `done`, a JSON line on stdout as each begins and ends."""
    keep_freed_memory()
    if scale.device == "cpu":
        torch.compiler.set_stance("force_eager")  # compiling takes minutes
    # Whoever writes to stdout may not spoil the lines.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    for case in itertools.islice(PARTS[part].cases(scale), share, None, PARTS[part].processes):
        if case.name in done or (os.environ.get("CASES") and not re.search(os.environ["CASES"], case.name)):
            continue
        say(begin=case.name, seconds=case.seconds)
        started = time.perf_counter()
        try:
            figures = case.measure()
            say(end=case.name, figures=figures | {"seconds": time.perf_counter() - started})
        except Exception as error:
            traceback.print_exc()
            say(end=case.name, figures={"error": told(f"{type(error).__name__}: {error}")})
            if scale.device == "cuda" and isinstance(error, torch.AcceleratorError):
                sys.exit(1)  # the device answers this process no more
        free_memory(scale)


def told(message: str) -> str:
    """The last lines of a message, for a report; why code was compiled anew stays in the log."""
    lines = [line for line in message.strip().splitlines() if "[__recompiles]" not in line]
    return "\n".join(lines[-12:])[-1500:]


def has_failed(figures: Figures) -> bool:
    """Whether a case has no figures, or such as it must not have."""
    return "error" in figures or figures.get("passed") is False


class Share:
    """The cases of one process of a part. It is stopped when a case takes too long, or at `deadline` (as time.monotonic counts).

    `figures` of the part grows as cases end. Where a process ends before its cases do, another goes on after the one it was at.
    """

    def __init__(self, part: str, number: int, figures: dict[str, Figures], deadline: float, rehearse: bool, log: Path) -> None:
        self._command = [sys.executable, "-m", "benchmarks.cuda", "--worker", part, "--share", str(number)]
        self._command += ["--rehearse"] if rehearse else []
        self._part, self._figures, self._deadline, self._log = part, figures, deadline, log
        processes = PARTS[part].processes
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        few = {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads} if processes > 1 else {}
        self._environment = {**os.environ, **few, "TORCH_LOGS": "recompiles"}
        self._done: list[str] = []

    def run(self) -> None:
        """Measure all cases."""
        done = -1
        # A process that can't even begin a case isn't tried again.
        while done < len(self._done) and time.monotonic() < self._deadline:
            done = len(self._done)
            if self._runs_to_its_end():
                return

    def _runs_to_its_end(self) -> bool:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
            # A session of its own, so that compilers which it starts are stopped with it.
            process = subprocess.Popen(
                [*self._command, "--done", *self._done],
                cwd=REPOSITORY,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
            running, ended = self._follow(process)
            status = process.poll()  # None: it says nothing more, and has yet to leave
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            stderr.seek(0)
            messages = stderr.read()
        with self._log.open("a", encoding="utf-8") as log:
            log.write(messages)
        if running is not None:
            self._note(running, {"error": f"{ended}; stderr ends with\n{told(messages)}"})
        return ended == _ENDED and not status

    def _follow(self, process: subprocess.Popen[str]) -> tuple[str | None, str]:
        """Read what it says until it ends or must be stopped: the case that it was at, and how it ended."""
        assert process.stdout is not None
        stdout, lines = process.stdout, queue.SimpleQueue[str]()

        def read() -> None:
            for line in stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        running: str | None = _START
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(until, self._deadline) - time.monotonic()))
            except queue.Empty:
                return running, "stopped at its time limit"
            if not line:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
                return running, _ENDED
            news = json.loads(line)
            if "begin" in news:
                running, until = news["begin"], time.monotonic() + news["seconds"]
            else:
                self._note(news["end"], news["figures"])
                running, until = None, time.monotonic() + _START_SECONDS

    def _note(self, case: str, figures: Figures) -> None:
        self._figures[case] = figures
        if case != _START:
            self._done.append(case)
        word = "FAILED" if has_failed(figures) else "ok"
        print(f"{self._part:10} {word:6} {figures.get('seconds', 0):6.1f} s  {case}", flush=True)


def run_part(name: str, seconds: float, rehearse: bool, output: Path) -> Figures:
    """All cases of a part within so many seconds: what is kept of it."""
    part, started = PARTS[name], time.monotonic()
    figures: dict[str, Figures] = {case.name: {"error": NOT_RUN} for case in part.cases(REHEARSAL if rehearse else Scale())}
    log = output / f"{name}.log"
    log.unlink(missing_ok=True)
    shares = [Share(name, number, figures, started + seconds, rehearse, log) for number in range(part.processes)]
    threads = [threading.Thread(target=share.run) for share in shares]
    # One processor of a rehearsal's two for each process.
    at_once = 2 if rehearse else len(threads)
    for first in range(0, len(threads), at_once):
        for thread in threads[first : first + at_once]:
            thread.start()
        for thread in threads[first : first + at_once]:
            thread.join()
    return {"seconds": time.monotonic() - started, "cases": figures}


def said_by(*command: str) -> str:
    """The first line that a command prints; empty where there is no such command."""
    try:
        said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.strip().partition("\n")[0]


def machine(scale: Scale) -> dict[str, str]:
    """What it was measured on."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
    gpu = said_by("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": scale.device,
        "GPU, memory, driver": gpu or "no nvidia-smi",
        "CPU": f"{os.cpu_count()} x {models[0] if models else platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "commit": said_by("git", "rev-parse", "--short", "HEAD") or "unknown: no git here",
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="time for everything; what doesn't fit is reported as not run")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    add("--rehearse", action="store_true", help="tiny sizes on a CPU")
    add("--output", type=user_path, help="folder of the report; default: the variable OUT, else checkpoints/cuda")
    add("--worker", choices=PARTS, help=argparse.SUPPRESS)
    add("--share", type=int, default=0, help=argparse.SUPPRESS)
    add("--done", nargs="*", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device: --rehearse runs the check-up with tiny sizes on a CPU")
    return arguments


def main() -> None:
    """Run the parts, or be a process of one."""
    arguments = parse_arguments()
    scale = REHEARSAL if arguments.rehearse else Scale()
    if arguments.worker is not None:
        work(arguments.worker, scale, arguments.share, arguments.done)
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    output = output_folder(arguments.output or user_path(os.environ.get("OUT", "checkpoints/cuda")))
    report: Figures = {"machine": machine(scale), "scale": dataclasses.asdict(scale), "parts": {}}
    print("\n".join(f"{key}: {value}" for key, value in report["machine"].items()), flush=True)
    parts = [name for name in PARTS if name in arguments.only]
    for place, name in enumerate(parts):
        # What a part leaves of its share goes to those after it.
        share = PARTS[name].seconds / sum(PARTS[other].seconds for other in parts[place:])
        report["parts"][name] = run_part(name, share * (deadline - time.monotonic()), arguments.rehearse, output)
        write_json(output / "cuda.json", report)
        (output / "cuda.md").write_text(markdown(report), encoding="utf-8")
        print(f"{name}: {report['parts'][name]['seconds']:.0f} s", flush=True)
    print(markdown(report))
    cases = [figures for part in report["parts"].values() for figures in part["cases"].values()]
    if failed := sum(map(has_failed, cases)):
        sys.exit(f"{failed} of {len(cases)} cases failed or weren't run")


if __name__ == "__main__":
    with one_clear_message():
        main()
