"""From raw rows to ids: what one process does with a part of a file, here or in a worker process.

This file must not know files, caches, or how many processes there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dataset.text.conversation import Conversation, Encoded, TaggedRole, Template, encode_batch, with_default_system
from dataset.text.files import MAX_ROW_BYTES, BadRow, RawRow, too_large
from dataset.text.forms import FormOptions, ParsedRow, to_conversation
from dataset.text.sources import NothingToLearn, conversation_hash, parse_row, prompt_hash, question_hash
from dataset.text.tokenizer import Tokenizer

LongRows = Literal["keep_prompt_end", "truncate", "drop"]
ROLES: tuple[TaggedRole, ...] = get_args(TaggedRole)
"""In the order of the bits of `EncodedRows.columns["tags"]`."""
PROMPT_CUT, ANSWER_CUT = 1, 2
PER_ID = ("ids", "supervised", "segment")


@dataclass(frozen=True)
class Recipe:
    """All that ids depend on besides the rows; see `config.schema.DatasetConfig`. It travels to worker processes."""

    tokenizer_model: bytes
    template: Template
    default_system_prompt: str | None
    seq_len: int
    long_rows: LongRows
    forms: FormOptions


@dataclass(frozen=True)
class EncodedRows:
    """What became of some rows.

    outcomes: for each row, in order, None when it was encoded, else why not. parsed: of each row that has a conversation, its form
    and its ignored keys.
    columns: of the n encoded rows, T ids in all: those of PER_ID [T], all others [n]; see `column_types`.
    """

    outcomes: list[BadRow | NothingToLearn | None]
    parsed: list[tuple[str, tuple[str, ...]] | None]
    columns: dict[str, npt.NDArray[Any]]


def column_types(vocab_size: int, seq_len: int) -> dict[str, npt.DTypeLike]:
    """Types of the columns.

    length: ids kept; full_length: before anything was cut; cut: PROMPT_CUT | ANSWER_CUT; tags: a bit for each of ROLES whose tag
    stands in a text; number, position: of the raw row; the hashes are those of `sources`.
    """
    # A prompt segment and its answer take three ids or more, so there are fewer segments than this.
    segments_fit_a_byte = seq_len // 2 < 1 << 8
    return {
        "ids": np.int32 if vocab_size > 1 << 16 else np.uint16,
        "supervised": np.bool_,
        "segment": np.uint8 if segments_fit_a_byte else np.uint16,
        "length": np.int32,
        "full_length": np.int32,
        "cut": np.uint8,
        "tags": np.uint8,
        "turn_bytes": np.int64,
        "prompt_hash": np.uint64,
        "question_hash": np.uint64,
        "conversation_hash": np.uint64,
        "number": np.int64,
        "position": np.int64,
    }


class RowEncoder:
    """Encodes rows by one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tokenizer = Tokenizer.from_bytes(recipe.tokenizer_model)
        self._tags = [recipe.template.tag(role).strip() for role in ROLES]
        self._types = column_types(self._tokenizer.vocab_size, recipe.seq_len)

    def encode(self, rows: Sequence[RawRow]) -> EncodedRows:
        """Encode rows; a row that can't be, or has nothing to learn in it, has that as its outcome."""
        parsed: list[tuple[str, tuple[str, ...]] | None] = [None] * len(rows)
        converted: list[Conversation | BadRow | NothingToLearn] = []
        for number, row in enumerate(rows):
            try:
                conversation, of_row = self._convert(row)
                parsed[number] = of_row.form, of_row.ignored
                converted.append(conversation)
            except (BadRow, NothingToLearn) as outcome:
                converted.append(outcome.with_traceback(None))
        conversations = [conversation for conversation in converted if isinstance(conversation, tuple)]
        encoded = iter(
            encode_batch(
                conversations,
                self._tokenizer,
                self._recipe.template,
                self._recipe.seq_len + 1,
                keep_prompt_end=self._recipe.long_rows == "keep_prompt_end",
            )
        )
        outcomes: list[BadRow | NothingToLearn | None] = []
        kept: list[tuple[RawRow, Conversation, Encoded]] = []
        for row, outcome_or_turns in zip(rows, converted, strict=True):
            if isinstance(outcome_or_turns, tuple):
                result = next(encoded)
                outcomes.append(self._refusal(result))
                if outcomes[-1] is None:
                    kept.append((row, outcome_or_turns, result))
            else:
                outcomes.append(outcome_or_turns)
        return EncodedRows(outcomes, parsed, self._columns(kept))

    def _convert(self, row: RawRow) -> tuple[Conversation, ParsedRow]:
        """Raises `BadRow` or `NothingToLearn`."""
        if isinstance(row.data, BadRow):
            raise row.data
        data = row.data if isinstance(row.data, dict) else parse_row(row.data)
        conversation, parsed = to_conversation(data, self._recipe.forms)
        if sum(len(turn.text) for turn in conversation) > MAX_ROW_BYTES:
            raise too_large()
        return with_default_system(conversation, self._recipe.default_system_prompt), parsed

    def _refusal(self, encoded: Encoded) -> NothingToLearn | None:
        if self._recipe.long_rows == "drop" and encoded.end_cut:
            return NothingToLearn("too_long")
        return None if encoded.supervised.any() else NothingToLearn("answer_beyond_seq_len")

    def _columns(self, kept: list[tuple[RawRow, Conversation, Encoded]]) -> dict[str, npt.NDArray[Any]]:
        rows, conversations, results = zip(*kept, strict=True) if kept else ((), (), ())
        values: dict[str, Any] = {
            "length": [len(result.ids) for result in results],
            "full_length": [result.full_length for result in results],
            "cut": [PROMPT_CUT * result.prompt_cut | ANSWER_CUT * result.end_cut for result in results],
            "tags": [self._tags_in(conversation) for conversation in conversations],
            "turn_bytes": [result.turn_bytes for result in results],
            "prompt_hash": np.array([prompt_hash(conversation) for conversation in conversations], np.uint64),
            "question_hash": np.array([question_hash(conversation) for conversation in conversations], np.uint64),
            "conversation_hash": np.array([conversation_hash(conversation) for conversation in conversations], np.uint64),
            "number": [row.number for row in rows],
            "position": [row.position for row in rows],
        }
        for name in PER_ID:
            values[name] = np.concatenate([getattr(result, name) for result in results]) if results else []
        return {name: np.asarray(values[name]).astype(dtype) for name, dtype in self._types.items()}

    def _tags_in(self, conversation: Conversation) -> int:
        text = "\n".join(turn.text for turn in conversation)
        return sum(1 << bit for bit, tag in enumerate(self._tags) if tag in text)
