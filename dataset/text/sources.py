"""The conversations in rows of either form; also which of them are test rows.

Malformed rows and rows with nothing to learn are told apart here, and counted by whoever reads.
This file must not know files, tokens or caches.
"""

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset.text.conversation import Conversation, Role, Turn
from dataset.text.files import BadRow

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


class NothingToLearn(Exception):
    """A well-formed row without anything to train on; `reason` is a short name to count by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_row(data: bytes) -> dict[str, Any]:
    """The JSON object on one line. Raises `BadRow`, or `NothingToLearn` for a blank line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow("bad_utf8", f"expected UTF-8, found byte 0x{data[error.start]:02x}") from error
    if not text.strip():
        raise NothingToLearn("blank_line")
    try:
        row = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", f"expected a JSON object, found {_shown(text)} ({error})") from error
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"expected a JSON object, found {_shown(text)}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):  # Python would keep the last value and lose the others without a sign
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow("duplicate_key", f"expected each key of an object once, found {_shown(twice)} twice")
    return members


def to_conversation(row: dict[str, Any]) -> Conversation:
    """The conversation in a row of either form; empty system turns and a tail without an answer are left out.

    Raises `BadRow` (neither form, wrong types, unknown role), `NothingToLearn` (no user turn, empty
    prompt, no answer, empty answer, no supervised answer). An empty answer is context, never a target.
    """
    turns = to_turns(row)
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


def to_turns(row: dict[str, Any]) -> list[Turn]:
    """All turns in a row of either form, whether there is something to learn or not. Raises `BadRow`."""
    return _turns_of_messages(row["conversations"]) if "conversations" in row else _turns_of_pair(row)


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
                raise BadRow("missing_key", f'{where}: expected the key "{key}", found {_shown(sorted(message))}')
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
        raise BadRow("unknown_form", f"expected {_FORMS}, found the keys {_shown(sorted(row))}")
    answers = [key for key in _ANSWER_KEYS if key in row]
    systems = [key for key in _SYSTEM_KEYS if row.get(key) is not None]
    for keys, found in ((_ANSWER_KEYS, answers), (_SYSTEM_KEYS, systems)):
        if len(found) > 1:
            raise BadRow("unknown_form", f"expected one of {keys}, found {found}")
    keys_of: tuple[tuple[Role, list[str]], ...] = (("system", systems), ("user", prompts), ("assistant", answers))
    return [Turn(role, _text(row[key], key)) for role, found in keys_of for key in found]


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
    system, question = (next((turn.text for turn in conversation if turn.role == role), "") for role in ("system", "user"))
    return _hash(system, question)


def question_hash(conversation: Conversation) -> int:
    """64 bits over all user turns and nothing else: equal where the same is asked, whatever the system prompt and the answers."""
    return _hash(*(turn.text for turn in conversation if turn.role == "user"))


def conversation_hash(conversation: Conversation) -> int:
    """64 bits over all turns, for finding rows that are there more than once."""
    return _hash(*(part for turn in conversation for part in (turn.role, turn.text)))


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        field = text.strip().encode("utf-8")
        digest.update(len(field).to_bytes(8, "little") + field)
    return int.from_bytes(digest.digest(), "little")


def are_test_hashes(hashes: npt.NDArray[np.uint64], seed: int, test_ratio: float) -> npt.NDArray[np.bool_]:
    """For each `prompt_hash`: whether it stands in the test split of (seed, test_ratio).

    Equal prompts always stand on the same side; a larger `test_ratio`, from 0 to below 1, only adds test rows.
    """
    salt = np.frombuffer(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "<u8")
    # Finaliser of SplitMix64 (Steele et al. 2014): a cached hash can be split anew in one pass, for any seed.
    mixed = hashes ^ salt
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    in_test: npt.NDArray[np.bool_] = mixed < np.uint64(int(test_ratio * 2**64))
    return in_test
