"""Scores generated answers by family, next to a baseline that ignores the questions."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

from config.errors import UsageError

# 97.5 % quantile of the standard normal distribution: `lower_95` and `upper_95` are the ends of a two-sided 95 % interval.
Z_95 = 1.959963984540054


class Score(TypedDict):
    """One family, or all: fractions in 0..1 and the number of answers scored."""

    accuracy: float
    baseline: float
    count: int
    lower_95: float
    upper_95: float


class AnswerScores(TypedDict):
    """The result of `score_answers`; `families` in alphabetical order."""

    overall: Score
    families: dict[str, Score]


def is_exact(reference: str, answer: str) -> bool:
    """Exact, case-sensitive match, after stripping white space around both."""
    return answer.strip() == reference.strip()


def wilson_lower_bound(correct: int, count: int, z: float = Z_95) -> float:
    """Lower end of Wilson's score interval (Wilson 1927) for `correct` successes out of `count`; 0.0 for no trials."""
    if correct == 0:
        return 0.0  # the formula's value too, which rounding may put below zero
    share = correct / count
    centre = share + z * z / (2 * count)
    margin = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - margin) / (1 + z * z / count)


def score_answers(families: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> AnswerScores:
    """Accuracy by `is_exact`, baseline and Wilson's 95 % interval, for each family and over all.

    A family's baseline is the accuracy of always giving its most frequent reference among those
    scored: no constant answer can beat it. The overall baseline uses each family's own constant:
    the mean of the families' baselines, weighted by their counts.

    The three sequences are parallel, one entry per question. Raises UsageError if they are empty.
    """
    if not families:
        raise UsageError("expected at least one answer to score, found none; is the test split empty?")

    counts: Counter[str] = Counter(families)
    correct: Counter[str] = Counter()
    references_of: dict[str, Counter[str]] = {family: Counter() for family in sorted(counts)}
    for family, reference, answer in zip(families, references, answers, strict=True):
        correct[family] += is_exact(reference, answer)
        references_of[family][reference.strip()] += 1

    baseline_correct = {family: max(found.values()) for family, found in references_of.items()}
    return {
        "overall": _score(sum(correct.values()), sum(baseline_correct.values()), len(families)),
        "families": {family: _score(correct[family], baseline_correct[family], counts[family]) for family in references_of},
    }


def score_by_hops(
    hops: Sequence[int | None], families: Sequence[str], references: Sequence[str], answers: Sequence[str]
) -> dict[int, AnswerScores]:
    """`score_answers` for each number of hops, ascending; leaves out questions without one."""
    rows_of = {
        number: [i for i, found in enumerate(hops) if found == number]
        for number in sorted({found for found in hops if found is not None})
    }
    return {
        number: score_answers(*([column[i] for i in rows] for column in (families, references, answers)))
        for number, rows in rows_of.items()
    }


def _score(correct: int, baseline_correct: int, count: int) -> Score:
    return {
        "accuracy": correct / count,
        "baseline": baseline_correct / count,
        "count": count,
        "lower_95": wilson_lower_bound(correct, count),
        # One minus the lower bound of wrong answers.
        "upper_95": 1 - wilson_lower_bound(count - correct, count),
    }
