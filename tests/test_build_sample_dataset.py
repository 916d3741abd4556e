"""Tests of the bundled data set: right answers, a split that holds out operands, equal files for equal arguments.

The solvers and the operand parser below read only the text of a question; they share no code with the generator.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config.errors import UsageError
from dataset import build_sample_dataset
from dataset.build_sample_dataset import TRAIN_WEIGHTS, apportion, build, main
from dataset.sample_tasks import FAMILIES

TRAIN_SIZE, TEST_PER_FAMILY, SEED = 4000, 100, 0

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MEMBERS = {
    "animals": ["cat", "dog", "cow", "horse", "bird", "fish", "bear", "lion"],
    "colours": ["red", "blue", "green", "black", "white", "brown", "yellow", "pink"],
    "foods": ["apple", "bread", "rice", "cheese", "egg", "cake", "soup", "corn"],
}
MEMBERS_ALL = [word for words in MEMBERS.values() for word in words]
PLACES = {"first": 0, "second": 1, "third": 2, "last": -1}
BASE_UNITS = {"mm": 1, "cm": 10, "dm": 100, "m": 1000, "km": 10**6, "g": 1, "kg": 1000, "cents": 1, "dollars": 100}
LETTERS = r"(?<![A-Za-z])[a-z](?: [a-z])+$"


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def listed_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text) if word in MEMBERS_ALL]


def solve_date(text: str) -> tuple[int, int, int]:
    """(weekday index, date, signed days)."""
    day, date = re.findall(rf"({'|'.join(DAYS)}) (\d+)", text)[0]
    steps, direction = re.findall(r"(\d) days? (later|earlier)", text)[0]
    return DAYS.index(day), int(date), int(steps) if direction == "later" else -int(steps)


def solve_weekday(text: str) -> str:
    day, date, steps = solve_date(text)
    sign = 1 if steps > 0 else -1
    passed = [sign * count for count in range(1, abs(steps) + 1)]
    return ", ".join(f"{DAYS[(day + step) % 7]} {date + step}" for step in passed)


def units(text: str) -> tuple[int, int]:
    """(amount, smaller units in one larger)."""
    amount, large = re.findall(r"(\d+) ([a-z]+)", text)[0]
    (small,) = {word for word in re.findall(r"[a-z]+", text) if word in BASE_UNITS} - {large}
    return int(amount), BASE_UNITS[large] // BASE_UNITS[small]


def solve_logic(text: str) -> str:
    facts = re.findall(r"([A-Z][a-z]+) is (?:older|taller|faster) than ([A-Z][a-z]+)", text)
    above = dict(facts)
    (top,) = set(above) - set(above.values())
    order = f"{top}, {above[top]}, {above[above[top]]}"
    ((left, right),) = re.findall(r"[Ii]s ([A-Z][a-z]+) (?:older|taller|faster) than ([A-Z][a-z]+)\?", text)
    reached = left
    while reached in above:
        reached = above[reached]
        if reached == right:
            return f"{order}: yes"
    return f"{order}: no"


def story(text: str) -> list[int]:
    """The signed numbers of a word problem, in their order."""
    verbs = re.findall(r"(ha[sd]|gets|finds|buys|loses|sells|drops) (\d)", text)
    return [-int(number) if verb in ("loses", "sells", "drops") else int(number) for verb, number in verbs]


def solve_lookup(text: str) -> str:
    table = dict(re.findall(r"([a-z]+) (\d)", text))
    (asked,) = re.findall(r"(?:does|is|value of) ([a-z]+)(?: cost)?\?", text)
    return f"{asked} {table[asked]}"


def solve_sequence(text: str) -> str:
    first, second, third = numbers(text)
    assert second - first == third - second
    return changed(third, third - second)


def changed(before: int, change: int) -> str:
    return f"{before} {'-' if change < 0 else '+'} {abs(change)} = {before + change}"


def solve_addition(text: str) -> str:
    first, second = numbers(text)
    ones = int(str(first)[1]) + int(str(second)[1])
    return f"{first + second - ones} + {ones} = {first + second}"


def solve_subtraction(text: str) -> str:
    first, second = numbers(text)
    ones = int(str(second)[1])
    return changed(first - second + ones, -ones) if ones else f"{first - second} - 0 = {first - second}"


def solve_compare(text: str) -> str:
    low, high = sorted(numbers(text))
    return f"{high} > {low}" if "larger" in text else f"{low} < {high}"


def solve_count(text: str) -> str:
    found = [word for word in listed_words(text) if word in MEMBERS[kind_of(text)]]
    return f"{', '.join(found) or 'none'}: {len(found)}"


def solve_place(text: str, words: list[str]) -> str:
    (name,) = (name for name in PLACES if re.search(rf"\b{name}\b", text))
    return f"{name}: {words[PLACES[name]]}"


def solve_unit(text: str) -> str:
    amount, factor = units(text)
    large = re.findall(r"\d+ ([a-z]+)", text)[0]
    (small,) = {word for word in re.findall(r"[a-z]+", text) if word in BASE_UNITS} - {large}
    return f"{amount} {large} = {amount * factor} {small}"


def solve_story(text: str) -> str:
    start, first, second = story(text)
    return changed(start + first, second)


def solve_letters(text: str, turned: Callable[[str], str]) -> str:
    letters = re.findall(LETTERS, text)[0]
    return f"{letters} = {turned(letters)}"


def plain(solver: Callable[[str], Any]) -> Callable[[list[str]], list[str]]:
    return lambda questions: [str(solver(question)) for question in questions]


def solve_two_turn(questions: list[str]) -> list[str]:
    opening, following = questions
    if words := listed_words(opening):
        return [solve_place(opening, words), solve_place(following, words)]
    left, right = numbers(opening)
    (change,) = numbers(following)
    sign = -1 if re.search("take away|minus", following) else 1
    return [changed(left, right), changed(left + right, sign * change)]


SOLVERS: dict[str, Callable[[list[str]], list[str]]] = {
    "addition": plain(solve_addition),
    "subtraction": plain(solve_subtraction),
    "compare": plain(solve_compare),
    "sort": plain(lambda text: " ".join(map(str, sorted(numbers(text))))),
    "count": plain(solve_count),
    "reverse": plain(lambda text: solve_letters(text, lambda letters: letters[::-1])),
    "spell": plain(lambda text: solve_letters(text, str.upper)),
    "position": plain(lambda text: solve_place(text, listed_words(text))),
    "sequence": plain(solve_sequence),
    "weekday": plain(solve_weekday),
    "unit": plain(solve_unit),
    "logic": plain(solve_logic),
    "word_problem": plain(solve_story),
    "lookup": plain(solve_lookup),
    "two_turn": solve_two_turn,
}


def kind_of(text: str) -> str:
    (kind,) = (kind for kind in MEMBERS if kind in text)
    return kind


def operands(task: str, questions: list[str]) -> tuple[Any, ...]:
    """What a question is about, read from its text and equal for all that give each other's answer away."""
    text = questions[0]
    found = numbers(text)
    if task in ("addition", "subtraction"):
        parts = found if task == "addition" else [found[1], found[0] - found[1]]
        return ("sum", *sorted(parts))
    if task in ("compare", "sort"):
        return (task, *sorted(found))
    if task == "count":
        return (task, kind_of(text), *sorted(listed_words(text)))
    if task in ("reverse", "spell"):
        word = re.findall(LETTERS, text)[0]
        return ("word", min(word, word[::-1]))
    if task == "sequence":
        step = found[-1] - found[-2]
        return ("sum", *sorted((found[-1], step) if step > 0 else (-step, found[-1] + step)))
    if task == "weekday":
        day, date, steps = solve_date(text)
        return (task, day, date, steps) if steps > 0 else (task, (day + steps) % 7, date + steps, -steps)
    if task == "unit":
        return (task, *units(text))
    if task == "logic":
        return (task, *sorted(set(re.findall(r"([A-Z][a-z]+) is", text) + re.findall(r"than ([A-Z][a-z]+)", text))))
    if task == "word_problem":
        return ("changes", *sorted(story(text)))
    if task == "lookup":
        return (task, *sorted(re.findall(r"([a-z]+) (\d)", text)))
    if words := listed_words(text):  # position, and two turns over one list
        return ("list", *words)
    (change,) = numbers(questions[1])
    return ("changes", *sorted([*found, -change if re.search("take away|minus", questions[1]) else change]))


def questions_of(row: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]


def answers_of(row: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sample")
    build(made, TRAIN_SIZE, TEST_PER_FAMILY, SEED)
    return made


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by another seed."""
    made = tmp_path_factory.mktemp("other")
    build(made, TRAIN_SIZE, TEST_PER_FAMILY, SEED + 1)
    return made


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: read(folder, split) for split in ("train", "test")}


def test_every_answer_is_what_an_independent_reader_of_the_question_finds(splits: dict[str, list[Any]]) -> None:
    for row in splits["train"] + splits["test"]:
        assert answers_of(row) == SOLVERS[row["task"]](questions_of(row)), row


def test_rows_have_the_slimorca_form(splits: dict[str, list[Any]]) -> None:
    for row in splits["train"] + splits["test"]:
        assert set(row) == {"conversations", "task"}
        roles = [turn["from"] for turn in row["conversations"]]
        turns = 2 if row["task"] == "two_turn" else 1
        assert roles[-2 * turns :] == ["human", "gpt"] * turns
        assert roles[: -2 * turns] in ([], ["system"])
    with_system = sum(row["conversations"][0]["from"] == "system" for row in splits["train"])
    assert with_system / TRAIN_SIZE == pytest.approx(0.25, abs=0.03)


def test_sizes_and_families(folder: Path, splits: dict[str, list[Any]]) -> None:
    described = json.loads((folder / "dataset.json").read_text())
    assert len(splits["train"]) == TRAIN_SIZE
    assert Counter(row["task"] for row in splits["train"]) == described["counts"]["train"]
    assert Counter(row["task"] for row in splits["test"]) == dict.fromkeys(SOLVERS, TEST_PER_FAMILY)
    assert set(described["counts"]["train"]) == set(SOLVERS) == {row["task"] for row in splits["test"][: len(SOLVERS)]}


@pytest.mark.parametrize("built", ["folder", "other"])
def test_no_operands_of_the_test_split_occur_in_training(built: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(built)
    train, test = ({operands(row["task"], questions_of(row)) for row in read(path, s)} for s in ("train", "test"))
    assert not train & test
    # Nor does a training answer state one of the test's sums on its way.
    stated = set()
    for row in read(path, "train"):
        for first, sign, second, result in re.findall(r"(\d+) (\+|-) (\d+) = (\d+)", " ".join(answers_of(row))):
            stated.add(("sum", *sorted(map(int, (first, second) if sign == "+" else (second, result)))))
    assert not stated & test


def test_no_test_question_occurs_in_training_and_none_twice(splits: dict[str, list[Any]]) -> None:
    train = {question for row in splits["train"] for question in (questions_of(row)[0], "\n".join(questions_of(row)))}
    # Two turns may open with a sum that training has too; what is asked is the whole conversation.
    asked = ["\n".join(questions_of(row)) for row in splits["test"]]
    assert not train & set(asked)
    assert len(set(asked)) == len(asked)


def test_a_commuted_question_is_on_the_same_side() -> None:
    assert operands("addition", ["47 + 35 = ?"]) == operands("addition", ["Add 35 and 47."])
    assert operands("addition", ["47 + 35 = ?"]) == operands("subtraction", ["82 - 47 = ?"])
    forward, back = "Today is Tuesday 12. What is 2 days later?", "It is Thursday 14. Which day is 2 days earlier?"
    assert operands("weekday", [forward]) == operands("weekday", [back])
    gain_first, loss_first = (
        "Tom has 3 pens, gets 5, then loses 2. How many now?",
        "Ann has 5 keys, drops 2, then buys 3.",
    )
    assert operands("word_problem", [gain_first]) == operands("word_problem", [loss_first])
    assert operands("word_problem", [gain_first]) == operands("two_turn", ["Add 5 and 3.", "And minus 2?"])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_keys_are_equal_exactly_where_the_operands_in_the_text_are(family: str) -> None:
    rng = random.Random(0)
    examples = [FAMILIES[family](rng) for _ in range(1500)]
    pairs = {(example.key, operands(family, list(example.questions))) for example in examples}
    assert len(pairs) == len({key for key, _ in pairs}) == len({found for _, found in pairs})


def test_no_constant_answer_does_well_in_any_family(splits: dict[str, list[Any]]) -> None:
    for family in SOLVERS:
        answers = Counter(answers_of(row)[-1] for row in splits["test"] if row["task"] == family)
        assert max(answers.values()) / TEST_PER_FAMILY < 0.6, family


def test_every_word_of_the_test_split_is_met_in_training(splits: dict[str, list[Any]]) -> None:
    train, test = (
        {word for row in splits[split] for turn in row["conversations"] for word in re.findall(r"[A-Za-z]+", turn["value"])}
        for split in ("train", "test")
    )
    assert test <= train


def test_same_seed_same_bytes_and_another_seed_another_split(folder: Path, other: Path, tmp_path: Path) -> None:
    build(tmp_path, TRAIN_SIZE, TEST_PER_FAMILY, SEED)
    for file in ("train.jsonl", "test.jsonl", "dataset.json"):
        content = (folder / file).read_bytes()
        assert (tmp_path / file).read_bytes() == content
        assert (other / file).read_bytes() != content
        assert not content.startswith(b"\xef\xbb\xbf") and b"\r" not in content and content.endswith(b"\n")


def test_a_larger_training_split_keeps_the_test_split(folder: Path, tmp_path: Path) -> None:
    build(tmp_path, TRAIN_SIZE + 500, TEST_PER_FAMILY, SEED)
    assert (tmp_path / "test.jsonl").read_bytes() == (folder / "test.jsonl").read_bytes()


def test_a_rerun_reuses_and_a_damaged_or_different_data_set_is_rebuilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output-dir", str(tmp_path), "--train-size", "60", "--test-per-family", "2", "--seed", "3"]
    main(flags)
    assert "wrote" in capsys.readouterr().out
    content, written = (tmp_path / "train.jsonl").read_bytes(), (tmp_path / "train.jsonl").stat().st_mtime_ns
    main(flags)
    assert "reused" in capsys.readouterr().out
    assert (tmp_path / "train.jsonl").stat().st_mtime_ns == written
    (tmp_path / "train.jsonl").write_bytes(content[:100])
    main(flags)
    assert (tmp_path / "train.jsonl").read_bytes() == content
    main([*flags[:-1], "4"])
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "train.jsonl").read_bytes() != content
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "test.jsonl", "dataset.json"}


def test_the_shallow_rows_are_those_of_every_version(tmp_path: Path) -> None:
    build(tmp_path, 150, 3, 0)
    digests = [hashlib.sha256((tmp_path / f"{split}.jsonl").read_bytes()).hexdigest()[:16] for split in ("train", "test")]
    assert digests == ["83db0fd8128c7490", "0eb6c129188bef0c"]


def test_deep_families_are_a_data_set_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--output-dir", str(tmp_path), "--train-size", "60", "--test-per-family", "2"]
    main([*sizes, "--families", "deep", "--max-hops", "2"])
    assert f"wrote {tmp_path}: 60 training rows and 12 test rows of 6 families" in capsys.readouterr().out
    assert {row["hops"] if isinstance(row["hops"], int) else row["hops"][0] for row in read(tmp_path, "train")} == {1, 2}
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in content} == {"train.jsonl", "test.jsonl", "test_deeper.jsonl", "dataset.json"}
    main([*sizes, "--families", "deep", "--max-hops", "2"])
    assert "reused" in capsys.readouterr().out
    (tmp_path / "test_deeper.jsonl").unlink()
    main([*sizes, "--families", "deep", "--max-hops", "2"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content
    # With more hops it is another data set, and shallow families in its place leave no file of it.
    main([*sizes, "--families", "deep"])
    assert {row["hops"] for row in read(tmp_path, "test_deeper")} == {7, 8}
    main(sizes)
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "test.jsonl", "dataset.json"}
    assert {row["task"] for row in read(tmp_path, "train")} <= set(SOLVERS)


def test_each_kind_of_families_has_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--train-size", "60", "--test-per-family", "2"])
    main(["--train-size", "60", "--test-per-family", "2", "--families", "deep"])
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"sample", "deep"}
    assert "wrote data/deep" in capsys.readouterr().out


@pytest.mark.parametrize("max_hops", ["0", "7"])
def test_hops_that_leave_nothing_deeper_to_test_are_refused(
    tmp_path: Path, max_hops: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--output-dir", str(tmp_path / "new"), "--families", "deep", "--max-hops", max_hops])
    assert stop.value.code == 2 and f"expected 1 to 6 hops in training, so that up to 8 can be tested, found {max_hops}" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "new").exists()


def test_hops_of_shallow_families_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output-dir", str(tmp_path / "new"), "--max-hops", "3"])
    assert "--max-hops goes with --families deep" in capsys.readouterr().err


def test_training_questions_repeat_only_when_a_family_runs_out_and_it_is_noted(tmp_path: Path) -> None:
    weights = {**dict.fromkeys(SOLVERS, 0.01), "sequence": 100.0}
    described = build(tmp_path, 2500, 1, SEED, weights)
    asked = Counter("\n".join(questions_of(row)) for row in read(tmp_path, "train"))
    assert described["repeated_train_questions"] == {"sequence": asked.total() - len(asked)}
    assert asked.total() - len(asked) > 0


def test_data_of_others_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match="other data"):
        build(tmp_path, 60, 2)
    assert (tmp_path / "train.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("train_size", "test_per_family", "message"), [(0, 5, "found 0 and 5"), (5, 0, "5 and 0"), (5, 600, "different")]
)
def test_impossible_sizes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_size: int, test_per_family: int, message: str
) -> None:
    monkeypatch.setattr(build_sample_dataset, "MAX_ATTEMPTS", 200)  # it gives up sooner
    with pytest.raises(UsageError, match=message):
        build(tmp_path / "new", train_size, test_per_family)
    assert not (tmp_path / "new").exists()


def test_weights_must_name_every_family(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="positive weight"):
        build(tmp_path, 60, 2, weights={"addition": 1.0})


@pytest.mark.parametrize("total", [1, 15, 999, 40_000])
def test_apportioned_rows_add_up_and_stay_within_one_of_their_share(total: int) -> None:
    parts = apportion(total, TRAIN_WEIGHTS)
    assert sum(parts.values()) == total
    for name, weight in TRAIN_WEIGHTS.items():
        assert abs(parts[name] - weight * total / sum(TRAIN_WEIGHTS.values())) < 1


def test_deep_families_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output-dir", str(tmp_path), "--train-size", "12", "--test-per-family", "6", "--families"]
    main([*flags, "deep_map", "deep_boolean"])
    for split, rows in (("train", 6), ("test", 6), ("test_deeper", 6)):
        tasks = [json.loads(line)["task"] for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert sorted(tasks) == ["deep_boolean"] * rows + ["deep_map"] * rows
    with pytest.raises(SystemExit):
        main([*flags, "deep", "deep_map"])
    assert "takes shallow, deep, or names of deep families, found deep deep_map" in capsys.readouterr().err
