"""Export a checkpoint as a folder for transformers, and upload it to the hub with --push.

    python scripts/export_hf.py --checkpoint checkpoints/<project>/<run> --output-dir DIR [--license ID] [--push OWNER/NAME]

docs/export.md shows how to use the folder.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from artifacts.checkpoint import open_checkpoint
from artifacts.hf.export import export_folder
from config.compose import CHECKPOINT_HELP
from config.errors import UsageError, one_clear_message
from config.schema import user_path


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=user_path, required=True, help=CHECKPOINT_HELP)
    add("--output-dir", type=user_path, required=True, metavar="DIR", help="the folder to write, which must not exist")
    add("--license", metavar="ID", help="of the weights, as the hub names it, for the model card; default: unknown")
    add(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder to this model repository of the hub",
    )
    return parser.parse_args()


def push(folder: Path, repo: str) -> str:
    """Upload a folder; returns the address of its commit. Raises UsageError."""
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(f"{folder} is written, but {repo} can't be uploaded: {error}; log in with `hf auth login`") from error


def main() -> None:
    """Open, write, upload."""
    arguments = parse_arguments()
    export_folder(open_checkpoint(arguments.checkpoint), arguments.output_dir, arguments.license)
    print(f"wrote {arguments.output_dir}")
    if arguments.push is not None:
        print(push(arguments.output_dir, arguments.push))


if __name__ == "__main__":
    with one_clear_message():
        main()
