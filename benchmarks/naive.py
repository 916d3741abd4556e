"""The naive way to train and to decode, written from the published formulas: the baseline of the
benchmarks.

It uses the weights of a `RecursiveModel` but none of its code: every position computed in every
pass, the loss in float64 over all positions and the whole vocabulary, no cache. Shape suffixes as
in models/layers.py.
"""

import json
import math
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from config.errors import UsageError
from config.schema import ArchConfig
from models.act import RecursiveModel
from models.losses import TokenLoss

_RMS_EPS = 1e-5
_IGNORE = -100
# The only supported architecture; sizes, depth and number format are free.
_WRITTEN_FOR = {
    "arch": "trm",
    "arch.attention": "causal",
    "arch.pos_encodings": "rope",
    "arch.grad_calls": None,
    "arch.halt.backprop": False,
    "arch.tie_embeddings": False,
    "arch.loss": "stablemax",
}


def check_arch(arch: ArchConfig) -> None:
    """Raise UsageError for an architecture that the naive way doesn't compute."""
    for key, value in _WRITTEN_FOR.items():
        found = attrgetter(key.partition(".")[2] or "name")(arch)
        if found != value:
            written, given = (json.dumps(one).strip('"') for one in (value, found))
            raise UsageError(f"the naive way is written for {key}={written}, found {given}: leave {key} as it is")


class NaiveTRM:
    """TRM over whole rows with causal attention, every weight cast to the activations' dtype in every call."""

    def __init__(self, model: RecursiveModel) -> None:
        """Raises UsageError for another architecture."""
        check_arch(model.config)
        self.arch: ArchConfig = model.config
        self.dtype, self.device = model.dtype, model.device
        self.weights: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def initial_states(self, rows: int, positions: int) -> tuple[Tensor, Tensor]:
        """z_H and z_L [B, T, D] before the first ACT step."""
        shape = (rows, positions, self.arch.hidden_size)
        return self.weights["H_init"].expand(shape), self.weights["L_init"].expand(shape)

    def act_step(self, states: tuple[Tensor, Tensor], ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """One ACT step over all positions, gradient through the last H cycle. Heads read z_H."""
        arch = self.arch
        z_H, z_L = states
        x_BTD = math.sqrt(arch.hidden_size) * F.embedding(ids_BT, self.weights["embed_tokens.embedding_weight"].to(self.dtype))
        rotary = self._rotary(ids_BT.shape[1])
        for cycle in range(arch.H_cycles):
            with torch.set_grad_enabled(torch.is_grad_enabled() and cycle == arch.H_cycles - 1):
                for _ in range(arch.L_cycles):
                    z_L = self._level(z_L + z_H + x_BTD, rotary)
                z_H = self._level(z_H + z_L, rotary)
        return z_H, z_L

    def halt_logits(self, output_BTD: Tensor) -> Tensor:
        """Halting logit [B, T] of every position."""
        return F.linear(output_BTD, self._cast("q_head.weight"), self._cast("q_head.bias"))[..., 0]

    def next_token_logits(self, ids_BT: Tensor, act_steps: int) -> Tensor:
        """Logits [B, V] after the last position, without a cache."""
        states = self.initial_states(*ids_BT.shape)
        for _ in range(act_steps):
            states = self.act_step(states, ids_BT)
        return F.linear(states[0][:, -1], self._cast("lm_head.weight"))

    def _cast(self, name: str) -> Tensor:
        return self.weights[name].to(self.dtype)

    def _rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        head_dim = self.arch.hidden_size // self.arch.num_heads
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=self.device)
        positions_T = torch.arange(positions, dtype=torch.float64, device=self.device)
        angles_TK = torch.outer(positions_T, self.arch.rope_theta ** (-pairs / head_dim)).repeat(1, 2)
        return angles_TK.cos().to(self.dtype), angles_TK.sin().to(self.dtype)

    def _level(self, h_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        for layer in range(self.arch.L_layers):
            prefix = f"L_level.layers.{layer}"
            h_BTD = _rms_norm(h_BTD + self._attention(f"{prefix}.self_attn", h_BTD, rotary))
            h_BTD = _rms_norm(h_BTD + self._swiglu(f"{prefix}.mlp", h_BTD))
        return h_BTD

    def _attention(self, prefix: str, h_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        qkv = F.linear(h_BTD, self._cast(f"{prefix}.qkv_proj.weight")).unflatten(-1, (3, self.arch.num_heads, -1))
        q_BHTK, k_BHTK, v_BHTK = (part.transpose(1, 2) for part in qkv.unbind(2))
        y_BHTK = F.scaled_dot_product_attention(_rotate(q_BHTK, rotary), _rotate(k_BHTK, rotary), v_BHTK, is_causal=True)
        return F.linear(y_BHTK.transpose(1, 2).flatten(2), self._cast(f"{prefix}.o_proj.weight"))

    def _swiglu(self, prefix: str, h_BTD: Tensor) -> Tensor:
        gate, up = F.linear(h_BTD, self._cast(f"{prefix}.gate_up_proj.weight")).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self._cast(f"{prefix}.down_proj.weight"))


def _rms_norm(x: Tensor) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + _RMS_EPS)).to(x.dtype)


def _rotate(x_BHTK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    low, high = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * rotary[0] + torch.cat((-high, low), dim=-1) * rotary[1]


def stablemax_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """-log p(label) [B, T] in float64, 0 where the label is -100; stablemax as in the original work."""
    v = logits_BTV.to(torch.float64)
    s = torch.where(v < 0, 1 / (1 - v + 1e-30), v + 1)
    logp_BTV = torch.log(s / s.sum(dim=-1, keepdim=True))
    valid_BT = labels_BT != _IGNORE
    chosen_BT = torch.where(valid_BT, labels_BT, 0)
    nll_BT = -logp_BTV.gather(-1, chosen_BT.unsqueeze(-1)).squeeze(-1)
    return torch.where(valid_BT, nll_BT, 0)


def dense_loss(
    output_ND: Tensor, head_VD: Tensor, halt_logits_N: Tensor, labels_N: Tensor, weights_N: Tensor, *_: Any
) -> TokenLoss:
    """models.losses.token_loss from all logits at once, with stablemax in float64."""
    logits_NV = F.linear(output_ND, head_VD.to(output_ND.dtype))
    nll_N = stablemax_cross_entropy(logits_NV, labels_N)
    argmax_N = logits_NV.argmax(-1)
    right_N = (argmax_N == labels_N).to(halt_logits_N.dtype)
    bce_N = F.binary_cross_entropy_with_logits(halt_logits_N, right_N, reduction="none")
    return TokenLoss((nll_N * weights_N).sum() + 0.5 * (bce_N * weights_N).sum(), nll_N.detach(), argmax_N, bce_N.detach())


def train_step(naive: NaiveTRM, optimizer: Optimizer, inputs_BT: Tensor, labels_BT: Tensor, act_steps: int) -> float:
    """Forward, dense float64 loss over all positions, backward, optimizer. Returns the loss at the
    last ACT step, nats per token.

    The objective is that of training: mean over ACT steps and supervised tokens of CE + 0.5 BCE,
    with BCE's gradient only in the halting head.
    """
    states = naive.initial_states(*inputs_BT.shape)
    valid_BT = labels_BT != _IGNORE
    loss = torch.zeros(())
    for _ in range(act_steps):
        z_H, z_L = naive.act_step(states, inputs_BT)
        states = z_H.detach(), z_L.detach()
        step = dense_loss(z_H, naive.weights["lm_head.weight"], naive.halt_logits(states[0]), labels_BT, valid_BT)
        loss = loss + step.total / (act_steps * valid_BT.sum())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(step.nll_N.sum() / valid_BT.sum())
