"""Train a recursive model on puzzles: `python pretrain.py [key=value ...]`, with the original's keys.

Settings stand in config/cfg_pretrain.yaml and are explained in config/schema.py; `--help` and `--cfg job` show them.
"""

import sys

import hydra
from omegaconf import DictConfig

from config.compose import checked, plain_overrides
from config.errors import one_clear_message
from config.schema import PretrainPuzzleConfig
from models.device import keep_freed_memory
from training.puzzle_run import run_puzzles


@hydra.main(version_base=None, config_path="config", config_name="cfg_pretrain")
def main(settings: DictConfig) -> None:
    """Compose, check, train."""
    with one_clear_message():
        run_puzzles(checked(settings, PretrainPuzzleConfig))


if __name__ == "__main__":
    keep_freed_memory()
    sys.argv[1:] = plain_overrides(sys.argv[1:], PretrainPuzzleConfig)
    main()
