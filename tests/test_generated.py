"""Generated answers are scored by family at every depth, and rows that don't fit are counted (evaluators/generated.py)."""

from pathlib import Path
from typing import Any

import pytest

from config.errors import UsageError
from dataset.build_sample_dataset import build
from dataset.slimorca import open_text_split
from dataset.text.conversation import Template
from dataset.text.tokenizer import Tokenizer
from evaluators.generated import evaluate_generated
from generation.answers import Answer, Responder

ROWS = 30


class _Oracle(Responder):
    """Answers from a table of references; at depth 1 it knows only half of them."""

    references: dict[str, str]

    def answers(self, conversations: Any, **_: Any) -> list[Answer]:  # type: ignore[override]
        found = [self.references[repr(conversation)] for conversation in conversations]
        texts = [text if self.act_steps == 2 or i % 2 else "?" for i, text in enumerate(found)]
        return [Answer(text=text, act_steps=[self.act_steps] * 3) for text in texts]


@pytest.fixture
def tokenizer() -> Tokenizer:
    import mistral_common

    return Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")


def _split(folder: Path, tokenizer: Tokenizer) -> Any:
    build(folder, 60, 2, 0)
    return open_text_split(
        "test", source="sample", data_dir=folder, tokenizer=tokenizer, template=Template(), seq_len=128, subset_size=None,
        test_ratio=0.5, seed=0, default_system_prompt=None, long_rows="truncate", on_bad_row="error",
    )  # fmt: skip


def _responder(split: Any, tokenizer: Tokenizer, context: int) -> _Oracle:
    conversations = [split.conversation(i) for i in range(len(split))]
    _Oracle.references = {repr(c[:-1]): c[-1].text for c in conversations}
    return _Oracle(model=None, tokenizer=tokenizer, template=Template(), context=context, act_steps=2)  # type: ignore[arg-type]


def test_right_answers_score_at_their_depth(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = _split(tmp_path, tokenizer)
    result = evaluate_generated(_responder(split, tokenizer, 128), split, rows=ROWS, max_output_tokens=8, batch_size=4)
    assert result["by_act_step"] == [0.5, 1.0] and result["overall"]["accuracy"] == 1.0
    assert result["overall"]["count"] == ROWS and len(result["families"]) == 15
    assert result["mean_act_steps"] == 2.0 and result["longer_than_context"] == 0


def test_histories_longer_than_the_context_are_counted_not_scored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = _split(tmp_path, tokenizer)
    lengths = sorted(len(_responder(split, tokenizer, 10**6).prompt(split.conversation(i)[:-1]).ids) for i in range(len(split)))
    context = lengths[len(lengths) // 2]
    result = evaluate_generated(_responder(split, tokenizer, context), split, rows=ROWS, max_output_tokens=8, batch_size=4)
    assert result["longer_than_context"] == sum(length > context for length in lengths) > 0
    assert result["overall"]["count"] == ROWS - result["longer_than_context"]
    with pytest.raises(UsageError, match="at least one answer"):
        evaluate_generated(_responder(split, tokenizer, 1), split, rows=ROWS, max_output_tokens=8, batch_size=4)
