"""The tokenizer's promises: no forged control ids, round trips, clear errors, one rule for which file."""

import hashlib
import io
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text import tokenizer as tokenizer_module
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path

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


def test_batches_equal_single_calls() -> None:
    texts = ["one", "", "two\nlines", "☃"]
    rows = TOKENIZER.encode_batch(texts)
    assert rows == [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.decode_batch(rows) == texts
    assert TOKENIZER.encode_batch([]) == [] and TOKENIZER.decode_batch([]) == []


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


def trained(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words to train on", "and a few more words"] * 10),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ({"bos_id": -1}, "BOS"),
        ({"eos_id": -1}, "EOS"),
        ({"user_defined_symbols": ["<s>"]}, "BOS"),  # a BOS that text can spell is none
    ],
)
def test_a_model_without_bos_or_eos_is_refused(option: dict[str, object], kind: str) -> None:
    with pytest.raises(UsageError, match=f"no {kind}"):
        Tokenizer.from_bytes(trained(**option))


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
