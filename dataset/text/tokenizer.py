"""The SentencePiece tokenizer: its file, its hash, and ids that text alone can't forge.

Which tokenizer file is used is decided in `resolve_tokenizer_path`. This file must not know templates,
conversations or models.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from config.errors import UsageError

TOKENIZER_VARIABLE = "LLAMA_TOKENIZER"
DEFAULT_TOKENIZER = Path("tokenizers/llama-32k/tokenizer.model")
_REPOSITORY = Path(__file__).resolve().parents[2]
_HOW_TO_GET_ONE = "run `python scripts/fetch_tokenizer.py`, or name a SentencePiece model file"


def resolve_tokenizer_path(explicit: str | None) -> Path:
    """The tokenizer file: `explicit`, else $LLAMA_TOKENIZER, else tokenizers/llama-32k/tokenizer.model.

    A named file that is missing is an error and is never replaced by the next choice: other ids would
    train or read a model without a sign. Raises `UsageError`.
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
    """A SentencePiece model with BOS and EOS. `encode` never yields these two, whatever the text.

    Raises `UsageError` when the file is missing, is no SentencePiece model, or has no BOS or EOS piece.
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
    def from_bytes(cls, model_bytes: bytes, name: str = "tokenizer bytes") -> "Tokenizer":
        """A tokenizer from a model held in memory (a checkpoint keeps one); its `path` is None."""
        tokenizer = cls.__new__(cls)
        tokenizer.path = None
        tokenizer._load(model_bytes, name)
        return tokenizer

    def _load(self, model_bytes: bytes, name: str) -> None:
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError as error:
            raise UsageError(
                f"{name}: expected a SentencePiece model, found {len(model_bytes)} bytes of something else; {_HOW_TO_GET_ONE}"
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        # Both are control pieces (SentencePiece reports any other kind as missing), which text never matches.
        for kind, token in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if token < 0:
                raise UsageError(f"{name}: the model has no {kind} piece; use one trained with both BOS and EOS")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS. With byte fallback (LLaMA's kind) never the unknown id."""
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode`."""
        # One thread: a caller decides how many cores tokenization may take.
        return list(self._processor.encode(list(texts), num_threads=1)) if texts else []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; BOS and EOS are left out, incomplete UTF-8 becomes U+FFFD."""
        return str(self._processor.decode([int(token) for token in ids]))

    def decode_batch(self, rows: Sequence[list[int]]) -> list[str]:
        """Text of each row, as `decode`."""
        return list(self._processor.decode(list(rows), num_threads=1)) if rows else []

    def piece(self, token: int) -> str:
        """The piece behind an id, for showing a token to a person."""
        return str(self._processor.id_to_piece(int(token)))
