"""The order of examples: every row as often as its stage asks, by shares, the same from any place on."""

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import UsageError
from config.schema import StageConfig
from dataset.text.curriculum import Curriculum, Draw, Stage, permutation


def stage(mix: dict[str, float | None], **length: int) -> StageConfig:
    return StageConfig(mix=mix, **length)


def planned(*stages: StageConfig, seed: int = 0, **sizes: int) -> Curriculum:
    return Curriculum.of_stages(stages, sizes, seed)


curricula = st.builds(
    lambda seed, sizes, stages: Curriculum(seed, sizes, tuple(Stage(rounds, quotas) for rounds, quotas in stages)),
    st.integers(0, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.tuples(st.integers(1, 3), st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(any)), min_size=1, max_size=3),
)


@given(curricula)
def test_rows_of_a_source_take_turns_and_no_draw_repeats(curriculum: Curriculum) -> None:
    draws = list(curriculum.draws())
    assert len(draws) == len(set(draws)) == curriculum.total
    assert [draw.stage for draw in draws] == sorted(draw.stage for draw in draws)
    for number, stage in enumerate(curriculum.stages):
        of_stage = [draw for draw in draws if draw.stage == number]
        for source, quota in enumerate(stage.quotas):
            begin, size = sum(curriculum.sizes[:source]), curriculum.sizes[source]
            own = [draw for draw in of_stage if begin <= draw.example_id < begin + size]
            assert len(own) == quota * stage.rounds
            assert [draw.epoch for draw in own] == [k // size for k in range(len(own))]
            for epoch in range(len(own) // size):
                assert sorted(d.example_id - begin for d in own if d.epoch == epoch) == list(range(size)), "each row once a pass"
        for taken in range(stage.rounds):
            part = of_stage[taken * stage.per_round : (taken + 1) * stage.per_round]
            of_first = sum(draw.example_id < curriculum.sizes[0] for draw in part)
            assert (of_first, len(part) - of_first) == stage.quotas, "shares hold in every round"


@given(curricula, st.data())
def test_the_order_goes_on_from_any_place_and_knows_its_stage(curriculum: Curriculum, data: st.DataObject) -> None:
    draws = list(curriculum.draws())
    start = data.draw(st.integers(0, curriculum.total))
    assert list(curriculum.draws(start)) == draws[start:]
    assert curriculum.stage_of(start) == (draws[start].stage if start < len(draws) else len(curriculum.stages) - 1)
    assert curriculum.begin_of(curriculum.stage_of(start)) == next(
        i for i, draw in enumerate(draws) if draw.stage == curriculum.stage_of(start)
    )
    ends = np.cumsum([stage.per_round for stage in curriculum.stages for _ in range(stage.rounds)])
    assert curriculum.rounds_before(start) == np.count_nonzero(ends <= start)


def test_a_run_without_stages_keeps_its_order() -> None:
    """What a run of earlier versions was trained on: ids and epochs of two permutations keyed by (seed, epoch)."""
    draws = list(Curriculum.of_epochs(8, 0, 2).draws())
    assert [draw.example_id for draw in draws[:8]] == [0, 2, 1, 5, 4, 3, 6, 7]
    assert draws == [Draw(0, epoch, int(i)) for epoch in range(2) for i in permutation(8, 0, epoch)]
    assert draws == list(planned(stage({"a": None}, epochs=2), a=8).draws())


def test_stages_sources_and_seeds_have_orders_of_their_own() -> None:
    keys: list[dict[str, Any]] = [{}, {"stage": 1}, {"source": 1}, {"kind": 1}, {"stage": 1, "source": 1}]
    orders = {tuple(permutation(50, seed, epoch, **key)) for seed in (0, 1) for epoch in (0, 1) for key in keys}
    assert len(orders) == 2 * 2 * len(keys)
    first, second = (list(planned(stage({"a": 1, "b": 1}, epochs=1), seed=seed, a=30, b=30).draws()) for seed in (0, 1))
    assert [draw.example_id < 30 for draw in first] != [draw.example_id < 30 for draw in second], "the mixing is drawn, too"
    assert [draw.example_id < 30 for draw in first] != sorted(draw.example_id < 30 for draw in first)


@pytest.mark.parametrize(
    ("asked", "quotas"),
    [
        (stage({"a": 1}, epochs=3), (10, 0)),
        (stage({"a": None, "b": None}, epochs=1), (10, 40)),
        (stage({"a": 1, "b": 1}, epochs=1), (40, 40)),
        (stage({"a": 0.1, "b": 0.9}, epochs=1), (10, 90)),
        (stage({"a": 0.3, "b": 0.7}, examples=10), (3, 7)),
        (stage({"a": 1, "b": 2}, examples=100), (33, 67)),
        (stage({"b": 5}, examples=7), (0, 7)),
    ],
)
def test_shares_become_whole_examples(asked: StageConfig, quotas: tuple[int, int]) -> None:
    (got,) = planned(asked, a=10, b=40).stages
    assert got == Stage(asked.epochs or 1, quotas)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.one_of(st.floats(0.01, 50), st.integers(1, 9))), min_size=1, max_size=4),
)
def test_an_epoch_of_a_mix_leaves_no_row_out(sources: list[tuple[int, float]]) -> None:
    sizes = {str(name): size for name, (size, _) in enumerate(sources)}
    mix: dict[str, float | None] = {str(name): weight for name, (_, weight) in enumerate(sources)}
    curriculum = planned(stage(mix, epochs=1), **sizes)
    assert all(quota >= size for quota, size in zip(curriculum.stages[0].quotas, curriculum.sizes, strict=True))
    if curriculum.total < 5000:
        assert Counter(draw.example_id for draw in curriculum.draws()).keys() == set(range(sum(sizes.values())))


def test_a_share_that_gives_no_example_is_told() -> None:
    with pytest.raises(UsageError, match=r"stages\[1\]: 10 examples leave none for b"):
        planned(stage({"a": 1}, epochs=1), stage({"a": 1, "b": 0.001}, examples=10), a=5, b=5)


def test_going_on_late_does_not_draw_what_lies_before(monkeypatch: pytest.MonkeyPatch) -> None:
    curriculum = planned(stage({"a": 1}, epochs=5), stage({"b": 1}, epochs=5), a=100, b=100)
    made: list[tuple[int, int]] = []
    original = Curriculum._round

    def counted(self: Curriculum, number: int, taken: int) -> Any:
        made.append((number, taken))
        return original(self, number, taken)

    monkeypatch.setattr(Curriculum, "_round", counted)
    assert next(islice(curriculum.draws(720), 1)).stage == 1 and made == [(1, 2)]
