"""A chat at a terminal: lines in, streamed answers out, with a history and a few commands.

Reads and writes the streams it is given. Knows nothing of flags, terminals or training.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from config.errors import UsageError
from dataset.text.conversation import Conversation, Turn, with_default_system
from generation.answers import Answer, Responder
from generation.engine import cache_bytes

HELP = """\
/reset        start a new conversation
/system TEXT  set the system message; without TEXT, remove it
/depth K      every token takes K ACT steps
/depth P      with P between 0 and 1, a token halts once its halting probability exceeds P
/depth        show the depth, and how many ACT steps each token of the last answer took
/save FILE    append the conversation to FILE, as a row of JSON lines
/help         show this
/quit         leave; so do Ctrl-D and, at the prompt, Ctrl-C
Ctrl-C during an answer stops it; its text so far stays in the conversation.
A line that begins with a space is a message, even if a command follows. For a message of several lines, put it between two
lines of \"\"\", or paste it in a terminal with bracketed paste."""
_QUOTES = '"""'


class Chat:
    """One conversation. If it outgrows the context, its oldest exchanges are dropped and reported."""

    def __init__(self, responder: Responder, read: Callable[[str], str], output: TextIO, transcript: Path | None = None) -> None:
        """`read` shows a prompt and returns a line without its end, or raises EOFError, like the
        built-in `input`.

        transcript: a file to append each conversation to at its end, as /save does.
        """
        self._responder = responder
        self._most_act_steps = responder.model.config.halt_max_steps
        self._read = read
        self._output = output
        self._system = responder.system
        self.history: Conversation = ()
        """Turns that the model sees, without the system turn."""
        self._said: Conversation = ()
        """All turns so far. `supervised` is False for those from before the last /system."""
        self._tokens: list[tuple[str, int]] = []
        """Text and ACT steps of each token of the last answer."""
        self._transcript = transcript

    def run(self) -> None:
        """Chat until /quit, the end of the input, or Ctrl-C at the prompt.

        Raises UsageError if the transcript can't be written.
        """
        self._keep()  # nothing to save yet, but an unwritable file is reported before the conversation begins
        responder = self._responder
        size = cache_bytes(responder.model, self._most_act_steps, 1, responder.context) / 1e6
        self._say(f"context of {responder.context} tokens, KV cache of up to {size:.1f} MB; /help lists the commands")
        try:
            while self._take(self._message()):
                pass
        except (EOFError, KeyboardInterrupt):
            self._write("\n")
        self._keep()

    def _message(self) -> str:
        """The next line, or the lines between two lines of three quotation marks, after a space, so
        that they aren't a command.
        """
        line = self._read("> ")
        if line.strip() != _QUOTES:
            return line
        lines = list[str]()
        try:
            while (line := self._read(". ")).strip() != _QUOTES:
                lines.append(line)
        except (EOFError, KeyboardInterrupt):
            self._write("\n")
            self._say(f"the message isn't sent: no line of {_QUOTES} ended it")
            raise
        return " " + "\n".join(lines)

    def _keep(self) -> None:
        if self._transcript is not None:
            self._save(self._transcript)

    def _save(self, path: Path) -> None:
        """Append the conversation, if anything was said since the last /system, to `path` as a row.
        Raises UsageError.

        Answers from before it have weight 0: they had another system turn.
        """
        messages = [
            {"role": turn.role, "content": turn.text} | ({} if turn.supervised else {"weight": 0})
            for turn in self._with_system(self._said)
        ]
        try:
            with path.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" if self._has_news() else "")
        except OSError as error:
            raise UsageError(f"{path} can't be written: {error.strerror}; name another file") from error

    def _has_news(self) -> bool:
        return any(turn.supervised for turn in self._said)

    def _take(self, line: str) -> bool:
        """Run a command or answer a message. Returns whether the chat continues."""
        command, _, rest = line.partition(" ")
        if not is_text(line):
            self._say("this is not valid UTF-8 text: check the terminal's encoding")
        elif command == "/quit":
            return False
        elif line.startswith("/"):
            self._command(command, rest.strip())
        elif line.strip():
            self._answer(line.strip())
        return True

    def _command(self, command: str, rest: str) -> None:
        if command == "/help":
            self._write(HELP + "\n")
        elif command == "/reset":
            self._keep()
            self.history = self._said = ()
            self._say("a new conversation")
        elif command == "/system":
            self._keep()
            self._said = tuple(replace(turn, supervised=False) for turn in self._said)
            self._system = rest
            self._say("a new system turn" if rest else "no system turn")
        elif command == "/depth":
            self._depth(rest)
        elif command == "/save" and rest and self._has_news():
            try:
                self._save(Path(rest).expanduser())
                self._say(f"saved {len(self._said)} turns to {rest}")
            except UsageError as error:
                self._say(str(error))
        elif command == "/save":
            self._say("/save FILE appends the conversation to a file, once it has an answer")
        else:
            self._say(f"{command} is no command; /help lists them")

    def _depth(self, text: str) -> None:
        options = self._responder.options
        try:
            depth = float(text)
        except ValueError:
            depth = 0.0
        if 0 < depth < 1:
            self._responder = self._responder.at_depth(self._most_act_steps, depth)
            self._say(
                f"a token halts once its halting probability exceeds {depth:g}, after at most {self._most_act_steps} ACT steps"
            )
        elif depth in range(1, self._most_act_steps + 1):
            self._responder = self._responder.at_depth(int(depth))
            self._say(f"{int(depth)} ACT steps per token")
        else:
            threshold = f", halting threshold {options.halt_threshold:g}" if options.halt_threshold else ""
            self._say(
                f"/depth takes 1 to {self._most_act_steps} ACT steps, or a halting threshold between 0 and 1; "
                f"it is {options.act_steps}{threshold}"
            )
            if not text and self._tokens:
                mean = sum(steps for _, steps in self._tokens) / len(self._tokens)
                tokens = "  ".join(f"{json.dumps(piece, ensure_ascii=False)} {steps}" for piece, steps in self._tokens)
                self._say(f"the last answer took {mean:.2f} ACT steps per token: {tokens}")

    def _answer(self, message: str) -> None:
        turns = self._within_context((*self.history, Turn("user", message)))
        if turns is None:
            return
        said = ""
        answer: Answer | None = None
        self._tokens = []
        try:
            for piece in self._responder.stream(self._with_system(turns)):
                said += piece.text
                self._write(piece.text)
                self._tokens.append((piece.text, piece.token.act_steps))
                answer = piece.answer
        except KeyboardInterrupt:
            self._write("\n")
            if not said:
                self._say("stopped before the answer began: the message is removed")
                return
            self._say("stopped; the text so far stays in the conversation")
        except UsageError as error:  # no room for its KV cache: another /depth may need less
            self._say(str(error))
            return
        else:
            self._write("\n")
            if answer is not None and answer.finish == "length":
                self._say(f"cut off after {len(answer.act_steps)} tokens")
        self.history = (*turns, Turn("assistant", said))
        self._said = (*self._said, *self.history[-2:])

    def _within_context(self, turns: Conversation) -> Conversation | None:
        """`turns` without oldest exchanges, to make room; None if the message alone is too long."""
        kept, dropped = self._responder.shortened(self._with_system(turns))
        try:
            self._responder.prompt(kept)
        except UsageError as error:
            self._say(str(error))
            return None
        if dropped:
            # An exchange: a user's turn and the answer to it.
            self._say(
                f"the conversation has outgrown the context of {self._responder.context} tokens: the oldest {dropped // 2} of its "
                f"{len(turns) // 2} exchanges are dropped; /reset starts over"
            )
        return turns[dropped:]

    def _with_system(self, turns: Conversation) -> Conversation:
        return with_default_system(turns, self._system)

    def _say(self, text: str) -> None:
        """Show a message of the program, marked to differ from the model's text."""
        self._write(f"({text})\n")

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()


def is_text(line: str) -> bool:
    """Whether a line has no lone surrogate, which stands for a byte that isn't UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in line)
