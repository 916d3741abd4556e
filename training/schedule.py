"""The learning rate as a function of examples admitted, so that it doesn't depend on how long rows stay in their slots."""

import math


def learning_rate(admitted: int, total: int, *, base: float, min_ratio: float, warmup_steps: int, batch_size: int) -> float:
    """Linear warm-up, then a cosine from `base` down to `base * min_ratio` at `admitted == total`.

    Warm-up lasts min(warmup_steps * batch_size, total / 10) examples.
    """
    warmup = min(warmup_steps * batch_size, total / 10)
    rise = min(1.0, admitted / warmup) if warmup > 0 else 1.0
    progress = max(0.0, (admitted - warmup) / (total - warmup))
    return base * rise * (min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * progress)))
