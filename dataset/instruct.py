"""The conversations a config asks for. Knows no command line and no model."""

from config.schema import DatasetConfig
from dataset.slimorca import TextSettings, open_text_data, open_text_split
from dataset.text.conversation import Conversation, Template
from dataset.text.loader import TextDataset
from dataset.text.token_cache import Split
from dataset.text.tokenizer import Tokenizer


def open_instruct_data(config: DatasetConfig, tokenizer: Tokenizer, template: Template) -> tuple[TextDataset, TextDataset | None]:
    """Train and test split for a training run; see `open_text_data`."""
    return open_text_data(**_settings(config, tokenizer, template))


def open_instruct_split(config: DatasetConfig, tokenizer: Tokenizer, template: Template, split: Split) -> TextDataset:
    """One split, with `subset_size` rows of its own; see `open_text_split`."""
    return open_text_split(split, **_settings(config, tokenizer, template))


def _settings(config: DatasetConfig, tokenizer: Tokenizer, template: Template) -> TextSettings:
    return {
        "source": config.source,
        "data_dir": config.data_dir,
        "tokenizer": tokenizer,
        "template": template,
        "seq_len": config.seq_len,
        "subset_size": config.subset_size,
        "test_ratio": config.test_ratio,
        "seed": config.seed,
        "default_system_prompt": config.default_system_prompt,
        "long_rows": config.long_rows,
        "on_bad_row": config.on_bad_row,
    }


def last_exchange(conversation: Conversation) -> tuple[Conversation, str]:
    """The history before the last assistant turn, and that turn's text."""
    last = max(i for i, turn in enumerate(conversation) if turn.role == "assistant")
    return conversation[:last], conversation[last].text
