"""Tests of benchmarks/deep_families.py: rows, loss and update rule are the real trainer's, and what it leaves can be used."""

import copy
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from artifacts.checkpoint import open_checkpoint
from artifacts.weights import load_weights
from benchmarks.deep_families import Network, Row, fill_bins, main, read_rows
from config.compose import compose_config
from config.schema import PretrainInstructConfig
from dataset.build_sample_dataset import build
from dataset.text.curriculum import Curriculum, Draw
from dataset.text.loader import Example
from dataset.text.tokenizer import Tokenizer
from models.act import RecursiveModel
from models.device import resolve_arch
from models.layers import Block
from tests.fake_device import fake_device
from training.optimizer import ModelOptimizer
from training.text import TextTask


def config_of(*overrides: str) -> PretrainInstructConfig:
    small = ("arch.hidden_size=32", "arch.num_heads=2", "arch.expansion=1", "arch.attention=prefix", "optimizer=muon")
    config = compose_config("cfg_pretrain_instruct", ["device=cpu", "arch.forward_dtype=float64", *small, *overrides])
    return config.model_copy(update={"arch": resolve_arch(config.arch, torch.device("cpu"))})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep")
    build(path, 240, 24, 0, families=("deep_boolean", "deep_pointers"))
    return path


@pytest.fixture(scope="module")
def tokenizer_path(folder: Path, tiny_tokenizer: Tokenizer) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(tiny_tokenizer.model_bytes)
    return path


@pytest.fixture(scope="module")
def rows_of(folder: Path, tokenizer_path: Path) -> dict[str, list[Row]]:
    data = config_of("dataset=sample", f"dataset.data_dir={folder}").dataset
    return read_rows(data, "train", Tokenizer(tokenizer_path), ["deep_boolean", "deep_pointers"])


class Stream:
    """Rows one after the other, as the real task reads them."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = iter([example for _, example in rows])

    def __next__(self) -> tuple[Draw, Example]:
        return Draw(0, 0, 0), next(self._rows)

    def skip(self, count: int) -> None:
        assert count == 0


@pytest.mark.parametrize("family", ["deep_boolean", "deep_pointers"])
def test_the_loss_is_that_of_the_real_task_on_the_same_rows(rows_of: dict[str, list[Row]], family: str) -> None:
    rows = rows_of[family][:12]
    config = config_of("arch.halt_max_steps=3", f"global_batch_size={len(rows)}")
    width = 2 * max(len(encoded.ids) for _, encoded in rows)
    bins = fill_bins(rows, width, torch.device("cpu"))
    assert len(bins) < len(rows), "some stand side by side"
    network = Network(config, 512, family, bins, grows=False)
    network.model.load_state_dict({k: v + 0.01 for k, v in network.model.state_dict().items()})
    answered = torch.zeros(9, 3, 2)
    loss = network.loss(bins[torch.arange(len(bins))], answered)
    task = TextTask(config, network.model, Stream(rows), Curriculum.of_epochs(len(rows), 0, 1))
    (part,) = task.next_batch(1).micro_batches
    assert loss.item() == pytest.approx(part.loss.item() / part.weight, rel=1e-6)
    asked = [hops for row, _ in rows for hops in row]
    assert answered[1:, 0, 1].tolist() == [asked.count(hops) for hops in range(1, 9)]


def test_right_answers_are_counted_by_hops(rows_of: dict[str, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that always says one id is right where every token of an answer is that id."""
    (hops, first), (other_hops, second) = copy.deepcopy(rows_of["deep_boolean"][:2])
    said = 7
    labels = np.flatnonzero(first.supervised)
    first.ids[labels] = said
    second.ids[np.flatnonzero(second.supervised)[:1]] = said + 1
    bins = fill_bins([(hops, first), (other_hops, second)], 200, torch.device("cpu"))
    network = Network(config_of("arch.halt_max_steps=2", "global_batch_size=8"), 512, "deep_boolean", bins, grows=False)
    head = torch.zeros_like(network.model.lm_head.weight)
    head[said] = 1
    monkeypatch.setattr(network.model, "act_steps", lambda x, *_: iter([torch.ones_like(x)] * 2))
    network.model.lm_head.weight.data = head
    exact = network.measure(bins)
    assert exact[hops[0] - 1] == [1, 1] and exact[other_hops[0] - 1] == [0, 0]
    assert [row for k, row in enumerate(exact, 1) if k not in (hops[0], other_hops[0])] == [[None, None]] * 6


def test_a_step_is_the_real_optimizers(rows_of: dict[str, list[Row]]) -> None:
    config = config_of("arch.tie_embeddings=true", "global_batch_size=2")
    bins = fill_bins(rows_of["deep_boolean"], 256, torch.device("cpu"))
    network, real = Network(config, 512, "deep_boolean", bins, grows=False), RecursiveModel(config.arch, 512, seed=0)
    optimizer = ModelOptimizer(config, real)
    for factor in (0.1, 1.0, 0.5):
        network.lr_factor.fill_(factor)
        network.step()
        for p, q in zip(network.model.parameters(), real.parameters(), strict=True):
            q.grad = p.grad
        optimizer.step(factor)
    for name, value in real.state_dict().items():
        torch.testing.assert_close(network.model.state_dict()[name], value, rtol=0, atol=1e-7)
    assert not torch.equal(real.lm_head.weight, RecursiveModel(config.arch, 512, seed=0).lm_head.weight)


def test_hops_join_once_the_present_ones_are_right(rows_of: dict[str, list[Row]]) -> None:
    bins = fill_bins(rows_of["deep_boolean"], 256, torch.device("cpu"))
    network = Network(config_of("global_batch_size=4"), 512, "deep_boolean", bins, grows=True)
    seen = []
    for right in (0.5, 0.9, 0.89, 0.95):
        network.step()
        seen.append((network.hops, set(bins.hops_RQ[network._index_B].flatten().tolist()) - {0}))
        network.answered[network.hops, -1] = torch.tensor([100 * right, 100])
        network.look(0.5)
    assert [hops for hops, _ in seen] == [1, 1, 2, 2] and network.hops == 3
    assert all(asked <= set(range(1, hops + 1)) for hops, asked in seen)


def test_it_trains_measures_and_leaves_checkpoints(
    folder: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["arch.hidden_size=32", "arch.num_heads=2", f"dataset.tokenizer_path={tokenizer_path}", "device=cpu"]
    arms = ["looped", "plain_2", "plain_deep_pre"]
    places = ["--data", str(folder), "--output", str(tmp_path), "--families", "deep_boolean", "--processes", "1"]
    sizes = ["--steps", "3", "--seeds", "3", "--act-steps", "2", "--batch", "2"]
    main([*places, *sizes, "--arms", *arms, "--overrides", *small])
    results = json.loads((tmp_path / "deep_families.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert set(results) == {f"deep_boolean_{arm}_3" for arm in arms}
    looped = results["deep_boolean_looped_3"]
    assert looped["bins"] == 2 * looped["steps"] == 6 and np.array(looped["exact"], float).shape == (8, 2)
    assert results["deep_boolean_plain_2_3"]["core_parameters"] == looped["core_parameters"]
    assert results["deep_boolean_plain_deep_pre_3"]["core_parameters"] == 2 * looped["core_parameters"]
    assert "| deep_boolean_looped_3 | 2 |" in (tmp_path / "deep_families.md").read_text()
    saved = open_checkpoint(tmp_path / "deep_boolean_looped_3" / f"step_{looped['steps']}")
    load_weights(RecursiveModel(saved.config.arch, saved.tokenizer.vocab_size), saved.weights(ema=False), tmp_path)


def test_missing_rows_are_reported(folder: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--data", str(folder), "--output", str(tmp_path), "--overrides", f"dataset.tokenizer_path={tokenizer_path}"]
    with pytest.raises(SystemExit):
        main([*places, "--families", "deep_order", "--steps", "1", "--processes", "1"])
    assert "has no row of deep_order: build it with --families deep_order" in capsys.readouterr().err


def test_the_host_waits_nowhere_in_a_step_on_a_gpu(rows_of: dict[str, list[Row]]) -> None:
    """Or no CUDA graph could be recorded of it."""
    rows = rows_of["deep_boolean"]
    with fake_device() as device, mock.patch("torch.cuda.Stream"), mock.patch.object(Block, "compile"):
        bins = fill_bins(rows, 256, device.device)
        network = Network(config_of("global_batch_size=4", "arch.forward_dtype=bfloat16"), 512, "deep_boolean", bins, grows=True)
        network._work()
        device.waits.clear()
        network._work()
        assert device.waits == []
        network.look(0.5)
        assert device.waits == ["benchmarks/deep_families.py:look"]
