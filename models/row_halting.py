"""When a puzzle's row halts, and the target of its continuing logit: the rules of TRM and HRM.

Pure functions: no random numbers, no slots. Text halts by token instead (models/act.py).
"""

import torch
from torch import Tensor

from config.schema import ArchConfig


def halted(config: ArchConfig, halt_logits_B2: Tensor, steps_B: Tensor, minimum_B: Tensor | None) -> Tensor:
    """Which rows halt after an ACT step (bool[B]): all at `halt_max_steps`, and by their logits if
    rows may halt early.

    halt_logits_B2: halting and continuing logits after the step. steps_B: ACT steps so far, with
    this one. minimum_B: in training, the minimum depth from exploration for each row at this step
    (0 for most); None in evaluation, where `act_inference` decides.
    """
    leaves_B = steps_B >= config.halt_max_steps
    if not (config.act_inference if minimum_B is None else config.act_enabled):
        return leaves_B
    halt_B, continue_B = halt_logits_B2.unbind(-1)
    leaves_B = leaves_B | (halt_B > (0 if config.no_ACT_continue else continue_B))
    return leaves_B if minimum_B is None else leaves_B & (steps_B >= minimum_B)


def continue_target(next_halt_logits_B2: Tensor, is_last_B: Tensor) -> Tensor:
    """The target probability [B] of the continuing logit (HRM, arXiv 2506.21734, "Adaptive
    computational time").

    The value of continuing is the value of the better choice after the next ACT step. A forward
    without gradient from the new states gives its logits `next_halt_logits_B2`. After the last step
    (bool `is_last_B`) the only choice is to halt.
    """
    halt_B, continue_B = next_halt_logits_B2.unbind(-1)
    return torch.where(is_last_B, halt_B, torch.maximum(halt_B, continue_B)).sigmoid()
