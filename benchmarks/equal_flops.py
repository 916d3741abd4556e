"""Compares networks and recipes trained for the same FLOPs, seconds or examples, over several
seeds.

    python -m benchmarks.equal_flops --tera-flops 60 --parallel 2 --output checkpoints/equal_flops
    python -m benchmarks.equal_flops --seconds 150 --seeds 0 1 2 --data FOLDER --rows 2000 --output checkpoints/conversations
    python -m benchmarks.equal_flops --examples 28000 --output checkpoints/equal_examples

Arms are Hydra overrides in a YAML file (benchmarks/equal_flops.yaml); plain Transformers of 2, 4
and 8 blocks are always included. The learning rate follows the spent fraction of the budget, so
that the schedule ends with it. Every arm and seed writes a JSON file to `--output` and isn't
trained again; an interrupted one starts over. The folder also gets equal_flops.md (printed too),
equal_flops.json (also the last line) and equal_flops.png. Code is not compiled.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from artifacts.outputs import output_folder, write_json
from benchmarks.common import benchmark_config, flop_counter, parser
from benchmarks.depth import ask
from benchmarks.equal_flops_report import draw, markdown, summarize
from config.errors import UsageError, one_clear_message
from config.schema import PretrainInstructConfig, user_path
from dataset import build_sample_dataset
from dataset.instruct import RunData, open_run_data
from dataset.text.conversation import Template
from dataset.text.loader import Example, ExampleStream, TextDataset
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path
from evaluators.answer_scores import is_exact, score_answers, score_by_hops
from evaluators.language import DepthOutput, evaluate_language
from generation.engine import Engine, Prompt, Request
from generation.loading import make_responder
from models.act import RecursiveModel
from models.device import keep_freed_memory, pick_device
from training.estimate import count_parameters
from training.loop import Trainer
from training.progress import StepResult
from training.task import Batch
from training.text import TextTask

ARMS = Path(__file__).with_suffix(".yaml")
# Arms that are always included.
PLAIN = {
    f"plain_{blocks}{'' if norm == 'post' else '_pre'}": [
        *("arch=looped", f"arch.L_layers={blocks}", "arch.H_cycles=1", "arch.L_cycles=0"),
        *("arch.halt_max_steps=1", "arch.grad_calls=all", f"arch.norm={norm}"),
    ]
    for norm in ("post", "pre")
    for blocks in (2, 4, 8)
}
# A prime, so that steps of every kind are counted if kinds alternate.
_COUNT_EVERY = 11
# Points of the held-out loss curve, evenly spaced over the budget, and rows measured for each.
_POINTS, _POINT_ROWS = 8, 300
# More passes over the data than any budget allows.
_ENDLESS = 10**6
_TIMED_TOKENS, _TIMINGS = 32, 3


@dataclass(frozen=True)
class Budget:
    """The training budget of every arm."""

    unit: str
    """FLOPs, seconds or examples."""
    amount: float


@dataclass
class Meter:
    """The cost of training so far: some steps are measured, the others estimated from their numbers
    of tokens.

    FLOPs are counted in every `_COUNT_EVERY`-th step; steps up to the next are assumed to have the
    same FLOPs per token. Counting slows a step, so only the others are timed; a counted one is
    assumed to take the same time per token.
    """

    budget: Budget
    batch: int
    """Examples per optimizer step."""
    steps: int = 0
    flops: float = 0.0
    _flops_per_token: float = 0.0
    _tokens: int = 0
    _timed_tokens: int = 0
    _timed_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Training time, without evaluations."""
        return self._timed_seconds * self._tokens / self._timed_tokens if self._timed_tokens else 0.0

    @property
    def share(self) -> float:
        """Of the budget."""
        spent = {"FLOPs": self.flops, "seconds": self.seconds, "examples": self.steps * self.batch}
        return spent[self.budget.unit] / self.budget.amount

    def measured(self, steps: Iterator[StepResult]) -> Iterator[StepResult]:
        """The `steps` within the budget."""
        while self.share < 1:
            is_counted = self.steps % _COUNT_EVERY == 0
            started = time.perf_counter()
            with flop_counter() if is_counted else contextlib.nullcontext() as counter:
                result = next(steps)
            seconds, tokens = time.perf_counter() - started, int(result.sums["tokens"])
            if counter is not None:
                self._flops_per_token = counter.get_total_flops() / tokens
            else:
                self._timed_seconds += seconds
                self._timed_tokens += tokens
            self._tokens += tokens
            self.flops += self._flops_per_token * tokens
            self.steps += 1
            yield result


class _BudgetTask(TextTask):
    """Conversations of a run that ends with its budget."""

    meter: Meter

    def next_batch(self, step: int) -> Batch:
        if self.meter.share:
            steps = max(step, math.ceil(self.meter.steps / self.meter.share))
            self.config = self.config.model_copy(update={"max_steps": steps})
        return super().next_batch(step)


def compose_arm(overrides: Sequence[str], seed: int) -> PretrainInstructConfig:
    """An arm's settings, with endless data. Raises UsageError if it would end before its budget."""
    config = benchmark_config([*overrides, f"seed={seed}"], "auto", ())
    ends = {"max_steps": config.max_steps, "max_minutes": config.max_minutes, "stages": config.stages or None}
    for key, value in (ends | {"early_stopping.patience": config.early_stopping.patience}).items():
        if value is not None:
            raise UsageError(f"{key}={value}: every arm ends with its budget and has one source of data; leave {key} out")
    return config.model_copy(update={"epochs": _ENDLESS})


def open_data(config: PretrainInstructConfig) -> tuple[Tokenizer, RunData, TextDataset]:
    """Tokenizer, data and held-out rows. Raises UsageError if there are none."""
    tokenizer = Tokenizer(resolve_tokenizer_path(config.dataset.tokenizer_path))
    data = open_run_data(config, tokenizer, Template())
    if data.test is None:
        raise UsageError("dataset.test_ratio=0 holds no rows out to measure arms on: raise it")
    [test] = data.test.parts.values()
    return tokenizer, data, test


def texts_hash(data: RunData) -> str:
    """SHA-256 of all training and held-out conversations, independent of the tokenizer."""
    splits = [split for corpus in (data.train, data.test) if corpus is not None for split in corpus.parts.values()]
    return hashlib.sha256(b"".join(split.column("conversation_hash").astype("<u8").tobytes() for split in splits)).hexdigest()


def is_plain(config: PretrainInstructConfig) -> bool:
    """Whether the network is a Transformer without any recursion."""
    return config.arch.num_level_calls * config.arch.halt_max_steps == 1


def measure(name: str, config: PretrainInstructConfig, budget: Budget, rows: int) -> dict[str, Any]:
    """Train one arm with one seed, and measure it on the first `rows` held-out rows. Returns the
    result as JSON values.
    """
    tokenizer, data, test = open_data(config)
    model = RecursiveModel(config.arch, tokenizer.vocab_size, seed=config.seed)
    model.to(pick_device(config.device))
    meter, curve = Meter(budget, config.global_batch_size), list[tuple[float, float, float]]()
    with ExampleStream(data.train, data.curriculum, config.dataloader_workers) as stream:
        task = _BudgetTask(config, model, stream, data.curriculum)
        task.meter = meter
        trainer = Trainer(config, model, task)
        loss = 0.0
        for result in meter.measured(trainer.steps()):
            due = min(_POINTS, int(_POINTS * meter.share))
            if due > len(curve):
                with trainer.averaged_weights():
                    loss = held_out(model, config, test, tokenizer.eos_id, min(rows, _POINT_ROWS))["by_act_step"][-1]["nats"]
                # One step may pass several points.
                curve += [(meter.flops, meter.seconds, loss)] * (due - len(curve))
                print(f"{name} seed {config.seed}: {due}/{_POINTS}, step {result.step}, {loss:.4f} nats", flush=True)
    if trainer.ema is not None:
        model.load_state_dict(trainer.ema.average, strict=False)
    model.eval()
    model.cast_for_inference()
    found = held_out(model, config, test, tokenizer.eos_id, rows)
    if config.dataset.source == "sample":
        found |= generated(model, config, tokenizer, test, rows)
        for depth, exact in zip(found["by_act_step"], found.pop("exact_by_act_step"), strict=True):
            depth["exact"] = exact
    return {
        "arm": name,
        "seed": config.seed,
        "is_plain": is_plain(config),
        "uses": config.arch.num_level_calls * config.arch.halt_max_steps,
        "texts": texts_hash(data),
        "parameters_core": sum(count_parameters(model.get_submodule(level)) for level in set(model.level_calls)),
        "parameters": count_parameters(model),
        "flops": meter.flops,
        "seconds": meter.seconds,
        "steps": meter.steps,
        "rows": task.admitted,
        "last_lr": result.lr,
        "curve": curve,
        **found,
        "token": token_cost(model, test[0], config.depth),
    }


def held_out(model: RecursiveModel, config: PretrainInstructConfig, test: TextDataset, eos_id: int, rows: int) -> dict[str, Any]:
    """Teacher-forced losses at each ACT step, and bits and bytes of each row at the last one."""
    row_bits = np.zeros(min(rows, len(test)))

    def keep(output: DepthOutput) -> None:
        is_text = torch.from_numpy(output.labels_BT).to(output.nll_BT.device) != eos_id
        row_bits[output.rows] = ((output.nll_BT.double() * is_text).sum(1) / np.log(2)).cpu().numpy()

    result = evaluate_language(
        model,
        test,
        eos_id=eos_id,
        batch_size=config.global_batch_size,
        act_steps=config.depth,
        limit=rows,
        pad_multiple=config.pad_multiple,
        on_output=keep,
    )
    by_act_step = [sums.metrics() for sums in result.by_depth]
    return {
        "by_act_step": [{"nats": depth["loss_per_token"], "bits_per_byte": depth["bits_per_byte"]} for depth in by_act_step],
        "row_bits": [round(bits, 4) for bits in row_bits.tolist()],
        "row_bytes": [test[row].turn_bytes for row in range(len(row_bits))],
    }


def generated(
    model: RecursiveModel, config: PretrainInstructConfig, tokenizer: Tokenizer, test: TextDataset, rows: int
) -> dict[str, Any]:
    """The fraction of exact answers at each ACT step; at the last one also by answer and by family."""
    responder = make_responder(model, tokenizer, Template(), config)
    histories, references, families, hops = zip(*ask(test, responder, min(rows, len(test))), strict=True)
    depths, has_hops = range(1, config.depth + 1), any(hops)
    answers = {
        depth: [answer.text for answer in responder.at_depth(depth).answers(histories)]
        for depth in (*depths, *([2 * config.depth] if has_hops else []))
    }
    exact = {depth: [int(is_exact(*pair)) for pair in zip(references, texts, strict=True)] for depth, texts in answers.items()}
    by_hops = dict[int, dict[int, float]]()
    for depth, texts in answers.items() if has_hops else ():
        found = score_by_hops(hops, families, references, texts)
        by_hops[depth] = {number: score["overall"]["accuracy"] for number, score in found.items()}
    by_family = score_answers(families, references, answers[config.depth])["families"]
    return {
        "exact_by_act_step": [statistics.fmean(exact[depth]) for depth in depths],
        "row_exact": exact[config.depth],
        "exact_by_hops": by_hops,
        "exact_by_family": {family: score["accuracy"] for family, score in by_family.items()},
    }


def token_cost(model: RecursiveModel, example: Example, act_steps: int) -> dict[str, float]:
    """FLOPs and ms per generated token after the prompt of `example`, for a single row."""
    length = int(np.argmax(example.supervised))
    prompt = Prompt(example.ids[:length], example.segment[:length])

    def seconds(tokens: int) -> float:
        """Of the prompt and this many generated tokens."""
        engine = Engine(model, eos_id=-1, act_steps=act_steps, rows=1, positions=length + tokens)
        engine.submit(Request(prompt, tokens + 1))
        started = time.perf_counter()
        while engine.busy:
            engine.tick()
        return time.perf_counter() - started

    flops = []
    for tokens in (0, _TIMED_TOKENS):
        with flop_counter() as counter:
            seconds(tokens)
        flops.append(counter.get_total_flops())
    timed = [seconds(_TIMED_TOKENS) - seconds(0) for _ in range(_TIMINGS)]
    return {"flops": (flops[1] - flops[0]) / _TIMED_TOKENS, "ms": 1e3 * statistics.median(timed) / _TIMED_TOKENS}


class _Arms(BaseModel):
    """The file with the arms."""

    model_config = ConfigDict(extra="forbid")
    all: list[str]
    arms: dict[Annotated[str, Field(pattern=r"^[\w.+-]+$")], list[str]]


def read_arms(path: Path, only: Sequence[str] | None) -> dict[str, list[str]]:
    """Overrides of the plain Transformers and of the arms in the file, limited to `only` if given.
    Raises UsageError.
    """
    try:
        found = _Arms.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
    except (OSError, OmegaConfBaseException, YAMLError, ValidationError) as error:
        raise UsageError(f"--arms {path}: expected lists of KEY=VALUE, `all` and `arms.NAME`: {error}") from error
    arms = found.arms
    unknown = [name for name in only or [] if name not in arms | PLAIN]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: {path} has the arms {', '.join(arms)}; the plain {', '.join(PLAIN)}")
    return {name: [*found.all, *own] for name, own in (arms | PLAIN).items() if only is None or name in only}


def one(path: Path, name: str, config: PretrainInstructConfig, budget: Budget, rows: int) -> dict[str, Any]:
    """The result in `path`, measured if missing. Raises UsageError if it is of another measurement,
    or if training fails.
    """
    asked = {"settings": config.model_dump(mode="json"), "budget": [budget.amount, budget.unit], "rows": rows}
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["asked"] != asked:
            raise UsageError(f"{path} is of other settings, rows or budget: remove it, or name another --output")
        return found
    try:
        result = {"asked": asked, **measure(name, config, budget, rows)}
    except UsageError as error:
        raise UsageError(f"{name} seed {config.seed}: {error}") from error
    write_json(path, result)
    return result


def _begin_process() -> None:
    """Set one thread for this process, and end it with its parent."""
    keep_freed_memory()
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end, daemon=True).start()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    flags = parser(__doc__, "overrides")
    budget = flags.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tera-flops", type=float, help="training of each arm and seed, in 10^12 counted FLOPs")
    budget.add_argument("--seconds", type=float, help="or seconds of training steps")
    budget.add_argument("--examples", type=int, help="or examples, in whole batches")
    add = flags.add_argument
    add("--arms", type=user_path, default=ARMS, metavar="FILE", help="YAML with arms; default: %(default)s")
    add("--only", nargs="+", metavar="NAME", help="only these arms, of the file and of the plain Transformers")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least 3 for a claim")
    add("--data", type=user_path, metavar="FOLDER", help="conversations in files, in place of the arms' data (docs/data.md)")
    add("--rows", type=int, default=1500, help="held-out rows to measure on, at most")
    add("--parallel", type=int, default=1, help="trainings at a time, each a process of one thread")
    add("--output", type=user_path, required=True, metavar="FOLDER", help="for the results, which are not measured again")
    arguments = flags.parse_args()
    for flag in ("tera_flops", "seconds", "examples", "rows", "parallel"):
        value = getattr(arguments, flag)
        if value is not None and value <= 0:
            raise UsageError(f"--{flag.replace('_', '-')} {value}: expected more than 0")
    return arguments


def main() -> None:
    """Compose all arms, measure missing results, report."""
    arguments = parse_arguments()
    own = [] if arguments.data is None else ["dataset=jsonl", f"dataset.data_dir={arguments.data.resolve()}"]
    amounts = {
        "FLOPs": arguments.tera_flops and 1e12 * arguments.tera_flops,
        "seconds": arguments.seconds,
        "examples": arguments.examples,
    }
    [budget] = [Budget(unit, amount) for unit, amount in amounts.items() if amount is not None]
    arms = {
        (name, seed): compose_arm([*overrides, *own, *arguments.overrides], seed)
        for name, overrides in read_arms(arguments.arms, arguments.only).items()
        for seed in dict.fromkeys(arguments.seeds)
    }
    # Report errors in the data here, and tokenize it before several processes would.
    for config in {config.dataset.model_dump_json(): config for config in arms.values()}.values():
        folder = Path(config.dataset.data_dir)
        if config.dataset.source == "sample" and not any(folder.glob("train.jsonl*")):
            build_sample_dataset.main(["--output-dir", str(folder)])
        open_data(config)
    output = output_folder(arguments.output)
    # Seed by seed, so that an interrupted comparison has complete ones.
    jobs = sorted(((seed, name) for name, seed in arms), key=lambda job: job[0])
    calls = [(output / f"{name}-seed{seed}.json", name, arms[name, seed], budget, arguments.rows) for seed, name in jobs]
    results, failures = list[dict[str, Any]](), list[str]()
    with ProcessPoolExecutor(arguments.parallel, multiprocessing.get_context("spawn"), _begin_process) as pool:
        futures: list[Future[dict[str, Any]]] = [pool.submit(one, *call) for call in calls]
        for future in as_completed(futures):
            try:
                results.append(future.result())
            except UsageError as error:
                failures.append(str(error))
                print(f"failed: {error}", flush=True)
    if results:
        report(results, budget, list(dict.fromkeys(name for name, _ in arms)), output)
    if failures:
        raise UsageError("; ".join(failures))


def report(results: Sequence[Mapping[str, Any]], budget: Budget, names: Sequence[str], output: Path) -> None:
    """Write and print table, JSON and picture."""
    ordered = sorted(results, key=lambda result: (names.index(result["arm"]), result["seed"]))
    found = {"budget": [budget.amount, budget.unit], "torch": torch.__version__, **summarize(ordered)}
    text = markdown(found)
    (output / "equal_flops.md").write_text(text + "\n", encoding="utf-8")
    write_json(output / "equal_flops.json", found)
    draw(ordered, output / "equal_flops.png")
    print(text)
    print(json.dumps(found))


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
