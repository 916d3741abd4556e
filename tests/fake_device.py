"""A CUDA (or MPS) device without values, so that a machine without one runs the code that is written for one.

Tensors on the host are real. Those on the device are torch's FakeTensors: of every operation shapes, number formats and devices are
checked, and nothing is computed. What the host reads of them is made up, and each time it waits for the device is written down.
"""

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten


class FakeDevice(TorchDispatchMode):
    """Within the block `kind` is a device that holds shapes without values.

    Raises TypeError where an operation takes tensors of the host (more than a number) and of the device together, and where a
    tensor on the device would be float64, unless `float64`.
    """

    def __init__(self, kind: str = "cuda", *, float64: bool = False, reads: float = 1.0) -> None:
        """reads: what the host finds wherever it reads a number of the device. Every mask is true everywhere."""
        super().__init__()
        self.device = torch.device(kind, 0)
        self.waits: list[str] = []
        """Where the host waited for the device, as "file:function", in order."""
        self.largest_sent = 0
        """Elements of the largest tensor that went from the host to the device."""
        self._float64 = float64
        self._reads = reads
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True)
        self._functions = _WithoutEngine()

    def __enter__(self) -> Self:
        self._shapes.__enter__()
        super().__enter__()
        self._functions.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._functions.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)
        self._shapes.__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func is torch.ops.prim.device.default and on_device:
            return self.device
        if not on_device and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                if func is aten._pin_memory.default:
                    return args[0].clone()
                return func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copied(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait()
            return torch.tensor(self._reads).to(args[0].dtype).item()
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
        if not self._float64 and any(tensor.dtype == torch.float64 for tensor in made):
            raise TypeError(f"{func} makes float64 on the device, in {_place()}")
        return result

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten.copy_.default:
            target, source = args[:2]
            is_read = not isinstance(target, FakeTensor)
        else:
            source = args[0]
            target = source
            is_read = isinstance(source, FakeTensor) and torch.device(kwargs.get("device") or source.device).type == "cpu"
        is_sent = not isinstance(source, FakeTensor)
        if is_sent:
            self.largest_sent = max(self.largest_sent, source.numel())
        if is_read or (is_sent and not (kwargs.get("non_blocking") or args[2:3] == (True,))):
            self._wait()
        if not is_read:
            return self._computed(func, args, kwargs)
        if func is aten.copy_.default:
            return target.fill_(self._reads)
        with unset_fake_temporarily():
            return torch.full(source.shape, self._reads, dtype=kwargs.get("dtype") or source.dtype)

    def _indexed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of an index operation with places for masks, whose number the host waits for."""
        x, indices, *values = args
        places: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                if not (values and values[0].numel() == 1):
                    # One number for all true places needs no count.
                    self._wait()
                places += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
            else:
                if values and values[0].dim() == 0 and not isinstance(values[0], FakeTensor):
                    self._wait()
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


class _WithoutEngine(TorchFunctionMode):
    """What torch does for a device below Python, where it would look for a driver."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and isinstance(args[0], FakeTensor):
            return args[0].cpu().tolist()
        if func is Tensor.backward and isinstance(args[0], FakeTensor):
            return _backward(args[0])
        return func(*args, **kwargs)


@torch.no_grad()
def _backward(loss: Tensor) -> None:
    """`loss.backward()` without torch's engine, which wants a thread for each real device."""
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
