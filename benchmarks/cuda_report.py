"""The tables of the check-up (benchmarks/cuda.py) from its figures. Knows no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]


def markdown(report: Figures) -> str:
    """All tables of the parts that ran, failures among them."""
    lines = ["# CUDA check-up", "", *(f"- {key}: {value}" for key, value in report["machine"].items()), ""]
    for name, part in report["parts"].items():
        cases = {case: figures for case, figures in part["cases"].items() if "error" not in figures}
        failed = {case: figures["error"] for case, figures in part["cases"].items() if "error" in figures}
        lines += [
            f"## {name} ({part['seconds']:.0f} s, {len(cases)} of {len(part['cases'])} cases)",
            "",
            *_TABLES[name](cases, report),
        ]
        for case, error in failed.items():
            lines += [f"- **{case}**: {error}" if "\n" not in error else f"- **{case}**:\n\n```\n{error}\n```"]
        lines.append("")
    return "\n".join(lines)


def _table(header: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; the names of `header` are separated by semicolons."""
    if not rows:
        return []
    names = header.split("; ")
    return [*("| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows)), ""]


def _smoke(cases: Figures, report: Figures) -> list[str]:
    training, decoding = [], []
    for name, figures in cases.items():
        passed = "yes" if figures["passed"] else "**NO**"
        if "errors" not in figures:
            exact, half, tolerance = figures["float32"], figures["bfloat16"], figures["tolerance"]
            cached = [
                f"{kind['cached']:.1e} ({bound:.1e})"
                for kind, bound in ((exact, tolerance["float32"]), (half, tolerance["bfloat16"]))
            ]
            decoding.append([name, passed, *cached, f"{half['rounding']:.1e}"])
            continue
        errors, tolerance = figures["errors"], figures["tolerance"]
        to_eager = figures.get("to_eager")
        training.append(
            [
                name,
                passed,
                f"{errors['loss']:.1e} ({tolerance['loss']:g})",
                f"{errors['gradient']:.1e} ({tolerance['gradient']:g})",
                f"{errors['level_gradient']:.1e}",
                f"{to_eager['loss']:.1e}, {to_eager['gradient']:.1e}" if to_eager else "",
            ]
        )
    return [
        "Relative errors against float64 on the CPU (tolerance), untrained: losses of two steps, gradients of the first by norm.",
        "",
        *_table("case; passed; loss; gradient; levels' gradient; loss and gradient to eager", training),
        "Cached decoding against recomputation at one ACT step, nats (tolerance): float32 to itself, bfloat16 to float32.",
        "",
        *_table("case; passed; float32; bfloat16; bfloat16 recomputed", decoding),
    ]


def _train_step(cases: Figures, report: Figures) -> list[str]:
    peaks, naive = cases.get("device"), cases.get("naive")
    flops = {kind: [c["flops_per_token"] for n, c in cases.items() if "flops_per_token" in c and kind(n)] for kind in _KINDS}
    training = {name: figures for name, figures in cases.items() if "host_waits" in figures}
    rows, kernels = [], []
    for name, figures in training.items():
        # Recomputed activations are no work of the model's.
        per_token = next((found[0] for kind, found in flops.items() if kind(name) and found), None)
        flops_per_second = None if per_token is None else per_token * figures["tokens_per_second"]
        waits = figures["host_waits"]
        rows.append(
            [
                name,
                f"{figures['ms']:.1f}",
                f"{figures['tokens_per_second']:,.0f}",
                f"{figures['supervised_per_second']:,.0f}",
                "" if flops_per_second is None else f"{flops_per_second / 1e12:.1f}",
                "" if flops_per_second is None or peaks is None else f"{flops_per_second / peaks['matmul_flops_per_second']:.1%}",
                _memory(figures["peak_memory"]),
                "" if naive is None else f"{figures['tokens_per_second'] / naive['tokens_per_second']:.1f}",
                waits if isinstance(waits, str) else str(len(waits)),
                f"{figures['compile_seconds']:.0f}" if "compile_seconds" in figures else "",
                f"{figures['graphs']}, {figures['graphs_after_settling']}" if "graphs" in figures else "",
            ]
        )
        kernels += [f"Ten most expensive kernels of a step: {name}", ""]
        named = [
            [f"`{kernel['name'][:90]}`".replace("|", "/"), str(kernel["calls"]), f"{kernel['ms']:.2f}", f"{kernel['share']:.1%}"]
            for kernel in figures["kernels"]
        ]
        kernels += _table("kernel; calls; ms; share of the step's", named)
        if not isinstance(waits, str):
            kernels += [f"Host waits at: {', '.join(waits)}", ""]
    scale = report["scale"]
    header = (
        "step; ms (median); tokens/s; supervised/s; model TFLOP/s; share of the matmul peak; peak memory, GB; tokens/s to naive; "
        "host waits; compile, s; graphs, of them after step 10 of varied lengths"
    )
    return [
        f"Batch {scale['batch']} x {scale['positions']}, vocabulary {scale['vocabulary']:,}.",
        "",
        *_peaks(peaks),
        *_naive(naive),
        *_table(header, rows),
        *kernels,
    ]


def _has(*words: str) -> Callable[[str], bool]:
    return lambda name: all(word in name for word in words)


# Cases whose tokens cost the same.
_KINDS = (_has("prefix", "varied"), _has("causal, varied"), lambda name: name.startswith("causal") and "varied" not in name)


def _memory(peak: Figures) -> str:
    return f"{peak.get('cuda_peak_bytes', peak['peak_rss_bytes']) / 1e9:.2f}"


def _peaks(peaks: Figures | None) -> list[str]:
    if peaks is None:
        return []
    size = f"{peaks['matrix']}^3"
    return [
        f"Of this device: {peaks['matmul_flops_per_second'] / 1e12:.1f} TFLOP/s ({size}, bfloat16, random data), copies "
        f"{peaks['copy_bytes_per_second'] / 1e9:,.0f} GB/s (read and written).",
        "",
    ]


def _naive(naive: Figures | None) -> list[str]:
    if naive is None:
        return []
    return [
        f"Naive (float32, float64 stablemax over all positions; ours: softmax), largest batch that fits: {naive['batch']}, "
        f"{naive['ms']:.0f} ms, {naive['tokens_per_second']:,.0f} tokens/s, {_memory(naive['peak_memory'])} GB.",
        "",
    ]


def _decoding(cases: Figures, report: Figures) -> list[str]:
    peaks = cases.get("device")
    recomputed = {
        figures["act_steps"]: figures["tokens_per_second"] for name, figures in cases.items() if name.startswith("recomp")
    }
    rows = []
    for figures in cases.values():
        if "engine" not in figures:
            continue
        batch, steps, speed = figures["batch"], figures["act_steps"], figures["tokens_per_second"]
        limit = (
            None if peaks is None else batch * peaks["copy_bytes_per_second"] / (figures["weight_bytes"] + figures["cache_bytes"])
        )
        rows.append(
            [
                figures["engine"],
                str(batch),
                str(steps),
                f"{speed:,.1f}",
                f"{figures['ms_per_step']:.2f}",
                f"{speed / recomputed[steps]:.2f}" if batch == 1 and steps in recomputed else "",
                "" if limit is None else f"{limit:,.0f}",
                "" if limit is None else f"{speed / limit:.1%}",
                f"{figures['seconds_before']:.1f}",
            ]
        )
    header = "engine; batch; ACT steps; tokens/s; ms a token of each row; to recomputation; limit, tokens/s; share of it; s before"
    return [
        f"{report['scale']['positions']} positions so far. Limit: bytes of weights and cache that a token reads, over the "
        "copy bandwidth. s before: prompts and first tokens, compiling included.",
        "",
        *_peaks(peaks),
        *_table(header, rows),
    ]


_TABLES: dict[str, Callable[[Figures, Figures], list[str]]] = {"smoke": _smoke, "train_step": _train_step, "decoding": _decoding}
