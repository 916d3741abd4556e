"""What a dry run says, against what a run does: parameters, bytes and FLOPs counted on tiny models, steps by training."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config.compose import compose_as
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig
from dataset.instruct import RunData
from dataset.puzzles.loader import PuzzleData
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example, ExampleStream, TextCorpus, TextDataset
from models.act import RecursiveModel
from models.losses import token_loss
from tests.puzzle_data import TINY_PUZZLES, write_puzzles
from training.estimate import (
    act_step_flops,
    count_parameters,
    count_steps,
    dry_run_instruct,
    dry_run_puzzles,
    estimate_memory,
    saved_bytes,
)
from training.loop import Trainer
from training.puzzle import PuzzleTask
from training.text import TextTask

ConfigFactory = Callable[..., PretrainInstructConfig]
ExampleFactory = Callable[..., list[Example]]
VOCABULARY, ROWS, POSITIONS = 48, 2, 64


def make_task(config: PretrainInstructConfig, examples: Any) -> tuple[RecursiveModel, TextTask]:
    model, curriculum = RecursiveModel(config.arch, VOCABULARY), passes(config, len(examples))
    return model, TextTask(config, model, ExampleStream(examples, curriculum, 0), curriculum)


def passes(config: PretrainInstructConfig, rows: int) -> Curriculum:
    return Curriculum.of_epochs(rows, config.seed, config.epochs)


@pytest.mark.parametrize("backprop", ["true", "false"])
@pytest.mark.parametrize("again", ["true", "false"])
@pytest.mark.parametrize("grad_calls", ["null", "2", "8"])
def test_flops_are_those_that_torch_counts(tiny_config: ConfigFactory, backprop: str, again: str, grad_calls: str) -> None:
    """Of two ACT steps, the gradient of 8 calls beginning in the first."""
    arch = tiny_config(
        f"arch.halt.backprop={backprop}", f"arch.activation_checkpointing={again}", f"arch.grad_calls={grad_calls}"
    ).arch
    model = RecursiveModel(arch, VOCABULARY)
    ids = torch.zeros(ROWS, POSITIONS, dtype=torch.int64)
    # Only the plain kernel's products are counted on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        steps = model.act_steps(model.embed(ids), model.rotary(torch.arange(POSITIONS)), model.mask(ids), 2)
        output = torch.cat([output.flatten(0, 1) for output in steps])
        halting = model.halt_logits(output if arch.halt.backprop else output.detach())[:, 0]
        labels = ids.flatten().repeat(2)
        token_loss(output, model.lm_head.weight, halting, labels, torch.ones_like(halting), arch.loss).total.backward()
    flops = [act_step_flops(model, POSITIONS, calls) for calls in model.grad_calls_by_step(2)]
    assert ROWS * POSITIONS * sum(map(sum, flops)) == counter.get_total_flops()


@pytest.mark.parametrize("tied", ["true", "false"])
def test_parameters_are_the_original_layers_weights(tiny_config: ConfigFactory, tied: str) -> None:
    model = RecursiveModel(tiny_config(f"arch.tie_embeddings={tied}").arch, VOCABULARY)
    block = 3 * 16 * 16 + 16 * 16 + 2 * 256 * 16 + 256 * 16
    vocabulary = VOCABULARY * 16 * (1 if tied == "true" else 2)
    assert count_parameters(model) == 2 * block + vocabulary + 2 * 16 + 2


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("arch.attention=prefix", "micro_batch_size=3"),
        ("arch.activation_checkpointing=true", "ema=true"),
        ("optimizer=muon",),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_a_whole_step(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, settings: tuple[str, ...], dtype: str
) -> None:
    config = tiny_config(f"arch.forward_dtype={dtype}", *settings)
    model, _ = make_task(config, random_examples(8))
    memory, shallow = (estimate_memory(config, model, 5, config.dataset.seq_len, act_steps) for act_steps in (4, 1))
    parameters = 4 * count_parameters(model)
    muon = 4 * count_parameters(model.get_submodule("L_level")) if config.optimizer == "muon" else 0
    assert (memory.gradients, memory.optimizer) == (parameters, 2 * parameters - muon)
    assert memory.average == (parameters if config.ema else 0) and memory.weights > parameters
    at_once = config.micro_batch_size or 5
    assert memory.activations == pytest.approx(saved_bytes(model, at_once, config.dataset.seq_len, 4), rel=0.01)
    # Three further ACT steps, each with its outputs twice and their gradient.
    assert memory.loss - shallow.loss == 3 * 3 * at_once * config.dataset.seq_len * 16 * model.dtype.itemsize
    assert memory.carry == 0 and memory.total == sum(vars(memory).values())


@pytest.mark.parametrize("again", ["true", "false"])
def test_activations_are_those_of_the_level_calls_with_gradient(tiny_config: ConfigFactory, again: str) -> None:
    """Of four ACT steps of six level calls."""

    def saved(grad_calls: object, act_steps: int) -> int:
        arch = tiny_config(f"arch.grad_calls={grad_calls}", f"arch.activation_checkpointing={again}").arch
        return saved_bytes(RecursiveModel(arch, VOCABULARY), 2, 32, act_steps)

    # What is saved once, for one of the calls, and what each further one adds.
    each = saved(6, 4) - saved(5, 4)
    assert saved(24, 4) - saved(6, 4) == pytest.approx(18 * each, rel=0.1)
    assert saved(6, 4) == saved(6, 1)
    assert saved("null", 4) == pytest.approx(saved(12, 4), rel=0.1)


def test_activations_computed_again_are_an_eighth_or_less(tiny_config: ConfigFactory) -> None:
    kept, again = (
        saved_bytes(RecursiveModel(tiny_config(f"arch.activation_checkpointing={value}").arch, VOCABULARY), 2, 32)
        for value in ("false", "true")
    )
    assert 0 < again < kept / 8


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ((), 2),
        # Each fifth of 42 rows, and the end of an epoch.
        (("act_steps=growing", "epochs=2"), 6),
        (("act_steps=drawn", "epochs=2"), 6),
        (("act_steps=growing", "epochs=3", "max_steps=9"), 5),
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
    assert counted.rows_by_depth == Counter(depth for result in results for depth in result.finished_depths)
    assert counted.evaluations == evaluations


def test_a_dry_run_says_it_all_and_what_it_measured(
    tiny_config: ConfigFactory,
    random_examples: ExampleFactory,
    text_dataset: Callable[..., TextDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, examples = tiny_config("loss_discount=0"), random_examples(40)
    held_out = TextCorpus({"rows": text_dataset([{"question": f"What is {i}?", "answer": f"{i}"} for i in range(3)])})
    data = RunData(examples, held_out, passes(config, len(examples)))  # type: ignore[arg-type]
    said: list[str] = []
    dry_run_instruct(config, *make_task(config, examples), data, said.append)
    text = "\n".join(said)
    lengths = np.array([len(example.ids) - 1 for example in examples])
    assert "optimizer steps   10, 4.00 ACT steps a row" in text
    assert "evaluations       1, each of 3 held-out rows" in text
    assert f"tokens a row      {lengths.mean():.1f}" in text
    assert "measured on 3 steps after a first one" in text and "peak_rss_bytes" in text
    monkeypatch.setattr("training.estimate.memory_in_all", lambda device: 10**5)
    said.clear()
    dry_run_instruct(config, *make_task(config, examples), data, said.append)
    assert "not measured: the memory would not suffice" in "\n".join(said)
    said.clear()
    config = tiny_config("act_steps=growing", "max_steps=1")
    dry_run_instruct(config, *make_task(config, examples), data, said.append)
    assert "optimizer steps   1, 1.00 ACT steps a row" in said


# Puzzles: 16 tokens behind 2 positions of a vector, 4 rows, which makes a chunk of the vocabulary head whole.
TOKENS = 16
PUZZLES = {
    "attention": (),
    "mlp_t": ("arch.mlp_t=true", "arch.pos_encodings=none"),
    "continue": ("arch=hrm", "arch.H_layers=1", "arch.activation_checkpointing=true"),
    "frozen": ("freeze_weights=true", "arch.halt.backprop=false"),
    "no_vectors": ("arch.puzzle_emb_ndim=0", "arch.puzzle_emb_len=0", "micro_batch_size=2", "ema=true"),
}


@pytest.fixture(params=PUZZLES)
def puzzles(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PretrainPuzzleConfig, RecursiveModel, PuzzleTask]:
    path = write_puzzles(tmp_path / "puzzles", tokens=TOKENS)
    config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", [f"data_paths=[{path}]", *TINY_PUZZLES, *PUZZLES[request.param]])
    data = PuzzleData(config.data_paths, "train")
    meta = data.metadata
    model = RecursiveModel(config.arch, meta.vocab_size, seq_len=TOKENS, puzzles=meta.num_puzzle_identifiers)
    model.requires_grad_(not config.freeze_weights)
    return config, model, PuzzleTask(config, model, data)


def test_flops_of_puzzles_are_those_that_a_step_takes(puzzles: tuple[PretrainPuzzleConfig, RecursiveModel, PuzzleTask]) -> None:
    config, model, task = puzzles
    flops = act_step_flops(model, model.prefix_len + TOKENS)
    a_row = (model.prefix_len + TOKENS) * flops.per_position + flops.per_halting + TOKENS * flops.per_label
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next(iter(Trainer(config, model, task).steps()))
    # Of a micro-batch half a chunk is filled up with tokens that are none.
    filled = 0 if config.micro_batch_size is None else TOKENS * flops.per_label * config.global_batch_size
    assert counter.get_total_flops() == config.global_batch_size * a_row + filled


def test_memory_of_puzzles_counts_vectors_apart_and_frozen_weights_once(
    puzzles: tuple[PretrainPuzzleConfig, RecursiveModel, PuzzleTask],
) -> None:
    config, model, task = puzzles
    memory = estimate_memory(config, model, 4, TOKENS, carry=tuple(task.carry.tensors().values()))
    parameters = 8 * count_parameters(model)
    learning = 0 if config.freeze_weights else parameters
    assert (memory.gradients, memory.optimizer) == (learning, 2 * learning)
    assert memory.average == (parameters if config.ema else 0)
    # 12 groups and the blank one.
    assert memory.puzzle_vectors == (8 * 13 * 16 if config.arch.puzzle_emb_ndim else 0)
    others = sum(buffer.nbytes for name, buffer in model.named_buffers() if "puzzle_emb" not in name)
    assert memory.weights == parameters + others
    at_once = config.micro_batch_size or config.global_batch_size
    assert memory.activations == pytest.approx(saved_bytes(model, at_once, TOKENS), rel=0.01)
    # No looked-up vector is left behind for the first step.
    assert model.puzzle_emb is None or not model.puzzle_emb._looked_up


def test_a_dry_run_of_puzzles_ends_at_max_steps(tmp_path: Path) -> None:
    path = write_puzzles(tmp_path / "puzzles", tokens=TOKENS)
    config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", [f"data_paths=[{path}]", *TINY_PUZZLES, "max_steps=5"])
    data = PuzzleData(config.data_paths, "train")
    model = RecursiveModel(config.arch, data.metadata.vocab_size, seq_len=TOKENS, puzzles=data.metadata.num_puzzle_identifiers)
    said: list[str] = []
    dry_run_puzzles(config, model, PuzzleTask(config, model, data), said.append)
    assert "optimizer steps   5 at most, each an ACT step of 4 rows" in said


def test_a_dry_run_of_puzzles_says_it_all(puzzles: tuple[PretrainPuzzleConfig, RecursiveModel, PuzzleTask]) -> None:
    config, model, task = puzzles
    said: list[str] = []
    dry_run_puzzles(config, model, task, said.append)
    text = "\n".join(said)
    assert f"parameters        {count_parameters(model):,}: " in text
    assert ("puzzle vectors    208: 13 of 16 channels" in text) == (model.puzzle_emb is not None)
    assert f"optimizer steps   {task.total_steps} at most, each an ACT step of 4 rows" in text
    assert f"positions a row   {model.prefix_len + TOKENS}, 16 of them tokens" in text
    assert "FLOPs a position" in text and "measured on 3 steps after a first one" in text
