"""The task families of the bundled data set: each draws operands, words a short question and gives its one answer.

Answers show a short piece of their working ("82 - 35 = ?" is answered "52 - 5 = 47") and are right only as a whole: copying
an operand or naming a half-way result gives a small model something to learn from in every answer. A family also names its
operands by a key that is equal for any two questions of which one gives the other away. It knows nothing of splits' sizes, files,
tokenizers or models.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dataset.sample_words import GOODS, KINDS, LIST_WORDS, NAMES, SPELLING_WORDS, THINGS, WEEKDAYS


@dataclass(frozen=True)
class Example:
    """One conversation without its system prompt.

    `key` is "<space>:<canonical operands>"; families that share a space hold out the same operands.
    `turns` are (question, answer) pairs in order. `hops`: of the deep families, how many dependent steps each answer takes.
    """

    key: str
    turns: tuple[tuple[str, str], ...]
    hops: tuple[int, ...] = ()

    @property
    def questions(self) -> tuple[str, ...]:
        """The human turns alone: what "the same question" means here."""
        return tuple(question for question, _ in self.turns)


def stated_sums(example: Example) -> set[str]:
    """Keys of the sums and differences that the answers state, half-way results included, if addition or subtraction could ask for
    them: a training answer must not tell a held-out fact either."""
    keys = set()
    for _, answer in example.turns:
        for first, sign, second, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", answer):
            parts = sorted(map(int, (first, second) if sign == "+" else (second, result)))
            if parts[1] >= 10:
                keys.add(f"sum:{_join(parts)}")
    return keys


def _join(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


def _single(key: str, question: str, answer: object) -> Example:
    return Example(key, ((question, str(answer)),))


def addition(rng: random.Random) -> Example:
    """Two two-digit numbers whose sum has two digits: tens, ones, sum. Key: the unordered pair, shared with subtraction."""
    first, second = rng.randint(10, 89), rng.randint(10, 89)
    while first + second > 99:
        first, second = rng.randint(10, 89), rng.randint(10, 89)
    wording = rng.choice(("{} + {} = ?", "What is {} + {}?", "Add {} + {}."))
    return _single(f"sum:{_join(sorted((first, second)))}", wording.format(first, second), _added(first, second))


def _added(first: int, second: int) -> str:
    tens, ones = first // 10 + second // 10, first % 10 + second % 10
    return f"{10 * tens} + {ones} = {first + second}"


def subtraction(rng: random.Random) -> Example:
    """A two-digit number from one that is not smaller: the tens first, then the ones.

    Key: the two parts unordered, as in addition: 82 - 35, 82 - 47, 35 + 47 and 47 + 35 are one fact.
    """
    small, large = sorted((rng.randint(10, 99), rng.randint(10, 99)))
    wording = rng.choice(("{} - {} = ?", "What is {} - {}?", "Subtract: {} - {}."))
    answer = f"{large - small // 10 * 10} - {small % 10} = {large - small}"
    return _single(f"sum:{_join(sorted((small, large - small)))}", wording.format(large, small), answer)


def compare(rng: random.Random) -> Example:
    """The larger or the smaller of two two-digit numbers, then the other. Key: the unordered pair, whatever is asked."""
    first, second = rng.sample(range(10, 100), 2)
    larger = rng.random() < 0.5
    wording = rng.choice(("Which is {}: {} or {}?", "Which number is {}, {} or {}?", "Name the {} one: {} or {}."))
    question = wording.format("larger" if larger else "smaller", first, second)
    low, high = sorted((first, second))
    return _single(f"compare:{low},{high}", question, f"{high} > {low}" if larger else f"{low} < {high}")


def sort(rng: random.Random) -> Example:
    """Four different one-digit numbers in ascending order. Key: the set of them."""
    numbers = rng.sample(range(10), 4)
    wording = rng.choice(("Sort: {}", "Sort these numbers: {}", "Put in order: {}"))
    ordered = sorted(numbers)
    return _single(f"sort:{_join(ordered)}", wording.format(" ".join(map(str, numbers))), " ".join(map(str, ordered)))


def count(rng: random.Random) -> Example:
    """Which of four different words are of one kind, and how many, none to all evenly. Key: the kind and the set of words."""
    kind = rng.choice(tuple(KINDS))
    matches = rng.randint(0, 4)
    others = [word for other, words in KINDS.items() if other != kind for word in words]
    words = rng.sample(KINDS[kind], matches) + rng.sample(others, 4 - matches)
    rng.shuffle(words)
    found = ", ".join(word for word in words if word in KINDS[kind]) or "none"
    wording = rng.choice(("How many {}: {}?", "Count the {}: {}.", "How many of these are {}: {}?"))
    return _single(f"count:{kind},{_join(sorted(words))}", wording.format(kind, ", ".join(words)), f"{found}: {matches}")


def reverse(rng: random.Random) -> Example:
    """The letters of a word, then backwards. Key: the word or its mirror image, shared with spell."""
    word = rng.choice(SPELLING_WORDS)
    wording = rng.choice(("Reverse: {}", "Write backwards: {}", "Reverse the letters: {}"))
    return _single(_word_key(word), wording.format(" ".join(word)), f"{' '.join(word)} = {' '.join(reversed(word))}")


def spell(rng: random.Random) -> Example:
    """A word, given letter by letter, then in capitals. Key: as in reverse."""
    word = rng.choice(SPELLING_WORDS)
    wording = rng.choice(("Spell in capitals: {}", "Capital letters: {}", "Write in capitals: {}"))
    return _single(_word_key(word), wording.format(" ".join(word)), f"{' '.join(word)} = {' '.join(word.upper())}")


def _word_key(word: str) -> str:
    # "won" backwards answers "now" backwards, so a word and its mirror image are one key.
    return f"word:{min(word, word[::-1])}"


ORDINALS = ("first", "second", "third", "last")


def position(rng: random.Random) -> Example:
    """The first, second, third or last of four words. Key: the list, whichever place is asked."""
    words = rng.sample(LIST_WORDS, 4)
    place = rng.randrange(4)
    wording = rng.choice(("Which is {}: {}?", "What is the {} word: {}?", "Name the {} of these: {}."))
    return _single(f"list:{_join(words)}", wording.format(ORDINALS[place], ", ".join(words)), _at(words, place))


def _at(words: list[str], place: int) -> str:
    return f"{ORDINALS[place]}: {words[place]}"


# Steps a counting child knows; each appears upwards and downwards.
SEQUENCE_STEPS = (1, 2, 3, 5, 10)


def sequence(rng: random.Random) -> Example:
    """The next term after three, by an even step up or down, all within 10..99.

    Key: the fact that answers it, as in addition and shared with it: after 14, 24, 34 comes 34 + 10.
    """
    step = rng.choice(SEQUENCE_STEPS) * rng.choice((1, -1))
    low, high = (10, 99 - 3 * step) if step > 0 else (10 - 3 * step, 99)
    start = rng.randint(low, high)
    terms = [start + step * index for index in range(3)]
    wording = rng.choice(("Next: {}", "What comes next: {}", "Continue: {}"))
    answer = f"{terms[-1]} {'+' if step > 0 else '-'} {abs(step)} = {terms[-1] + step}"
    parts = sorted((terms[-1], step) if step > 0 else (-step, terms[-1] + step))
    return _single(f"sum:{_join(parts)}", wording.format(", ".join(map(str, terms))), answer)


def weekday(rng: random.Random) -> Example:
    """Weekday and day of the month one to three days later or earlier, day by day, within a month's first 28 days.

    Key: the earlier weekday and date, and the number of days: the way back gives the way there away.
    """
    step = rng.randint(1, 3)
    early_date = rng.randint(1, 28 - step)
    early_day = rng.randrange(7)
    dates = [f"{WEEKDAYS[(early_day + days) % 7]} {early_date + days}" for days in range(step + 1)]
    forward = rng.random() < 0.5
    given, *passed = dates if forward else reversed(dates)
    days = "1 day" if step == 1 else f"{step} days"
    wording = rng.choice(("Today is {}. What is {}?", "It is {}. Which day is {}?", "From {}, which day is {}?"))
    question = wording.format(given, f"{days} later" if forward else f"{days} earlier")
    return _single(f"weekday:{early_day},{early_date},{step}", question, ", ".join(passed))


# (larger unit, smaller unit, how many smaller ones make one): powers of ten, so that held-out amounts follow from
# the digits.
UNITS = (
    ("cm", "mm", 10),
    ("dm", "cm", 10),
    ("m", "cm", 100),
    ("dollars", "cents", 100),
    ("km", "m", 1000),
    ("kg", "g", 1000),
)


def unit(rng: random.Random) -> Example:
    """An amount of 2..99 in a smaller unit. Key: factor and amount: 7 km in m gives 7 kg in g away."""
    large, small, factor = rng.choice(UNITS)
    amount = rng.randint(2, 99)
    wording = rng.choice(("{1} {0} in {2}?", "Convert {1} {0} to {2}.", "How many {2} are {1} {0}?"))
    question = wording.format(large, amount, small)
    return _single(f"unit:{factor},{amount}", question, f"{amount} {large} = {factor * amount} {small}")


RELATIONS = ("older", "taller", "faster")


def logic(rng: random.Random) -> Example:
    """Whether x is above z, or z above x, given x above y and y above z in either order: all three from the top, then yes or no.

    Key: the unordered three names, whatever the relation, the order of the facts and the direction asked.
    """
    top, middle, bottom = names = rng.sample(NAMES, 3)
    relation = rng.choice(RELATIONS)
    facts = [f"{top} is {relation} than {middle}", f"{middle} is {relation} than {bottom}"]
    rng.shuffle(facts)
    holds = rng.random() < 0.5
    left, right = (top, bottom) if holds else (bottom, top)
    wording = rng.choice(
        ("{}. {}. Is {} {} than {}?", "{} and {}. Is {} {} than {}?", "Facts: {}. {}. Yes or no: is {} {} than {}?")
    )
    question = wording.format(*facts, left, relation, right)
    return _single(f"logic:{_join(sorted(names))}", question, f"{top}, {middle}, {bottom}: {'yes' if holds else 'no'}")


GAINS = ("gets", "finds", "buys")
LOSSES = ("loses", "sells", "drops")


def word_problem(rng: random.Random) -> Example:
    """A number of things changed twice, all numbers 1..9, never below zero: the second change, applied to the first's result.

    Key: what is added and what is taken away, each unordered: 3 + 5 - 2 is 5 - 2 + 3.
    """
    while True:
        start, *changes = (rng.randint(1, 9) for _ in range(3))
        signs = [rng.choice((1, -1)) for _ in changes]
        middle = start + signs[0] * changes[0]
        total = middle + signs[1] * changes[1]
        if middle >= 0 and total >= 0:
            break
    verbs = [rng.choice(GAINS if sign > 0 else LOSSES) for sign in signs]
    wording = rng.choice(
        (
            "{name} has {start} {things}, {one} {a}, then {two} {b}. How many now?",
            "{name} has {start} {things}. {name} {one} {a} and {two} {b}. How many {things} now?",
            "{name} had {start} {things}, then {one} {a} and {two} {b}. How many are there?",
        )
    )
    question = wording.format(
        name=rng.choice(NAMES), start=start, things=rng.choice(THINGS),
        one=verbs[0], a=changes[0], two=verbs[1], b=changes[1],
    )  # fmt: skip
    answer = f"{middle} {'+' if signs[1] > 0 else '-'} {changes[1]} = {total}"
    return _single(_change_key([start, signs[0] * changes[0], signs[1] * changes[1]]), question, answer)


def _change_key(changes: Iterable[int]) -> str:
    return f"changes:{_join(sorted(changes))}"


def lookup(rng: random.Random) -> Example:
    """One value of a table with three entries and different one-digit values. Key: the unordered table."""
    entries = list(zip(rng.sample(GOODS, 3), rng.sample(range(1, 10), 3), strict=True))
    asked, value = rng.choice(entries)
    table = ", ".join(f"{name} {number}" for name, number in entries)
    wording = rng.choice(("Prices: {0}. What does {1} cost?", "{0}. How much is {1}?", "Table: {0}. What is the value of {1}?"))
    return _single(f"lookup:{_join(sorted(entries))}", wording.format(table, asked), f"{asked} {value}")


def two_turn(rng: random.Random) -> Example:
    """A second turn that can't be answered without the first: a sum that goes on, or another place of the same list.

    Key: for sums as in word_problem and shared with it (what is added and what is taken away, over both turns), for
    lists the list, shared with position.
    """
    if rng.random() < 0.5:
        words = rng.sample(LIST_WORDS, 4)
        first, second = rng.sample(range(4), 2)
        opening = rng.choice(("Which is {}: {}?", "What is the {} word: {}?", "Name the {} of these: {}."))
        following = rng.choice(("And the {}?", "Now the {} one?", "And which is {}?"))
        turns = (
            (opening.format(ORDINALS[first], ", ".join(words)), _at(words, first)),
            (following.format(ORDINALS[second]), _at(words, second)),
        )
        return Example(f"list:{_join(words)}", turns)
    left, right, change = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
    sign = rng.choice((1, -1)) if left + right >= change else 1
    opening = rng.choice(("{} + {} = ?", "What is {} + {}?", "Add {} + {}."))
    following = rng.choice(("Now add {}.", "And plus {}?") if sign > 0 else ("Now take away {}.", "And minus {}?"))
    turns = (
        (opening.format(left, right), f"{left} + {right} = {left + right}"),
        (following.format(change), f"{left + right} {'+' if sign > 0 else '-'} {change} = {left + right + sign * change}"),
    )
    return Example(_change_key([left, right, sign * change]), turns)


FAMILIES: dict[str, Callable[[random.Random], Example]] = {
    family.__name__: family
    for family in (
        addition, subtraction, compare, sort, count, reverse, spell, position,
        sequence, weekday, unit, logic, word_problem, lookup, two_turn,
    )
}  # fmt: skip

# Share of each operand space that is held out: about a seventh, a fifth where the space is small, so that a test of 100
# questions a family meets many different operands.
TEST_FRACTION = {
    "sum": 0.15, "compare": 0.15, "sort": 0.2, "count": 0.15, "word": 0.2, "list": 0.15,
    "weekday": 0.2, "unit": 0.2, "logic": 0.2, "changes": 0.2, "lookup": 0.15,
}  # fmt: skip
