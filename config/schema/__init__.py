"""Every setting of a run: its type, its limits and one sentence about it, checked when a config is built.

Plain pydantic: no Hydra, no torch, so every package may read a config. The defaults that a user sees stand in the YAML files of
config/. A value that is wrong, or a key that doesn't exist, is a `UsageError` before any work is done.
"""

from config.schema.arch import ArchConfig
from config.schema.base import OnResume, TextType, text_type, user_path
from config.schema.parsing import Config, no_such_key, on_resume, parse_as, parse_config, type_of_key
from config.schema.puzzles import PretrainPuzzleConfig, PuzzleOutputName
from config.schema.text import DatasetConfig, FieldName, GenerationConfig, PretrainInstructConfig, SourceConfig, StageConfig
from config.schema.training import EarlyStoppingConfig, TrainingConfig

__all__ = [
    "ArchConfig", "Config", "DatasetConfig", "EarlyStoppingConfig", "FieldName", "GenerationConfig", "OnResume",
    "PretrainInstructConfig", "PretrainPuzzleConfig", "PuzzleOutputName", "SourceConfig", "StageConfig", "TextType",
    "TrainingConfig", "no_such_key", "on_resume", "parse_as", "parse_config", "text_type", "type_of_key", "user_path",
]  # fmt: skip
