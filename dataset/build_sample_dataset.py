"""Command: writes the bundled data set, SlimOrca-form JSONL with checkable answers, split by operands.

    python -m dataset.build_sample_dataset --output-dir data/sample --train-size 88000 --test-per-family 100 --seed 0
    python -m dataset.build_sample_dataset --families deep --max-hops 6
    python -m dataset.build_sample_dataset --families deep_arithmetic deep_boolean --train-size 400000

It knows the families of `sample_tasks` and `deep_tasks` and the row form, nothing of tokenizers, training or models.
"""

import argparse
import hashlib
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from config.errors import UsageError, one_clear_message
from dataset.deep_tasks import DEEP_FAMILIES, DEEP_TEST_FRACTION, MOST_HOPS, TABLE_FAMILIES
from dataset.sample_tasks import FAMILIES, TEST_FRACTION, Example, stated_sums

GENERATOR = "sample-tasks"
SOURCES = ("build_sample_dataset.py", "sample_tasks.py", "sample_words.py", "deep_tasks.py")

# How many numbers of hops beyond those of training test_deeper asks.
DEEPER = 2
# Questions that a training row asks about its table: one answer of a token is little to learn from in so many.
TABLE_QUESTIONS = 4
HELD_OUT_FRACTION = TEST_FRACTION | dict.fromkeys(DEEP_FAMILIES, DEEP_TEST_FRACTION)

# Rows of a family in training, relative to the others, by how many of them the quickstart's model needed: arithmetic wants most,
# sorting, units and places in a list are learned from few.
TRAIN_WEIGHTS: dict[str, float] = {
    "addition": 2.5, "subtraction": 2.5, "compare": 1.2, "sort": 0.6, "count": 1.6,
    "reverse": 1.0, "spell": 0.7, "position": 0.6, "sequence": 2.0, "weekday": 1.2,
    "unit": 0.5, "logic": 1.8, "word_problem": 2.2, "lookup": 1.8, "two_turn": 1.8,
}  # fmt: skip

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "Show your work.", "Be exact.")
SYSTEM_PROMPT_SHARE = 0.25

# How often a question that was met already is drawn anew before a repeat is taken.
FRESH_ATTEMPTS = 100
# Draws for one row in all. The smallest share held out is 0.12, so failing this often means that nothing is left.
MAX_ATTEMPTS = 5000


def generator_version() -> str:
    """Short hash of the generator's own source: a data set of an older generator is never taken for the new one's."""
    sources = (Path(__file__).with_name(name) for name in SOURCES)
    return _digest(b"".join(source.read_bytes() for source in sources))[:12]


def is_held_out(key: str, seed: int) -> bool:
    """Whether the operands `key` ("<space>:<operands>") belong to the test split; depends on nothing but both."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < HELD_OUT_FRACTION[key.split(":", 1)[0]]


def _belongs(example: Example, split: str, seed: int) -> bool:
    """Test splits ask held-out operands. Training neither asks them nor states a held-out sum in its working."""
    if split != "train":
        return is_held_out(example.key, seed)
    return not any(is_held_out(key, seed) for key in {example.key, *stated_sums(example)})


def draw_family(family: str, split: str, rows: int, seed: int, hops: Sequence[int] = ()) -> tuple[list[Example], int]:
    """Draw `rows` examples of one family whose operands belong to `split` ("train", "test" or "test_deeper").

    `hops`: of a deep family, the numbers of hops that its rows have in turn. Returns the examples and how many of them repeat
    an earlier question (never in a test split, where new operands are also preferred to a new wording). Raises UsageError if a
    test split has too few questions.
    """
    examples: list[Example] = []
    seen_questions: set[tuple[str, ...]] = set()
    seen_keys: set[str] = set()
    repeats = 0
    for row in range(rows):
        rng = random.Random(f"{seed}/{split}/{family}/{row}")
        met = 0
        for _ in range(MAX_ATTEMPTS):
            example = _draw_deep(family, split, rng, hops, row) if hops else FAMILIES[family](rng)
            if not _belongs(example, split, seed):
                continue
            new_question = example.questions not in seen_questions
            wanted = new_question and (split == "train" or example.key not in seen_keys or met >= FRESH_ATTEMPTS)
            if wanted or (split == "train" and met >= FRESH_ATTEMPTS):
                break
            met += 1
        else:
            raise UsageError(
                f"expected {rows} different {split} questions of the family '{family}', found only {row}; "
                "ask for fewer (--test-per-family)"
            )
        repeats += not new_question
        seen_questions.add(example.questions)
        seen_keys.add(example.key)
        examples.append(example)
    return examples, repeats


def _draw_deep(family: str, split: str, rng: random.Random, hops: Sequence[int], row: int) -> Example:
    """Row `row` of a deep family; the hops of first questions take turns. In training tables have any size and more questions."""
    asked = [hops[row % len(hops)]]
    if split != "train":
        return DEEP_FAMILIES[family](rng, asked, MOST_HOPS)
    size = rng.randint(asked[0], MOST_HOPS)
    if family in TABLE_FAMILIES:
        # What the table has room for, so that small ones stay frequent.
        asked += rng.choices([number for number in hops if number <= size], k=TABLE_QUESTIONS - 1)
    return DEEP_FAMILIES[family](rng, asked, size)


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Split `total` rows in proportion to `weights` by largest remainder; the parts add up to `total`."""
    scale = total / sum(weights.values())
    parts = {name: math.floor(weight * scale) for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: (parts[name] - weights[name] * scale, name))
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def to_row(family: str, example: Example, rng: random.Random) -> dict[str, Any]:
    """The SlimOrca-form row of one example, with a system prompt on a share of the rows; none with hops, which are equally long.

    `hops` is the number, where one question is asked, else the list.
    """
    conversations = []
    if not example.hops and rng.random() < SYSTEM_PROMPT_SHARE:
        conversations.append({"from": "system", "value": rng.choice(SYSTEM_PROMPTS)})
    for question, answer in example.turns:
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "gpt", "value": answer})
    row = {"conversations": conversations, "task": family}
    if not example.hops:
        return row
    return {**row, "hops": example.hops[0] if len(example.hops) == 1 else list(example.hops)}


def _as_rows(split: str, family: str, examples: Sequence[Example], seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"{seed}/{split}/{family}/system")
    return [to_row(family, example, rng) for example in examples]


def _encode(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UsageError(f"expected a JSON object in {path}, found: {error}; remove the file or name another folder") from error
    return manifest if isinstance(manifest, dict) and manifest.get("generator") == GENERATOR else {}


def build(
    output_dir: str | Path,
    train_size: int,
    test_per_family: int,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    families: Literal["shallow", "deep"] | Sequence[str] = "shallow",
    max_hops: int = MOST_HOPS - DEEPER,
) -> dict[str, Any]:
    """Write `train.jsonl`, `test.jsonl` and `dataset.json` into `output_dir`; reuse them if they are there already.

    families: the shallow ones, all deep ones, or names of deep ones. `weights` are their relative numbers of training rows
    (default TRAIN_WEIGHTS, or equal ones for deep families); the test split has `test_per_family` rows of each. Rows of deep
    families have 1 to `max_hops` hops, as many rows of each number, and as many again, with more hops, stand in
    `test_deeper.jsonl`. Returns dataset.json's content with `"reused"` added.
    Raises UsageError for impossible sizes and for a folder that holds somebody else's data.
    """
    is_deep = families != "shallow"
    names = [name for name in DEEP_FAMILIES if families == "deep" or name in families] if is_deep else list(FAMILIES)
    if weights is None:
        weights = dict.fromkeys(names, 1.0) if is_deep else TRAIN_WEIGHTS
    if set(weights) != set(names) or any(not 0 < weight < math.inf for weight in weights.values()):
        raise UsageError(f"expected a positive weight for each of {sorted(names)}, found {weights}")
    if not 1 <= max_hops <= MOST_HOPS - DEEPER:
        raise UsageError(
            f"expected 1 to {MOST_HOPS - DEEPER} hops in training, so that up to {MOST_HOPS} can be tested, found {max_hops}; "
            "change --max-hops"
        )
    weights = {family: weights[family] for family in names}  # one order, whatever the caller's: rows depend on it
    if train_size < 1 or test_per_family < 1:
        raise UsageError(f"expected at least 1 training row and 1 test row a family, found {train_size} and {test_per_family}")
    folder = Path(output_dir)
    hops: dict[str, Sequence[int]] = {"train": (), "test": ()}
    if is_deep:
        trained, deeper = range(1, max_hops + 1), range(max_hops + 1, max_hops + DEEPER + 1)
        hops = {"train": trained, "test": trained, "test_deeper": deeper}
    files = {split: folder / f"{split}.jsonl" for split in hops}
    arguments = {
        "generator": GENERATOR, "version": generator_version(), "seed": seed, "train_size": train_size,
        "test_per_family": test_per_family, "weights": weights, "hops": {split: list(asked) for split, asked in hops.items()},
    }  # fmt: skip

    manifest = _read_manifest(folder / "dataset.json")
    if not manifest and (manifest is not None or any(path.exists() for path in files.values())):
        raise UsageError(
            f"expected {folder} to be empty or to hold a data set of this command, found other data there; "
            "name another --output-dir"
        )
    if manifest and all(manifest.get(name) == value for name, value in arguments.items()):
        found = {split: _digest(path.read_bytes()) for split, path in files.items() if path.is_file()}
        if found == manifest.get("sha256"):
            return {**manifest, "reused": True}

    earlier: dict[str, str] = (manifest or {}).get("sha256", {})
    sizes = {split: dict.fromkeys(names, test_per_family) for split in hops} | {"train": apportion(train_size, weights)}
    repeats: dict[str, int] = {}
    contents: dict[str, bytes] = {}
    for split, counts in sizes.items():
        per_family: list[list[dict[str, Any]]] = []
        for family, rows in counts.items():
            examples, repeated = draw_family(family, split, rows, seed, hops[split])
            if repeated:
                repeats[family] = repeated
            per_family.append(_as_rows(split, family, examples, seed))
        if split == "train":
            ordered = [row for rows in per_family for row in rows]
            random.Random(f"{seed}/train/order").shuffle(ordered)
        else:
            # Interleaved, so that any prefix of the test split has every family.
            ordered = [row for group in zip(*per_family, strict=True) for row in group]
        contents[split] = _encode(ordered)

    manifest = {
        **arguments,
        "test_size": test_per_family * len(names),
        "counts": sizes,
        "repeated_train_questions": repeats,
        "note": "A training question repeats an earlier one where its family has few different questions left.",
        "sha256": {split: _digest(content) for split, content in contents.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    # The description goes first: if the command is killed, its hashes don't match the files and the next run rebuilds.
    _write_atomically(folder / "dataset.json", (json.dumps(manifest, indent=2) + "\n").encode())
    for split, path in files.items():
        _write_atomically(path, contents[split])
    for split in earlier.keys() - contents.keys():  # of a data set of deep families that was here
        (folder / f"{split}.jsonl").unlink(missing_ok=True)
    return {**manifest, "reused": False}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, build, and say what lies where."""
    parser = argparse.ArgumentParser(description="Build the bundled instruction data set.")
    parser.add_argument(
        "--families", nargs="+", choices=("shallow", "deep", *DEEP_FAMILIES), default=["shallow"], metavar="NAME",
        help=f"shallow, or deep, whose answers take many dependent steps, or some of the deep ones: {', '.join(DEEP_FAMILIES)}",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=os.path.expanduser,
        help="folder for train.jsonl, test.jsonl, dataset.json; default: data/sample, of deep families data/deep",
    )  # fmt: skip
    parser.add_argument("--train-size", type=int, default=88_000, help="training rows over all families")
    parser.add_argument("--test-per-family", type=int, default=100, help="held-out rows of each family")
    parser.add_argument("--seed", type=int, default=0, help="decides the split and every row")
    parser.add_argument(
        "--max-hops", type=int,
        help=f"deep families: most dependent steps of a training row, by default {MOST_HOPS - DEEPER}, which is also the most",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    chosen = arguments.families
    kinds = {"shallow", "deep"} & set(chosen)
    deep = "shallow" not in kinds
    folder = arguments.output_dir or ("data/deep" if deep else "data/sample")
    with one_clear_message():
        if arguments.max_hops is not None and not deep:
            raise UsageError("--max-hops goes with --families deep: give both")
        if kinds and len(chosen) > 1:
            raise UsageError(f"--families takes shallow, deep, or names of deep families, found {' '.join(chosen)}")
        max_hops = {} if arguments.max_hops is None else {"max_hops": arguments.max_hops}
        made = build(
            folder, arguments.train_size, arguments.test_per_family, arguments.seed, families=min(kinds, default=chosen), **max_hops
        )
        print(
            f"{'reused' if made['reused'] else 'wrote'} {folder}: {made['train_size']} training rows and "
            f"{made['test_size']} test rows of {len(made['weights'])} families, seed {made['seed']}"
        )


if __name__ == "__main__":
    main()
