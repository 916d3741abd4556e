"""The training loop: nothing lost, exact gradients, exact resume, the same run however it is batched, and it learns."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from artifacts.checkpoint import Snapshot, TrainerState, open_checkpoint, read_saved_run, save_checkpoint
from artifacts.weights import load_weights
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
from models.distributed import Ranks
from models.losses import log_probs
from training.loop import Trainer
from training.progress import StepResult
from training.task import MicroBatch
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
    model: RecursiveModel, rows: Sequence[Example], steps: int, grad_calls: int | str | None
) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]], int]:
    """Gradients of an optimizer step of `steps` ACT steps: TRM's loop written out, rows one by one and unpadded.

    Beside them, CE and BCE of each ACT step summed over supervised tokens, and the number of these.
    """
    model.zero_grad()
    arch, stack = model.config, model.get_submodule("L_level")
    calls = arch.H_cycles * (arch.L_cycles + 1)
    total, count, sums = torch.zeros((), dtype=torch.float64), 0, np.zeros((steps, 2))
    for row in rows:
        inputs, labels = torch.from_numpy(row.ids[:-1]).long()[None], torch.from_numpy(row.ids[1:]).long()
        supervised, segments = torch.from_numpy(row.supervised[1:]), torch.from_numpy(row.segment[:-1]).long()[None]
        x, rotary, attend = model.embed(inputs), model.rotary(torch.arange(inputs.shape[1])), model.row_attention(segments)
        z_H, z_L = model.initial_states(1, inputs.shape[1])
        of_step = [number >= calls - (arch.L_cycles + 1) for number in range(calls)]
        last = grad_calls if isinstance(grad_calls, int) else steps * calls
        of_all = [number >= steps * calls - last for number in range(steps * calls)]
        carries = iter(of_step * steps if grad_calls is None else of_all)
        for step in range(steps):
            if grad_calls is None:
                z_H, z_L = z_H.detach(), z_L.detach()
            for _ in range(arch.H_cycles):
                for _ in range(arch.L_cycles):
                    z_L = stack(z_L + z_H + x, rotary, attend)
                    z_L = z_L if next(carries) else z_L.detach()
                z_H = stack(z_H + z_L, rotary, attend)
                z_H = z_H if next(carries) else z_H.detach()
            logp = log_probs(model.logits(z_H[0]), arch.loss)[supervised]
            ce = -logp[torch.arange(len(logp)), labels[supervised]].sum()
            halting = model.halt_logits(z_H[0] if arch.halt.backprop else z_H[0].detach())[supervised, 0]
            right = (logp.argmax(-1) == labels[supervised]).double()
            bce = (torch.nn.functional.softplus(halting) - right * halting).sum()
            total = total + (ce + 0.5 * bce) / steps
            sums[step] += ce.item(), bce.item()
        count += int(supervised.sum())
    (total / count).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return gradients, [(ce, bce) for ce, bce in sums.tolist()], count


def assert_step_is_plain(config: PretrainInstructConfig, examples: list[Example]) -> None:
    trainer = make_trainer(config, examples)
    (result,) = run(trainer)
    got = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trainer.model.named_parameters()}
    steps = config.arch.halt_max_steps
    expected, sums, count = plain_gradients(trainer.model, examples, steps, config.arch.grad_calls)
    assert_same(got, expected, 1e-9)
    assert result.weight == result.sums["supervised"] == count
    assert result.sums["tokens"] == steps * sum(len(e.ids) - 1 for e in examples)
    assert (float(result.sums["nll"]), float(result.sums["halt_bce"])) == pytest.approx(sums[-1], rel=1e-9)
    report = trainer.task.report({name: float(value) for name, value in result.sums.items()})
    assert report["loss_per_token"] == pytest.approx(sums[-1][0] / count)
    # A single ACT step is no first one.
    assert report.get("loss_first_step") == (pytest.approx(sums[0][0] / count) if steps > 1 else None)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("loss", ["stablemax", "softmax"])
@pytest.mark.parametrize("backprop", ["true", "false"])
def test_a_step_is_a_plain_loop_over_rows_and_act_steps(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, attention: str, loss: str, backprop: str
) -> None:
    settings = (f"arch.attention={attention}", f"arch.loss={loss}", f"arch.halt.backprop={backprop}")
    config = tiny_config(*settings, "arch.halt_max_steps=2", "arch.grad_calls=12", *FROZEN)
    assert_step_is_plain(config, random_examples(4))


# Two ACT steps of six level calls each.
@pytest.mark.parametrize("grad_calls", ["null", "all", 12, 11, 7, 6, 4, 1])
def test_gradient_runs_through_the_last_level_calls_of_all_act_steps(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, grad_calls: object
) -> None:
    settings = (f"arch.grad_calls={grad_calls}", "arch.halt_max_steps=2", "packing=bucketed")
    assert_step_is_plain(tiny_config(*settings, *FROZEN), random_examples(4))


@pytest.mark.parametrize("grad_calls", ["null", "all", 4])
def test_a_single_act_step_is_a_plain_loop_too(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, grad_calls: object
) -> None:
    assert_step_is_plain(tiny_config(f"arch.grad_calls={grad_calls}", "arch.halt_max_steps=1", *FROZEN), random_examples(4))


@pytest.mark.parametrize("grad_calls", ["null", 5])
def test_rows_in_parts_are_the_rows_at_once(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, grad_calls: object
) -> None:
    outcomes = []
    for at_once in ("null", "3", "1"):
        config = tiny_config(
            "global_batch_size=8",
            f"micro_batch_size={at_once}",
            f"arch.grad_calls={grad_calls}",
            "arch.halt_max_steps=3",
            "arch.H_cycles=1",
            "arch.L_cycles=1",
            "grad_clip=0.1",
            "lr=1e-3",
        )
        trainer = make_trainer(config, random_examples(30))
        results = run(trainer)
        outcomes.append((weights(trainer), [(r.weight, r.sums["rows"]) for r in results], [r.grad_norm for r in results]))
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


@pytest.mark.parametrize("optimizer", ["adam_atan2", "muon"])
def test_a_row_that_is_not_finite_costs_its_step_and_no_other(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    examples = random_examples(24, vocab_size=VOCABULARY - 1)
    examples[5].ids[1] = VOCABULARY - 1  # an id that no other row has
    trainer = make_trainer(tiny_config("ema=true", "arch.halt_max_steps=3", "lr=1e-3", f"optimizer={optimizer}"), examples)
    real = trainer.model.embed

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return torch.where((ids == VOCABULARY - 1).unsqueeze(-1), torch.nan, real(ids))

    monkeypatch.setattr(trainer.model, "embed", embed)
    before, finished, skipped = weights(trainer), 0, []
    for result in trainer.steps():
        now = weights(trainer)
        assert result.skipped == all(torch.equal(value, before[name]) for name, value in now.items())
        skipped.append(result.skipped)
        before, finished = now, finished + int(result.sums["rows"])
    order = [draw.example_id for draw in Curriculum.of_epochs(24, trainer.config.seed, 1).draws()]
    assert skipped == [step == order.index(5) // 4 for step in range(6)]
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
    assert trainer.progress.skipped_in_a_row == 3 and trainer.progress.step == 5


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
    trainer = make_trainer(tiny_config("weight_decay=0", "epochs=2"), silent)
    before = weights(trainer)
    results = run(trainer)
    assert len(results) == 2 and all(r.weight == 0 and float(r.sums["nll"] + r.sums["halt_bce"]) == 0.0 for r in results)
    assert_same(weights(trainer), before)


def test_a_row_with_nothing_supervised_changes_nothing(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    speaking = random_examples(3)
    silent = Example(speaking[0].ids, np.zeros(len(speaking[0].ids), bool), speaking[0].segment, 0)
    gradients = []
    for examples in (speaking, [*speaking, silent]):
        trainer = make_trainer(tiny_config(*FROZEN), examples)
        run(trainer)
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
    assert_same(*gradients, 1e-12)


def test_supervising_everything_trains_on_the_prompt_too(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    examples = random_examples(4)
    (everything,) = run(make_trainer(tiny_config("dataset.supervise=all"), examples))
    (answers,) = run(make_trainer(tiny_config(), examples))
    assert everything.weight == sum(len(e.ids) - 1 for e in examples)
    assert answers.weight == sum(int(e.supervised[1:].sum()) for e in examples) < everything.weight


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """The examples that tasks compute from here on, in order; nothing is computed of them."""
    found: list[Example] = []

    def remembered(task: TextTask, examples: Sequence[Example]) -> MicroBatch:
        found.extend(examples)
        loss = torch.stack([p.sum() for p in task.model.parameters()]).sum()
        return MicroBatch(loss, 1, {"tokens": 1, "rows": len(examples)})

    monkeypatch.setattr(TextTask, "_micro_batch", remembered)
    return found


def order_of(examples: list[Example], trained: list[Example]) -> list[int]:
    numbers = {id(example): number for number, example in enumerate(examples)}
    return [numbers[id(example)] for example in trained]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("at_once", ["null", 3])
def test_every_example_is_trained_once_an_epoch_across_a_restart(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, trained: list[Example], workers: int, at_once: object
) -> None:
    """In the run's order; batches flow over the end of an epoch, and the last one is smaller."""
    config = tiny_config("epochs=2", f"dataloader_workers={workers}", f"micro_batch_size={at_once}")
    examples = random_examples(31)
    killed = make_trainer(config, examples)
    assert [int(result.sums["rows"]) for result in run(killed, 11)] == [4] * 11
    resumed = make_trainer(config, examples, start=killed.task.admitted)
    resumed.load_state(killed.state())
    assert [int(result.sums["rows"]) for result in run(resumed)] == [4, 4, 4, 4, 2]
    expected = [draw.example_id for draw in Curriculum.of_epochs(31, config.seed, 2).draws()]
    assert order_of(examples, trained) == expected and Counter(expected) == dict.fromkeys(range(31), 2)
    assert resumed.task.done == resumed.task.total == (62, 2)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3), (5, 2)])
def test_ranks_train_every_example_once_an_epoch_across_a_restart(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, trained: list[Example], before: int, after: int
) -> None:
    """Each rank its part of every batch, of which the last has three rows for five: some ranks have none."""
    config = tiny_config("epochs=2", "global_batch_size=5")
    model, examples = RecursiveModel(config.arch, VOCABULARY, seed=0), random_examples(29)
    curriculum = Curriculum.of_epochs(29, config.seed, 2)
    drawn = [draw.example_id for draw in curriculum.draws()]

    def together(size: int, state: TrainerState | None, steps: int) -> TrainerState:
        start = 0 if state is None else state.values["admitted"]
        tasks = [
            TextTask(config, model, ExampleStream(examples, curriculum, 0, start), curriculum, Ranks(rank, size))
            for rank in range(size)
        ]
        for task in tasks if state is not None else ():
            task.load_state(state)
        for step in range(steps):
            trained.clear()
            for task in tasks:
                assert len(list(task.next_batch(1 + step).micro_batches)) <= 1
            batch = slice(start + 5 * step, start + 5 * (step + 1))
            assert order_of(examples, trained) == drawn[batch]
        assert len({task.done for task in tasks}) == 1
        return tasks[-1].state()

    state = together(before, None, 7)
    state = together(after, state, 5)
    assert state.values["admitted"] == 58 == curriculum.total and not state.tensors


def test_a_state_with_rows_halfway_is_refused(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    trainer = make_trainer(tiny_config(), random_examples(8))
    state = trainer.state()
    old = TrainerState({**state.tensors, "slots.active": torch.ones(4, dtype=torch.bool)}, state.values)
    with pytest.raises(UsageError, match=r"of an earlier version, .* start another run with its weights"):
        trainer.load_state(old)


def staged(config: PretrainInstructConfig, examples: list[Example], curriculum: Curriculum, start: int = 0) -> Trainer:
    model = RecursiveModel(config.arch, VOCABULARY, seed=config.seed)
    stream = ExampleStream(examples, curriculum, config.dataloader_workers, start=start)
    return Trainer(config, model, TextTask(config, model, stream, curriculum))


def test_a_schedule_can_begin_anew_with_each_stage(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    curriculum = Curriculum(0, (8, 12), (Stage(1, (8, 0)), Stage(2, (0, 12))))
    settings = ("lr=0.5", "lr_min_ratio=0.2", "arch.halt_max_steps=1")
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
    run(killed, 5)
    assert 12 < killed.task.done.examples < killed.task.total.examples
    resumed = staged(config, examples, curriculum, start=killed.task.admitted)
    resumed.model.load_state_dict(killed.model.state_dict())
    resumed.load_state(killed.state())
    run(resumed)
    assert_same(weights(resumed), weights(whole))
    assert resumed.task.done.epochs == 2


def test_the_learning_rate_follows_admitted_examples(tiny_config: ConfigFactory, random_examples: ExampleFactory) -> None:
    trainer = make_trainer(tiny_config("lr=0.5", "lr_min_ratio=0.2", "epochs=3"), random_examples(8))
    rates = [result.lr for result in run(trainer)]
    assert len(rates) == 6 and rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["run", "stage"])
def test_the_learning_rate_ends_at_max_steps(tiny_config: ConfigFactory, random_examples: ExampleFactory, schedule: str) -> None:
    """The limit is the end of the schedule, whatever data is left, and its warm-up is a tenth at most."""
    small = ("arch.H_cycles=1", "arch.L_cycles=1", "arch.L_layers=1")
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
    settings = ("lr=0.5", "lr_min_ratio=0.2", "arch.halt_max_steps=1", "lr_schedule=stage", "max_steps=5")
    rates = [result.lr for result in run(staged(tiny_config(*settings), random_examples(20), curriculum), 5)]
    assert rates[1] == rates[-1] == pytest.approx(0.1), "the first stage ends by its examples, the second where the run does"
    assert rates[2] > rates[3] > rates[4]


@pytest.mark.parametrize("grad_calls", ["null", 3])
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_workers_padding_and_packing_change_no_weight(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, grad_calls: object, attention: str
) -> None:
    examples, reference = random_examples(60, longest=14), None
    for pad, workers, packing in ((8, 0, "off"), (1, 0, "bucketed"), (5, 1, "packed"), (32, 3, "packed")):
        config = tiny_config(
            f"pad_multiple={pad}",
            f"packing={packing}",
            f"dataloader_workers={workers}",
            f"arch.attention={attention}",
            f"arch.grad_calls={grad_calls}",
            "arch.H_cycles=1",
            "arch.L_cycles=1",
            "lr=1e-3",
            "ema=true",
        )
        trainer = make_trainer(config, examples)
        finished = [result.sums["rows"] for result in run(trainer)]
        assert trainer.ema is not None
        got = (weights(trainer), trainer.ema.average, finished)
        if reference is None:
            reference = got
        else:
            assert_same(got[0], reference[0], 1e-6)
            assert_same(got[1], reference[1], 1e-6)
            assert got[2:] == reference[2:]
    start = weights(make_trainer(tiny_config("arch.H_cycles=1", "arch.L_cycles=1"), examples))
    assert not torch.allclose(reference[0]["lm_head.weight"], start["lm_head.weight"]), "the run must have learned something"


@pytest.mark.parametrize("optimizer", ["adam_atan2", "muon"])
def test_a_stopped_run_goes_on_bit_for_bit(
    tiny_config: ConfigFactory,
    random_examples: ExampleFactory,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    optimizer: str,
) -> None:
    settings = (f"optimizer={optimizer}", "global_batch_size=2", "arch.forward_dtype=float32", "ema=true", "epochs=3", "lr=1e-3")
    config = tiny_config("arch.grad_calls=9", *settings)
    size = tiny_tokenizer.vocab_size
    examples = random_examples(11, vocab_size=size)
    undisturbed = make_trainer(config, examples, vocab_size=size)
    whole = run(undisturbed)
    stopped = make_trainer(config, examples, vocab_size=size)
    run(stopped, 7)
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
    state = read_saved_run(tmp_path / "step_7").trainer
    # Another seed: whatever isn't restored would show.
    resumed = make_trainer(config, examples, vocab_size=size, start=state.values["admitted"], halt_scale=3.0)
    load_weights(resumed.model, checkpoint.weights(ema=False), tmp_path)
    resumed.load_state(state, checkpoint.weights(ema=True))
    assert resumed.ema is not None
    rest = run(resumed)
    assert [r.step for r in rest] == [r.step for r in whole[7:]] and len(rest) == 10
    for one, other in zip(rest, whole[7:], strict=True):
        assert (one.lr, one.weight, one.sums["tokens"]) == (other.lr, other.weight, other.sums["tokens"])
        assert one.sums["rows"] == other.sums["rows"]
        assert float(one.sums["nll"]) == float(other.sums["nll"]) and float(one.sums["halt_bce"]) == float(other.sums["halt_bce"])
    assert_same(weights(resumed), weights(undisturbed))
    assert_same(resumed.ema.average, undisturbed.ema.average)


@pytest.mark.parametrize("optimizer", ["adam_atan2", "muon"])
def test_parameters_that_never_had_a_gradient_resume_too(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, optimizer: str
) -> None:
    # The last level call, z_H = f(z_H + z_L), doesn't see the input embedding, nor hrm's L_level.
    config, examples = tiny_config("arch=hrm", "arch.grad_calls=1", "lr=1e-3", f"optimizer={optimizer}"), random_examples(24)
    undisturbed, stopped = make_trainer(config, examples), make_trainer(config, examples)
    run(undisturbed, 6)
    run(stopped, 2)
    state = stopped.state()
    assert not any(unreached in name for name in state.tensors for unreached in ("embed_tokens", "L_level"))
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
    assert accuracy == [1.0, 1.0], f"not learned after {trainer.progress.step} steps"
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
                states, model.embed(ids), model.rotary(torch.arange(ids.shape[1])), model.row_attention(segments)
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
