"""The learning rate: for text by examples admitted, however long rows stay in their slots, for puzzles by steps."""

import math


def learning_rate(admitted: int, total: float, *, base: float, min_ratio: float, warmup_steps: int, batch_size: int) -> float:
    """Linear warm-up, then a cosine from `base` down to `base * min_ratio` at `admitted == total`.

    Warm-up lasts min(warmup_steps * batch_size, total / 10) examples.
    """
    warmup = min(warmup_steps * batch_size, total / 10)
    rise = min(1.0, admitted / warmup) if warmup > 0 else 1.0
    progress = max(0.0, (admitted - warmup) / (total - warmup))
    return base * rise * (min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * progress)))


def learning_rate_at_step(step: int, total: int, *, min_ratio: float, warmup_steps: int) -> float:
    """The original's share of the peak learning rate at optimizer step `step` (from 1) of `total`.

    Linear warm-up over `warmup_steps`, however long the run, then a cosine from 1 down to `min_ratio` at step `total`.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * progress))
