"""The training loop: nothing lost, exact gradients, exact resume, the same run however it is batched, and it learns."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from artifacts.checkpoint import Snapshot, TrainerState, load_weights, open_checkpoint, save_checkpoint
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.instruct import last_exchange
from dataset.text.conversation import Template
from dataset.text.curriculum import Curriculum, Stage
from dataset.text.loader import Example, ExampleStream, TextDataset
from dataset.text.tokenizer import Tokenizer
from evaluators.language import evaluate_language
from generation.engine import Engine, Prompt, Request
from generation.loading import make_responder
from models.act import RecursiveModel
from models.losses import log_probs
from training.distributed import Ranks
from training.loop import StepResult, Trainer
from training.text import TextTask

ConfigFactory = Callable[..., PretrainInstructConfig]
ExampleFactory = Callable[..., list[Example]]
VOCABULARY = 13
# A rate that moves no float: gradients and decisions of frozen weights.
FROZEN = ("lr=1e-300", "weight_decay=0")


def make_trainer(
    config: PretrainInstructConfig, examples: Any, *, vocab_size: int = VOCABULARY, start: int = 0, halt_scale: float = 0.5
) -> Trainer:
    model = RecursiveModel(config.arch, vocab_size, seed=config.seed)
    with torch.no_grad():
        model.q_head.weight.copy_(halt_scale * torch.randn(2, config.arch.hidden_size, generator=torch.Generator().manual_seed(1)))
    curriculum = Curriculum.of_epochs(len(examples), config.seed, config.epochs)
    stream = ExampleStream(examples, curriculum, config.dataloader_workers, start=start)
    return Trainer(config, model, TextTask(config, model, stream, curriculum))


def run(trainer: Trainer, steps: int | None = None) -> list[StepResult]:
    results = []
    for result in trainer.steps():
        results.append(result)
        if len(results) == steps:
            break
    return results


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def plain_gradients(
    model: RecursiveModel, rows: Sequence[Example], steps: int, loss: str, halting_backprop: bool
) -> tuple[dict[str, torch.Tensor], float, int]:
    """Gradients of the last of `steps` ACT steps, rows one by one and unpadded: (CE + 0.5 BCE) summed, divided by the tokens."""
    model.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        inputs, labels = torch.from_numpy(row.ids[:-1]).long()[None], torch.from_numpy(row.ids[1:]).long()
        supervised, segments = torch.from_numpy(row.supervised[1:]), torch.from_numpy(row.segment[:-1]).long()[None]
        states = model.initial_states(1, inputs.shape[1])
        for _ in range(steps):
            states = tuple(state.detach() for state in states)
            states, output = model.act_step(
                states, model.embed(inputs), model.rotary(torch.arange(inputs.shape[1])), model.mask(segments)
            )
        logp = log_probs(model.logits(output[0]), loss)[supervised]
        ce = -logp[torch.arange(len(logp)), labels[supervised]]
        halting = model.halt_logits(output[0] if halting_backprop else output[0].detach())[supervised, 0]
        right = (logp.argmax(-1) == labels[supervised]).double()
        bce = torch.nn.functional.softplus(halting) - right * halting
        total, count = total + ce.sum() + 0.5 * bce.sum(), count + len(ce)
    (total / count).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}, total.item(), count


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("loss", ["stablemax", "softmax"])
@pytest.mark.parametrize("backprop", ["true", "false"])
def test_gradients_are_the_sum_over_supervised_tokens_divided_by_their_number(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, attention: str, loss: str, backprop: str
) -> None:
    config = tiny_config(
        f"arch.attention={attention}", f"arch.loss={loss}", f"arch.halt.backprop={backprop}", "arch.halt.mode=fixed", *FROZEN
    )
    examples = random_examples(4)
    trainer = make_trainer(config, examples)
    *_, result = run(trainer, 3)
    assert result.sums["tokens"] == sum(len(e.ids) - 1 for e in examples)
    got = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    expected, total, count = plain_gradients(trainer.model, examples, 3, loss, backprop == "true")
    assert result.weight == count
    assert result.sums["nll"].item() + 0.5 * result.sums["halt_bce"].item() == pytest.approx(total, rel=1e-9)
    assert_same(got, expected, 1e-9)


def test_an_update_of_several_act_steps_sums_their_losses_over_all_their_tokens(
    tiny_config: ConfigFactory, random_examples: ExampleFactory
) -> None:
    settings = ("arch.halt_max_steps=2", "arch.halt.depth_floor=0.5", "act_steps_per_update=2", "global_batch_size=8")
    config = tiny_config(*settings, *FROZEN)
    examples = random_examples(8)
    trainer = make_trainer(config, examples)
    (result,) = run(trainer)
    assert len(result.finished_depths) == 8 and set(result.finished_depths) == {1, 2}, (
        "rows of both depths, all of them done in one update"
    )
    got = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    deep = [examples[i] for i, depth in zip(trainer.task.slots.example_id, trainer.task.slots.depth, strict=True) if depth == 2]
    first, first_loss, first_count = plain_gradients(trainer.model, examples, 1, config.arch.loss, False)
    second, second_loss, second_count = plain_gradients(trainer.model, deep, 2, config.arch.loss, False)
    count = first_count + second_count
    assert result.weight == count
    expected = {name: (first[name] * first_count + second[name] * second_count) / count for name in first}
    assert_same(got, expected, 1e-9)
    assert result.sums["nll"].item() + 0.5 * result.sums["halt_bce"].item() == pytest.approx(first_loss + second_loss, rel=1e-9)


def test_rows_enter_after_an_update_only(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    config = tiny_config("arch.halt_max_steps=3", "arch.halt.depth_floor=0.34", "act_steps_per_update=2", "global_batch_size=4")
    trainer = make_trainer(config, random_examples(24))
    finished: list[int] = []
    for result in trainer.steps():
        # Two ACT steps at most: what entered at depth 3 is still at work, all else has left, and nothing came in between.
        assert (trainer.task.slots.act_step[trainer.task.slots.active] == 2).all()
        finished += result.finished_depths
    assert len(finished) == 24 and set(finished) == {1, 2, 3}


@pytest.mark.parametrize("mode", ["sampled", "settled"])
def test_rows_in_parts_are_the_rows_at_once(tiny_config: ConfigFactory, random_examples: ExampleFactory, mode: str) -> None:
    outcomes = []
    for at_once in ("null", "3", "1"):
        config = tiny_config(
            "global_batch_size=8",
            f"micro_batch_size={at_once}",
            "act_steps_per_update=2",
            f"arch.halt.mode={mode}",
            "arch.halt.settled_share=0.5",
            "arch.halt.depth_floor=0.3",
            "arch.halt_max_steps=3",
            "arch.H_cycles=1",
            "arch.L_cycles=1",
            "grad_clip=0.1",
            "lr=1e-3",
        )
        trainer = make_trainer(config, random_examples(30))
        results = run(trainer)
        outcomes.append(
            (weights(trainer), [(r.weight, sorted(r.finished_depths)) for r in results], [r.grad_norm for r in results])
        )
    for other in outcomes[1:]:
        assert_same(outcomes[0][0], other[0], 1e-9)
        assert outcomes[0][1] == other[1] and outcomes[0][2] == pytest.approx(other[2], rel=1e-6)


def test_a_large_gradient_is_scaled_down_to_its_limit(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    def gradients(*overrides: str) -> tuple[dict[str, torch.Tensor], float]:
        trainer = make_trainer(tiny_config(*FROZEN, *overrides), random_examples(4))
        (result,) = run(trainer, 1)
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}, result.grad_norm

    free, norm = gradients()
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in free.values()]).norm()))
    for limit in (norm / 4, norm * 4):
        clipped, before = gradients(f"grad_clip={limit}")
        assert before == norm
        assert_same(clipped, {name: g * min(1.0, limit / norm) for name, g in free.items()}, 1e-12)


def test_a_row_that_is_not_finite_is_skipped_and_spoils_no_other(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = random_examples(24, vocab_size=VOCABULARY - 1)
    poisoned = examples[5]
    poisoned.ids[1] = VOCABULARY - 1  # an id that no other row has
    trainer = make_trainer(tiny_config("ema=true", "arch.halt.mode=fixed", "arch.halt_max_steps=3", "lr=1e-3"), examples)
    real = trainer.model.embed

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return torch.where((ids == VOCABULARY - 1).unsqueeze(-1), torch.nan, real(ids))

    monkeypatch.setattr(trainer.model, "embed", embed)
    before, finished = weights(trainer), 0
    for result in trainer.steps():
        now = weights(trainer)
        slots = trainer.task.slots
        assert result.skipped == (slots.example_id == 5).any(), "the rows that share the slots with it must wait three steps"
        assert result.skipped == all(torch.equal(value, before[name]) for name, value in now.items())
        assert all(bool(state.isfinite().all()) for state in trainer.task.carry.states)
        before, finished = now, finished + len(result.finished_depths)
    assert finished == 24 and all(bool(value.isfinite().all()) for value in before.values())
    assert trainer.ema is not None and all(bool(value.isfinite().all()) for value in trainer.ema.average.values())


def test_weights_that_are_not_finite_stop_the_run_at_the_limit(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    trainer = make_trainer(tiny_config("skip_limit=3"), random_examples(40))
    run(trainer, 2)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.inf
    before = weights(trainer)
    with pytest.raises(UsageError, match=r"no finite gradient in 3 steps in a row, up to step 5: lower lr, set grad_clip"):
        for result in trainer.steps():
            assert result.skipped
    assert_same(weights(trainer), before)
    assert trainer.skipped_in_a_row == 3 and trainer.step_number == 5


def test_collapsed_halting_is_told(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        "arch.halt.mode=settled",
        "arch.halt.settled_share=0.6",
        "arch.halt.depth_floor=0.2",
        "arch.halt_max_steps=6",
        "arch.L_layers=1",
        *FROZEN,
    )
    told = []
    # What is settled: everything, nothing, or what the weights happen to say.
    for share in (1.0, 0.0, None):
        trainer = make_trainer(config, random_examples(60), halt_scale=3.0)
        if share is not None:
            decide = trainer.task.slots.halted
            monkeypatch.setattr(trainer.task.slots, "halted", lambda s, d=decide, v=share: d(np.full_like(s, v)))
        run(trainer)
        told.append(trainer.task.warnings())
        assert trainer.task.warnings() == []
    assert "every row settles at the first ACT step it may leave at; raise arch.halt.settled_share=0.6" in told[0][0]
    assert "no row settles before ACT step 6; lower arch.halt.settled_share=0.6" in told[1][0]
    assert told[2] == []


def test_a_collapse_is_told_after_usual_halting_too(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        "arch.halt.mode=settled",
        "arch.halt.settled_share=0.6",
        "arch.halt.depth_floor=0.2",
        "arch.halt_max_steps=6",
        "arch.L_layers=1",
        *FROZEN,
    )
    trainer = make_trainer(config, random_examples(60), halt_scale=3.0)
    run(trainer, 25)
    assert trainer.task.warnings() == []
    decide = trainer.task.slots.halted
    monkeypatch.setattr(trainer.task.slots, "halted", lambda share: decide(np.zeros_like(share)))
    run(trainer)
    (told,) = trainer.task.warnings()
    assert "no row settles before ACT step 6" in told


def test_the_halting_loss_stops_at_its_head_unless_told_otherwise(
    tiny_config: ConfigFactory, random_examples: ExampleFactory
) -> None:
    reached = {}
    for backprop in ("false", "true"):
        gradients = []
        for scale in (0.0, 2.0):
            trainer = make_trainer(tiny_config(f"arch.halt.backprop={backprop}", *FROZEN), random_examples(4), halt_scale=scale)
            run(trainer, 1)
            gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
            assert gradients[-1]["q_head.weight"].abs().sum() > 0
        reached[backprop] = any(not torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0] if "q_head" not in n)
    assert reached == {"false": False, "true": True}


def test_a_step_with_nothing_supervised_is_no_nan_and_moves_nothing(
    tiny_config: ConfigFactory, random_examples: ExampleFactory
) -> None:
    silent = [Example(e.ids, np.zeros(len(e.ids), bool), e.segment, 0) for e in random_examples(4)]
    for mode in ("fixed", "settled"):
        trainer = make_trainer(tiny_config("weight_decay=0", f"arch.halt.mode={mode}"), silent)
        before = weights(trainer)
        results = run(trainer)
        assert len(results) > 0 and all(r.weight == 0 and float(r.sums["nll"] + r.sums["halt_bce"]) == 0.0 for r in results)
        assert_same(weights(trainer), before)


def test_a_row_with_nothing_supervised_changes_nothing(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    speaking = random_examples(3)
    silent = Example(speaking[0].ids, np.zeros(len(speaking[0].ids), bool), speaking[0].segment, 0)
    gradients = []
    for examples in (speaking, [*speaking, silent]):
        trainer = make_trainer(tiny_config("arch.halt.mode=fixed", *FROZEN), examples)
        run(trainer, 2)
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
    assert_same(*gradients, 1e-12)


def test_supervising_everything_trains_on_the_prompt_too(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    examples = random_examples(4)
    everything = run(make_trainer(tiny_config("dataset.supervise=all"), examples), 1)[0]
    answers = run(make_trainer(tiny_config(), examples), 1)[0]
    assert everything.weight == everything.sums["tokens"] == sum(len(e.ids) - 1 for e in examples)
    assert answers.weight == sum(int(e.supervised[1:].sum()) for e in examples) < everything.weight


def test_no_example_is_lost_with_long_and_short_halts(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        "global_batch_size=8", "epochs=2", "arch.H_cycles=1", "arch.L_cycles=1", "arch.L_layers=1", "arch.halt_max_steps=6"
    )
    examples = random_examples(256, longest=8)
    trainer = make_trainer(config, examples)
    slots, drawn, halted, trained = trainer.task.slots, Counter(), Counter(), Counter()
    real = slots.refill

    def refill(share_of_steps: float) -> Any:
        entries = real(share_of_steps)
        drawn.update((e.draw.epoch, e.draw.example_id) for e in entries)
        return entries

    def forced(settled_share: np.ndarray) -> np.ndarray:
        """A third of the examples leave at once, a third in the middle, a third as late as possible."""
        wanted = np.array([1, 3, 6])[slots.example_id % 3]
        leaves = slots.active & (slots.act_step + 1 >= wanted)
        trained.update(zip(slots.epoch[slots.active].tolist(), slots.example_id[slots.active].tolist(), strict=True))
        halted.update(zip(slots.epoch[leaves].tolist(), slots.example_id[leaves].tolist(), strict=True))
        return leaves

    monkeypatch.setattr(slots, "refill", refill)
    monkeypatch.setattr(slots, "halted", forced)
    depths = Counter(depth for result in run(trainer) for depth in result.finished_depths)
    everything = Counter((epoch, example) for epoch in range(2) for example in range(256))
    assert drawn == halted == everything
    assert trained == Counter({key: (1, 3, 6)[key[1] % 3] for key in everything})
    assert depths == {1: 2 * 86, 3: 2 * 85, 6: 2 * 85}
    assert trainer.task.slots.finished == trainer.task.total == 512


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("packing", ["off", "bucketed", "packed"])
def test_every_example_is_trained_once_an_epoch_across_a_restart(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, workers: int, packing: str
) -> None:
    small = ("arch.H_cycles=1", "arch.L_cycles=1", "arch.L_layers=1", "arch.halt.depth_floor=0.25")
    config = tiny_config("epochs=2", f"dataloader_workers={workers}", f"packing={packing}", *small)
    examples, halted = random_examples(30), Counter()

    def counted(trainer: Trainer, steps: int | None) -> None:
        slots, real = trainer.task.slots, trainer.task.slots.advance

        def advance(leaves: np.ndarray) -> None:
            halted.update(zip(slots.epoch[leaves].tolist(), slots.example_id[leaves].tolist(), strict=True))
            real(leaves)

        slots.advance = advance
        run(trainer, steps)

    killed = make_trainer(config, examples)
    counted(killed, 11)
    state = killed.state()
    assert 30 > sum(halted.values()) > 5 and killed.task.slots.busy
    resumed = make_trainer(config, examples, start=killed.task.slots.admitted)
    resumed.load_state(state)
    counted(resumed, None)
    assert halted == Counter((epoch, example) for epoch in range(2) for example in range(30))


@dataclass(frozen=True)
class Beside(Ranks):
    """Ranks that are threads of one process: each puts what it has on a board, and reads it once all have."""

    board: list[Any] = field(default_factory=list)
    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    @classmethod
    def of(cls, size: int) -> "list[Beside]":
        board, meeting = [None] * size, threading.Barrier(size, timeout=60)
        return [cls(rank, size, board, meeting) for rank in range(size)]

    def _shared(self, own: Any) -> list[Any]:
        self.board[self.rank] = own
        self.meeting.wait()
        everything = list(self.board)
        self.meeting.wait()
        return everything

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        everything = self._shared([tensor.clone() for tensor in tensors])
        for tensor, values in zip(tensors, zip(*everything, strict=True), strict=True):
            tensor.copy_(torch.stack(values).sum(dim=0))

    def gather(self, part: torch.Tensor, count: int) -> torch.Tensor:
        return torch.cat(self._shared(part.clone()))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_ranks_train_every_example_once_an_epoch_across_a_restart(
    tiny_config: ConfigFactory,
    random_examples: ExampleFactory,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    before: int,
    after: int,
) -> None:
    """Slots, streams and what ranks tell each other, without the network between."""
    config = tiny_config("epochs=2", "global_batch_size=5", "arch.halt.depth_floor=0.25", f"dataloader_workers={workers}")
    monkeypatch.setattr(TextTask, "_act_step", lambda task, working, settled_share: None)
    model, examples = RecursiveModel(config.arch, VOCABULARY, seed=0), random_examples(30)
    curriculum = Curriculum.of_epochs(30, config.seed, 2)
    halted: list[tuple[int, int]] = []

    def trained(task: TextTask, steps: int | None) -> TrainerState:
        slots, real = task.slots, task.slots.advance

        def advance(leaves: np.ndarray) -> None:
            halted.extend(zip(slots.epoch[leaves].tolist(), slots.example_id[leaves].tolist(), strict=True))
            real(leaves)

        slots.advance = advance
        task.admit(1)
        while task.busy and steps != 0:
            list(task.parts())
            steps = None if steps is None else steps - 1
            task.admit(1)
        return task.state()

    def together(size: int, state: TrainerState | None, steps: int | None) -> TrainerState:
        start = 0 if state is None else state.values["admitted"]
        with ExitStack() as closing, ThreadPoolExecutor(size) as threads:
            tasks = []
            for ranks in Beside.of(size):
                stream = closing.enter_context(ExampleStream(examples, curriculum, workers, start))
                tasks.append(TextTask(config, model, stream, curriculum, ranks))
                if state is not None:
                    tasks[-1].load_state(state)
            return list(threads.map(trained, tasks, [steps] * size))[-1]

    state = together(before, None, 11)
    assert 30 > len(halted) > 5 and state.tensors["slots.active"].all(), "rows at work over the restart"
    state = together(after, state, None)
    assert not state.tensors["slots.active"].any()
    assert Counter(halted) == Counter((epoch, example) for epoch in range(2) for example in range(30))


def staged(config: PretrainInstructConfig, examples: list[Example], curriculum: Curriculum, start: int = 0) -> Trainer:
    model = RecursiveModel(config.arch, VOCABULARY, seed=config.seed)
    stream = ExampleStream(examples, curriculum, config.dataloader_workers, start=start)
    return Trainer(config, model, TextTask(config, model, stream, curriculum))


def test_a_schedule_can_begin_anew_with_each_stage(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    curriculum = Curriculum(0, (8, 12), (Stage(1, (8, 0)), Stage(2, (0, 12))))
    settings = ("lr=0.5", "lr_min_ratio=0.2", "arch.halt.mode=fixed", "arch.halt_max_steps=1")
    rates = {
        schedule: [r.lr for r in run(staged(tiny_config(*settings, f"lr_schedule={schedule}"), random_examples(20), curriculum))]
        for schedule in ("run", "stage")
    }
    assert rates["run"] == sorted(rates["run"], reverse=True) and len(rates["run"]) == 8
    first, second = rates["stage"][:2], rates["stage"][2:]
    assert first[-1] == second[-1] == pytest.approx(0.1) and first == sorted(first, reverse=True)
    assert second == sorted(second, reverse=True) and second[0] > 0.4


def test_a_curriculum_killed_in_its_second_stage_goes_on_bit_for_bit(
    tiny_config: ConfigFactory, random_examples: ExampleFactory
) -> None:
    curriculum = Curriculum(0, (12, 9), (Stage(1, (12, 0)), Stage(1, (6, 18))))
    config, examples = tiny_config("lr=1e-3", "lr_schedule=stage", "packing=packed"), random_examples(21)
    whole = staged(config, examples, curriculum)
    run(whole)
    killed = staged(config, examples, curriculum)
    while killed.task.slots.finished < 16:
        run(killed, 1)
    assert set(killed.task.slots.stage.tolist()) == {1}
    resumed = staged(config, examples, curriculum, start=killed.task.slots.admitted)
    resumed.model.load_state_dict(killed.model.state_dict())
    resumed.load_state(killed.state())
    run(resumed)
    assert_same(weights(resumed), weights(whole))
    assert resumed.task.epochs_done == 2


def test_slots_hold_their_own_row_whatever_was_there_before(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    examples = random_examples(20)
    trainer = make_trainer(tiny_config("arch.halt.depth_floor=0.25"), examples)
    for _ in trainer.steps():
        carry, slots = trainer.task.carry, trainer.task.slots
        for slot in np.flatnonzero(slots.active).tolist():
            example = examples[int(slots.example_id[slot])]
            length = len(example.ids) - 1
            assert carry.lengths[slot] == length
            assert carry.inputs_BT[slot].tolist() == example.ids[:-1].tolist() + [0] * (carry.inputs_BT.shape[1] - length)
            assert carry.segments_BT[slot].tolist() == example.segment[:-1].tolist() + [0] * (carry.inputs_BT.shape[1] - length)
            labels = np.where(example.supervised[1:], example.ids[1:], -100).tolist()
            assert carry.labels_BT[slot].tolist() == labels + [-100] * (carry.inputs_BT.shape[1] - length)


def test_the_learning_rate_follows_admitted_examples(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    trainer = make_trainer(tiny_config("lr=0.5", "lr_min_ratio=0.2", "epochs=3", "arch.halt.mode=fixed"), random_examples(8))
    rates = [result.lr for result in run(trainer)]
    # 24 examples, 4 at a time, 4 steps each: the rate stands still while nothing is admitted.
    assert len(rates) == 24 and all(len(set(rates[i : i + 4])) == 1 for i in range(0, 24, 4))
    assert rates[0] == max(rates) > rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["run", "stage"])
def test_the_learning_rate_ends_at_max_steps(tiny_config: ConfigFactory, random_examples: ExampleFactory, schedule: str) -> None:
    """The limit is the end of the schedule, whatever data is left, and its warm-up is a tenth at most."""
    small = ("arch.H_cycles=1", "arch.L_cycles=1", "arch.L_layers=1", "arch.halt.depth_floor=0.25")
    settings = (*small, "lr=0.5", "lr_min_ratio=0.2", "epochs=9", f"lr_schedule={schedule}")
    config = tiny_config(*settings, "max_steps=20", "lr_warmup_steps=100")
    rates = [result.lr for result in run(make_trainer(config, random_examples(40)), 20)]
    peak = rates.index(max(rates))
    assert rates[-1] == pytest.approx(0.1) and 0.45 < rates[peak] <= 0.5 and peak <= 3
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    # A limit that the data never reaches changes nothing.
    far, none = (
        [result.lr for result in run(make_trainer(tiny_config(*settings, limit), random_examples(20)), 6)]
        for limit in ("max_steps=100000", "max_steps=null")
    )
    assert far == none


def test_the_learning_rate_of_a_stage_ends_with_the_run(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    curriculum = Curriculum(0, (8, 12), (Stage(1, (8, 0)), Stage(2, (0, 12))))
    settings = ("lr=0.5", "lr_min_ratio=0.2", "arch.halt.mode=fixed", "arch.halt_max_steps=1", "lr_schedule=stage", "max_steps=5")
    rates = [result.lr for result in run(staged(tiny_config(*settings), random_examples(20), curriculum), 5)]
    assert rates[1] == rates[-1] == pytest.approx(0.1), "the first stage ends by its examples, the second where the run does"
    assert rates[2] > rates[3] > rates[4]


@pytest.mark.parametrize("mode", ["fixed", "sampled"])
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_workers_padding_and_packing_change_no_weight(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, mode: str, attention: str
) -> None:
    examples, reference = random_examples(60, longest=14), None
    for pad, workers, packing in ((8, 0, "off"), (1, 0, "bucketed"), (5, 1, "packed"), (32, 3, "packed")):
        config = tiny_config(
            f"pad_multiple={pad}",
            f"packing={packing}",
            f"dataloader_workers={workers}",
            f"arch.attention={attention}",
            f"arch.halt.mode={mode}",
            "arch.halt.depth_floor=0.25",
            "arch.H_cycles=1",
            "arch.L_cycles=1",
            "lr=1e-3",
            "ema=true",
        )
        trainer = make_trainer(config, examples)
        finished = [result.finished_depths for result in run(trainer, 20)]
        assert trainer.ema is not None
        got = (weights(trainer), trainer.ema.average, finished, trainer.task.slots.example_id.tolist())
        if reference is None:
            reference = got
        else:
            assert_same(got[0], reference[0], 1e-6)
            assert_same(got[1], reference[1], 1e-6)
            assert got[2:] == reference[2:]
    start = weights(make_trainer(tiny_config("arch.H_cycles=1", "arch.L_cycles=1"), examples))
    assert not torch.allclose(reference[0]["lm_head.weight"], start["lm_head.weight"]), "the run must have learned something"


@pytest.mark.parametrize("mode", ["fixed", "sampled", "settled"])
def test_a_stopped_run_goes_on_bit_for_bit(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, tiny_tokenizer: Tokenizer, tmp_path: Path, mode: str
) -> None:
    config = tiny_config(
        f"arch.halt.mode={mode}",
        "arch.halt.settled_share=0.5",
        "arch.halt.depth_floor=0.2",
        "arch.forward_dtype=float32",
        "ema=true",
        "epochs=3",
        "lr=1e-3",
    )
    size = tiny_tokenizer.vocab_size
    examples = random_examples(11, vocab_size=size)
    undisturbed = make_trainer(config, examples, vocab_size=size)
    whole = run(undisturbed)
    stopped = make_trainer(config, examples, vocab_size=size)
    run(stopped, 7)
    assert stopped.task.slots.active.any() and stopped.task.slots.act_step.max() > 0
    assert stopped.ema is not None and undisturbed.ema is not None
    save_checkpoint(
        tmp_path / "step_7",
        Snapshot(step=7, weights=stopped.model.state_dict(), ema=stopped.ema.average, metrics={}, trainer=stopped.state()),
        config=config,
        tokenizer=tiny_tokenizer,
        template=Template(),
        data_hash="",
    )
    checkpoint = open_checkpoint(tmp_path / "step_7")
    state = checkpoint.trainer_state()
    # Another seed: whatever isn't restored would show.
    resumed = make_trainer(config, examples, vocab_size=size, start=state.values["admitted"], halt_scale=3.0)
    load_weights(resumed.model, checkpoint.weights(ema=False), tmp_path)
    resumed.load_state(state, checkpoint.weights(ema=True))
    assert resumed.ema is not None
    rest = run(resumed)
    assert [r.step for r in rest] == [r.step for r in whole[7:]] and len(rest) > 7
    for one, other in zip(rest, whole[7:], strict=True):
        assert (one.lr, one.weight, one.sums["tokens"]) == (other.lr, other.weight, other.sums["tokens"])
        assert one.finished_depths == other.finished_depths
        assert float(one.sums["nll"]) == float(other.sums["nll"]) and float(one.sums["halt_bce"]) == float(other.sums["halt_bce"])
    assert_same(weights(resumed), weights(undisturbed))
    assert_same(resumed.ema.average, undisturbed.ema.average)


def test_parameters_that_never_had_a_gradient_resume_too(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    # The last level call, z_H = f(z_H + z_L), doesn't see the input embedding.
    config, examples = tiny_config("arch.grad_calls=1", "lr=1e-3"), random_examples(10)
    undisturbed, stopped, resumed = (make_trainer(config, examples, start=s) for s in (0, 0, 0))
    run(undisturbed, 6)
    run(stopped, 2)
    state = stopped.state()
    resumed = make_trainer(config, examples, start=state.values["admitted"])
    resumed.model.load_state_dict(stopped.model.state_dict())
    resumed.load_state(state)
    run(resumed, 4)
    assert_same(weights(resumed), weights(undisturbed))


def test_the_average_follows_every_step(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    trainer = make_trainer(tiny_config("ema=true", "ema_rate=0.8", "lr=1e-2"), random_examples(8))
    assert trainer.ema is not None
    expected = {name: value.clone() for name, value in trainer.ema.average.items()}
    for _ in trainer.steps():
        for name, parameter in trainer.model.named_parameters():
            expected[name] = 0.8 * expected[name] + 0.2 * parameter.detach()
    assert_same(trainer.ema.average, expected, 1e-12)
    assert make_trainer(tiny_config(), random_examples(8)).ema is None


def test_settled_rows_leave_without_a_look_at_labels(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    config = tiny_config(
        "arch.halt.mode=settled",
        "arch.halt.settled_share=0.6",
        "arch.halt.depth_floor=0.25",
        "arch.halt_max_steps=6",
        "arch.L_layers=1",
        *FROZEN,
    )
    depths = []
    for shift in (0, 5):
        trainer = make_trainer(config, random_examples(60), halt_scale=3.0)
        left = []
        for result in trainer.steps():
            left.append(result.finished_depths)
            labels = trainer.task.carry.labels_BT
            # What is asked for changes at once, what the model sees doesn't.
            labels[labels >= 0] = (labels[labels >= 0] + shift) % VOCABULARY
        depths.append(left)
    assert depths[0] == depths[1]
    steps = Counter(depth for left in depths[0] for depth in left)
    assert len(steps) >= 3 and sum(steps.values()) == 60


@pytest.mark.parametrize("halt_scale", [0.0, 0.25], ids=["argmax only", "both"])
def test_settled_means_a_halting_probability_or_an_unchanged_argmax(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch, halt_scale: float
) -> None:
    examples = random_examples(4)
    trainer = make_trainer(
        tiny_config("arch.halt.mode=settled", "arch.halt.settled_probability=0.4", *FROZEN), examples, halt_scale=halt_scale
    )
    shares: list[np.ndarray] = []
    monkeypatch.setattr(trainer.task.slots, "halted", lambda share: shares.append(share.copy()) or np.zeros(4, bool))
    run(trainer, 6)
    assert any(0 < share < 1 for share in np.concatenate(shares)), "some tokens must settle, and some not"
    model, order = trainer.model, trainer.task.slots.example_id.tolist()
    for slot, example in enumerate(examples[i] for i in order):
        inputs, supervised = torch.from_numpy(example.ids[:-1]).long()[None], torch.from_numpy(example.supervised[1:])
        states, previous = model.initial_states(1, inputs.shape[1]), None
        for share in shares:
            with torch.no_grad():
                states, output = model.act_step(
                    states, model.embed(inputs), model.rotary(torch.arange(inputs.shape[1])), model.mask(torch.zeros_like(inputs))
                )
            argmax, halting = model.logits(output[0]).argmax(-1)[supervised], model.halt_logits(output[0])[supervised, 0]
            settled = halting.sigmoid() > 0.4
            if previous is not None:
                settled |= argmax == previous
            assert share[slot] == pytest.approx(settled.double().mean().item())
            previous = argmax


ROWS = [
    {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
    for q, a in [
        ("What is 1 plus 2?", "3, as 1 plus 2 gives 3."),
        ("What is 2 plus 1?", "3"),
        ("Red or blue?", "blue"),
        ("blue or Red?", "Red\nand then blue"),
        ("Say é.", "é 日本!"),
        ("Ask.", "What is it?"),
        ("What is 17 plus 18?", "35"),
    ]
] + [
    {
        "conversations": [
            {"from": "system", "value": "Be Red."},
            {"from": "human", "value": "What is 5 plus 6?"},
            {"from": "gpt", "value": "11"},
            {"from": "human", "value": "plus 1?"},
            {"from": "gpt", "value": "12 gives blue."},
        ]
    }
]


def test_eight_conversations_are_learned_by_heart_and_said_word_for_word(
    tiny_config: ConfigFactory, tiny_tokenizer: Tokenizer, text_dataset: Callable[..., TextDataset]
) -> None:
    dataset = text_dataset(ROWS)
    assert len(dataset) == 8
    config = tiny_config(
        "arch.forward_dtype=float32",
        "arch.hidden_size=64",
        "arch.num_heads=2",
        "arch.H_cycles=1",
        "arch.L_cycles=2",
        "arch.halt_max_steps=2",
        "arch.halt.depth_floor=0.5",
        "dataset.seq_len=128",
        "global_batch_size=8",
        "epochs=400",
        "lr=3e-3",
        "weight_decay=0",
    )
    trainer = make_trainer(config, dataset, vocab_size=tiny_tokenizer.vocab_size, halt_scale=0.0)
    accuracy: list[float] = []
    for result in trainer.steps():
        if result.step % 25 == 0:
            report = evaluate_language(trainer.model, dataset, eos_id=tiny_tokenizer.eos_id, batch_size=8, act_steps=2)
            accuracy = [sums.metrics()["exact_accuracy"] for sums in report.by_depth]
            if accuracy == [1.0, 1.0]:
                break
    assert accuracy == [1.0, 1.0], f"not learned after {trainer.step_number} steps"
    responder = make_responder(trainer.model, tiny_tokenizer, Template(), config)
    for act_steps in (1, 2):
        # The last: the first of two turns.
        conversations = [*(dataset.conversation(i) for i in range(8)), dataset.conversation(7)[:3]]
        exchanges = [exchange for conversation in conversations if (exchange := last_exchange(conversation)) is not None]
        assert [reference for _, reference in exchanges[-2:]] == ["12 gives blue.", "11"]
        answers = responder.at_depth(act_steps).answers([history for history, _ in exchanges])
        assert [answer.text for answer in answers] == [reference for _, reference in exchanges]
        for (history, _), answer in zip(exchanges, answers, strict=True):
            assert_decoded_as_recomputed(trainer.model, responder.at_depth(act_steps).prompt(history), answer.ids, act_steps)


def assert_decoded_as_recomputed(model: RecursiveModel, prompt: Prompt, answer: list[int], act_steps: int) -> None:
    """On trained float32 weights the ids are equal wherever the two best logits differ by more than the measured error."""
    engine = Engine(model, eos_id=-1, act_steps=act_steps, rows=1, positions=len(prompt.ids) + len(answer))
    engine.submit(Request(prompt, len(answer), top=model.vocab_size))
    tokens = []
    while engine.busy:
        tokens += engine.tick()
    ids = torch.tensor([[*prompt.ids, *answer[:-1]]])
    segments = torch.tensor([[*prompt.segment, *[0] * (len(answer) - 1)]])
    states = model.initial_states(*ids.shape)
    with torch.no_grad():
        for _ in range(act_steps):
            states, output = model.act_step(
                states, model.embed(ids), model.rotary(torch.arange(ids.shape[1])), model.mask(segments)
            )
        logp_TV = log_probs(model.logits(output[0, -len(answer) :]), model.config.loss)
    decoded_TV = torch.empty_like(logp_TV)
    for place, token in enumerate(tokens):
        found, values = zip(*token.candidates, strict=True)
        decoded_TV[place, list(found)] = torch.tensor(values)
    error = float((decoded_TV - logp_TV).abs().max())
    assert error < 1e-3
    best_T2 = logp_TV.topk(2).values
    is_clear = (best_T2[:, 0] - best_T2[:, 1] > 2 * error).tolist()
    assert any(is_clear)
    for place, expected in enumerate(logp_TV.argmax(-1).tolist()):
        assert tokens[place].id == expected or not is_clear[place]
