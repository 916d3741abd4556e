"""What is concluded from measured arms: intervals over rows, the spread of seeds, the table (benchmarks/equal_flops_report.py)."""

from typing import Any

import numpy as np
import pytest

from benchmarks.equal_flops_report import Interval, draw, loop_exponent, markdown, paired_bootstrap, summarize, verdict
from config.errors import UsageError

ROWS = 400
TEXTS = np.random.default_rng(7).uniform(10, 30, ROWS)


def result(arm: str, seed: int, bits: float, exact: float, *, is_plain: bool = False, depths: int = 1) -> dict[str, Any]:
    """An arm that needs so many bits a byte at its deepest ACT step, twice as many at the others."""
    noise = np.random.default_rng(seed).normal(1, 0.01, ROWS)
    row_bits = bits * TEXTS * noise * (TEXTS.sum() / (TEXTS * noise).sum())
    row_exact = [int(row < exact * ROWS) for row in range(ROWS)]
    last = {"nats": bits / 2, "bits_per_byte": bits, "exact": sum(row_exact) / ROWS}
    return {
        "arm": arm,
        "seed": seed,
        "is_plain": is_plain,
        "texts": "t",
        "parameters_core": 1000,
        "parameters": 2000,
        "flops": 2e12,
        "seconds": 60.0,
        "steps": 100,
        "rows": 1600,
        "curve": [(1e12, 30.0, bits), (2e12, 60.0, bits / 2)],
        "by_act_step": [{name: 2 * value for name, value in last.items()}] * (depths - 1) + [last],
        "row_bits": row_bits.tolist(),
        "row_bytes": TEXTS.tolist(),
        "row_exact": row_exact,
        "token": {"flops": 3e6, "ms": 1.5},
        "uses": 1,
    }


def several(arm: str, bits: list[float], exact: float, **more: Any) -> list[dict[str, Any]]:
    return [result(arm, seed, of_seed, exact, **more) for seed, of_seed in enumerate(bits)]


def test_the_interval_is_that_of_pairs() -> None:
    """Rows differ much more than arms do on the same row; the interval is the one that theory gives of the differences."""
    generator = np.random.default_rng(0)
    theirs = generator.normal(100, 30, (2, 1000))
    ours = theirs - 1 + generator.normal(0, 2, (2, 1000))
    found = paired_bootstrap(ours, theirs, is_relative=False)
    gaps = (ours - theirs).mean(0)
    assert found.difference == pytest.approx(gaps.mean())
    half = 1.96 * gaps.std() / np.sqrt(1000)
    assert [found.low, found.high] == pytest.approx([gaps.mean() - half, gaps.mean() + half], abs=0.02)
    relative = paired_bootstrap(ours, theirs, is_relative=True)
    assert relative == pytest.approx([value / theirs.mean() for value in found], rel=0.03)
    assert paired_bootstrap(ours, theirs, is_relative=True) == relative


@pytest.mark.parametrize(
    ("ours", "theirs", "interval", "expected"),
    [
        ([0.8, 0.81, 0.82], [0.9, 0.91, 0.92], (-0.1, -0.12, -0.08), "lower"),
        ([0.9, 0.91, 0.92], [0.8, 0.81, 0.82], (0.1, 0.08, 0.12), "higher"),
        # One seed of ours is as bad as one of theirs.
        ([0.8, 0.81, 0.9], [0.9, 0.91, 0.92], (-0.1, -0.12, -0.08), "none"),
        ([0.8, 0.9, 1.0], [0.85, 0.86, 0.87], (0.05, 0.04, 0.06), "none"),
        ([0.8, 0.81, 0.82], [0.9, 0.91, 0.92], (-0.1, -0.22, 0.02), "none"),
        ([0.8, 0.81], [0.9, 0.91, 0.92], (-0.1, -0.12, -0.08), "open"),
        ([0.8, 0.81, 0.82], [0.9], (-0.1, -0.12, -0.08), "open"),
    ],
)
def test_a_difference_within_the_spread_is_none(
    ours: list[float], theirs: list[float], interval: tuple[float, float, float], expected: str
) -> None:
    assert verdict(ours, theirs, Interval(*interval)) == expected


def test_arms_are_held_against_the_best_plain_transformer() -> None:
    results = [
        *several("deep", [0.9, 0.89, 0.91], 0.75, depths=2),
        *several("plain_2", [1.5, 1.5, 1.5], 0.5, is_plain=True),
        *several("plain_4", [1.0, 0.99, 1.01], 0.5, is_plain=True),
        *several("same", [0.98, 1.0, 1.03], 0.5),
    ]
    found = {"budget": [2e12, "FLOPs"], **summarize(results)}
    deep, plain_2, plain_4, same = found["arms"]
    assert (found["best_plain"], found["rows"]) == ("plain_4", ROWS) and "against_best_plain" not in plain_4
    bits = dict(deep["measures"]["bits_per_byte"])
    assert bits.pop("by_act_step") == pytest.approx([1.8, 0.9])
    assert bits == pytest.approx({"least": 0.89, "most": 0.91, "deviation": 0.01})
    against = deep["against_best_plain"]
    assert against["bits_per_byte"]["verdict"] == "lower" and against["exact"]["verdict"] == "higher"
    assert against["bits_per_byte"]["difference"] == pytest.approx(-0.1, abs=1e-6)
    assert against["exact"]["difference"] == pytest.approx(0.25)
    assert plain_2["against_best_plain"]["bits_per_byte"]["verdict"] == "higher"
    assert same["against_best_plain"]["bits_per_byte"]["verdict"] == "none"
    table = markdown(found).splitlines()
    assert "2 x 10^12 FLOPs and measured on 400 held-out rows" in table[0]
    rows = [line for line in table if line.startswith("| deep")]
    assert len(rows) == 1 and len({line.count("|") for line in table if line.startswith("|")}) == 1
    for cell in ("1,000, 2,000", "1.8000, 0.9000 (0.8900 to 0.9100)", "150.0, 75.0 (75.0 to 75.0)", "lower: -10.0 [", "3.00, 1.50"):
        assert cell in rows[0]


def test_without_answers_there_are_none_in_the_table() -> None:
    results = [*several("deep", [0.9], 0.7), *several("plain_2", [1.5], 0.5, is_plain=True)]
    for of_seed in results:
        del of_seed["row_exact"]
        for depth in of_seed["by_act_step"]:
            depth.pop("exact")
    found = {"budget": [60.0, "seconds"], **summarize(results)}
    assert set(found["arms"][0]["against_best_plain"]) == {"bits_per_byte"}
    assert "open: -40.0 [" in markdown(found) and "for 60 seconds" in markdown(found)


def sized(results: list[dict[str, Any]], parameters: int, uses: int = 1) -> list[dict[str, Any]]:
    return [result | {"parameters_core": parameters, "uses": uses} for result in results]


def test_the_exponent_says_how_many_copies_the_uses_are_worth() -> None:
    """Twice the blocks have half the loss, and four uses of the first have that of 4 ** 0.46 copies."""
    plain_2 = sized(several("plain_2", [1.0, 1.02, 0.98], 0.5, is_plain=True), 1000)
    plain_4 = sized(several("plain_4", [0.5, 0.51, 0.49], 0.5, is_plain=True), 2000)
    poor_4 = sized(several("plain_4_pre", [3.0, 3.0, 3.0], 0.5, is_plain=True), 2000)
    worth = 4**-0.46
    looped = sized(several("four_times", [worth, worth * 1.02, worth * 0.98], 0.5, depths=4), 1000, uses=4)
    found = loop_exponent(looped, [*plain_2, *plain_4])
    assert found is not None and found.difference == pytest.approx(0.46, abs=0.01)
    assert found.low < 0.45 and found.high > 0.47 and found.high - found.low < 0.1
    # Each size is represented by its better network, and only networks that recurse have an exponent.
    summary = {"budget": [60.0, "seconds"], **summarize([*plain_2, *poor_4, *plain_4, *looped])}
    by_name = {arm["arm"]: arm["exponent"] for arm in summary["arms"]}
    assert by_name == {"plain_2": None, "plain_4_pre": None, "plain_4": None, "four_times": found._asdict()}
    assert f"| {found.difference:.2f} [{found.low:.2f}, {found.high:.2f}]" in markdown(summary)


def test_where_more_blocks_do_not_help_there_is_no_exponent() -> None:
    plain = [
        *sized(several("plain_2", [1.0, 1.1, 0.9], 0.5, is_plain=True), 1000),
        *sized(several("plain_4", [1.05, 1.0, 0.95], 0.5, is_plain=True), 2000),
    ]
    looped = sized(several("twice", [0.9, 0.9, 0.9], 0.5, depths=2), 1000, uses=2)
    assert loop_exponent(looped, plain) is None
    summary = {"budget": [60.0, "seconds"], **summarize([*plain, *looped])}
    assert "exponent of its uses" not in markdown(summary)


def test_other_rows_are_not_compared() -> None:
    first, second = result("a", 0, 1.0, 0.5), result("b", 0, 1.0, 0.5)
    summarize([first, second])
    for change in ({"texts": "other"}, {"row_bytes": [1, *TEXTS[1:]]}, {"row_exact": [1]}):
        with pytest.raises(UsageError, match="different rows"):
            summarize([first, {**second, **change}])


def test_the_picture_has_a_line_for_each_arm(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [*several("deep", [0.9, 0.8], 0.7), *several("plain_2", [1.5], 0.5, is_plain=True)]
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    draw(results, tmp_path / "figure.png")
    lines = {line.get_label(): line for line in drawn[0].get_lines()}
    assert set(lines) == {"deep", "plain_2"}
    assert lines["deep"].get_xdata() == pytest.approx([1, 2]) and lines["deep"].get_ydata() == pytest.approx([0.85, 0.425])
