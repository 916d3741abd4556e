"""Streaming detokenization: returns only text that later ids can't change, and ends before a stop
string.

Knows the tokenizer, nothing of models or sampling.
"""

from collections.abc import Sequence

from config.errors import UsageError
from dataset.text.tokenizer import Tokenizer


class TextStream:
    """The text of one answer, id by id.

    The results of `push` and `finish`, joined, are `tokenizer.decode` of all ids, up to the first
    stop string. The cost of a push doesn't depend on the length of the answer. Raises UsageError
    for an empty stop string.

    is_begun: the ids continue a text, which isn't returned.
    """

    text: str
    """All text returned so far."""
    stopped: bool
    """Whether a stop string was found; later ids are ignored."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, is_begun: bool = False) -> None:
        if "" in stop:
            raise UsageError("a stop string is empty, which would end every answer at once: leave it out")
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # SentencePiece drops a space at the beginning of a text. Until the answer has text, its ids
        # are decoded from the first one; after that, any text may stand before the new ids.
        self._context: list[int] = []
        self._context_text = ""
        if is_begun:
            self._stand_in()
        self._pending: list[int] = []
        """Ids not yet in the text."""
        self._held = ""
        """Text that may begin a stop string."""

    def push(self, token: int) -> str:
        """Add an id. Returns the new final text, often empty."""
        if self.stopped:
            return ""
        self._pending.append(token)
        return self._release(self._decode(len(self._pending) - self._tokenizer.unsettled(self._pending)), is_last=False)

    def finish(self) -> str:
        """End the answer. Returns the rest of its text, with U+FFFD for incomplete characters."""
        if self.stopped:
            return ""
        return self._release(self._decode(len(self._pending)), is_last=True)

    def _decode(self, count: int) -> str:
        """Decode and remove the first `count` pending ids."""
        ids, self._pending = self._pending[:count], self._pending[count:]
        if not ids:
            return ""
        decoded = self._tokenizer.decode(self._context + ids)[len(self._context_text) :]
        if not self._context_text:
            self._context += ids
            if decoded:
                self._stand_in()
        return decoded

    def _stand_in(self) -> None:
        self._context = self._tokenizer.encode("a")
        self._context_text = self._tokenizer.decode(self._context)

    def _release(self, decoded: str, *, is_last: bool) -> str:
        """Append the final part of the held text and this text to `text`, and return it."""
        held = self._held + decoded
        found = min((at for stop in self._stop if (at := held.find(stop)) >= 0), default=len(held))
        begun = len(held) if is_last else min((_beginning(stop, held) for stop in self._stop), default=len(held))
        # A complete stop string must wait for one that began before it and may still be completed.
        self.stopped = found < len(held) and found <= begun
        end = min(found, begun)
        self._held = held[end:]
        self.text += held[:end]
        return held[:end]


def _beginning(stop: str, text: str) -> int:
    """The start of the longest suffix of `text` that is a prefix of `stop`; the length of `text` if
    there is none.
    """
    lengths = range(min(len(stop), len(text)), 0, -1)
    return len(text) - next((length for length in lengths if text.endswith(stop[:length])), 0)
