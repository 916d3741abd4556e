"""Each form of row becomes the turns it means; whatever else stands in a row is known or told, never lost."""

import json
import re
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.compose import compose_config, override_config
from config.errors import UsageError
from config.schema import FieldName
from dataset.text.conversation import Conversation, Turn
from dataset.text.forms import FIELDS, FLAGS, METADATA, UNANSWERED, FormOptions, form_options, parse_turns, to_conversation
from dataset.text.rows import BadRow, NothingToLearn, parse_row


def turns(*texts: str) -> Conversation:
    """`turns("s:Be brief.", "u:Why?", "a:So.", "c:context only")`."""
    roles: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant", "c": "assistant", "t": "text"}
    return tuple(Turn(roles[text[0]], text[2:], supervised=text[0] != "c") for text in texts)


def same(one: Conversation, other: Conversation) -> bool:
    """Equal roles, texts and targets."""

    def plain(conversation: Conversation) -> list[tuple[str, str, bool]]:
        return [(turn.role, turn.text, turn.supervised and turn.role in ("assistant", "text")) for turn in conversation]

    return plain(one) == plain(other)


def message(role: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": role, "value": value, **more}


def chat(*messages: Any) -> dict[str, Any]:
    return {"conversations": list(messages)}


def openai(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


HUMAN, GPT = message("human", "Why?"), message("gpt", "So.")
WHY_SO = turns("u:Why?", "a:So.")
PAIR = {"prompt": "Why?", "response": "So."}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL_CHAT = {
    "messages": [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "It is 3."},
    ]
}

FORMS: list[tuple[str, dict[str, Any], Conversation]] = [
    ("sharegpt", chat(message("system", "Be."), HUMAN, GPT, HUMAN, GPT), turns("s:Be.", "u:Why?", "a:So.", "u:Why?", "a:So.")),
    ("sharegpt", {"conversations": [HUMAN, GPT], "system": "Be."}, turns("s:Be.", "u:Why?", "a:So.")),
    ("sharegpt", {"messages": [HUMAN, GPT], "system_prompt": "Be."}, turns("s:Be.", "u:Why?", "a:So.")),
    ("sharegpt", {"conversations": [message("system", "Be."), HUMAN, GPT], "system": " Be."}, turns("s:Be.", "u:Why?", "a:So.")),
    ("sharegpt", {"conversations": [message("system", ""), HUMAN, GPT], "system": "Be."}, turns("s:Be.", "u:Why?", "a:So.")),
    ("openai", openai(("system", "Be."), ("user", "Why?"), ("assistant", "So.")), turns("s:Be.", "u:Why?", "a:So.")),
    ("openai", {"conversations": openai(("user", "Why?"), ("assistant", "So."))["messages"]}, WHY_SO),
    ("openai", {"conversation": openai(("developer", "Be."), ("USER", "Why?"), ("Assistant", "So."))["messages"]},
     turns("s:Be.", "u:Why?", "a:So.")),
    ("openai", openai(("user", ["Wh", {"type": "text", "text": "y?", "url": None}]), ("assistant", [{"text": "So."}])), WHY_SO),
    ("openai", {"messages": json.dumps(openai(("user", "Why?"), ("assistant", "So."))["messages"])}, WHY_SO),
    ("openai", {"prompt": "Why?", **openai(("user", "Why?"), ("assistant", "So."))}, WHY_SO),
    ("alpaca", {"instruction": "Why?", "output": "So."}, WHY_SO),
    ("alpaca", {"instruction": "Why?", "input": "", "output": "So."}, WHY_SO),
    ("alpaca", {"instruction": "Why?", "input": "Rain.", "output": "So.", "system": "Be."},
     turns("s:Be.", "u:Why?\n\nRain.", "a:So.")),
    ("alpaca", {"instruction": "Why?", "output": "So.", "history": [["A?", "B."], ("C?", "D.")]},
     turns("u:A?", "a:B.", "u:C?", "a:D.", "u:Why?", "a:So.")),
    ("alpaca", {"instruction": "Why?", "output": "So.", "system": "Be.",
                "history": openai(("user", "A?"), ("assistant", "B."))["messages"]},
     turns("s:Be.", "u:A?", "a:B.", "u:Why?", "a:So.")),
    ("alpaca", {"instruction": "Why?", "output": "So.", "history": '[["", "Hello."]]'}, turns("a:Hello.", "u:Why?", "a:So.")),
    ("alpaca", {"instruction": "Why?", "output": "So.", "history": []}, WHY_SO),
    ("dolly", {"instruction": "Why?", "context": "Rain.", "response": "So.", "category": "qa"}, turns("u:Why?\n\nRain.", "a:So.")),
    ("dolly", {"instruction": "Why?", "context": "", "response": "So."}, WHY_SO),
    ("pair", {"question": "Why?", "context": "Rain.", "answer": "So."}, turns("u:Why?\n\nRain.", "a:So.")),
    ("pair", {"prompt": "Why?", "input": "Wet.", "context": "Rain.", "answer": "So."}, turns("u:Why?\n\nWet.\n\nRain.", "a:So.")),
    ("pair", {"id": "x.1", "query": "Why?", "completion": "So.", "score": 0.5}, WHY_SO),
    ("pair", {"prompt": "Why?", "history": [["A?", "B."]], "output": "So."}, turns("u:A?", "a:B.", "u:Why?", "a:So.")),
    ("prompt_completion",
     {"prompt": openai(("user", "A?"), ("assistant", "B."), ("user", "Why?"))["messages"],
      "completion": openai(("assistant", "So."))["messages"]},
     turns("u:A?", "c:B.", "u:Why?", "a:So.")),
    ("text", {"text": "Once.\n\nUpon a time."}, turns("t:Once.\n\nUpon a time.")),
]  # fmt: skip


@pytest.mark.parametrize(("form", "row", "expected"), FORMS)
def test_a_row_of_each_form_becomes_its_turns(form: str, row: dict[str, Any], expected: Conversation) -> None:
    conversation, parsed = to_conversation(row)
    assert same(conversation, expected) and parsed.form == form
    # Arrow files fill what a row hasn't with null.
    absent = dict.fromkeys(["messages", "conversations", "prompt", "output", "system", "history", "text", "weight", "new"])
    filled, of_filled = to_conversation({**absent, **row})
    assert same(filled, expected) and of_filled == parsed


@pytest.mark.parametrize("prompt", ["prompt", "question", "query", "input", "instruction"])
@pytest.mark.parametrize("reply", ["response", "output", "answer", "completion"])
@pytest.mark.parametrize("system", [{}, {"system": "S"}, {"system_prompt": "S"}, {"system_prompt": ""}, {"system": None}])
def test_every_pair_of_names(prompt: str, reply: str, system: dict[str, Any]) -> None:
    conversation, parsed = to_conversation({"id": "x.1", prompt: "Q", reply: "A", **system})
    assert same(conversation, turns(*(["s:S"] if "S" in system.values() else []), "u:Q", "a:A"))
    assert parsed.columns == {prompt, reply, *(key for key, value in system.items() if value is not None)}


@pytest.mark.parametrize(
    ("role", "expected"),
    [(name, "user") for name in ("user", "human", "Prompter", " HUMAN ")]
    + [(name, "assistant") for name in ("assistant", "gpt", "ChatGPT", "bot", "model", "AI")]
    + [(name, "system") for name in ("system", "System", "developer")],
)
def test_roles_have_aliases_without_regard_to_case(role: str, expected: str) -> None:
    assert parse_turns(chat(message(role, "x"))).turns[0].role == expected


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "another key for the history": ({**PAIR, "chat_history": [["A?", "B."]]}, "chat_history"),
    "the history as one text": ({**PAIR, "previous": "User: A?"}, "previous"),
    "history beside messages": ({**chat(HUMAN, GPT), "history": [["A?", "B."]]}, "history"),
    "another key for the system text": ({**chat(HUMAN, GPT), "sys": "Be brief."}, "sys"),
    "a persona": ({**PAIR, "persona": "You are a pirate."}, "persona"),
    "another system text than the turns'": ({**chat(message("system", "A"), HUMAN, GPT), "system": "B"}, "system"),
    "two system texts": ({**PAIR, "system": "c", "system_prompt": "d"}, "system_prompt"),
    "another key for the flag": (chat(HUMAN, {**GPT, "trainable": False}), "trainable"),
    "a flag that is a number": (chat(HUMAN, {**GPT, "loss_weight": 0}), "loss_weight"),
    "a flag for each token": (chat(HUMAN, {**GPT, "loss_mask": [0, 1]}), "loss_mask"),
    "a mask by role": ({**chat(HUMAN, GPT), "mask": "User"}, "mask"),
    "half a weight": (chat(HUMAN, {**GPT, "weight": 0.5}), "weight"),
    "a weight of two": ({**PAIR, "weight": 2}, "weight"),
    "a weight in words": (chat(HUMAN, {**GPT, "train": "maybe"}), "train"),
    "flags that disagree": (chat(HUMAN, {**GPT, "train": True, "weight": 0}), "train"),
    "a second answer": ({**PAIR, "answer": "No."}, "answer"),
    "a better and a worse answer": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "chosen"),
    "a rejected answer": ({**PAIR, "rejected": "No."}, "rejected"),
    "answers of a preference pair": ({"prompt": "Why?", "chosen": [GPT], "rejected": [GPT]}, "chosen"),
    "a list of answers": ({"question": "Why?", "answers": {"text": ["So."], "start": [3]}}, "answers"),
    "a second question": ({**PAIR, "question": "How?"}, "question"),
    "both spellings of a content": (chat(HUMAN, {**GPT, "content": "No."}), "content"),
    "a thought beside the answer": (chat(HUMAN, {**GPT, "reasoning_content": "Hm."}), "reasoning_content"),
    "a thought beside the response": ({**PAIR, "thinking": {"steps": ["Hm."]}}, "thinking"),
    "text beside a pair": ({**PAIR, "text": "Below is an instruction."}, "text"),
    "a title beside a text": ({"text": "Once.", "title": "A tale"}, "title"),
    "a prompt beside messages": ({"prompt": "How?", **chat(HUMAN, GPT)}, "prompt"),
    "two lists of turns": ({**chat(HUMAN, GPT), **openai(("user", "How?"))}, "messages"),
    "turns within turns": (chat([HUMAN, GPT]), "conversations[0]"),
    "history of threes": ({**PAIR, "history": [["a", "b", "c"]]}, "history[0]"),
    "history of texts": ({**PAIR, "history": ["a", "b"]}, "history[0]"),
    "definitions of tools": ({**chat(HUMAN, GPT), "tools": [{"description": "Adds."}]}, "tools[0].description"),
    "a tool's turn": (chat(HUMAN, message("tool", "3"), GPT), "conversations[1].from"),
    "a call": (TOOL_CHAT, "tool_calls"),
    "an image": (openai(("user", [{"type": "image_url", "image_url": {"url": "x"}}]), ("assistant", "So.")), "image_url"),
    "a caption within a part": (openai(("user", [{"type": "text", "text": "Why?", "caption": "A cat"}])), "caption"),
    "an object for a text": ({"prompt": {"text": "Why?"}, "response": "So."}, "prompt"),
    "an unknown role": (chat(message("narrator", "Once."), HUMAN, GPT), "narrator"),
    "a label that isn't one": ({**PAIR, "source": "A whole passage.\nOf text."}, "source"),
    "text deep within metadata": ({**PAIR, "meta": {"id": "x", "notes": [{"note": "More."}]}}, "meta.notes[0].note"),
    "text for keys": ({**PAIR, "facts": {"Paris lies on the Seine": True}}, "facts"),
    "columns of no form": ({"headline": "Why?", "body": "So."}, "headline"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_would_be_lost_is_told_with_its_key(kind: str) -> None:
    row, key = UNKNOWN[kind]
    with pytest.raises(BadRow, match="expected") as caught:
        parse_turns(row)
    assert key in str(caught.value) and len(str(caught.value)) < 600


def test_unread_text_is_told_with_an_excerpt_and_both_ways_out() -> None:
    row = {**PAIR, "notes": "Because of rain. " * 20}
    with pytest.raises(
        BadRow, match=r"notes: .*Because of rain.*\.\.\..*dataset\.fields=\{FIELD: notes\}.*dataset\.ignore=\[notes\]"
    ):
        parse_turns(row)
    read = parse_turns(row, FormOptions({"context": "notes"}))
    assert "Because of rain." in read.turns[0].text and read.ignored == ()
    assert parse_turns(row, FormOptions(ignore=("notes",))).ignored == ("notes",)


@pytest.mark.parametrize(
    "key", ["notes", "my notes", "a,b", "odd: key", "blank ", "br[0]", "{x}", "it's", "dot.ted", "007", "null", "für"]
)
def test_the_way_out_that_is_told_is_one(key: str) -> None:
    """On a command line; and for text within a value, where the key of a part would leave the others, or be a form's own."""
    config = compose_config("cfg_pretrain_instruct", ["dataset=jsonl"])
    for value in ("Rain.", {"text": ["Rain."], "role": "Snow."}):
        for row in ({**PAIR, key: value}, chat({**HUMAN, key: value}, GPT)):
            with pytest.raises(BadRow) as caught:
                parse_turns(row)
            told = re.search(r"else leave it out with (.*)$", str(caught.value))
            assert told is not None
            options = form_options(override_config(config, [told[1]]).dataset)
            assert options.ignore == (key,) and same(parse_turns(row, options).turns, WHY_SO)


@pytest.mark.parametrize("field", ["history", "ignore"])
def test_the_ways_out_of_text_deep_within_a_key_work(field: str) -> None:
    """`past` is what `fields` can name; and to ignore `content` would be to read no message."""
    row = {**PAIR, "past": openai(("user", "A?"), ("assistant", "B."))["messages"]}
    with pytest.raises(BadRow, match=r"past\[0\]\.content: .*dataset\.fields=\{FIELD: past\}.*dataset\.ignore=\[past\]"):
        parse_turns(row)
    options = FormOptions(ignore=("past",)) if field == "ignore" else FormOptions({field: "past"})
    assert parse_turns(row, options).turns == (WHY_SO if field == "ignore" else (*turns("u:A?", "a:B."), *WHY_SO))


def test_the_way_out_that_is_told_beside_messages_or_text_works() -> None:
    """The key that isn't read has a field already, so that naming it would say nothing new."""
    asked = openai(("system", "Be."), ("user", "Why?"))
    expected = turns("s:Be.", "u:Why?", "a:So.")
    for row, conversation in (({**asked, "response": "So."}, expected), ({"text": "Why?", "response": "So."}, WHY_SO)):
        with pytest.raises(BadRow, match="a response isn't read beside") as caught:
            parse_turns(row)
        told = re.search(r"dataset\.fields=\{(\w+): (\w+)\}", str(caught.value))
        assert told is not None
        assert same(parse_turns(row, FormOptions({"prompt": told[2]})).turns, conversation) and told[1] == "prompt"
    both = {"text": "Once.", **chat(HUMAN, GPT)}
    with pytest.raises(BadRow, match=r"to read 'text' in its place, use dataset\.ignore=\[conversations\]"):
        parse_turns(both)
    assert parse_turns(both, FormOptions(ignore=("conversations",))).turns == turns("t:Once.")


def test_a_whole_conversation_in_place_of_a_response_asks_once() -> None:
    """As in preference data whose `chosen` begins with the prompt."""
    row = {"prompt": "Why?", "chosen": openai(("user", "Why?"), ("assistant", "So."))["messages"], "score": 1}
    assert same(parse_turns(row, FormOptions({"response": "chosen"})).turns, WHY_SO)
    asked = openai(("system", "Be."), ("user", "Why?"))["messages"]
    row = {"prompt": asked, "completion": [*asked, {"role": "assistant", "content": "So."}]}
    assert same(parse_turns(row).turns, turns("s:Be.", "u:Why?", "a:So."))
    row = {"prompt": "Why?", "completion": openai(("assistant", "So."), ("user", "Why?"), ("assistant", "So."))["messages"]}
    assert same(parse_turns(row).turns, turns("u:Why?", "a:So.", "u:Why?", "a:So."))
    row = {"prompt": "How?", "completion": openai(("user", "Why?"), ("assistant", "So."))["messages"]}
    assert same(parse_turns(row).turns, turns("u:How?", "u:Why?", "a:So."))


def test_a_repeat_of_whole_messages_is_known() -> None:
    """With the roles in it, which are no text."""
    row: dict[str, Any] = {"prompt": [HUMAN], "messages": [HUMAN, GPT]}
    assert same(parse_turns(row).turns, WHY_SO) and parse_turns(row).ignored == ("prompt",)
    with pytest.raises(BadRow, match=r"'Never said\.'"):
        parse_turns({**row, "prompt": [HUMAN, message("gpt", "Never said.")]})


def test_small_things_that_say_nothing_or_something() -> None:
    call_free = {"messages": [{"role": "user", "content": "Why?", "tool_calls": "[]"}, {"role": "assistant", "content": "So."}]}
    assert parse_turns(call_free).turns == WHY_SO
    assert parse_turns({"prompt": [], "input": "Why?", "output": "So."}).turns == WHY_SO
    with pytest.raises(BadRow, match=r"conversations\[0\]\.value: expected text, found null"):
        parse_turns(chat(message("human", None), GPT))
    with pytest.raises(BadRow, match='expected a part with a "text", found none'):
        parse_turns(openai(("user", [{"type": "text", "text": None}])))
    with pytest.raises(BadRow, match="Paris in France"):
        parse_turns(chat({**HUMAN, "options": {"Paris in France": None}}, GPT))
    assert parse_turns({**PAIR, "label": False}).ignored == ("label",), "it may say that the answer is bad"


def test_labels_and_repeats_are_known_and_counted() -> None:
    row = {
        **openai(("user", "Why?"), ("assistant", "So.")), "id": "a", "Source": "web", "prompt_id": "x", "category": ["qa", "short"],
        "prompt": "Why?", "score": 0.5, "good": True, "tags": [], "meta": {"license": "MIT"}, "n": [1, 2], "empty": " ",
    }  # fmt: skip
    row["messages"][0]["name"] = "Ann"
    assert parse_turns(row).ignored == ("Source", "category", "good", "id", "messages[].name", "meta", "prompt", "prompt_id")


def test_own_names_replace_the_usual_ones() -> None:
    row = {"pregunta": "Why?", "respuesta": "So.", "marco": "Rain.", "papel": "Be.", "prompt": "not asked"}
    fields: dict[FieldName, str] = {"prompt": "pregunta", "response": "respuesta", "context": "marco", "system": "papel"}
    with pytest.raises(BadRow, match="not asked"):
        parse_turns(row, FormOptions(fields))
    assert parse_turns(row, FormOptions(fields, ignore=("prompt",))).turns == turns("s:Be.", "u:Why?\n\nRain.", "a:So.")
    backwards = FormOptions({"prompt": "output", "response": "input"})
    assert parse_turns({"input": "So.", "output": "Why?"}, backwards).turns == WHY_SO
    spoken = {"dialog": [{"speaker": "human", "said": "Why?"}, {"speaker": "Sage", "said": "So.", "learn": "false"}]}
    names = FormOptions({"messages": "dialog", "role": "speaker", "content": "said", "train": "learn"}, {"sage": "assistant"})
    assert same(parse_turns(spoken, names).turns, turns("u:Why?", "c:So."))
    both = {**PAIR, "answer": "No."}
    assert parse_turns(both, FormOptions(ignore=("answer",))).turns == WHY_SO
    assert same(parse_turns(both, FormOptions({"response": "answer"}, ignore=("response",))).turns, turns("u:Why?", "a:No."))


def test_ignored_keys_within_turns() -> None:
    row = chat(HUMAN, {**GPT, "weight": 0.5, "thought": "Hm.", "rank": 3})
    parsed = parse_turns(row, FormOptions(ignore=("weight", "thought", "rank")))
    assert same(parsed.turns, WHY_SO) and parsed.ignored == ("conversations[].thought",)


@pytest.mark.parametrize(
    ("flag", "trained"),
    [
        ({"weight": 1}, True), ({"weight": 0}, False), ({"weight": "0"}, False), ({"weight": 1.0}, True),
        ({"weight": "0.0"}, False), ({"weight": "1.0"}, True),
        ({"weight": False}, False), ({"train": True}, True),
        ({"train": False}, False), ({"train": "False"}, False), ({"train": "TRUE"}, True),
        ({"loss": 1}, True), ({"loss": "0"}, False), ({"loss": None}, True), ({"loss": ""}, True),
        ({"mask": True}, False), ({"mask": 1}, False), ({"mask": "false"}, True), ({"mask": 0, "weight": 1}, True),
    ],
)  # fmt: skip
def test_flags_keep_a_turn_or_a_row_out_of_the_loss(flag: dict[str, Any], trained: bool) -> None:
    assert same(parse_turns(chat(HUMAN, {**GPT, **flag}, HUMAN, GPT)).turns[:2], turns("u:Why?", "a:So." if trained else "c:So."))
    if trained:
        assert same(to_conversation({**PAIR, **flag})[0], WHY_SO)
    else:
        for row in ({**PAIR, **flag}, {"text": "Once.", **flag}):
            with pytest.raises(NothingToLearn, match="no_supervised_answer"):
                to_conversation(row)


def test_turns_of_tools_are_refused_dropped_or_read() -> None:
    with pytest.raises(BadRow, match=r"messages\[1\] has the key .tool_calls.*tool_turns=drop.*tool_turns=as_user"):
        parse_turns(TOOL_CHAT)
    dropped = parse_turns(TOOL_CHAT, FormOptions(tool_turns="drop"))
    assert dropped.turns == turns("u:Add.", "a:It is 3.")
    assert dropped.ignored == ("messages[].role=tool", "messages[].tool_calls")
    read = parse_turns(TOOL_CHAT, FormOptions(tool_turns="as_user"))
    assert read.turns == turns("u:Add.", f"a:{json.dumps([CALL])}", "u:3", "a:It is 3.")
    shared = chat(HUMAN, message("function_call", "add(1, 2)"), message("observation", "3"), GPT)
    with pytest.raises(BadRow, match=r"conversations\[1\]\.from is .function_call"):
        parse_turns(shared)
    assert parse_turns(shared, FormOptions(tool_turns="drop")).turns == WHY_SO
    assert parse_turns(shared, FormOptions(tool_turns="as_user")).turns == turns("u:Why?", "a:add(1, 2)", "u:3", "a:So.")
    own = FormOptions(roles={"database": "tool"}, tool_turns="drop")
    assert parse_turns(chat(HUMAN, message("Database", "3"), GPT), own).turns == WHY_SO


def test_order_and_weights_are_kept_and_a_tail_without_an_answer_is_left_out() -> None:
    row = chat(
        message("system", "Sys", weight=None),
        message("human", "A", weight=0),
        message("gpt", "B", weight=0),
        message("human", "C", weight=None),
        message("gpt", "D", weight=1),
        message("human", "left without an answer"),
    )
    conversation, parsed = to_conversation(row)
    assert same(conversation, turns("s:Sys", "u:A", "c:B", "u:C", "a:D"))
    assert parsed.ignored == (UNANSWERED,) and len(parsed.turns) == 6


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(), "no_user_turn"),
        ({"conversations": None}, "no_user_turn"),
        (chat(message("system", "S"), GPT), "no_user_turn"),
        (chat(message("human", " \n"), GPT), "empty_prompt"),
        (chat(HUMAN), "no_answer"),
        (chat(GPT, HUMAN), "no_answer"),
        (chat(HUMAN, message("gpt", "  ")), "empty_answer"),
        (chat(HUMAN, message("gpt", "No.", weight=0)), "no_supervised_answer"),
        (chat(HUMAN, message("gpt", "No.", weight=0), HUMAN, message("gpt", "")), "no_supervised_answer"),
        ({"question": "Q"}, "no_answer"),
        ({"question": "Q", "answer": None}, "no_answer"),
        ({"question": None, "answer": "A"}, "no_user_turn"),
        ({"question": "Q", "response": ""}, "empty_answer"),
        ({"question": "", "response": "A"}, "empty_prompt"),
        ({"instruction": "", "input": " ", "output": "A"}, "empty_prompt"),
        ({"text": " \n"}, "empty_text"),
        ({"text": None}, "empty_text"),
    ],
)
def test_rows_with_nothing_to_learn_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(NothingToLearn) as caught:
        to_conversation(row)
    assert caught.value.reason == reason


def test_an_empty_answer_among_others_is_context() -> None:
    conversation, _ = to_conversation(chat(HUMAN, message("gpt", ""), HUMAN, GPT))
    assert [turn.supervised for turn in conversation if turn.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "unknown_form"),
        ({"answer": "c"}, "unknown_form"),
        ({"prompt": "a", "answer": 7}, "wrong_type"),
        ({"prompt": "a", "answer": ["b"]}, "wrong_type"),
        ({"prompt": "a", "answer": "b", "system": 3}, "wrong_type"),
        ({"prompt": "a", "answer": "\ud800"}, "bad_unicode"),
        ({"prompt": "a", "answer": "b", "history": [[1, "x"]]}, "wrong_type"),
        ({"prompt": "a", "answer": "b", "history": "Before."}, "wrong_type"),
        ({"conversations": {"from": "human"}}, "wrong_type"),
        ({"conversations": "human: a"}, "wrong_type"),
        ({"conversations": "[human: a"}, "wrong_type"),
        ({"conversations": '[{"from": "human", "value": "a", "value": "b"}]'}, "duplicate_key"),
        ({"conversations": ["hello"]}, "wrong_type"),
        (chat({"from": "human"}), "missing_key"),
        (chat({"value": "x"}), "missing_key"),
        (chat(message("human", None)), "missing_key"),
        (chat(message("human", 5)), "wrong_type"),
        (chat({"from": ["gpt"], "value": "x"}), "unknown_role"),
        (chat({"from": "gpt", "value": "x", "weight": [1]}), "wrong_type"),
        (chat({"from": "gpt", "value": "x", "weight": float("nan")}), "wrong_type"),
        (openai(("user", [7])), "wrong_type"),
    ],
)
def test_malformed_rows_have_a_reason_and_say_what_was_found(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match="expected") as caught:
        to_conversation(row)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 600


def test_a_row_nested_too_deeply_is_malformed() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadRow, match="nested too deeply"):
        parse_turns({**PAIR, "more": deep})


KEYS = [
    "messages", "conversations", "from", "role", "value", "content", "weight", "train", "prompt", "instruction", "input", "context",
    "answer", "output", "system", "history", "text", "type", "tool_calls", "id", "source", "dropped", "other",
]  # fmt: skip
# The strings of a turn that say what it is, not what it says.
SAYS_WHAT = {"from", "role", "type", *FLAGS}
strings = st.sampled_from(["user", "gpt", "human", "assistant", "text", "0", "true", "", "Why?", "So.", "two\nlines"]) | st.text(
    max_size=4
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "tool"]), "value": strings})
    | st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4),
    max_size=4,
)
rows = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5),
    st.builds(lambda turns, more: {**more, "messages": turns}, messages,
              st.dictionaries(st.sampled_from(KEYS), json_values, max_size=2)),
    st.builds(lambda row, more: {**more, **row}, st.fixed_dictionaries({"prompt": strings, "answer": strings}),
              st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3)),
)  # fmt: skip


def strings_of(value: Any, key: str = "") -> list[str]:
    """Every string that must be found again: all but those under labels' names, ignored keys, and what says what a turn is."""
    if key == "dropped" or (key.lower() in METADATA and isinstance(value, str) and "\n" not in value):
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        read = SAYS_WHAT if key else FLAGS
        return [text for name, member in value.items() if name not in read for text in strings_of(member, name)]
    return [text for item in value for text in strings_of(item, key)] if isinstance(value, list) else []


@given(rows)
@settings(max_examples=400, deadline=None)
def test_no_text_of_any_row_is_lost_without_a_sign(row: dict[str, Any]) -> None:
    try:
        parsed = parse_turns(row, FormOptions(ignore=("dropped",), tool_turns="as_user"))
    except BadRow as outcome:
        assert outcome.reason
        return
    said = "\n".join(turn.text for turn in parsed.turns)
    for text in strings_of(row):
        assert text.strip() in said or json.dumps(text, ensure_ascii=False) in said, text


@given(
    st.binary(max_size=40)
    | json_values.map(lambda value: json.dumps(value).encode())
    | rows.map(lambda row: json.dumps(row).encode())
)
@settings(max_examples=300, deadline=None)
def test_any_line_is_a_conversation_or_has_a_reason(line: bytes) -> None:
    try:
        conversation, parsed = to_conversation(parse_row(line))
    except (BadRow, NothingToLearn) as outcome:
        assert outcome.reason
    else:
        assert conversation[-1].role in ("assistant", "text") and parsed.form


def test_settings_become_options() -> None:
    overrides = [
        "dataset.fields={prompt: pregunta, response: respuesta}",
        "dataset.roles={Sage: assistant}",
        "dataset.ignore=[b,a]",
    ]
    config = compose_config("cfg_pretrain_instruct", ["dataset=jsonl", *overrides, "dataset.tool_turns=drop"])
    options = form_options(config.dataset)
    assert options == FormOptions({"prompt": "pregunta", "response": "respuesta"}, {"Sage": "assistant"}, "drop", ("a", "b"))
    # On top of a checkpoint's settings, too, whatever they name already.
    changed = override_config(config, ["dataset.fields={context: marco}", "dataset.ignore=[c]"]).dataset
    assert changed.fields == {"prompt": "pregunta", "response": "respuesta", "context": "marco"} and changed.ignore == ("c",)
    assert form_options(compose_config("cfg_pretrain_instruct").dataset) == FormOptions()


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("dataset.fields={promt: pregunta}", "promt"),
        ("dataset.roles={sage: wizard}", "wizard"),
        ("dataset.tool_turns=keep", "keep"),
        ("dataset.fields={prompt: a, response: a}", "name the key 'a' twice"),
    ],
)
def test_wrong_settings_are_told(override: str, fragment: str) -> None:
    with pytest.raises(UsageError) as told:
        compose_config("cfg_pretrain_instruct", [override])
    assert fragment in str(told.value)


def test_the_schema_knows_every_field() -> None:
    assert set(get_args(FieldName)) == set(FIELDS)
