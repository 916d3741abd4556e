"""Processes that share work, started by torchrun: who this one is, what they sum, gather and agree on.

One process alone is the same code: every method then gives back what it was given. Knows no model and no rows.
"""

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from config.errors import UsageError

# Tensors are summed over ranks in flat buffers of at most so many elements: few large transfers, and little memory beside them.
_BUCKET_ELEMENTS = 2**24


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `size`. All ranks must call the methods in the same order.

    Where another rank has ended, the methods raise UsageError.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes and shows what all of them do."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once for all ranks; the others needn't call it."""
        if self.is_first:
            print(text, flush=True)

    def part(self, count: int) -> range:
        """The contiguous part of `count` things that belongs to this rank; sizes differ by one at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over all ranks, the same bits on each.

        Plain sums of flat buffers after the backward pass, not DDP: an optimizer step has several backward passes, on a rank that
        is out of rows none at all, and with models this small there is little to overlap.
        """
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with lost_ranks_reported(self.rank):
                dist.all_reduce(flat)
            for target, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                target.copy_(summed.view_as(target))

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks of each of some numbers, in float64."""
        totals = torch.tensor(numbers, dtype=torch.float64)
        self.sum_([totals])
        return totals.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order; tensors in it are on the host."""
        values = [value] * self.size
        if self.size > 1:
            with lost_ranks_reported(self.rank):
                dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks; tensors in it are on the host."""
        values = [value]
        if self.size > 1:
            with lost_ranks_reported(self.rank):
                dist.broadcast_object_list(values, 0)
        return values[0]


def take_local_gpu(device: str) -> bool:
    """Let "cuda" mean a GPU of its own for each local rank of torchrun (LOCAL_RANK); whether `device` is on CUDA.

    Raises UsageError if there are too few GPUs.
    """
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda and "LOCAL_RANK" in os.environ:
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UsageError(f"this machine has {gpus} GPUs and no one for local rank {local_rank}: lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
    return on_cuda


@contextlib.contextmanager
def joined_ranks(device: str, timeout_minutes: float) -> Iterator[Ranks]:
    """Within the block this process belongs to those that torchrun started (environment WORLD_SIZE, RANK, LOCAL_RANK, ...).

    Tensors on the host go through gloo, on CUDA through NCCL; each local rank has a GPU of its own. A rank that waits for longer
    than `timeout_minutes` gives up. Raises UsageError if the environment is incomplete or there are too few GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    on_cuda = take_local_gpu(device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store = _unused_part(store, rank, size, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout, store=store, rank=rank, world_size=size
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"WORLD_SIZE is {size}, but the ranks can't meet: {reason}; start all of them with torchrun, and see why one has ended"
        ) from error
    # Not left in order after an error: the others may be waiting, and the end of this process tells them.
    yield Ranks(dist.get_rank(), size)
    dist.destroy_process_group()


def _unused_part(store: Store, rank: int, size: int, timeout: datetime.timedelta) -> Store:
    """A part of the store in which nothing has been written yet, the same one for all ranks.

    torchrun keeps its store when it starts the ranks again, and in it the addresses of those that died, for which the new ones
    would wait or fail (https://github.com/pytorch/pytorch/issues/135712). TORCHELASTIC_RESTART_COUNT doesn't tell the starts apart
    over several machines: each counts its own. So every rank asks under a name of its own, and rank 0, which can't know whether
    a question is an old one, answers all with the name of the new part until each rank has shown there that it has read that.
    Raises RuntimeError after `timeout`.
    """
    store.set_timeout(timeout)
    own_name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own_name)
        part = PrefixStore(store.get(f"part_for/{own_name}").decode(), store)
        part.set(f"has_read/{rank}", "")
        return part
    part = PrefixStore(own_name, store)
    missing = set(range(1, size))
    give_up = time.monotonic() + timeout.total_seconds()
    while True:
        missing = {other for other in missing if not part.check([f"has_read/{other}"])}
        if not missing:
            return part
        if time.monotonic() > give_up:
            raise RuntimeError(f"ranks {sorted(missing)} haven't come")
        for other in missing:
            if store.check([f"asks/{other}"]):
                store.set(f"part_for/{store.get(f'asks/{other}').decode()}", own_name)
        time.sleep(0.02)


@contextlib.contextmanager
def lost_ranks_reported(rank: int) -> Iterator[None]:
    """Within the block, an exchange that fails because another rank has ended raises UsageError; `rank` is this one."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"rank {rank} has lost another rank, whose own message says why it ended ({reason}); start all of them again "
            "(training: with resume=auto)"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and elements + tensor.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket
