"""Halting modes, losses and attention against each other, for an equal time of training each: docs/experiments.md's tables.

    python -m benchmarks.variants --seconds 180 --parallel 2 --output variants.json

Every variant is the quickstart preset with a few settings changed. A short probe measures how many examples a second the variant
trains; then it gets as many examples as fit into the time, its schedule ending there, and is measured on the held-out split of the
bundled data: generated answers and loss at every depth. `--parallel 2` runs two variants at a time, one thread each. Last line:
JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from config.schema import user_path
from dataset.build_sample_dataset import build

REPOSITORY = Path(__file__).resolve().parents[1]

# Name: what it changes of the preset: N = 2, sampled depth that deepens, both steps in one update, softmax, prefix attention.
VARIANTS: dict[str, list[str]] = {
    "sampled": [],
    "sampled, an optimizer step each": ["act_steps_per_update=1"],
    "fixed 1": ["arch.halt.mode=fixed", "arch.halt_max_steps=1"],
    "fixed N": ["arch.halt.mode=fixed"],
    "settled": ["arch.halt.mode=settled"],
    "stablemax": ["arch.loss=stablemax"],
    "causal": ["arch.attention=causal"],
}
_PROBE_EXAMPLES = 1500
_MOST_EXAMPLES = 200_000
_TEST_PER_FAMILY = 100
_TIME_TOLERANCE = 0.15


def _call(script: str, arguments: list[str], threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / script), *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def _seconds(run: Path) -> float:
    """Time spent in training steps by a finished run."""
    return float(json.loads((run / "timing.jsonl").read_text(encoding="utf-8").splitlines()[-1])["seconds"])


def measure(name: str, overrides: list[str], *, seconds: float, threads: int, data_dir: Path, folder: Path) -> dict[str, Any]:
    """Probe, train for `seconds`, evaluate: one row of the table."""

    def train(run: str, examples: int, more: list[str]) -> Path:
        settings = ["experiment=quickstart", f"dataset.data_dir={data_dir}", f"checkpoint_dir={folder}", f"run_name={run}"]
        settings += [f"dataset.subset_size={examples}", "sample_answers=0", "eval_examples=1", *overrides, *more]
        _call("pretrain_instruct.py", settings, threads)
        return folder / "SlimOrca-ACT" / run

    slug = name.replace(" ", "_").replace(",", "")
    rate = _PROBE_EXAMPLES / _seconds(train(f"{slug}_probe", _PROBE_EXAMPLES, []))
    examples = min(_MOST_EXAMPLES, int(rate * seconds))
    run = train(slug, examples, [])
    if abs(_seconds(run) / seconds - 1) > _TIME_TOLERANCE:
        # Rows of a trained model halt elsewhere than those of the probe's: once more, with what this run could do.
        examples = min(_MOST_EXAMPLES, int(examples * seconds / _seconds(run)))
        run = train(f"{slug}_again", examples, [])
    (checkpoint,) = run.glob("step_*")
    _call(
        "inference_instruct.py",
        ["--checkpoint", str(checkpoint), "--subset-size", "100000", "--overrides", "generation.max_output_tokens=24"],
        threads,
    )
    metrics = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
    by_depth = metrics["by_act_step"] or [{"loss_per_token": metrics["loss_per_token"]}]
    return {
        "variant": name,
        "overrides": overrides,
        "examples": examples,
        "steps": int(checkpoint.name.removeprefix("step_")),
        "seconds": _seconds(run),
        "loss_by_act_step": [depth["loss_per_token"] for depth in by_depth],
        "answers_by_act_step": metrics["answers"]["by_act_step"],
        "bits_per_byte": metrics["bits_per_byte"],
    }


def main() -> None:
    """Run the chosen variants and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="training time of each variant")
    parser.add_argument("--parallel", type=int, default=1, help="variants at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="some of the variants")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings changed in every variant")
    parser.add_argument("--output", type=user_path, help="also write the JSON here")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.parallel) as pool:
        data_dir = Path(folder) / "sample"
        build(data_dir, _MOST_EXAMPLES, _TEST_PER_FAMILY, seed=0)

        def one(name: str) -> dict[str, Any]:
            row = measure(
                name,
                [*VARIANTS[name], *arguments.overrides],
                seconds=arguments.seconds,
                threads=arguments.threads,
                data_dir=data_dir,
                folder=Path(folder),
            )
            print(json.dumps(row), flush=True)
            return row

        rows = list(pool.map(one, arguments.only))
    result = json.dumps({"seconds": time.perf_counter() - started, "threads": arguments.threads, "variants": rows})
    if arguments.output is not None:
        arguments.output.write_text(result + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
