"""The eight symmetries: the original's numbering, and what undoes each."""

import numpy as np
import pytest

from dataset.puzzles.dihedral import FORMS, INVERSE, dihedral

GRID = np.array([[1, 2, 3], [4, 5, 6]])


def test_the_numbering() -> None:
    expected = [
        [[1, 2, 3], [4, 5, 6]],
        [[3, 6], [2, 5], [1, 4]],
        [[6, 5, 4], [3, 2, 1]],
        [[4, 1], [5, 2], [6, 3]],
        [[3, 2, 1], [6, 5, 4]],
        [[4, 5, 6], [1, 2, 3]],
        [[1, 4], [2, 5], [3, 6]],
        [[6, 3], [5, 2], [4, 1]],
    ]
    assert [dihedral(GRID, form).tolist() for form in range(FORMS)] == expected


@pytest.mark.parametrize("form", range(FORMS))
def test_each_is_undone_also_in_a_batch(form: int) -> None:
    batch = np.stack([GRID, GRID + 10])
    np.testing.assert_array_equal(dihedral(dihedral(batch, form), INVERSE[form]), batch)
    np.testing.assert_array_equal(dihedral(batch, form)[1], dihedral(GRID + 10, form))


def test_there_are_no_others() -> None:
    with pytest.raises(ValueError):
        dihedral(GRID, FORMS)
