"""Arms are trained for equal FLOPs, seconds or examples, each once, and their results are whole (benchmarks/equal_flops.py)."""

import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import benchmarks.equal_flops
from benchmarks.common import flop_counter
from benchmarks.equal_flops import PLAIN, Budget, Meter, compose_arm, measure, one, read_arms, token_cost
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.build_sample_dataset import build
from dataset.text.loader import Example
from dataset.text.tokenizer import Tokenizer
from models.act import RecursiveModel
from models.layers import Linear
from training.progress import StepResult

NETWORK = (
    "arch.hidden_size=16",
    "arch.num_heads=2",
    "arch.expansion=1",
    "arch.L_layers=1",
    "arch.H_cycles=1",
    "arch.L_cycles=1",
    "arch.forward_dtype=float32",
    "arch.halt_max_steps=2",
)
SETTINGS = (
    "dataset=sample",
    "dataset.seq_len=256",
    "generation.max_output_tokens=3",
    "global_batch_size=4",
    "dataloader_workers=0",
    "device=cpu",
    "lr=1e-2",
)
TERA_FLOPS = 3e-3


@pytest.fixture(scope="module")
def places(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    build(folder / "sample", train_size=60, test_per_family=1)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes)
    (folder / "own").mkdir()
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": f"{2 * i + 1}, Red."} for i in range(60)]
    (folder / "own" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"dataset.data_dir={folder / 'sample'}", f"dataset.tokenizer_path={folder / 'tokenizer.model'}"]


@pytest.fixture(scope="module")
def arm(places: list[str]) -> Callable[..., PretrainInstructConfig]:
    """`arm("arch.halt_max_steps=1", seed=1)`: a tiny arm's settings."""
    return lambda *overrides, seed=0: compose_arm([*SETTINGS, *places, *NETWORK, *overrides], seed)


def test_a_linear_layer_and_attention_are_counted() -> None:
    layer, x = Linear(12, 20), torch.randn(7, 12, requires_grad=True)
    with flop_counter() as counter:
        layer(x).sum().backward()
    # Forward, and backward for the input and for the weight.
    assert counter.get_total_flops() == 3 * 2 * 7 * 12 * 20
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        y = F.scaled_dot_product_attention(q, k, v)
    product = 2 * 2 * 3 * 16 * 16 * 8
    assert counter.get_total_flops() == 2 * product
    with flop_counter() as counter:
        y.sum().backward()
    # Four products, and the scores once more.
    assert counter.get_total_flops() == 5 * product


@pytest.mark.parametrize("period", [1, 2, 4])
def test_counting_some_steps_comes_to_what_counting_all_does(period: int) -> None:
    """Also where steps of several kinds take turns, some with more for each token."""
    generator, weight, all_flops = np.random.default_rng(0), torch.zeros(8, 8), 0

    def steps() -> Iterator[StepResult]:
        nonlocal all_flops
        for number in itertools.count():
            tokens, calls = int(generator.integers(20, 60)), 1 + number % period
            for _ in range(calls):
                torch.zeros(tokens, 8) @ weight
            all_flops += 2 * tokens * 8 * 8 * calls
            yield StepResult(number + 1, 0.0, 1, 0.0, False, {"tokens": tokens})

    meter = Meter(Budget("FLOPs", 1e7), batch=1)
    assert len(list(meter.measured(steps()))) == meter.steps > 700
    assert meter.flops == pytest.approx(1e7, rel=0.01) and all_flops == pytest.approx(1e7, rel=0.02)


def test_a_run_takes_the_flops_that_it_says(arm: Callable[..., PretrainInstructConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[float] = []
    measured = Meter.measured

    def whole(self: Meter, steps: Iterator[StepResult]) -> Iterator[StepResult]:
        with flop_counter() as counter:
            yield from measured(self, steps)
        counted.append(counter.get_total_flops())

    monkeypatch.setattr(Meter, "measured", whole)
    # What is measured on the way would be counted, too.
    monkeypatch.setattr(benchmarks.equal_flops, "_POINTS", 1)
    result = measure("arm", arm(), Budget("FLOPs", 2.2e9), rows=1)
    assert result["steps"] > 12
    assert result["flops"] == pytest.approx(counted[0], rel=0.05) and result["flops"] == pytest.approx(2.2e9, rel=0.1)


def test_an_arm_spends_its_flops_and_is_the_same_again(arm: Callable[..., PretrainInstructConfig]) -> None:
    budget = Budget("FLOPs", 1e12 * TERA_FLOPS)
    first, again = (measure("arm", arm("ema=true", "ema_rate=0.9"), budget, rows=9) for _ in range(2))
    for result in (first, again):
        for timed in (result, result["token"]):
            assert min(timed.pop(key) for key in ("seconds", "ms") if key in timed) > 0
        result["curve"] = [(flops, loss) for flops, _, loss in result["curve"]]
    assert first == again
    assert first["flops"] == pytest.approx(1e12 * TERA_FLOPS, rel=0.1)
    # The schedule ends with the budget: at a tenth of the peak.
    assert first["last_lr"] == pytest.approx(1e-3, rel=0.2)
    flops, losses = zip(*first["curve"], strict=True)
    # Each at the step that passes its share of the budget.
    assert len(flops) == 8 and all(0 <= at - 1e12 * TERA_FLOPS * share / 8 < 2.4e8 for share, at in enumerate(flops, 1))
    assert losses[-1] < losses[0]
    # All rows are those of the curve's points.
    assert first["by_act_step"][-1]["nats"] == pytest.approx(losses[-1], abs=1e-5)
    assert sum(first["row_bits"]) / sum(first["row_bytes"]) == pytest.approx(first["by_act_step"][-1]["bits_per_byte"], rel=1e-4)
    assert len(first["row_bits"]) == len(first["row_exact"]) == 9
    assert [set(depth) for depth in first["by_act_step"]] == [{"nats", "bits_per_byte", "exact"}] * 2
    assert first["rows"] >= first["steps"] > 10 and not first["is_plain"] and first["uses"] == 4


def test_seconds_end_training_and_its_schedule(arm: Callable[..., PretrainInstructConfig]) -> None:
    result = measure("arm", arm(), Budget("seconds", 0.4), rows=2)
    assert 0.4 <= result["seconds"] < 2 and result["flops"] > 0
    assert 1e-3 <= result["last_lr"] < 3e-3


def test_examples_end_training_and_its_schedule(arm: Callable[..., PretrainInstructConfig]) -> None:
    """In whole batches, whatever an example costs."""
    shallow, deep = (
        measure("arm", arm(f"arch.halt_max_steps={steps}"), Budget("examples", amount), rows=2)
        for steps, amount in ((1, 48), (2, 46))
    )
    assert (shallow["rows"], shallow["steps"]) == (deep["rows"], deep["steps"]) == (48, 12)
    assert shallow["last_lr"] == pytest.approx(1e-3) and deep["last_lr"] == pytest.approx(1e-3, rel=0.01)
    assert shallow["flops"] < deep["flops"]


def test_a_counted_step_takes_the_time_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def steps() -> Iterator[StepResult]:
        for number in range(100):
            # Counting makes every eleventh step ten times as slow.
            clock[0] += 20.0 if number % 11 == 0 else 2.0
            yield StepResult(number + 1, 0.0, 1, 0.0, False, {"tokens": 4})

    meter = Meter(Budget("seconds", 60.0), batch=1)
    assert len(list(meter.measured(steps()))) == 30 and meter.seconds == pytest.approx(60)


def test_a_token_takes_each_weight_once_a_call(arm: Callable[..., PretrainInstructConfig], random_examples: Any) -> None:
    model = RecursiveModel(arm().arch, 30).eval()
    model.cast_for_inference()
    example: Example = random_examples(1, vocab_size=30)[0]
    costs = [token_cost(model, example, act_steps) for act_steps in (1, 2)]
    stack = sum(p.numel() for p in model.get_submodule(model.level_calls[0]).parameters())
    once = 2 * stack * len(model.level_calls)
    attention = costs[0]["flops"] - once - 2 * 16 * 30 - 2 * model.q_head.weight.numel()
    # The halting head isn't read at a fixed depth; what is left are the products of attention, with each of the positions so far.
    begin = int(example.supervised.argmax())
    seen = sum(begin + new + 1 for new in range(32)) / 32
    assert attention + 2 * model.q_head.weight.numel() == pytest.approx(len(model.level_calls) * 4 * 16 * seen)
    assert costs[1]["flops"] - costs[0]["flops"] == pytest.approx(once + len(model.level_calls) * 4 * 16 * seen)
    assert min(cost["ms"] for cost in costs) > 0


def test_what_is_there_is_not_measured_again(
    arm: Callable[..., PretrainInstructConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, budget = tmp_path / "arm-seed0.json", Budget("FLOPs", 1e8)
    call = pickle.loads(pickle.dumps((path, "arm", arm(), budget, 3)))  # as another process gets it
    found = one(*call)
    monkeypatch.setattr(benchmarks.equal_flops, "measure", lambda *_: pytest.fail("measured again"))
    assert one(*call) == json.loads(path.read_text()) == json.loads(json.dumps(found))
    for changed in ((arm("lr=2e-2"), budget, 3), (arm(), Budget("FLOPs", 2e8), 3), (arm(), budget, 4)):
        with pytest.raises(UsageError, match="other settings, rows or budget: remove it"):
            one(path, "arm", *changed)


@pytest.fixture
def arms_file(tmp_path: Path) -> Path:
    path = tmp_path / "arms.yaml"
    path.write_text(json.dumps({"all": SETTINGS, "arms": {"small": NETWORK, "fails": NETWORK}}))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, arms_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run("--flag", ...)`: the program in this process, on tiny plain Transformers; gives back what it printed."""
    tiny = {name: [*NETWORK[:3], "arch.forward_dtype=float32", *plain] for name, plain in PLAIN.items()}
    monkeypatch.setattr(benchmarks.equal_flops, "PLAIN", {name: [*plain, "arch.num_heads=2"] for name, plain in tiny.items()})
    monkeypatch.setattr(benchmarks.equal_flops, "_TIMED_TOKENS", 2)
    monkeypatch.setattr(benchmarks.equal_flops, "_POINTS", 2)
    monkeypatch.setattr(benchmarks.equal_flops, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))

    def call(*arguments: object) -> str:
        flags = ["--arms", arms_file, "--output", tmp_path / "out", "--seeds", 0, "--rows", 4, *arguments]
        monkeypatch.setattr("sys.argv", ["equal_flops", *map(str, flags)])
        benchmarks.equal_flops.main()
        return capsys.readouterr().out

    return call


def test_a_comparison_goes_on_after_it_was_killed(
    run: Callable[..., str], places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--tera-flops", 5e-5, "--only", "small", *PLAIN, "--overrides", *places)
    begun: list[str] = []

    def killed(name: str, *rest: Any) -> dict[str, Any]:
        begun.append(name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return measure(name, *rest)

    monkeypatch.setattr(benchmarks.equal_flops, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    interrupted = begun[2]
    printed = run(*flags)
    # The one that was interrupted, and those that weren't begun.
    assert sorted(begun) == sorted(["small", *PLAIN, interrupted])
    found = json.loads(printed.splitlines()[-1])
    assert [row["arm"] for row in found["arms"]] == ["small", *PLAIN] and found["best_plain"] in PLAIN
    assert json.loads((tmp_path / "out/equal_flops.json").read_text()) == found
    assert (tmp_path / "out/equal_flops.md").read_text() in printed and "| plain_8 | 1 |" in printed
    assert (tmp_path / "out/equal_flops.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_of_examples_from_the_command_line(run: Callable[..., str], places: list[str]) -> None:
    printed = run("--examples", 12, "--only", "small", "plain_2", "--overrides", *places)
    found = json.loads(printed.splitlines()[-1])
    assert found["budget"] == [12, "examples"] and "Each arm was trained for 12 examples " in printed
    assert [(row["arm"], row["rows"], row["steps"]) for row in found["arms"]] == [("small", 12, 3), ("plain_2", 12, 3)]


def test_without_a_plain_arm_nothing_is_held_against_one(run: Callable[..., str], places: list[str]) -> None:
    printed = run("--examples", 8, "--only", "small", "--overrides", *places)
    [arm] = json.loads(printed.splitlines()[-1])["arms"]
    [heads] = [line for line in printed.splitlines() if line.startswith("| arm |")]
    [cells] = [line for line in printed.splitlines() if line.startswith("| small |")]
    assert "against the first" in heads and heads.count("against") == 1 and heads.count("|") == cells.count("|")
    first, *_, deepest = arm["measures"]["bits_per_byte"]["by_act_step"]
    assert f"| {100 * (deepest / first - 1):+.1f} |" in cells


def test_conversations_of_ones_own_and_an_arm_that_fails(
    run: Callable[..., str], places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(name: str, *rest: Any) -> dict[str, Any]:
        if name == "fails":
            raise UsageError("no finite gradient")
        return measure(name, *rest)

    monkeypatch.setattr(benchmarks.equal_flops, "measure", failing)
    own = Path(places[0].partition("=")[2]).parent / "own"
    with pytest.raises(UsageError, match=r"^fails seed 0: no finite gradient$"):
        run("--seconds", 0.02, "--only", "fails", *PLAIN, "--data", own, "--overrides", places[1])
    found = json.loads((tmp_path / "out/equal_flops.json").read_text())
    assert [row["arm"] for row in found["arms"]] == list(PLAIN) and found["budget"] == [0.02, "seconds"]
    assert all(set(row["measures"]) == {"nats", "bits_per_byte"} for row in found["arms"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("arms: {}", "Field required"),
        ("all: []\narms: {a: lr=1}", "valid list"),
        ("all: []\narms: {a/b: []}", "pattern"),
        ("all: [", "expected lists of KEY=VALUE"),
        ("all: []\narms: {a: []}", "--only b: "),
    ],
)
def test_a_file_of_arms_that_is_wrong_is_told(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=told):
        read_arms(path, ["b"])


def test_the_arms_of_the_file_compose() -> None:
    found = {name: compose_arm(overrides, 0) for name, overrides in read_arms(benchmarks.equal_flops.ARMS, None).items()}
    assert {name for name, config in found.items() if benchmarks.equal_flops.is_plain(config)} == set(PLAIN)
    assert [found[name].arch.L_layers for name in PLAIN] == [2, 4, 8, 2, 4, 8]
    assert compose_arm([], 3).seed == 3


@pytest.mark.parametrize("setting", ["max_steps=3", "max_minutes=1", "early_stopping.patience=2"])
def test_another_end_than_the_budget_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=f"{setting.partition('=')[0]}=.*leave .* out"):
        compose_arm([setting], 0)


def test_no_held_out_rows_and_wrong_numbers_are_told(run: Callable[..., str], places: list[str]) -> None:
    with pytest.raises(UsageError, match=r"dataset.test_ratio=0 holds no rows out"):
        run("--tera-flops", 1, "--overrides", *places, "dataset.test_ratio=0")
    with pytest.raises(UsageError, match="--rows 0: expected more than 0"):
        run("--tera-flops", 1, "--rows", 0)
    with pytest.raises(UsageError, match="--examples 0: expected more than 0"):
        run("--examples", 0)
