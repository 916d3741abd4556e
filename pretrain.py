"""Train a recursive model on puzzles: `python pretrain.py [key=value ...]`, with the original's
keys.

Settings are in config/ (cfg_pretrain.yaml), their documentation in config/schema/; `--help` and
`--cfg job` show them. `-m key=a,b` trains with each of several values.
"""

import hydra
from omegaconf import DictConfig

from config.command_line import run_job, run_main
from config.schema import PretrainPuzzleConfig
from models.device import keep_freed_memory
from training.puzzle_run import run_puzzles


def train(config: PretrainPuzzleConfig) -> float | None:
    """Train; returns the held-out loss at the end, if there is one."""
    result = run_puzzles(config)
    return None if result is None else result.loss


@hydra.main(version_base=None, config_path="config", config_name="cfg_pretrain")
def main(settings: DictConfig) -> float | None:
    """One run, or one job of a sweep."""
    keep_freed_memory()
    return run_job(settings, PretrainPuzzleConfig, train)


if __name__ == "__main__":
    run_main(main, PretrainPuzzleConfig)
