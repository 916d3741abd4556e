"""Tests of the deep task families: right answers, as many steps as they say, nothing to gain by guessing, a split by operands.

Solvers and operand parsers below read only the text of a question; they share no code with the generators.
"""

import ast
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.build_sample_dataset import build
from dataset.deep_tasks import DEEP_FAMILIES, MOST_HOPS, TABLE_FAMILIES

HOPS = range(1, MOST_HOPS + 1)
ROWS_EACH = 400
# What a guess among the possible answers gets; arrows never lead back to where they start.
CHANCE = {
    "deep_pointers": 1 / 15, "deep_permutations": 1 / 5, "deep_arithmetic": 1 / 10,
    "deep_boolean": 1 / 2, "deep_map": 1 / 8, "deep_order": 1 / 2,
}  # fmt: skip


def question_of(family: str, hops: int, seed: object) -> tuple[str, str]:
    """(question, answer)."""
    example = DEEP_FAMILIES[family](random.Random(f"{family}/{hops}/{seed}"), [hops], MOST_HOPS)
    assert example.hops == (hops,)
    ((question, answer),) = example.turns
    return question, answer


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[str, int], list[tuple[str, str]]]:
    """Questions and answers by family and hops."""
    return {
        (family, hops): [question_of(family, hops, row) for row in range(ROWS_EACH)] for family in DEEP_FAMILIES for hops in HOPS
    }


def stated_hops(question: str) -> int:
    return int(re.findall(r"Where after (?:step|row|move) (\d)\?", question)[0])


def arrows(question: str) -> dict[str, str]:
    return dict(re.findall(r"\b([A-Z]) ([A-Z])(?=[,.])", question))


def rows_of_digits(question: str) -> list[str]:
    return re.findall(r"\b\d{5}\b", question)


def doors(question: str) -> dict[str, tuple[str, str]]:
    return {room: (left, right) for room, left, right in re.findall(r"\b([A-Z]) ([A-Z]) ([A-Z])\b", question)}


def start_of(question: str) -> str:
    return re.findall(r"(?:Start at|From) (\w)", question)[0]


def expressions(question: str) -> tuple[str, str]:
    """The asked one and the other."""
    found = dict(re.findall(r"([pq]) = ([^;?]+?)(?=;|\. )", question))
    asked = re.findall(r"What is ([pq])\?", question)[0]
    return found.pop(asked), next(iter(found.values()))


def evaluate(expression: str) -> Any:
    return eval(expression.replace("true", "True").replace("false", "False"))


def answer_in_words(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value % 10)


def reached(question: str, hops: int) -> str:
    """Where one is after some of the steps."""
    place = start_of(question)
    moves = re.findall(r"left|right", question.split("From", 1)[-1])
    for step in range(hops):
        if "Arrows" in question:
            place = arrows(question)[place]
        elif "Rows" in question:
            place = rows_of_digits(question)[step][int(place)]
        else:
            place = doors(question)[place][moves[step] == "right"]
    return place


def below(question: str, letter: str) -> dict[str, int]:
    """Letters that are surely less, with the number of facts between."""
    facts = re.findall(r"([A-Z]) > ([A-Z])", question)
    found, edge = {letter: 0}, {letter}
    while edge := {low for high, low in facts if high in edge} - found.keys():
        found |= dict.fromkeys(edge, max(found.values()) + 1)
    return found


def choices(question: str) -> tuple[str, list[str], bool]:
    """(letter asked about, the two choices, whether the lesser is asked for)."""
    ((word, subject, first, second),) = re.findall(r"surely (less|greater) than ([A-Z]): ([A-Z]) or ([A-Z])\?", question)
    return subject, [first, second], word == "less"


def distance(question: str, choice: str) -> int | None:
    """Facts between the letter asked about and a choice; None if they don't tell."""
    subject, _, lesser = choices(question)
    high, low = (subject, choice) if lesser else (choice, subject)
    return below(question, high).get(low)


def solve(family: str, question: str) -> str:
    if family == "deep_order":
        (answer,) = (choice for choice in choices(question)[1] if distance(question, choice) is not None)
        return answer
    if "What is" in question:
        return answer_in_words(evaluate(expressions(question)[0]))
    return reached(question, stated_hops(question))


def canonical(expression: str) -> str:
    """Equal for expressions that differ in the order of terms, factors and sides of a comparison."""

    def of(node: ast.expr) -> str:
        match node:
            case ast.BinOp(left, operator, right):
                parts, sign = [of(left), of(right)], type(operator).__name__
            case ast.Compare(left, [operator], [right]):
                parts, sign = [of(left), of(right)], type(operator).__name__
            case _:
                return ast.unparse(node)
        return f"({sign.join(parts if sign == 'Sub' else sorted(parts))})"

    return of(ast.parse(expression, mode="eval").body)


def operands(family: str, question: str) -> Any:
    """What a question is about: equal for all that give each other's answer away."""
    if family == "deep_arithmetic":
        return family, canonical(expressions(question)[0])
    if family == "deep_boolean":
        return family, *sorted(map(canonical, expressions(question)))
    if family == "deep_permutations":
        return family, *rows_of_digits(question)
    if family == "deep_order":
        return family, *sorted(re.findall(r"[A-Z] > [A-Z]", question))
    table: Any = doors(question) if family == "deep_map" else arrows(question)
    return family, *sorted(table.items())


def pieces(question: str) -> list[str]:
    return re.findall(r"[A-Za-z]+|\d|[^\w\s]", question)


def test_every_answer_is_what_an_independent_reader_of_the_question_finds(drawn: dict[tuple[str, int], Any]) -> None:
    for (family, _), examples in drawn.items():
        for question, answer in examples:
            assert solve(family, question) == answer, question


def test_a_training_row_asks_several_questions_about_a_table_of_any_size(tmp_path: Path) -> None:
    build(tmp_path, 720, 6, 0, families="deep")
    sizes: dict[str, set[int]] = {}
    for row in read(tmp_path, "train"):
        table, asked = "", row["hops"] if isinstance(row["hops"], list) else [row["hops"]]
        turns = [turn["value"] for turn in row["conversations"]]
        for number, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            whole = table + question
            assert solve(row["task"], whole) == answer, whole
            if row["task"] == "deep_order":
                assert distance(whole, answer) == asked[number]
            elif row["task"] in TABLE_FAMILIES:
                assert stated_hops(whole) == asked[number]
            table = table or re.split(r"(?=Start at|From|Which)", question)[0]
        sizes.setdefault(row["task"], set()).add(len(pieces(turns[0])))
    assert all(len(found) >= 6 for found in sizes.values()), sizes


def test_the_number_of_hops_is_what_the_answer_takes(drawn: dict[tuple[str, int], Any]) -> None:
    for (family, hops), examples in drawn.items():
        for question, answer in examples:
            if family == "deep_order":
                assert [distance(question, choice) for choice in choices(question)[1] if choice == answer] == [hops]
            elif family in ("deep_arithmetic", "deep_boolean"):
                assert len(re.findall(r"[-+*]|==|!=", expressions(question)[0])) == hops
            else:
                assert stated_hops(question) == hops


def test_arrows_have_no_shorter_way_back(drawn: dict[tuple[str, int], Any]) -> None:
    for hops in HOPS:
        for question, answer in drawn["deep_pointers", hops]:
            leading = {target: source for source, target in arrows(question).items()}
            place = start_of(question)
            for _ in range(hops - 1):
                place = leading[place]
                assert place != answer


def test_the_wrong_choice_has_the_same_place_in_the_other_order(drawn: dict[tuple[str, int], Any]) -> None:
    for hops in HOPS:
        for question, _ in drawn["deep_order", hops]:
            first, second = choices(question)[1]
            assert len(below(question, first)) == len(below(question, second))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(("deep_arithmetic", "deep_boolean")), st.integers(2, MOST_HOPS), st.integers())
def test_the_innermost_bracket_always_decides(family: str, hops: int, seed: int) -> None:
    expression = expressions(question_of(family, hops, seed)[0])[0]
    innermost = re.findall(r"\( [^()]* \)", expression)
    assert len(innermost) == 1
    values = ("true", "false") if family == "deep_boolean" else tuple(map(str, range(10)))
    found = {answer_in_words(evaluate(expression.replace(innermost[0], value))) for value in values}
    assert found == set(values)


def test_length_does_not_tell_the_hops(drawn: dict[tuple[str, int], Any]) -> None:
    for family in DEEP_FAMILIES:
        assert len({len(pieces(question)) for hops in HOPS for question, _ in drawn[family, hops]}) == 1, family


def most_often(found: Iterable[str]) -> float:
    """Share of the most frequent."""
    return max(Counter(found).values()) / ROWS_EACH


def at_most(family: str) -> float:
    """Five standard deviations above chance."""
    chance = CHANCE[family]
    return chance + 5 * (chance * (1 - chance) / ROWS_EACH) ** 0.5


@pytest.mark.parametrize("hops", HOPS)
def test_guessing_does_not_pay(drawn: dict[tuple[str, int], Any], hops: int) -> None:
    for family in DEEP_FAMILIES:
        examples = drawn[family, hops]
        answers = [answer for _, answer in examples]
        assert most_often(answers) < at_most(family), (family, "constant")
        read = [pieces(question) for question, _ in examples]
        # No place of the question, the first and the last among them, holds the answer.
        for place in zip(*read, strict=True):
            assert sum(map(str.__eq__, place, answers)) / ROWS_EACH < at_most(family), (family, place[:5])
        possible = set(answers)
        guesses: dict[str, list[str]] = {"first": [], "last": [], "most frequent": [], "least frequent": []}
        for question in read:
            mentioned = [piece for piece in question if piece in possible]
            by_count = [piece for piece, _ in Counter(mentioned).most_common()]
            for name, guess in zip(guesses, (mentioned[0], mentioned[-1], by_count[0], by_count[-1]), strict=True):
                guesses[name].append(guess)
        for name, guessed in guesses.items():
            assert sum(map(str.__eq__, guessed, answers)) / ROWS_EACH < at_most(family), (family, name)


@pytest.mark.parametrize("family", ["deep_pointers", "deep_permutations", "deep_map"])
def test_a_step_too_few_or_too_many_is_wrong(drawn: dict[tuple[str, int], Any], family: str) -> None:
    for hops in HOPS:
        for other in {hops - 1, min(hops + 1, MOST_HOPS)} - {hops}:
            right = sum(reached(question, other) == answer for question, answer in drawn[family, hops])
            assert right / ROWS_EACH < at_most(family), (hops, other)


def test_a_shallow_reader_of_an_order_learns_nothing(drawn: dict[tuple[str, int], Any]) -> None:
    """Which choice is mentioned first among the facts, or stands in a fact with the letter asked about, beyond one hop."""
    for hops in HOPS[1:]:
        earlier = 0
        for question, answer in drawn["deep_order", hops]:
            subject, pair, _ = choices(question)
            facts = question.split(". ")[0]
            earlier += min(pair, key=facts.index) == answer
            assert not any(f"{a} > {b}" in facts for choice in pair for a, b in ((subject, choice), (choice, subject)))
        assert 1 - at_most("deep_order") < earlier / ROWS_EACH < at_most("deep_order")


@pytest.mark.parametrize("family", list(DEEP_FAMILIES))
def test_keys_are_equal_exactly_where_the_operands_in_the_text_are(family: str) -> None:
    rng = random.Random(0)
    examples = [DEEP_FAMILIES[family](rng, [hops := 1 + row % MOST_HOPS], rng.randint(hops, MOST_HOPS)) for row in range(1600)]
    pairs = {(example.key, operands(family, example.questions[0])) for example in examples}
    assert len(pairs) == len({key for key, _ in pairs}) == len({found for _, found in pairs})
    assert {example.key.split(":")[0] for example in examples} == {family}


def test_sides_that_commute_have_one_key() -> None:
    one, other = "Modulo 10: p = 4 - (3 * 8); q = 1. What is p?", "Modulo 10: p = 9 + 2; q = 4 - (8 * 3). What is q?"
    assert operands("deep_arithmetic", one) == operands("deep_arithmetic", other)
    assert canonical("3 - 4") != canonical("4 - 3")
    keys = Counter(DEEP_FAMILIES["deep_arithmetic"](random.Random(row), [1], MOST_HOPS).key for row in range(3000))
    assert keys["deep_arithmetic:(2+5)"] > 0 and keys["deep_arithmetic:(5+2)"] == 0
    assert keys["deep_arithmetic:(5-2)"] > 0 and keys["deep_arithmetic:(2-5)"] > 0


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_operands_of_the_test_splits_occur_in_training(tmp_path: Path, seed: int) -> None:
    build(tmp_path, 3600, 60, seed, families="deep")
    asked = {
        split: [row["conversations"][0]["value"] for row in read(tmp_path, split)] for split in ("train", "test", "test_deeper")
    }
    tasks = {split: [row["task"] for row in read(tmp_path, split)] for split in asked}
    about = {split: set(map(operands, tasks[split], asked[split])) for split in asked}
    assert not about["train"] & (about["test"] | about["test_deeper"])
    for split in ("test", "test_deeper"):
        assert len(set(asked[split])) == 60 * len(DEEP_FAMILIES)
        assert {piece for question in asked[split] for piece in pieces(question)} - {"7", "8"} <= {
            piece for question in asked["train"] for piece in pieces(question)
        }


def test_hops_are_even_in_every_family_and_stand_in_the_rows(tmp_path: Path) -> None:
    described = build(tmp_path, 360, 12, 0, families="deep", max_hops=4)
    assert described["hops"] == {"train": [1, 2, 3, 4], "test": [1, 2, 3, 4], "test_deeper": [5, 6]}
    for split, each in (("train", 15), ("test", 3), ("test_deeper", 6)):
        rows = read(tmp_path, split)
        hops = [row["hops"] if isinstance(row["hops"], list) else [row["hops"]] for row in rows]
        assert Counter((row["task"], first) for row, (first, *_) in zip(rows, hops, strict=True)) == {
            (family, hops): each for family in DEEP_FAMILIES for hops in described["hops"][split]
        }
        assert all(set(row) == {"conversations", "task", "hops"} for row in rows)
        for row, asked in zip(rows, hops, strict=True):
            assert len(asked) == (4 if split == "train" and row["task"] in TABLE_FAMILIES else 1)
            assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * len(asked)
    # Any first part of a test split has every family.
    assert {row["task"] for row in read(tmp_path, "test_deeper")[: len(DEEP_FAMILIES)]} == set(DEEP_FAMILIES)
