"""Losses of short runs, kept in golden/losses.json: a refactor must show the same ones.

A change that is meant to give other losses writes them anew, and says in its commit why they moved:

    python -m tests.test_golden
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config.compose import compose_config
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example, ExampleStream
from models.act import RecursiveModel
from tests.conftest import TINY
from training.loop import Trainer
from training.text import TextTask

GOLDEN = Path(__file__).parent / "golden/losses.json"
STEPS, ROWS, EPOCHS, VOCABULARY = 20, 8, 10, 13
RUNS = {
    "stablemax, no gradient between ACT steps": ("arch.loss=stablemax", "arch.halt_max_steps=3"),
    "softmax, gradient through ACT steps": ("arch.grad_calls=20",),
    "the default network": ("arch=looped", "arch.H_cycles=1", "arch.L_cycles=0", "arch.halt_max_steps=2"),
    "softmax, prefix": ("arch.grad_calls=6", "arch.attention=prefix"),
}


def row(index: int) -> Example:
    """A prompt of 2 to 7 ids and an answer of 1 to 8, drawn by raw bits, whose stream NumPy keeps over versions."""
    raw = np.random.Philox(key=index).random_raw(17)
    prompt, answer = 2 + int(raw[0] % 6), 1 + int(raw[1] % 8)
    ids = (raw[2 : 2 + prompt + answer] % VOCABULARY).astype(np.int32)
    is_answer = np.arange(len(ids)) >= prompt
    return Example(ids, is_answer, (~is_answer).astype(np.int32), turn_bytes=answer)


def losses(*overrides: str) -> dict[str, list[float]]:
    """Nats per supervised token at the deepest ACT step, of labels and of halting, in the first steps of a run in float64."""
    config = compose_config("cfg_pretrain_instruct", [*TINY, "lr=1e-2", "lr_warmup_steps=2", f"epochs={EPOCHS}", *overrides])
    model = RecursiveModel(config.arch, VOCABULARY, seed=config.seed)
    rows: Any = [row(index) for index in range(ROWS)]
    curriculum = Curriculum.of_epochs(ROWS, config.seed, config.epochs)
    trainer = Trainer(config, model, TextTask(config, model, ExampleStream(rows, curriculum, 0), curriculum))
    results = [result for result, _ in zip(trainer.steps(), range(STEPS), strict=False)]
    return {name: [float(result.sums[name]) / result.weight for result in results] for name in ("nll", "halt_bce")}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_shows_the_losses_it_always_showed(run: str) -> None:
    expected = json.loads(GOLDEN.read_text())[run]
    found = losses(*RUNS[run])
    assert len(found["nll"]) > 10 and min(found["nll"]) < 0.95 * found["nll"][0], "the run must learn, or it watches nothing"
    for name, values in expected.items():
        # Other processors sum in another order; AdamATan2, which has no epsilon, lets that grow a little.
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps({run: losses(*overrides) for run, overrides in RUNS.items()}, indent=1) + "\n")
    print(f"written: {GOLDEN}")
