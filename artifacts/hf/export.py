"""Exports a checkpoint as a folder for transformers, which it doesn't need.

The modeling file consists of the network's own definitions, so there is no second implementation.
"""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file

from artifacts.checkpoint import Checkpoint
from artifacts.files import to_json, whole_folder
from artifacts.halting import read_halting_calibration
from artifacts.hf.model_card import model_card
from dataset.text.conversation import TaggedRole
from dataset.text.portable_tokenizer import BOS, EOS, chat_template, portable_tokenizer

_REPOSITORY = Path(__file__).parents[2]
# base and trm come first, because the other recursions are subclasses of theirs; __init__ comes last.
_RECURSIONS = {path.stem for path in (_REPOSITORY / "models/recursive_reasoning").glob("*.py")} - {"base", "trm", "__init__"}
# The definitions that stand in the modeling file in place of imports, by file, each after what it needs; (): all of a file.
_INLINED: dict[str, tuple[str, ...]] = {
    **{f"models/recursive_reasoning/{name}.py": () for name in ("base", "trm", *sorted(_RECURSIONS), "__init__")},
    "models/cache.py": ("StatefulAttention", "HeldAttention"),
    "models/layers.py": (
        "RMS_EPS", "_SWIGLU_MULTIPLE", "Rotary", "rotary_table", "rotate", "Attend", "_STD_OF_NORMAL_CUT_AT_2", "truncated_normal_",
        "Linear", "Embedding", "rms_norm", "Attention", "SwiGLU", "Block", "BlockStack",
    ),
    "models/losses.py": ("log_probs",),
}  # fmt: skip
_OF_ARCH = (
    "name", "hidden_size", "num_heads", "expansion", "H_layers", "L_layers", "H_cycles", "L_cycles", "norm", "qk_norm", "attention",
    "pos_encodings", "rope_theta", "loss", "halt_max_steps",
)  # fmt: skip
"""Keys of arch that the forward pass depends on."""
_HEAD = '''"""A tiny recursive model (arXiv 2510.04871) as a causal language model for transformers: all recursions in one file.

Written by Instruct-TRM's scripts/export_hf.py from the network's own files. Shape suffixes: B rows, T positions, D channels,
H heads, K channels of a head, S positions attended to, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.versions import require_version

'''


def export_folder(checkpoint: Checkpoint, folder: Path, licence: str | None = None) -> None:
    """Write `folder` atomically, with the checkpoint's weights (their average, if any) in float32.

    licence: the hub's identifier. Raises UsageError if the folder exists or the tokenizer has no
    equivalent.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    files = {
        "config.json": to_json(_config(checkpoint)),
        "generation_config.json": to_json(_generation_config(checkpoint)),
        "modeling_trm.py": modeling_file(),
        "tokenizer.json": portable_tokenizer(tokenizer, checkpoint.template),
        "tokenizer_config.json": to_json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BOS,
                "eos_token": EOS,
                "pad_token": EOS,
                "padding_side": "left",
                "model_max_length": config.dataset.seq_len,
                "clean_up_tokenization_spaces": False,
            }
        ),
        "chat_template.jinja": chat_template(checkpoint.template, config.dataset.default_system_prompt),
        "README.md": model_card(checkpoint, licence),
    }
    weights = {name: tensor.to(torch.float32).contiguous() for name, tensor in checkpoint.weights(ema=True).items()}
    with whole_folder(folder, "choose another --output-dir", "free space, or choose another --output-dir") as partial:
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    calibration = read_halting_calibration(checkpoint)
    tags = {role: tokenizer.encode(checkpoint.template.tag(role)) for role in get_args(TaggedRole)}
    return {
        "model_type": "tiny_recursive_model",
        "architectures": ["TRMForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_trm.TRMConfig", "AutoModelForCausalLM": "modeling_trm.TRMForCausalLM"},
        "dtype": "float32",
        **{key: getattr(config.arch, key) for key in _OF_ARCH},
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": config.dataset.seq_len,
        "tie_word_embeddings": config.arch.tie_embeddings,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        "tags": tags,
        "halt_scale": calibration and calibration.scale,
        "halt_shift": calibration and calibration.shift,
        "act_steps": config.depth,
        "halt_threshold": config.generation.halt_threshold,
    }


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    generation = config.generation
    drawn = {"temperature": generation.temperature, "top_k": generation.top_k or 0, "top_p": generation.top_p}
    if generation.min_p:
        drawn["min_p"] = generation.min_p
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        "max_new_tokens": config.answer_limit,
        "do_sample": generation.temperature > 0,
        **(drawn if generation.temperature > 0 else {}),
        "repetition_penalty": generation.repetition_penalty,
        **({"stop_strings": list(generation.stop)} if generation.stop else {}),
    }


def modeling_file() -> str:
    """The text of the exported modeling_trm.py, with definitions in place of its imports from this project."""
    parts = []
    for path, names in _INLINED.items():
        parts += [f"# From {path}.", *_definitions(path, names)]
    return (
        "\n\n\n".join([_HEAD + parts[0], *parts[1:], "# The model of transformers.", *_definitions("artifacts/hf/modeling_trm.py")])
        + "\n"
    )


def _definitions(path: str, names: Sequence[str] = ()) -> Iterator[str]:
    """The text of a file's definitions of `names`, or of all, with decorators, comments above and docstrings below."""
    text = (_REPOSITORY / path).read_text(encoding="utf-8")
    lines = text.splitlines()
    nodes = [node for node in ast.parse(text).body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)]
    starts = []
    for node in nodes:
        start = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))]) - 1
        while lines[start - 1].startswith("#"):
            start -= 1
        starts.append(start)
    for node, start, end in zip(nodes, starts, [*starts[1:], len(lines)], strict=True):
        name = node.name if isinstance(node, ast.ClassDef | ast.FunctionDef) else lines[node.lineno - 1].split()[0].rstrip(":")
        if not names or name in names:
            yield "\n".join(lines[start:end]).rstrip()
