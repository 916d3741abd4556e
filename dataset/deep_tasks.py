"""The deep task families of the bundled data set: the answer takes a known number of dependent steps, and no working is written.

Each draws a question of a given number of steps, its hops. All questions of a family have equally many words and signs: what the
asked hops don't need stays in the question as a distractor. It knows nothing of splits' sizes, files, tokenizers or models.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.sample_tasks import Example

# Every table is made for this many hops, so that its size tells nothing about the number asked.
MOST_HOPS = 8


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + index) for index in range(count)]


def _cycle(rng: random.Random, places: Sequence[str]) -> dict[str, str]:
    """A random map of places to places that visits all of them before it returns."""
    order = rng.sample(places, len(places))
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def deep_pointers(rng: random.Random, hops: int) -> Example:
    """The letter that so many arrows lead to. The arrows form one cycle, twice as long as the most hops: no way back is shorter.

    Key: the arrows in any order, whatever is asked.
    """
    following = _cycle(rng, _letters(2 * MOST_HOPS))
    start = reached = rng.choice(_letters(2 * MOST_HOPS))
    for _ in range(hops):
        reached = following[reached]
    arrows = [f"{source}>{target}" for source, target in following.items()]
    question = f"Arrows: {', '.join(rng.sample(arrows, len(arrows)))}. Start at {start}. Where after step {hops}?"
    return Example(f"deep_pointers:{','.join(sorted(arrows))}", ((question, reached),), hops)


def deep_permutations(rng: random.Random, hops: int) -> Example:
    """A place sent through the first rows of digits: a row sends place i, counted from 0, to its digit there.

    Later rows are distractors. Key: all rows in their order, whatever is asked.
    """
    rows = [rng.sample(range(5), 5) for _ in range(MOST_HOPS)]
    start = reached = rng.randrange(5)
    for row in rows[:hops]:
        reached = row[reached]
    table = " ".join("".join(map(str, row)) for row in rows)
    question = f"Rows: {table}. Start at {start}. Where after row {hops}?"
    return Example(f"deep_permutations:{table}", ((question, str(reached)),), hops)


@dataclass(frozen=True)
class _Operation:
    """`apply` maps the values of a bracket one to one for every leaf: an answer depends on everything inside, however deep."""

    sign: str
    leaves: tuple[int, ...]
    apply: Callable[[int, int], int]
    commutes: bool = True


# Only odd factors other than 5 keep all ten digits apart; a factor of 1 or a summand of 0 would be no step.
_ARITHMETIC = (
    _Operation("+", tuple(range(1, 10)), lambda left, right: (left + right) % 10),
    _Operation("-", tuple(range(1, 10)), lambda left, right: (left - right) % 10, commutes=False),
    _Operation("*", (3, 7, 9), lambda left, right: left * right % 10),
)
# "and" and "or" would settle half of all questions at the outermost bracket.
_BOOLEAN = (
    _Operation("==", (0, 1), lambda left, right: int(left == right)),
    _Operation("!=", (0, 1), lambda left, right: int(left != right)),
)


def _nested(rng: random.Random, operations: Sequence[_Operation], values: Sequence[str], depth: int) -> tuple[str, str, str]:
    """An expression of `depth` operations, each around the one before, as (text, key, value).

    values: the texts of all values. Expressions that differ in the sides of commuting operations have one key.
    """
    value = rng.randrange(len(values))
    text = key = values[value]
    for level in range(depth):
        operation = rng.choice(operations)
        leaf = rng.choice(operation.leaves)
        inner = f"({text})" if level else text
        leaf_first = rng.random() < 0.5
        left, right = (values[leaf], inner) if leaf_first else (inner, values[leaf])
        text = f"{left} {operation.sign} {right}"
        parts = [values[leaf], key] if leaf_first else [key, values[leaf]]
        key = f"({operation.sign.join(sorted(parts) if operation.commutes else parts)})"
        value = operation.apply(leaf, value) if leaf_first else operation.apply(value, leaf)
    return text, key, values[value]


def _asked_of_two(
    rng: random.Random, operations: Sequence[_Operation], values: Sequence[str], hops: int
) -> tuple[str, tuple[str, str], str]:
    """Two nested expressions that share all operations, as (question, keys of the asked one and of the other, answer)."""
    asked, key, answer = _nested(rng, operations, values, hops)
    other, other_key, _ = _nested(rng, operations, values, MOST_HOPS + 1 - hops)
    name, other_name = rng.sample(("p", "q"), 2)
    lines = sorted((f"{name} = {asked}", f"{other_name} = {other}"))
    return f"{'; '.join(lines)}. What is {name}?", (key, other_key), answer


def deep_arithmetic(rng: random.Random, hops: int) -> Example:
    """The value modulo 10 of one of two nested expressions; the more operations one has, the fewer has the other.

    Key: the asked expression, up to the order of terms and factors.
    """
    question, (key, _), answer = _asked_of_two(rng, _ARITHMETIC, tuple(map(str, range(10))), hops)
    return Example(f"deep_arithmetic:{key}", ((f"Modulo 10: {question}", answer),), hops)


def deep_boolean(rng: random.Random, hops: int) -> Example:
    """The truth of one of two nested expressions, as in deep_arithmetic.

    Key: both expressions, whichever is asked: one of a single operation has only a handful of forms, too few to hold any out.
    """
    question, keys, answer = _asked_of_two(rng, _BOOLEAN, ("false", "true"), hops)
    return Example(f"deep_boolean:{','.join(sorted(keys))}", ((question, answer),), hops)


def deep_map(rng: random.Random, hops: int) -> Example:
    """The room reached after the first of several moves, each through the left or the right door of the room it starts in.

    Left doors lead through all rooms in turn, and so do right doors, to other rooms. Key: the map, whatever the walk.
    """
    rooms = _letters(8)
    left, right = _cycle(rng, rooms), _cycle(rng, rooms)
    while any(left[room] == right[room] for room in rooms):
        right = _cycle(rng, rooms)
    moves = rng.choices(("left", "right"), k=MOST_HOPS)
    start = reached = rng.choice(rooms)
    for move in moves[:hops]:
        reached = (left if move == "left" else right)[reached]
    table = [f"{room} {left[room]} {right[room]}" for room in rooms]
    question = (
        f"Room, left door, right door: {', '.join(rng.sample(table, len(table)))}. "
        f"From {start} go {' '.join(moves)}. Where after move {hops}?"
    )
    return Example(f"deep_map:{','.join(table)}", ((question, reached),), hops)


def deep_order(rng: random.Random, hops: int) -> Example:
    """Which of two letters is surely less, or greater, than a third, by facts about neighbours in two orders, all shuffled.

    The wrong choice has the right one's place in the other order, so that only the facts between tell. Key: both orders.
    """
    length = MOST_HOPS + 1
    letters = rng.sample(_letters(2 * length), 2 * length)
    order, other = letters[:length], letters[length:]
    facts = [f"{high}>{low}" for chain in (order, other) for high, low in itertools.pairwise(chain)]
    above = rng.randrange(length - hops)
    word, subject, place = rng.choice((("less", above, above + hops), ("greater", above + hops, above)))
    choices = rng.sample((order[place], other[place]), 2)
    question = f"{', '.join(rng.sample(facts, len(facts)))}. Which is surely {word} than {order[subject]}: {' or '.join(choices)}?"
    return Example(f"deep_order:{','.join(sorted(facts))}", ((question, order[place]),), hops)


DEEP_FAMILIES: dict[str, Callable[[random.Random, int], Example]] = {
    family.__name__: family
    for family in (deep_pointers, deep_permutations, deep_arithmetic, deep_boolean, deep_map, deep_order)
}  # fmt: skip

# Share of each family's keys that is held out.
DEEP_TEST_FRACTION = 0.15
