"""Build a data set's token cache ahead of training, and write its data card: data_card.md and
data_card.png.

    python scripts/prepare_data.py dataset=slimorca dataset.subset_size=null [--output FOLDER] [--near-rows 5000]

Settings are those of a training run; a run with the same ones then starts at once. The card goes to
the data's folder by default. With stages there is a card for each source, in FOLDER/<its name> if a
folder is given. Needs `pip install -r requirements-data.txt`.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from dataset.text.data_card import data_card, draw
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed: run `pip install -r requirements-data.txt`")

from config.compose import compose_config
from config.errors import UsageError, one_clear_message, refuse_several_ranks
from config.schema import user_path
from dataset.instruct import Source, sources_of
from dataset.text.conversation import Template
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path


def prepare(overrides: list[str], output: Path | None, near_rows: int) -> list[Path]:
    """Build the cache of each source and write its card. Returns the cards' paths. Raises UsageError."""
    config = compose_config("cfg_pretrain_instruct", overrides)
    tokenizer = Tokenizer(resolve_tokenizer_path(config.dataset.tokenizer_path))
    return [
        _prepare(source, tokenizer, output / name if output is not None and config.sources else output, near_rows)
        for name, source in sources_of(config).items()
    ]


def _prepare(source: Source, tokenizer: Tokenizer, output: Path | None, near_rows: int) -> Path:
    config, started = source.config, time.perf_counter()
    train, test = source.open_splits(tokenizer, Template())
    print(f"{len(train):,} training rows, {len(test) if test else 0:,} test rows in {time.perf_counter() - started:.1f} s")
    of_hub = (config.repo or "").replace("/", "--") if config.source == "hub" else ""
    folder = output or Path(config.data_dir) / of_hub
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path, picture = folder / "data_card.md", folder / "data_card.png"
        draw([split for split in (train, test) if split is not None], picture)
        of = f"{config.repo}, {config.split}, revision {config.revision}" if config.source == "hub" else config.data_dir
        title = f"{config.source} ({of})"
        card = data_card(train, test, tokenizer, Template(), near_rows=near_rows, title=title, picture=picture.name)
        path.write_text(card, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"the data card can't be written to {str(folder)!r}: {error}; name another folder with --output"
        ) from error
    return path


def main(arguments: list[str] | None = None) -> None:
    """The command; exit status 2 and one message if the data can't be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of pretrain_instruct.py")
    parser.add_argument("--output", type=user_path, help="folder for the card; default: dataset.data_dir")
    parser.add_argument(
        "--near-rows",
        type=int,
        default=5000,
        help="test rows to check for near overlap, against five times as many training rows; 0: none",
    )
    options = parser.parse_intermixed_args(arguments)
    with one_clear_message():
        refuse_several_ranks()
        if options.near_rows < 0:
            raise UsageError(f"--near-rows: expected 0 or more, found {options.near_rows}")
        print(*prepare(options.overrides, options.output, options.near_rows), sep="\n")


if __name__ == "__main__":
    main()
