"""Text as it forms: pieces that are never taken back, and together are the decoded ids up to the first stop string."""

import functools
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text.tokenizer import Tokenizer
from generation.text_stream import TextStream
from tests import tokenizer_files


def trained(**options: object) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few  words to train on", "and a few more <0xE2> words"] * 10),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return Tokenizer.from_bytes(model.getvalue())


LLAMA = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")
TOKENIZERS = {
    "llama": LLAMA,
    # Drops all blanks at the beginning of a text, not only one.
    "tidied": trained(byte_fallback=True, remove_extra_whitespaces=True),
    "no dummy prefix": trained(byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False),
    "no bytes": trained(user_defined_symbols=["<0xE2>"]),
    "json, byte level": Tokenizer.from_bytes(tokenizer_files.byte_level()),
    "json, byte fallback": Tokenizer.from_bytes(tokenizer_files.byte_fallback()),
    "json, unigram": Tokenizer.from_bytes(tokenizer_files.unigram()),
}
BYTES = {LLAMA.piece(token): token for token in range(LLAMA.vocab_size) if LLAMA.piece(token).startswith("<0x")}


def byte_ids(content: bytes) -> list[int]:
    return [BYTES[f"<0x{byte:02X}>"] for byte in content]


def pushed(ids: Sequence[int], stop: Sequence[str] = (), tokenizer: Tokenizer = LLAMA) -> tuple[list[str], TextStream]:
    """What each push returned, and last what finish did."""
    stream = TextStream(tokenizer, stop)
    return [*[stream.push(token) for token in ids], stream.finish()], stream


def cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


@functools.cache
def of_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids that are hard on a stream: any at all, bytes, blanks, control ids, and real text."""
    rare = [i for i in range(min(600, tokenizer.vocab_size)) if not tokenizer.piece(i).strip("\u2581") or i < 3]
    text = st.text(st.sampled_from("ab \n☃🫠\ufffdé"), max_size=6).map(tokenizer.encode)
    a_byte = st.sampled_from([i for i in range(tokenizer.vocab_size) if tokenizer.raw_bytes(i)] or rare)
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    parts = st.lists(st.one_of(text, *(s.map(lambda i: [i]) for s in (any_id, a_byte, st.sampled_from(rare)))), max_size=12)
    return parts.map(lambda lists: [token for ids in lists for token in ids])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=100)
def test_pieces_joined_are_the_decoded_ids_up_to_the_first_stop_string(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(of_ids(tokenizer))
    text = tokenizer.decode(ids)
    inside = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 5)).map(lambda at: text[at[0] : at[0] + at[1]] or "x")
    stop = data.draw(st.lists(inside | st.text("ab \ufffd", min_size=1, max_size=3), max_size=3))
    pieces, stream = pushed(ids, stop, tokenizer)
    assert "".join(pieces) == stream.text == cut(text, stop)
    assert stream.stopped == any(s in text for s in stop)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=20))
@settings(max_examples=200)
def test_text_is_out_as_soon_as_it_is_whole(text: str) -> None:
    """After every id, all is out but a character that lacks bytes."""
    ids, stream = LLAMA.encode(text), TextStream(LLAMA)
    for count, token in enumerate(ids, 1):
        stream.push(token)
        assert text.startswith(stream.text) and LLAMA.decode(ids[:count]).rstrip("\ufffd") in (
            stream.text,
            stream.text.rstrip("\ufffd"),
        )
    assert stream.text == text and stream.finish() == ""


def test_a_character_of_several_bytes_comes_out_once_and_whole() -> None:
    assert pushed(byte_ids("🫠é".encode()))[0] == ["", "", "", "🫠", "", "é", ""]
    level = TOKENIZERS["json, byte level"]
    assert pushed(level.encode("🫠é"), tokenizer=level)[0] == ["", "", "", "🫠", "", "é", ""]
    # A byte that follows could take the whole run back, as its library decodes it.
    fallback = TOKENIZERS["json, byte fallback"]
    assert pushed(fallback.encode("🫠é few"), tokenizer=fallback)[0] == ["", "", "", "", "", "", "", "🫠é few", ""]


@pytest.mark.parametrize(
    ("content", "pieces"),
    [
        (b"\xe2\x98", ["", "", "��"]),  # the answer ends in the middle of a character
        (b"\xe2A", ["", "�A", ""]),  # the next byte shows that it never becomes one
        (b"\xf0\x9f\xe2\x98\x83", ["", "", "��", "", "☃", ""]),
        (b"\x98", ["�", ""]),  # no character begins so
        ("\ufffd".encode(), ["", "", "�", ""]),
    ],
)
def test_bytes_that_are_no_character(content: bytes, pieces: list[str]) -> None:
    assert pushed(byte_ids(content))[0] == pieces


def test_a_real_replacement_character_is_not_held_back() -> None:
    ids = LLAMA.encode("\ufffd")
    assert LLAMA.piece(ids[-1]) == "\ufffd"
    assert pushed([*ids, *ids])[0] == ["", "�", " ", "�", ""]


def test_a_byte_that_lacks_bytes_is_held_back_and_nothing_else() -> None:
    hello = LLAMA.encode("Hello")
    assert pushed([*byte_ids(b"\xe2"), *hello, *byte_ids(b"\x98")])[0] == ["", "\ufffd Hello", "\ufffd", ""]
    spelled = TOKENIZERS["no bytes"]
    ids = [token for token in range(spelled.vocab_size) if spelled.piece(token) == "<0xE2>"]
    assert pushed(ids, tokenizer=spelled)[0] == ["<0xE2>", ""], "a plain piece that looks like a byte"


def test_only_the_first_blank_is_dropped() -> None:
    assert pushed(LLAMA.encode("Hello world") * 2)[0] == ["Hello", " world", " Hello", " world", ""]
    assert pushed([LLAMA.bos_id, *LLAMA.encode(" Hello")])[0] == ["", "", " Hello", ""]


def test_a_stop_string_across_tokens_is_held_until_it_is_certain() -> None:
    ids = byte_ids(b"one\nUSE\nUSER: two")
    pieces, stream = pushed(ids, ["\nUSER:"])
    assert pieces[:8] == ["o", "n", "e", "", "", "", "", "\nUSE"] and stream.text == "one\nUSE" and stream.stopped
    pieces, stream = pushed(ids[:-6], ["\nUSER:"])
    assert (pieces[-1], stream.text, stream.stopped) == ("\nUSE", "one\nUSE\nUSE", False), "finish gives what was held"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stops_after"),
    [
        ("abab!", ["ab"], "", 2),  # at the very beginning
        ("x", ["x"], "", 1),
        ("aab", ["ab"], "a", 3),
        ("aaab", ["aab"], "a", 4),  # begins anew within itself
        ("abcd", ["abcd", "bc"], "", 4),  # "bc" is whole first, but "abcd" began before
        ("abcx", ["abcd", "bc"], "a", 4),
        ("abc", ["abcd", "bc"], "a", None),  # decided by finish
        ("abc", ["a", "abc"], "", 1),
        ("xyz", ["zx"], "xyz", None),
    ],
)
def test_the_stop_string_that_begins_first_cuts(text: str, stop: list[str], expected: str, stops_after: int | None) -> None:
    stream = TextStream(LLAMA, stop)
    stopped_at = next((i for i, token in enumerate(byte_ids(text.encode()), 1) if (stream.push(token), stream.stopped)[1]), None)
    stream.finish()
    assert (stream.text, stopped_at) == (expected, stops_after)


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(LLAMA, ["b"])
    assert [stream.push(token) for token in byte_ids(b"abcb")] == ["a", "", "", ""] and stream.finish() == ""
    assert stream.text == "a" and stream.stopped


def test_one_token_may_hold_a_stop_string_and_more() -> None:
    hello = LLAMA.encode("Hello")
    assert len(hello) == 1
    pieces, stream = pushed(hello, ["el"])
    assert pieces == ["H", ""] and stream.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        TextStream(LLAMA, ["a", ""])


def test_an_empty_answer() -> None:
    assert pushed([], ["a"])[0] == [""]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: LLAMA.encode("word " * n)[:n],
        lambda n: byte_ids(b"\xf0" * n),
        lambda n: [LLAMA.encode("  a")[0]] * n,
    ],
)
def test_a_push_decodes_no_more_late_in_an_answer_than_early(
    make: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0
    real = Tokenizer.decode

    def decode(self: Tokenizer, ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return real(self, ids)

    ids = make(5000)
    expected = LLAMA.decode(ids)
    monkeypatch.setattr(Tokenizer, "decode", decode)
    begin = time.perf_counter()
    assert pushed(ids, ["never said", "\ufffdx"])[1].text == expected
    assert longest <= 8 and time.perf_counter() - begin < 5
