"""SlimOrca's single file: found in a folder under any of its names, else downloaded.

`python -m dataset.slimorca --data-dir data/slimorca` downloads it ahead of a run. This file doesn't
know how it is used.
"""

import argparse
import os
from pathlib import Path

import yaml

from config.errors import UsageError, one_clear_message
from dataset.source_files import Hub

# A run reads repository and revision from the same file.
_CONFIG = Path(__file__).resolve().parents[1] / "config/dataset/slimorca.yaml"
HUB_FILE = "oo-labeled_correct.gpt4.sharegpt.jsonl"
LOCAL_FILES = ("SlimOrca.jsonl", "SlimOrca.jsonl.zst", "SlimOrca.jsonl.gz", HUB_FILE)


def locate(data_dir: str | Path, hub: Hub | None, filename: str = HUB_FILE) -> Path:
    """The SlimOrca file in `data_dir`, downloaded (about 1 GB) from `hub` if it is missing.

    Raises `UsageError` if it is missing and the download fails, or there is no `hub`.
    """
    folder = Path(data_dir).expanduser()
    for name in LOCAL_FILES:
        if (folder / name).is_file():
            return folder / name
    if hub is None:
        raise UsageError(
            f"expected one of {', '.join(LOCAL_FILES)} in {str(folder)!r}, found none; check dataset.data_dir, "
            f"or have it downloaded: dataset.repo={_default_hub().repo}"
        )
    return hub.fetch(filename, folder / LOCAL_FILES[0])


def _default_hub() -> Hub:
    """The repository and revision in the YAML file of the source."""
    values = yaml.safe_load(_CONFIG.read_text(encoding="utf-8"))
    return Hub(values["repo"], values["revision"])


def main(arguments: list[str] | None = None) -> None:
    """The command: make sure that the SlimOrca file is in a folder, and print its path."""
    default = _default_hub()
    parser = argparse.ArgumentParser(description="Download SlimOrca unless the folder already has it.")
    parser.add_argument(
        "--data-dir", type=os.path.expanduser, default="data/slimorca", help="folder that holds, or will hold, the file"
    )
    parser.add_argument("--repo", default=default.repo, help="dataset repository on the Hugging Face hub")
    parser.add_argument("--filename", default=HUB_FILE, help="file inside the repository")
    parser.add_argument("--revision", default=default.revision, help="branch, tag or commit")
    options = parser.parse_args(arguments)
    with one_clear_message():
        path = locate(options.data_dir, Hub(options.repo, options.revision), options.filename)
        print(f"SlimOrca: {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
