"""Cached decoding equals recomputing everything for every token (contract 5), whatever else is in the batch."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import evaluators.language
from config.errors import UsageError
from dataset.text.loader import Example
from evaluators.language import DepthOutput, evaluate_language
from generation.engine import Engine, Prompt, Request, Token, cache_bytes, rows_that_fit
from generation.sampling import Sampler, Sampling
from models.act import RecursiveModel
from models.device import has_compiler
from models.losses import log_probs

ModelFactory = Callable[..., RecursiveModel]
VOCABULARY = 13
NEVER = -1  # an EOS id that no row gives
UNEVEN = (5, 2, 9, 3)
# Thoroughly for the recursion with one stack and the one with two of different depth, once for each of the others. The seed is one
# with which tokens halt at different steps.
EACH_RECURSION = [
    *itertools.product(["trm", "hrm"], ["causal", "prefix"], [UNEVEN, (4, 4)], [0]),
    *((name, "prefix", UNEVEN, 1) for name in ("looped", "trm_singlez", "trm_hier6", "transformers_baseline")),
]
# The other kinds of blocks.
OTHER_BLOCKS = ("arch.norm=pre", "arch.qk_norm=true")


def make_prompts(lengths: Sequence[int], seed: int = 0, turns: int = 2) -> list[Prompt]:
    """Histories, with an earlier answer in the middle of the longer ones unless `turns` is 1."""
    rng = np.random.default_rng(seed)
    prompts = []
    for length in lengths:
        segment = np.ones(length, np.int32)
        if turns == 2 and length > 4:
            segment[2:4], segment[4:] = 0, 2
        prompts.append(Prompt(rng.integers(0, VOCABULARY, length).astype(np.int32), segment))
    return prompts


def requests_for(prompts: Sequence[Prompt], new: int, **options: object) -> list[Request]:
    return [Request(prompt, new, top=VOCABULARY, **options) for prompt in prompts]


def decode(
    model: RecursiveModel,
    requests: Sequence[Request],
    *,
    act_steps: int,
    rows: int | None = None,
    eos_id: int = NEVER,
    **options: Any,
) -> list[list[Token]]:
    """The tokens of each request, in the requests' order."""
    positions = max(len(request.prompt.ids) + request.max_new_tokens for request in requests)
    engine = Engine(model, eos_id=eos_id, act_steps=act_steps, rows=rows or len(requests), positions=positions, **options)
    assert [engine.submit(request) for request in requests] == list(range(len(requests)))
    answers: list[list[Token]] = [[] for _ in requests]
    while engine.busy:
        for token in engine.tick():
            answers[token.request].append(token)
    return answers


def logp_of(token: Token) -> torch.Tensor:
    """log p over the whole vocabulary."""
    logp = torch.empty(VOCABULARY, dtype=torch.float64)
    for token_id, value in token.candidates:
        logp[token_id] = value
    return logp


def recomputed(model: RecursiveModel, prompt: Prompt, tokens: Sequence[Token], act_steps: int) -> torch.Tensor:
    """(N, V) logits of each of an answer's N tokens, from the whole row at once and without any cache."""
    ids = torch.tensor([[*prompt.ids.tolist(), *(token.id for token in tokens[:-1])]])
    segments = torch.tensor([[*prompt.segment.tolist(), *[0] * (len(tokens) - 1)]])
    positions = ids.shape[1]
    states = model.initial_states(1, positions)
    with torch.no_grad():
        for _ in range(act_steps):
            states, output = model.act_step(
                states, model.embed(ids), model.rotary(torch.arange(positions)), model.row_attention(segments)
            )
        return model.logits(output[0, -len(tokens) :])


@pytest.mark.parametrize(
    ("recursion", "attention", "lengths", "seed", "blocks"),
    [
        *((*case, ()) for case in EACH_RECURSION),
        *(("transformers_baseline", "prefix", UNEVEN, 1, (kind,)) for kind in OTHER_BLOCKS),
        ("trm", "causal", UNEVEN, 0, OTHER_BLOCKS),
    ],
)
@pytest.mark.parametrize("act_steps", [1, 4, 16])
def test_cached_equals_recomputed(
    tiny_model: ModelFactory,
    recursion: str,
    attention: str,
    act_steps: int,
    lengths: tuple[int, ...],
    seed: int,
    blocks: tuple[str, ...],
) -> None:
    model = tiny_model(f"arch={recursion}", f"arch.attention={attention}", *blocks, seed=seed)
    prompts = make_prompts(lengths)
    for prompt, tokens in zip(prompts, decode(model, requests_for(prompts, 5), act_steps=act_steps), strict=True):
        assert len(tokens) == 5 and [token.finish for token in tokens] == [None] * 4 + ["length"]
        logp_NV = log_probs(recomputed(model, prompt, tokens, act_steps), model.config.loss)
        for token, expected in zip(tokens, logp_NV, strict=True):
            torch.testing.assert_close(logp_of(token), expected, rtol=0, atol=1e-6)
            assert token.id == int(expected.argmax()) and token.act_steps == act_steps
            assert token.logp == pytest.approx(float(expected.max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_rounded_numbers_agree_at_one_step(tiny_model: ModelFactory, dtype: str, tolerance: float) -> None:
    model = tiny_model(f"arch.forward_dtype={dtype}")
    prompts = make_prompts(UNEVEN)
    for prompt, tokens in zip(prompts, decode(model, requests_for(prompts, 6), act_steps=1), strict=True):
        logp_NV = log_probs(recomputed(model, prompt, tokens, 1), model.config.loss)
        for token, expected in zip(tokens, logp_NV, strict=True):
            torch.testing.assert_close(logp_of(token).float(), expected, rtol=0, atol=tolerance)


SAMPLED = {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2}


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("threshold", [None, 0.5], ids=["fixed", "halting"])
def test_64_uneven_requests_in_any_order_equal_one_by_one(
    tiny_model: ModelFactory, sampling: dict[str, float], threshold: float | None
) -> None:
    model = tiny_model("arch.attention=prefix", "arch.H_cycles=1", "arch.L_cycles=1", halt_scale=3.0, seed=3)
    rng = np.random.default_rng(1)
    prompts = make_prompts(rng.integers(1, 24, 64).tolist())
    requests = [
        Request(prompt, int(rng.integers(1, 6)), Sampling(seed=number, **sampling), halt_threshold=threshold)  # type: ignore[arg-type]
        for number, prompt in enumerate(prompts)
    ]
    alone = [decode(model, [request], act_steps=4)[0] for request in requests]
    if threshold is None:
        for request, tokens in zip(requests, alone, strict=True):
            sampler = Sampler(1, VOCABULARY, model.config.loss, model.device)
            sampler.admit(0, request.sampling, 0, request.prompt.ids.tolist())
            for token, logits_V in zip(tokens, recomputed(model, request.prompt, tokens, 4), strict=True):
                assert token.id == int(sampler.choose(torch.tensor([0]), logits_V[None]).ids_R[0])
    else:
        assert len({token.act_steps for tokens in alone for token in tokens}) >= 3, "tokens must halt at different steps"
    for rows, order in ((64, range(64)), (7, rng.permutation(64).tolist())):
        together = decode(model, [requests[i] for i in order], act_steps=4, rows=rows)
        for place, i in enumerate(order):
            assert [(t.id, t.act_steps, t.finish) for t in together[place]] == [(t.id, t.act_steps, t.finish) for t in alone[i]]
            assert [t.logp for t in together[place]] == pytest.approx([t.logp for t in alone[i]], abs=1e-9)


# aot_eager is all of torch.compile but the generated code. Frozen weights and packed products are inductor's.
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance", "recursion"),
    [
        ("aot_eager", "float64", 1e-9, "hrm"),
        ("inductor", "float64", 1e-9, "trm"),
        *(pytest.param("inductor", *case, "hrm", marks=pytest.mark.slow) for case in (("float32", 1e-4), ("bfloat16", 0.3))),
    ],
)
def test_compiled_ticks_say_the_same(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: str, tolerance: float, recursion: str
) -> None:
    if backend == "inductor" and not has_compiler():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    model = tiny_model(f"arch={recursion}", f"arch.forward_dtype={dtype}", "arch.attention=prefix", halt_scale=3.0, seed=1)
    model.cast_for_inference()
    # Answers of several lengths leave fewer rows, and in the end a single one; of two prompts one is a single token.
    requests = [
        dataclasses.replace(request, max_new_tokens=2 + number, halt_threshold=0.5 if number % 2 else None)
        for number, request in enumerate(requests_for(make_prompts((5, 2, 1, 9, 3)), 1))
    ]
    eager = decode(model, requests, act_steps=3, rows=3)
    stacks = len(model.recursion.levels)
    with torch._dynamo.config.patch(recompile_limit=2 * stacks, fail_on_recompile_limit_hit=True):
        # Code for one row and for several of each stack, whatever the engine's size.
        compiled = decode(model, requests, act_steps=3, rows=3, compiled=True)
    for expected, found in zip(eager, compiled, strict=True):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(logp_of(other), logp_of(one), rtol=0, atol=tolerance)
            if dtype == "bfloat16" and one.id != other.id:
                break  # what follows differs, too
            assert (one.id, one.act_steps) == (other.id, other.act_steps)
    if dtype == "float64":
        assert len({token.act_steps for tokens in eager for token in tokens}) > 1, "no token halted early: the test means less"


def test_requests_that_come_later_change_nothing(tiny_model: ModelFactory) -> None:
    model = tiny_model(halt_scale=3.0)
    prompts = make_prompts((4, 7, 3, 6))
    # Depths and thresholds of their own, at the same time.
    kinds = [{"act_steps": 2}, {"halt_threshold": 0.5}, {}, {"act_steps": 3, "halt_threshold": 0.4}]
    requests = [dataclasses.replace(requests_for([p], 6)[0], **kind) for p, kind in zip(prompts, kinds, strict=True)]
    alone = [decode(model, [request], act_steps=4)[0] for request in requests]
    engine = Engine(model, eos_id=NEVER, act_steps=4, rows=3, positions=16)
    answers: list[list[Token]] = [[] for _ in requests]
    waiting = list(requests)
    ticks = 0
    while engine.busy or waiting:
        if ticks % 3 == 0 and waiting:
            engine.submit(waiting.pop(0))
        for token in engine.tick():
            answers[token.request].append(token)
        ticks += 1
    for got, expected in zip(answers, alone, strict=True):
        assert [(t.id, t.act_steps) for t in got] == [(t.id, t.act_steps) for t in expected]


@pytest.mark.parametrize(("depths", "longest_wait"), [((4, 4), 4), ((3, 4), 1)])
def test_a_request_waits_for_a_free_row_no_longer_than_a_token(
    tiny_model: ModelFactory, depths: tuple[int, ...], longest_wait: int
) -> None:
    prompts = make_prompts((4, 5, 3))
    engine = Engine(tiny_model(), eos_id=NEVER, act_steps=4, rows=3, positions=32)
    for prompt, depth in zip(prompts, depths, strict=False):
        engine.submit(Request(prompt, 20, act_steps=depth))
    for _ in range(6):
        engine.tick()
    late = engine.submit(Request(prompts[2], 2))
    waits = next(ticks for ticks in range(1, 20) if any(token.request == late for token in engine.tick()))
    assert waits <= longest_wait


@pytest.mark.parametrize("depths", [(4,), (3, 4)])
def test_requests_that_wait_for_a_group_enter_before_long(tiny_model: ModelFactory, depths: tuple[int, ...]) -> None:
    threshold = 0.99 if len(depths) == 1 else None
    [prompt] = make_prompts((4,))
    engine = Engine(tiny_model(), eos_id=NEVER, act_steps=4, rows=16, positions=128)
    for number in range(13):
        engine.submit(Request(prompt, 100, act_steps=depths[number % len(depths)], halt_threshold=threshold))
    engine.tick()
    late = {engine.submit(Request(prompt, 2, halt_threshold=threshold)) for _ in range(4)}
    seen = {token.request for _ in range(4 * 4 + 2) for token in engine.tick()}
    assert len(late & seen) == 3  # there are three free rows


def test_with_halting_requests_enter_in_groups(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, groups = tiny_model("arch.H_cycles=1", halt_scale=3.0, seed=3), 8, []
    prefill = Engine._prefill

    def spy(self: Engine, slots: list[int], *rest: Any) -> Any:
        groups.append(len(slots))
        return prefill(self, slots, *rest)

    monkeypatch.setattr(Engine, "_prefill", spy)
    requests = [Request(prompt, 2 + 3 * (number % 4), halt_threshold=0.5) for number, prompt in enumerate(make_prompts([4] * 19))]
    together = decode(model, requests, act_steps=4, rows=rows)
    assert groups[0] == rows and sum(groups) == len(requests) and min(groups[:-1]) >= rows // 4
    for request, tokens in zip(requests, together, strict=True):
        [alone] = decode(model, [request], act_steps=4)
        assert [(token.id, token.act_steps) for token in tokens] == [(token.id, token.act_steps) for token in alone]


@pytest.mark.parametrize(("recursion", "attention", "lengths", "seed"), EACH_RECURSION)
@pytest.mark.parametrize("turns", [1, 2])
def test_per_token_halting_equals_the_parallel_evaluation(
    tiny_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
    recursion: str,
    attention: str,
    lengths: tuple[int, ...],
    seed: int,
    turns: int,
) -> None:
    overrides = (f"arch={recursion}", f"arch.attention={attention}", "arch.halt_max_steps=6")
    model = tiny_model(*overrides, seed=seed, halt_scale=3.0)
    with torch.no_grad():
        # Calibrated differently at every depth, as a checkpoint may be.
        model.halt_calibration.copy_(torch.tensor([[1.2, 0.8, 1.0, 1.1, 0.9, 1.0], [0.1, -0.2, 0.0, 0.3, 0.1, 0.0]]))
    # With two turns, the earlier answer in the history halts as it does in the parallel evaluation.
    prompts, act_steps, threshold = make_prompts(lengths, turns=turns), 6, 0.5
    answers = decode(model, requests_for(prompts, 8, halt_threshold=threshold), act_steps=act_steps)
    examples = []
    for prompt, tokens in zip(prompts, answers, strict=True):
        ids = np.array([*prompt.ids, *(token.id for token in tokens)], np.int32)
        supervised = np.arange(len(ids)) >= len(prompt.ids)
        segment = np.concatenate((prompt.segment, np.zeros(len(tokens), np.int32)))
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
    logp_RNV = log_probs(model.logits(outputs[-1]), model.config.loss).view(len(prompts), 8, VOCABULARY)
    steps_seen = set()
    for place, row in enumerate(whole.rows.tolist()):
        start = len(prompts[row].ids) - 1
        for n, token in enumerate(answers[row]):
            torch.testing.assert_close(logp_of(token), logp_RNV[place, n], rtol=0, atol=1e-6)
            assert token.act_steps == int(whole.act_steps_BT[place, start + n])
            assert token.id == int(whole.preds_BT[place, start + n])
            steps_seen.add(token.act_steps)
    assert len(steps_seen) >= 3, "tokens must halt at different steps for this test to mean anything"
    assert {tokens[0].act_steps for tokens in answers} == {act_steps}, "prompts take all steps"


def test_a_text_whose_tokens_all_halt_early_is_continued_as_in_the_parallel_evaluation(tiny_model: ModelFactory) -> None:
    """Raw text has no prompt segment, whose tokens would go to full depth."""
    model, act_steps, threshold = tiny_model("arch.halt_max_steps=6", halt_scale=3.0, seed=3), 6, 0.5
    prompts = [Prompt(prompt.ids, np.zeros_like(prompt.segment)) for prompt in make_prompts((3,)) + make_prompts((8,))]
    answers = decode(model, requests_for(prompts, 6, halt_threshold=threshold), act_steps=act_steps)
    for prompt, tokens in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt.ids.tolist(), *(token.id for token in tokens[:-1])]])
        *_, refined = model.refine_rows(ids, torch.zeros_like(ids), act_steps=act_steps, halt_threshold=threshold)
        steps = refined.steps_BT[0].tolist()
        assert max(steps[: len(prompt.ids)]) == 1 < max(steps), "a token must go deeper than the whole prompt"
        assert [token.act_steps for token in tokens] == steps[-6:]
        for token, logits_V in zip(tokens, model.logits(refined.output_BTD[0, -6:]), strict=True):
            torch.testing.assert_close(logp_of(token), log_probs(logits_V, model.config.loss), rtol=0, atol=1e-6)


def test_memory_that_was_never_written_reaches_no_row(tiny_model: ModelFactory) -> None:
    model, requests = tiny_model(), requests_for(make_prompts(UNEVEN), 12)
    expected = decode(model, requests, act_steps=2, rows=2)
    # torch then fills what `empty` returns with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        answers = decode(model, requests, act_steps=2, rows=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert answers == expected


def test_a_row_ends_with_its_eos_or_its_limit(tiny_model: ModelFactory) -> None:
    model, requests = tiny_model(), requests_for(make_prompts((5, 2)), 6)
    free = [[token.id for token in tokens] for tokens in decode(model, requests, act_steps=2)]
    # Whatever row 0 says at its third token is now the end, wherever it comes first.
    eos = free[0][2]
    limits = (6, 4)
    answers = decode(
        model, [dataclasses.replace(r, max_new_tokens=n) for r, n in zip(requests, limits, strict=True)], act_steps=2, eos_id=eos
    )
    for tokens, said, limit in zip(answers, free, limits, strict=True):
        expected = said[:limit]
        ends = eos in expected
        assert [token.id for token in tokens] == (expected[: expected.index(eos) + 1] if ends else expected)
        assert [token.finish for token in tokens] == [None] * (len(tokens) - 1) + ["stop" if ends else "length"]


def test_a_cancelled_request_gives_no_more_tokens_and_frees_its_row(tiny_model: ModelFactory) -> None:
    model, requests = tiny_model(), requests_for(make_prompts((5, 4, 3)), 6)
    expected = decode(model, requests, act_steps=2)
    engine = Engine(model, eos_id=NEVER, act_steps=2, rows=1, positions=16)
    numbers = [engine.submit(request) for request in requests]
    first = engine.tick()
    assert {token.request for token in first} == {numbers[0]} and (engine.running, engine.waiting) == (1, 2)
    engine.cancel(numbers[0])
    engine.cancel(numbers[1])
    assert (engine.running, engine.waiting) == (0, 1)
    rest: list[Token] = []
    while engine.busy:
        rest += engine.tick()
    assert [(t.request, t.id) for t in rest] == [(numbers[2], t.id) for t in expected[2]]
    engine.cancel(numbers[2])  # it has finished: nothing happens


def test_equal_prompts_are_run_once(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model(), make_prompts((6, 4))
    tokens_run: list[int] = []
    real = RecursiveModel.act_step

    def spy(self: RecursiveModel, states: object, x_BTD: torch.Tensor, *rest: object) -> object:
        tokens_run.append(x_BTD.shape[:-1].numel())
        return real(self, states, x_BTD, *rest)

    monkeypatch.setattr(RecursiveModel, "act_step", spy)
    sampling = Sampling(temperature=5.0, seed=3)
    requests = [Request(prompts[0], 6, sampling, sample=n) for n in range(3)] + [Request(prompts[1], 6, sampling)]
    answers = decode(model, requests, act_steps=1)
    # A number of tokens that is a multiple of 8, then one token of each of four rows.
    assert tokens_run == [16] + [4] * 5, "two prompts of 10 tokens side by side"
    assert len({tuple(token.id for token in tokens) for tokens in answers[:3]}) == 3
    alone = decode(model, [requests[1]], act_steps=1)
    assert [token.id for token in alone[0]] == [token.id for token in answers[1]]


# The last one: heads narrower than the state, 3 of 4 channels.
@pytest.mark.parametrize(
    "overrides", [("arch=trm",), ("arch=hrm",), ("arch=transformers_baseline", "arch.hidden_size=14", "arch.num_heads=3")]
)
def test_the_cache_is_as_large_as_was_said_and_bounded(tiny_model: ModelFactory, overrides: tuple[str, ...]) -> None:
    model = tiny_model(*overrides)
    engine = Engine(model, eos_id=NEVER, act_steps=2, rows=3, positions=20)
    assert engine._cache.buffer.nbytes == cache_bytes(model, 2, 3, 20)
    one = cache_bytes(model, 2, 1, 20) / 1e9
    assert [rows_that_fit(model, 2, 20, one * factor, most=4) for factor in (1.001, 3.5, 100)] == [1, 3, 4]
    with pytest.raises(UsageError, match=r"kv_budget_gb .* 20 positions at 2 ACT steps"):
        rows_that_fit(model, 2, 20, one * 0.999, most=4)


def test_a_request_that_does_not_fit_is_refused(tiny_model: ModelFactory) -> None:
    engine = Engine(tiny_model(), eos_id=NEVER, act_steps=2, rows=1, positions=8)
    (prompt,) = make_prompts((5,))
    for request in (Request(prompt, 5), Request(prompt, 0), Request(prompt, 1, act_steps=3), Request(make_prompts((0,))[0], 1)):
        with pytest.raises(ValueError):
            engine.submit(request)
    engine.submit(Request(prompt, 4))
    assert engine.waiting == 1


def test_each_new_token_costs_one_position_whatever_came_before(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = tiny_model(), []
    real = RecursiveModel.act_step

    def spy(self: RecursiveModel, states: object, x_BTD: torch.Tensor, *rest: object) -> object:
        widths.append(x_BTD.shape[:-1].numel())
        return real(self, states, x_BTD, *rest)

    monkeypatch.setattr(RecursiveModel, "act_step", spy)
    decode(model, requests_for(make_prompts((8,)), 5), act_steps=3)
    assert widths == [8] * 3 + [1] * 3 * 4


def test_tokens_that_halt_early_cost_fewer_ticks(tiny_model: ModelFactory) -> None:
    model = tiny_model("arch.halt_max_steps=6", halt_scale=3.0)
    for request in requests_for(make_prompts(UNEVEN), 12, halt_threshold=0.5):
        engine = Engine(model, eos_id=NEVER, act_steps=6, rows=1, positions=24)
        engine.submit(request)
        ticks, tokens = 0, []
        while engine.busy:
            tokens += engine.tick()
            ticks += 1
        # The first token comes of the prompt, which takes all steps in the first tick.
        assert ticks == sum(token.act_steps for token in tokens[1:])
        if ticks < 6 * 11:
            return
    pytest.fail("no token halted early: the test means nothing")
