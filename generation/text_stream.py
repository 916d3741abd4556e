"""From ids to text while an answer forms: only text that later ids can't change comes out, and it ends before a stop string.

Knows the tokenizer, nothing of models or sampling.
"""

from collections.abc import Sequence

from config.errors import UsageError
from dataset.text.tokenizer import Tokenizer


class TextStream:
    """The text of one answer, id by id.

    All that `push` and `finish` return, joined, is `tokenizer.decode` of all ids, cut where the first of the stop strings begins.
    The cost of a push doesn't depend on how long the answer is. Raises UsageError for an empty stop string.

    is_begun: the ids continue a text, which isn't returned.
    """

    text: str
    """All text returned so far."""
    stopped: bool
    """Whether a stop string was met; what is pushed from then on is ignored."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, is_begun: bool = False) -> None:
        if "" in stop:
            raise UsageError("a stop string is empty, which would end every answer at once: leave it out")
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # SentencePiece drops a blank at the beginning of a text. Until the answer has text, its ids are decoded from the first one
        # on; from then on, any text will do in front of the new ids.
        self._context: list[int] = []
        self._context_text = ""
        if is_begun:
            self._stand_in()
        self._pending: list[int] = []
        """Ids that are not in the text yet."""
        self._held = ""
        """Text that may be the beginning of a stop string."""

    def push(self, token: int) -> str:
        """Add an id; the new text that is certain by now, often empty."""
        if self.stopped:
            return ""
        self._pending.append(token)
        return self._release(self._decode(len(self._pending) - self._tokenizer.unsettled(self._pending)), is_last=False)

    def finish(self) -> str:
        """End the answer: the rest of the text. Bytes of a character that never became whole are U+FFFD."""
        if self.stopped:
            return ""
        return self._release(self._decode(len(self._pending)), is_last=True)

    def _decode(self, count: int) -> str:
        """The text of the first `count` pending ids, which are pending no more."""
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
        """The part of the held and this text that is certain, which becomes part of `text`."""
        held = self._held + decoded
        found = min((at for stop in self._stop if (at := held.find(stop)) >= 0), default=len(held))
        begun = len(held) if is_last else min((_beginning(stop, held) for stop in self._stop), default=len(held))
        # A stop string that has come whole must wait for one that began before it and may come whole yet.
        self.stopped = found < len(held) and found <= begun
        end = min(found, begun)
        self._held = held[end:]
        self.text += held[:end]
        return held[:end]


def _beginning(stop: str, text: str) -> int:
    """Where the longest end of `text` begins that is a beginning of `stop`; the length of `text` if there is none."""
    lengths = range(min(len(stop), len(text)), 0, -1)
    return len(text) - next((length for length in lengths if text.endswith(stop[:length])), 0)
