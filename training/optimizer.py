"""The optimizers: AdamATan2, optionally with Muon, and signSGD for puzzles' vectors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from config.schema import PretrainPuzzleConfig, TrainingConfig
from models.act import RecursiveModel
from models.layers import BlockStack
from models.sparse_embedding import sign_sgd_


class ModelOptimizer:
    """The optimizers of a model, on one schedule. A parameter without gradient doesn't change.

    `optimizer=muon` updates `muon_matrices` by torch's Muon
    (https://kellerjordan.github.io/posts/muon/) with peak learning rate `muon_lr`, and all other
    parameters by AdamATan2 with `lr`. Muon computes its updates in bfloat16, whatever the dtype of
    the weights. Puzzles' vectors, which are buffers, are updated by signSGD with `puzzle_emb_lr`.
    """

    def __init__(self, config: TrainingConfig, model: RecursiveModel) -> None:
        self._config = config
        self._puzzle_emb = model.puzzle_emb
        self._parameters = dict(model.named_parameters())
        self._peak_rates: dict[Optimizer, float] = {}
        self._owners: dict[nn.Parameter, Optimizer] = {}
        matrices = muon_matrices(config, model)
        if matrices:
            muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
            self._peak_rates[muon] = config.muon_lr
            self._owners = dict.fromkeys(matrices, muon)
        rest = [p for p in model.parameters() if p not in self._owners]
        adam = AdamATan2(rest, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
        self._peak_rates[adam] = config.lr
        self._owners |= dict.fromkeys(rest, adam)

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for p in self._owners:
            p.grad = None
        if self._puzzle_emb is not None:
            self._puzzle_emb.forget_gradient()

    def step(self, lr_factor: float) -> None:
        """Update every parameter with a gradient. lr_factor: fraction of the peak learning rates."""
        for optimizer, peak_rate in self._peak_rates.items():
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * lr_factor
            optimizer.step()
        config = self._config
        if self._puzzle_emb is not None and isinstance(config, PretrainPuzzleConfig):
            sign_sgd_(self._puzzle_emb, config.puzzle_emb_lr * lr_factor, config.puzzle_emb_weight_decay)

    def state(self) -> dict[str, Tensor]:
        """Optimizer state by "<entry>.<parameter>", after a first gradient; counts are scalars."""
        return {
            f"{what}.{name}": torch.as_tensor(value)
            for name, p in self._parameters.items()
            for what, value in self._owners[p].state.get(p, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load `state`. Parameters that it does not name have had no gradient yet."""
        for place, value in state.items():
            what, name = place.split(".", 1)
            p = self._parameters[name]
            self._owners[p].state[p][what] = value.to(p.device, copy=True) if value.dim() else int(value)


def muon_matrices(config: TrainingConfig, model: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon updates: with `optimizer=muon` the stacks' matrices, else none."""
    if config.optimizer != "muon":
        return []
    stacks = (module for module in model.modules() if isinstance(module, BlockStack))
    return [p for stack in stacks for p in stack.parameters() if p.dim() == 2]


class AdamATan2(Optimizer):
    """Adam with atan2 in place of the division, hence without an epsilon (Everett et al., arXiv 2407.05872).

    p *= 1 - lr * wd;  m = lerp(m, g, 1 - b1);  v = lerp(v, g * g, 1 - b2);
    p -= lr / (1 - b1^t) * atan2(m, sqrt(v / (1 - b2^t))), for every parameter that has a gradient.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter with a gradient. `closure` is not supported."""
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
            # Step counts differ if a parameter had no gradient in some steps.
            for t in {self.state[p]["step"] for p in params}:
                self._update([p for p in params if self.state[p]["step"] == t], t, group)

    def _update(self, params: list[Tensor], t: int, group: dict[str, Any]) -> None:
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
            torch.atan2(m_p, update, out=update)  # there is no foreach version
        torch._foreach_sub_(params, updates, alpha=lr / (1 - beta1**t))
