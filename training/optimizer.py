"""AdamATan2, the optimizer of the original work. Knows no schedule: the learning rate of a step is set from outside."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AdamATan2(Optimizer):
    """Adam with atan2 in place of the division, hence without an epsilon (Everett et al., arXiv 2407.05872).

    p *= 1 - lr * wd;  m = lerp(m, g, 1 - b1);  v = lerp(v, g * g, 1 - b2);
    p -= lr / (1 - b1^t) * atan2(m, sqrt(v / (1 - b2^t))), for every parameter that has a gradient.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient. `closure` is not supported."""
        if closure is not None:
            raise ValueError("AdamATan2 takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                self.state[p]["step"] += 1
            # Some parameters may have had no gradient in some steps.
            for t in {self.state[p]["step"] for p in params}:
                self._update([p for p in params if self.state[p]["step"] == t], t, group)

    def _update(self, params: list[Tensor], t: int, group: dict[str, Any]) -> None:
        """The `t`-th update of `params`, which are of `group`, in a few operations over all of them at once."""
        lr, (beta1, beta2), weight_decay = group["lr"], group["betas"], group["weight_decay"]
        grads = [p.grad for p in params if p.grad is not None]
        m = [self.state[p]["m"] for p in params]
        v = [self.state[p]["v"] for p in params]
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        updates = torch._foreach_div(v, 1 - beta2**t)
        torch._foreach_sqrt_(updates)
        for m_p, update in zip(m, updates, strict=True):
            torch.atan2(m_p, update, out=update)  # there is none for many tensors
        torch._foreach_sub_(params, updates, alpha=lr / (1 - beta1**t))
