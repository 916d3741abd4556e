"""The forms of conversation rows, and how a row of each becomes turns.

Every key of a row is read, known as metadata, or reported as `BadRow`: no text is lost silently.
Knows no files, tokens or caches.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from config.schema import FieldName, SourceConfig
from dataset.text.conversation import Conversation, Role, Turn, with_default_system
from dataset.text.rows import BadRow, NothingToLearn, shown, unique_keys

# Each flag, and whether "true" or 1 means that the turn is trained on. A mask means the opposite.
FLAGS: dict[FieldName, bool] = {"weight": True, "train": True, "loss": True, "mask": False}
# Fields of a row or message, and the usual keys for them. `FormOptions.fields` replaces these.
FIELDS: dict[FieldName, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "question", "query", "instruction"),
    "input": ("input",),
    "context": ("context",),
    "response": ("response", "answer", "output", "completion"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "text": ("text",),
    "role": ("role", "from"),
    "content": ("content", "value"),
    **{flag: (flag,) for flag in FLAGS},
}
MessageRole = Literal["system", "user", "assistant", "tool", "tool_call"]
ROLES: dict[str, MessageRole] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
    **dict.fromkeys(("tool_call", "function_call"), "tool_call"),
}
# With `tool_turns=as_user`, a tool's turn becomes the user's, and a call the assistant's.
_TURN_ROLES: dict[MessageRole, Role] = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "user", "tool_call": "assistant",
}  # fmt: skip
# Keys whose values, if short, are metadata, never content. So are all names that end in `_id`.
METADATA = frozenset(
    {
        "id", "idx", "index", "uid", "uuid", "guid", "hash", "name", "source", "dataset", "subset", "split", "task", "category",
        "language", "lang", "model", "license", "timestamp", "created_at", "score", "rating",
    }
)  # fmt: skip
# Ignored turns after the last answer, which can't be trained on, are counted under this name.
UNANSWERED = "turns after the last answer"
_LABEL_CHARS = 200
_TRUTH: dict[object, bool] = {0: False, 1: True, "0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
_CALLS = ("tool_calls", "function_call")
_NO_CALLS = ("[]", "{}", "null")  # as in a column of JSON texts
_TEXT_PARTS = (None, "text", "input_text", "output_text")
# Fields that tell a row's form, in this order (`_told_by`). docs/data.md has the table.
_TOLD_BY: tuple[FieldName, ...] = ("messages", "prompt", "input", "text")

ToolTurns = Literal["error", "drop", "as_user"]


@dataclass(frozen=True)
class FormOptions:
    """A source's own names and rules for its rows, on top of `FIELDS` and `ROLES`; see
    `config.schema.SourceConfig`.
    """

    fields: Mapping[FieldName, str] = field(default_factory=dict)
    roles: Mapping[str, MessageRole] = field(default_factory=dict)
    tool_turns: ToolTurns = "error"
    ignore: tuple[str, ...] = ()

    @cached_property
    def names(self) -> dict[FieldName, tuple[str, ...]]:
        """The keys to look for, by field. A key in `fields` belongs to that field only, an ignored key to none."""
        taken = {*self.fields.values(), *self.ignore}
        return {
            name: (self.fields[name],) if name in self.fields else tuple(key for key in usual if key not in taken)
            for name, usual in FIELDS.items()
        }

    @cached_property
    def all_roles(self) -> dict[str, MessageRole]:
        """What each name of a role means, in lower case."""
        return {**ROLES, **{name.strip().lower(): role for name, role in self.roles.items()}}

    @cached_property
    def flags(self) -> dict[str, bool]:
        """`FLAGS` by their keys."""
        return {name: trained_if for flag, trained_if in FLAGS.items() for name in self.names[flag]}

    @cached_property
    def of_message(self) -> frozenset[str]:
        """The keys of a message that are read."""
        return frozenset((*self.names["role"], *self.names["content"], *self.flags))


DEFAULT_OPTIONS = FormOptions()


def form_options(config: SourceConfig) -> FormOptions:
    """The options in a source's settings."""
    return FormOptions(config.fields, config.roles, config.tool_turns, tuple(sorted(config.ignore)))


@dataclass(frozen=True)
class ParsedRow:
    """A row's turns, in order.

    form: the form's name, to count. columns: the row's keys that the turns come from. ignored: keys
    with text or a truth value that was left out, as metadata or by `FormOptions`; those of a message
    as `messages[].name`.
    """

    turns: Conversation
    form: str
    columns: frozenset[str]
    ignored: tuple[str, ...]


def parse_turns(row: Mapping[str, Any], options: FormOptions = DEFAULT_OPTIONS) -> ParsedRow:
    """All turns of a row, trainable or not.

    Raises `BadRow` for a row of unknown form, for values of the wrong type, and for text that would
    be lost.
    """
    try:
        return _RowReader(row, options).parse()
    except RecursionError as error:
        raise BadRow("too_deep", "expected a row of a few levels, found one nested too deeply to read") from error


def to_conversation(row: Mapping[str, Any], options: FormOptions = DEFAULT_OPTIONS) -> tuple[Conversation, ParsedRow]:
    """The conversation to train on, and the parsed row. Leaves out empty system turns and turns
    after the last answer.

    `ParsedRow.ignored` counts the latter as `UNANSWERED`. An empty answer is context, never a
    target. Raises `BadRow`, and `NothingToLearn` for a row without a user turn, with an empty one,
    or without a supervised answer, and for raw text that is empty or not supervised.
    """
    parsed = parse_turns(row, options)
    turns = list(parsed.turns)
    if turns and turns[0].role == "text":
        if not turns[0].text.strip():
            raise NothingToLearn("empty_text")
        if not turns[0].supervised:
            raise NothingToLearn("no_supervised_answer")
        return parsed.turns, parsed
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
    if any(turn.text.strip() for turn in parsed.turns[len(turns) :]):
        parsed = replace(parsed, ignored=(*parsed.ignored, UNANSWERED))
    if not any(turn.role == "user" for turn in turns):
        raise NothingToLearn("no_answer")
    kept = tuple(
        Turn(turn.role, turn.text, turn.supervised and bool(turn.text.strip())) for turn in with_default_system(turns, None)
    )
    if not any(turn.role == "assistant" and turn.supervised for turn in kept):
        raise NothingToLearn("no_supervised_answer")
    return kept, parsed


class _RowReader:
    """Reads one row, and records what it has read."""

    def __init__(self, row: Mapping[str, Any], options: FormOptions) -> None:
        self._row = row
        self._options = options
        self._columns: set[str] = set()
        self._ignored: set[str] = set()
        # Unread keys within messages: place in the row, name for counts, the key, and its value.
        self._rest: list[tuple[str, str, str, Any]] = []

    def parse(self) -> ParsedRow:
        told_by = self._told_by()
        read = {"messages": self._chat, "text": self._raw_text}.get(told_by, lambda: self._exchange(told_by))
        name, turns = read()
        if not self._flags(self._row, ""):
            turns = _as_context(turns)
        self._check_rest(turns, told_by)
        return ParsedRow(tuple(turns), name, frozenset(self._columns), tuple(sorted(self._ignored)))

    def _told_by(self) -> FieldName:
        """The first field of `_TOLD_BY` in the row: one with text, else with a value, else any."""
        for is_there in (_holds_text, lambda value: value is not None, lambda value: True):
            for name in _TOLD_BY:
                if any(key in self._row and is_there(self._row[key]) for key in self._options.names[name]):
                    return name
        told_by = "; ".join("|".join(self._options.names[name]) for name in _TOLD_BY)
        raise BadRow(
            "unknown_form",
            f"expected a conversation under one of the keys {told_by}, found the keys {shown(list(self._row))}; "
            "name the row's own keys with dataset.fields={prompt: KEY, response: KEY}",
        )

    # The forms.

    def _chat(self) -> tuple[str, list[Turn]]:
        key, value = self._column("messages") or ("", [])
        messages = _as_list(value, key)
        turns = self._with_system(self._messages(messages, key))
        return "sharegpt" if messages and messages[0].get("from") is not None else "openai", turns

    def _exchange(self, told_by: FieldName) -> tuple[str, list[Turn]]:
        """A prompt with its other fields, and a response; either may also be a list of messages."""
        prompt = self._column("input" if told_by == "input" else "prompt") or self._column("input")
        response = self._column("response")
        if any(found is not None and _is_list(found[1]) for found in (prompt, response)):
            name = "prompt_completion"
        elif prompt is not None and prompt[0] == "instruction":
            name = "dolly" if any(key in self._row for key in self._options.names["context"]) else "alpaca"
        else:
            name = "pair"
        if prompt is not None and _is_list(prompt[1]):
            asked = _as_context(self._messages(prompt[1], prompt[0]))  # the response is the target
        else:
            # The question, its input and its context, each once, separated by blank lines.
            parts = dict(found for found in (prompt, self._column("input"), self._column("context")) if found is not None)
            texts = [_text(value, key) for key, value in parts.items()]
            asked = [Turn("user", "\n\n".join([text for text in texts if text.strip()] or texts[:1]))] if texts else []
        answer: list[Turn] = []
        if response is not None:
            key, value = response
            answer = self._messages(value, key) if _is_list(value) else [Turn("assistant", _text(value, key))]
            # A whole conversation in place of a response begins with the prompt.
            asks = [(turn.role, turn.text.strip()) for turn in asked if turn.role != "system"]
            if asks and asks == [(turn.role, turn.text.strip()) for turn in answer if turn.role != "system"][: len(asks)]:
                others = [turn.text for turn in answer if turn.role == "system"]
                asked = [turn for turn in asked if turn.role == "system" and turn.text not in others]
        return name, self._with_system([*self._history(), *asked, *answer])

    def _raw_text(self) -> tuple[str, list[Turn]]:
        key, value = self._column("text") or ("text", "")
        return "text", [Turn("text", _text(value, key))]

    # Their parts.

    def _key(self, values: Mapping[str, Any], field: FieldName, where: str = "") -> str | None:
        """The key of a field in a row or message. Raises `BadRow` for a second one with text."""
        keys = [key for key in self._options.names[field] if values.get(key) is not None]
        if len(keys) > 1:
            keys = [key for key in keys if _holds_text(values[key])] or keys[:1]
        if len(keys) > 1:
            raise BadRow(
                "two_keys",
                f"{where}expected one text for {field}, found one under each of {shown(keys)}; name the one that is meant with "
                f"dataset.fields={{{field}: {keys[0]}}} and the other in dataset.ignore=[{keys[1]}]",
            )
        return keys[0] if keys else None

    def _column(self, field: FieldName) -> tuple[str, Any] | None:
        """A field's key and value in the row."""
        key = self._key(self._row, field)
        if key is None:
            return None
        self._columns.add(key)
        return key, self._row[key]

    def _with_system(self, turns: list[Turn]) -> list[Turn]:
        found = self._column("system")
        if found is None or not _text(found[1], found[0]).strip():
            return turns
        key, text = found
        said = [turn.text for turn in turns if turn.role == "system" and turn.text.strip()]
        if not said:
            return [Turn("system", text), *turns]
        if text.strip() not in [other.strip() for other in said]:
            raise BadRow(
                "two_systems",
                f"expected one system text, found {shown(said[0])} among the turns and {shown(text)} under {key!r}; "
                f"leave that out with dataset.ignore=[{_given(key)}], or correct the row",
            )
        return turns

    def _history(self) -> list[Turn]:
        """Earlier turns: messages, or pairs of question and answer."""
        key, value = self._column("history") or ("", [])
        exchanges = _as_list(value, key)
        if any(isinstance(exchange, Mapping) for exchange in exchanges):
            return self._messages(exchanges, key)
        turns = []
        for index, exchange in enumerate(exchanges):
            where = f"{key}[{index}]"
            if not (_is_list(exchange) and len(exchange) == 2):
                raise BadRow(
                    "wrong_type", f"{where}: expected a pair of question and answer, or a message, found {shown(exchange)}"
                )
            question, answer = (_text("" if text is None else text, where) for text in exchange)
            turns += [turn for turn in (Turn("user", question), Turn("assistant", answer)) if turn.text.strip()]
        return turns

    def _messages(self, value: Any, key: str) -> list[Turn]:
        messages = [self._message(message, f"{key}[{index}]", key) for index, message in enumerate(_as_list(value, key))]
        return [turn for turn in messages if turn is not None]

    def _message(self, message: Any, where: str, column: str) -> Turn | None:
        """The turn of a message; None if it is a dropped tool turn."""
        if not isinstance(message, Mapping):
            raise BadRow("wrong_type", f"{where}: expected an object, found {shown(message)}")
        options = self._options
        role_key, role_name = self._member(message, "role", where)
        role = options.all_roles.get(role_name.strip().lower()) if isinstance(role_name, str) else None
        if role is None:
            raise BadRow(
                "unknown_role",
                f"{where}.{role_key}: expected one of {', '.join(options.all_roles)}, found {shown(role_name)}; "
                "say whose turns these are with dataset.roles={NAME: system|user|assistant|tool}",
            )
        supervised = self._flags(message, f"{where}.")
        calls = {key: message[key] for key in _CALLS if _holds_text(message.get(key)) and message[key] not in _NO_CALLS}
        is_tool = role in ("tool", "tool_call")
        open_calls = [key for key in calls if key not in options.ignore]
        if options.tool_turns == "error" and (is_tool or open_calls):
            what = f"{where}.{role_key} is {shown(role_name)}" if is_tool else f"{where} has the key {shown(open_calls[0])}"
            raise BadRow(
                "tool_turn",
                f"expected turns of system, user and assistant, found a tool's: {what}; leave such turns out with "
                "dataset.tool_turns=drop, or read what a tool says as the user's with dataset.tool_turns=as_user",
            )
        if is_tool and options.tool_turns == "drop":
            self._ignored.add(f"{column}[].{role_key}={role_name}")
            return None
        # A message with a tool call may have no text.
        content_key, content = self._member(message, "content", where, default="" if calls else None)
        text = self._content(content, f"{where}.{content_key}", column)
        if options.tool_turns == "as_user" and open_calls:
            called = [json.dumps(calls[key], ensure_ascii=False) for key in open_calls]
            text = "\n".join([*([text] if text.strip() else []), *called])
        else:
            self._ignored.update(f"{column}[].{key}" for key in open_calls)
        no_calls = (key for key in _CALLS if message.get(key) in _NO_CALLS)
        self._record_unread(message, options.of_message.union(open_calls, no_calls), where, f"{column}[]")
        return None if calls and not text.strip() else Turn(_TURN_ROLES[role], text, supervised)

    def _member(self, message: Mapping[str, Any], field: FieldName, where: str, default: str | None = None) -> tuple[str, Any]:
        """The key and value of a message's role or content."""
        key = self._key(message, field, f"{where}: ")
        if key is not None:
            return key, message[key]
        null = next((key for key in self._options.names[field] if key in message), None)
        if default is None and null is not None:
            raise BadRow("missing_key", f"{where}.{null}: expected text, found null")
        if default is None:
            expected = " or ".join(f'"{key}"' for key in self._options.names[field])
            raise BadRow(
                "missing_key",
                f"{where}: expected the key {expected}, found {shown(list(message))}; name its own with "
                f"dataset.fields={{{field}: KEY}}",
            )
        return field, default

    def _content(self, content: Any, where: str, column: str) -> str:
        """A text, or the concatenated texts of a list of parts."""
        if not _is_list(content):
            return _text(content, where)
        texts = []
        for index, part in enumerate(content):
            place = f"{where}[{index}]"
            if isinstance(part, Mapping):
                kind = part.get("type")
                if kind not in _TEXT_PARTS:
                    raise BadRow(
                        "not_text", f"{place}: expected a part of type text, found one of type {shown(kind)}: {shown(dict(part))}"
                    )
                if part.get("text") is None:
                    raise BadRow("not_text", f'{place}: expected a part with a "text", found none: {shown(dict(part))}')
                self._record_unread(part, {"type", "text"}, place, f"{column}[].content[]")
                part = part["text"]
            texts.append(_text(part, place))
        return "".join(texts)

    def _flags(self, values: Mapping[str, Any], where: str) -> bool:
        """Whether to train on a turn or row, by its flags."""
        said: dict[str, bool] = {}
        for key, trained_if in self._options.flags.items():
            value = values.get(key)
            if _is_empty(value):
                continue
            plain = value.strip().lower() if isinstance(value, str) else value
            truth = _TRUTH.get(plain) if isinstance(plain, str | int | float) else None
            if truth is None:
                raise BadRow(
                    "wrong_type",
                    f"{where}{key}: expected 0, 1, false, true or null, found {shown(value)}; if it doesn't say whether the text "
                    f"is trained on, name it in dataset.ignore=[{_given(key)}]",
                )
            said[key] = truth == trained_if
        if len(set(said.values())) > 1:
            raise BadRow("wrong_type", f"{where}{'/'.join(said)}: expected flags that agree, found {shown(said)} for trained on")
        return all(said.values())

    # Unread keys.

    def _record_unread(self, values: Mapping[str, Any], read: Collection[str], where: str, counted_as: str) -> None:
        """Record unread keys of a message or part. Raises for one without text, maybe a flag."""
        for key, value in values.items():
            if key in read or (_is_empty(value) and not _holds_text(value)):
                continue
            if not (_holds_text(value) or key in self._options.ignore or _is_label_name(key)):
                raise BadRow(
                    "unread_key",
                    f"{where}.{key}: expected the keys of a turn, found one of no known meaning, with {shown(value)}; if it says "
                    f"whether the turn is trained on, use dataset.fields={{train: {_given(key)}}} (or mask, for the opposite), "
                    f"else dataset.ignore=[{_given(key)}]",
                )
            self._rest.append((f"{where}.{key}", f"{counted_as}.{key}", key, value))

    def _check_rest(self, turns: list[Turn], told_by: FieldName) -> None:
        """Raise `BadRow` for text that is neither in the turns nor under a metadata key."""
        read = self._columns.union(self._options.flags)
        roles = self._options.names["role"]
        said = {turn.text.strip() for turn in turns}
        of_row = ((key, key, key, value) for key, value in self._row.items() if key not in read)
        for where, counted_as, key, value in (*of_row, *self._rest):
            for place, innermost, text in _texts(value, where, key, self._options.ignore):
                is_label = _is_label_name(innermost) and len(text) <= _LABEL_CHARS and "\n" not in text
                is_label |= innermost in roles and text.strip().lower() in self._options.all_roles
                if not is_label and text.strip() not in said:
                    # Report the unread key, not the one nearest to the text: `fields` names keys of
                    # rows and messages, and `role` or `text` may be read elsewhere in the row.
                    raise BadRow(
                        "unread_text",
                        f"{place}: expected text that belongs to a known form, found more, which would be lost: {shown(text)}; "
                        f"{self._remedy(key, told_by)}, else leave it out with dataset.ignore=[{_given(key)}]",
                    )
            # Truth may say that an answer is bad.
            if _holds_text(value) or isinstance(value, bool):
                self._ignored.add(counted_as)

    def _remedy(self, key: str, told_by: FieldName) -> str:
        """How to have the unread key read."""
        names = self._options.names
        field = next((name for name in ("response", "context", "system", *_TOLD_BY) if key in names[name]), None)
        if field is None or told_by in ("prompt", "input"):
            return (
                f"if it is part of the conversation, say what it is with dataset.fields={{FIELD: {_given(key)}}} "
                f"(FIELD: {', '.join(FIELDS)})"
            )
        asked = next((name for name in names[told_by] if name in self._row), told_by)
        beside = f"a {field} isn't read beside {asked!r}"
        if field == "response" or (field == "context" and told_by == "text"):
            return f"{beside}: if that is what is asked, use dataset.fields={{prompt: {_given(asked)}}}"
        return f"{beside}: to read {key!r} in its place, use dataset.ignore=[{_given(asked)}]" if field in _TOLD_BY else beside


def _texts(value: Any, where: str = "", key: str = "", ignore: Collection[str] = ()) -> Iterator[tuple[str, str, str]]:
    """Place, innermost key and text of every string in a value, and of keys that are phrases, not
    names. Leaves out blank ones, and those under a key in `ignore`.
    """
    if key in ignore:
        return
    if isinstance(value, str):
        if value.strip():
            yield where, key, value
    elif isinstance(value, Mapping):
        for name, member in value.items():
            if " " in str(name).strip():
                yield where, "", str(name)
            yield from _texts(member, f"{where}.{name}", str(name), ignore)
    elif _is_list(value):
        for index, item in enumerate(value):
            yield from _texts(item, f"{where}[{index}]", key, ignore)


def _holds_text(value: Any) -> bool:
    return any(True for _ in _texts(value))


def _as_context(turns: Iterable[Turn]) -> list[Turn]:
    return [replace(turn, supervised=False) for turn in turns]


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_empty, value))
    return value is None or (isinstance(value, str) and not value.strip())


def _is_label_name(key: str) -> bool:
    return key.lower() in METADATA or key.lower().endswith("_id")


def _given(key: str) -> str:
    """A key as written in an override: in quotes if it has characters that are special to Hydra."""
    return key if re.fullmatch(r"[\w-]+( [\w-]+)*", key) else "'" + key.replace("'", r"\'") + "'"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _as_list(value: Any, where: str) -> list[Any]:
    """A list, or its JSON text (as in a CSV file); an empty text is an empty list."""
    if _is_empty(value) and not _is_list(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise BadRow("wrong_type", f"{where}: expected a list, found text that is no JSON ({error}): {shown(value)}") from error
    if not _is_list(value):
        raise BadRow("wrong_type", f"{where}: expected a list, found {shown(value)}")
    return list(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{where}: expected a string, found {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can contain a lone surrogate; no text encoding can
        raise BadRow("bad_unicode", f"{where}: expected Unicode text, found half of a surrogate pair") from error
    return value
