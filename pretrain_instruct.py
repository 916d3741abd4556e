"""Train a recursive model to follow instructions: `python pretrain_instruct.py [key=value ...]`.

Settings are in config/ (cfg_pretrain_instruct.yaml), their documentation in config/schema/;
`--help` and `--cfg job` show them. `-m key=a,b` trains with each of several values.
"""

import hydra
from omegaconf import DictConfig

from config.command_line import run_job, run_main
from config.schema import PretrainInstructConfig
from models.device import keep_freed_memory
from training.instruct_run import run_instruct


def train(config: PretrainInstructConfig) -> float | None:
    """Train; returns the held-out loss at the end, in nats per token, if there is one."""
    result = run_instruct(config)
    return None if result is None else result.loss


@hydra.main(version_base=None, config_path="config", config_name="cfg_pretrain_instruct")
def main(settings: DictConfig) -> float | None:
    """One run, or one job of a sweep."""
    keep_freed_memory()
    return run_job(settings, PretrainInstructConfig, train)


if __name__ == "__main__":
    run_main(main, PretrainInstructConfig)
