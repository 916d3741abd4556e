"""Puzzles' vectors: only those of a step change, by the sign of their summed gradient, over rows, ACT steps and ranks."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models.sparse_embedding import SparseEmbedding, sign_sgd_
from tests.children import CONTEXT

LR, DECAY = 0.1, 0.5


def filled(puzzles: int = 5, channels: int = 3) -> SparseEmbedding:
    embedding = SparseEmbedding(puzzles, channels)
    assert not embedding.weights.any(), "vectors start at zero"
    embedding.weights.copy_(torch.arange(1.0, puzzles * channels + 1).view(puzzles, channels))
    return embedding


def backward(embedding: SparseEmbedding, ids: list[int], gradients: list[list[float]]) -> None:
    (embedding(torch.tensor(ids), torch.float32) * torch.tensor(gradients)).sum().backward()


# Puzzle 3 twice: its gradients are summed before the sign is taken, and one of its channels cancels. Puzzle 0 has none at all.
IDS, GRADIENTS = [3, 1, 3, 0], [[1.0, -1.0, 2.0], [-0.5, 0.0, 9.0], [-3.0, -1.0, -2.0], [0.0, 0.0, 0.0]]
SIGNS = {0: [0.0, 0.0, 0.0], 1: [-1.0, 0.0, 1.0], 3: [-1.0, -1.0, 0.0]}


def expected_after(before: torch.Tensor) -> torch.Tensor:
    after = before.clone()
    for puzzle, sign in SIGNS.items():
        after[puzzle] = before[puzzle] * (1 - LR * DECAY) - LR * torch.tensor(sign)
    return after


@pytest.mark.parametrize("parts", [[4], [1, 3], [2, 1, 1]], ids=str)
def test_a_step_moves_the_vectors_of_its_puzzles_only(parts: list[int]) -> None:
    """However many lookups, ACT steps for one, the rows are spread over."""
    embedding, before = filled(), filled().weights
    start = 0
    for count in parts:
        backward(embedding, IDS[start : start + count], GRADIENTS[start : start + count])
        start += count
    sign_sgd_(embedding, LR, DECAY)
    torch.testing.assert_close(embedding.weights, expected_after(before))
    # What was used is forgotten.
    after = embedding.weights.clone()
    sign_sgd_(embedding, LR, DECAY)
    assert torch.equal(embedding.weights, after)


def test_vectors_without_gradient_are_looked_up_and_not_remembered() -> None:
    embedding, before = filled(), filled().weights
    with torch.no_grad():
        assert torch.equal(embedding(torch.tensor([4, 4]), torch.float32), before[[4, 4]])
    assert embedding.eval()(torch.tensor([2]), torch.bfloat16).dtype == torch.bfloat16
    embedding.train()(torch.tensor([1]), torch.float32)  # no backward pass reaches it
    sign_sgd_(embedding, LR, DECAY)
    assert torch.equal(embedding.weights, before) and not embedding._looked_up


def test_the_table_is_no_parameter_and_is_saved() -> None:
    embedding = filled()
    assert list(embedding.parameters()) == [] and list(embedding.state_dict()) == ["weights"]


def step_of_a_rank(rank: int, meeting_point: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    embedding, part = filled(), slice(2 * rank, 2 * rank + 2)
    backward(embedding, IDS[part], GRADIENTS[part])
    sign_sgd_(embedding, LR, DECAY)
    torch.save(embedding.weights, Path(results) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs torch.distributed")
def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    ranks = [CONTEXT.Process(target=step_of_a_rank, args=(rank, str(tmp_path / "meet"), str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected_after(filled().weights))
