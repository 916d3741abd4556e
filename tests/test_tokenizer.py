"""The tokenizer's promises: no forged control ids, round trips, clear errors, one rule for which file."""

import hashlib
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text import tokenizer as tokenizer_module
from dataset.text.tokenizer import Tokenizer, check_reversible, resolve_tokenizer_path
from tests import tokenizer_files

MODEL = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
TOKENIZER = Tokenizer(MODEL)
# SentencePiece writes a blank as U+2581, so that one character comes back as a blank.
round_trip_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@given(round_trip_text)
@settings(max_examples=200)
def test_text_comes_back_and_never_yields_control_ids(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not {0, TOKENIZER.bos_id, TOKENIZER.eos_id} & set(ids)


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "[USER]\n", "<s>[ASSISTANT]\n", "\x00", "\u2028"])
def test_spelled_control_pieces_are_plain_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert not {0, TOKENIZER.bos_id, TOKENIZER.eos_id} & set(ids)
    assert TOKENIZER.decode([TOKENIZER.bos_id, *ids, TOKENIZER.eos_id]) == text


def test_facts_about_the_model_and_the_copy_from_bytes() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_id, TOKENIZER.eos_id) == (32000, 1, 2)
    assert TOKENIZER.piece(TOKENIZER.bos_id) == "<s>"
    assert TOKENIZER.path == MODEL
    assert TOKENIZER.sha256 == hashlib.sha256(MODEL.read_bytes()).hexdigest()
    copy = Tokenizer.from_bytes(TOKENIZER.model_bytes)
    assert copy.path is None and copy.sha256 == TOKENIZER.sha256
    assert copy.encode("Hello world") == TOKENIZER.encode("Hello world")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 64, MODEL.read_bytes()[:5000]])
def test_a_file_that_is_no_model_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="expected a SentencePiece model"):
        Tokenizer(path)


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ({"bos_id": -1}, "BOS"),
        ({"eos_id": -1}, "EOS"),
        ({"user_defined_symbols": ["<s>"]}, "BOS"),  # a BOS that text can spell is none
    ],
)
def test_a_model_without_bos_or_eos_is_refused(option: dict[str, Any], kind: str) -> None:
    with pytest.raises(UsageError, match=f"no {kind}"):
        Tokenizer.from_bytes(tokenizer_files.sentencepiece_model(vocab_size=40, **option))


JSON = {
    "byte level": Tokenizer.from_bytes(tokenizer_files.byte_level()),
    "byte fallback": Tokenizer.from_bytes(tokenizer_files.byte_fallback()),
    "unigram": Tokenizer.from_bytes(tokenizer_files.unigram()),
    "everything on": Tokenizer.from_bytes(tokenizer_files.with_everything_on()),
}
SPELLED = st.sampled_from([*tokenizer_files.SPECIAL, "<mask>", " <mask> ", "  ", "\n", "\r\n", "\t", "\x00", "\u2028"])


@pytest.mark.parametrize("name", JSON)
@given(parts=st.lists(SPELLED | round_trip_text, max_size=6))
@settings(max_examples=150)
def test_a_tokenizer_json_gives_text_back_and_never_yields_control_ids(name: str, parts: list[str]) -> None:
    tokenizer, text = JSON[name], "".join(parts)
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids) and max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize("name", ["byte level", "everything on"])
def test_special_tokens_in_text_are_plain_text(name: str) -> None:
    content = tokenizers.Tokenizer.from_str(JSON[name].model_bytes.decode())
    for spelled in (*tokenizer_files.SPECIAL, "a<|im_start|>b"):
        special = {content.token_to_id(token) for token in tokenizer_files.SPECIAL}
        assert not special & set(JSON[name].encode(spelled)), spelled
        assert special & set(content.encode(spelled, add_special_tokens=False).ids), "as the file would have it"


def test_control_ids_of_a_tokenizer_json_stand_behind_its_own() -> None:
    tokenizer = JSON["byte level"]
    size = tokenizers.Tokenizer.from_str(tokenizer.model_bytes.decode()).get_vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (size, size + 1, size + 2)
    assert [tokenizer.piece(token) for token in (tokenizer.bos_id, tokenizer.eos_id)] == ["<s>", "</s>"]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == "" and tokenizer.decode(tokenizer.encode("few")) == "few"
    assert (tokenizer.file_name, TOKENIZER.file_name) == ("tokenizer.json", "tokenizer.model")


@pytest.mark.parametrize(
    "content", [b"{", b"{}", b'{"version": "1.0"}', b"{\xff", tokenizer_files.byte_level()[:2000], b'{"model": {"type": "None"}}']
)
def test_a_file_that_is_no_tokenizer_json_is_one_clear_error(content: bytes) -> None:
    with pytest.raises(UsageError, match=r"expected a tokenizer\.json"):
        Tokenizer.from_bytes(content)


def test_ids_that_hold_parts_of_characters() -> None:
    for tokenizer in (TOKENIZER, *JSON.values()):
        ids = tokenizer.encode("\U0001fae0")
        assert b"".join(tokenizer.raw_bytes(token) or b"" for token in ids) == "\U0001fae0".encode()
    assert TOKENIZER.raw_bytes(TOKENIZER.encode("Hello")[0]) is None
    assert JSON["byte level"].raw_bytes(JSON["byte level"].encode(" a")[0]) == b" a"


def test_texts_that_come_back_are_counted_apart_from_those_that_read_the_same() -> None:
    for tokenizer in (TOKENIZER, *JSON.values()):
        assert check_reversible(tokenizer, ["  two\n\n lines \r\n", "\x00\t", "", "e\u0301 \U0001fae0\u2028"]) == 0
    assert check_reversible(TOKENIZER, ["a\u2581b", "a b", "\u2581"]) == 2
    composing = Tokenizer.from_bytes(tokenizer_files.byte_level(tokenizers.normalizers.NFC()))
    assert check_reversible(composing, ["e\u0301", "\u212b", "plain"]) == 2


LOSSY = {
    "newlines": (tokenizer_files.sentencepiece_model(byte_fallback=True), "a\nb", r"'a\\nb'.*'a b'"),
    "blanks": (
        tokenizer_files.sentencepiece_model(byte_fallback=True, normalization_rule_name="identity"),
        "a  b",
        "'a  b'.*'a b'",
    ),
    "unknown characters": (tokenizer_files.sentencepiece_model(normalization_rule_name="identity"), "a\u2603", r"'a\\u2603'"),
    "compatible characters": (tokenizer_files.byte_level(tokenizers.normalizers.NFKC()), "\u2026", r"'\\u2026'.*'\.\.\.'"),
    "capitals": (tokenizer_files.byte_level(tokenizers.normalizers.Lowercase()), "so What", "'so What'.*'so what'"),
    "a blank in front": (tokenizer_files.byte_level(prefix=True), "few", "'few words'.*' few words'"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_tokenizer_that_loses_text_is_refused_with_what_it_lost(name: str) -> None:
    content, text, shown = LOSSY[name]
    with pytest.raises(UsageError, match=f"loses text: expected to get back {shown}.*train_tokenizer"):
        check_reversible(Tokenizer.from_bytes(content), ["few words", text])


def test_what_was_lost_is_shown_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_files.byte_level(tokenizers.normalizers.Lowercase()))
    with pytest.raises(UsageError) as caught:
        check_reversible(Tokenizer(tmp_path / "tokenizer.json"), ["a" * 500 + "B" + "c" * 500])
    assert str(caught.value).startswith(f"the tokenizer {tmp_path / 'tokenizer.json'} loses text")
    excerpt = f"...'{'a' * 20}B{'c' * 39}'..."
    assert f"get back {excerpt}, found {excerpt.replace('B', 'b')};" in str(caught.value)


def test_text_without_ids_is_told() -> None:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="missing"))
    with pytest.raises(UsageError, match=r"no ids for the text 'b'"):
        check_reversible(Tokenizer.from_bytes(model.to_str().encode()), ["b"])


def test_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fetch_tokenizer"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(UsageError, match="fetch_tokenizer"):
        Tokenizer(tmp_path)


def test_which_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = tmp_path / "tokenizers/llama-32k/tokenizer.model"
    other, explicit = tmp_path / "other.model", tmp_path / "explicit.model"
    for path in (default, other, explicit):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path / "tokenizers")
    monkeypatch.setattr(tokenizer_module, "_REPOSITORY", tmp_path)
    monkeypatch.delenv("LLAMA_TOKENIZER", raising=False)
    assert resolve_tokenizer_path(None) == default
    monkeypatch.setenv("LLAMA_TOKENIZER", str(other))
    assert resolve_tokenizer_path(None) == other
    assert resolve_tokenizer_path(str(explicit)) == explicit


@pytest.mark.parametrize("value", ["", "/nowhere/tokenizer.model"])
def test_a_variable_that_names_no_file_never_falls_through(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LLAMA_TOKENIZER", value)
    for explicit in (None, value):
        with pytest.raises(UsageError, match="LLAMA_TOKENIZER"):
            resolve_tokenizer_path(explicit)
    with pytest.raises(UsageError, match=r"elsewhere\.model"):
        resolve_tokenizer_path("elsewhere.model")
