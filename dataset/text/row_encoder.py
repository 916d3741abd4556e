"""Encodes raw rows to ids: the function that `datasets`' map runs in each process.

Knows no files, caches, or number of processes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dataset.text.conversation import Conversation, Encoded, TaggedRole, Template, encode_batch, with_default_system
from dataset.text.forms import FormOptions, to_conversation
from dataset.text.rows import MAX_ROW_BYTES, BadRow, NothingToLearn, parse_row, too_large
from dataset.text.splits import conversation_hash, prompt_hash, question_hash
from dataset.text.tokenizer import Tokenizer

LongRows = Literal["keep_prompt_end", "truncate", "drop"]
ROLES: tuple[TaggedRole, ...] = get_args(TaggedRole)
"""In the order of the bits in the column "tags"."""
PROMPT_CUT, ANSWER_CUT = 1, 2
PER_ID = ("ids", "supervised", "segment")
# Characters of text to encode at once.
_TEXT_AT_ONCE = 1 << 20
_TEXTS = ("outcome", "reason", "message", "form", "ignored")


@dataclass(frozen=True)
class Recipe:
    """Everything that ids depend on besides the rows; see `config.schema.DatasetConfig`."""

    tokenizer_model: bytes
    template: Template
    default_system_prompt: str | None
    seq_len: int
    long_rows: LongRows
    forms: FormOptions

    def key(self) -> dict[str, Any]:
        """Everything but the tokenizer, as JSON values."""
        return {
            "template": self.template.to_dict(),
            "default_system_prompt": self.default_system_prompt,
            "seq_len": self.seq_len,
            "long_rows": self.long_rows,
            "forms": self.forms.to_dict(),
        }


RAW_SCHEMA = pa.schema({"file": pa.int32(), "number": pa.int64(), "row": pa.large_binary(), "bad": pa.string()})
"""Raw rows: file number, number in the file (`rows.RowFile`), and the row as JSON or its error."""


def token_schema(vocab_size: int, seq_len: int) -> pa.Schema:
    """Columns of encoded rows.

    outcome: "" for an encoded row, "dropped", "bad", or "unread" after a bad row; reason: a short
    name; message: the error; form: the form of a parsed row; ignored: its keys whose text was left
    out, as JSON. For encoded rows: PER_ID, a list each; length: number of ids; targets: number of
    supervised ids; full_length: number of ids before truncation; cut: PROMPT_CUT | ANSWER_CUT;
    tags: a bit for each of ROLES whose tag occurs in a text; turn_bytes; content_hash: 64 bits over
    the trained content; the other hashes are those of `splits`.
    """
    # A prompt segment and its answer take at least three ids, so this is enough.
    segment = pa.uint8() if seq_len // 2 < 1 << 8 else pa.uint16()
    return pa.schema(
        {
            "outcome": pa.string(),
            "reason": pa.string(),
            "message": pa.string(),
            "form": pa.string(),
            "ignored": pa.string(),
            "ids": pa.list_(pa.int32() if vocab_size > 1 << 16 else pa.uint16()),
            "supervised": pa.list_(pa.uint8()),
            "segment": pa.list_(segment),
            "length": pa.int32(),
            "targets": pa.int32(),
            "full_length": pa.int32(),
            "cut": pa.uint8(),
            "tags": pa.uint8(),
            "turn_bytes": pa.int64(),
            "content_hash": pa.uint64(),
            "prompt_hash": pa.uint64(),
            "question_hash": pa.uint64(),
            "conversation_hash": pa.uint64(),
        }
    )


class RowEncoder:
    """Encodes tables of RAW_SCHEMA to tables of `token_schema` by a recipe. It can be pickled.

    stop_at: a file in which the processes share the first bad row, so that none encodes rows after
    it; None: a bad row is a result like others.
    """

    def __init__(self, recipe: Recipe, vocab_size: int, stop_at: Path | None = None) -> None:
        self.schema = token_schema(vocab_size, recipe.seq_len)
        self.stop_at = stop_at
        self._recipe = recipe
        self._tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, table: pa.Table, indices: Sequence[int]) -> pa.Table:
        """Encode the rows with these numbers."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_bytes(self._recipe.tokenizer_model)
            self._tags = [self._recipe.template.tag(role).strip() for role in ROLES]
        results: list[_Result] = []
        if self._has_stopped_before(indices[0]):
            results = [_Result("unread") for _ in indices]
        else:
            for part in self._parts(table):
                results += self._encode(part)
            bad = [index for index, result in zip(indices, results, strict=True) if result.outcome == "bad"]
            if bad and self.stop_at is not None:
                with self.stop_at.open("a", encoding="ascii") as handle:
                    handle.write(f"{bad[0]}\n")
        return self._table(results)

    def _has_stopped_before(self, index: int) -> bool:
        if self.stop_at is None or not self.stop_at.is_file():
            return False
        return any(int(line) < index for line in self.stop_at.read_text("ascii").splitlines())

    def _parts(self, table: pa.Table) -> "Iterator[list[_Result]]":
        part: list[_Result] = []
        size = 0
        for row, bad in zip(table["row"], table["bad"], strict=True):
            data = row.as_py()
            part.append(_Result("bad", *json.loads(bad.as_py())) if data is None else self._convert(data))
            size += len(data or b"")
            if size > _TEXT_AT_ONCE:
                yield part
                part, size = [], 0
        yield part

    def _convert(self, data: bytes) -> "_Result":
        """Parse the conversation of a row, or the reason why there is none."""
        try:
            conversation, parsed = to_conversation(parse_row(data), self._recipe.forms)
            if sum(len(turn.text) for turn in conversation) > MAX_ROW_BYTES:
                raise too_large()
        except BadRow as bad:
            return _Result("bad", bad.reason, str(bad))
        except NothingToLearn as nothing:
            return _Result("dropped", nothing.reason)
        conversation = with_default_system(conversation, self._recipe.default_system_prompt)
        return _Result("", form=parsed.form, ignored=json.dumps(parsed.ignored), conversation=conversation)

    def _encode(self, results: "list[_Result]") -> "list[_Result]":
        assert self._tokenizer is not None
        recipe = self._recipe
        conversations = [result.conversation for result in results if not result.outcome]
        keep_prompt_end = recipe.long_rows == "keep_prompt_end"
        encoded = iter(
            encode_batch(conversations, self._tokenizer, recipe.template, recipe.seq_len + 1, keep_prompt_end=keep_prompt_end)
        )
        for number, result in enumerate(results):
            if result.outcome:
                continue
            ids = next(encoded)
            if recipe.long_rows == "drop" and ids.end_cut:
                results[number] = replace(result, outcome="dropped", reason="too_long")
            elif not ids.supervised.any():
                results[number] = replace(result, outcome="dropped", reason="answer_beyond_seq_len")
            else:
                results[number] = replace(result, encoded=ids)
        return results

    def _table(self, results: "list[_Result]") -> pa.Table:
        def lists(name: str) -> list[npt.NDArray[Any]]:
            return [getattr(result.encoded, name) if result.encoded else np.zeros(0) for result in results]

        columns: dict[str, Any] = {name: [getattr(result, name) for result in results] for name in _TEXTS}
        for name in PER_ID:
            parts, item = lists(name), self.schema.field(name).type.value_type
            offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
            values = np.concatenate(parts).astype(item.to_pandas_dtype())
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, item))
        pairs = [(result.encoded, result.conversation) for result in results]
        columns["length"] = [len(encoded.ids) if encoded else 0 for encoded, _ in pairs]
        columns["targets"] = [int(encoded.supervised.sum()) if encoded else 0 for encoded, _ in pairs]
        columns["full_length"] = [encoded.full_length if encoded else 0 for encoded, _ in pairs]
        columns["cut"] = [PROMPT_CUT * encoded.prompt_cut | ANSWER_CUT * encoded.end_cut if encoded else 0 for encoded, _ in pairs]
        columns["tags"] = [self._tags_in(conversation) for _, conversation in pairs]
        columns["turn_bytes"] = [encoded.turn_bytes if encoded else 0 for encoded, _ in pairs]
        columns["content_hash"] = [_content_hash(encoded) if encoded else 0 for encoded, _ in pairs]
        for function in (prompt_hash, question_hash, conversation_hash):
            columns[function.__name__] = [function(conversation) if encoded else 0 for encoded, conversation in pairs]
        return pa.table(columns, schema=self.schema)

    def _tags_in(self, conversation: Conversation) -> int:
        text = "\n".join(turn.text for turn in conversation)
        return sum(1 << bit for bit, tag in enumerate(self._tags) if tag in text)


@dataclass(frozen=True)
class _Result:
    """The result for a row."""

    outcome: str
    reason: str = ""
    message: str = ""
    form: str = ""
    ignored: str = "[]"
    conversation: Conversation = ()
    encoded: Encoded | None = None


def _content_hash(encoded: Encoded) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for values in (encoded.ids, encoded.supervised, encoded.segment):
        digest.update(values.astype("<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")
