"""Greedy decoding of a batch over cached keys and values: prefill, then one loop that yields a token per row.

Ids in, ids out; it knows no text and no tokenizer. At a fixed number of ACT steps it equals full recomputation; with a halting
threshold an assistant's token stops for good on its own, those of earlier answers too, and prompt segments go to full depth. Shape
suffixes as in models/layers.py.
"""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.act import RecursiveModel
from models.cache import KVCache
from models.layers import Mask
from models.losses import log_probs


@dataclass(frozen=True)
class Prompt:
    """Ids of a history and the opening of the answer, and the prompt segment of each (0: assistant text)."""

    ids: np.ndarray
    segment: np.ndarray


@dataclass(frozen=True)
class DecodedTokens:
    """What one tick gave: a token for every row of the batch, finished rows included (`alive` says which count)."""

    ids_B: Tensor
    logp_BV: Tensor
    """log p over the vocabulary at this position."""
    act_steps_B: Tensor
    """ACT steps behind each row's choice."""
    alive: np.ndarray
    """bool[B]: rows that had not finished before this token; an EOS is still alive."""


class Engine:
    """Decodes with one set of weights, which must not change while it lives."""

    def __init__(self, model: RecursiveModel, *, eos_id: int, act_steps: int, halt_threshold: float | None = None) -> None:
        self.model = model
        self.eos_id = eos_id
        self.act_steps = act_steps
        self.halt_threshold = halt_threshold
        layers = sum(model.recursion.levels[level] for level in model.level_calls)
        self._lanes = layers

    def cache_bytes(self, rows: int, positions: int) -> int:
        """Memory of the keys and values of `rows` rows of `positions` positions."""
        element = torch.empty((), dtype=self.model.dtype).element_size()
        return self.act_steps * self._lanes * 2 * rows * positions * self.model.config.hidden_size * element

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Prompt], max_new_tokens: Sequence[int]) -> Iterator[DecodedTokens]:
        """Yield tokens until every row has given EOS or `max_new_tokens` (one number per row, at least 1)."""
        model, device = self.model, self.model.device
        rows = len(prompts)
        cache = KVCache(
            act_steps=self.act_steps,
            lanes=self._lanes,
            rows=rows,
            heads=model.config.num_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            device=device,
        )
        lengths = np.array([len(prompt.ids) for prompt in prompts])
        limits = np.array(max_new_tokens)
        output_BD = self._prefill(cache, prompts, lengths)
        steps_B = torch.full((rows,), self.act_steps, device=device)
        finished = np.zeros(rows, bool)
        produced = 0
        while True:
            logits_BV = model.logits(output_BD)
            logp_BV = log_probs(logits_BV, model.config.loss)
            ids_B = logits_BV.argmax(dim=-1)
            produced += 1
            yield DecodedTokens(ids_B, logp_BV, steps_B, ~finished)
            finished |= (ids_B == self.eos_id).cpu().numpy() | (produced >= limits)
            if finished.all():
                return
            output_BD, steps_B = self._extend(cache, ids_B, lengths + produced - 1)

    def _prefill(self, cache: KVCache, prompts: Sequence[Prompt], lengths: np.ndarray) -> Tensor:
        """Run whole prompts; the output [B, D] at each row's last position."""
        model, device = self.model, self.model.device
        rows, width = len(prompts), int(lengths.max())
        ids = np.zeros((rows, width), np.int64)
        segments = np.zeros((rows, width), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = prompt.ids
            segments[row, : lengths[row]] = prompt.segment
        segments_BT = torch.from_numpy(segments).to(device)
        cache.write_at(0, width)
        refinement = model.refine(
            torch.from_numpy(ids).to(device),
            torch.arange(width, device=device),
            model.mask(segments_BT),
            act_steps=self.act_steps,
            lanes=cache,
            halt_threshold=self.halt_threshold,
            # Earlier answers halt as they did when they were given.
            may_halt_BT=segments_BT == 0,
        )
        refined = collections.deque(refinement, maxlen=1).pop()
        last = torch.from_numpy(lengths - 1).to(device)
        return refined.output_BTD[torch.arange(rows, device=device), last]

    def _extend(self, cache: KVCache, ids_B: Tensor, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Run one new token a row at its own position: the output [B, D] it halted with, and its ACT steps [B]."""
        model, device = self.model, self.model.device
        positions_B = torch.from_numpy(positions).to(device)
        if (positions == positions[0]).all():
            cache.write_at(int(positions[0]), 1)
            mask = Mask()
        else:
            used = cache.write_at_positions(positions_B.unsqueeze(1), int(positions.max()) + 1)
            visible_BS = torch.arange(used, device=device) <= positions_B.unsqueeze(1)
            mask = Mask(visible=visible_BS[:, None, None, :])
        refinement = model.refine(
            ids_B.unsqueeze(1),
            positions_B.unsqueeze(1),
            mask,
            act_steps=self.act_steps,
            lanes=cache,
            halt_threshold=self.halt_threshold,
        )
        refined = collections.deque(refinement, maxlen=1).pop()
        steps_B = refined.steps_BT[:, 0]
        if self.halt_threshold is not None:
            cache.carry_halted(steps_B - 1, positions_B)
        return refined.output_BTD[:, 0], steps_B
