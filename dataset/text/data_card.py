"""The data card: measures a data set from its token cache, and writes a page with a histogram.

This file doesn't know configuration files or models. It needs requirements-data.txt, so only
scripts/prepare_data.py imports it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
    """The card of both splits, as Markdown.

    near_rows: test rows to check for near overlap, against five times as many training rows; 0:
    none. picture: file name of the histogram. Memory grows by a few numbers per row, and with
    `near_rows`.
    """
    splits = [train, *([test] if test is not None else [])]
    by_source = list({split.sha256: split for split in reversed(splits)}.values())[::-1]
    read, beyond_subset = (sum(split.counts[name] for split in by_source) for name in ("read", "beyond_subset"))
    rows, truncated, prompt_cut, answer_cut = (
        sum(split.counts[name] for split in splits) for name in ("kept", "truncated", "prompt_cut", "answer_cut")
    )
    test_rows = len(test) if test is not None else 0
    tokens, whole_tokens, targets = (
        sum(int(split.column(name).sum(dtype=np.int64)) for split in splits) for name in ("length", "full_length", "targets")
    )
    lengths, tags = lengths_of(splits), np.concatenate([split.column("tags") for split in splits])
    in_train = overlap(train, test) if test is not None else {"questions": 0, "conversations": 0}

    def reasons(name: str, title: str) -> list[tuple[str, str]]:
        total: Counter[str] = sum((Counter(split.counts[name]) for split in by_source), Counter())
        return [(title.format(key), _share(count, read)) for key, count in sorted(total.items())]

    def repeated(name: str) -> str:
        hashes = np.concatenate([split.column(name) for split in splits])
        return _share(len(hashes) - len(np.unique(hashes)), rows)

    files = [(file, sha256) for split in by_source for file, sha256 in zip(split.files, split.sha256, strict=True)]
    bins = zip(lengths["edges"], lengths["edges"][1:], lengths["whole"], lengths["cut"], strict=False)
    lines = [
        f"# Data card: {title}",
        *_table(
            ["file", "bytes", "SHA-256"], [(file.path.name, f"{file.path.stat().st_size:,}", sha256) for file, sha256 in files]
        ),
        *_table(["setting", "value"], train.settings.items()),
        "\n## Rows",
        *_table(
            ["rows", "number (share of those read)"],
            [
                ("read", f"{read:,}"),
                ("kept for training", _share(len(train), read)),
                ("kept for testing", _share(test_rows, read)),
                *reasons("forms", "of the form {}"),
                *reasons("ignored", "with text ignored under `{}`"),
                *reasons("dropped", "dropped: {}"),
                *reasons("bad", "malformed: {}"),
                *([("beyond subset_size", _share(beyond_subset, read))] if beyond_subset else []),
            ],
        ),
        "\n## Tokens",
        *_table(
            ["of the rows kept", ""],
            [
                ("tokens", f"{tokens:,}"),
                ("supervised tokens", _share(targets, tokens)),
                ("tokens a row, mean", f"{tokens / max(1, rows):.1f}"),
                *((f"tokens a row, percentile {percentile}", f"{value:,}") for percentile, value in lengths["percentiles"].items()),
                ("rows cut", _share(truncated, rows)),
                ("of these, in the prompt", _share(prompt_cut, rows)),
                ("of these, at the end", _share(answer_cut, rows)),
                ("tokens cut off (share of all)", _share(whole_tokens - tokens, whole_tokens)),
            ],
        ),
        f"\n![Tokens a row]({picture})",
        *_table(
            ["tokens a row", "rows whole", "rows cut"],
            [(f"{low} to {high - 1}", f"{whole:,}", f"{cut:,}") for low, high, whole, cut in bins if whole or cut],
        ),
        "\n## Rows that repeat",
        *_table(
            ["", "rows beyond the first of their kind (share of those kept)"],
            [
                ("same conversation", repeated("conversation_hash")),
                ("same system text and first question, which are held out together", repeated("prompt_hash")),
                ("same questions, in all turns", repeated("question_hash")),
            ],
        ),
        "\n## Test rows that training has seen",
        *_table(
            ["", "test rows"],
            [
                ("same conversation in training", _share(in_train["conversations"], test_rows)),
                ("same questions in training, in all turns", _share(in_train["questions"], test_rows)),
            ],
        ),
        *(
            _near(train, test, tokenizer, template, near_rows)
            if test is not None and near_rows
            else ["\nNear questions were not looked for."]
        ),
        "\n## Role tags in texts",
        *_table(
            ["tag", "rows that contain it"],
            [
                (f"`{template.tag(role).strip()}`", _share(int(np.count_nonzero(tags & (1 << bit))), rows))
                for bit, role in enumerate(ROLES)
            ],
        ),
        "\nSuch a text forges no turn: what opens one is an id that text can't produce.\n",
    ]
    return "\n".join(lines)


def _near(train: TextDataset, test: TextDataset, tokenizer: Tokenizer, template: Template, rows: int) -> list[str]:
    """Lines on test rows whose questions are near those of a training row."""
    pairs, seen_test, seen_train = near_overlap(train, test, tokenizer, template, rows)
    is_sample = seen_test < len(test) or seen_train < len(train)
    shown = pairs[:: max(1, len(pairs) // _PAIRS_SHOWN)][:_PAIRS_SHOWN]

    def asked(split: TextDataset, index: int) -> str:
        return f"{split.place(index)}: " + " ".join(" / ".join(questions(split.conversation(index))).split())[:_TEXT_SHOWN]

    return [
        f"| near questions in training | {_share(len(pairs), seen_test)} |",
        f"\nNear: at least {NEAR_SIMILARITY:.0%} of the questions' {_SHINGLE_IDS}-id shingles agree, as MinHash estimates. "
        f"Looked at: {seen_test:,} of {len(test):,} test rows, {seen_train:,} of {len(train):,} training rows."
        + (" That is a sample: all rows together have more." if is_sample else ""),
        *(
            _table(
                ["test row", "training row", "similarity"],
                [(asked(test, a), asked(train, b), f"{similarity:.2f}") for a, b, similarity in shown],
            )
            if shown
            else []
        ),
    ]


def near_overlap(
    train: TextDataset, test: TextDataset, tokenizer: Tokenizer, template: Template, rows: int
) -> tuple[list[tuple[int, int, float]], int, int]:
    """Test rows whose questions are near those of a training row, by MinHash over shingles of five
    ids (Broder 1997): (test row, training row, similarity), and how many rows of each were checked.

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
    return [(a, b, similarity) for a, (b, similarity) in sorted(found.items())], len(test_indices), len(train_indices)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.2%})" if whole else f"{part:,}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table, after an empty one."""
    cells = [[str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    first, *others = ("".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in (head, *cells))
    return ["", first, "|" + "---|" * len(head), *others]


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
