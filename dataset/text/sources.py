"""Rows of local JSONL files (plain or zstd) and the conversations in them; also which rows are test rows.

Malformed rows and rows with nothing to learn are told apart here, and counted by whoever reads.
This file must not know tokens, caches or where a file was downloaded from.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from config.errors import UsageError
from dataset.text.conversation import Conversation, Role, Turn

_READ_BYTES = 1 << 20
_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_PROMPT_KEYS = ("prompt", "question", "input")
_ANSWER_KEYS = ("response", "output", "answer")
_SYSTEM_KEYS = ("system", "system_prompt")
_FORMS = (
    '{"conversations": [{"from": "system|human|gpt", "value": "...", "weight": null|0|1}]} or '
    '{"prompt|question|input": "...", "response|output|answer": "...", "system|system_prompt": "..."}'
)


class BadRow(Exception):
    """A malformed row. `reason` is a short name to count by, the message says what was found."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NothingToLearn(Exception):
    """A well-formed row without anything to train on; `reason` is a short name to count by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Line:
    """One line of a source. `number` counts from 1; `offset` is its first byte in the uncompressed text."""

    number: int
    offset: int
    data: bytes


class SourceFile:
    """A .jsonl or .jsonl.zst file, read as a stream. Raises `UsageError` when missing or damaged."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"expected a data file at {str(self.path)!r}, found none; check dataset.data_dir")
        self.compressed = self.path.name.endswith(".zst")
        self.size = self.path.stat().st_size

    def lines(self) -> Iterator[tuple[Line, int]]:
        """Yield each line (without its newline) and how many bytes of the file have been read so far.

        Lines end at \\n only: JSON strings may hold U+2028 and other separators unescaped.
        """
        number, offset = 1, 0
        parts: list[bytes] = []  # a line may span many blocks; joining once keeps that linear
        with self.path.open("rb") as handle:
            for block in self._blocks(handle):
                *complete, rest = block.split(b"\n")
                for piece in complete:
                    data = b"".join([*parts, piece])
                    parts = []
                    yield Line(number, offset, data), handle.tell()
                    number, offset = number + 1, offset + len(data) + 1
                if rest:
                    parts.append(rest)
            if parts:
                yield Line(number, offset, b"".join(parts)), handle.tell()

    def line_at(self, offset: int) -> bytes:
        """The line that starts at `offset` of the uncompressed text; a compressed file is scanned up to it."""
        with self.path.open("rb") as handle:
            if not self.compressed:
                handle.seek(offset)
                return handle.readline().removesuffix(b"\n")
            position, found = 0, bytearray()
            for block in self._blocks(handle):
                piece = block[max(0, offset - position) :] if position + len(block) > offset else b""
                position += len(block)
                head, newline, _ = piece.partition(b"\n")
                found += head
                if newline:
                    break
            return bytes(found)

    def _blocks(self, handle: BinaryIO) -> Iterator[bytes]:
        if not self.compressed:
            while block := handle.read(_READ_BYTES):
                yield block
            return
        try:
            import zstandard
        except ImportError as error:
            raise UsageError(
                f"{self.path} is compressed and the package zstandard is missing: "
                "`pip install zstandard`, or decompress the file to .jsonl"
            ) from error
        damaged = f"{self.path}: expected a complete zstd file, found a damaged or cut-off one; fetch it again"
        # The frame-wise object, because the stream reader takes a cut-off file for a complete one.
        frame = None
        try:
            while block := handle.read(_READ_BYTES):
                while block:
                    if frame is None:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    if text := frame.decompress(block):
                        yield text
                    block = b""
                    if frame.eof:
                        block, frame = frame.unused_data, None
        except zstandard.ZstdError as error:
            raise UsageError(damaged) from error
        if frame is not None:
            raise UsageError(damaged)


def parse_row(data: bytes) -> dict[str, Any]:
    """The JSON object on one line. Raises `BadRow`, or `NothingToLearn` for a blank line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow("bad_utf8", f"expected UTF-8, found byte 0x{data[error.start]:02x}") from error
    if not text.strip():
        raise NothingToLearn("blank_line")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", f"expected a JSON object, found {_shown(text)} ({error})") from error
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"expected a JSON object, found {_shown(text)}")
    return row


def to_conversation(row: dict[str, Any]) -> Conversation:
    """The conversation in a row of either form; empty system turns and a tail without an answer are left out.

    Raises `BadRow` (neither form, wrong types, unknown role), `NothingToLearn` (no user turn, empty
    prompt, no answer, empty answer, no supervised answer). An empty answer is context, never a target.
    """
    turns = _turns_of_messages(row["conversations"]) if "conversations" in row else _turns_of_pair(row)
    prompts = [turn.text for turn in turns if turn.role == "user"]
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if not prompts:
        raise NothingToLearn("no_user_turn")
    if not any(text.strip() for text in prompts):
        raise NothingToLearn("empty_prompt")
    if not answers:
        raise NothingToLearn("no_answer")
    if not any(text.strip() for text in answers):
        raise NothingToLearn("empty_answer")
    while turns[-1].role != "assistant":
        turns.pop()
    if not any(turn.role == "user" for turn in turns):
        raise NothingToLearn("no_answer")
    kept = tuple(
        Turn(turn.role, turn.text, turn.supervised and bool(turn.text.strip()))
        for turn in turns
        if turn.role != "system" or turn.text.strip()
    )
    if not any(turn.role == "assistant" and turn.supervised for turn in kept):
        raise NothingToLearn("no_supervised_answer")
    return kept


def _turns_of_messages(messages: Any) -> list[Turn]:
    if not isinstance(messages, list):
        raise BadRow("wrong_type", f'"conversations": expected a list, found {_shown(messages)}')
    turns = []
    for index, message in enumerate(messages):
        where = f"conversations[{index}]"
        if not isinstance(message, dict):
            raise BadRow("wrong_type", f"{where}: expected an object, found {_shown(message)}")
        for key in ("from", "value"):
            if key not in message:
                raise BadRow("missing_key", f'{where}: expected the key "{key}", found {sorted(message)}')
        role = message["from"]
        if not isinstance(role, str) or role not in _ROLES:
            expected = ", ".join(_ROLES)
            raise BadRow("unknown_role", f'{where}: expected "from" to be one of {expected}, found {_shown(role)}')
        weight = message.get("weight")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise BadRow("wrong_type", f'{where}: expected "weight" to be null, 0 or 1, found {_shown(weight)}')
        turns.append(Turn(_ROLES[role], _text(message["value"], f"{where}.value"), weight != 0))
    return turns


def _turns_of_pair(row: dict[str, Any]) -> list[Turn]:
    prompts = [key for key in _PROMPT_KEYS if key in row]
    # An instruction beside its input would be lost without a sign, so such a row is told, not guessed.
    if len(prompts) != 1 or "instruction" in row:
        raise BadRow("unknown_form", f"expected {_FORMS}, found the keys {sorted(row)}")
    answers = [key for key in _ANSWER_KEYS if key in row]
    if len(answers) > 1:
        raise BadRow("unknown_form", f"expected one of {_ANSWER_KEYS}, found {answers}")
    turns = []
    for key in _SYSTEM_KEYS:
        if row.get(key) is not None:
            turns.append(Turn("system", _text(row[key], key)))
            break
    turns.append(Turn("user", _text(row[prompts[0]], prompts[0])))
    if answers:
        turns.append(Turn("assistant", _text(row[answers[0]], answers[0])))
    return turns


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{where}: expected a string, found {_shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no text encoding can
        raise BadRow("bad_unicode", f"{where}: expected Unicode text, found half of a surrogate pair") from error
    return value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def prompt_hash(conversation: Conversation) -> int:
    """64 bits over system text and first user turn, surrounding blanks ignored: what the split goes by."""
    system = next((turn.text for turn in conversation if turn.role == "system"), "")
    user = next((turn.text for turn in conversation if turn.role == "user"), "")
    fields = [field.strip().encode("utf-8") for field in (system, user)]
    digest = hashlib.blake2b(digest_size=8)
    for field in fields:
        digest.update(len(field).to_bytes(8, "little") + field)
    return int.from_bytes(digest.digest(), "little")


def check_test_ratio(test_ratio: float) -> None:
    """Raises `UsageError` unless 0 <= test_ratio < 1."""
    if not 0.0 <= test_ratio < 1.0:
        raise UsageError(f"dataset.test_ratio: expected a share from 0 to below 1, found {test_ratio}")


def are_test_hashes(hashes: npt.NDArray[np.uint64], seed: int, test_ratio: float) -> npt.NDArray[np.bool_]:
    """For each `prompt_hash`: whether it stands in the test split of (seed, test_ratio)."""
    salt = np.frombuffer(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "<u8")
    # Finaliser of SplitMix64 (Steele et al. 2014): a cached hash can be split anew in one pass, for any seed.
    mixed = hashes ^ salt
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    in_test: npt.NDArray[np.bool_] = mixed < np.uint64(int(test_ratio * 2**64))
    return in_test


def is_test(conversation: Conversation, seed: int, test_ratio: float) -> bool:
    """Whether a conversation is a test row: by a hash of seed, system text and first user turn.

    Equal conversations always stand on the same side; a larger `test_ratio` only adds test rows.
    """
    return bool(are_test_hashes(np.array([prompt_hash(conversation)], np.uint64), seed, test_ratio)[0])
