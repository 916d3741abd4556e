"""What a dry run says, against what a run does: parameters, bytes and FLOPs counted on tiny models, steps by training."""

import itertools
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
@pytest.mark.parametrize("grad_calls", ["null", "2"])
def test_flops_are_those_that_torch_counts(tiny_config: ConfigFactory, backprop: str, again: str, grad_calls: str) -> None:
    arch = tiny_config(
        f"arch.halt.backprop={backprop}", f"arch.activation_checkpointing={again}", f"arch.grad_calls={grad_calls}"
    ).arch
    model = RecursiveModel(arch, VOCABULARY)
    ids = torch.zeros(ROWS, POSITIONS, dtype=torch.int64)
    # Only the plain kernel's products are counted on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, output = model.act_step(
            model.initial_states(ROWS, POSITIONS), model.embed(ids), model.rotary(torch.arange(POSITIONS)), model.mask(ids)
        )
        halting = model.halt_logits(output if arch.halt.backprop else output.detach())[..., 0].flatten()
        flat = output.flatten(0, 1)
        token_loss(flat, model.lm_head.weight, halting, ids.flatten(), torch.ones_like(halting), arch.loss).total.backward()
    tokens = ROWS * POSITIONS
    flops = act_step_flops(model, POSITIONS)
    assert tokens * (flops.per_position + flops.per_halting + flops.per_label) == counter.get_total_flops()


@pytest.mark.parametrize("tied", ["true", "false"])
def test_parameters_are_the_original_layers_weights(tiny_config: ConfigFactory, tied: str) -> None:
    model = RecursiveModel(tiny_config(f"arch.tie_embeddings={tied}").arch, VOCABULARY)
    block = 3 * 16 * 16 + 16 * 16 + 2 * 256 * 16 + 256 * 16
    vocabulary = VOCABULARY * 16 * (1 if tied == "true" else 2)
    assert count_parameters(model) == 2 * block + vocabulary + 2 * 16 + 2


@pytest.mark.parametrize(
    "settings",
    [(), ("arch.attention=prefix", "micro_batch_size=3"), ("arch.activation_checkpointing=true", "ema=true")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_full_slots(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, settings: tuple[str, ...], dtype: str
) -> None:
    config = tiny_config(f"arch.forward_dtype={dtype}", "global_batch_size=5", *settings)
    model, task = make_task(config, random_examples(8))
    kept = (task.carry.inputs_BT, *task.carry.states)
    memory = estimate_memory(config, model, kept, config.dataset.seq_len)
    parameters = 4 * count_parameters(model)
    assert (memory.gradients, memory.optimizer) == (parameters, 2 * parameters)
    assert memory.average == (parameters if config.ema else 0) and memory.weights > parameters
    assert memory.activations == pytest.approx(saved_bytes(model, config.micro_batch_size or 5, config.dataset.seq_len), rel=0.01)
    assert memory.carry == sum(state.nbytes for state in task.carry.states) + task.carry.inputs_BT.nbytes
    assert memory.total == sum(vars(memory).values())


def test_activations_computed_again_are_an_eighth_or_less(tiny_config: ConfigFactory) -> None:
    kept, again = (
        saved_bytes(RecursiveModel(tiny_config(f"arch.activation_checkpointing={value}").arch, VOCABULARY), 2, 32)
        for value in ("false", "true")
    )
    assert 0 < again < kept / 8


@pytest.mark.parametrize(
    "settings",
    [
        ("arch.halt.mode=fixed",),
        ("arch.halt.depth_floor=0.25", "arch.halt.deepen_at=0.4", "epochs=2"),
        ("arch.halt.depth_floor=0.25", "act_steps_per_update=3"),
    ],
)
def test_steps_are_those_of_the_run(tiny_config: ConfigFactory, random_examples: ExampleFactory, settings: tuple[str, ...]) -> None:
    config, examples = tiny_config(*settings), random_examples(21)
    model, task = make_task(config, examples)
    results = list(Trainer(config, model, task).steps())
    counted = count_steps(config, config.arch.halt, passes(config, 21))
    assert counted.optimizer_steps == len(results)
    assert counted.act_steps == sum(sum(result.finished_depths) for result in results)


def test_steps_up_to_a_limit_are_those_of_the_run(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.stopping._LEAST_TRAINED_BETWEEN", 1)
    config, examples = tiny_config("max_steps=9", "arch.halt.depth_floor=0.25", "arch.halt.deepen_at=0.4"), random_examples(60)
    model, task = make_task(config, examples)
    results = list(itertools.islice(Trainer(config, model, task).steps(), 9))
    counted = count_steps(config, config.arch.halt, passes(config, 60), evaluation_rows=1)
    assert (counted.optimizer_steps, counted.examples) == (9, task.slots.admitted)
    halted = sum(sum(result.finished_depths) for result in results)
    assert counted.act_steps == halted + task.slots.act_step[task.slots.active].sum()
    assert counted.evaluations == 36 // 8


def test_a_settled_run_lies_between_its_bounds(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    config, examples = tiny_config("arch.halt.mode=settled", "arch.halt.depth_floor=0.25"), random_examples(21)
    model, task = make_task(config, examples)
    taken = len(list(Trainer(config, model, task).steps()))
    halt = config.arch.halt
    least, most = (
        count_steps(config, halt.model_copy(update={"mode": mode}), passes(config, 21)).optimizer_steps
        for mode in ("settled", "fixed")
    )
    assert least <= taken <= most and least < most


def test_a_dry_run_says_it_all_and_what_it_measured(
    tiny_config: ConfigFactory,
    random_examples: ExampleFactory,
    text_dataset: Callable[..., TextDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, examples = tiny_config("arch.halt.mode=fixed"), random_examples(40)
    held_out = TextCorpus({"rows": text_dataset([{"question": f"What is {i}?", "answer": f"{i}"} for i in range(3)])})
    data = RunData(examples, held_out, passes(config, len(examples)))  # type: ignore[arg-type]
    said: list[str] = []
    dry_run_instruct(config, *make_task(config, examples), data, said.append)
    text = "\n".join(said)
    lengths = np.array([len(example.ids) - 1 for example in examples])
    assert "optimizer steps   40, 4.00 ACT steps a row" in text
    assert "evaluations       1, each of 3 held-out rows" in text
    assert f"tokens a row      {lengths.mean():.1f}" in text
    assert "measured on 3 steps after a first one" in text and "peak_rss_bytes" in text
    monkeypatch.setattr("training.estimate.memory_in_all", lambda device: 10**5)
    said.clear()
    dry_run_instruct(config, *make_task(config, examples), data, said.append)
    assert "not measured: the memory would not suffice" in "\n".join(said)
    # No row is through by then: each has had one of its four.
    said.clear()
    config = tiny_config("arch.halt.mode=fixed", "max_steps=1")
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
    memory = estimate_memory(config, model, tuple(task.carry.tensors().values()), TOKENS)
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
