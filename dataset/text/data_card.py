"""The data card: measures a data set from its token cache, and writes a page with a histogram.

This file doesn't know configuration files or models. It needs requirements-data.txt, so only
scripts/prepare_data.py imports it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from matplotlib.figure import Figure

from dataset.text.conversation import Template
from dataset.text.loader import Lengths, TextDataset, overlap
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


@dataclass(frozen=True)
class NearOverlap:
    """How many of `test_rows` test rows have questions near those of one of `train_rows` training
    rows.

    The totals are of the whole splits.
    """

    test_rows: int
    test_total: int
    train_rows: int
    train_total: int
    near: int
    pairs: list[tuple[int, int, float]]
    """Some (test row, training row, similarity), indices into the splits."""


@dataclass(frozen=True)
class DataCard:
    """The figures of a data card, of both splits together unless stated otherwise."""

    files: list[tuple[str, int, str]]
    """Name, bytes, SHA-256."""
    settings: dict[str, Any]
    counts: dict[str, Any]
    train_rows: int
    test_rows: int
    tokens: int
    tokens_cut: int
    supervised_tokens: int
    lengths: Lengths
    repeated_conversations: int
    repeated_prompts: int
    repeated_questions: int
    test_conversations_in_train: int
    test_questions_in_train: int
    tags: dict[str, int]
    near: NearOverlap | None
    near_texts: list[tuple[str, str, str, str, float]]
    """Test row's place and questions, training row's place and questions, similarity."""


def measure(train: TextDataset, test: TextDataset | None, tokenizer: Tokenizer, template: Template, near_rows: int) -> DataCard:
    """Measure a data set. near_rows: test rows to check for near overlap, against five times as
    many training rows; 0: none.

    Memory grows by a few numbers per row, and with `near_rows`.
    """
    splits = [train, *([test] if test is not None else [])]
    lengths = np.concatenate([split.column("length") for split in splits]).astype(np.int64)
    near = None
    if test is not None and near_rows:
        near = near_overlap(train, test, tokenizer, template, near_rows)
    files = [
        (file.path.name, file.path.stat().st_size, sha256)
        for split in _by_source(splits)
        for file, sha256 in zip(split.loaded.files, split.loaded.sha256, strict=True)
    ]
    hashes = {name: [split.column(name) for split in splits] for name in _HASHES}
    repeated = {name: int(sum(map(len, parts)) - len(np.unique(np.concatenate(parts)))) for name, parts in hashes.items()}
    in_train = overlap(train, test) if test is not None else {"questions": 0, "conversations": 0}
    tags = np.concatenate([split.column("tags") for split in splits])
    return DataCard(
        files=files,
        settings={**train.loaded.recipe.key(), "on_bad_row": train.loaded.on_bad_row, "tokenizer_sha256": tokenizer.sha256},
        counts=_counts(splits),
        train_rows=len(train),
        test_rows=len(test) if test is not None else 0,
        tokens=int(lengths.sum()),
        tokens_cut=sum(int(split.column("full_length").sum(dtype=np.int64)) for split in splits) - int(lengths.sum()),
        supervised_tokens=sum(int(split.column("targets").sum()) for split in splits),
        lengths=Lengths.of(splits),
        repeated_conversations=repeated["conversation_hash"],
        repeated_prompts=repeated["prompt_hash"],
        repeated_questions=repeated["question_hash"],
        test_conversations_in_train=in_train["conversations"],
        test_questions_in_train=in_train["questions"],
        tags={template.tag(role).strip(): int(np.count_nonzero(tags & (1 << bit))) for bit, role in enumerate(ROLES)},
        near=near,
        near_texts=_shown_pairs(train, test, near.pairs[:: max(1, len(near.pairs) // _PAIRS_SHOWN)][:_PAIRS_SHOWN])
        if near is not None and test is not None
        else [],
    )


_HASHES = ("conversation_hash", "prompt_hash", "question_hash")


def _by_source(splits: Sequence[TextDataset]) -> list[TextDataset]:
    """One split of those from the same files."""
    return list({tuple(split.loaded.sha256): split for split in reversed(splits)}.values())[::-1]


def _counts(splits: Sequence[TextDataset]) -> dict[str, Any]:
    total: dict[str, Any] = {"read": 0, "beyond_subset": 0, "dropped": {}, "bad": {}, "forms": {}, "ignored": {}}
    for split in _by_source(splits):
        for name in ("read", "beyond_subset"):
            total[name] += split.counts[name]
        for name in ("dropped", "bad", "forms", "ignored"):
            for reason, rows in split.counts[name].items():
                total[name][reason] = total[name].get(reason, 0) + rows
    return total | {name: sum(split.counts[name] for split in splits) for name in ("kept", "truncated", "prompt_cut", "answer_cut")}


def near_overlap(train: TextDataset, test: TextDataset, tokenizer: Tokenizer, template: Template, rows: int) -> NearOverlap:
    """Test rows whose questions are near those of a training row, by MinHash over shingles of five
    ids (Broder 1997).

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
    sketches = {}
    for number in test_indices:
        sketches[number] = sketch(test, number)
        index.insert(number, sketches[number])
    found: dict[int, tuple[int, float]] = {}
    for number in train_indices:
        minhash = sketch(train, number)
        for candidate in index.query(minhash):
            similarity = float(minhash.jaccard(sketches[candidate]))
            if similarity >= NEAR_SIMILARITY and similarity > found.get(candidate, (0, 0.0))[1]:
                found[candidate] = (number, similarity)
    pairs = [(candidate, number, similarity) for candidate, (number, similarity) in sorted(found.items())]
    return NearOverlap(len(test_indices), len(test), len(train_indices), len(train), len(found), pairs)


def _shown_pairs(
    train: TextDataset, test: TextDataset, pairs: Sequence[tuple[int, int, float]]
) -> list[tuple[str, str, str, str, float]]:
    def asked(split: TextDataset, index: int) -> str:
        return " ".join(" / ".join(questions(split.conversation(index))).split())[:_TEXT_SHOWN]

    return [(test.place(a), asked(test, a), train.place(b), asked(train, b), similarity) for a, b, similarity in pairs]


def markdown(card: DataCard, title: str, picture: str | None) -> str:
    """The card as Markdown. picture: file name of the histogram."""
    rows = card.train_rows + card.test_rows
    counts = card.counts

    def share(part: int, whole: int) -> str:
        return f"{part:,} ({part / whole:.2%})" if whole else f"{part:,}"

    lines = [f"# Data card: {title}", "", "| file | bytes | SHA-256 |", "|---|---|---|"]
    lines += [f"| {_cell(name)} | {size:,} | {sha256} |" for name, size, sha256 in card.files]
    lines += ["", "| setting | value |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in card.settings.items())]
    lines += ["", "## Rows", "", "| rows | number (share of those read) |", "|---|---|", f"| read | {counts['read']:,} |"]
    lines += [f"| kept for training | {share(card.train_rows, counts['read'])} |"]
    lines += [f"| kept for testing | {share(card.test_rows, counts['read'])} |"]
    lines += [f"| of the form {name} | {share(number, counts['read'])} |" for name, number in sorted(counts["forms"].items())]
    lines += [
        f"| with text ignored under `{_cell(key)}` | {share(number, counts['read'])} |"
        for key, number in sorted(counts["ignored"].items())
    ]
    lines += [f"| dropped: {reason} | {share(number, counts['read'])} |" for reason, number in sorted(counts["dropped"].items())]
    lines += [f"| malformed: {reason} | {share(number, counts['read'])} |" for reason, number in sorted(counts["bad"].items())]
    lines += [f"| beyond subset_size | {share(counts['beyond_subset'], counts['read'])} |"] if counts["beyond_subset"] else []
    lines += ["", "## Tokens", "", "| of the rows kept | |", "|---|---|", f"| tokens | {card.tokens:,} |"]
    lines += [f"| supervised tokens | {share(card.supervised_tokens, card.tokens)} |"]
    lines += [f"| tokens a row, mean | {card.tokens / max(1, rows):.1f} |"]
    lines += [f"| tokens a row, percentile {percentile} | {value:,} |" for percentile, value in card.lengths.percentiles.items()]
    lines += [f"| rows cut | {share(counts['truncated'], rows)} |"]
    lines += [f"| of these, in the prompt | {share(counts['prompt_cut'], rows)} |"]
    lines += [f"| of these, at the end | {share(counts['answer_cut'], rows)} |"]
    lines += [f"| tokens cut off (share of all) | {share(card.tokens_cut, card.tokens + card.tokens_cut)} |"]
    if picture is not None:
        lines += ["", f"![Tokens a row]({picture})"]
    lines += ["", "| tokens a row | rows whole | rows cut |", "|---|---|---|"]
    edges = card.lengths.edges
    bins = zip(edges[:-1], edges[1:], card.lengths.whole, card.lengths.cut, strict=True)
    lines += [f"| {low} to {high - 1} | {whole:,} | {cut:,} |" for low, high, whole, cut in bins if whole or cut]
    lines += ["", "## Rows that repeat", "", "| | rows beyond the first of their kind (share of those kept) |", "|---|---|"]
    lines += [f"| same conversation | {share(card.repeated_conversations, rows)} |"]
    lines += [f"| same system text and first question, which are held out together | {share(card.repeated_prompts, rows)} |"]
    lines += [f"| same questions, in all turns | {share(card.repeated_questions, rows)} |"]
    lines += ["", "## Test rows that training has seen", "", "| | test rows |", "|---|---|"]
    lines += [f"| same conversation in training | {share(card.test_conversations_in_train, card.test_rows)} |"]
    lines += [f"| same questions in training, in all turns | {share(card.test_questions_in_train, card.test_rows)} |"]
    if card.near is not None:
        near = card.near
        lines += [f"| near questions in training | {share(near.near, near.test_rows)} |", ""]
        sampled = near.test_rows < near.test_total or near.train_rows < near.train_total
        lines += [
            f"Near: at least {NEAR_SIMILARITY:.0%} of the questions' {_SHINGLE_IDS}-id shingles agree, as MinHash estimates. "
            f"Looked at: {near.test_rows:,} of {near.test_total:,} test rows, "
            f"{near.train_rows:,} of {near.train_total:,} training rows."
            + (" That is a sample: all rows together have more." if sampled else "")
        ]
        if card.near_texts:
            lines += ["", "| test row | training row | similarity |", "|---|---|---|"]
        lines += [
            f"| {_cell(place)}: {_cell(text)} | {_cell(other_place)}: {_cell(other)} | {similarity:.2f} |"
            for place, text, other_place, other, similarity in card.near_texts
        ]
    else:
        lines += ["", "Near questions were not looked for."]
    lines += ["", "## Role tags in texts", "", "| tag | rows that contain it |", "|---|---|"]
    lines += [f"| `{tag}` | {share(number, rows)} |" for tag, number in card.tags.items()]
    lines += ["", "Such a text forges no turn: what opens one is an id that text can't produce."]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def draw(card: DataCard, path: Path) -> None:
    """Draw the histogram of lengths as a PNG."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    edges, whole, cut = map(np.array, (card.lengths.edges, card.lengths.whole, card.lengths.cut))
    axes.bar(edges[:-1], whole, np.diff(edges), align="edge", label="whole")
    axes.bar(edges[:-1], cut, np.diff(edges), bottom=whole, align="edge", label="cut")
    tallest = max(1, int((whole + cut).max(initial=0)))
    axes.set(xlabel="tokens a row", ylabel="rows", xlim=(0, edges[-1]), ylim=(0, 1.05 * tallest))
    axes.legend()
    figure.savefig(path, dpi=120)
