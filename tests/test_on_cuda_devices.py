"""What runs on a CUDA device, on one without values: every tensor is where it belongs, and the host waits no more than it must."""

import itertools
from collections.abc import Callable

import pytest

from config.schema import PretrainInstructConfig
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example, ExampleStream
from models.act import RecursiveModel
from tests.fake_device import FakeDevice
from training.loop import Trainer
from training.text import TextTask

ConfigFactory = Callable[..., PretrainInstructConfig]
ExampleFactory = Callable[..., list[Example]]
RECURSIONS = ("trm", "trm_singlez", "trm_hier6", "hrm", "transformers_baseline")
VOCABULARY = 13


def small(recursion: str) -> tuple[str, ...]:
    """Overrides of `tiny_config`: as on a GPU, and with as few level calls as it takes."""
    calls = () if recursion == "transformers_baseline" else ("arch.H_cycles=1", "arch.L_cycles=1")
    return (f"arch={recursion}", *calls, "arch.forward_dtype=bfloat16", "ema=true")


def text_trainer(device: FakeDevice, config: PretrainInstructConfig, examples: list[Example]) -> Trainer:
    model = RecursiveModel(config.arch, VOCABULARY)
    model.to(device.device)
    curriculum = Curriculum.of_epochs(len(examples), config.seed, config.epochs)
    return Trainer(config, model, TextTask(config, model, ExampleStream(examples, curriculum, 0), curriculum))


@pytest.mark.parametrize(
    ("recursion", "attention", "packing"),
    [
        *itertools.product(["trm"], ["causal", "prefix"], ["off", "bucketed", "packed"]),
        *itertools.product(RECURSIONS[1:], ["prefix"], ["bucketed"]),
    ],
)
def test_a_step_of_training_waits_once(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, recursion: str, attention: str, packing: str
) -> None:
    config = tiny_config(*small(recursion), f"arch.attention={attention}", f"packing={packing}")
    with FakeDevice() as device:
        steps = text_trainer(device, config, random_examples(12)).steps()
        for _ in range(2):
            device.waits.clear()
            device.largest_sent = 0
            next(steps)
            assert device.waits == ["training/loop.py:_reduce_gradients"]
            # Nothing larger goes there than the ids of a batch, and no mask.
            assert device.largest_sent <= config.global_batch_size * config.dataset.seq_len
