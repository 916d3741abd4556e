"""Documents for lm-evaluation-harness from a file of conversations (docs/export.md).

The harness imports this file by its path, so it must not import the project. A row has `messages`
(role, content), or messages in `prompt` and a `reference`, as inference_instruct.py --generate
writes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

Doc = dict[str, Any]


def every_answer(rows: str, pretrained: str, **_: Any) -> dict[str, Dataset]:
    """A document for each assistant message, after its history in `pretrained`'s chat template."""
    docs = [doc for messages in _conversations(rows) for doc in _documents(messages, pretrained)]
    return {"test": Dataset.from_list(docs)}


def last_answer(rows: str, pretrained: str, **_: Any) -> dict[str, Dataset]:
    """A document for only the last message of each row."""
    return {"test": Dataset.from_list([_documents(messages, pretrained)[-1] for messages in _conversations(rows)])}


def bits_per_byte(doc: Doc, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Log-likelihood in nats, and UTF-8 bytes; the harness divides their sums."""
    [(log_likelihood, _)] = results
    return {"bits_per_byte": (log_likelihood, len(doc["answer"].encode()))}


def exact(doc: Doc, results: list[str]) -> dict[str, bool]:
    """Whether the answer equals the reference, after stripping both."""
    return {"exact": results[0].strip() == doc["answer"].strip()}


def _conversations(path: str) -> Iterator[list[dict[str, str]]]:
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if "reference" in row:
                yield [*row["prompt"], {"role": "assistant", "content": row["reference"]}]
            elif "messages" in row and row["messages"][-1]["role"] == "assistant":
                yield row["messages"]
            else:
                raise ValueError(f"{path} line {number}: expected messages that end with an answer, or a prompt and its reference")


def _documents(messages: list[dict[str, str]], pretrained: str) -> list[Doc]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained)
    return [
        {
            "prompt": tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, tokenize=False),
            "answer": message["content"],
        }
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
