"""Train a recursive model on puzzles: `python pretrain.py [key=value ...]`, with the original's keys.

Settings stand in config/cfg_pretrain.yaml and are explained in config/schema.py; `--help` and `--cfg job` show them.
`-m key=a,b` trains with each of several values.
"""

import json

import hydra
from omegaconf import DictConfig

from config.doors import run_door, run_job
from config.schema import PretrainPuzzleConfig
from models.device import keep_freed_memory
from training.puzzle_run import run_puzzles


def train(config: PretrainPuzzleConfig) -> float | None:
    """Train; returns the held-out loss at the end, if there is one."""
    checkpoint = run_puzzles(config)
    if checkpoint is None:
        return None
    metrics = json.loads((checkpoint / "train_metrics.json").read_text(encoding="utf-8"))
    return metrics["test"]["lm_loss"] if "test" in metrics else None


@hydra.main(version_base=None, config_path="config", config_name="cfg_pretrain")
def main(settings: DictConfig) -> float | None:
    """One run, or one job of a sweep."""
    keep_freed_memory()
    return run_job(settings, PretrainPuzzleConfig, train)


if __name__ == "__main__":
    run_door(main, PretrainPuzzleConfig)
