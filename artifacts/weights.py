"""Files of weights: safetensors, and pickled state dicts, of which only tensors are read."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from config.errors import UsageError
from models.act import RecursiveModel

_PREFIX = "model.inner."
_COMPILED_PREFIX = "_orig_mod."
_TIED_HEAD = "lm_head.weight"
_PUZZLE_VECTORS = "puzzle_emb.weights"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by the names of `RecursiveModel`, without the file's prefix.

    path: a checkpoint folder (its moving average if there is one), a .safetensors file, or a state
    dict written by torch.save, as by the original. Raises UsageError for anything else, and for a
    pickle that could run code.
    """
    if path.is_dir():
        path = weights_file(path, ema=True)
    tensors = load_tensors(path) if path.suffix == ".safetensors" else _load_pickled_tensors(path)
    return {name.removeprefix(_COMPILED_PREFIX).removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def load_weights(model: RecursiveModel, weights: Mapping[str, Tensor], source: Path, reset_puzzle_embedding: bool = False) -> None:
    """Load `weights` into `model`. Raises UsageError with the names that don't fit.

    reset_puzzle_embedding: for another number of puzzles, set each one's vector to the mean of all.
    """
    expected = model.state_dict()
    found = dict(weights)
    vectors = found.get(_PUZZLE_VECTORS)
    if reset_puzzle_embedding and model.puzzle_emb is not None and vectors is not None and vectors.dim() == 2 and len(vectors):
        count = len(model.puzzle_emb.weights)
        if len(vectors) != count:
            found[_PUZZLE_VECTORS] = vectors.mean(dim=0, keepdim=True).expand(count, -1)
    if model.config.tie_embeddings:
        found.setdefault(_TIED_HEAD, found.get("embed_tokens.embedding_weight", expected[_TIED_HEAD]))
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unknown {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name}: expected shape {tuple(expected[name].shape)}, found {tuple(found[name].shape)}"
        for name in expected.keys() & found.keys()
        if expected[name].shape != found[name].shape
    ]
    if problems:
        raise UsageError(f"the weights of {source} don't fit the architecture: {'; '.join(sorted(problems)[:5])}")
    model.load_state_dict(found)


def save_weights(path: Path, weights: Mapping[str, Tensor], *, tied: bool) -> None:
    """Write weights by the original's names. tied: leave out the head, which is the embedding."""
    # safetensors allows no two names for one tensor.
    named = {name: tensor for name, tensor in weights.items() if not (tied and name == _TIED_HEAD)}
    save_file({_PREFIX + name: tensor.detach().contiguous() for name, tensor in named.items()}, path)


def weights_file(folder: Path, *, ema: bool) -> Path:
    """The file of a checkpoint's weights. ema: of their moving average, if there is one."""
    path = folder / "ema.safetensors"
    return path if ema and path.exists() else folder / "model.safetensors"


def count_parameters(folder: Path) -> int:
    """Numbers of a checkpoint's model that an optimizer may change, by the header of its weights; a tied head counts once.

    Initial states and puzzles' vectors are buffers and don't count. Raises UsageError if the weights can't be read.
    """
    path = weights_file(folder, ema=False)
    with readable(path), safe_open(path, framework="pt") as weights:
        names = [name for name in weights.keys() if not name.endswith(("_init", _PUZZLE_VECTORS))]  # noqa: SIM118  (no mapping)
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


def _load_pickled_tensors(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"the weights {path} can't be read: {error}") from error
    # torch's errors for damaged files have no common class.
    except Exception as error:
        raise UsageError(
            f"the weights {path} are refused: not a state dict saved by torch, damaged, or a pickle that holds more than tensors "
            "and could run code; ask its owner for the tensors as .safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise UsageError(f"the weights {path} are no state dict: expected only names and tensors")
    return content


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises UsageError if it can't be read."""
    with readable(path):
        return load_file(path)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within the block, errors in reading the checkpoint's file `path` are UsageErrors."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the checkpoint file {path} can't be read: {error}") from error
