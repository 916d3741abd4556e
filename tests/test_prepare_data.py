"""The command that builds a cache ahead and writes the data card, and the figures on the card."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest

from config.compose import compose_config
from config.errors import UsageError
from dataset.instruct import Source
from dataset.text import row_encoder
from dataset.text.conversation import Template
from dataset.text.data_card import data_card
from dataset.text.tokenizer import Tokenizer
from scripts import prepare_data

MODEL = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
TOKENIZER = Tokenizer(MODEL)


def overrides(folder: Path, *more: str) -> list[str]:
    given = ["dataset=jsonl", f"dataset.data_dir={folder}", f"dataset.tokenizer_path={MODEL}", "dataset.test_ratio=0.3"]
    return [*given, "dataset.seq_len=64", "dataset.default_system_prompt=null", *more]


def write(folder: Path, rows: list[Any]) -> None:
    (folder / "a.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def card_of(folder: Path, *more: str, near_rows: int = 100) -> str:
    source = Source(compose_config("cfg_pretrain_instruct", overrides(folder, *more)).dataset)
    splits = source.open_splits(TOKENIZER, Template())
    return data_card(*splits, TOKENIZER, Template(), near_rows=near_rows, title="t", picture="p.png")


def figures(page: str) -> dict[str, int]:
    """The whole number in the second column of each row of the tables."""
    return {
        row[1]: int(row[2].replace(",", "")) for row in re.finditer(r"^\| ([^|]+) \| ([\d,]+)(?: \(.*\))? \|", page, re.MULTILINE)
    }


def test_the_command_builds_the_cache_and_writes_page_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [{"prompt": f"What is {n} | {n}?", "answer": "x"} for n in range(40)])
    prepare_data.main([*overrides(tmp_path), "--output", str(tmp_path / "card"), "--near-rows", "9"])
    page = tmp_path / "card/data_card.md"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert "![Tokens a row](data_card.png)" in page.read_text() and "| read | 40 |" in page.read_text()
    assert (tmp_path / "card/data_card.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(row_encoder, "encode_conversation", None)  # what training then opens is there
    Source(compose_config("cfg_pretrain_instruct", overrides(tmp_path)).dataset).open_splits(TOKENIZER, Template())


def test_a_run_with_stages_has_a_card_for_each_source(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        write(folder, [{"prompt": f"What is {folder.name} {n}?", "answer": "x"} for n in range(20)])
        (folder / "test.jsonl").write_text('{"prompt": "Why?", "answer": "So."}\n')  # no stage trains or measures on it
    sources = [f"+dataset@sources.{folder.name}=jsonl" for folder in folders]
    sources += [f"sources.{folder.name}.data_dir={folder}" for folder in folders]
    stages = "stages=[{mix: {a: null, b: null}, epochs: 1}]"
    cards = prepare_data.prepare([*overrides(tmp_path), *sources, stages], None, 0)
    assert cards == [folder / "data_card.md" for folder in folders]
    cards = prepare_data.prepare([*overrides(tmp_path), *sources, stages], tmp_path / "cards", 0)
    assert cards == [tmp_path / "cards" / folder.name / "data_card.md" for folder in folders]
    assert all("| read | 20 |" in card.read_text() and "test.jsonl" not in card.read_text() for card in cards)


def test_every_row_read_is_on_the_card(tmp_path: Path) -> None:
    long_prompt, long_answer = {"prompt": "word " * 99, "answer": "x"}, {"prompt": "Go on?", "answer": "word " * 99}
    rows = [*({"prompt": f"Q{n}", "answer": f"A{n}"} for n in range(50)), "", "{broken", {"prompt": "Q"}, long_prompt, long_answer]
    write(tmp_path, rows)
    page = card_of(tmp_path, "dataset.on_bad_row=skip")
    card = figures(page)
    test_rows = card["kept for testing"]
    assert card["read"] == 55 and card["kept for training"] + test_rows == 52 and test_rows > 5
    assert [card[name] for name in ("rows cut", "of these, in the prompt", "of these, at the end")] == [2, 1, 1]
    bins = re.findall(r"^\| \d+ to \d+ \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    assert [sum(map(int, column)) for column in zip(*bins, strict=True)] == [50, 2]
    opening = [TOKENIZER.bos_id, *TOKENIZER.encode("[USER]\n"), TOKENIZER.bos_id, *TOKENIZER.encode("[ASSISTANT]\n")]
    encoded = [len(TOKENIZER.encode(f"A{n}")) + 1 for n in range(50)]
    assert card["supervised tokens"] > sum(encoded) and card["tokens a row, percentile 99"] == 65
    uncut = sum(len(TOKENIZER.encode("word " * 99)) + len(TOKENIZER.encode(short)) for short in ("x", "Go on?"))
    assert 2 * 65 + card["tokens cut off (share of all)"] == uncut + 2 * (len(opening) + 1)
    for reason in ("dropped: blank_line", "dropped: no_answer", "malformed: bad_json"):
        assert f"| {reason} | 1 (1.82%) |" in page
    assert "| rows cut | 2 (3.85%) |" in page


SEEN_CONVERSATION = "same conversation in training"
SEEN_QUESTIONS = "same questions in training, in all turns"
NEAR = "near questions in training"
TEST_ROWS = "kept for testing"


def test_repeats_are_counted_by_conversation_prompt_and_question(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            {"prompt": "A", "answer": "x"},
            {"prompt": "A", "answer": "x"},
            {"prompt": "A", "answer": "y"},
            {"system": "S", "prompt": "A", "answer": "x"},
            {"prompt": "B", "answer": "x"},
        ],
    )
    page = card_of(tmp_path, "dataset.test_ratio=0")
    card = figures(page)
    same_prompt = "same system text and first question, which are held out together"
    assert [card[name] for name in ("same conversation", same_prompt, "same questions, in all turns")] == [1, 2, 3]
    assert card[TEST_ROWS] == 0 and "Near questions were not looked for." in page


def test_a_question_under_two_system_prompts_is_seen_on_both_sides(tmp_path: Path) -> None:
    write(tmp_path, [{"system": f"S{n}", "prompt": "The very same question?", "answer": "x"} for n in range(40)])
    card = figures(card_of(tmp_path))
    assert card[SEEN_CONVERSATION] == 0 and card[SEEN_QUESTIONS] == card[NEAR] == card[TEST_ROWS] > 0


def test_forms_ignored_keys_and_raw_text_are_on_the_card(tmp_path: Path) -> None:
    stories = [{"text": f"{n} times {n + 1} dogs met {n + 2} cats", "id": f"{n}"} for n in range(30)]
    write(tmp_path, [*stories, *({"prompt": f"What is {n}?", "answer": "x", "notes": "y"} for n in range(30))])
    page = card_of(tmp_path, "dataset.ignore=[notes]")
    card = figures(page)
    assert card[NEAR] < card[TEST_ROWS], "texts are compared by what they say"
    for name in ("of the form text", "of the form pair", "with the ignored key `id`", "with the ignored key `notes`"):
        assert f"| {name} | 30 (50.00%) |" in page


def test_conversations_that_only_begin_alike_are_not_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["apple", "river", "seven", "window", "slow", "under", "music", "paper", "green", "north"]
    stories = [" ".join(rng.choice(words, 20)) for _ in range(40)]

    # The system text decides which rows are held out, so the greeting is on both sides.
    def greeted(system: str, story: str) -> dict[str, Any]:
        texts = {"system": system, "human": "Hello", "gpt": "Hello!"}
        turns = [*texts.items(), ("human", story), ("gpt", "No.")]
        return {"conversations": [{"from": role, "value": text} for role, text in turns]}

    write(tmp_path, [greeted(f"S{n}", story) for n, story in enumerate(stories)])
    card = figures(card_of(tmp_path, "dataset.seq_len=256"))
    assert card[TEST_ROWS] > 5 and card[SEEN_QUESTIONS] == card["same questions, in all turns"] == card[NEAR] == 0
    # The same two questions under another system text.
    write(tmp_path, [greeted(f"{name}{n}", story) for name in "ST" for n, story in enumerate(stories)])
    page = card_of(tmp_path, "dataset.seq_len=256")
    card = figures(page)
    assert card["same questions, in all turns"] == 40 and card[SEEN_QUESTIONS] > 5 and card[SEEN_CONVERSATION] == 0
    assert card[NEAR] == card[SEEN_QUESTIONS] and "Hello / " in page


def test_near_questions_are_found_and_far_ones_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["apple", "river", "seven", "window", "slow", "under", "music", "paper", "green", "north"]
    stories = [" ".join(rng.choice(words, 40)) for _ in range(30)]
    write(tmp_path, [{"prompt": f"{story} {end}", "answer": "x"} for story in stories for end in ("one", "two", "three")])
    card = figures(card_of(tmp_path, "dataset.seq_len=256"))
    assert card[NEAR] >= 0.8 * card[TEST_ROWS]
    write(tmp_path, [{"prompt": " ".join(rng.choice(words, 40)), "answer": "x"} for _ in range(90)])
    page = card_of(tmp_path, "dataset.seq_len=256")
    rows = figures(page)[TEST_ROWS]
    assert figures(page)[NEAR] == 0 and f"Looked at: {rows} of {rows} test rows" in page and "sample" not in page
    sampled = card_of(tmp_path, "dataset.seq_len=256", near_rows=3)
    assert re.search(r"Looked at: 3 of \d+ test rows, 15 of \d+ training rows\. That is a sample", sampled)


def test_tags_in_texts_are_on_the_card(tmp_path: Path) -> None:
    write(tmp_path, [{"prompt": f"Q{n} [USER]", "answer": "[SYSTEM]" if n else "x"} for n in range(20)])
    card = figures(card_of(tmp_path))
    assert [card[f"`[{tag}]`"] for tag in ("SYSTEM", "USER", "ASSISTANT")] == [19, 20, 0]


def test_the_bundled_data_brings_both_its_files(tmp_path: Path) -> None:
    for name, rows in (("train", 6), ("test", 3)):
        lines = [json.dumps({"prompt": f"{name} {n}", "answer": "x"}) for n in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def card_of_sample() -> str:
        config = compose_config("cfg_pretrain_instruct", ["dataset=sample", f"dataset.data_dir={tmp_path}"]).dataset
        splits = Source(config).open_splits(TOKENIZER, Template())
        return data_card(*splits, TOKENIZER, Template(), near_rows=0, title="t", picture="p.png")

    page = card_of_sample()
    card = figures(page)
    assert re.findall(r"^\| (\w+\.jsonl) \|", page, re.MULTILINE) == ["train.jsonl", "test.jsonl"]
    assert (card["read"], card["kept for training"], card[TEST_ROWS], card[SEEN_CONVERSATION]) == (9, 6, 3, 0)
    (tmp_path / "test.jsonl").write_text(f"{lines[0]}\n{(tmp_path / 'train.jsonl').read_text()}")
    assert f"| {SEEN_CONVERSATION} | 6 (85.71%) |" in card_of_sample()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--near-rows", "-1"], "--near-rows"), (["dataset.nonsense=1"], "no such key"), ([], "found none")],
)
def test_wrong_use_is_one_message(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare_data.main([*overrides(tmp_path), *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_package_names_the_file_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    for module in ("dataset.text.data_card", "scripts.prepare_data"):
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit, match=r"datasketch is not installed: .*requirements-data\.txt"):
        importlib.import_module("scripts.prepare_data")


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    write(tmp_path, [{"prompt": f"Q{n}", "answer": "x"} for n in range(40)])
    with pytest.raises(UsageError, match="--output"):
        prepare_data.prepare(overrides(tmp_path), tmp_path / "a.jsonl" / "card", 0)
