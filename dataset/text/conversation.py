"""Conversations, their template, and the ids and masks they become (contract 1).

Training and generation both build their sequences here, so a prompt is always an exact prefix of what was
trained on. This file must not know where conversations come from, nor what a model does with the ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from config.errors import UsageError
from dataset.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]

TEMPLATE_VERSION = 1


@dataclass(frozen=True)
class Turn:
    """One message. `supervised` matters for assistant turns only: False makes the turn context."""

    role: Role
    text: str
    supervised: bool = True


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class Template:
    """The tag line that opens a turn of each role. It travels with the checkpoint."""

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

    def tag(self, role: Role) -> str:
        """The tag line of `role`, newline included."""
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Template":
        """Raises `UsageError` when a field is missing or unknown, or the version is another one."""
        expected = {"system", "user", "assistant", "version"}
        if set(values) != expected:
            raise UsageError(f"a template has the fields {sorted(expected)}, found {sorted(values)}")
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A conversation as ids; all arrays have the same length L.

    ids: int32 [L]. supervised: bool [L], True where the id is a target when it is the label.
    segment: int32 [L], 0 for an assistant's text and EOS, k = 1, 2, ... for the k-th prompt segment.
    turn_bytes: UTF-8 bytes of the decoded supervised ids (EOS left out) of each turn, summed.
    full_length: ids before truncation; L where nothing was cut.
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    segment: npt.NDArray[np.int32]
    turn_bytes: int
    full_length: int


def with_default_system(turns: Sequence[Turn], default_system_prompt: str | None) -> Conversation:
    """Drop empty system turns; if no system turn is left, open with the default one (if there is one)."""
    kept = tuple(turn for turn in turns if turn.role != "system" or turn.text.strip())
    if default_system_prompt and not any(turn.role == "system" for turn in kept):
        return (Turn("system", default_system_prompt), *kept)
    return kept


def encode_conversation(turns: Sequence[Turn], tokenizer: Tokenizer, template: Template) -> Encoded:
    """Ids of a whole conversation: every assistant turn ends with EOS."""
    return encode_batch([turns], tokenizer, template)[0]


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer, template: Template) -> Encoded:
    """Ids of the history followed by the opening of the next assistant turn (BOS and tag, no EOS)."""
    return encode_batch([turns], tokenizer, template, open_assistant=True)[0]


def encode_batch(
    conversations: Sequence[Sequence[Turn]],
    tokenizer: Tokenizer,
    template: Template,
    max_ids: int | None = None,
    open_assistant: bool = False,
) -> list[Encoded]:
    """Encode many conversations at once.

    max_ids: longer sequences are cut to it; `turn_bytes` counts what is kept.
    open_assistant: append the BOS and tag of an assistant turn that is still to be written.
    """
    roles: tuple[Role, ...] = ("system", "user", "assistant")
    # Tag and text are encoded apart, so the ids of a tag don't depend on the text that follows.
    openings = {role: [tokenizer.bos_id, *tokenizer.encode(template.tag(role))] for role in roles}
    kept = [with_default_system(turns, None) for turns in conversations]
    text_ids = iter(tokenizer.encode_batch([turn.text for turns in kept for turn in turns]))
    joined = [_join(turns, text_ids, openings, tokenizer.eos_id, open_assistant) for turns in kept]
    cut = [(ids[:max_ids], supervised[:max_ids], segment[:max_ids]) for ids, supervised, segment in joined]
    sizes = _turn_bytes([(ids, supervised) for ids, supervised, _ in cut], tokenizer)
    return [
        Encoded(ids, supervised, segment, size, len(whole))
        for (ids, supervised, segment), size, (whole, _, _) in zip(cut, sizes, joined, strict=True)
    ]


def _join(
    turns: Conversation,
    text_ids: Iterator[list[int]],
    openings: dict[Role, list[int]],
    eos_id: int,
    open_assistant: bool,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
    ids: list[int] = []
    supervised: list[bool] = []
    segment: list[int] = []
    prompt_segment = 1

    def add(new: list[int], is_target: bool, in_segment: int) -> None:
        ids.extend(new)
        supervised.extend([is_target] * len(new))
        segment.extend([in_segment] * len(new))

    for turn in turns:
        add(openings[turn.role], False, prompt_segment)
        if turn.role == "assistant":
            add([*next(text_ids), eos_id], turn.supervised, 0)
            prompt_segment += 1
        else:
            add(next(text_ids), False, prompt_segment)
    if open_assistant:
        add(openings["assistant"], False, prompt_segment)
    return np.array(ids, np.int32), np.array(supervised, np.bool_), np.array(segment, np.int32)


def _turn_bytes(rows: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]], tokenizer: Tokenizer) -> list[int]:
    """Bytes of each row's decoded answers, turn by turn: a turn is a run of supervised ids."""
    runs: list[list[int]] = []
    owner: list[int] = []
    for row, (ids, supervised) in enumerate(rows):
        edges = np.flatnonzero(np.diff(supervised.astype(np.int8), prepend=0, append=0))
        for begin, end in edges.reshape(-1, 2):
            runs.append([token for token in ids[begin:end].tolist() if token != tokenizer.eos_id])
            owner.append(row)
    totals = [0] * len(rows)
    for row, text in zip(owner, tokenizer.decode_batch(runs), strict=True):
        totals[row] += len(text.encode("utf-8"))
    return totals
