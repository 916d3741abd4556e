"""The task of puzzles: a step is what the original's formulas say, rows for busy slots are lost, a run goes on where it stood."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config.compose import compose_as
from config.errors import UsageError
from config.schema import PretrainPuzzleConfig
from dataset.puzzles.loader import PuzzleData, TrainBatches
from models.act import RecursiveModel
from tests.puzzle_data import TINY_PUZZLES, TOKENS, write_puzzles
from training.loop import Trainer
from training.puzzle import PuzzleTask, exploration

Build = Callable[..., Trainer]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """`build("arch=hrm", ...)`: a trainer of a toy run whose halting head halts some rows and not others."""
    path = write_puzzles(tmp_path / "puzzles")

    def trainer(*overrides: str) -> Trainer:
        recursion = {"arch=hrm": ("arch.H_layers=1",), "arch=transformers_baseline": ("arch.L_layers=0", "arch.H_cycles=1")}
        own = [own for override in overrides for own in recursion.get(override, ())]
        if "arch=transformers_baseline" in overrides:
            own += ["arch.L_cycles=0", "arch.H_layers=2"]
        config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", [f"data_paths=[{path}]", *TINY_PUZZLES, *own, *overrides])
        data = PuzzleData(config.data_paths, "train")
        meta = data.metadata
        model = RecursiveModel(config.arch, meta.vocab_size, seq_len=meta.seq_len, puzzles=meta.num_puzzle_identifiers)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            model.q_head.weight.copy_(0.3 * torch.randn(model.q_head.weight.shape, generator=generator))
            model.q_head.bias.copy_(torch.tensor([1.0, 0.0]))
        if config.freeze_weights:
            model.requires_grad_(False)
        return Trainer(config, model, PuzzleTask(config, model, data))

    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=tolerance, msg=name)


def log_stablemax(logits: Tensor) -> Tensor:
    s = torch.where(logits < 0, 1 / (1 - logits), logits + 1)
    return (s / s.sum(dim=-1, keepdim=True)).log()


@pytest.mark.parametrize("arch", ["trm", "hrm", "transformers_baseline"])
def test_steps_are_what_the_formulas_say(build: Build, arch: str) -> None:
    """Seven steps, written down once more in a straight line: slots, loss, halting, both optimizers, both schedules."""
    trainer, other = build(f"arch={arch}"), build(f"arch={arch}")
    config, task, model = trainer.config, trainer.task, other.model
    assert isinstance(config, PretrainPuzzleConfig) and isinstance(task, PuzzleTask) and isinstance(model, RecursiveModel)
    data = PuzzleData(config.data_paths, "train")
    loader = TrainBatches(data, global_batch_size=4, seed=0, epochs_per_iteration=2)
    batches = [*loader.iteration(), *loader.iteration()]
    total = int(4 * data.metadata.total_groups * data.metadata.mean_puzzle_examples / 4)
    assert task.total_steps == total and len(batches) > 7

    P, N = model.prefix_len, config.arch.halt_max_steps
    rotary, attend = model.rotary(torch.arange(P + TOKENS)), model.row_attention(torch.zeros(1, P + TOKENS, dtype=torch.int64))
    inputs, labels, ids = torch.zeros(4, TOKENS).long(), torch.zeros(4, TOKENS).long(), torch.zeros(4).long()
    states = [torch.zeros(4, P + TOKENS, 16).double() for _ in model.recursion.initial_states]
    steps, is_free = [0] * 4, [True] * 4
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    depths = []
    for number, (result, batch) in enumerate(zip(trainer.steps(), batches, strict=False)):
        for row in range(4):
            if is_free[row]:
                inputs[row] = torch.from_numpy(batch.inputs[row])
                labels[row] = torch.from_numpy(batch.labels[row])
                ids[row] = int(batch.puzzle_identifiers[row])
                steps[row] = 0
                for state, name in zip(states, model.recursion.initial_states, strict=True):
                    state[row] = model.get_buffer(name)
        assert model.puzzle_emb is not None
        table = model.puzzle_emb.weights.requires_grad_(True)
        prefix = F.pad(table[ids], (0, P * 16 - 16)).view(4, P, 16)
        x = torch.cat((prefix, model.embed_tokens.embedding_weight[inputs]), dim=1) * math.sqrt(16)
        new_states, output = model.act_step(tuple(states), x, rotary, attend)
        q = output[:, 0] @ model.q_head.weight.T + model.q_head.bias
        with torch.no_grad():
            _, ahead = model.act_step(new_states, x, rotary, attend)
            next_q = ahead[:, 0] @ model.q_head.weight.T + model.q_head.bias
        log_p = log_stablemax(output[:, P:] @ model.lm_head.weight.T)
        minimum = exploration(0, number, 4, 0.1, N)
        loss = torch.zeros(()).double()
        finished = []
        for row in range(4):
            steps[row] += 1
            kept = labels[row] != -100
            right = bool((log_p[row].argmax(-1) == labels[row])[kept].all())
            loss = loss - log_p[row][kept].gather(1, labels[row][kept].unsqueeze(1)).mean()
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q[row, 0], torch.tensor(float(right)).double())
            if arch == "hrm":
                best = next_q[row, 0] if steps[row] == N else next_q[row].max()
                loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q[row, 1], best.sigmoid())
            says_halt = q[row, 0] > (0 if arch == "trm" else q[row, 1])
            is_free[row] = bool(steps[row] == N or (says_halt and steps[row] >= minimum[row]))
            finished += [steps[row]] * is_free[row]
        states = [state.detach() for state in new_states]
        depths += finished
        carry = trainer.task.carry
        assert carry.steps_B[carry.halted_B].tolist() == finished

        model.zero_grad()
        table.grad = None
        (loss / 4).backward()
        t = number + 1
        factor = t / 3 if t < 3 else 0.1 + 0.45 * (1 + math.cos(math.pi * (t - 3) / (total - 3)))
        assert result.lr == pytest.approx(1e-2 * factor, abs=1e-15)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is None:
                    continue
                m, v = moments[name]
                p *= 1 - 1e-2 * factor * 0.1
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad**2, 0.05)
                p -= 1e-2 * factor / (1 - 0.9**t) * torch.atan2(m, (v / (1 - 0.95**t)).sqrt())
            for puzzle in set(ids.tolist()):
                table[puzzle] = table[puzzle] * (1 - 1e-2 * factor * 0.1) - 1e-2 * factor * table.grad[puzzle].sign()
        table.requires_grad_(False)
        assert_same(weights(trainer), weights(other), 1e-9)
        if t == 7:
            break
    assert len(set(depths)) > 1, "rows must leave at several depths, or halting isn't tested"


def test_rows_for_busy_slots_are_lost(build: Build) -> None:
    trainer = build("arch.halt_exploration_prob=0")
    task = trainer.task
    assert isinstance(task, PuzzleTask)
    list(task.next_batch(1).micro_batches)
    seen_busy = seen_free = False
    for step in range(2, 8):
        before, free = task.carry.inputs_BT.clone(), task.carry.halted_B.clone()
        batch = task._batch
        assert batch is not None
        micro_batches = task.next_batch(step).micro_batches
        entering = torch.from_numpy(batch.inputs).long()
        assert torch.equal(task.carry.inputs_BT, torch.where(free.unsqueeze(1), entering, before))
        assert torch.equal(task.carry.steps_B[free], torch.zeros(int(free.sum()), dtype=torch.int64))
        for state, initial in zip(task.carry.states, task.model.initial_states(1, 1), strict=True):
            assert torch.equal(state[free], initial.expand_as(state[free]))
        seen_busy, seen_free = seen_busy or not free.all(), seen_free or bool(free.any())
        list(micro_batches)
    assert seen_busy and seen_free


def test_exploration_is_drawn_anew_at_each_step_and_for_each_slot() -> None:
    drawn = np.stack([exploration(3, step, 64, 0.25, 5) for step in range(400)])
    assert (drawn > 0).mean() == pytest.approx(0.25, abs=0.01)
    values, counts = np.unique(drawn[drawn > 0], return_counts=True)
    assert values.tolist() == [2, 3, 4, 5]
    assert counts / counts.sum() == pytest.approx(0.25, abs=0.02)
    assert np.array_equal(drawn[7], exploration(3, 7, 64, 0.25, 5)) and not np.array_equal(drawn[7], drawn[8])
    assert exploration(3, 0, 4, 1.0, 1).tolist() == [1, 1, 1, 1], "a single step must always be enough"


def test_a_run_ends_with_the_schedule_or_the_data(build: Build) -> None:
    trainer = build()
    results = list(trainer.steps())
    assert trainer.task.done.examples == trainer.task.total.examples
    loader = TrainBatches(PuzzleData(trainer.config.data_paths, "train"), global_batch_size=4, seed=0, epochs_per_iteration=2)
    there_are = len([*loader.iteration(), *loader.iteration()])
    assert len(results) == min(there_are, trainer.task.total_steps)
    assert all(math.isfinite(result.grad_norm) for result in results)


@pytest.mark.parametrize(("stop", "settings"), [(1, ()), (5, ()), (5, ("optimizer=muon", "arch.mlp_t=true"))])
def test_a_run_goes_on_where_it_stood(build: Build, stop: int, settings: tuple[str, ...]) -> None:
    whole = build(*settings)
    for result in whole.steps():
        if result.step == stop:
            state, kept = whole.state(), weights(whole)
            state.tensors.update({name: value.clone() for name, value in state.tensors.items()})
    resumed = build(*settings)
    resumed.model.load_state_dict(kept)
    resumed.load_state(state)
    assert resumed.task.done.examples == 4 * stop
    steps = [result.step for result in resumed.steps()]
    assert steps[0] == stop + 1 and steps[-1] == whole.progress.step
    assert_same(weights(whole), weights(resumed))


def test_micro_batches_change_nothing(build: Build) -> None:
    whole, parts = build(), build("micro_batch_size=3")
    for _, (first, second) in zip(range(5), zip(whole.steps(), parts.steps(), strict=False), strict=False):
        assert torch.equal(whole.task.carry.halted_B, parts.task.carry.halted_B) and first.weight == second.weight == 4
        for name in ("lm_loss", "q_halt_loss", "exact_accuracy", "halted"):
            assert float(first.sums[name]) == pytest.approx(float(second.sums[name]), abs=1e-9)
    assert_same(weights(whole), weights(parts), 1e-8)


@pytest.mark.parametrize("optimizer", ["adam_atan2", "muon"])
def test_frozen_weights_leave_the_puzzles_vectors_to_learn(build: Build, optimizer: str) -> None:
    trainer = build("freeze_weights=true", "ema=true", f"optimizer={optimizer}")
    before = weights(trainer)
    list(trainer.steps())
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved == {"puzzle_emb.weights"}


def test_only_vectors_of_puzzles_in_the_batch_move(build: Build) -> None:
    trainer = build()
    task = trainer.task
    assert isinstance(task, PuzzleTask) and task.model.puzzle_emb is not None
    next(iter(trainer.steps()))
    moved = task.model.puzzle_emb.weights.abs().sum(dim=1).nonzero().flatten()
    assert set(moved.tolist()) == set(task.carry.puzzle_ids_B.tolist())


def test_what_is_logged_is_of_rows_that_halted(build: Build) -> None:
    trainer = build("arch.act_enabled=false")
    task = trainer.task
    reports = [(task.report({name: float(value) for name, value in r.sums.items()}), r) for r in trainer.steps()]
    first, third = reports[0][0], reports[2][0]
    assert first["halted_rows"] == 0 and "exact_accuracy" not in first and first["lm_loss"] > 0
    assert third["halted_rows"] == 4 and third["steps"] == 3 and 0 <= third["accuracy"] <= 1
    assert "q_continue_loss" not in third


def test_a_skipped_step_moves_no_vector_and_resets_states(build: Build) -> None:
    trainer = build()
    task = trainer.task
    assert isinstance(task, PuzzleTask)
    stream = trainer.steps()
    next(stream)
    before = weights(trainer)
    task.carry.states[0][1] = math.nan
    task.carry.halted_B[:] = False
    result = next(stream)
    assert result.skipped
    assert_same(before, weights(trainer))
    assert all(state.isfinite().all() for state in task.carry.states)
    assert not next(stream).skipped
    assert all(value.isfinite().all() for value in weights(trainer).values()), "nothing of the skipped step comes later"


def test_too_little_data_is_told(build: Build) -> None:
    with pytest.raises(UsageError, match="global_batch_size 400"):
        build("global_batch_size=400")


def test_the_schedule_ends_at_max_steps(build: Build) -> None:
    rates = [result.lr for result, _ in zip(build("max_steps=6").steps(), range(6), strict=False)]
    assert rates[2] == max(rates) == pytest.approx(1e-2) and rates[-1] == pytest.approx(1e-3)
