"""A CUDA device without values, so that a machine without one runs the code that is written for one.

Tensors on the host are real. Those on the device are torch's FakeTensors: of every operation shapes, number formats and devices are
checked, and nothing is computed. What the host reads of them is made up, and each time it waits for the device is written down.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
_REAL_ATTENTION, _REAL_BACKWARD = F.scaled_dot_product_attention, Tensor.backward


@contextlib.contextmanager
def fake_device() -> Iterator["FakeDevice"]:
    """Within the block "cuda" is a device that holds shapes without values.

    The host reads 1 wherever it reads a number of the device, and every mask is true everywhere. Raises TypeError where an
    operation takes tensors of the host (more than a number) and of the device together, and where a tensor on the device would be
    float64, which a GPU has and MPS has not.
    """
    with (
        # Its own reads number by number.
        mock.patch.object(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),
        mock.patch.object(Tensor, "backward", _backward),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        FakeTensorMode(allow_non_fake_inputs=True),
        FakeDevice() as device,
    ):
        yield device


class FakeDevice(TorchDispatchMode):
    """What `fake_device` gives."""

    supports_higher_order_operators = True  # FlexAttention is one.

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", 0)
        self.waits: list[str] = []
        """Where the host waited for the device, as "file:function", in order."""
        self.largest_sent = 0
        """Elements of the largest tensor that went from the host to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func is torch.ops.prim.device.default and on_device:
            return self.device
        if not on_device and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                if func in (aten.pin_memory.default, aten._pin_memory.default):
                    return args[0].clone()
                return func(*args, **kwargs)
        with self:  # In inference mode operations come here before they are taken apart.
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copied(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait()
            with unset_fake_temporarily():
                return torch.ones((), dtype=args[0].dtype).item()
        if any(tensor.dim() and not isinstance(tensor, FakeTensor) for tensor in tensors):
            raise TypeError(f"{func} of tensors on the host and on the device, in {_place()}")
        if func is aten.nonzero.default:
            self._wait()
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is aten._unique2.default:
            self._wait()
            return args[0].new_empty(args[0].numel()), torch.empty_like(args[0]), args[0].new_empty(0)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = self._indexed(args)
        return self._computed(func, args, kwargs)

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in made):
            raise TypeError(f"{func} makes float64 on the device, in {_place()}")
        return result

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, source = args[:2] if func is aten.copy_.default else (None, args[0])
        to_device = source.device if kwargs.get("device") is None else torch.device(kwargs["device"])
        is_read = not isinstance(target, FakeTensor) if target is not None else to_device.type == "cpu"
        is_sent = not isinstance(source, FakeTensor)
        if is_sent:
            self.largest_sent = max(self.largest_sent, source.numel())
        if is_read or (is_sent and not (kwargs.get("non_blocking") or args[2:3] == (True,))):
            self._wait()
        if not is_read:
            return self._computed(func, args, kwargs)
        if target is not None:
            return target.fill_(1)
        with unset_fake_temporarily():
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _indexed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of an index operation with places for masks, whose number the host waits for."""
        x, indices, *values = args
        masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
        value = values[0] if values else None
        # One number for all true places needs no count; anywhere else a number of the host is copied first.
        is_counted = bool(masks) and (value is None or value.numel() > 1)
        is_copied = not masks and value is not None and not isinstance(value, FakeTensor)
        if is_counted or is_copied:
            self._wait()
        places: list[Tensor | None] = []
        for index in indices:
            if any(index is mask for mask in masks):
                places += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
            else:
                places.append(index)
        return x, places, *values

    def _wait(self) -> None:
        self.waits.append(_place())


def _place() -> str:
    """The innermost function of the program, below the tests, that is running."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
            return f"{path.relative_to(ROOT)}:{frame.name}"
    return "a test"


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """In one kernel, as on a GPU; torch's choice for a FakeTensor is fifty small ones."""
    if not isinstance(q, FakeTensor):
        return _REAL_ATTENTION(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    result: Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled(), is_causal=is_causal)[0]
    return result


@torch.no_grad()
def _backward(loss: Tensor) -> None:
    """`loss.backward()` without torch's engine, which wants a driver's thread for each device."""
    if not isinstance(loss, FakeTensor):
        _REAL_BACKWARD(loss)
        return
    assert loss.grad_fn is not None
    waiting = {loss.grad_fn: 0}
    unseen = [loss.grad_fn]
    while unseen:
        for node, _ in unseen.pop().next_functions:
            if node is not None:
                if node not in waiting:
                    unseen.append(node)
                waiting[node] = waiting.get(node, 0) + 1
    grads: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        of_outputs = grads.pop(node, {})
        if hasattr(node, "variable"):
            if of_outputs:
                variable = node.variable
                variable.grad = of_outputs[0] if variable.grad is None else variable.grad + of_outputs[0]
            continue
        found: Any = [None] * len(node.next_functions)
        if of_outputs:
            inputs = [of_outputs.get(place) for place in range(len(node._input_metadata))]
            found = node.apply(*inputs) if hasattr(node, "apply") else node(*inputs)
        # A function written in Python answers for its last arguments, which are no tensors, too.
        for (following, place), grad in zip(node.next_functions, found if isinstance(found, tuple) else (found,), strict=False):
            if following is None:
                continue
            if grad is not None:
                expected = following._input_metadata[place]
                grad = grad.sum_to_size(expected.shape).to(expected.dtype)
                held = grads.setdefault(following, {})
                held[place] = held[place] + grad if place in held else grad
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
