"""The data card: measures a data set from its token cache, and writes a page with a histogram.

This file doesn't know configuration files or models. It needs requirements-data.txt, so only
scripts/prepare_data.py imports it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from datasketch import MinHash, MinHashLSH
from matplotlib.figure import Figure

from dataset.text.conversation import Template
from dataset.text.loader import TextDataset, lengths_of, overlap
from dataset.text.row_encoder import ROLES
from dataset.text.splits import questions
from dataset.text.tokenizer import Tokenizer

# Questions are near if the estimated Jaccard similarity of their sets of five consecutive ids is at
# least this.
NEAR_SIMILARITY = 0.8
_SHINGLE_IDS = 5
_PERMUTATIONS = 128
_TRAIN_ROWS_PER_TEST_ROW = 5
_PAIRS_SHOWN = 5
_TEXT_SHOWN = 100
_SUMS = ("length", "full_length", "targets")
_HASHES = ("conversation_hash", "prompt_hash", "question_hash")
_BY_NAME = ("forms", "ignored", "dropped", "bad")


def data_card(
    train: TextDataset,
    test: TextDataset | None,
    tokenizer: Tokenizer,
    template: Template,
    *,
    near_rows: int,
    title: str,
    picture: str,
) -> str:
    """The card of both splits, as Markdown (data_card.md.jinja).

    near_rows: test rows to check for near overlap, against five times as many training rows; 0:
    none. picture: file name of the histogram. Memory grows by a few numbers per row, and with
    `near_rows`.
    """
    splits = [train, *([test] if test is not None else [])]
    by_source = list({split.sha256: split for split in reversed(splits)}.values())[::-1]
    files = [(file.path, sha256) for split in by_source for file, sha256 in zip(split.files, split.sha256, strict=True)]
    columns = {name: np.concatenate([split.column(name) for split in splits]) for name in (*_SUMS, *_HASHES, "tags")}
    tokens, whole_tokens, targets = (int(columns[name].sum(dtype=np.int64)) for name in _SUMS)
    pages = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=pages, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"share": _share, "number": "{:,}".format, "cell": _cell}
    return environment.get_template("data_card.md.jinja").render(
        title=title,
        picture=picture,
        files=[(path.name, path.stat().st_size, sha256) for path, sha256 in files],
        settings=train.settings,
        counts={
            **{name: sum(split.counts[name] for split in by_source) for name in ("read", "beyond_subset")},
            **{name: sum((Counter(split.counts[name]) for split in by_source), Counter()) for name in _BY_NAME},
            **{name: sum(split.counts[name] for split in splits) for name in ("kept", "truncated", "prompt_cut", "answer_cut")},
        },
        train_rows=len(train),
        test_rows=len(test) if test is not None else 0,
        tokens=tokens,
        whole_tokens=whole_tokens,
        targets=targets,
        lengths=lengths_of(splits),
        repeated={name: len(columns[name]) - len(np.unique(columns[name])) for name in _HASHES},
        seen=overlap(train, test) if test is not None else {"questions": 0, "conversations": 0},
        near=near_overlap(train, test, tokenizer, template, near_rows) if test is not None and near_rows else None,
        tags={template.tag(role).strip(): int(np.count_nonzero(columns["tags"] & (1 << bit))) for bit, role in enumerate(ROLES)},
    )


def near_overlap(train: TextDataset, test: TextDataset, tokenizer: Tokenizer, template: Template, rows: int) -> dict[str, Any]:
    """Test rows whose questions are near those of a training row, by MinHash over shingles of five
    ids (Broder 1997): "pairs" (test row, training row, similarity), and some of them "shown".

    Checks `rows` test rows against five times as many training rows, evenly spaced over each split,
    so a fraction measured on a part is a lower bound. A row's questions are all of its user turns,
    or all raw text, as cached, so possibly cut.
    """
    opening = np.array([tokenizer.bos_id, *tokenizer.encode(template.user)], np.int32)

    def sketch(split: TextDataset, index: int) -> Any:
        row = split[index].ids
        turns = np.split(row, np.flatnonzero(row == tokenizer.bos_id))
        asked = [turn[len(opening) :] for turn in turns if np.array_equal(turn[: len(opening)], opening)]
        ids = np.concatenate(asked or [row])
        # A question shorter than a shingle is one shingle.
        shingles = {ids[at : at + _SHINGLE_IDS].tobytes() for at in range(max(1, len(ids) - _SHINGLE_IDS + 1))}
        minhash = MinHash(_PERMUTATIONS)
        minhash.update_batch(shingles)
        return minhash

    def spaced(total: int, most: int) -> list[int]:
        return np.unique(np.linspace(0, total - 1, min(total, most)).astype(np.int64)).tolist() if total else []

    test_indices, train_indices = spaced(len(test), rows), spaced(len(train), rows * _TRAIN_ROWS_PER_TEST_ROW)
    index = MinHashLSH(NEAR_SIMILARITY, _PERMUTATIONS)
    sketches = {number: sketch(test, number) for number in test_indices}
    for number, minhash in sketches.items():
        index.insert(number, minhash)
    found: dict[int, tuple[int, float]] = {}
    for number in train_indices:
        minhash = sketch(train, number)
        for candidate in index.query(minhash):
            similarity = float(minhash.jaccard(sketches[candidate]))
            if similarity >= NEAR_SIMILARITY and similarity > found.get(candidate, (0, 0.0))[1]:
                found[candidate] = (number, similarity)
    pairs = [(a, b, similarity) for a, (b, similarity) in sorted(found.items())]

    def shown(split: TextDataset, index: int) -> str:
        return f"{split.place(index)}: " + " ".join(" / ".join(questions(split.conversation(index))).split())[:_TEXT_SHOWN]

    return {
        "pairs": pairs,
        "shown": [(shown(test, a), shown(train, b), c) for a, b, c in pairs[:: max(1, len(pairs) // _PAIRS_SHOWN)][:_PAIRS_SHOWN]],
        "test_rows": len(test_indices),
        "train_rows": len(train_indices),
        "similarity": NEAR_SIMILARITY,
        "shingle": _SHINGLE_IDS,
    }


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.2%})" if whole else f"{part:,}"


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def draw(splits: Sequence[TextDataset], path: Path) -> None:
    """Draw the histogram of lengths as a PNG."""
    lengths = lengths_of(splits)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    edges, whole, cut = (np.array(lengths[name]) for name in ("edges", "whole", "cut"))
    axes.bar(edges[:-1], whole, np.diff(edges), align="edge", label="whole")
    axes.bar(edges[:-1], cut, np.diff(edges), bottom=whole, align="edge", label="cut")
    tallest = max(1, int((whole + cut).max(initial=0)))
    axes.set(xlabel="tokens a row", ylabel="rows", xlim=(0, edges[-1]), ylim=(0, 1.05 * tallest))
    axes.legend()
    figure.savefig(path, dpi=120)
