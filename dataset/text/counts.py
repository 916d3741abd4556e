"""The report on a data set's rows at the start of a run: counts, and warnings about cut or lost
rows.

Knows no files and no tokens, only counts (`TextDataset.counts`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

# Above these fractions a run warns that its data may not be as intended.
TRUNCATED_SHARE = 0.5
"""Fraction of the split's rows."""
DROPPED_SHARE = 0.2
"""Fraction of the rows read, without blank lines."""

_FILES_NAMED = 8
_NOT_A_ROW = "blank_line"
_TOO_LONG = ("too_long", "answer_beyond_seq_len")


def describe_counts(counts: Mapping[str, Any]) -> list[str]:
    """One line for each count that isn't zero; unknown counts at the end, by their keys."""
    named = dict(counts)
    read, kept, truncated = (named.pop(key, 0) for key in ("read", "kept", "truncated"))
    cut = {"in the prompt": named.pop("prompt_cut", 0), "at the end": named.pop("answer_cut", 0)}
    lines = [f"rows read: {read:,}, of these in this split: {kept:,}"]
    if truncated:
        lines.append(f"cut to dataset.seq_len: {truncated:,} ({_list(cut)})")
    titles = {
        "forms": "forms",
        "ignored": "ignored keys",
        "dropped": "left out",
        "bad": "malformed",
        "beyond_subset": "beyond subset_size",
    }
    for key in [*titles, *(key for key in named if key not in titles)]:
        value = named.get(key)
        if value:
            lines.append(f"{titles.get(key, key)}: {_list(value) if isinstance(value, Mapping) else _number(value)}")
    return lines


def describe_files(names: Sequence[str]) -> str:
    """The names of files; of many, only the first."""
    more = len(names) - _FILES_NAMED
    return ", ".join(names[:_FILES_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def warnings_about(counts: Mapping[str, Any]) -> list[str]:
    """Warnings if most rows are cut or many are lost: how many, and what to do."""
    warnings = []
    kept, truncated = counts["kept"], counts["truncated"]
    if truncated > TRUNCATED_SHARE * kept:
        warnings.append(
            f"{truncated:,} of {kept:,} rows ({truncated / kept:.0%}) are longer than dataset.seq_len and are cut: raise "
            "dataset.seq_len, or leave them out (dataset.long_rows=drop)"
        )
    reasons = {**counts["dropped"], **counts["bad"]}
    read = counts["read"] - reasons.pop(_NOT_A_ROW, 0)
    lost = sum(reasons.values())
    if lost > DROPPED_SHARE * read:
        remedy = "see which forms rows may have in docs/data.md"
        if 2 * sum(reasons.get(reason, 0) for reason in _TOO_LONG) > lost:
            remedy = "raise dataset.seq_len, or keep what fits of them (dataset.long_rows=keep_prompt_end)"
        warnings.append(f"{lost:,} of {read:,} rows ({lost / read:.0%}) are not trained on ({_list(reasons)}): {remedy}")
    return warnings


def _list(values: Mapping[str, Any]) -> str:
    most_first = sorted(values.items(), key=lambda item: -item[1] if isinstance(item[1], int) else 0)
    return ", ".join(f"{name} {_number(value)}" for name, value in most_first if value)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
