"""Choosing a token: the distribution is the stated one, ties go to the lowest id, and a row never feels its neighbours."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import generation.sampling
from config.errors import UsageError
from generation.sampling import Sampler, Sampling, _uniform
from models.losses import log_probs

LOSSES = ["stablemax", "softmax"]


def chosen_ids(logits: Sequence[float], sampling: Sampling, count: int, *, sample: int = 0, loss: str = "softmax") -> list[int]:
    """The tokens of an answer whose logits never change."""
    sampler = Sampler(1, len(logits), loss, "cpu")
    sampler.admit(0, sampling, sample, [])
    row, logits_1v = torch.tensor([0]), torch.tensor([logits])
    return [int(sampler.choose(row, logits_1v).ids_R) for _ in range(count)]


def plain_distribution(logits: Sequence[float], sampling: Sampling, seen: set[int], loss: str) -> list[float]:
    """Straight from the definitions, one token at a time."""
    if sampling.repetition_penalty != 1:
        by = sampling.repetition_penalty
        logits = [(v / by if v > 0 else v * by) if i in seen else v for i, v in enumerate(logits)]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if sampling.temperature == 0:
        return [float(i == order[0]) for i in range(len(logits))]
    logp = log_probs(torch.tensor(logits, dtype=torch.float64), loss).tolist()
    p = [math.exp((v - max(logp)) / sampling.temperature) for v in logp]
    kept = order[: sampling.top_k]
    if sampling.top_p < 1:
        mass = math.fsum(p[i] for i in kept)
        size = next(n for n in range(1, len(kept) + 1) if math.fsum(p[i] for i in kept[:n]) >= sampling.top_p * mass)
        kept = kept[:size]
    kept = [i for i in kept if p[i] >= sampling.min_p * max(p)]
    total = math.fsum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 2.7, 1e300]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.sampled_from([1e-12, 0.1317, 0.6931, 0.9517, 1.0]),
    min_p=st.sampled_from([0.0, 0.0713, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    seed=st.integers(0, 2**64 - 1),
)
# Few values, so that many are equal.
logits_of_nine = st.lists(st.sampled_from([-7.5, -1.0, 0.0, 0.25, 1.0, 3.0]), min_size=9, max_size=9)


@pytest.mark.parametrize("loss", LOSSES)
@given(logits=st.lists(logits_of_nine, min_size=1, max_size=4), sampling=samplings, prompt=st.lists(st.integers(0, 8), max_size=4))
@settings(max_examples=100)
def test_a_token_is_where_the_uniform_falls_in_the_stated_distribution(
    loss: str, logits: list[list[float]], sampling: Sampling, prompt: list[int]
) -> None:
    sampler = Sampler(1, 9, loss, "cpu")
    sampler.admit(0, sampling, 3, prompt)
    seen = set(prompt)
    for number, row in enumerate(logits):
        chosen = sampler.choose(torch.tensor([0]), torch.tensor([row], dtype=torch.float64), with_logp=True)
        token = int(chosen.ids_R)
        p = plain_distribution(row, sampling, seen, loss)
        uniform = _uniform(sampling.seed, 3, number)
        below = math.fsum(p[:token])
        assert p[token] > 0 and below - 1e-12 <= uniform * (sampling.temperature > 0) <= below + p[token] + 1e-12
        model_logp = log_probs(torch.tensor([row], dtype=torch.float64), loss)
        assert torch.equal(chosen.logp_RV, model_logp) and chosen.logp_R.item() == model_logp[0, token].item()
        seen.add(token)


@given(
    data=st.data(),
    loss=st.sampled_from(LOSSES),
    vocab_size=st.sampled_from([2, 7, 33, 259]),
    answers=st.lists(st.tuples(samplings, st.integers(0, 3)), min_size=1, max_size=5),
)
@settings(max_examples=75)
def test_a_row_never_feels_the_others(data: st.DataObject, loss: str, vocab_size: int, answers: list[tuple[Sampling, int]]) -> None:
    """Alone in every call, and in calls of random rows in random order: the same ids, and log p to the last bit."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, length = len(answers), 3
    logits = torch.from_numpy(rng.normal(0, 4, (rows, length, vocab_size)))
    prompts = rng.integers(0, vocab_size, (rows, 2))
    alone = []
    for row, (sampling, sample) in enumerate(answers):
        sampler = Sampler(1, vocab_size, loss, "cpu")
        sampler.admit(0, sampling, sample, prompts[row])
        alone.append([sampler.choose(torch.tensor([0]), logits[row, t : t + 1]) for t in range(length)])
    together = Sampler(rows, vocab_size, loss, "cpu")
    for row, (sampling, sample) in enumerate(answers):
        together.admit(row, sampling, sample, prompts[row].tolist())
    done = np.zeros(rows, np.int64)
    while (done < length).any():
        open_rows = rng.permutation(np.flatnonzero(done < length))
        called = open_rows[: int(rng.integers(1, len(open_rows) + 1))]
        chosen = together.choose(torch.from_numpy(called), logits[called, done[called]])
        for i, row in enumerate(called):
            expected = alone[row][done[row]]
            assert chosen.ids_R[i] == expected.ids_R[0] and chosen.logp_R[i] == expected.logp_R[0]
        done[called] += 1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.6, top_k=4, top_p=0.9, seed=6),
        Sampling(temperature=1.7, min_p=0.2, seed=7),
    ],
)
def test_many_draws_come_close_to_the_distribution(sampling: Sampling, loss: str) -> None:
    logits = [1.5, -0.5, 0.0, 2.0, 0.7, -3.0]
    draws = 2000
    counts = np.bincount(chosen_ids(logits, sampling, draws, loss=loss), minlength=len(logits))
    expected = draws * np.array(plain_distribution(logits, sampling, set(), loss))
    possible = expected > 0
    assert counts[~possible].sum() == 0 and possible.sum() >= 2
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # The 99.9 % quantile of chi-square at the most degrees of freedom here, 5.
    assert chi_square < 20.5


def test_uniforms_fill_the_unit_interval_for_every_kind_of_key() -> None:
    for keys in ([(7, 0, n) for n in range(2000)], [(7, n, 0) for n in range(2000)], [(n, 0, 0) for n in range(2000)]):
        values = np.sort([_uniform(*key) for key in keys])
        assert values[0] >= 0 and values[-1] < 1 and len(set(values)) == len(keys)
        # Kolmogorov and Smirnov's distance, 99.9 % quantile.
        assert np.abs(values - np.arange(len(values)) / len(values)).max() < 1.95 / math.sqrt(len(values))


def test_draws_are_keyed_by_seed_sample_and_number_of_the_token() -> None:
    logits = [0.0] * 1000
    first = chosen_ids(logits, Sampling(temperature=1.0, seed=3), 20)
    assert first == chosen_ids(logits, Sampling(temperature=1.0, seed=3), 20)
    others = [
        chosen_ids(logits, Sampling(temperature=1.0, seed=3), 20, sample=1),
        chosen_ids(logits, Sampling(temperature=1.0, seed=4), 20),
    ]
    assert len({tuple(ids) for ids in [first, *others]}) == 3 and len(set(first)) > 15


@pytest.mark.parametrize(
    ("logits", "sampling", "lowest", "highest"),
    [
        ([-9.0, 0.0, 1.0, -9.0], Sampling(temperature=1.0, top_k=2), 1, 2),
        ([-9.0, 0.0, 1.0, -9.0], Sampling(temperature=1.0, min_p=0.2), 1, 2),
        ([-9.0, 0.0, 1.0, -9.0], Sampling(temperature=1.0), 0, 3),
        # A sum of probabilities doesn't feel the first id, top-k=2 keeps it all the same.
        ([-50.0, 0.0, -60.0], Sampling(temperature=1.0, top_k=2), 0, 1),
    ],
)
def test_the_ends_of_the_unit_interval(
    monkeypatch: pytest.MonkeyPatch, logits: list[float], sampling: Sampling, lowest: int, highest: int
) -> None:
    for uniform, expected in ((0.0, lowest), (1 - 2.0**-53, highest)):
        monkeypatch.setattr(generation.sampling, "_uniform", lambda *key, uniform=uniform: uniform)
        assert chosen_ids(logits, sampling, 1) == [expected]


def test_admission_begins_anew() -> None:
    sampler, logits = Sampler(2, 50, "softmax", "cpu"), torch.zeros(1, 50)
    sampling = Sampling(temperature=1.0, repetition_penalty=5.0, seed=1)

    def answer() -> list[int]:
        sampler.admit(1, sampling, 0, [3])
        return [int(sampler.choose(torch.tensor([1]), logits + 1).ids_R) for _ in range(10)]

    first = answer()
    assert answer() == first, "neither the count of tokens nor the ids seen outlive an answer"


def test_the_penalty_counts_prompt_and_answer_and_leaves_log_p_alone() -> None:
    sampler = Sampler(1, 4, "softmax", "cpu")
    sampler.admit(0, Sampling(repetition_penalty=2.0), 0, [0])
    logits = torch.tensor([[3.0, 2.0, 1.9, -4.0]])
    chosen = [sampler.choose(torch.tensor([0]), logits) for _ in range(4)]
    # 0 counts 1.5 from the prompt on; 1 counts 1.0 and 2 counts 0.95 once they were said.
    assert [int(c.ids_R) for c in chosen] == [1, 2, 0, 0]
    assert chosen[2].logp_R.item() == torch.log_softmax(logits, -1)[0, 0].item()
    negative = Sampler(1, 2, "softmax", "cpu")
    negative.admit(0, Sampling(repetition_penalty=2.0), 0, [0])
    assert int(negative.choose(torch.tensor([0]), torch.tensor([[-1.0, -1.5]])).ids_R) == 1, "a penalty never raises a logit"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1.0, 1e30, 1.7e308])
@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 5e-324}, {"top_p": 1e-9}])
def test_cuts_that_leave_one_token_leave_the_greedy_one(loss: str, temperature: float, cut: dict[str, float]) -> None:
    rng = torch.Generator().manual_seed(0)
    # Rounded to bfloat16 first: many equal logits, also the highest.
    logits = (8 * torch.randn(20, 4000, generator=rng)).bfloat16().clamp(max=20).float()
    sampler = Sampler(20, 4000, loss, "cpu")
    greedy = sampler.choose(torch.arange(20), logits).ids_R
    assert (logits == logits.amax(-1, keepdim=True)).sum() > 40
    assert greedy.tolist() == [row.tolist().index(max(row.tolist())) for row in logits]
    for row in range(20):
        sampler.admit(row, Sampling(temperature=temperature, seed=row, **cut), 0, [])
    assert torch.equal(sampler.choose(torch.arange(20), logits).ids_R, greedy)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(temperature=1.0, top_k=3), [0, 1, 2]),
        (Sampling(temperature=1.0, top_k=99), list(range(8))),
        (Sampling(temperature=1.0, top_p=0.5), [0, 1, 2, 3]),
        (Sampling(temperature=1.0, top_k=4, top_p=0.5), [0, 1]),
        (Sampling(temperature=1.0, min_p=1.0), list(range(8))),
        (Sampling(temperature=1e-300), list(range(8))),
        (Sampling(temperature=0.0, top_k=5), [0]),
    ],
)
def test_of_equal_logits_cuts_keep_the_lowest_ids(sampling: Sampling, possible: list[int]) -> None:
    assert sorted(set(chosen_ids([1.0] * 8, sampling, 200))) == possible


def test_extreme_temperatures() -> None:
    logits = [0.0, 5.0, -5.0, 4.999]
    assert set(chosen_ids(logits, Sampling(temperature=1e-320), 50)) == {1}
    assert set(chosen_ids(logits, Sampling(temperature=1e308), 200)) == {0, 1, 2, 3}
    assert set(chosen_ids(logits, Sampling(temperature=1e308, top_k=2), 100)) == {1, 3}, (
        "ranks outlive what temperature makes equal"
    )
    assert set(chosen_ids(logits, Sampling(temperature=1.0, min_p=1.0), 50)) == {1}


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_logits_are_taken_as_float32(loss: str) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1)).bfloat16()
    given_as = []
    for form in (logits, logits.float()):
        sampler = Sampler(3, 100, loss, "cpu")
        for row in range(3):
            sampler.admit(row, Sampling(temperature=0.8, top_p=0.9), row, [])
        given_as.append(sampler.choose(torch.arange(3), form, with_logp=True))
    ours, expected = given_as
    assert torch.equal(ours.ids_R, expected.ids_R) and torch.equal(ours.logp_R, expected.logp_R)
    assert ours.logp_RV is not None and ours.logp_RV.dtype == torch.float32
    assert torch.equal(ours.logp_RV, log_probs(logits.float(), loss))


def test_work_nobody_needs_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def watch(name: str) -> None:
        real = getattr(generation.sampling, name)

        def call(*arguments: Tensor) -> Tensor:
            calls.append(name)
            result: Tensor = real(*arguments)
            return result

        monkeypatch.setattr(generation.sampling, name, call)

    for name in ("log_probs", "argmax", "_descending", "_penalized", "_weights", "_uniform"):
        watch(name)
    sampler, rows, logits = Sampler(2, 10, "softmax", "cpu"), torch.arange(2), torch.randn(2, 10, requires_grad=True)
    sampler.admit(0, Sampling(top_k=3, top_p=0.5), 0, [1])
    chosen = sampler.choose(rows, logits)
    assert calls == ["log_probs", "argmax"] and chosen.logp_RV is None and not chosen.logp_R.requires_grad
    calls.clear()
    sampler.admit(1, Sampling(temperature=1.0, min_p=0.1), 0, [1])
    sampler.choose(rows, logits)
    assert calls == ["log_probs", "_uniform", "argmax", "_weights"], "no sort without a cut by rank, no uniform for a greedy row"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-0.1, math.inf, math.nan)],
        *[("top_k", v) for v in (0, -1)],
        *[("top_p", v) for v in (0.0, 1.1, math.nan)],
        *[("min_p", v) for v in (-0.1, 1.1, math.nan)],
        *[("repetition_penalty", v) for v in (0.0, -1.0, math.inf, math.nan)],
        *[("seed", v) for v in (-1, 2**64)],
    ],
)
def test_values_out_of_range_are_told(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} must be .*, found {value}"):
        Sampling(**{name: value})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_gpu_chooses_the_same(loss: str) -> None:
    logits = torch.randn(6, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ids = []
    for device in ("cpu", "cuda"):
        sampler = Sampler(6, 3000, loss, device)
        for row in range(5):
            sampler.admit(row, Sampling(row * 0.5, (None, 40)[row % 2], (1.0, 0.8)[row // 2 % 2], 0.01, 1.1, seed=row), 0, [1, 2])
        ids.append([sampler.choose(torch.arange(6), logits.roll(t, 1).to(device)).ids_R.tolist() for t in range(5)])
    assert ids[0] == ids[1]
