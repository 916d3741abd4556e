"""When a puzzle's row halts, and what its continuing logit should foretell: the rules of TinyRecursiveModels and HRM.

Numbers in, numbers out: draws nothing and knows no slots. Text halts by token instead (models/act.py).
"""

import torch
from torch import Tensor

from config.schema import ArchConfig


def halted(config: ArchConfig, halt_logits_B2: Tensor, steps_B: Tensor, minimum_B: Tensor | None) -> Tensor:
    """Which rows leave after an ACT step (bool[B]): all at `halt_max_steps`, others by their logits, if rows may halt early at all.

    halt_logits_B2: halting and continuing logits after the step. steps_B: ACT steps so far, this one counted. minimum_B: in
    training, the depth that exploration drew for each row at this step (0 for most); None in evaluation, where `act_inference`
    decides.
    """
    leaves_B = steps_B >= config.halt_max_steps
    if not (config.act_inference if minimum_B is None else config.act_enabled):
        return leaves_B
    halt_B, continue_B = halt_logits_B2.unbind(-1)
    leaves_B = leaves_B | (halt_B > (0 if config.no_ACT_continue else continue_B))
    return leaves_B if minimum_B is None else leaves_B & (steps_B >= minimum_B)


def continue_target(next_halt_logits_B2: Tensor, is_last_B: Tensor) -> Tensor:
    """The probability [B] that the continuing logit is trained towards (HRM, arXiv 2506.21734, "Adaptive computational time").

    The value of going on is that of the better choice after the next ACT step, of whose logits `next_halt_logits_B2` a forward
    without gradient from the new states tells; after the last step (bool `is_last_B`) there is no choice but to halt.
    """
    halt_B, continue_B = next_halt_logits_B2.unbind(-1)
    return torch.where(is_last_B, halt_B, torch.maximum(halt_B, continue_B)).sigmoid()
