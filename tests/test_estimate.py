"""What a dry run says, against what a run does: parameters and FLOPs of tiny models, steps by training."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config.compose import compose_as
from config.errors import UsageError
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig
from dataset.instruct import RunData
from dataset.puzzles.loader import PuzzleData
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example, ExampleStream, TextCorpus, TextDataset
from models.act import RecursiveModel
from models.distributed import Ranks
from tests.puzzle_data import TINY_PUZZLES, write_puzzles
from training.estimate import count_parameters, count_steps, dry_run_instruct, dry_run_puzzles, flops_per_token
from training.loop import Trainer
from training.progress import StepResult
from training.puzzle import PuzzleTask
from training.text import TextTask

ConfigFactory = Callable[..., PretrainInstructConfig]
ExampleFactory = Callable[..., list[Example]]
VOCABULARY = 48


def make_task(
    config: PretrainInstructConfig, examples: Any, model: RecursiveModel | None = None
) -> tuple[RecursiveModel, TextTask]:
    model, curriculum = model or RecursiveModel(config.arch, VOCABULARY), passes(config, len(examples))
    return model, TextTask(config, model, ExampleStream(examples, curriculum, 0), curriculum)


def passes(config: PretrainInstructConfig, rows: int) -> Curriculum:
    return Curriculum.of_epochs(rows, config.seed, config.epochs)


@pytest.mark.parametrize("grad_calls", ["null", "8"])
def test_flops_are_those_of_a_real_step(tiny_config: ConfigFactory, random_examples: ExampleFactory, grad_calls: str) -> None:
    config = tiny_config(f"arch.grad_calls={grad_calls}", "arch.activation_checkpointing=true")
    examples = random_examples(4)
    with torch.device("meta"):
        on_meta = RecursiveModel(config.arch, VOCABULARY)
    _, task = make_task(config, examples, on_meta)
    model, task_on_cpu = make_task(config, examples)
    # Only the plain kernel's products are counted on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = next(Trainer(config, model, task_on_cpu).steps())
    # The vocabulary head of a CPU takes a round number of tokens.
    assert flops_per_token(task) * int(result.sums["tokens"]) == counter.get_total_flops()


@pytest.mark.parametrize("tied", ["true", "false"])
def test_parameters_are_the_original_layers_weights(tiny_config: ConfigFactory, tied: str) -> None:
    model = RecursiveModel(tiny_config(f"arch.tie_embeddings={tied}").arch, VOCABULARY)
    block = 3 * 16 * 16 + 16 * 16 + 2 * 256 * 16 + 256 * 16
    vocabulary = VOCABULARY * 16 * (1 if tied == "true" else 2)
    assert count_parameters(model) == 2 * block + vocabulary + 2 * 16 + 2


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ((), 2),
        # Each fifth of 42 rows, and the end of an epoch.
        (("epochs=2",), 6),
        (("epochs=3", "max_steps=9"), 5),
    ],
)
def test_steps_are_those_of_the_run(
    tiny_config: ConfigFactory,
    random_examples: ExampleFactory,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    evaluations: int,
) -> None:
    monkeypatch.setattr("training.stopping._LEAST_TRAINED_BETWEEN", 1)
    config, examples = tiny_config(*settings), random_examples(21)
    model, task = make_task(config, examples)
    results = list(itertools.islice(Trainer(config, model, task).steps(), config.max_steps))
    counted = count_steps(config, passes(config, 21), evaluation_rows=1)
    assert counted.optimizer_steps == len(results)
    assert counted.rows == sum(int(result.sums["rows"]) for result in results)
    assert counted.evaluations == evaluations


@pytest.fixture
def dry_run(
    random_examples: ExampleFactory, text_dataset: Callable[..., TextDataset], capsys: pytest.CaptureFixture[str]
) -> Callable[[PretrainInstructConfig], str]:
    """What a dry run on 40 rows says."""

    def run(config: PretrainInstructConfig) -> str:
        examples = random_examples(40)
        held_out = TextCorpus({"rows": text_dataset([{"question": f"What is {i}?", "answer": f"{i}"} for i in range(3)])})
        data = RunData(examples, held_out, passes(config, len(examples)))  # type: ignore[arg-type]
        dry_run_instruct(config, RecursiveModel(config.arch, VOCABULARY), data, Ranks())
        return capsys.readouterr().out

    return run


def test_a_dry_run_says_it_all(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, dry_run: Callable[[PretrainInstructConfig], str]
) -> None:
    said = dry_run(tiny_config())
    lengths = [len(example.ids) - 1 for example in random_examples(40)]
    assert "optimizer steps   10, 4 ACT steps a row" in said
    assert "evaluations       1, each of 3 held-out rows" in said
    assert f"tokens a row      {np.mean(lengths):.1f} (mean of 40 rows)" in said
    assert re.search(r"memory            peak_rss \d+\.\d\d GB, measured; \d+\.\d\d GB in all", said)
    assert "measured on 3 steps" in said


def test_flops_of_a_run_follow_its_depths(tiny_config: ConfigFactory, dry_run: Callable[[PretrainInstructConfig], str]) -> None:
    def total(*settings: str) -> float:
        found = re.search(r"; (\S+) in the run", dry_run(tiny_config(*settings)))
        assert found is not None
        return float(found[1])

    deep, shallow = total(), total("arch.halt_max_steps=1", "max_steps=1")
    # Ten steps of four ACT steps, against one of one.
    assert deep == pytest.approx(40 * shallow, rel=0.02)


def test_the_expected_time_is_that_of_the_timed_steps(
    tiny_config: ConfigFactory, dry_run: Callable[[PretrainInstructConfig], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by 300 seconds from one step to the next."""
    tokens: list[int] = []

    class NotingTrainer(Trainer):
        def steps(self) -> Iterator[StepResult]:
            for result in super().steps():
                tokens.append(int(result.sums["tokens"]))
                yield result

    monkeypatch.setattr("training.estimate.Trainer", NotingTrainer)
    monkeypatch.setattr("training.estimate.time", SimpleNamespace(perf_counter=itertools.count(0, 300).__next__))
    said = dry_run(tiny_config())
    found = re.search(r"FLOPs a token +(\S+) in all its ACT steps; (\S+) in the run", said)
    expected = re.search(r"expected time +(\S+) h \((\S+) s\) of training at (\S+) FLOP/s", said)
    assert found is not None and expected is not None
    of_token, total = map(float, found.groups())
    hours, seconds, speed = (float(text.replace(",", "")) for text in expected.groups())
    # Tokens are counted once in each of four ACT steps.
    assert speed == pytest.approx(sum(tokens[-3:]) * of_token / 4 / 900, rel=0.01)
    assert seconds == pytest.approx(total / speed, rel=0.02) and hours == pytest.approx(seconds / 3600, abs=0.006)


def test_a_short_run_is_not_timed(tiny_config: ConfigFactory, dry_run: Callable[[PretrainInstructConfig], str]) -> None:
    said = dry_run(tiny_config("global_batch_size=40"))
    assert "optimizer steps   1, 4 ACT steps a row" in said
    assert "expected time     not measured: the run has too few steps" in said


def test_the_longest_rows_are_tried_and_a_gpu_they_do_not_fit_into_is_told(
    tiny_config: ConfigFactory,
    random_examples: ExampleFactory,
    dry_run: Callable[[PretrainInstructConfig], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Raises on the first step, which isn't the run's first."""
    tokens = 4 * sum(sorted(len(example.ids) - 1 for example in random_examples(40))[-4:])

    class FullTrainer(Trainer):
        def steps(self) -> Iterator[StepResult]:
            for result in super().steps():
                assert result.sums["tokens"] == tokens
                raise torch.OutOfMemoryError
            yield result

    monkeypatch.setattr("training.estimate.Trainer", FullTrainer)
    with pytest.raises(UsageError, match=r"doesn't fit into .* GB of cpu memory: lower micro_batch_size"):
        dry_run(tiny_config())


# Puzzles: 16 tokens behind 2 positions of a vector, 4 rows, which makes a chunk of the vocabulary head whole.
TOKENS = 16
PUZZLES = {
    "attention": (),
    "mlp_t": ("arch.mlp_t=true", "arch.pos_encodings=none"),
    "continue": ("arch=hrm", "arch.H_layers=1", "arch.activation_checkpointing=true"),
    "frozen": ("freeze_weights=true", "arch.halt.backprop=false"),
    "no_vectors": ("arch.puzzle_emb_ndim=0", "arch.puzzle_emb_len=0", "micro_batch_size=2", "ema=true"),
}
PuzzleRun = tuple[PretrainPuzzleConfig, RecursiveModel, PuzzleTask, PuzzleData]


@pytest.fixture
def puzzle_run(tmp_path: Path) -> Callable[..., PuzzleRun]:
    path = write_puzzles(tmp_path / "puzzles", tokens=TOKENS)

    def build(*settings: str) -> PuzzleRun:
        config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", [f"data_paths=[{path}]", *TINY_PUZZLES, *settings])
        data = PuzzleData(config.data_paths, "train")
        meta = data.metadata
        model = RecursiveModel(config.arch, meta.vocab_size, seq_len=TOKENS, puzzles=meta.num_puzzle_identifiers)
        model.requires_grad_(not config.freeze_weights)
        return config, model, PuzzleTask(config, model, data), data

    return build


@pytest.mark.parametrize("kind", PUZZLES)
def test_a_dry_run_of_puzzles_says_it_all(
    puzzle_run: Callable[..., PuzzleRun], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model, task, data = puzzle_run(*PUZZLES[kind])
    steps = task.total_steps
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next(Trainer(config, model, task).steps())
    flops = counter.get_total_flops() / (config.global_batch_size * TOKENS)
    config, model, task, data = puzzle_run(*PUZZLES[kind])
    dry_run_puzzles(config, model, task, data, Ranks())
    said = capsys.readouterr().out
    assert f"parameters        {count_parameters(model):,}: " in said
    assert ("puzzle vectors    208: 13 of 16 channels" in said) == (model.puzzle_emb is not None)
    assert f"optimizer steps   {steps} at most, each an ACT step of 4 rows" in said
    assert f"tokens a row      16, after {model.prefix_len} positions of its puzzle's vector" in said
    assert f"FLOPs a token     {flops:.3g} an ACT step; {steps * 4 * TOKENS * flops:.3g} in the run" in said
    assert "measured on 3 steps" in said


def test_a_dry_run_of_puzzles_ends_at_max_steps(puzzle_run: Callable[..., PuzzleRun], capsys: pytest.CaptureFixture[str]) -> None:
    config, model, task, data = puzzle_run("max_steps=5")
    dry_run_puzzles(config, model, task, data, Ranks())
    assert "optimizer steps   5 at most, each an ACT step of 4 rows" in capsys.readouterr().out
