"""Put a 32,000-piece SentencePiece tokenizer where the program looks for it, and report which one
it is.

    python scripts/fetch_tokenizer.py [--source auto|hub|package]

This file must not know how a tokenizer is used; token ids differ between the sources it offers.
"""

import argparse
import hashlib
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from artifacts.files import write_whole  # noqa: E402
from config.errors import UsageError, one_clear_message  # noqa: E402
from dataset.text.hub import download  # noqa: E402
from dataset.text.tokenizer import DEFAULT_TOKENIZER, TOKENIZER_VARIABLE, Tokenizer  # noqa: E402

HUB_REPO = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
HUB_FILE = "tokenizer.model"
HUB_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
PACKAGE = "mistral-common"
PACKAGE_FILE = "data/tokenizer.model.v1"
PACKAGE_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
IDS_DIFFER = (
    "Token ids differ between LLaMA's tokenizer and the one of mistral-common: use one of them for a data set, "
    "its checkpoints and their answers."
)


def copy_from_package(output: Path) -> None:
    """Copy the model from package mistral-common. Raises `UsageError`."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UsageError(f"the package {PACKAGE} is not installed: `pip install {PACKAGE}`, or use --source hub")
    file = Path(spec.origin).parent / PACKAGE_FILE
    model_bytes = file.read_bytes() if file.is_file() else b""
    found = hashlib.sha256(model_bytes).hexdigest()
    if found != PACKAGE_SHA256:
        raise UsageError(
            f"{file}: expected sha256 {PACKAGE_SHA256}, found {found if model_bytes else 'no such file'}; "
            f"install the version of {PACKAGE} that requirements.txt asks for, or use --source hub"
        )
    write_whole(output, model_bytes)


def existing(output: str | None) -> Path | None:
    """The existing tokenizer: --output, else $LLAMA_TOKENIZER, else the default place."""
    default = REPOSITORY / DEFAULT_TOKENIZER
    path = Path(output or os.environ.get(TOKENIZER_VARIABLE, str(default))).expanduser()
    if path.is_file():
        return path
    # The default place is often exported before the first fetch; others must exist.
    if output is None and path.resolve() != default.resolve():
        named = os.environ[TOKENIZER_VARIABLE]
        raise UsageError(
            f"{TOKENIZER_VARIABLE} names {named!r}, which is not a file: unset it, correct it, "
            f"or fetch to that place with --output {named!r}"
        )
    return None


def _noted(path: Path) -> dict[str, str]:
    """What SOURCE.json says of a fetched tokenizer."""
    note = path.with_name("SOURCE.json")
    known: dict[str, str] = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    return known


def _hub_name(options: argparse.Namespace) -> str:
    return f"{options.repo} ({options.filename}, revision {options.revision}) on the Hugging Face hub"


def report(path: Path) -> None:
    """Print which tokenizer is at `path`. Raises `UsageError` if the file isn't a tokenizer."""
    tokenizer = Tokenizer(path)
    known = _noted(path)
    if known.get("sha256") != tokenizer.sha256:
        known = {"source": "a file of your own", "licence": "not known here"}
    print(f"tokenizer: {path}")
    print(f"  from:    {known['source']}")
    print(f"  licence: {known['licence']}")
    print(f"  sha256:  {tokenizer.sha256} ({tokenizer.vocab_size:,} pieces)")
    print(f"  {IDS_DIFFER}")


def fetch(options: argparse.Namespace) -> Path:
    """Get the tokenizer by `options` unless it exists. Returns its path. Raises `UsageError`."""
    is_default_file = (options.repo, options.filename) == (HUB_REPO, HUB_FILE)
    sha256 = options.sha256 or (HUB_SHA256 if is_default_file else None)
    found = existing(options.output)
    if found is not None:
        wanted = {"auto": options.sha256, "hub": sha256, "package": PACKAGE_SHA256}[options.source]
        if wanted is not None and Tokenizer(found).sha256 != wanted:
            raise UsageError(
                f"{str(found)!r} is another tokenizer than the one asked for (sha256 {wanted}); what was trained with "
                "it still needs it, so it isn't replaced: use --output for another place, or delete it"
            )
        there = _noted(found).get("source")
        if not is_default_file and options.source != "package" and wanted is None and there != _hub_name(options):
            raise UsageError(
                f"{str(found)!r} is there already, from {there or 'elsewhere'}, not from {_hub_name(options)}; what was trained "
                "with it still needs it, so it isn't replaced: use --output for another place, or delete it"
            )
        print("already there")
        return found
    output = Path(options.output) if options.output is not None else REPOSITORY / DEFAULT_TOKENIZER
    output.parent.mkdir(parents=True, exist_ok=True)
    source, licence = f"{PACKAGE_FILE} of the Python package {PACKAGE}", "Apache-2.0"
    if options.source == "package":
        copy_from_package(output)
    else:
        try:
            download(options.repo, options.filename, output, revision=options.revision, expected_sha256=sha256)
            source = _hub_name(options)
            licence = licence if options.repo == HUB_REPO else f"as stated at {options.repo}"
        except UsageError as error:
            if options.source == "hub" or not is_default_file or options.sha256:
                raise
            print(f"not from the hub: {error}", file=sys.stderr)
            copy_from_package(output)
    origin = {"source": source, "licence": licence, "sha256": Tokenizer(output).sha256}
    write_whole(output.with_name("SOURCE.json"), json.dumps(origin, indent=1).encode("utf-8"))
    return output


def main(arguments: list[str] | None = None) -> None:
    """The command; exit status 2 and one message if it can't get a tokenizer."""
    parser = argparse.ArgumentParser(description="Get a 32,000-piece SentencePiece tokenizer.")
    parser.add_argument(
        "--output", type=os.path.expanduser, help=f"where to put it (default: {DEFAULT_TOKENIZER} in the repository)"
    )
    parser.add_argument("--source", choices=("auto", "hub", "package"), default="auto", help="auto: the hub, else the package")
    parser.add_argument("--repo", default=HUB_REPO, help="model repository on the Hugging Face hub")
    parser.add_argument("--filename", default=HUB_FILE, help="file inside the repository")
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument("--sha256", help="refuse a download with another hash (known for the default file)")
    with one_clear_message():
        report(fetch(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
