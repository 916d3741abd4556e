"""Train a recursive model to follow instructions: `python pretrain_instruct.py [key=value ...]`.

Settings stand in config/cfg_pretrain_instruct.yaml and are explained in config/schema.py; `--help` and `--cfg job` show them.
"""

import hydra
from omegaconf import DictConfig

from config.compose import checked
from config.errors import one_clear_message
from config.schema import PretrainInstructConfig
from models.device import keep_freed_memory
from training.instruct import run_instruct


@hydra.main(version_base=None, config_path="config", config_name="cfg_pretrain_instruct")
def main(settings: DictConfig) -> None:
    """Compose, check, train."""
    with one_clear_message():
        run_instruct(checked(settings, PretrainInstructConfig))


if __name__ == "__main__":
    keep_freed_memory()
    main()
