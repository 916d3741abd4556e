"""The deep task families of the bundled data set: the answer takes a known number of dependent steps, and no working is written.

Each draws a table and asks about it once for each of the given numbers of steps, the hops. A table is made for `size` hops, no
fewer than are asked: what they don't need stays in it as a distractor. A lookup is first learned from small tables; tests have
the largest, so that all their questions of a family have equally many words and signs. Letters and words stand between blanks, so
that a tokenizer cuts them alike wherever they stand. It knows nothing of splits' sizes, files, tokenizers or models.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dataset.sample_tasks import Example

# The largest tables are made for so many hops.
MOST_HOPS = 8


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + index) for index in range(count)]


def _cycle(rng: random.Random, places: Sequence[str]) -> dict[str, str]:
    """A random map of places to places that visits all of them before it returns."""
    order = rng.sample(places, len(places))
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _about(table: str, questions: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Turns of which the first states the table."""
    return tuple((f"{'' if number else table}{question}", answer) for number, (question, answer) in enumerate(questions))


def deep_pointers(rng: random.Random, hops: Sequence[int], size: int = MOST_HOPS) -> Example:
    """The letter that so many arrows lead to. The arrows form one cycle, twice as long as `size`: no way back is shorter.

    Key: the arrows in any order, whatever is asked.
    """
    following = _cycle(rng, rng.sample(_letters(2 * MOST_HOPS), 2 * size))

    def question(hops: int) -> tuple[str, str]:
        start = reached = rng.choice([*following])
        for _ in range(hops):
            reached = following[reached]
        return f"Start at {start}. Where after step {hops}?", reached

    arrows = [f"{source} {target}" for source, target in following.items()]
    table = f"Arrows: {', '.join(rng.sample(arrows, len(arrows)))}. "
    return Example(f"deep_pointers:{','.join(sorted(arrows))}", _about(table, map(question, hops)), tuple(hops))


def deep_permutations(rng: random.Random, hops: Sequence[int], size: int = MOST_HOPS) -> Example:
    """A place sent through the first rows of digits: a row sends place i, counted from 0, to its digit there.

    Later rows are distractors. Key: all rows in their order, whatever is asked.
    """
    rows = [rng.sample(range(5), 5) for _ in range(size)]

    def question(hops: int) -> tuple[str, str]:
        start = reached = rng.randrange(5)
        for row in rows[:hops]:
            reached = row[reached]
        return f"Start at {start}. Where after row {hops}?", str(reached)

    table = " ".join("".join(map(str, row)) for row in rows)
    return Example(f"deep_permutations:{table}", _about(f"Rows: {table}. ", map(question, hops)), tuple(hops))


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
        inner = f"( {text} )" if level else text
        leaf_first = rng.random() < 0.5
        left, right = (values[leaf], inner) if leaf_first else (inner, values[leaf])
        text = f"{left} {operation.sign} {right}"
        parts = [values[leaf], key] if leaf_first else [key, values[leaf]]
        key = f"({operation.sign.join(sorted(parts) if operation.commutes else parts)})"
        value = operation.apply(leaf, value) if leaf_first else operation.apply(value, leaf)
    return text, key, values[value]


def _asked_of_two(
    rng: random.Random, operations: Sequence[_Operation], values: Sequence[str], hops: int, size: int
) -> tuple[str, tuple[str, str], str]:
    """Two nested expressions that share all operations, as (question, keys of the asked one and of the other, answer)."""
    asked, key, answer = _nested(rng, operations, values, hops)
    other, other_key, _ = _nested(rng, operations, values, size + 1 - hops)
    name, other_name = rng.sample(("p", "q"), 2)
    lines = sorted((f"{name} = {asked}", f"{other_name} = {other}"))
    return f"{'; '.join(lines)}. What is {name}?", (key, other_key), answer


def deep_arithmetic(rng: random.Random, hops: Sequence[int], size: int = MOST_HOPS) -> Example:
    """The value modulo 10 of one of two nested expressions; the more operations one has, the fewer has the other.

    There is one question. Key: the asked expression, up to the order of terms and factors.
    """
    (asked,) = hops
    question, (key, _), answer = _asked_of_two(rng, _ARITHMETIC, tuple(map(str, range(10))), asked, size)
    return Example(f"deep_arithmetic:{key}", ((f"Modulo 10: {question}", answer),), tuple(hops))


def deep_boolean(rng: random.Random, hops: Sequence[int], size: int = MOST_HOPS) -> Example:
    """The truth of one of two nested expressions, as in deep_arithmetic.

    There is one question. Key: both expressions, whichever is asked: one of a single operation has only a handful of forms, too few
    to hold any out.
    """
    (asked,) = hops
    question, keys, answer = _asked_of_two(rng, _BOOLEAN, ("false", "true"), asked, size)
    return Example(f"deep_boolean:{','.join(sorted(keys))}", ((question, answer),), tuple(hops))


def deep_map(rng: random.Random, hops: Sequence[int], size: int = MOST_HOPS) -> Example:
    """The room reached after the first of several moves, each through the left or the right door of the room it starts in.

    Left doors lead through all rooms in turn, and so do right doors, to other rooms. Key: the map, whatever the walk.
    """
    rooms = rng.sample(_letters(MOST_HOPS), max(3, size))
    left, right = _cycle(rng, rooms), _cycle(rng, rooms)
    while any(left[room] == right[room] for room in rooms):
        right = _cycle(rng, rooms)

    def question(hops: int) -> tuple[str, str]:
        moves = rng.choices(("left", "right"), k=size)
        start = reached = rng.choice(rooms)
        for move in moves[:hops]:
            reached = (left if move == "left" else right)[reached]
        return f"From {start} go {' '.join(moves)}. Where after move {hops}?", reached

    doors = [f"{room} {left[room]} {right[room]}" for room in sorted(rooms)]
    table = f"Room, left door, right door: {', '.join(rng.sample(doors, len(doors)))}. "
    return Example(f"deep_map:{','.join(doors)}", _about(table, map(question, hops)), tuple(hops))


def deep_order(rng: random.Random, hops: Sequence[int], size: int = MOST_HOPS) -> Example:
    """Which of two letters is surely less, or greater, than a third, by facts about neighbours in two orders, all shuffled.

    The wrong choice has the right one's place in the other order, so that only the facts between tell. Key: both orders.
    """
    length = size + 1
    letters = rng.sample(_letters(2 * (MOST_HOPS + 1)), 2 * length)
    orders = letters[:length], letters[length:]
    facts = [f"{high} > {low}" for chain in orders for high, low in itertools.pairwise(chain)]

    def question(hops: int) -> tuple[str, str]:
        order, other = rng.sample(orders, 2)
        above = rng.randrange(length - hops)
        word, subject, place = rng.choice((("less", above, above + hops), ("greater", above + hops, above)))
        choices = rng.sample((order[place], other[place]), 2)
        return f"Which is surely {word} than {order[subject]}: {' or '.join(choices)}?", order[place]

    table = f"{', '.join(rng.sample(facts, len(facts)))}. "
    return Example(f"deep_order:{','.join(sorted(facts))}", _about(table, map(question, hops)), tuple(hops))


DEEP_FAMILIES: dict[str, Callable[[random.Random, Sequence[int], int], Example]] = {
    family.__name__: family
    for family in (deep_pointers, deep_permutations, deep_arithmetic, deep_boolean, deep_map, deep_order)
}  # fmt: skip

# Families with a table to ask several questions about.
TABLE_FAMILIES = frozenset(DEEP_FAMILIES) - {"deep_arithmetic", "deep_boolean"}

# Share of each family's keys that is held out.
DEEP_TEST_FRACTION = 0.15
