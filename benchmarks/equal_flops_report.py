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
    best = min(plain, key=lambda name: statistics.fmean(_final(arms[name], "bits_per_byte")), default=None)
    return {
        "best_plain": best,
        "rows": len(results[0]["row_bits"]),
        "arms": [_summary(name, seeds, arms[best] if best is not None and name != best else None) for name, seeds in arms.items()],
    }


def _final(seeds: Sequence[Mapping[str, Any]], measure: str) -> list[float]:
    """A metric at the last ACT step, for each seed."""
    return [float(result["by_act_step"][-1][measure]) for result in seeds]


def _summary(name: str, seeds: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    first = seeds[0]
    numbers = ("parameters_core", "parameters", "flops", "seconds", "steps", "rows")
    found: dict[str, Any] = {
        "arm": name,
        "seeds": [result["seed"] for result in seeds],
        **{key: statistics.fmean(result[key] for result in seeds) for key in numbers},
        "token": {key: statistics.fmean(result["token"][key] for result in seeds) for key in ("flops", "ms")},
        "measures": {
            measure: {
                "by_act_step": [
                    statistics.fmean(result["by_act_step"][step][measure] for result in seeds)
                    for step in range(len(first["by_act_step"]))
                ],
                "least": min(_final(seeds, measure)),
                "most": max(_final(seeds, measure)),
                "deviation": statistics.stdev(values) if len(values := _final(seeds, measure)) > 1 else None,
            }
            for measure in first["by_act_step"][0]
        },
    }
    if best is not None:
        found["against_best_plain"] = {"bits_per_byte": _against(seeds, best, "bits_per_byte", "row_bits", is_relative=True)}
        if "row_exact" in first:
            found["against_best_plain"]["exact"] = _against(seeds, best, "exact", "row_exact", is_relative=False)
    return found


def _against(
    seeds: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]], measure: str, of_rows: str, *, is_relative: bool
) -> dict[str, Any]:
    ours, theirs = (np.array([result[of_rows] for result in arm], float) for arm in (seeds, best))
    interval = paired_bootstrap(ours, theirs, is_relative=is_relative)
    return {**interval._asdict(), "verdict": verdict(_final(seeds, measure), _final(best, measure), interval)}


def markdown(found: Mapping[str, Any]) -> str:
    """The table, and how to read it."""
    amount, unit = found["budget"]
    spent = f"{amount / 1e12:g} x 10^12 FLOPs" if unit == "FLOPs" else f"{amount:,.9g} {unit}"
    best = found["best_plain"]
    titles = [
        *("arm", "seeds", "parameters: core, all", "TFLOPs", "seconds", "steps", "rows", "nats a token", "bits a byte", "exact, %"),
        "bits at the deepest ACT step against the first, %",
        *((f"bits against {best}, %", f"exact against {best}, points") if best else ()),
        "a generated token: MFLOPs, ms",
    ]
    lines = [
        f"Each arm was trained for {spent} and measured on {found['rows']} held-out rows at each ACT step: the mean of its seeds,",
        "and in brackets their extremes at the deepest step. Differences are at the deepest step, with 95 % intervals over rows",
        f"(paired bootstrap). none: the seeds overlap, or the interval holds zero. open: fewer than {CLAIM_SEEDS} seeds.",
        "",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
    ]
    for arm in found["arms"]:
        measures, against = arm["measures"], arm.get("against_best_plain", {})
        cells = [
            *(arm["arm"], str(len(arm["seeds"])), f"{arm['parameters_core']:,.0f}, {arm['parameters']:,.0f}"),
            *(f"{arm['flops'] / 1e12:.2f}", f"{arm['seconds']:.0f}", f"{arm['steps']:,.0f}", f"{arm['rows']:,.0f}"),
            *(_values(measures.get(name), *form) for name, form in _FORMS.items()),
            f"{100 * (bits[-1] / bits[0] - 1):+.1f}" if len(bits := measures["bits_per_byte"]["by_act_step"]) > 1 else "",
            *(_difference(against.get(name)) for name in (("bits_per_byte", "exact") if best else ())),
            f"{arm['token']['flops'] / 1e6:.2f}, {arm['token']['ms']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Scale and decimals of each measure.
_FORMS = {"nats": (1, 4), "bits_per_byte": (1, 4), "exact": (100, 1)}


def _values(measure: Mapping[str, Any] | None, scale: float, decimals: int) -> str:
    if measure is None:
        return ""
    *steps, least, most = (
        f"{scale * value:.{decimals}f}" for value in (*measure["by_act_step"], measure["least"], measure["most"])
    )
    return f"{', '.join(steps)} ({least} to {most})"


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
