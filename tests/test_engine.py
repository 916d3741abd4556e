"""Cached decoding equals recomputing everything for every token (contract 5), per-token halting and prefix attention included."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import evaluators.language
import generation.engine
from dataset.text.loader import Example
from evaluators.language import DepthOutput, evaluate_language
from generation.engine import DecodedTokens, Engine, Prompt
from models.act import RecursiveModel
from models.cache import KVCache
from models.losses import log_probs

ModelFactory = Callable[..., RecursiveModel]
VOCABULARY = 13
NEVER = -1  # an EOS id that no row gives
UNEVEN = (5, 2, 9, 3)


def make_prompts(lengths: tuple[int, ...], seed: int = 0, turns: int = 2) -> list[Prompt]:
    """Histories, with an earlier answer in the middle of the longer ones unless `turns` is 1."""
    rng = np.random.default_rng(seed)
    prompts = []
    for length in lengths:
        segment = np.ones(length, np.int32)
        if turns == 2 and length > 4:
            segment[2:4], segment[4:] = 0, 2
        prompts.append(Prompt(rng.integers(0, VOCABULARY, length).astype(np.int32), segment))
    return prompts


def recomputed(model: RecursiveModel, prompt: Prompt, answer: list[int], act_steps: int) -> torch.Tensor:
    """log p of the next token, from the whole row at once and without any cache."""
    ids = torch.tensor([[*prompt.ids.tolist(), *answer]])
    segments = torch.tensor([[*prompt.segment.tolist(), *[0] * len(answer)]])
    positions = ids.shape[1]
    states = model.initial_states(1, positions)
    with torch.no_grad():
        for _ in range(act_steps):
            states, output = model.act_step(states, model.embed(ids), model.rotary(torch.arange(positions)), model.mask(segments))
        return log_probs(model.logits(output[:, -1]), model.config.loss)[0]


def decode(model: RecursiveModel, prompts: list[Prompt], new: int, **engine: object) -> list[DecodedTokens]:
    return list(Engine(model, eos_id=NEVER, **engine).decode(prompts, [new] * len(prompts)))


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("act_steps", [1, 4, 16])
@pytest.mark.parametrize("lengths", [UNEVEN, (4, 4)], ids=["uneven", "even"])
def test_cached_equals_recomputed(tiny_model: ModelFactory, attention: str, act_steps: int, lengths: tuple[int, ...]) -> None:
    model = tiny_model(f"arch.attention={attention}")
    prompts = make_prompts(lengths)
    ticks = decode(model, prompts, 5, act_steps=act_steps)
    assert len(ticks) == 5
    for row, prompt in enumerate(prompts):
        answer: list[int] = []
        for tick in ticks:
            expected = recomputed(model, prompt, answer, act_steps)
            torch.testing.assert_close(tick.logp_BV[row], expected, rtol=0, atol=1e-6)
            assert int(tick.ids_B[row]) == int(expected.argmax()) and int(tick.act_steps_B[row]) == act_steps
            answer.append(int(tick.ids_B[row]))


def test_float32_agrees_within_1e_4_at_one_step(tiny_model: ModelFactory) -> None:
    model = tiny_model("arch.forward_dtype=float32")
    prompts = make_prompts(UNEVEN)
    answers: list[list[int]] = [[] for _ in prompts]
    for tick in decode(model, prompts, 6, act_steps=1):
        assert tick.logp_BV.dtype == torch.float32
        for row, prompt in enumerate(prompts):
            expected = recomputed(model, prompt, answers[row], 1)
            torch.testing.assert_close(tick.logp_BV[row], expected, rtol=0, atol=1e-4)
            answers[row].append(int(tick.ids_B[row]))


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("lengths", [UNEVEN, (4, 4)], ids=["uneven", "even"])
@pytest.mark.parametrize("turns", [1, 2])
def test_per_token_halting_equals_the_parallel_evaluation(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, attention: str, lengths: tuple[int, ...], turns: int
) -> None:
    model = tiny_model(f"arch.attention={attention}", halt_scale=3.0)
    # With two turns, the earlier answer in the history halts as it does in the parallel evaluation.
    prompts, act_steps, threshold = make_prompts(lengths, turns=turns), 6, 0.5
    ticks = decode(model, prompts, 8, act_steps=act_steps, halt_threshold=threshold)
    answers = torch.stack([tick.ids_B for tick in ticks], 1)
    examples = []
    for prompt, answer in zip(prompts, answers.tolist(), strict=True):
        ids = np.array([*prompt.ids, *answer], np.int32)
        supervised = np.arange(len(ids)) >= len(prompt.ids)
        segment = np.concatenate((prompt.segment, np.zeros(len(answer), np.int32)))
        examples.append(Example(ids, supervised, segment, 0))

    outputs: list[torch.Tensor] = []
    real = evaluators.language.linear_cross_entropy

    def spy(output_ND: torch.Tensor, *arguments: object) -> object:
        outputs.append(output_ND)
        return real(output_ND, *arguments)

    monkeypatch.setattr(evaluators.language, "linear_cross_entropy", spy)
    parallel: list[DepthOutput] = []
    evaluate_language(
        model,
        examples,
        eos_id=NEVER,
        batch_size=len(prompts),
        act_steps=act_steps,
        halt_threshold=threshold,
        on_output=parallel.append,
    )
    (whole,) = parallel
    logp_RNV = log_probs(model.logits(outputs[-1]), model.config.loss).view(len(prompts), len(ticks), VOCABULARY)
    steps_seen = set()
    for place, row in enumerate(whole.rows.tolist()):
        start = len(prompts[row].ids) - 1
        for n, tick in enumerate(ticks):
            torch.testing.assert_close(tick.logp_BV[row], logp_RNV[place, n], rtol=0, atol=1e-6)
            assert int(tick.act_steps_B[row]) == int(whole.act_steps_BT[place, start + n])
            steps_seen.add(int(tick.act_steps_B[row]))
        assert torch.equal(whole.preds_BT[place, start : start + len(ticks)], answers[row])
    assert len(steps_seen) >= 3, "tokens must halt at different steps for this test to mean anything"
    assert {int(ticks[0].act_steps_B[row]) for row in range(len(prompts))} == {act_steps}, "prompts take all steps"


def test_one_row_at_a_time_gives_what_the_batch_gives(tiny_model: ModelFactory) -> None:
    model = tiny_model(halt_scale=3.0)
    prompts = make_prompts(UNEVEN)
    for options in ({"act_steps": 3}, {"act_steps": 3, "halt_threshold": 0.4}):
        together = decode(model, prompts, 4, **options)
        for row, prompt in enumerate(prompts):
            for batch_tick, tick in zip(together, decode(model, [prompt], 4, **options), strict=True):
                torch.testing.assert_close(batch_tick.logp_BV[row], tick.logp_BV[0], rtol=0, atol=1e-9)
                assert int(batch_tick.act_steps_B[row]) == int(tick.act_steps_B[0])


def test_memory_that_was_never_written_reaches_no_row(tiny_model: ModelFactory) -> None:
    model, prompts = tiny_model(), make_prompts(UNEVEN)
    expected = decode(model, prompts, 12, act_steps=2)
    # torch then fills what `empty` returns with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        ticks = decode(model, prompts, 12, act_steps=2)
    finally:
        torch.use_deterministic_algorithms(False)
    for tick, other in zip(ticks, expected, strict=True):
        torch.testing.assert_close(tick.logp_BV, other.logp_BV, rtol=0, atol=1e-9)


def test_a_row_ends_with_its_eos_or_its_limit(tiny_model: ModelFactory) -> None:
    model, prompts = tiny_model(), make_prompts((5, 2))
    free = [tick.ids_B.tolist() for tick in decode(model, prompts, 6, act_steps=2)]
    # Whatever row 0 says at its third token is now the end, wherever it comes first.
    eos = free[2][0]
    expected = []
    for row, limit in ((0, 6), (1, 4)):
        said = [tick[row] for tick in free][:limit]
        expected.append(said[: said.index(eos) + 1] if eos in said else said)
    ticks = list(Engine(model, eos_id=eos, act_steps=2).decode(prompts, [6, 4]))
    got = [[int(tick.ids_B[row]) for tick in ticks if tick.alive[row]] for row in range(2)]
    assert got == expected and len(ticks) == max(map(len, expected))


def test_memory_follows_the_tokens_so_far(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[KVCache] = []

    class Watched(KVCache):
        def __init__(self, **arguments: object) -> None:
            super().__init__(**arguments)
            caches.append(self)

    monkeypatch.setattr(generation.engine, "KVCache", Watched)
    model = tiny_model()
    engine = Engine(model, eos_id=NEVER, act_steps=2)
    capacities = [caches[-1].capacity for _ in engine.decode(make_prompts((5, 3)), [20, 20])]
    assert 5 <= capacities[0] <= 5 + 32, "a prompt takes its own length and a margin, not the context"
    assert all(5 + tick <= capacity <= 5 + tick + 32 for tick, capacity in enumerate(capacities))
    bytes_held = caches[-1].buffer.numel() * caches[-1].buffer.element_size()
    assert bytes_held == engine.cache_bytes(2, caches[-1].capacity)


def test_each_new_token_costs_one_position_whatever_came_before(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = tiny_model(), []
    real = RecursiveModel.act_step

    def spy(self: RecursiveModel, states: object, x_BTD: torch.Tensor, *rest: object) -> object:
        widths.append(x_BTD.shape[1])
        return real(self, states, x_BTD, *rest)

    monkeypatch.setattr(RecursiveModel, "act_step", spy)
    decode(model, make_prompts((7,)), 5, act_steps=3)
    assert widths == [7] * 3 + [1] * 3 * 4
