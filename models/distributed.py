"""The ranks that torchrun starts. In a single process every method returns its input."""

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


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `size`. All ranks must call the methods in the same order.

    They raise UsageError if another rank has ended.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line on the first rank; other ranks needn't call it."""
        if self.is_first:
            print(text, flush=True)

    def part(self, count: int) -> range:
        """This rank's contiguous part of `count` items. Sizes differ by at most one."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over all ranks, bit for bit the
        same on each.

        Sums one flat buffer after the backward pass, without DDP: an optimizer step has several
        backward passes (none on a rank without rows), and with models this small there is little
        communication to overlap.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with lost_ranks_reported(self.rank):
            dist.all_reduce(flat)
        for target, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            target.copy_(summed.view_as(target))

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The sum over all ranks of each of `numbers`, in float64."""
        totals = torch.tensor(numbers, dtype=torch.float64)
        self.sum_([totals])
        return totals.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order; tensors in them are on the host."""
        values = [value] * self.size
        if self.size > 1:
            with lost_ranks_reported(self.rank):
                dist.all_gather_object(values, value)
        return values

    def gather_at_first(self, value: Any) -> list[Any]:
        """`gather`, but an empty list on ranks other than the first."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_first else None
        with lost_ranks_reported(self.rank):
            dist.gather_object(value, values)
        return values or []

    def agree(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks; tensors in it are on the host."""
        values = [value]
        if self.size > 1:
            with lost_ranks_reported(self.rank):
                dist.broadcast_object_list(values, 0)
        return values[0]


ALONE = Ranks()


def take_local_gpu(device: str) -> bool:
    """Give each local rank its own GPU; returns whether `device` is on CUDA. Raises UsageError."""
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda and "LOCAL_RANK" in os.environ:
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UsageError(f"this machine has {gpus} GPUs and none for local rank {local_rank}: lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
    return on_cuda


@contextlib.contextmanager
def joined_ranks(device: str, timeout_minutes: float) -> Iterator[Ranks]:
    """Within the block, join the ranks that torchrun started (environment WORLD_SIZE, RANK,
    LOCAL_RANK, ...).

    Tensors on the host use gloo, on CUDA NCCL; each local rank has its own GPU. Waiting for another
    rank times out after `timeout_minutes`. Raises UsageError if the environment is incomplete or
    there are too few GPUs.
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
            f"WORLD_SIZE is {size}, but the ranks can't connect: {reason}; start all of them with torchrun, and see why one has "
            "ended"
        ) from error
    # No clean shutdown after an error: ranks that wait notice when this process ends.
    yield Ranks(dist.get_rank(), size)
    dist.destroy_process_group()


def _unused_part(store: Store, rank: int, size: int, timeout: datetime.timedelta) -> Store:
    """An unused part of the store, the same for all ranks. Raises RuntimeError after `timeout`.

    torchrun keeps its store when it restarts the ranks. The store still has the addresses of the
    old ranks, and the new ones would wait for them or fail
    (https://github.com/pytorch/pytorch/issues/135712). TORCHELASTIC_RESTART_COUNT doesn't help on
    several machines: each counts its own restarts. So every rank asks rank 0 under a unique name.
    Rank 0 can't tell old requests from new ones: it answers all of them with the name of the new
    part, until each rank has confirmed there that it read the answer.
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
            raise RuntimeError(f"ranks {sorted(missing)} haven't connected")
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
            f"rank {rank} has lost another rank, whose own message says why it ended ({reason}); restart all of them "
            "(training: with resume=auto)"
        ) from error
