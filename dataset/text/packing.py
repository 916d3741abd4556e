"""Packing: the layout of conversations in rows for attention: one per row, in groups of similar
length, or several per row.

Everything but attention works on concatenated tokens, so a layout affects only the cost of
attention. Knows only numbers. Shape suffixes: R documents, N tokens.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Packing = Literal["off", "bucketed", "packed"]
Integers = npt.NDArray[np.int64]

# A document shorter than this fraction of its group's longest begins the next group, up to a number
# of groups: padding of short rows costs little.
_LEAST_FILL = 0.7
_MOST_GROUPS = 4


class Rows(NamedTuple):
    """Rows of equal width. `index_N`: row * positions + position, for each token."""

    index_N: Integers
    rows: int
    positions: int


@dataclass(frozen=True)
class Layout:
    """The places of the tokens of R documents.

    place_N: each token's place in documents right-padded to `width`: document * width + position.
    position_N: position in its document. document_N: its document, R for the few padding positions
    that count as tokens. groups: the rows for attention; the tokens are in the order of the groups.
    """

    place_N: Integers
    width: int
    position_N: Integers
    document_N: Integers
    groups: tuple[Rows, ...]

    @property
    def starts(self) -> Integers:
        """Offset of each document's first token, including padding as a document, and N at the end."""
        return np.flatnonzero(np.diff(self.document_N, prepend=-1, append=-1))

    @property
    def attended(self) -> int:
        """Positions that attention computes, padding included."""
        return sum(group.rows * group.positions for group in self.groups)


def row_layout(lengths_R: Integers, packing: Packing, multiple: int = 1, token_multiple: int = 1) -> Layout:
    """The layout of documents of these lengths (each at least 1).

    off: one per row, padded to the longest. bucketed: one per row, in groups of similar length.
    packed: several per row, best fit into rows as wide as the longest. multiple, token_multiple: as
    in `tokens_in_rows`; padding positions that count as tokens form their own document.
    """
    index_N, width = tokens_in_rows(lengths_R, multiple, token_multiple)
    if packing == "off":
        document_N = np.where(index_N % width < lengths_R[index_N // width], index_N // width, len(lengths_R))
        return Layout(index_N, width, index_N % width, document_N, (Rows(index_N, len(lengths_R), width),))
    padding = index_N[index_N % width >= lengths_R[index_N // width]]
    lengths = np.append(lengths_R, len(padding)) if len(padding) else lengths_R
    groups = _by_length(lengths) if packing == "bucketed" else [np.arange(len(lengths))]
    order = np.concatenate(groups)
    places = np.concatenate([_runs(np.arange(len(lengths_R)) * width, lengths_R), padding])
    begins = np.cumsum(lengths) - lengths
    rows = []
    for group in groups:
        of_group = lengths[group]
        positions = -(-int(of_group.max()) // multiple) * multiple
        row, offset = best_fit(of_group, positions) if packing == "packed" else (np.arange(len(group)), 0)
        rows.append(Rows(_runs(row * positions + offset, of_group), int(row.max()) + 1, positions))
    return Layout(
        place_N=places[_runs(begins[order], lengths[order])],
        width=width,
        position_N=_runs(np.zeros_like(order), lengths[order]),
        document_N=np.repeat(order, lengths[order]),
        groups=tuple(rows),
    )


def tokens_in_rows(lengths_R: Integers, multiple: int = 1, token_multiple: int = 1) -> tuple[Integers, int]:
    """Places of the tokens of right-padded rows, row * positions + position, ascending; and the number of
    positions, a multiple of `multiple`. Some padding positions count as tokens, so that the number of
    tokens is a multiple of `token_multiple`; rows may be that much wider than the longest one.
    """
    real = int(lengths_R.sum())
    rounded = -(-real // token_multiple) * token_multiple
    positions = max(int(lengths_R.max()), -(-rounded // len(lengths_R)))
    positions = -(-positions // multiple) * multiple
    is_token = (np.arange(positions) < lengths_R[:, None]).ravel()
    is_token[np.flatnonzero(~is_token)[: rounded - real]] = True
    return np.flatnonzero(is_token), positions


def best_fit(lengths_R: Integers, positions: int) -> tuple[Integers, Integers]:
    """Row and first position of each document, by best fit decreasing.

    Needs at most 11/9 of the fewest possible rows, plus a few (Johnson et al. 1974). No document
    may be longer than `positions`.
    """
    if lengths_R.max(initial=0) > positions:
        raise ValueError(f"a document of {lengths_R.max()} tokens doesn't fit a row of {positions}")
    row_R, offset_R = np.zeros_like(lengths_R), np.zeros_like(lengths_R)
    rooms: list[tuple[int, int]] = []  # room left, row
    for document in np.argsort(-lengths_R, kind="stable").tolist():
        length = int(lengths_R[document])
        at = bisect_left(rooms, (length, -1))
        room, row = rooms.pop(at) if at < len(rooms) else (positions, len(rooms))
        row_R[document], offset_R[document] = row, positions - room
        insort(rooms, (room - length, row))
    return row_R, offset_R


def _by_length(lengths_R: Integers) -> list[Integers]:
    """Groups of documents, longest first."""
    order = np.argsort(-lengths_R, kind="stable")
    groups: list[Integers] = []
    while len(order) and len(groups) < _MOST_GROUPS - 1:
        longest = lengths_R[order[0]]
        count = int(np.count_nonzero(lengths_R[order] >= _LEAST_FILL * longest))
        groups.append(order[:count])
        order = order[count:]
    return [*groups, order] if len(order) else groups


def _runs(begins: Integers, lengths: Integers) -> Integers:
    """begin, begin + 1, ... for each run, concatenated."""
    before = np.cumsum(lengths) - lengths
    runs: Integers = np.repeat(begins - before, lengths) + np.arange(int(lengths.sum()))
    return runs
