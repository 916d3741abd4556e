"""The command that builds a cache ahead and writes the data card, and the figures on the card."""

import importlib
import json
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
from dataset.text.data_card import DataCard, markdown, measure
from dataset.text.tokenizer import Tokenizer
from scripts import prepare_data

MODEL = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
TOKENIZER = Tokenizer(MODEL)


def overrides(folder: Path, *more: str) -> list[str]:
    given = ["dataset=jsonl", f"dataset.data_dir={folder}", f"dataset.tokenizer_path={MODEL}", "dataset.test_ratio=0.3"]
    return [*given, "dataset.seq_len=64", "dataset.default_system_prompt=null", *more]


def write(folder: Path, rows: list[Any]) -> None:
    (folder / "a.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def card_of(folder: Path, *more: str, near_rows: int = 100) -> DataCard:
    config = compose_config("cfg_pretrain_instruct", overrides(folder, *more)).dataset
    train, test = Source(config).open_splits(TOKENIZER, Template())
    return measure(train, test, TOKENIZER, Template(), near_rows)


def test_the_command_builds_the_cache_and_writes_page_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [{"prompt": f"What is {n} | {n}?", "answer": "x"} for n in range(40)])
    prepare_data.main([*overrides(tmp_path), "--output", str(tmp_path / "card"), "--near-rows", "9"])
    page = tmp_path / "card/data_card.md"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert "![Tokens a row](data_card.png)" in page.read_text() and "| read | 40 |" in page.read_text()
    assert (tmp_path / "card/data_card.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(row_encoder, "encode_batch", None)  # what training then opens is there
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
    card = card_of(tmp_path, "dataset.on_bad_row=skip")
    assert card.counts["dropped"] == {"blank_line": 1, "no_answer": 1} and card.counts["bad"] == {"bad_json": 1}
    assert card.counts["read"] == 55 and card.train_rows + card.test_rows == 52 and card.test_rows > 5
    assert [card.counts[name] for name in ("truncated", "prompt_cut", "answer_cut")] == [2, 1, 1]
    assert sum(card.lengths.whole) == 50 and sum(card.lengths.cut) == 2
    opening = [TOKENIZER.bos_id, *TOKENIZER.encode("[USER]\n"), TOKENIZER.bos_id, *TOKENIZER.encode("[ASSISTANT]\n")]
    encoded = [len(TOKENIZER.encode(f"A{n}")) + 1 for n in range(50)]
    assert card.supervised_tokens > sum(encoded) and 65 in card.lengths.percentiles.values()
    uncut = sum(len(TOKENIZER.encode("word " * 99)) + len(TOKENIZER.encode(short)) for short in ("x", "Go on?"))
    assert 2 * 65 + card.tokens_cut == uncut + 2 * (len(opening) + 1)
    page = markdown(card, "title", None)
    for expected in ("| dropped: no_answer | 1 (1.82%) |", "| malformed: bad_json | 1 (1.82%) |", "| rows cut | 2 (3.85%) |"):
        assert expected in page


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
    card = card_of(tmp_path, "dataset.test_ratio=0")
    assert (card.repeated_conversations, card.repeated_prompts, card.repeated_questions) == (1, 2, 3)
    assert card.test_rows == 0 and card.near is None


def test_a_question_under_two_system_prompts_is_seen_on_both_sides(tmp_path: Path) -> None:
    write(tmp_path, [{"system": f"S{n}", "prompt": "The very same question?", "answer": "x"} for n in range(40)])
    card = card_of(tmp_path)
    assert card.test_conversations_in_train == 0 and card.test_questions_in_train == card.test_rows > 0
    assert card.near is not None and card.near.near == card.test_rows


def test_forms_ignored_keys_and_raw_text_are_on_the_card(tmp_path: Path) -> None:
    stories = [{"text": f"{n} times {n + 1} dogs met {n + 2} cats", "id": f"{n}"} for n in range(30)]
    write(tmp_path, [*stories, *({"prompt": f"What is {n}?", "answer": "x", "notes": "y"} for n in range(30))])
    card = card_of(tmp_path, "dataset.ignore=[notes]")
    assert card.counts["forms"] == {"text": 30, "pair": 30} and card.counts["ignored"] == {"id": 30, "notes": 30}
    assert card.near is not None and card.near.near < card.test_rows, "texts are compared by what they say"
    page = markdown(card, "t", None)
    assert "| of the form pair | 30 (50.00%) |" in page and "| with text ignored under `notes` | 30 (50.00%) |" in page


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
    card = card_of(tmp_path, "dataset.seq_len=256")
    assert card.test_rows > 5 and card.test_questions_in_train == card.repeated_questions == 0
    assert card.near is not None and card.near.near == 0
    # The same two questions under another system text.
    write(tmp_path, [greeted(f"{name}{n}", story) for name in "ST" for n, story in enumerate(stories)])
    card = card_of(tmp_path, "dataset.seq_len=256")
    assert card.repeated_questions == 40 and card.test_questions_in_train > 5 and card.test_conversations_in_train == 0
    assert card.near is not None and card.near.near == card.test_questions_in_train
    assert any("Hello / " in text for _, text, *_ in card.near_texts)


def test_near_questions_are_found_and_far_ones_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["apple", "river", "seven", "window", "slow", "under", "music", "paper", "green", "north"]
    stories = [" ".join(rng.choice(words, 40)) for _ in range(30)]
    write(tmp_path, [{"prompt": f"{story} {end}", "answer": "x"} for story in stories for end in ("one", "two", "three")])
    near = card_of(tmp_path, "dataset.seq_len=256").near
    assert near is not None and near.near >= 0.8 * near.test_rows
    write(tmp_path, [{"prompt": " ".join(rng.choice(words, 40)), "answer": "x"} for _ in range(90)])
    near = card_of(tmp_path, "dataset.seq_len=256").near
    assert near is not None and near.near == 0 and near.test_rows == near.test_total
    sampled = card_of(tmp_path, "dataset.seq_len=256", near_rows=3).near
    assert sampled is not None and (sampled.test_rows, sampled.train_rows) == (3, 15)
    assert "That is a sample" in markdown(card_of(tmp_path, near_rows=3), "t", None)


def test_tags_in_texts_are_on_the_card(tmp_path: Path) -> None:
    write(tmp_path, [{"prompt": f"Q{n} [USER]", "answer": "[SYSTEM]" if n else "x"} for n in range(20)])
    assert card_of(tmp_path).tags == {"[SYSTEM]": 19, "[USER]": 20, "[ASSISTANT]": 0}


def test_the_bundled_data_brings_both_its_files(tmp_path: Path) -> None:
    for name, rows in (("train", 6), ("test", 3)):
        lines = [json.dumps({"prompt": f"{name} {n}", "answer": "x"}) for n in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    config = compose_config("cfg_pretrain_instruct", ["dataset=sample", f"dataset.data_dir={tmp_path}"]).dataset
    train, test = Source(config).open_splits(TOKENIZER, Template())
    card = measure(train, test, TOKENIZER, Template(), 0)
    assert [name for name, _, _ in card.files] == ["train.jsonl", "test.jsonl"]
    assert (card.counts["read"], card.train_rows, card.test_rows) == (9, 6, 3)
    assert card.test_conversations_in_train == 0
    (tmp_path / "test.jsonl").write_text(f"{lines[0]}\n{(tmp_path / 'train.jsonl').read_text()}")
    card = measure(*Source(config).open_splits(TOKENIZER, Template()), TOKENIZER, Template(), 0)
    assert card.test_conversations_in_train == 6 and "| same conversation in training | 6 (85.71%) |" in markdown(card, "t", None)


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
