"""The learning-rate schedule: by examples for text, by steps for puzzles."""

import math

from config.schema import PretrainInstructConfig


def expected_examples(config: PretrainInstructConfig, total: int) -> int:
    """Examples of a run on text: the `total` of its data, or fewer with `max_steps`."""
    return total if config.max_steps is None else min(total, config.max_steps * config.global_batch_size)


def lr_factor_by_examples(admitted: int, total: float, *, min_ratio: float, warmup_steps: int, batch_size: int) -> float:
    """Fraction of the peak learning rate: warm-up, then a cosine down to `min_ratio` at `total`.

    Warm-up lasts min(warmup_steps * batch_size, total / 10) examples.
    """
    warmup = min(warmup_steps * batch_size, total / 10)
    rise = min(1.0, admitted / warmup) if warmup > 0 else 1.0
    progress = max(0.0, (admitted - warmup) / (total - warmup))
    return rise * (min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * progress)))


def lr_factor_by_steps(step: int, total: int, *, min_ratio: float, warmup_steps: int) -> float:
    """The original's fraction of the peak learning rate at optimizer step `step` (from 1) of `total`.

    Linear warm-up over `warmup_steps`, then a cosine down to `min_ratio` at step `total`.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    return min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * progress))
