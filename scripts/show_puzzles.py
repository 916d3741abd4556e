"""Draw puzzles of a data set, and a model's answers at each ACT step, as one PNG.

    python scripts/show_puzzles.py --data-path data/sudoku6 --split test --rows 0 1 2 --output puzzles.png \\
        [--outputs CHECKPOINT/outputs_test.safetensors]

Saved outputs have `rows` [n], numbers of examples, and `preds` [n, positions] or `preds_by_step`
[n, ACT steps, positions], or both. A wrong cell has a red frame. Needs `pip install -r
requirements-data.txt`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed: run `pip install -r requirements-data.txt`")

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from config.errors import UsageError, one_clear_message
from config.schema import user_path
from dataset.puzzles import sudoku
from dataset.puzzles.kinds import Arc, Kind, Sudoku, kind_of
from dataset.puzzles.loader import IGNORE_LABEL_ID, PuzzleData

_PANEL_INCHES = 2.4
# With more rows the picture would be too large to look at.
_MOST_ROWS = 50
_PADDING = "#f4f4f4"
# The end marker, then ARC's colours.
_ARC_COLOURS = [
    _PADDING, "#c8b6d9", "#000000", "#0074d9", "#ff4136", "#2ecc40",
    "#ffdc00", "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25",
]  # fmt: skip
_MAZE_COLOURS = [_PADDING, "#333333", "#ffffff", "#2ecc40", "#b10dc9", "#7fb8ff"]

Tokens = npt.NDArray[np.int64]


def read_predictions(path: Path, row: int) -> list[tuple[str, Tokens]]:
    """Titles and tokens of a row's predictions, ACT steps first. Raises `UsageError`."""
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} can't be read as saved outputs: {error}") from error
    if "rows" not in saved or not saved.keys() & {"preds", "preds_by_step"}:
        raise UsageError(f"{path}: expected tensors rows and preds or preds_by_step, found {', '.join(sorted(saved))}")
    places = np.flatnonzero(saved["rows"] == row)
    if not len(places):
        raise UsageError(f"{path} has no outputs of row {row}: choose other --rows")
    steps = saved["preds_by_step"][places[0]] if "preds_by_step" in saved else []
    panels = [(f"ACT step {number}", tokens.astype(np.int64)) for number, tokens in enumerate(steps, 1)]
    return panels + ([("prediction", saved["preds"][places[0]].astype(np.int64))] if "preds" in saved else [])


def draw(data: PuzzleData, rows: Sequence[int], outputs: Path | None, path: Path) -> None:
    """Draw a line of panels for each row: input, answer, predictions. Raises `UsageError`."""
    kind = kind_of(data.metadata)
    [set_name, *_] = data.sets
    size = len(data.sets[set_name])
    if not 0 < len(rows) <= _MOST_ROWS or not all(0 <= row < size for row in rows):
        raise UsageError(f"--rows: expected at most {_MOST_ROWS} numbers from 0 to {size - 1}, found {' '.join(map(str, rows))}")
    batch = data.batch(set_name, np.array(rows), len(rows))
    lines = []
    for index, row in enumerate(rows):
        supervised = batch.labels[index] != IGNORE_LABEL_ID
        answer = np.where(supervised, batch.labels[index], data.metadata.pad_id)
        panels = [(f"row {row}", batch.inputs[index].astype(np.int64)), ("answer", answer)]
        predicted = read_predictions(outputs, row) if outputs else []
        for title, tokens in predicted:
            if tokens.shape != answer.shape or not 0 <= tokens.min() <= tokens.max() < data.metadata.vocab_size:
                raise UsageError(f"{outputs}: its predictions don't fit this data set: were they made on it?")
            wrong = int(np.count_nonzero((tokens != answer) & supervised))
            panels.append((f"{title}: {f'{wrong} wrong' if wrong else 'right'}", tokens))
        lines.append((panels, answer, supervised))
    columns = max(len(panels) for panels, _, _ in lines)
    figure = Figure(figsize=(_PANEL_INCHES * columns, _PANEL_INCHES * 1.15 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for line, (panels, answer, supervised) in zip(axes, lines, strict=True):
        seen = ((panels[0][1] != data.metadata.pad_id) | supervised).reshape(kind.side, kind.side)
        for axis in line:
            axis.axis("off")
        for number, (axis, (title, tokens)) in enumerate(zip(line, panels, strict=False)):
            wrong_cells = (tokens != answer) & supervised if number > 1 else np.zeros_like(supervised)
            _draw_grid(axis, tokens.reshape(kind.side, -1), wrong_cells.reshape(kind.side, -1), seen, kind)
            axis.set_title(title, fontsize=8)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UsageError(f"the picture can't be written to {str(path)!r}: {error}; name another --output") from error


def _draw_grid(axis: Any, tokens: Tokens, wrong: npt.NDArray[np.bool_], seen: npt.NDArray[np.bool_], kind: Kind) -> None:
    """A colour for each token; Sudokus are white, with digits."""
    is_sudoku = isinstance(kind, Sudoku)
    colours = ["#ffffff"] * 2 if is_sudoku else _ARC_COLOURS if isinstance(kind, Arc) else _MAZE_COLOURS
    axis.pcolormesh(tokens, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1, edgecolors="#999999", linewidth=0.3)
    for row, column in np.argwhere(wrong).tolist():
        axis.add_patch(Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, fill=False, edgecolor="red", linewidth=1.2))
    if is_sudoku:
        for (row, column), token in np.ndenumerate(tokens):
            if token > 1:
                axis.text(column + 0.5, row + 0.5, str(token - 1), ha="center", va="center", fontsize=8)
        [shape] = [shape for shape in (sudoku.NINE, sudoku.SIX) if shape.side == kind.side]
        axis.hlines(range(0, kind.side + 1, shape.box_height), 0, kind.side, color="black", linewidth=1)
        axis.vlines(range(0, kind.side + 1, shape.box_width), 0, kind.side, color="black", linewidth=1)
    # A canvas is mostly padding: show only the part with the puzzle.
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    axis.set(xlim=(columns[0], columns[-1] + 1), ylim=(rows[-1] + 1, rows[0]), aspect="equal")


def main(arguments: list[str] | None = None) -> None:
    """The command; exit status 2 and one message if the input can't be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=os.path.expanduser, required=True, help="folder of a puzzle data set")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 1, 2], help="numbers of examples")
    parser.add_argument("--outputs", type=user_path, help="saved outputs (safetensors) with predictions for these rows")
    parser.add_argument("--output", type=user_path, default=Path("puzzles.png"), help="picture to write")
    options = parser.parse_args(arguments)
    with one_clear_message():
        draw(PuzzleData([options.data_path], options.split), options.rows, options.outputs, options.output)
        print(options.output)


if __name__ == "__main__":
    main()
