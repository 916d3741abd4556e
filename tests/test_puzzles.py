"""Puzzles measured: all ACT steps or as the halting logit says, metrics as they are named, what is saved, what is voted on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from config.compose import compose_as
from config.schema import PretrainPuzzleConfig
from dataset.puzzles.loader import PuzzleData
from evaluators.puzzles import PuzzleMeasurement, PuzzleOutput, evaluate_puzzles
from evaluators.search import Search
from models.act import RecursiveModel
from models.distributed import Ranks
from models.losses import log_probs
from tests.puzzle_data import TINY_PUZZLES, write_puzzles

Open = Callable[..., tuple[PretrainPuzzleConfig, PuzzleData, RecursiveModel]]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """`opened("arch.act_inference=true")`: config, test split and a model whose rows halt at different steps."""
    paths = [write_puzzles(tmp_path / "puzzles")]

    def build(*overrides: str) -> tuple[PretrainPuzzleConfig, PuzzleData, RecursiveModel]:
        config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", [f"data_paths={paths}", *TINY_PUZZLES, *overrides])
        data = PuzzleData(config.data_paths, "test")
        model = RecursiveModel(config.arch, data.metadata.vocab_size, seq_len=data.metadata.seq_len, puzzles=13)
        assert model.puzzle_emb is not None
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            model.q_head.weight.copy_(torch.randn(model.q_head.weight.shape, generator=generator))
            model.q_head.bias.zero_()
            model.puzzle_emb.weights.copy_(torch.randn(model.puzzle_emb.weights.shape, generator=generator))
        return config, data, model

    return build


def outputs_of(model: RecursiveModel, data: PuzzleData, batch_size: int = 4) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    outputs: list[PuzzleOutput] = []
    result = evaluate_puzzles(model, data, batch_size=batch_size, on_output=outputs.append)
    return result, {key: torch.cat([output.tensors()[key] for output in outputs]) for key in outputs[0].tensors()}


def test_metrics_are_those_of_the_saved_tensors(opened: Open) -> None:
    _, data, model = opened()
    report, saved = outputs_of(model, data)
    rows = len(data.sets["all"])
    assert report["rows"] == rows == len(saved["preds"]) and report["steps"] == 3 and report["sets"]["all"]["rows"] == rows
    supervised = saved["labels"] != -100
    right = (saved["preds"] == saved["labels"]) & supervised
    exact = right.sum(dim=1) == supervised.sum(dim=1)
    assert report["accuracy"] == pytest.approx((right.sum(dim=1) / supervised.sum(dim=1)).mean().item())
    assert report["exact_accuracy"] == pytest.approx(exact.double().mean().item())
    assert report["q_halt_accuracy"] == pytest.approx(((saved["q_halt_logits"] >= 0) == exact).double().mean().item())
    # Of rows alone: the last batch isn't full.
    assert rows % 4
    halt_loss = F.binary_cross_entropy_with_logits(saved["q_halt_logits"].double(), exact.double())
    assert report["q_halt_loss"] == pytest.approx(halt_loss.item())
    by_step = ((saved["preds_by_step"] == saved["labels"].unsqueeze(1)) | ~supervised.unsqueeze(1)).all(dim=2)
    assert report["exact_accuracy_by_act_step"] == pytest.approx(by_step.double().mean(dim=0).tolist())
    assert torch.equal(saved["preds_by_step"][:, -1], saved["preds"])


def test_the_last_step_is_the_model_run_so_often(opened: Open) -> None:
    _, data, model = opened()
    result, saved = outputs_of(model, data, batch_size=3)
    with torch.no_grad():
        x = model.embed(saved["inputs"], saved["puzzle_identifiers"])
        states = model.initial_states(*x.shape[:2])
        attend, rotary = model.row_attention(torch.zeros(1, x.shape[1], dtype=torch.int64)), model.rotary(torch.arange(x.shape[1]))
        for _ in range(3):
            states, output = model.act_step(states, x, rotary, attend)
        logits = model.logits(output[:, model.prefix_len :])
    assert torch.equal(logits.argmax(-1), saved["preds"])
    torch.testing.assert_close(model.halt_logits(output[:, 0])[:, 0].detach().float(), saved["q_halt_logits"])
    supervised = saved["labels"] != -100
    nll = -log_probs(logits, "stablemax").gather(2, saved["labels"].clamp(min=0).unsqueeze(2)).squeeze(2)
    expected = ((nll * supervised).sum(dim=1) / supervised.sum(dim=1)).mean().item()
    assert result["lm_loss"] == pytest.approx(expected)


def test_rows_that_halt_at_inference_are_read_where_they_halted(opened: Open) -> None:
    _, data, model = opened()
    _, every = outputs_of(model, data)
    _, _, halting = opened("arch.act_inference=true")
    result, saved = outputs_of(halting, data)
    assert set(saved["steps"].tolist()) >= {1, 3}, "rows must halt at several steps, or nothing is tested"
    for row, steps in enumerate(saved["steps"].tolist()):
        assert torch.equal(saved["preds"][row], every["preds_by_step"][row, steps - 1])
        assert (saved["q_halt_logits"][row] > 0) or steps == 3
    assert result["steps"] == pytest.approx(saved["steps"].double().mean().item()) and result["steps"] < 3


def test_ranks_add_up_to_the_whole(opened: Open) -> None:
    _, data, model = opened()
    sums: list[list[float]] = []

    class Recording(Ranks):
        def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
            sums.append(list(numbers))
            return sums[-1]

    for ranks in (Recording(), Recording(0, 2), Recording(1, 2)):
        evaluate_puzzles(model, data, batch_size=4, ranks=ranks)
    whole, *parts = sums
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, atol=1e-9)


def test_a_few_batches_and_what_is_saved_of_them(opened: Open, tmp_path: Path) -> None:
    config, data, model = opened()
    measurement = PuzzleMeasurement(config, data, config.data_paths)
    report = measurement.measure(model, tmp_path / "out", "test", save=["preds", "labels"], max_batches=1)
    assert report["rows"] == 4
    saved = load_file(tmp_path / "out/outputs_test.safetensors")
    assert saved.keys() == {"rows", "preds", "labels"} and saved["rows"].tolist() == [0, 1, 2, 3]


def test_evaluators_get_their_outputs(opened: Open, tmp_path: Path) -> None:
    config, data, model = opened("evaluators=[{name: arc@ARC, pass_Ks: [1, 3]}]")
    puzzle = {"train": [], "test": [{"input": [[1]], "output": [[2]]}]}
    (Path(config.data_paths[0]) / "test_puzzles.json").write_text(json.dumps({"other": puzzle}))
    # Rows here are no ARC canvases: what is handed over is looked at in place of votes.
    measurement = PuzzleMeasurement(config, data, config.data_paths)
    handed: list[set[str]] = []
    rows = []

    def note(**tensors: torch.Tensor) -> None:
        handed.append(set(tensors))
        rows.append({len(values) for values in tensors.values()})

    measurement._evaluators[0][2].add = note  # type: ignore[assignment, method-assign]
    report = measurement.measure(model, tmp_path / "out", "test")
    assert handed == [{"inputs", "puzzle_identifiers", "q_halt_logits", "preds"}] * (-(-len(data.sets["all"]) // 4))
    one_vote = sum(max(sizes) for sizes in rows)
    rows.clear()
    measurement.measure(model, tmp_path / "out", "test", search=Search(samples=2, noise=1))
    assert sum(max(sizes) for sizes in rows) == one_vote
    # Chosen by votes, every sample has one.
    rows.clear()
    measurement.measure(model, tmp_path / "out", "test", search=Search(samples=2, noise=1, choose="votes"))
    assert sum(max(sizes) for sizes in rows) == 2 * one_vote and all(len(sizes) == 1 for sizes in rows)
    assert report["ARC/pass@1"] == 0 and "ARC/pass@3" in report and (tmp_path / "out/submission.json").is_file()


def test_each_data_path_has_votes_of_its_own(opened: Open, tmp_path: Path) -> None:
    config, _, model = opened("evaluators=[{name: arc@ARC, pass_Ks: [1]}]")
    paths = [*config.data_paths, write_puzzles(tmp_path / "second")]
    for number, path in enumerate(paths):
        puzzle = {"train": [], "test": [{"input": [[1]], "output": [[2]]}]}
        (Path(path) / "test_puzzles.json").write_text(json.dumps({f"of path {number}": puzzle}))
    measurement = PuzzleMeasurement(config, PuzzleData(paths, "test"), paths)
    handed: list[int] = []
    for number, (*_, evaluator) in enumerate(measurement._evaluators):
        evaluator.add = lambda number=number, **tensors: handed.append(number)  # type: ignore[method-assign]
    report = measurement.measure(model, tmp_path / "out", "test")
    assert {"ARC/pass@1", "ARC1/pass@1"} <= set(report) and handed.count(0) == handed.count(1) > 0
    for number, place in enumerate(("submission.json", "ARC1/submission.json")):
        assert set(json.loads((tmp_path / "out" / place).read_text())) == {f"of path {number}"}


def test_samples_are_measured_together(opened: Open) -> None:
    """Each start is a row of its own; the chosen one has the highest halting logit, and the cost is that of all."""
    _, data, model = opened()
    plain, single = outputs_of(model, data)
    search = Search(samples=3, noise=1.0)
    outputs: list[PuzzleOutput] = []
    result = evaluate_puzzles(model, data, batch_size=4, search=search, on_output=outputs.append)
    logits, preds, saved = (
        torch.cat(parts)
        for parts in zip(
            *((o.halt_logits_BKS[..., -1], o.preds_BKST[:, :, -1], o.tensors()["preds"]) for o in outputs), strict=True
        )
    )
    torch.testing.assert_close(logits[:, 0], single["q_halt_logits"])
    assert torch.equal(preds[:, 0], single["preds"]) and not torch.equal(preds[:, 1], preds[:, 2])
    chosen = logits.argmax(dim=1)
    assert set(chosen.tolist()) == {0, 1, 2}
    everyone = torch.arange(len(chosen))
    assert torch.equal(saved, preds[everyone, chosen])
    report = result
    supervised = single["labels"] != -100
    right = ((preds == single["labels"].unsqueeze(1)) | ~supervised.unsqueeze(1)).all(dim=2)
    assert report["steps"] == 9 and report["oracle_accuracy"] == pytest.approx(right.any(dim=1).double().mean().item())
    assert report["exact_accuracy"] == pytest.approx(right[everyone, chosen].double().mean().item())
    assert "oracle_accuracy" not in plain


def test_samples_stop_with_the_first_that_halts(opened: Open) -> None:
    _, data, model = opened()
    outputs: list[PuzzleOutput] = []
    search = Search(samples=3, noise=1.0, choose="first")
    result = evaluate_puzzles(model, data, batch_size=4, search=search, on_output=outputs.append)
    steps = torch.cat([output.tensors()["steps"] for output in outputs])
    logits = torch.cat([output.halt_logits_BKS[..., -1] for output in outputs])
    assert set(steps.tolist()) >= {1, 3}
    assert ((logits > 0).any(dim=1) | (steps == 3)).all()
    assert result["steps"] == pytest.approx(3 * steps.double().mean().item())
