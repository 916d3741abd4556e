"""Files of tokenizers that are made here: SentencePiece models, and tokenizer.json of the two usual kinds."""

import io
import json
from collections.abc import Callable
from typing import Any

from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["a few  words to train on", "and a few\nmore words, 12 or 13", "What is 3 plus 4? It's 7."] * 10
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>"]


def sentencepiece_model(**options: Any) -> bytes:
    """A SentencePiece model with the trainer's defaults, but for `options`."""
    model = io.BytesIO()
    defaults = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **{**defaults, **options})
    return model.getvalue()


def _json(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None] | None = None) -> bytes:
    content = json.loads(tokenizer.to_str())
    if change is not None:
        change(content)
    return json.dumps(content, ensure_ascii=False).encode()


def byte_level(normalizer: Any = None, *, prefix: bool = False, **model: Any) -> bytes:
    """Of GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    return _json(tokenizer)


def _blanks_of_sentencepiece(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def byte_fallback() -> bytes:
    """Of LLaMA's kind: blanks are U+2581, one is put in front, and rare characters are spelled in byte pieces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    _blanks_of_sentencepiece(tokenizer)
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *pieces], show_progress=False)
    )

    def only_bytes_in_the_vocabulary(content: dict[str, Any]) -> None:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]

    return _json(tokenizer, only_bytes_in_the_vocabulary)


def unigram() -> bytes:
    """A model whose vocabulary has the control pieces within reach of text, as SentencePiece's converted ones do."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("\u2581", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    _blanks_of_sentencepiece(tokenizer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return _json(tokenizer)


def with_everything_on() -> bytes:
    """One that cuts, pads, draws, and adds tokens of its own to each text, and strips around others."""
    tokenizer = Tokenizer.from_str(byte_level(dropout=0.5).decode())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    return _json(tokenizer)
