"""Generated answers are scored by family at every depth, or written down; rows that don't fit are counted."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from config.compose import compose_config
from config.errors import UsageError
from dataset.build_sample_dataset import build
from dataset.instruct import Source
from dataset.text.conversation import Conversation, Template, encode_prompt
from dataset.text.tokenizer import Tokenizer
from evaluators.generated import evaluate_generated, write_generated
from generation.answers import Options, Responder
from generation.batch import InputRow

ROWS = 30


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> dict[Conversation, str]:
    """Answers are taken from this table of references; at depth 1 only every other one is known."""
    references: dict[Conversation, str] = {}

    def answers(responder: Responder, inputs: Iterable[InputRow], **_: int) -> Iterator[dict[str, Any]]:
        depth = responder.options.act_steps
        for index, one in enumerate(inputs):
            yield {"answer": references[one.history] if depth == 2 or index % 2 else "?", "act_steps": [depth] * 3}

    monkeypatch.setattr("evaluators.generated.answers_in_order", answers)
    return references


@pytest.fixture
def tokenizer() -> Tokenizer:
    import mistral_common

    return Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")


def _split(folder: Path, tokenizer: Tokenizer, **built: Any) -> Any:
    build(folder, 60, 2, 0, **built)
    config = compose_config("cfg_pretrain_instruct", ["dataset=sample", f"dataset.data_dir={folder}"]).dataset
    return Source(config).open_split("test_deeper" if built else "test", tokenizer, Template())


def _responder(split: Any, tokenizer: Tokenizer, context: int, oracle: dict[Conversation, str]) -> Responder:
    conversations = [split.conversation(i) for i in range(len(split))]
    oracle.update({c[:-1]: c[-1].text for c in conversations})
    return Responder(None, tokenizer, Template(), context, Options(8, act_steps=2), rows=4, kv_budget_gb=1.0)  # type: ignore[arg-type]


def test_right_answers_score_at_their_depth(tmp_path: Path, tokenizer: Tokenizer, oracle: dict[Conversation, str]) -> None:
    split = _split(tmp_path, tokenizer)
    result = evaluate_generated(_responder(split, tokenizer, 128, oracle), split, rows=range(ROWS))
    assert result["by_act_step"] == [0.5, 1.0] and result["overall"]["accuracy"] == 1.0
    assert result["overall"]["count"] == ROWS and len(result["families"]) == 15
    assert result["mean_act_steps"] == 2.0 and result["longer_than_context"] == 0
    assert result["by_hops"] == {}


def test_each_row_has_draws_of_its_own(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as when they are written, and the same ones."""
    split = _split(tmp_path, tokenizer)
    samples: list[list[int]] = []

    def answers(_: Responder, inputs: Iterable[InputRow], **__: int) -> Iterator[dict[str, Any]]:
        asked = list(inputs)
        samples.append([one.sample for one in asked])
        record = {"answer": "?", "reference": "!", "act_steps": [1], "answer_tokens": 1, "log_probability": -1.0}
        yield from [record] * len(asked)

    monkeypatch.setattr("evaluators.generated.answers_in_order", answers)
    responder = _responder(split, tokenizer, 128, {})
    evaluate_generated(responder, split, rows=range(3, 9))
    write_generated(responder, split, tmp_path / "a.jsonl", rows=range(3, 9))
    assert samples == [list(range(3, 9))] * 3


def test_deep_families_are_scored_by_hops_at_each_depth(
    tmp_path: Path, tokenizer: Tokenizer, oracle: dict[Conversation, str]
) -> None:
    split = _split(tmp_path, tokenizer, families="deep", max_hops=1)
    # The rows of a split take turns: six families with 2 hops, then six with 3; at depth 1 every other answer is right.
    result = evaluate_generated(_responder(split, tokenizer, 128, oracle), split, rows=range(11))
    by_hops = result["by_hops"]
    assert {number: [scores["overall"]["accuracy"] for scores in of["by_act_step"]] for number, of in by_hops.items()} == {
        "2": [3 / 6, 1.0], "3": [2 / 5, 1.0],
    }  # fmt: skip
    assert [scores["overall"]["count"] for scores in by_hops["3"]["by_act_step"]] == [5, 5]
    assert by_hops["2"]["by_act_step"][0]["families"]["deep_permutations"]["accuracy"] == 1.0
    assert "deep_order" in by_hops["2"]["by_act_step"][-1]["families"]
    assert "deep_order" not in by_hops["3"]["by_act_step"][-1]["families"]
    assert {of["mean_act_steps"] for of in by_hops.values()} == {2.0}


def test_histories_longer_than_the_context_are_counted_not_scored(
    tmp_path: Path, tokenizer: Tokenizer, oracle: dict[Conversation, str]
) -> None:
    split = _split(tmp_path, tokenizer)
    lengths = sorted(
        len(_responder(split, tokenizer, 10**6, oracle).prompt(split.conversation(i)[:-1]).ids) for i in range(len(split))
    )
    context = lengths[len(lengths) // 2]
    result = evaluate_generated(_responder(split, tokenizer, context, oracle), split, rows=range(ROWS))
    assert result["longer_than_context"] == sum(length > context for length in lengths) > 0
    assert result["overall"]["count"] == ROWS - result["longer_than_context"]
    with pytest.raises(UsageError, match="at least one answer"):
        evaluate_generated(_responder(split, tokenizer, 1, oracle), split, rows=range(ROWS))


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_written_answers_are_those_of_the_model_and_the_measures_are_theirs(
    text_dataset: Callable[..., Any],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    threshold: float | None,
) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size, halt_scale=2.0)
    responder = Responder(model, tiny_tokenizer, Template(), 64, Options(4, 3, threshold), rows=2, kv_budget_gb=1.0)
    questions = [f"blue {number}" for number in range(5)]
    split = text_dataset([{"prompt": text, "response": "gives"} for text in [*questions, "Red " * 60, "not asked"]])
    answers = responder.answers([split.conversation(i)[:-1] for i in range(5)])
    # Two of the references are what the model says.
    rows = [
        {"prompt": text, "response": answer.text if i < 2 else "gives"}
        for i, (text, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    split = text_dataset([*rows, {"prompt": "Red " * 60, "response": "gives"}, {"prompt": "not asked", "response": "gives"}])
    path = tmp_path / "answers.jsonl"
    path.write_text("of another run")
    measured = write_generated(responder, split, path, rows=range(6))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert [line["answer"] for line in lines[:5]] == [answer.text for answer in answers]
    assert [line["reference"] for line in lines[:5]] == [row["response"] for row in rows]
    assert [line["act_steps"] for line in lines[:5]] == [answer.act_steps for answer in answers]
    assert "error" in lines[5] and not list(tmp_path.glob("*.partial"))
    tokens = sum(len(answer.act_steps) for answer in answers)
    assert measured["count"] == 5 and measured["longer_than_context"] == 1 and measured["exact_accuracy"] == 2 / 5
    assert measured["mean_act_steps"] == pytest.approx(sum(sum(answer.act_steps) for answer in answers) / tokens)
    assert measured["log_probability_per_token"] == pytest.approx(sum(answer.log_probability for answer in answers) / tokens)


def test_two_measurements_may_write_the_same_answers(
    text_dataset: Callable[..., Any], tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = text_dataset([{"prompt": "blue", "response": "gives"}])
    responder = Responder(None, tiny_tokenizer, Template(), 64, Options(4, 3), rows=2, kv_budget_gb=1.0)  # type: ignore[arg-type]
    path = tmp_path / "answers.jsonl"
    inner = iter([True])

    def answered(*_: Any) -> Iterator[dict[str, Any]]:
        if next(inner, False):
            write_generated(responder, split, path, rows=[0])
        yield {"error": "none"}

    monkeypatch.setattr("evaluators.generated._answered", answered)
    write_generated(responder, split, path, rows=[0])
    assert path.read_text() == '{"error": "none"}\n' and not list(tmp_path.glob("*.partial"))


def test_without_a_row_that_fits_there_is_nothing_to_measure(
    text_dataset: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    responder = Responder(model, tiny_tokenizer, Template(), 8, Options(4, 3), rows=2, kv_budget_gb=1.0)
    split = text_dataset([{"prompt": "Red " * 20, "response": "gives"}])
    measured = write_generated(responder, split, tmp_path / "answers.jsonl", rows=[0])
    assert measured == {
        "count": 0, "exact_accuracy": None, "mean_act_steps": None, "log_probability_per_token": None, "longer_than_context": 1,
    }  # fmt: skip


def test_raw_text_among_the_rows_is_left_out(
    text_dataset: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    responder = Responder(model, tiny_tokenizer, Template(), 64, Options(4, 3), rows=2, kv_budget_gb=1.0)
    split = text_dataset(
        [{"text": "Red"}, {"prompt": "blue 1", "response": "gives"}, {"text": "Red"}, {"prompt": "2", "answer": "3"}]
    )
    measured = write_generated(responder, split, tmp_path / "answers.jsonl", rows=range(4))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(line["index"], line["reference"]) for line in lines] == [(1, "gives"), (3, "3")]
    assert measured["count"] == 2 and measured["longer_than_context"] == 0
    scored = evaluate_generated(responder, split, rows=range(4))
    assert scored["overall"]["count"] == 2 and scored["longer_than_context"] == 0


def test_a_question_is_encoded_once_for_all_depths(
    text_dataset: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    responder = Responder(model, tiny_tokenizer, Template(), 64, Options(4, 3), rows=2, kv_budget_gb=1.0)
    split = text_dataset([{"prompt": f"blue {number}", "response": "gives"} for number in range(5)])
    encoded = 0

    def counted(*given: Any) -> Any:
        nonlocal encoded
        encoded += 1
        return encode_prompt(*given)

    monkeypatch.setattr("generation.answers.encode_prompt", counted)
    assert len(evaluate_generated(responder, split, rows=range(5))["by_act_step"]) == 3
    assert encoded == 5
