"""The eight symmetries of a square, numbered as in the original. Knows no puzzle."""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

FORMS = 8
# Only the quarter turns aren't their own inverse.
INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)

Cell = TypeVar("Cell", bound=np.generic)


def dihedral(grids: npt.NDArray[Cell], form: int) -> npt.NDArray[Cell]:
    """Rotate or mirror grids [..., R, C], as a view if possible.

    form: 0 nothing; 1, 2, 3 quarter turns counter-clockwise; 4 left-right; 5 up-down; 6 transposed;
    7 left-right after a quarter turn.
    """
    if not 0 <= form < FORMS:
        raise ValueError(f"no such symmetry: {form}")
    result: npt.NDArray[Any]
    if form < 4:
        result = np.rot90(grids, form, axes=(-2, -1))
    elif form == 4:
        result = grids[..., ::-1]
    elif form == 5:
        result = grids[..., ::-1, :]
    elif form == 6:
        result = np.swapaxes(grids, -2, -1)
    else:
        result = np.rot90(grids, 1, axes=(-2, -1))[..., ::-1]
    return result
