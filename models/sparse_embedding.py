"""One learned vector per puzzle, trained by signSGD. A step touches only those of its puzzles.

The table is a buffer: neither optimizer nor moving average changes it. Shape suffixes: B rows of a
batch, P puzzles, K puzzles of a step, C channels.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.distributed import lost_ranks_reported


class SparseEmbedding(nn.Module):
    """Vectors `weights` [P, C], zero at first."""

    def __init__(self, puzzles: int, channels: int) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", torch.zeros(puzzles, channels))
        self._looked_up: list[tuple[Tensor, Tensor]] = []

    def forward(self, ids_B: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors [B, C] in `dtype`, recorded for `take_gradient` when training with gradient."""
        vectors_BC = F.embedding(ids_B, self.weights)
        if self.training and torch.is_grad_enabled():
            vectors_BC.requires_grad_()
            self._looked_up.append((ids_B, vectors_BC))
        return vectors_BC.to(dtype)

    def forget_gradient(self) -> None:
        """Drop all recorded vectors."""
        self._looked_up.clear()

    def take_gradient(self) -> tuple[Tensor, Tensor] | None:
        """Ids [K], ascending, and gradients [K, C] since the last call, summed over rows and ranks.

        None without any. All ranks must agree on that, and look up the same number of rows.
        """
        reached = [(ids_B, grad_BC) for ids_B, vectors_BC in self._looked_up if (grad_BC := vectors_BC.grad) is not None]
        self._looked_up.clear()
        if not reached:
            return None
        ids, grads = (torch.cat(parts) for parts in zip(*reached, strict=True))
        if dist.is_initialized() and dist.get_world_size() > 1:
            ids, grads = _gathered(ids), _gathered(grads)
        ids_K, place = ids.unique(return_inverse=True)
        return ids_K, grads.new_zeros(len(ids_K), grads.shape[1]).index_add_(0, place, grads)


def _gathered(part: Tensor) -> Tensor:
    whole = part.new_empty(dist.get_world_size() * len(part), *part.shape[1:])
    with lost_ranks_reported(dist.get_rank()):
        dist.all_gather_into_tensor(whole, part.contiguous())
    return whole


@torch.no_grad()
def sign_sgd_(embedding: SparseEmbedding, lr: float, weight_decay: float) -> None:
    """p = p (1 - lr * weight_decay) - lr sign(g) for the vectors looked up since the last step.

    HRM's optimizer for these vectors (arXiv 2506.21734).
    """
    taken = embedding.take_gradient()
    if taken is None:
        return
    ids_K, grad_KC = taken
    vectors_KC = embedding.weights[ids_K] * (1 - lr * weight_decay)
    embedding.weights[ids_K] = vectors_KC - lr * grad_KC.sign()
