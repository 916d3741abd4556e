"""Layouts: every token stands once, documents don't mix, rows are filled well."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.text.packing import Layout, Packing, best_fit, row_layout, tokens_in_rows

documents = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(np.array)


@given(documents, st.sampled_from([1, 8]), st.sampled_from([1, 8, 64]))
def test_tokens_in_rows_are_all_tokens_and_a_little_padding(lengths: np.ndarray, multiple: int, token_multiple: int) -> None:
    index, positions = tokens_in_rows(lengths, multiple, token_multiple)
    assert positions % multiple == 0 and max(lengths) <= positions < max(lengths) + token_multiple + multiple
    assert len(index) % token_multiple == 0 and len(index) < sum(lengths) + token_multiple
    assert index.tolist() == sorted(set(index.tolist())) and index[-1] < len(lengths) * positions
    assert {row * positions + t for row, length in enumerate(lengths) for t in range(length)} <= set(index.tolist())


def stands(layout: Layout) -> list[tuple[int, int, int]]:
    """Group, row and position of every token, in their order."""
    return [
        (number, *divmod(index, group.positions)) for number, group in enumerate(layout.groups) for index in group.index_N.tolist()
    ]


@given(documents, st.sampled_from(get_args(Packing)), st.sampled_from([1, 8]), st.sampled_from([1, 8, 64]))
def test_every_token_stands_once_and_next_to_its_own(
    lengths: np.ndarray, packing: Packing, multiple: int, token_multiple: int
) -> None:
    layout = row_layout(lengths, packing, multiple, token_multiple)
    places = stands(layout)
    assert len(places) == len(set(places)) == len(set(layout.place_N.tolist())) == len(layout.place_N)
    assert len(places) % token_multiple == 0
    assert set(layout.place_N.tolist()) == set(tokens_in_rows(lengths, multiple, token_multiple)[0].tolist())
    assert all(row < layout.groups[group].rows and position < layout.groups[group].positions for group, row, position in places)
    assert all(group.positions % multiple == 0 for group in layout.groups) and len(layout.groups) <= 4
    assert layout.attended == sum(group.rows * group.positions for group in layout.groups) >= len(places)
    begins: dict[int, tuple[int, int, int]] = {}
    for (group, row, at), place, position, document in zip(
        places, layout.place_N.tolist(), layout.position_N.tolist(), layout.document_N.tolist(), strict=True
    ):
        if document == len(lengths):
            continue
        assert divmod(place, layout.width) == (document, position), "a place is the document and the position in it"
        # In a row, a document's tokens stand side by side, in order.
        assert begins.setdefault(document, (group, row, at - position)) == (group, row, at - position)
    assert len(begins) == len(lengths)
    if packing != "packed":
        assert len({begin[:2] for begin in begins.values()}) == len(lengths), "a row of its own for each"


@given(documents, st.integers(40, 90))
def test_documents_fit_their_rows_and_do_not_overlap(lengths: np.ndarray, positions: int) -> None:
    row, offset = best_fit(lengths, positions)
    taken = [
        (r, o + t) for r, o, length in zip(row.tolist(), offset.tolist(), lengths.tolist(), strict=True) for t in range(length)
    ]
    assert len(taken) == len(set(taken)) and all(position < positions for _, position in taken)
    assert set(row.tolist()) == set(range(row.max() + 1)), "no row is empty"
    filled = np.bincount(row, weights=lengths)
    assert len(filled) == 1 or np.sort(filled)[:2].sum() > positions, "no two rows would fit into one"


def test_best_fit_takes_the_row_with_the_least_room() -> None:
    row, offset = best_fit(np.array([6, 5, 3, 4, 1]), 10)
    assert row.tolist() == [0, 1, 1, 0, 1] and offset.tolist() == [0, 0, 5, 6, 8]
    with pytest.raises(ValueError, match="11 tokens doesn't fit a row of 10"):
        best_fit(np.array([3, 11]), 10)


def test_groups_and_packing_leave_less_padding() -> None:
    lengths = np.random.default_rng(0).integers(20, 513, 48)
    attended = {packing: row_layout(lengths, packing, 8, 64).attended for packing in get_args(Packing)}
    real = int(lengths.sum())
    assert 1 - real / attended["off"] > 0.4
    assert 1 - real / attended["bucketed"] < 0.25 and 1 - real / attended["packed"] < 0.2
