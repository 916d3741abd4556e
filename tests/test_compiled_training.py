"""Compiled training: the same run as uncompiled, without rows where kernels need none, and no code anew for other lengths."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, get_args
from unittest.mock import Mock

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor
from torch.nn.attention import varlen

import models.act
import models.losses
import training.text
from config.schema import PretrainInstructConfig
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example, ExampleStream
from dataset.text.packing import Packing
from models.act import RecursiveModel
from models.device import has_compiler
from tests.fake_device import fake_device
from training.loop import Trainer
from training.text import TextTask

ConfigFactory = Callable[..., PretrainInstructConfig]
ExampleFactory = Callable[..., list[Example]]

# aot_eager is all of torch.compile but the generated code: graphs, guards, what is saved for the backward pass.
CASES = [
    ("aot_eager", "causal", "packed"),
    ("aot_eager", "prefix", "bucketed"),
    *(
        pytest.param("inductor", *case, marks=pytest.mark.slow)
        for case in itertools.product(["causal", "prefix"], get_args(Packing))
    ),
]


def compile_by(backend: str | Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "inductor" and not has_compiler():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    models.losses._compiled_logits_to_gradient.cache_clear()
    torch._dynamo.reset()


def make_trainer(
    config: PretrainInstructConfig, examples: list[Example], *, compiled: bool, device: torch.device | str = "cpu"
) -> Trainer:
    model = RecursiveModel(config.arch, 13, seed=config.seed).to(device)
    if compiled:
        model.compile_levels()
    curriculum = Curriculum.of_epochs(len(examples), config.seed, config.epochs)
    stream = ExampleStream(examples, curriculum, 0)
    return Trainer(config, model, TextTask(config, model, stream, curriculum))


def assert_compiled_equals_eager(config: PretrainInstructConfig, examples: list[Example]) -> None:
    """After whole runs; and nothing is compiled after the tenth step, at the end of the run neither, where one row is left."""
    eager, compiled = (make_trainer(config, examples, compiled=compiled) for compiled in (False, True))
    with torch._dynamo.config.patch(error_on_recompile=False):
        for expected, found in zip(eager.steps(), compiled.steps(), strict=True):
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-9)
            torch._dynamo.config.error_on_recompile = found.step >= 10
    assert found.step > 15
    for (name, value), other in zip(eager.model.state_dict().items(), compiled.model.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=1e-9, msg=name)


def uneven_rows(random_examples: ExampleFactory) -> list[Example]:
    """Most of them short: few of a step's are long, so that layouts differ."""
    return random_examples(110, longest=8) + random_examples(30, longest=128)


def config_of_uneven_rows(tiny_config: ConfigFactory, *overrides: str) -> PretrainInstructConfig:
    return tiny_config("global_batch_size=5", "dataset.seq_len=128", "arch.H_cycles=1", "arch.L_layers=1", "lr=1e-3", *overrides)


@pytest.mark.parametrize(("backend", "attention", "packing"), CASES)
def test_rows_of_other_lengths_need_no_other_code(
    tiny_config: ConfigFactory,
    random_examples: ExampleFactory,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    attention: str,
    packing: str,
) -> None:
    compile_by(backend, monkeypatch)
    config = config_of_uneven_rows(tiny_config, f"arch.attention={attention}", f"packing={packing}")
    assert_compiled_equals_eager(config, uneven_rows(random_examples))


def causal_weights(q_NHK: Tensor, k_NHK: Tensor, starts_R1: Tensor) -> Tensor:
    """Of each key to each query [H, N, N], causal within documents."""
    token_N = torch.arange(len(q_NHK))
    document_N = torch.bucketize(token_N, starts_R1, right=True)
    is_hidden_NN = (document_N[:, None] != document_N) | (token_N[:, None] < token_N)
    scores_HNN = torch.einsum("ihk,jhk->hij", q_NHK, k_NHK) * q_NHK.shape[-1] ** -0.5
    return scores_HNN.masked_fill(is_hidden_NN, -torch.inf).softmax(-1)


@varlen._varlen_attn.register_kernel("cpu")
def varlen_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, starts_R1: Tensor, ends_R1: Tensor, most_q: int, most_k: int, is_causal: bool, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator that only CUDA has a kernel for; what else it returns is for that kernel's backward pass."""
    assert is_causal, "what is asked for is another attention"
    y_NHK = torch.einsum("hij,jhk->ihk", causal_weights(q, k, starts_R1), v).contiguous()
    return y_NHK, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def varlen_backward_on_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts_R1: Tensor, *rest: Any, **also: Any
) -> tuple[Tensor, ...]:
    weights_HNN = causal_weights(q, k, starts_R1)
    grad_weights_HNN = torch.einsum("ihk,jhk->hij", grad, v)
    grad_scores_HNN = weights_HNN * (grad_weights_HNN - (weights_HNN * grad_weights_HNN).sum(-1, keepdim=True))
    grad_scores_HNN *= q.shape[-1] ** -0.5
    grads = (
        torch.einsum("hij,jhk->ihk", grad_scores_HNN, k),
        torch.einsum("hij,ihk->jhk", grad_scores_HNN, q),
        torch.einsum("hij,ihk->jhk", weights_HNN, grad),
    )
    return tuple(grad_NHK.contiguous() for grad_NHK in grads)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_documents_side_by_side_need_no_rows(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """As on CUDA, with plain code in place of kernels that only CUDA has: inductor refuses gradients of FlexAttention on a CPU."""
    compile_by("aot_eager", monkeypatch)
    monkeypatch.setattr(models.act, "can_attend_in_documents", lambda *_: True)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    masks = Mock(wraps=training.text.documents_side_by_side)
    monkeypatch.setattr(training.text, "documents_side_by_side", masks)
    config = config_of_uneven_rows(tiny_config, f"arch.attention={attention}", "packing=packed")
    assert_compiled_equals_eager(config, uneven_rows(random_examples))
    assert masks.call_count > 25


def test_only_the_number_of_tokens_is_open(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code knows the model's sizes: its loads are whole vectors, and FlexAttention needs to know a head's."""
    open_sizes: list[tuple[Any, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        tensors = [node.meta["example_value"] for node in graph.graph.nodes if isinstance(node.meta.get("example_value"), Tensor)]
        open_sizes.extend(
            tuple(x.shape)
            for x in tensors
            if x.is_floating_point() and any(type(size) is not int and size.node.maybe_as_int() is None for size in x.shape[1:])
        )
        return graph.forward

    compile_by(backend, monkeypatch)
    monkeypatch.setattr(models.act, "can_attend_in_documents", lambda *_: True)
    config = config_of_uneven_rows(tiny_config, "arch.forward_dtype=bfloat16", "arch.attention=causal")
    next(make_trainer(config, uneven_rows(random_examples), compiled=True).steps())
    assert not open_sizes


def test_a_step_without_rows_waits_for_the_device_once(
    tiny_config: ConfigFactory, random_examples: ExampleFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is where the kernel wants it; what would be compiled is run as it is, since the device holds no values."""
    monkeypatch.setattr(RecursiveModel, "compile_levels", lambda model: setattr(model, "is_compiled", True))
    monkeypatch.setattr(models.losses, "_compiled_logits_to_gradient", lambda: models.losses._logits_to_gradient)
    config = config_of_uneven_rows(tiny_config, "arch.forward_dtype=bfloat16", "arch.attention=causal", "arch.hidden_size=32")
    with fake_device() as device:
        trainer = make_trainer(config, uneven_rows(random_examples), compiled=True, device=device.device)
        assert trainer.model.needs_no_rows
        steps = trainer.steps()
        next(steps)
        device.waits.clear()
        next(steps)
        assert device.waits == ["training/loop.py:step"]
