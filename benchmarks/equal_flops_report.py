"""The table of benchmarks/equal_flops.py, with conclusions. Knows results, not models or training.

Every arm is compared with the best plain Transformer. If seeds overlap or the interval over rows
contains zero, there is no difference.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from benchmarks.common import markdown_table
from config.errors import UsageError

Floats = npt.NDArray[np.float64]

# Fewer seeds than this allow no conclusion.
CLAIM_SEEDS = 3
_DRAWS = 2000


class Interval(NamedTuple):
    """A difference and its 95 % interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(ours: Floats, theirs: Floats, *, is_relative: bool, seed: int = 0) -> Interval:
    """The difference of two arms' means over rows, and its 95 % interval over draws of rows, the
    same for both.

    ours, theirs: [seeds, rows], averaged over seeds. is_relative: as a fraction of theirs.
    """
    means = np.stack([ours.mean(0), theirs.mean(0)])
    rows = means.shape[1]
    # The fraction of each draw that is each row: [draws, rows].
    shares = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=_DRAWS) / rows

    def difference(mean: Floats) -> Floats:
        gap: Floats = mean[0] - mean[1]
        return gap / mean[1] if is_relative else gap

    low, high = np.percentile(difference(means @ shares.T), (2.5, 97.5))
    return Interval(float(difference(means.mean(1))), float(low), float(high))


def verdict(ours: Sequence[float], theirs: Sequence[float], interval: Interval) -> str:
    """The verdict from each seed's values and the interval: open, none, lower or higher."""
    if min(len(ours), len(theirs)) < CLAIM_SEEDS:
        return "open"
    if min(ours) <= max(theirs) and min(theirs) <= max(ours):
        return "none"
    if interval.low <= 0 <= interval.high:
        return "none"
    return "lower" if interval.difference < 0 else "higher"


def loop_exponent(looped: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]], seed: int = 0) -> Interval | None:
    """How many copies of its own blocks r uses of them are worth: r to the power of this exponent.

    looped: the seeds of a network that uses its blocks r times. plain: results of plain networks of
    several sizes, to which loss = a * parameters^-b is fitted. The 95 % interval is over draws of
    seeds and rows. None if the fit has b <= 0 in more draws than the interval leaves out: then more
    blocks don't help, and there is nothing to be worth. Law: arXiv 2604.21106.
    """
    sizes: dict[float, list[Mapping[str, Any]]] = {}
    for result in sorted(plain, key=lambda result: float(result["parameters_core"])):
        sizes.setdefault(result["parameters_core"], []).append(result)
    arms = [looped, *sizes.values()]
    bits = [np.array([result["row_bits"] for result in arm], float) for arm in arms]
    size = np.log([arm[0]["parameters_core"] for arm in arms])
    rows = bits[0].shape[1]
    generator = np.random.default_rng(seed)

    def exponent(shares: Floats, seeds: Sequence[npt.NDArray[np.intp]]) -> float:
        loss = np.log([(arm[drawn] @ shares).mean() for arm, drawn in zip(bits, seeds, strict=True)])
        slope, level = np.polyfit(size[1:], loss[1:], 1)
        return float(((loss[0] - level) / slope - size[0]) / np.log(looped[0]["uses"])) if slope < 0 else np.nan

    draws = np.array(
        [
            exponent(
                generator.multinomial(rows, np.full(rows, 1 / rows)) / rows,
                [generator.integers(len(arm), size=len(arm)) for arm in bits],
            )
            for _ in range(_DRAWS)
        ]
    )
    if np.isnan(draws).mean() > 0.025:
        return None
    value = exponent(np.full(rows, 1 / rows), [np.arange(len(arm)) for arm in bits])
    return Interval(value, *np.nanpercentile(draws, (2.5, 97.5)).tolist())


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every arm over its seeds, compared with the best plain Transformer. Raises UsageError if arms
    had different rows.
    """
    if len({(result["texts"], *result["row_bytes"], len(result.get("row_exact", ()))) for result in results}) > 1:
        raise UsageError(
            "the results are of different rows, or of rows that are cut at different places (dataset.seq_len): they can't be "
            "compared; give every arm the same data and room for all of it"
        )
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    plain = [name for name, seeds in arms.items() if seeds[0]["is_plain"]]
    best = min(plain, key=lambda name: _by_step(arms[name], "bits_per_byte")[:, -1].mean(), default=None)
    return {
        "best_plain": best,
        "rows": len(results[0]["row_bits"]),
        "arms": [
            _summary(name, seeds, arms[best] if best is not None and name != best else None)
            | {"exponent": _exponent_among(seeds, [arms[of] for of in plain])}
            for name, seeds in arms.items()
        ],
    }


def _exponent_among(seeds: Sequence[Mapping[str, Any]], plain: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float] | None:
    """`loop_exponent`, of each size's best plain network; None where it isn't defined."""
    best: dict[float, Sequence[Mapping[str, Any]]] = {}
    for arm in sorted(plain, key=lambda arm: -_by_step(arm, "bits_per_byte")[:, -1].mean()):
        best[arm[0]["parameters_core"]] = arm
    # Results of earlier versions don't say how often a network uses its blocks.
    if seeds[0].get("uses", 1) < 2 or seeds[0]["parameters_core"] not in best or len(best) < 2:
        return None
    found = loop_exponent(seeds, [result for arm in best.values() for result in arm])
    return found and found._asdict()


def _by_step(seeds: Sequence[Mapping[str, Any]], measure: str) -> Floats:
    """A metric [seeds, ACT steps]."""
    return np.array([[step[measure] for step in result["by_act_step"]] for result in seeds], float)


def _summary(name: str, seeds: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    numbers = ("parameters_core", "parameters", "flops", "seconds", "steps", "rows")
    measures = {}
    for measure in seeds[0]["by_act_step"][0]:
        values = _by_step(seeds, measure)
        least, most = values[:, -1].min().item(), values[:, -1].max().item()
        deviation = values[:, -1].std(ddof=1).item() if len(seeds) > 1 else None
        measures[measure] = {"by_act_step": values.mean(0).tolist(), "least": least, "most": most, "deviation": deviation}
    found: dict[str, Any] = {
        "arm": name,
        "seeds": [result["seed"] for result in seeds],
        **{key: statistics.fmean(result[key] for result in seeds) for key in numbers},
        "token": {key: statistics.fmean(result["token"][key] for result in seeds) for key in ("flops", "ms")},
        "measures": measures,
    }
    if best is not None:
        found["against_best_plain"] = {"bits_per_byte": _against(seeds, best, "bits_per_byte", "row_bits", is_relative=True)}
        if "row_exact" in seeds[0]:
            found["against_best_plain"]["exact"] = _against(seeds, best, "exact", "row_exact", is_relative=False)
    return found


def _against(
    seeds: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]], measure: str, of_rows: str, *, is_relative: bool
) -> dict[str, Any]:
    ours, theirs = (np.array([result[of_rows] for result in arm], float) for arm in (seeds, best))
    interval = paired_bootstrap(ours, theirs, is_relative=is_relative)
    final, of_best = (_by_step(arm, measure)[:, -1].tolist() for arm in (seeds, best))
    return {**interval._asdict(), "verdict": verdict(final, of_best, interval)}


def markdown(found: Mapping[str, Any]) -> str:
    """The table, and how to read it."""
    amount, unit = found["budget"]
    spent = f"{amount / 1e12:g} x 10^12 FLOPs" if unit == "FLOPs" else f"{amount:,.9g} {unit}"
    best = found["best_plain"]
    lines = [
        f"Each arm was trained for {spent} and measured on {found['rows']} held-out rows at each ACT step: the mean of its seeds,",
        "and in brackets their extremes at the deepest step. Differences are at the deepest step, with 95 % intervals over rows",
        f"(paired bootstrap). none: the seeds overlap, or the interval holds zero. open: fewer than {CLAIM_SEEDS} seeds.",
    ]
    has_exponents = any(arm["exponent"] for arm in found["arms"])
    if has_exponents:
        lines.append("Exponent e: r uses of the same blocks are worth r^e copies, by a power law through the plain networks.")
    rows = []
    for arm in found["arms"]:
        measures, against = arm["measures"], arm.get("against_best_plain", {})
        bits = measures["bits_per_byte"]["by_act_step"]
        row = {
            "arm": arm["arm"],
            "seeds": str(len(arm["seeds"])),
            "parameters: core, all": f"{arm['parameters_core']:,.0f}, {arm['parameters']:,.0f}",
            "TFLOPs": f"{arm['flops'] / 1e12:.2f}",
            **{key: f"{arm[key]:,.0f}" for key in ("seconds", "steps", "rows")},
            "nats a token": _values(measures["nats"], 1, 4),
            "bits a byte": _values(measures["bits_per_byte"], 1, 4),
            "exact, %": _values(measures["exact"], 100, 1) if "exact" in measures else "",
            "bits at the deepest ACT step against the first, %": f"{100 * (bits[-1] / bits[0] - 1):+.1f}" if len(bits) > 1 else "",
        }
        if best:
            row[f"bits against {best}, %"] = _difference(against.get("bits_per_byte"))
            row[f"exact against {best}, points"] = _difference(against.get("exact"))
        if has_exponents:
            exponent = arm["exponent"]
            row["exponent of its uses"] = "{difference:.2f} [{low:.2f}, {high:.2f}]".format(**exponent) if exponent else ""
        rows.append(row | {"a generated token: MFLOPs, ms": f"{arm['token']['flops'] / 1e6:.2f}, {arm['token']['ms']:.2f}"})
    return "\n".join([*lines, "", *markdown_table(rows)])


def _values(measure: Mapping[str, Any], scale: float, decimals: int) -> str:
    steps = ", ".join(f"{scale * value:.{decimals}f}" for value in measure["by_act_step"])
    return f"{steps} ({scale * measure['least']:.{decimals}f} to {scale * measure['most']:.{decimals}f})"


def _difference(against: Mapping[str, Any] | None) -> str:
    if against is None:
        return ""
    numbers = [f"{100 * against[key]:+.1f}" for key in ("difference", "low", "high")]
    return f"{against['verdict']}: {numbers[0]} [{numbers[1]}, {numbers[2]}]"


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot held-out loss against FLOPs to `path`: each arm's mean and range over seeds."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(result["arm"] for result in results)):
        flops, _, nats = np.array([result["curve"] for result in results if result["arm"] == name]).transpose(2, 0, 1)
        is_plain = any(result["is_plain"] for result in results if result["arm"] == name)
        axes.plot(
            flops.mean(0) / 1e12, nats.mean(0), color=f"C{number}", marker=".", linestyle="--" if is_plain else "-", label=name
        )
        axes.fill_between(flops.mean(0) / 1e12, nats.min(0), nats.max(0), color=f"C{number}", alpha=0.15, linewidth=0)
    axes.set_xlabel("training, 10^12 FLOPs")
    axes.set_ylabel("held-out nats a token at the deepest ACT step")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
