"""Conversations, their template, and their ids and masks (contract 1).

Training and generation both build their sequences here, so a prompt is always an exact prefix of a
training sequence. This file doesn't know where conversations come from, or what a model does with
the ids.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from config.errors import UsageError
from dataset.text.tokenizer import Tokenizer

TaggedRole = Literal["system", "user", "assistant"]
Role = TaggedRole | Literal["text"]
# The roles whose text is a target and ends with EOS. Their attention is always causal.
_LEARNED: tuple[Role, ...] = ("assistant", "text")

TEMPLATE_VERSION = 1


@dataclass(frozen=True)
class Turn:
    """One message, or (role `text`) a row of raw text, which is alone and has no tag line.

    `supervised` matters only for the assistant's turns and raw text: False makes the turn context.
    """

    role: Role
    text: str
    supervised: bool = True


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class Template:
    """The tag line that begins a turn of each role. It is saved in the checkpoint."""

    system: str = "[SYSTEM]\n"
    user: str = "[USER]\n"
    assistant: str = "[ASSISTANT]\n"
    version: int = TEMPLATE_VERSION

    def __post_init__(self) -> None:
        tags = (self.system, self.user, self.assistant)
        if self.version != TEMPLATE_VERSION:
            raise UsageError(
                f"template version {self.version} is not known: this program writes and reads version "
                f"{TEMPLATE_VERSION}; use the program that wrote the checkpoint"
            )
        if not all(isinstance(tag, str) and tag for tag in tags) or len(set(tags)) != len(tags):
            raise UsageError(f"template tags must be three different, non-empty strings, found {tags}")

    def tag(self, role: TaggedRole) -> str:
        """The tag line of `role`, including the newline."""
        return str(getattr(self, role))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Template":
        """Raises `UsageError` if a field is missing or unknown, or the version differs."""
        expected = {"system", "user", "assistant", "version"}
        if set(values) != expected:
            raise UsageError(f"a template has the fields {sorted(expected)}, found {sorted(values)}")
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A conversation as ids; all arrays have the same length L.

    ids: int32 [L]. supervised: bool [L], whether the id is a target when it is the label. segment:
    int32 [L], 0 for an assistant's text and EOS, k = 1, 2, ... for the k-th prompt segment. Raw
    text counts as an assistant's text with only the BOS as prompt segment.
    turn_bytes: UTF-8 bytes of the decoded supervised ids (without EOS) of each turn, summed.
    full_length: number of ids before truncation.
    prompt_cut, end_cut: whether text before the first answer, or the end of the row, was cut.
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    segment: npt.NDArray[np.int32]
    turn_bytes: int
    full_length: int
    prompt_cut: bool = False
    end_cut: bool = False


def with_default_system(turns: Sequence[Turn], default_system_prompt: str | None) -> Conversation:
    """Drop empty system turns. If none is left, begin with the default one, except for raw text."""
    kept = tuple(turn for turn in turns if turn.role != "system" or turn.text.strip())
    if default_system_prompt and not any(turn.role in ("system", "text") for turn in kept):
        return (Turn("system", default_system_prompt), *kept)
    return kept


def question(turns: Sequence[Turn], default_system_prompt: str | None) -> Conversation:
    """Turns to answer, after the default system turn if they have none. An empty system turn means
    none.

    Raises `UsageError` unless the last turn is the user's and has text.
    """
    if not turns or turns[-1].role != "user" or not turns[-1].text.strip():
        raise UsageError("the last message must be the user's, with text to answer")
    has_system = any(turn.role == "system" for turn in turns)
    return with_default_system(turns, None if has_system else default_system_prompt)


def encode_conversation(
    turns: Sequence[Turn], tokenizer: Tokenizer, template: Template, max_ids: int | None = None, *, keep_prompt_end: bool = False
) -> Encoded:
    """Ids of a whole conversation: every assistant turn, and raw text, ends with EOS.

    max_ids: a longer sequence is cut to it, at its end; `turn_bytes` counts the rest.
    keep_prompt_end: before that, cut the oldest part of its prompt (`_shorten_prompt`).
    """
    pieces = _pieces(turns, tokenizer, template)
    shorter = _shorten_prompt(pieces, max_ids) if keep_prompt_end and max_ids is not None else pieces
    whole = _size(pieces)
    return replace(_join(shorter, tokenizer, max_ids), full_length=whole, prompt_cut=_size(shorter) < whole)


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer, template: Template) -> Encoded:
    """Ids of the history and the beginning of the next assistant turn (BOS and tag)."""
    answer = _Piece("assistant", _openings(tokenizer, template)["assistant"], [], supervised=False)
    return _join([*_pieces(turns, tokenizer, template), answer], tokenizer)


@dataclass(frozen=True)
class _Piece:
    """A turn as ids: BOS and tag, then text (and the EOS of an answer)."""

    role: Role
    opening: list[int]
    text: list[int]
    supervised: bool

    def __len__(self) -> int:
        return len(self.opening) + len(self.text)

    def last(self, count: int) -> "_Piece":
        """The turn with only the last `count` ids of its text."""
        return replace(self, text=self.text[len(self.text) - count :])


@functools.lru_cache(maxsize=8)
def _openings(tokenizer: Tokenizer, template: Template) -> dict[Role, list[int]]:
    """BOS and the tag line of each role, encoded apart from the text, whose ids then don't matter."""
    tags = {role: tokenizer.encode(template.tag(role)) for role in get_args(TaggedRole)}
    return {role: [tokenizer.bos_id, *ids] for role, ids in {**tags, "text": []}.items()}


def _pieces(turns: Sequence[Turn], tokenizer: Tokenizer, template: Template) -> list[_Piece]:
    openings = _openings(tokenizer, template)
    pieces = []
    for turn in with_default_system(turns, None):
        is_learned = turn.role in _LEARNED
        text = tokenizer.encode(turn.text) + [tokenizer.eos_id] * is_learned
        pieces.append(_Piece(turn.role, openings[turn.role], text, is_learned and turn.supervised))
    return pieces


def _size(pieces: Sequence[_Piece]) -> int:
    return sum(map(len, pieces))


def _shorten_prompt(pieces: list[_Piece], max_ids: int) -> list[_Piece]:
    """Shorten the part before the first supervised answer until the sequence fits, but not below
    half of `max_ids`.

    First removes the oldest turns except the system turn. Then cuts the beginnings of what is left,
    the longest first: the system turn, the last user turn, and the turns between that one and the
    answer. If there is no room for all of these, only the user turn stays.
    """
    answer = next((index for index, piece in enumerate(pieces) if piece.supervised), 0)
    if not answer or _size(pieces) <= max_ids:
        return pieces
    opening = len(pieces[answer].opening)
    rest = _size(pieces[answer:]) - opening
    budget = max(max_ids - rest, max_ids // 2) - opening
    prompt = pieces[:answer]
    last = max((index for index, piece in enumerate(prompt) if piece.role == "user"), default=answer - 1)
    system = next((piece for piece in prompt[:last] if piece.role == "system"), None)
    is_gone = False
    for oldest in pieces[:last]:
        if oldest is not system:
            # Remove an answer together with its question.
            is_gone = _size(prompt) > budget or (is_gone and oldest.role == "assistant")
            if is_gone:
                prompt = [piece for piece in prompt if piece is not oldest]
    if _size(prompt) > budget:
        room = budget - sum(len(piece.opening) for piece in prompt)
        if room < len(prompt):
            prompt, room = [pieces[last]], max(1, budget - len(pieces[last].opening))
        kept = dict[int, int]()
        for index in sorted(range(len(prompt)), key=lambda index: len(prompt[index].text)):
            parts = len(prompt) - len(kept)
            # An even part of the room that is left; what rounding leaves isn't the system turn's.
            kept[index] = min(len(prompt[index].text), room // parts if prompt[index] is system else -(-room // parts))
            room -= kept[index]
        prompt = [piece.last(kept[index]) for index, piece in enumerate(prompt)]
    return [*prompt, *pieces[answer:]]


def _join(pieces: Sequence[_Piece], tokenizer: Tokenizer, max_ids: int | None = None) -> Encoded:
    ids: list[int] = []
    supervised: list[bool] = []
    segment: list[int] = []
    prompt_segment, turn_bytes = 1, 0
    for piece in pieces:
        is_learned = piece.role in _LEARNED
        supervised += [False] * len(piece.opening) + [piece.supervised] * len(piece.text)
        segment += [prompt_segment] * len(piece.opening) + [0 if is_learned else prompt_segment] * len(piece.text)
        prompt_segment += is_learned
        ids += piece.opening
        if piece.supervised:
            kept = piece.text if max_ids is None else piece.text[: max(0, max_ids - len(ids))]
            turn_bytes += len(tokenizer.decode([token for token in kept if token != tokenizer.eos_id]).encode())
        ids += piece.text
    return Encoded(
        np.array(ids[:max_ids], np.int32),
        np.array(supervised[:max_ids], np.bool_),
        np.array(segment[:max_ids], np.int32),
        turn_bytes,
        len(ids),
        end_cut=max_ids is not None and len(ids) > max_ids,
    )
