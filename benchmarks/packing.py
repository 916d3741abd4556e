"""Training with each layout of rows for attention (`packing`): padding in attention, and supervised
tokens per second.

    python benchmarks/packing.py [--rows 4000 --repeats 20] [--overrides experiment=cpu_small global_batch_size=48]
    python benchmarks/packing.py --from-data --overrides dataset=jsonl dataset.data_dir=FOLDER 'dataset.files=["*.jsonl.zst"]'

The layouts train in turns, one optimizer step each, from the same weights on the same rows in the
same order. So machine noise affects all alike and, up to rounding, all learn the same. Without
--from-data, rows have random ids and realistic lengths. "padding" is the fraction of attention's
positions that are padding; all other layers compute only tokens. The allocator is set as in
training. Last line: JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.common import parser, synthetic_example, use_threads
from config.compose import compose_config
from config.errors import UsageError, one_clear_message
from config.schema import PretrainInstructConfig
from dataset.instruct import open_run_data
from dataset.text.conversation import Template
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example, Examples, ExampleStream
from dataset.text.packing import Packing
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path
from models.act import RecursiveModel
from models.device import keep_freed_memory, pick_device, resolve_arch, should_compile
from training.loop import Trainer
from training.progress import StepResult
from training.text import TextTask

# SlimOrca's rows have about 420 ids on average, with a wide spread, as in
# benchmarks/tokenization.py.
_MEAN_IDS = 420


class Layout:
    """The training of one layout, step by step."""

    def __init__(self, config: PretrainInstructConfig, packing: Packing, examples: Examples, vocabulary: int) -> None:
        self.config = config.model_copy(update={"packing": packing})
        device = pick_device(config.device)
        model = RecursiveModel(config.arch, vocabulary, seed=config.seed).to(device)
        if should_compile(config.compile, device):
            model.compile_levels()
        curriculum = Curriculum.of_epochs(len(examples), config.seed, 1)
        self.results: list[StepResult] = []
        self.seconds: list[float] = []
        task = TextTask(self.config, model, ExampleStream(examples, curriculum, workers=0), curriculum)
        self._steps = Trainer(self.config, model, task).steps()

    def step(self) -> bool:
        """Train and time a step; False once all rows are trained."""
        started = time.perf_counter()
        result = next(self._steps, None)
        if result is None:
            return False
        float(result.sums["nll"])  # wait for the GPU
        self.seconds.append(time.perf_counter() - started)
        self.results.append(result)
        return True

    def figures(self, warmup: int) -> dict[str, float]:
        """Figures of the steps after the first `warmup`."""
        results, seconds = self.results[warmup:], self.seconds[warmup:]

        def total(name: str) -> float:
            return float(sum(float(result.sums[name]) for result in results))

        return {
            "padding": 1 - total("tokens") / total("attended"),
            "supervised_tokens_per_second": total("supervised") / sum(seconds),
            "tokens_per_second": total("tokens") / sum(seconds),
            "median_step_s": statistics.median(seconds),
            "loss_per_token": total("nll") / total("supervised"),
        }


def synthetic_rows(rows: int, config: PretrainInstructConfig, vocabulary: int) -> list[Example]:
    """Rows of random ids with realistic lengths, cut at `seq_len`."""
    lengths = np.random.default_rng(config.seed).gamma(2.0, _MEAN_IDS / 2, rows).astype(int)
    lengths = np.clip(lengths, 8, config.dataset.seq_len)
    return [synthetic_example(config.seed, index, int(length), vocabulary) for index, length in enumerate(lengths)]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the layouts in turns."""
    overrides = [*arguments.overrides, f"seed={arguments.seed}"]
    overrides += [f"arch.forward_dtype={arguments.dtype}"] if arguments.dtype else []
    config = compose_config("cfg_pretrain_instruct", overrides)
    config = config.model_copy(update={"arch": resolve_arch(config.arch, pick_device(config.device))})
    examples: Examples
    if arguments.from_data:
        tokenizer = Tokenizer(resolve_tokenizer_path(config.dataset.tokenizer_path))
        examples, vocabulary = open_run_data(config, tokenizer, Template()).train, tokenizer.vocab_size
    else:
        vocabulary = arguments.vocabulary
        examples = synthetic_rows(arguments.rows, config, vocabulary)
    layouts = {packing: Layout(config, packing, examples, vocabulary) for packing in arguments.compared}
    for turn in range(arguments.warmup + arguments.repeats):
        going_on = [layout.step() for layout in layouts.values()]
        if not all(going_on):
            print(f"all rows are trained after {turn} steps", flush=True)
            break
    if len(layouts[arguments.compared[0]].results) <= arguments.warmup:
        raise UsageError("no step is left to time: give more --rows, or fewer --warmup steps")
    figures = {packing: layout.figures(arguments.warmup) for packing, layout in layouts.items()}
    first = figures[arguments.compared[0]]["supervised_tokens_per_second"]
    for packing, found in figures.items():
        found["ratio"] = found["supervised_tokens_per_second"] / first
        print(
            f"{packing:9} {found['padding']:6.1%} padding {found['supervised_tokens_per_second']:10,.0f} supervised tokens/s "
            f"{found['ratio']:5.2f} x   loss {found['loss_per_token']:.5f}",
            flush=True,
        )
    return {
        "layouts": figures,
        "rows": len(examples),
        "steps": len(layouts[arguments.compared[0]].results) - arguments.warmup,
        "seq_len": config.dataset.seq_len,
        "batch": config.global_batch_size,
        "attention": config.arch.attention,
        "dtype": config.arch.forward_dtype,
        "device": pick_device(config.device).type,
        "threads": use_threads(arguments.threads),
        "torch": torch.__version__,
    }


def main() -> None:
    """Parse, compare, print."""
    flags = parser(__doc__)
    flags.set_defaults(repeats=20)
    flags.add_argument("--rows", type=int, default=4000, help="rows to make")
    flags.add_argument("--from-data", action="store_true", help="train on the run's data set instead, as the overrides say")
    flags.add_argument("--warmup", type=int, default=3, help="steps of each layout before its timed ones")
    flags.add_argument("--compared", nargs="+", choices=get_args(Packing), default=get_args(Packing), help="the first is the base")
    arguments = flags.parse_args()
    use_threads(arguments.threads)
    keep_freed_memory()
    print(json.dumps(compare(arguments)))


if __name__ == "__main__":
    with one_clear_message():
        main()
