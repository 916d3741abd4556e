"""Weights from any file: published names and prefixes, foreign pickles, and what doesn't fit a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from artifacts.weights import count_parameters, load_weights, read_weights, save_weights
from config.errors import UsageError
from config.schema import ArchConfig, PretrainInstructConfig
from models.act import RecursiveModel


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("prefix", ["", "model.inner.", "_orig_mod.model.inner.", "_orig_mod."])
@pytest.mark.parametrize("name", ["weights.safetensors", "step_100", "weights.pt"])
def test_published_files_load_with_any_prefix(
    tmp_path: Path, tiny_model: Callable[..., RecursiveModel], prefix: str, name: str
) -> None:
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    named = {prefix + name: value for name, value in model.state_dict().items()}
    (save_file if name.endswith(".safetensors") else torch.save)(named, tmp_path / name)
    load_weights(other, read_weights(tmp_path / name), tmp_path / name)
    assert same(other.state_dict(), model.state_dict())


class Intruder:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, legacy: bool) -> None:
    made, path = tmp_path / "made", tmp_path / "step_100"
    torch.save({"q_head.bias": torch.zeros(2), "surplus": Intruder(made)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UsageError, match=r"step_100 are refused: .*could run code") as error:
        read_weights(path)
    assert not made.exists() and "\n" not in str(error.value)
    torch.load(path, weights_only=False)
    assert made.exists(), "the file is harmless: the test means nothing"


@pytest.mark.parametrize("content", [b"", b"\x80", b"not weights", b"PK\x03\x04 cut", b"\x80\x02}q\x00.", bytes(range(256))])
def test_a_file_that_is_no_state_dict_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step_100"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"the weights .*step_100 are"):
        read_weights(path)


@pytest.mark.parametrize(
    "content", [torch.zeros(2), [torch.zeros(2)], {"step": 3}, {"model": {"q_head.bias": torch.zeros(2)}}, {1: torch.zeros(2)}]
)
def test_tensors_in_another_order_than_a_state_dict_are_told(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "step_100")
    with pytest.raises(UsageError, match="step_100 are no state dict: expected only names and tensors"):
        read_weights(tmp_path / "step_100")


@pytest.mark.parametrize("name", ["weights.safetensors", "step_100", "folder"])
def test_weights_that_are_not_there_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=rf"{name}.*can't be read"):
        read_weights(tmp_path / name)


def puzzle_model(tiny_config: Callable[..., PretrainInstructConfig], puzzles: int, channels: int = 16) -> RecursiveModel:
    arch = {**tiny_config().arch.model_dump(), "attention": "full", "puzzle_emb_ndim": channels}
    return RecursiveModel(ArchConfig.model_validate(arch), 13, puzzles=puzzles)


def test_puzzles_of_another_data_set_begin_with_the_mean_vector(tiny_config: Callable[..., PretrainInstructConfig]) -> None:
    source, more, as_many = (puzzle_model(tiny_config, count) for count in (3, 5, 3))
    source.puzzle_emb.weights.copy_(torch.arange(48.0).view(3, 16))
    with pytest.raises(UsageError, match=r"puzzle_emb.weights: expected shape \(5, 16\), found \(3, 16\)"):
        load_weights(more, source.state_dict(), Path("elsewhere"))
    load_weights(more, source.state_dict(), Path("elsewhere"), reset_puzzle_embedding=True)
    assert torch.equal(more.puzzle_emb.weights, torch.arange(16.0, 32.0).double().expand(5, 16))
    assert torch.equal(more.lm_head.weight, source.lm_head.weight)
    load_weights(as_many, source.state_dict(), Path("elsewhere"), reset_puzzle_embedding=True)
    assert torch.equal(as_many.puzzle_emb.weights, source.puzzle_emb.weights)
    # Vectors of another width have no mean that would fit, nor have they a place in a model without any.
    for other in (puzzle_model(tiny_config, 5, channels=8), RecursiveModel(tiny_config().arch, 13)):
        with pytest.raises(UsageError, match=r"puzzle_emb\.weights"):
            load_weights(other, source.state_dict(), Path("elsewhere"), reset_puzzle_embedding=True)


@pytest.mark.parametrize(
    "overrides",
    [
        *(("arch=" + name,) for name in ("looped", "trm", "trm_singlez", "trm_hier6", "hrm", "transformers_baseline")),
        ("arch=trm", "arch.tie_embeddings=true"),
    ],
)
def test_parameters_are_what_an_optimizer_may_change(
    tmp_path: Path, tiny_model: Callable[..., RecursiveModel], overrides: tuple[str, ...]
) -> None:
    model = tiny_model(*overrides)
    save_weights(tmp_path / "model.safetensors", model.state_dict(), tied=model.config.tie_embeddings)
    assert count_parameters(tmp_path) == sum(parameter.numel() for parameter in model.parameters())


def test_vectors_of_puzzles_are_no_parameters(tmp_path: Path, tiny_config: Callable[..., PretrainInstructConfig]) -> None:
    model = puzzle_model(tiny_config, 3)
    save_weights(tmp_path / "model.safetensors", model.state_dict(), tied=False)
    assert count_parameters(tmp_path) == sum(parameter.numel() for parameter in model.parameters())
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UsageError, match=r"model\.safetensors can't be read"):
        count_parameters(tmp_path)


def test_weights_that_do_not_fit_are_named(tiny_model: Callable[..., RecursiveModel]) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = dict(before)
    weights["q_head.weight"] = torch.zeros(3, 16)
    weights["surplus"] = weights.pop("L_init")
    with pytest.raises(UsageError) as error:
        load_weights(model, weights, Path("elsewhere"))
    for problem in ("elsewhere", "missing L_init", "unknown surplus", "q_head.weight: expected shape (2, 16), found (3, 16)"):
        assert problem in str(error.value)
    assert same(model.state_dict(), before)
