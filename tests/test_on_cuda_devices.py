"""What runs on a CUDA device, on one without values: every tensor is where it belongs, and the host waits no more than it must."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from config.compose import compose_as
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig
from dataset.puzzles.loader import PuzzleData
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example, ExampleStream
from dataset.text.packing import row_layout
from evaluators.calibration import record_halting
from evaluators.language import evaluate_language
from evaluators.puzzles import evaluate_puzzles
from generation.engine import Engine, Prompt, Request, lane_count
from generation.sampling import Sampling
from models.act import RecursiveModel
from models.cache import HeldAttention, KVCache
from models.device import on_device
from models.distributed import Ranks
from models.layers import TokenRows
from tests.fake_device import FakeDevice, fake_device
from tests.puzzle_data import TINY_PUZZLES, write_puzzles
from training.loop import Trainer
from training.progress import Window
from training.puzzle import PuzzleTask
from training.text import TextTask

ConfigFactory = Callable[..., PretrainInstructConfig]
ExampleFactory = Callable[..., list[Example]]
RECURSIONS = ("looped", "trm", "trm_singlez", "trm_hier6", "hrm", "transformers_baseline")
VOCABULARY = 13
# Steps and tokens: the host reads whether weights may move, and the ids.
OF_A_STEP = ["training/loop.py:step"]
OF_TOKENS = ["generation/engine.py:_choose_tokens"]
OF_GREEDY_TOKENS = ["generation/device_tick.py:choose"]


@pytest.fixture(autouse=True)
def _unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks that a graph would replay run kernel by kernel, and aren't compared with themselves the first time."""

    def run(ways: Mapping[str, Callable[[], None]], *rest: object) -> Callable[[], None]:
        *_, plain = ways.values()
        plain()
        return plain

    monkeypatch.setattr("generation.device_tick.run_and_record", run)


def small(recursion: str) -> tuple[str, ...]:
    """Overrides for a network of as few level calls as it takes, in the number format of a GPU."""
    calls = () if recursion == "transformers_baseline" else ("arch.H_cycles=1", "arch.L_cycles=1")
    layers = {"hrm": (), "transformers_baseline": ()}.get(recursion, ("arch.L_layers=1",))
    return (f"arch={recursion}", *calls, *layers, "arch.forward_dtype=bfloat16", "ema=true")


def text_trainer(device: FakeDevice, config: PretrainInstructConfig, examples: list[Example]) -> Trainer:
    model = RecursiveModel(config.arch, VOCABULARY).to(device.device)
    curriculum = Curriculum.of_epochs(len(examples), config.seed, config.epochs)
    return Trainer(config, model, TextTask(config, model, ExampleStream(examples, curriculum, 0), curriculum))


def answering(device: FakeDevice, config: PretrainInstructConfig) -> RecursiveModel:
    model = RecursiveModel(config.arch, VOCABULARY).to(device.device).eval()
    model.cast_for_inference()
    return model


def ticks(device: FakeDevice, engine: Engine, lengths: tuple[int, ...], **options: object) -> list[tuple[int, list[str]]]:
    """Of each tick of the answers to prompts of these lengths, three tokens each: the tokens it gave and where the host waited."""
    for length in lengths:
        engine.submit(Request(Prompt(np.arange(length) % VOCABULARY, np.ones(length, np.int32)), 3, **options))
    found = []
    while engine.busy:
        device.waits.clear()
        found.append((len(engine.tick()), device.waits.copy()))
    return found


@pytest.mark.parametrize(
    ("recursion", "attention", "packing"),
    [
        *itertools.product(["trm"], ["causal", "prefix"], ["off", "bucketed", "packed"]),
        *itertools.product(RECURSIONS[1:], ["prefix"], ["bucketed"]),
    ],
)
def test_a_step_of_training_waits_once(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, recursion: str, attention: str, packing: str
) -> None:
    config = tiny_config(*small(recursion), f"arch.attention={attention}", f"packing={packing}")
    with fake_device() as device:
        steps = text_trainer(device, config, random_examples(12)).steps()
        for _ in range(2):
            device.waits.clear()
            device.largest_sent = 0
            next(steps)
            assert device.waits == OF_A_STEP
            # Nothing larger goes there than the ids of a batch, and no mask.
            assert device.largest_sent <= config.global_batch_size * config.dataset.seq_len


@pytest.mark.parametrize(
    "overrides",
    [
        ("micro_batch_size=2", "grad_clip=1.0", "arch.activation_checkpointing=true"),
        ("arch.grad_calls=3", "arch.halt.backprop=true", "arch.loss=softmax", "optimizer=muon"),
    ],
)
def test_other_ways_to_train(tiny_config: ConfigFactory, random_examples: ExampleFactory, overrides: tuple[str, ...]) -> None:
    with fake_device() as device:
        trainer = text_trainer(device, tiny_config(*small("trm"), *overrides), random_examples(8))
        window = Window()
        device.waits.clear()
        window.add(next(trainer.steps()))
        assert device.waits == OF_A_STEP
        assert window.over_ranks(Ranks()).sums["nll"]
        trainer.load_state(trainer.state(), trainer.ema.average if trainer.ema is not None else None)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_masks(tiny_config: ConfigFactory, attention: str, is_packed: bool) -> None:
    """Each kind over rows of two widths."""
    config = tiny_config(*small("trm"), f"arch.attention={attention}")
    with fake_device() as device, torch.no_grad():
        model = answering(device, config)
        lengths, device_ = (9, 8, 3), model.device
        layout = row_layout(np.array(lengths), "packed" if is_packed else "bucketed", 8)
        groups = [TokenRows(on_device(group.index_N, device_), *group[1:]) for group in layout.groups]
        tokens = sum(lengths)
        documents_N = on_device(layout.document_N, device_) if is_packed else None
        device.waits.clear()
        attend = model.token_attention(groups, torch.ones(tokens, dtype=torch.int64, device=device_), documents_N)
        x_ND = model.embed(torch.zeros(tokens, dtype=torch.int64, device=device_))
        model.act_step(model.initial_states(tokens), x_ND, None, attend)
        assert not device.waits


@pytest.mark.parametrize("recursion", RECURSIONS)
def test_a_token_waits_once_at_fixed_depth(tiny_config: ConfigFactory, recursion: str) -> None:
    """Rows of uneven length, one of which enters when another leaves."""
    with fake_device() as device:
        model = answering(device, tiny_config(*small(recursion), "arch.attention=prefix"))
        engine = Engine(model, eos_id=-1, act_steps=2, rows=2, positions=12)
        found = ticks(device, engine, (5, 2))
        assert found == [(2, OF_TOKENS), (2, OF_GREEDY_TOKENS), (0, []), (2, OF_GREEDY_TOKENS)]


def test_halting_waits_no_more(tiny_config: ConfigFactory) -> None:
    """Every token halts at its first step, and the engine reads which do with their ids."""
    with fake_device() as device:
        model = answering(device, tiny_config(*small("trm"), "arch.attention=prefix"))
        engine = Engine(model, eos_id=-1, act_steps=3, rows=2, positions=12)
        _, *found = ticks(device, engine, (5, 2), halt_threshold=0.5)
        assert found == [(2, OF_GREEDY_TOKENS)]


def test_sampling_waits_no_more_than_greedy_choice(tiny_config: ConfigFactory) -> None:
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    with fake_device() as device:
        engine = Engine(answering(device, tiny_config(*small("trm"))), eos_id=-1, act_steps=1, rows=2, positions=12)
        _, *found = ticks(device, engine, (5, 2), sampling=sampling, top=3)
        assert found == [(2, OF_TOKENS)]


def test_lanes_of_a_cache(tiny_config: ConfigFactory) -> None:
    """Filling, extending row by row and together, and what halted tokens leave."""
    with fake_device() as device, torch.inference_mode():
        model = answering(device, tiny_config(*small("trm"), "arch.attention=prefix"))
        cache = KVCache(
            rows=3,
            act_steps=2,
            lanes=lane_count(model),
            heads=model.config.num_heads,
            positions=16,
            head_dim=model.config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        table = model.rotary(torch.arange(16))
        assert table is not None
        rows_B, act_steps_B, starts_B = on_device([[0, 2], [0, 1], [4, 2]], model.device)
        index_N = torch.arange(2, device=model.device)
        rotary_B = table.at(index_N.unsqueeze(1))
        device.waits.clear()
        x_BTD = model.embed(torch.zeros(2, 1, dtype=torch.int64, device=model.device))
        attend = model.token_attention([TokenRows(index_N, 2, 1)], torch.ones_like(index_N))
        held = HeldAttention(cache.fill([2, 0], [slice(0, 1), slice(1, 2)], attend))
        for _ in range(2):
            model.act_step(model.initial_states(2), x_BTD[:, 0], table.at(index_N), held)
            held.active_BT = torch.ones(2, dtype=torch.bool, device=model.device)
        together = cache.extend_together(rows_B, act_steps_B, starts_B, 4, compiled=False)
        for extending in (cache.extend([0, 2], [0, 1], [4, 2]), together):
            model.act_step(model.initial_states(2, 1), x_BTD, rotary_B, extending)
        cache.carry_halted(0, 4, 0, 2)
        assert not device.waits


@pytest.mark.parametrize("halt_threshold", [None, 0.5])
def test_evaluation_on_text(tiny_config: ConfigFactory, random_examples: ExampleFactory, halt_threshold: float | None) -> None:
    with fake_device() as device:
        model, outputs = answering(device, tiny_config(*small("trm"), "arch.attention=prefix")), []
        result = evaluate_language(
            model,
            random_examples(3),
            eos_id=1,
            batch_size=2,
            act_steps=2,
            halt_threshold=halt_threshold,
            on_output=outputs.append,
        )
        assert result.by_depth[-1].conversations == 3 and len(outputs) == 2
        record_halting(model, random_examples(3), batch_size=2, act_steps=2)


PUZZLES = ("arch.forward_dtype=bfloat16", "arch.H_cycles=1", "ema=true")


@pytest.mark.parametrize("recursion", ["trm", "hrm"])
@pytest.mark.parametrize("overrides", [(), ("arch.mlp_t=true", "arch.pos_encodings=none", "arch.act_inference=true")])
def test_puzzles(tmp_path: Path, recursion: str, overrides: tuple[str, ...]) -> None:
    """Training with sparse puzzle vectors and evaluation."""
    path = write_puzzles(tmp_path / "puzzles")
    layers = ("arch.H_layers=1",) if recursion == "hrm" else ()
    config = compose_as(
        PretrainPuzzleConfig,
        "cfg_pretrain",
        [f"data_paths=[{path}]", *TINY_PUZZLES, f"arch={recursion}", *layers, *PUZZLES, *overrides],
    )
    data = PuzzleData(config.data_paths, "train")
    meta = data.metadata
    with fake_device() as device:
        model = RecursiveModel(config.arch, meta.vocab_size, seq_len=meta.seq_len, puzzles=meta.num_puzzle_identifiers)
        model.to(device.device)
        trainer = Trainer(config, model, PuzzleTask(config, model, data))
        steps = trainer.steps()
        next(steps)
        device.waits.clear()
        next(steps)
        # Whether weights may move, and how many puzzles there were.
        assert device.waits == [*OF_A_STEP, "models/sparse_embedding.py:take_gradient"]
        trainer.load_state(trainer.state(), trainer.ema.average if trainer.ema is not None else None)
        evaluate_puzzles(model, data, batch_size=4, max_batches=1)


def test_what_is_refused() -> None:
    """The three faults that these tests are for, and what the host waits for."""
    with fake_device() as device:
        x = torch.zeros(4, 4, device="cuda")
        with pytest.raises(TypeError, match="tensors on the host and on the device, in a test"):
            x[torch.tensor([0, 1])]
        with pytest.raises(TypeError, match="tensors on the host and on the device, in a test"):
            x.masked_fill(torch.ones(4, 4, dtype=torch.bool).tril(), 0.0)
        with pytest.raises(TypeError, match="float64 on the device"):
            x.double()
        assert not device.waits
        x[on_device([0, 1], device.device)].tolist()
        assert device.waits == ["a test"]
        torch.tensor([0, 1], device="cuda")
        x[x > 0]
        x[x > 0] = 1.0
        x[on_device([0], device.device)] = 1.0
        assert float(x.sum()) == 1.0 and device.waits == ["a test"] * 5
