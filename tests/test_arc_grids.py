"""ARC: augmentations are undone exactly and all differ, canvases have their end markers, and a crop is what was laid out."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dataset.puzzles.arc_grids import (
    COLOURS,
    END_MARKER,
    IDENTITY,
    MAX_SIDE,
    SEQ_LEN,
    Augmentation,
    Codes,
    Grid,
    Pair,
    canonical_pair,
    crop,
    draw_augmentations,
    grid_hash,
    lay_out,
    parse_grid,
    parse_name,
)
from dataset.puzzles.draws import raw_bits

sides = st.integers(1, MAX_SIDE)
grids = st.tuples(sides, sides).flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 9)))
pairs = st.builds(Pair, grids, grids)
augmentations = st.builds(
    lambda form, colours: Augmentation(form, (0, *colours)), st.integers(0, 7), st.permutations(range(1, COLOURS))
)


def codes_of(*some: Augmentation) -> Codes:
    return np.array([(one.form, *one.colours) for one in some], np.uint8)


@given(grids, augmentations)
def test_an_augmentation_is_undone_exactly(grid: Grid, augmentation: Augmentation) -> None:
    np.testing.assert_array_equal(augmentation.invert(augmentation.apply(grid)), grid)
    assert parse_name(augmentation.name("007bbfb7")) == ("007bbfb7", augmentation)
    assert Augmentation.of(codes_of(augmentation)[0]) == augmentation


def test_names_are_the_originals() -> None:
    turned = Augmentation(1, (0, 3, 2, 1, 4, 5, 6, 7, 9, 8))
    assert turned.name("a") == "a|||t1|||0321456798"
    # Colours first, then a quarter turn counter-clockwise.
    assert turned.apply(np.array([[1, 2], [8, 0]], np.uint8)).tolist() == [[2, 0], [3, 9]]
    assert parse_name("a") == ("a", IDENTITY)


@pytest.mark.parametrize(
    "name", ["a|||t8|||0123456789", "a|||t1|||012345678", "a|||t1|||0123456788", "a|||1|||0123456789", "a|||t1"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        parse_name(name)


def naive_canvas(grid: Grid, row: int, column: int) -> Grid:
    canvas = np.zeros((MAX_SIDE + 1, MAX_SIDE + 1), np.uint8)
    height, width = grid.shape
    canvas[row : row + height, column : column + width] = grid + 2
    canvas[row + height, column : column + width] = END_MARKER
    canvas[row : row + height, column + width] = END_MARKER
    return canvas[:MAX_SIDE, :MAX_SIDE]


@given(st.lists(pairs, min_size=1, max_size=3), st.lists(augmentations, min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_canvases(some: list[Pair], augmented: list[Augmentation], shifted: bool, seed: int) -> None:
    """All stands where the input's first cell does, with the right end markers; one pair of each form stands in the corner."""
    laid = lay_out(some, codes_of(*augmented), raw_bits(seed) if shifted else None)
    for form, augmentation in enumerate(augmented):
        corners = []
        for index, pair in enumerate(some):
            canvases = [side[form, index].reshape(MAX_SIDE, MAX_SIDE) for side in laid]
            row, column = (int(np.flatnonzero((canvases[0] > END_MARKER).any(axis=axis))[0]) for axis in (1, 0))
            corners.append((row, column))
            for canvas, grid in zip(canvases, pair, strict=True):
                turned = augmentation.apply(grid)
                assert row + turned.shape[0] <= MAX_SIDE and column + turned.shape[1] <= MAX_SIDE
                np.testing.assert_array_equal(canvas, naive_canvas(turned, row, column))
        assert (0, 0) in corners if shifted else set(corners) == {(0, 0)}


@pytest.mark.parametrize(
    ("height", "width", "markers"),
    [(2, 3, 5), (30, 30, 0), (30, 2, 30), (2, 30, 30), (29, 29, 58), (1, 1, 2)],
)
def test_markers_beyond_the_canvas_are_left_out(height: int, width: int, markers: int) -> None:
    grid = np.zeros((height, width), np.uint8)
    canvas = lay_out([Pair(grid, grid)], codes_of(IDENTITY), None)[0][0, 0].reshape(MAX_SIDE, MAX_SIDE)
    assert np.count_nonzero(canvas == END_MARKER) == markers
    if height < MAX_SIDE and width < MAX_SIDE:
        assert canvas[height, width] == 0


def test_places_are_spread_over_all_that_fit() -> None:
    pair = Pair(np.ones((28, 1), np.uint8), np.ones((1, 29), np.uint8))
    inputs, _ = lay_out([pair, pair], np.repeat(codes_of(IDENTITY), 600, axis=0), raw_bits(0))
    places = [tuple(np.argwhere(canvas.reshape(30, 30) > END_MARKER)[0].tolist()) for canvas in inputs[:, 0]]
    # Half of the forms leave this pair in the corner, the others move it to one of 3 x 2 places.
    counts = {place: places.count(place) for place in set(places)}
    assert set(counts) == {(row, column) for row in range(3) for column in range(2)}
    assert counts.pop((0, 0)) > 300 and all(25 < count < 80 for count in counts.values())


@given(grids)
def test_a_canvas_in_the_corner_is_cropped_to_its_grid(grid: Grid) -> None:
    [cropped] = crop(naive_canvas(grid, 0, 0).reshape(1, SEQ_LEN))
    np.testing.assert_array_equal(cropped, grid)


@given(arrays(np.int64, (2, SEQ_LEN), elements=st.sampled_from([0, 1, 2, 5, 11, 12])))
@settings(max_examples=30)
def test_any_canvas_is_cropped_to_the_largest_rectangle(canvases: np.ndarray) -> None:
    for cropped, canvas in zip(crop(canvases), canvases.reshape(-1, MAX_SIDE, MAX_SIDE), strict=True):
        best = (0, 0)
        for rows in range(1, MAX_SIDE + 1):
            for columns in range(1, MAX_SIDE + 1):
                part = canvas[:rows, :columns]
                if np.all((part >= 2) & (part <= 11)) and rows * columns > best[0] * best[1]:
                    best = rows, columns
        assert cropped.shape == best
        np.testing.assert_array_equal(cropped, canvas[: best[0], : best[1]] - 2)


def test_of_rectangles_of_one_size_the_first_is_cropped() -> None:
    canvas = np.zeros((MAX_SIDE, MAX_SIDE), np.int64)
    canvas[0, :4] = canvas[:2, :2] = 3
    [cropped] = crop(canvas.reshape(1, -1))
    assert cropped.shape == (1, 4)


def sorted_pairs(some: list[Pair]) -> list[tuple[Any, ...]]:
    return sorted((pair.input.tolist(), pair.output.tolist()) for pair in some)


@settings(max_examples=30)
@given(st.lists(pairs, min_size=1, max_size=3), st.integers(0, 9), st.integers(0, 2**63))
def test_augmented_puzzles_all_differ(some: list[Pair], count: int, seed: int) -> None:
    codes = draw_augmentations(some, count, seed, "a")
    assert Augmentation.of(codes[0]) == IDENTITY and len(codes) <= count + 1
    puzzles = []
    for code in codes:
        augmentation = Augmentation.of(code)
        assert augmentation.colours[0] == 0 and sorted(augmentation.colours) == list(range(COLOURS))
        puzzles.append(sorted_pairs([Pair(augmentation.apply(pair.input), augmentation.apply(pair.output)) for pair in some]))
    assert all(puzzle not in puzzles[:index] for index, puzzle in enumerate(puzzles))
    np.testing.assert_array_equal(codes, draw_augmentations(some, count, seed, "a"))


def test_a_black_puzzle_has_no_other_form_and_one_colour_has_nine() -> None:
    black, one = np.zeros((2, 2), np.uint8), np.full((2, 2), 3, np.uint8)
    assert len(draw_augmentations([Pair(black, black)], 100, 0, "a")) == 1
    assert len(draw_augmentations([Pair(black, one)], 100, 0, "a")) == 9


def test_pairs_that_only_change_places_are_the_same_puzzle() -> None:
    """Turned by a quarter, each of these pairs becomes the next: so turned the puzzle is the same."""
    first = np.array([[1, 2], [0, 0]], np.uint8)
    turns = [Pair(np.rot90(first, turn), np.rot90(first, turn)) for turn in range(4)]
    assert len(draw_augmentations(turns, 2000, 0, "a")) < len(draw_augmentations(turns[:1], 2000, 0, "a"))


def test_draws_depend_on_seed_and_name() -> None:
    pair = Pair(np.arange(9, dtype=np.uint8).reshape(3, 3), np.ones((1, 1), np.uint8))
    drawn = [draw_augmentations([pair], 5, seed, name).tolist() for seed, name in [(0, "a"), (1, "a"), (0, "b")]]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@given(pairs, augmentations)
def test_the_canonical_pair_is_that_of_every_augmented_form(pair: Pair, augmentation: Augmentation) -> None:
    turned = Pair(augmentation.apply(pair.input), augmentation.apply(pair.output))
    assert canonical_pair(turned) == canonical_pair(pair)


def test_the_canonical_pair_keeps_black_and_sides_apart() -> None:
    black, blue = np.zeros((1, 2), np.uint8), np.ones((1, 2), np.uint8)
    kinds = [Pair(black, blue), Pair(blue, black), Pair(black, black), Pair(blue, blue), Pair(black, blue.T)]
    assert len({canonical_pair(pair) for pair in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "rows of the same length"),
        ([], "rows of the same length"),
        ([1, 2], "rows of the same length"),
        ([[1], [1, 2]], "rows of the same length"),
        ([[]], "at most 30 x 30"),
        ([[0] * 31], "found 1 x 31"),
        ([[10]], "colours 0 to 9"),
        ([[-1]], "colours 0 to 9"),
        ([[1.0]], "colours 0 to 9"),
        ([["1"]], "colours 0 to 9"),
    ],
)
def test_what_is_no_grid_is_told(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_grid(value)


def test_grids_of_other_shape_hash_otherwise() -> None:
    row = np.array([[1, 2]], np.uint8)
    assert grid_hash(row) != grid_hash(row.T)
    assert grid_hash(row) == grid_hash(np.asfortranarray(row))
