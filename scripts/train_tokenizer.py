"""Train a SentencePiece tokenizer on the training rows of conversation data, or trim one to the
pieces that they use.

    python scripts/train_tokenizer.py --vocab-size 4096 --data FOLDER_OR_FILE [--output FILE] [KEY=VALUE ...]
    python scripts/train_tokenizer.py --trim [--min-count N] --data FOLDER_OR_FILE [--output FILE] [KEY=VALUE ...]

Settings are those of a training run (dataset=slimorca, dataset.seed=1, ...); with the same ones,
held-out rows aren't used. --data is short for dataset=jsonl with this folder or file. A run uses
the model with dataset.tokenizer_path=FILE.
"""

import argparse
import hashlib
import heapq
import io
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from artifacts.files import whole_file  # noqa: E402
from config.compose import compose_config  # noqa: E402
from config.errors import UsageError, one_clear_message  # noqa: E402
from config.schema import PretrainInstructConfig, user_path  # noqa: E402
from dataset.instruct import sources_of  # noqa: E402
from dataset.text.conversation import TaggedRole, Template  # noqa: E402
from dataset.text.token_cache import Split  # noqa: E402
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path  # noqa: E402
from models.act import RecursiveModel  # noqa: E402
from training.estimate import count_parameters  # noqa: E402

_HELD_OUT_ROWS = 2000
# SentencePiece skips sentences with these characters: borders and unknown characters.
_RESERVED = re.compile("[\t\0\u2585]")
Row = tuple[str, ...]
_NO_ROWS = "expected training rows, found none: check the data and dataset.test_ratio"
_Proto: Any = sentencepiece_model_pb2


def train_tokenizer(rows: Sequence[Row], vocab_size: int) -> Tokenizer:
    """Train a lossless BPE model (except for U+2581). The same rows give the same model, byte for
    byte.

    rows: texts of the turns. Rare characters are encoded as bytes. BOS and EOS are control pieces.
    Raises `UsageError` for no text, and for a vocabulary that is too large or too small for it.
    """
    if not any(map(any, rows)):
        raise UsageError(_NO_ROWS)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(part for row in rows for text in row for part in _RESERVED.split(text) if part),
            model_writer=model,
            vocab_size=vocab_size,
            # A unigram model took 20 times as long to train, and gave no fewer tokens.
            model_type="bpe",
            byte_fallback=True,
            # Keep text unchanged: no Unicode normalization, no removal of spaces or newlines.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # A text's first word has the same ids as elsewhere; decoding removes the space.
            add_dummy_prefix=True,
            # Split numbers into digits.
            split_digits=True,
            max_sentence_length=1 << 30,  # longer ones would be skipped
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        found = re.search(r"Vocabulary size (?:too high .*<= (\d+)|is smaller than required_chars\. \d+ vs (\d+))", str(error))
        if found is None:
            raise UsageError(f"SentencePiece can't train on this data: {error}") from error
        limit = f"at most {found[1]}" if found[1] else f"at least {found[2]}"
        raise UsageError(f"--vocab-size {vocab_size}: expected {limit} for this data") from error
    return Tokenizer.from_bytes(model.getvalue())


def trim_tokenizer(tokenizer: Tokenizer, rows: Sequence[Row], min_count: int = 1) -> Tokenizer:
    """The tokenizer without the pieces that neither `rows`, the template nor ASCII characters need.

    rows: texts of the turns. They keep the pieces that occur at least `min_count` times, with other
    ids; other text is encoded in smaller pieces or bytes, and decodes as before. Raises `UsageError` for no rows, and unless the
    tokenizer is a SentencePiece BPE model with byte fallback: with another kind, fewer pieces could
    change the encoding of the rows, or make text unknown.
    """
    model = _Proto.ModelProto()
    try:
        model.ParseFromString(tokenizer.model_bytes)
    except DecodeError:
        model.Clear()
    if model.trainer_spec.model_type != _Proto.TrainerSpec.BPE or not model.trainer_spec.byte_fallback:
        raise UsageError(
            f"--trim: {tokenizer.path} isn't a SentencePiece model of the kind BPE with byte fallback: name one by "
            "dataset.tokenizer_path"
        )
    if not rows:
        raise UsageError(_NO_ROWS)
    template = Template()
    always = (*map(template.tag, get_args(TaggedRole)), *map(chr, range(32, 127)))
    counts = Counter(token for row in rows for text in row for token in tokenizer.encode(text))
    used = {token for token, count in counts.items() if count >= min_count}.union(*map(tokenizer.encode, always))
    rank = {piece.piece: -piece.score for piece in model.pieces if piece.type == _Proto.ModelProto.SentencePiece.NORMAL}
    kept = set[str]()
    for token in used:
        kept.update(merged_from(model.pieces[token].piece, rank))
    pieces = [piece for piece in model.pieces if piece.piece in kept or piece.type != _Proto.ModelProto.SentencePiece.NORMAL]
    del model.pieces[:]
    model.pieces.extend(pieces)
    model.trainer_spec.vocab_size = len(pieces)
    return Tokenizer.from_bytes(model.SerializeToString())


def merged_from(piece: str, rank: Mapping[str, float]) -> Iterator[str]:
    """The piece, its characters, and all intermediate pieces of BPE, which merges the neighbours of
    lowest rank first.

    rank: the merge order of each piece.
    """
    parts = list(piece)
    yield from parts
    while len(parts) > 1:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        place = min(range(len(pairs)), key=lambda index: rank.get(pairs[index], math.inf))
        if pairs[place] not in rank:
            return
        parts[place : place + 2] = [pairs[place]]
        yield pairs[place]


def rows_of(config: PretrainInstructConfig, split: Split) -> Iterable[Row]:
    """The texts of each row of a split, for one source after the other."""
    for source in sources_of(config).values():
        for conversation in source.conversations(split):
            yield tuple(turn.text for turn in conversation)


def draw_rows(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """`count` random rows, or all if there are fewer, by the seed and the rows' places. Holds
    `count` rows in memory.
    """
    keyed = ((hashlib.blake2b(f"{seed} {index}".encode()).digest(), row) for index, row in enumerate(rows))
    return [row for _, row in heapq.nsmallest(count, keyed)]


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """UTF-8 bytes of the texts per token."""
    return sum(len(text.encode()) for text in texts) / sum(len(tokenizer.encode(text)) for text in texts)


def report(config: PretrainInstructConfig, path: Path) -> None:
    """Print a tokenizer's size and compression, compared with the default one if it exists."""
    rows = draw_rows(rows_of(config, "test"), _HELD_OUT_ROWS, config.seed) if config.dataset.test_ratio else []
    held_out = [text for row in rows for text in row]
    tokenizers = [Tokenizer(path)]
    try:
        tokenizers.append(Tokenizer(resolve_tokenizer_path(config.dataset.tokenizer_path)))
    except UsageError as error:
        print(f"nothing to compare with: {error}")
    arch = config.arch.model_copy(update={"forward_dtype": "float32"})
    for tokenizer in tokenizers:
        size = f"{bytes_per_token(tokenizer, held_out):.3f} bytes a token on held-out rows" if held_out else "no held-out rows"
        parameters = count_parameters(RecursiveModel(arch, tokenizer.vocab_size)) / 1e6
        print(
            f"{tokenizer.path}: {tokenizer.vocab_size:,} pieces, {size}, arch={config.arch.name} has {parameters:.1f} M parameters"
        )


def settings(data: Path | None, overrides: Sequence[str]) -> PretrainInstructConfig:
    """The settings of a training run on `data`, a folder or file, or on the data of the overrides.
    Raises `UsageError`.
    """
    config = compose_config("cfg_pretrain_instruct", ["dataset=jsonl", *overrides] if data is not None else overrides)
    if data is None:
        return config
    if config.stages or any(override.startswith("dataset=") for override in overrides):
        raise UsageError(f"--data {data} names the data already: leave it out, or dataset= and stages")
    place = {"data_dir": str(data)} if data.is_dir() else {"data_dir": str(data.parent), "files": [data.name]}
    return config.model_copy(update={"dataset": config.dataset.model_copy(update=place)})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 and one message if it can't make a tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of pretrain_instruct.py")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--vocab-size", type=int, help="train one with this many pieces, of which 256 are bytes and 3 no text")
    kind.add_argument("--trim", action="store_true", help="trim dataset.tokenizer_path to the pieces that the data uses")
    parser.add_argument("--min-count", type=int, help="with --trim: keep pieces that occur this often, default 1")
    parser.add_argument("--data", type=user_path, help="folder or file of conversations; default: the data of the settings")
    parser.add_argument("--output", type=user_path, help="default: tokenizers/<dataset.source>-<vocab size>/tokenizer.model")
    parser.add_argument("--max-rows", type=int, default=100_000, help="use at most this many rows, drawn by `seed`")
    options = parser.parse_intermixed_args(arguments)
    with one_clear_message():
        if options.min_count is not None and not options.trim:
            raise UsageError("--min-count trims: give it with --trim, or leave it out")
        for flag in ("max_rows", "vocab_size", "min_count"):
            value = getattr(options, flag)
            if value is not None and value < 1:
                raise UsageError(f"--{flag.replace('_', '-')}: expected 1 or more, found {value}")
        config = settings(options.data, options.overrides)
        kind_name = "trimmed" if options.trim else options.vocab_size
        output = options.output or REPOSITORY / f"tokenizers/{config.dataset.source}-{kind_name}/tokenizer.model"
        if output.exists():
            raise UsageError(f"{output} exists already, and what was trained with it needs it: use another --output, or delete it")
        rows = draw_rows(rows_of(config, "train"), options.max_rows, config.seed)
        if options.trim:
            whole = Tokenizer(resolve_tokenizer_path(config.dataset.tokenizer_path))
            tokenizer = trim_tokenizer(whole, rows, options.min_count or 1)
        else:
            tokenizer = train_tokenizer(rows, options.vocab_size)
        with whole_file(output, "use another --output") as partial:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(tokenizer.model_bytes)
        print(f"{'trimmed to the pieces of' if options.trim else 'trained on'} {len(rows):,} rows")
        report(config, output)


if __name__ == "__main__":
    main()
