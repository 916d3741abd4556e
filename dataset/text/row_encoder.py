"""Encodes raw rows to ids: the function that `datasets`' map runs in each process.

Knows no files of rows, no caches, and no number of processes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa

from config.schema import DatasetConfig
from dataset.text.conversation import Conversation, Encoded, TaggedRole, Template, encode_conversation, with_default_system
from dataset.text.forms import form_options, to_conversation
from dataset.text.rows import MAX_ROW_BYTES, BadRow, NothingToLearn, parse_row, too_large
from dataset.text.splits import conversation_hash, prompt_hash, question_hash
from dataset.text.tokenizer import Tokenizer

ROLES: tuple[TaggedRole, ...] = get_args(TaggedRole)
"""In the order of the bits in the column "tags"."""
PROMPT_CUT, ANSWER_CUT = 1, 2
PER_ID = ("ids", "supervised", "segment")
RAW_SCHEMA = pa.schema({"file": pa.int32(), "number": pa.int64(), "row": pa.large_binary(), "bad": pa.string()})
"""Raw rows: file number, number in the file (`rows.RowFile`), and the row as JSON or its error."""


def recipe(config: DatasetConfig, tokenizer: Tokenizer, template: Template) -> dict[str, Any]:
    """Everything that encoded rows depend on besides the rows, as JSON values."""
    forms = {"fields": config.fields, "roles": config.roles, "tool_turns": config.tool_turns, "ignore": sorted(config.ignore)}
    return {
        "template": template.to_dict(),
        "default_system_prompt": config.default_system_prompt or None,
        "seq_len": config.seq_len,
        "long_rows": config.long_rows,
        "forms": forms,
        "on_bad_row": config.on_bad_row,
        "tokenizer_sha256": tokenizer.sha256,
    }


def token_schema(vocab_size: int, seq_len: int) -> pa.Schema:
    """Columns of encoded rows; a row that has no ids has 0 or nothing in their place.

    dropped, bad: why the row has no ids, a short name, "unread" after a bad row; message: the error
    of a bad row; form: the form of a parsed row; ignored: its keys whose text was left out. For
    encoded rows: PER_ID, a list each; length: number of ids; targets: number of supervised ids;
    full_length: number of ids before truncation; cut: PROMPT_CUT | ANSWER_CUT; tags: a bit for each
    of ROLES whose tag occurs in a text; turn_bytes; content_hash: 64 bits over the trained content;
    the other hashes are those of `splits`.
    """
    # A prompt segment and its answer take at least three ids, so this is enough.
    segment = pa.uint8() if seq_len // 2 < 1 << 8 else pa.uint16()
    return pa.schema(
        {
            **dict.fromkeys(("dropped", "bad", "message", "form"), pa.string()),
            "ignored": pa.list_(pa.string()),
            "ids": pa.list_(pa.int32() if vocab_size > 1 << 16 else pa.uint16()),
            "supervised": pa.list_(pa.uint8()),
            "segment": pa.list_(segment),
            **dict.fromkeys(("length", "targets", "full_length"), pa.int32()),
            **dict.fromkeys(("cut", "tags"), pa.uint8()),
            "turn_bytes": pa.int64(),
            **dict.fromkeys(("content_hash", "prompt_hash", "question_hash", "conversation_hash"), pa.uint64()),
        }
    )


class RowEncoder:
    """Encodes tables of RAW_SCHEMA to tables of `token_schema`. It can be pickled.

    stop_at: a file in which the processes share the first bad row, so that none encodes rows after
    it; None: a bad row is a result like others.
    """

    def __init__(self, config: DatasetConfig, tokenizer: Tokenizer, template: Template, stop_at: Path | None = None) -> None:
        self.schema = token_schema(tokenizer.vocab_size, config.seq_len)
        self._config, self._tokenizer, self._template, self._stop_at = config, tokenizer, template, stop_at
        self._forms = form_options(config)
        self._tags = [template.tag(role).strip() for role in ROLES]
        self._dtypes = {name: self.schema.field(name).type.value_type.to_pandas_dtype() for name in PER_ID}
        self._empty: dict[str, Any] = {
            field.name: "" if field.type == pa.string() else [] if pa.types.is_list(field.type) else 0 for field in self.schema
        }

    def __call__(self, table: pa.Table, indices: Sequence[int]) -> pa.Table:
        """Encode the rows with these numbers."""
        if self._stop_at is not None and self._stop_at.is_file():
            stops = map(int, self._stop_at.read_text("ascii").split())
            if min(stops) < indices[0]:
                return pa.Table.from_pylist([{**self._empty, "bad": "unread"}] * len(indices), self.schema)
        # One after the other, each in all rows: the tokenizer then stays in the processor's cache.
        parsed = [self._parsed(row.as_py(), bad.as_py()) for row, bad in zip(table["row"], table["bad"], strict=True)]
        rows = [self._encoded(row, conversation) if conversation else row for row, conversation in parsed]
        bad_rows = [index for index, row in zip(indices, rows, strict=True) if row["bad"]]
        if bad_rows and self._stop_at is not None:
            with self._stop_at.open("a", encoding="ascii") as handle:
                handle.write(f"{bad_rows[0]}\n")
        return pa.Table.from_pylist(rows, self.schema)

    def _parsed(self, data: bytes | None, bad: str) -> tuple[dict[str, Any], Conversation]:
        """A row's columns as far as they are known without ids, and its conversation, if any."""
        row = dict(self._empty)
        try:
            if data is None:
                raise BadRow(*json.loads(bad))
            conversation, parsed = to_conversation(parse_row(data), self._forms)
            if sum(len(turn.text) for turn in conversation) > MAX_ROW_BYTES:
                raise too_large()
        except BadRow as error:
            return {**row, "bad": error.reason, "message": _printable(str(error))}, ()
        except NothingToLearn as nothing:
            return {**row, "dropped": nothing.reason}, ()
        conversation = with_default_system(conversation, self._config.default_system_prompt)
        return {**row, "form": parsed.form, "ignored": list(map(_printable, parsed.ignored))}, conversation

    def _encoded(self, row: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
        long_rows, max_ids = self._config.long_rows, self._config.seq_len + 1
        keep_prompt_end = long_rows == "keep_prompt_end"
        encoded = encode_conversation(conversation, self._tokenizer, self._template, max_ids, keep_prompt_end=keep_prompt_end)
        if long_rows == "drop" and encoded.end_cut:
            return {**row, "dropped": "too_long"}
        if not encoded.supervised.any():
            return {**row, "dropped": "answer_beyond_seq_len"}
        text = "\n".join(turn.text for turn in conversation)
        return {
            **row,
            **{name: getattr(encoded, name).astype(dtype) for name, dtype in self._dtypes.items()},
            "length": len(encoded.ids),
            "targets": int(encoded.supervised.sum()),
            "full_length": encoded.full_length,
            "cut": PROMPT_CUT * encoded.prompt_cut | ANSWER_CUT * encoded.end_cut,
            "tags": sum(1 << bit for bit, tag in enumerate(self._tags) if tag in text),
            "turn_bytes": encoded.turn_bytes,
            "content_hash": _content_hash(encoded),
            "prompt_hash": prompt_hash(conversation),
            "question_hash": question_hash(conversation),
            "conversation_hash": conversation_hash(conversation),
        }


def _printable(text: str) -> str:
    """A key may hold half of a surrogate pair, which Arrow's strings can't."""
    return text.encode("utf-8", "backslashreplace").decode()


def _content_hash(encoded: Encoded) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for values in (encoded.ids, encoded.supervised, encoded.segment):
        digest.update(values.astype("<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")
