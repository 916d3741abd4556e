"""Weight initialisation as in JAX: a truncated normal with the given standard deviation."""

from torch import Tensor, nn

# Standard deviation of a unit normal cut at +-2: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)).
_STD_OF_NORMAL_CUT_AT_2 = 0.87962566103423978


def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill `tensor` from a normal truncated at 2 std, rescaled to standard deviation `std`."""
    scale = std / _STD_OF_NORMAL_CUT_AT_2
    return nn.init.trunc_normal_(tensor, std=scale, a=-2 * scale, b=2 * scale)
