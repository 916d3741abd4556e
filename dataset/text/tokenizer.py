"""The tokenizer: its file, its hash, special ids that text can't forge, and a check that it is
lossless.

`resolve_tokenizer_path` decides which file is used. Knows no templates, conversations or models.
"""

import codecs
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from sentencepiece import SentencePieceProcessor

from config.errors import UsageError

TOKENIZER_VARIABLE = "LLAMA_TOKENIZER"
DEFAULT_TOKENIZER = Path("tokenizers/llama-32k/tokenizer.model")
_REPOSITORY = Path(__file__).resolve().parents[2]
_HOW_TO_GET_ONE = "run `python scripts/fetch_tokenizer.py`, or name a SentencePiece model or a tokenizer.json"


def resolve_tokenizer_path(explicit: str | None) -> Path:
    """The tokenizer file: `explicit`, else $LLAMA_TOKENIZER, else `DEFAULT_TOKENIZER`. Raises `UsageError`
    for a named file that is missing: with the next choice, ids would silently be wrong.
    """
    from_environment = os.environ.get(TOKENIZER_VARIABLE)
    if explicit is not None and explicit != from_environment:
        named, origin = explicit, "the tokenizer path"
    elif from_environment is not None:
        named, origin = from_environment, f"the environment variable {TOKENIZER_VARIABLE}"
    else:
        named, origin = str(DEFAULT_TOKENIZER), "the default tokenizer path"
    path = Path(named).expanduser()
    if named == str(DEFAULT_TOKENIZER) and not path.is_file():
        path = _REPOSITORY / DEFAULT_TOKENIZER
    if not named or not path.is_file():
        unset = f" or unset {TOKENIZER_VARIABLE}" if TOKENIZER_VARIABLE in origin else ""
        raise UsageError(f"{origin} names {named!r}, which is not a file; {_HOW_TO_GET_ONE}{unset}")
    return path


class Tokenizer:
    """A SentencePiece model or a tokenizer.json, with BOS and EOS, which `encode` never returns.

    Raises `UsageError` if the file is missing or neither of the two, and for a SentencePiece model
    without BOS or EOS.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path | None = Path(path)
        if not self.path.is_file():
            raise UsageError(f"no tokenizer at {str(path)!r}; {_HOW_TO_GET_ONE}")
        try:
            model_bytes = self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"the tokenizer {str(path)!r} can't be read: {error}") from error
        self._load(model_bytes, str(path))

    @classmethod
    def from_bytes(cls, model_bytes: bytes, name: str = "tokenizer bytes") -> Self:
        """A tokenizer from the content of a file, as in a checkpoint; its `path` is None."""
        tokenizer = cls.__new__(cls)
        tokenizer.path = None
        tokenizer._load(model_bytes, name)
        return tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_bytes, (self.model_bytes,)

    def _load(self, model_bytes: bytes, name: str) -> None:
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self._backend = (_TokenizerJson if model_bytes.startswith(b"{") else _SentencePiece)(model_bytes, name)
        self.file_name = self._backend.file_name
        self.vocab_size = self._backend.vocab_size
        self.bos_id, self.eos_id = self._backend.bos_id, self._backend.eos_id

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        return self._backend.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without BOS and EOS; incomplete UTF-8 becomes U+FFFD."""
        return self._backend.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        """The piece of an id, for display."""
        return self._backend.piece(int(token))

    def raw_bytes(self, token: int) -> bytes | None:
        """The bytes of an id that may be part of a character; None for an id of whole characters."""
        return self._backend.raw_bytes(int(token))

    def unsettled(self, ids: Sequence[int]) -> int:
        """How many of the last ids may decode to other text once more ids follow, because they end
        within a character.

        ids: those since `unsettled` last returned 0, or since the last ones that it counted.
        """
        raw = [self.raw_bytes(token) for token in ids]
        run = raw[len(raw) - next((back for back, piece in enumerate(reversed(raw)) if piece is None), len(raw)) :]
        if self._backend.bytes_stay_open:
            return len(run)
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(b"".join(piece for piece in run if piece is not None))
        lacking = len(utf8.getstate()[0])
        if not lacking:
            return 0
        sizes = [len(piece) for piece in run if piece is not None]
        # A character may begin within an id. That id waits too, with all ids before it that end
        # within a character.
        return next((count for count in range(1, len(sizes)) if sum(sizes[-count:]) == lacking), len(sizes))


class _SentencePiece:
    file_name = "tokenizer.model"
    bytes_stay_open = False

    def __init__(self, model_bytes: bytes, name: str) -> None:
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError as error:
            raise UsageError(
                f"{name}: expected a SentencePiece model or a tokenizer.json, found {len(model_bytes)} bytes of something else; "
                f"{_HOW_TO_GET_ONE}"
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        # Both are control pieces, which text never matches; SentencePiece rejects other kinds.
        for kind, token in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if token < 0:
                raise UsageError(f"{name}: the model has no {kind} piece; use one trained with both BOS and EOS")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))

    def piece(self, token: int) -> str:
        return str(self._processor.id_to_piece(token))

    def raw_bytes(self, token: int) -> bytes | None:
        # Such a piece is spelled "<0xE2>".
        return bytes.fromhex(self.piece(token)[3:5]) if self._processor.is_byte(token) else None


class _TokenizerJson:
    """A tokenizer.json of Hugging Face `tokenizers`.

    BOS and EOS are two new ids after the file's. Text can produce those of the file in some kinds
    of model; some files have only one of the two, and most don't say which token it is.
    """

    file_name = "tokenizer.json"

    def __init__(self, model_bytes: bytes, name: str) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_str(model_bytes.decode("utf-8"))
        except Exception as error:  # the library raises no narrower class
            raise UsageError(
                f"{name}: expected a tokenizer.json of Hugging Face tokenizers, found something else: {error}"
            ) from error
        # Add nothing to text and remove nothing from it; treat special tokens as plain text; make
        # encoding deterministic.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        if getattr(self._backend.model, "dropout", None):
            self._backend.model.dropout = None
        self.bos_id = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_id = self.bos_id + 1
        self.vocab_size = self.eos_id + 1
        decoder = self._backend.decoder.__getstate__() if self._backend.decoder is not None else b""
        self._is_byte_level = b'"ByteLevel"' in decoder
        # The library decodes a run of byte pieces at once: an invalid byte would remove its valid
        # characters too.
        self.bytes_stay_open = b'"ByteFallback"' in decoder

    def encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # some models have no id for unknown text
            raise UsageError(
                f"the tokenizer.json has no ids for the text {_excerpt(text, 0)}: {error}; use another: {_REVERSIBLE}"
            ) from error
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._backend.decode([token for token in ids if token < self.bos_id], skip_special_tokens=False))

    def piece(self, token: int) -> str:
        controls = {self.bos_id: "<s>", self.eos_id: "</s>"}
        return controls.get(token) or self._backend.id_to_token(token) or ""

    def raw_bytes(self, token: int) -> bytes | None:
        if token >= self.bos_id:
            return b""  # decoding joins the text around it
        piece = self.piece(token)
        if self._is_byte_level:
            # An added token may have characters outside the 256: it is its own text.
            return bytes(_BYTE_OF[char] for char in piece) if _BYTE_OF.keys() >= set(piece) else piece.encode()
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece) if self.bytes_stay_open else None
        return bytes.fromhex(byte[1]) if byte else None


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level BPE; visible Latin-1 characters are themselves."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
TOKENIZER_FILES = (_SentencePiece.file_name, _TokenizerJson.file_name)
"""File names of a stored tokenizer."""


def check_reversible(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """Raise `UsageError` if decoding a text's ids doesn't return the text, with the loss.

    Two changes are allowed, because the text reads the same: U+2581, SentencePiece's space, may
    become a space, and characters may change to another canonical form (NFC). Returns the number of
    texts with such changes.
    """
    changed = 0
    for text in texts:
        found = tokenizer.decode(tokenizer.encode(text))
        if text == found:
            continue
        if _as_read(text) != _as_read(found):
            at = next((at for at, (a, b) in enumerate(zip(text, found, strict=False)) if a != b), min(len(text), len(found)))
            raise UsageError(
                f"the tokenizer{f' {tokenizer.path}' if tokenizer.path else ''} loses text: expected to get back "
                f"{_excerpt(text, at)}, found {_excerpt(found, at)}; use one that keeps text as it is: {_REVERSIBLE}"
            )
        changed += 1
    return changed


_REVERSIBLE = "`python scripts/train_tokenizer.py` trains one, `python scripts/fetch_tokenizer.py` gets one"


def _as_read(text: str) -> str:
    return unicodedata.normalize("NFC", text.replace("\u2581", " "))


def _excerpt(text: str, at: int) -> str:
    begin, end = max(0, at - 20), at + 40
    return ("..." if begin else "") + ascii(text[begin:end]) + ("..." if end < len(text) else "")
