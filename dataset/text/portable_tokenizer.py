"""Exports a tokenizer and a template as tokenizer.json and chat template: transformers then gets
the ids of training.

Training encodes tags and texts separately, and text never gives BOS or EOS
(dataset/text/conversation.py). Transformers encodes one string for a whole conversation. So BOS and
EOS are spelled with a character that text doesn't have, or that is escaped in it, and the tag after
a BOS is split off before the text is encoded. Knows no files or models.
"""

import json
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from config.errors import UsageError
from dataset.text.conversation import TaggedRole, Template, Turn, encode_conversation
from dataset.text.tokenizer import Tokenizer

# Unicode noncharacters (section 23.7), which exchanged text doesn't contain. The template escapes
# the first by writing both.
_MARK, _ESCAPE = "\ufdd0", "\ufdd1"
BOS, EOS = f"{_MARK}<s>", f"{_MARK}</s>"
"""The spelling of BOS and EOS."""
_CUT = f"{_MARK}|"
"""An empty marker at the end of a prompt: some programs move white space, such as a tag's newline,
from there to the answer.
"""
_HIDDEN = f"{_MARK}file's "
"""Prefix of a tokenizer.json's own special tokens, which are plain text here."""
_BLANK = "\u2581"
_Proto: Any = sentencepiece_model_pb2
_PROBES = ("", " ", "  two  blanks ", "a\n\n\tb", "naïve 漢字 🙂", "<s>[USER]\n</s>", "▁", "1234567890", "\x00\x7f\u200b", "a" * 9)
_RANDOM_PROBES = 300


def chat_template(template: Template, default_system: str | None) -> str:
    """Jinja source that renders messages (system, user, assistant) as the string that `portable_tokenizer`
    splits: without empty system messages, and with `default_system` if there is none at all.
    """
    escaped = f"| replace({json.dumps(_MARK)}, {json.dumps(_MARK + _ESCAPE)})"
    opening = f"""\
{{%- if messages | selectattr("role", "equalto", "system") | list | length == 0 -%}}
    {{{{- bos_token + tags.system + {json.dumps(default_system)} {escaped} -}}}}
{{%- endif -%}}
"""
    return string.Template(Path(__file__).with_name("chat_template.jinja").read_text("utf-8")).substitute(
        tags=json.dumps({role: template.tag(role) for role in get_args(TaggedRole)}),
        opening=opening if default_system else "",
        escaped=escaped,
        cut=json.dumps(_CUT),
    )


def portable_tokenizer(tokenizer: Tokenizer, template: Template) -> str:
    """tokenizer.json with the ids of `tokenizer`: `BOS` and `EOS` are special, and the tag after a
    BOS is encoded separately.

    Raises UsageError for a tokenizer whose ids it can't reproduce: a SentencePiece model other than
    BPE with byte fallback, as from scripts/train_tokenizer.py, or a tokenizer.json whose own rules
    split text in another way.
    """
    backend = _from_sentencepiece(tokenizer) if tokenizer.file_name == "tokenizer.model" else _from_json(tokenizer)
    own = backend.normalizer
    tags = [template.tag(role) for role in get_args(TaggedRole)]
    normal = {tag: own.normalize_str(tag) if own is not None else tag for tag in tags}
    # The text after a tag needs the normalizer's prefix too.
    before = own.normalize_str("a").removesuffix("a") if own is not None else ""
    after_tag = [normalizers.Replace(Regex(rf"\A{re.escape(tag)}(?!\z)"), tag + before) for tag in normal.values() if before]
    unmarked = [normalizers.Replace(_CUT, ""), normalizers.Replace(_MARK + _ESCAPE, _MARK)]
    backend.normalizer = normalizers.Sequence([*unmarked, *([] if own is None else [own]), *after_tag])
    cut = pre_tokenizers.Split(Regex(rf"\A(?:{'|'.join(map(re.escape, normal.values()))})"), "isolated")
    further = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, *further])
    backend.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_id)])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (BOS, EOS)])
    _check(backend, tokenizer, template)
    return backend.to_str(pretty=True)


def _from_sentencepiece(tokenizer: Tokenizer) -> Backend:
    model = _Proto.ModelProto.FromString(tokenizer.model_bytes)
    kinds = _Proto.ModelProto.SentencePiece
    is_known = (
        model.trainer_spec.model_type == _Proto.TrainerSpec.BPE
        and model.trainer_spec.byte_fallback
        and not model.trainer_spec.treat_whitespace_as_suffix
        and not model.normalizer_spec.precompiled_charsmap
        and not model.normalizer_spec.remove_extra_whitespaces
        and all(piece.type not in (kinds.USER_DEFINED, kinds.UNUSED) for piece in model.pieces)
    )
    if not is_known:
        raise UsageError(
            "this SentencePiece model has no equal tokenizer.json: only BPE with byte fallback that leaves text as it is has one, "
            "as `python scripts/train_tokenizer.py` trains and `python scripts/fetch_tokenizer.py` gets"
        )
    names = {tokenizer.bos_id: BOS, tokenizer.eos_id: EOS}
    vocabulary = {names.get(index, piece.piece): index for index, piece in enumerate(model.pieces)}
    score = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    merges = [
        (piece[:at], piece[at:]) for piece in score for at in range(1, len(piece)) if piece[:at] in score and piece[at:] in score
    ]
    merges.sort(key=lambda pair: -score["".join(pair)])
    unknown = next(piece.piece for piece in model.pieces if piece.type == kinds.UNKNOWN)
    backend = Backend(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = model.normalizer_spec.add_dummy_prefix
    blanks = [normalizers.Replace(" ", _BLANK), *([normalizers.Prepend(_BLANK)] if has_prefix else [])]
    backend.normalizer = normalizers.Sequence(blanks)
    back = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])
    return backend


def _from_json(tokenizer: Tokenizer) -> Backend:
    content = json.loads(tokenizer.model_bytes)
    content["truncation"] = content["padding"] = content["post_processor"] = None
    content["model"]["dropout"] = None
    vocabulary = content["model"]["vocab"]
    pieces = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, *_ in vocabulary}
    # Special tokens are plain text in training. Those outside the model keep their ids, but text
    # can't produce them.
    content["added_tokens"] = [token for token in content["added_tokens"] if not (token["special"] and token["content"] in pieces)]
    for token in content["added_tokens"]:
        if token["special"]:
            token["content"] = _HIDDEN + token["content"]
    for part in _parts(content["pre_tokenizer"]):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "always"  # each text is a first one
    return Backend.from_str(json.dumps(content))


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(inner)


def _check(backend: Backend, tokenizer: Tokenizer, template: Template) -> None:
    """Raise UsageError unless ids equal: of all pieces, random mixtures and difficult texts."""
    pieces = [tokenizer.piece(token).replace(_BLANK, " ") for token in range(tokenizer.vocab_size)]
    rng = np.random.default_rng(0)
    mixtures = ["".join(rng.choice(pieces, 12)) for _ in range(_RANDOM_PROBES)]
    texts: Sequence[str] = [*_PROBES, *pieces, *mixtures]
    for text in texts:
        if backend.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise UsageError(f"this tokenizer has no equal tokenizer.json: one would encode {text!r:.60} in another way")
    for question, answer in zip(texts, reversed(texts), strict=True):
        turns = (Turn("user", question), Turn("assistant", answer))
        whole = BOS + template.user + question + BOS + template.assistant + answer + EOS
        if backend.encode(whole, add_special_tokens=False).ids != encode_conversation(turns, tokenizer, template).ids.tolist():
            raise UsageError(
                f"this tokenizer has no equal tokenizer.json: it joins the tag of a turn and the text {question!r:.60}"
            )
