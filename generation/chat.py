"""A conversation at a terminal: lines in, answers out as they form, with a history and a few commands.

Knows the streams it is given; nothing of flags, terminals or training.
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
/reset        forget what was said
/system TEXT  tell the model this before the conversation; without TEXT, nothing
/depth K      every token takes K ACT steps
/depth P      with P between 0 and 1, a token stops when its halting probability passes P
/depth        what it is, and how many ACT steps each token of the last answer took
/save FILE    add the conversation to FILE, as a row of JSON lines
/help         this
/quit         leave; so do Ctrl-D and, at the prompt, Ctrl-C
Ctrl-C during an answer stops it; what was said stays part of the conversation.
A line that begins with a blank is a message, whatever follows. Several lines are one message between two lines of \"\"\",
or pasted at once where the terminal marks what is pasted."""
_QUOTES = '"""'


class Chat:
    """One conversation. When it outgrows the context its oldest exchanges are dropped, and that is said."""

    def __init__(self, responder: Responder, read: Callable[[str], str], output: TextIO, transcript: Path | None = None) -> None:
        """`read` shows a prompt and returns a line without its end, or raises EOFError, as the built-in `input` does.

        transcript: where each conversation is saved at its end, as /save does.
        """
        self._responder = responder
        self._most_act_steps = responder.model.config.halt_max_steps
        self._read = read
        self._output = output
        self._system = responder.system
        self.history: Conversation = ()
        """Turns so far that the model is told, without the system turn."""
        self._said: Conversation = ()
        """All turns so far. Those from before the last /system are context (`supervised` is False)."""
        self._tokens: list[tuple[str, int]] = []
        """Of the last answer: text and ACT steps."""
        self._transcript = transcript

    def run(self) -> None:
        """Talk until /quit, the end of the input, or Ctrl-C at the prompt.

        Raises UsageError if the transcript can't be written.
        """
        self._keep()  # nothing yet, but a file that can't be written is told before an hour's talk is lost
        responder = self._responder
        size = cache_bytes(responder.model, self._most_act_steps, 1, responder.context) / 1e6
        self._say(f"context of {responder.context} tokens, up to {size:.1f} MB of keys and values; /help tells the commands")
        try:
            while self._take(self._message()):
                pass
        except (EOFError, KeyboardInterrupt):
            self._write("\n")
        self._keep()

    def _message(self) -> str:
        """The next line, or those between two lines of three quotation marks, behind a blank, because they are no command."""
        line = self._read("> ")
        if line.strip() != _QUOTES:
            return line
        lines = list[str]()
        try:
            while (line := self._read(". ")).strip() != _QUOTES:
                lines.append(line)
        except (EOFError, KeyboardInterrupt):
            self._write("\n")
            self._say(f"the message is not sent: no line of {_QUOTES} has ended it")
            raise
        return " " + "\n".join(lines)

    def _keep(self) -> None:
        if self._transcript is not None:
            self._save(self._transcript)

    def _save(self, path: Path) -> None:
        """Add what was said, if anything was since the last /system, to `path` as a row. Raises UsageError.

        An answer from before it has weight 0: another system turn was in force.
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
        """Do what a line asks for. Returns whether the conversation goes on."""
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
                self._say(f"{len(self._said)} turns are in {rest}")
            except UsageError as error:
                self._say(str(error))
        elif command == "/save":
            self._say("/save FILE adds the conversation to a file, once something was said")
        else:
            self._say(f"{command} is no command; /help tells them")

    def _depth(self, text: str) -> None:
        options = self._responder.options
        try:
            depth = float(text)
        except ValueError:
            depth = 0.0
        if 0 < depth < 1:
            self._responder = self._responder.at_depth(self._most_act_steps, depth)
            self._say(
                f"a token stops when its halting probability passes {depth:g}, after {self._most_act_steps} ACT steps at most"
            )
        elif depth in range(1, self._most_act_steps + 1):
            self._responder = self._responder.at_depth(int(depth))
            self._say(f"{int(depth)} ACT steps a token")
        else:
            threshold = f", halting threshold {options.halt_threshold:g}" if options.halt_threshold else ""
            self._say(
                f"/depth takes 1 to {self._most_act_steps} ACT steps, or a halting threshold between 0 and 1; "
                f"it is {options.act_steps}{threshold}"
            )
            if not text and self._tokens:
                mean = sum(steps for _, steps in self._tokens) / len(self._tokens)
                tokens = "  ".join(f"{json.dumps(piece, ensure_ascii=False)} {steps}" for piece, steps in self._tokens)
                self._say(f"the last answer took {mean:.2f} ACT steps a token: {tokens}")

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
                self._say("stopped before a word was said: the message is withdrawn")
                return
            self._say("stopped; what was said stays in the conversation")
        except UsageError as error:  # no room for its keys and values: another /depth may need less
            self._say(str(error))
            return
        else:
            self._write("\n")
            if answer is not None and answer.finish == "length":
                self._say(f"cut off after {len(answer.act_steps)} tokens")
        self.history = (*turns, Turn("assistant", said))
        self._said = (*self._said, *self.history[-2:])

    def _within_context(self, turns: Conversation) -> Conversation | None:
        """`turns` without its oldest exchanges, which leave an answer too little room; None if the message alone is too long."""
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
                f"{len(turns) // 2} exchanges are forgotten; /reset begins anew"
            )
        return turns[dropped:]

    def _with_system(self, turns: Conversation) -> Conversation:
        return with_default_system(turns, self._system)

    def _say(self, text: str) -> None:
        """What the program says, set apart from what the model does."""
        self._write(f"({text})\n")

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()


def is_text(line: str) -> bool:
    """Whether a line has no half of a surrogate pair, which is how bytes that are no UTF-8 arrive."""
    return not any("\ud800" <= character <= "\udfff" for character in line)
