"""Checks that a device computes correctly: training and decoding of every small recursion."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import SyntheticRows, benchmark_config, trainer_on
from benchmarks.cuda.scale import (
    COMPILING_SECONDS,
    ENGINES,
    Case,
    Figures,
    Found,
    Scale,
    engine_options,
    no_engine_warnings,
    varied_lengths,
)
from config.schema import PretrainInstructConfig
from generation.engine import Engine, Prompt, Request, Token
from models.act import RecursiveModel
from models.losses import log_probs

# Recursion: its settings, and attention and packing of its second compiled case.
_RECURSIONS: dict[str, tuple[list[str], tuple[str, str]]] = {
    "looped": ([], ("prefix", "off")),
    "trm": ([], ("prefix", "bucketed")),
    "trm_singlez": ([], ("causal", "off")),
    "trm_hier6": ([], ("causal", "packed")),
    "hrm": ([], ("prefix", "off")),
    # As at the default size, a head has 42 channels.
    "transformers_baseline": (["arch.hidden_size=168"], ("causal", "bucketed")),
}
_SMOKE_VOCABULARY = 300
# Largest relative errors of an untrained model's loss and gradients. Recursion amplifies rounding: on a CPU the largest are 5e-7
# and 9e-6 in float32, 2e-3 and 0.2 in bfloat16.
_ALLOWED = {"float32": (1e-5, 2e-4), "bfloat16": (1e-2, 0.4)}
# Decoding: nats in float32 by contract 5; in bfloat16 at most this many times the error of recomputation.
_ALLOWED_CACHED, _ALLOWED_BFLOAT16 = 1e-4, 3.0


class Network(NamedTuple):
    """A small network and its computation."""

    recursion: str
    dtype: str
    attention: str
    packing: str = "off"


@functools.cache
def _composed(scale: Scale, recursion: str) -> PretrainInstructConfig:
    settings = [f"arch={recursion}", "arch.halt_max_steps=1", "lr_warmup_steps=0", *scale.smoke, *_RECURSIONS[recursion][0]]
    return benchmark_config(settings)


def configured(network: Network, scale: Scale, device: str) -> PretrainInstructConfig:
    """The network's settings on this device."""
    config = _composed(scale, network.recursion)
    arch = config.arch.model_copy(update={"forward_dtype": network.dtype, "attention": network.attention})
    return config.model_copy(update={"device": device, "arch": arch, "packing": network.packing})


@functools.cache
def two_steps(network: Network, scale: Scale, device: str, compiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Losses per token of two steps, and gradients of the first: all, and the levels' only."""
    torch._dynamo.reset()
    config = configured(network, scale, device)
    rows = SyntheticRows(config, _SMOKE_VOCABULARY, varied_lengths(config.dataset.seq_len))
    trainer = trainer_on(config, rows, _SMOKE_VOCABULARY, compiled=compiled)
    steps = trainer.steps()
    results = [next(steps)]
    gradients = {name: p.grad.double().cpu().flatten() for name, p in trainer.model.named_parameters() if p.grad is not None}
    results.append(next(steps))
    losses = torch.tensor([float(result.sums["nll"]) / result.weight for result in results], dtype=torch.float64)
    return losses, torch.cat(list(gradients.values())), torch.cat([g for name, g in gradients.items() if "_level." in name])


def training_errors(network: Network, scale: Scale, compiled: bool, _: Found) -> Figures:
    """Relative errors against float64 on the CPU, and for compiled code against eager code."""
    found = two_steps(network, scale, scale.device, compiled)

    def errors(reference: tuple[Tensor, Tensor, Tensor]) -> list[float]:
        parts = list(zip(found, reference, strict=True))
        loss = (parts[0][0] / parts[0][1] - 1).abs().max()  # NaN where one is
        return [float(loss), *(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in parts[1:])]

    loss, gradient, of_levels = errors(two_steps(network._replace(dtype="float64"), scale, "cpu"))
    loss_allowed, gradient_allowed = _ALLOWED[network.dtype]
    figures: Figures = {
        "passed": loss <= loss_allowed and gradient <= gradient_allowed and of_levels <= gradient_allowed,
        "loss": loss,
        "allowed": loss_allowed,
        "gradient": gradient,
        "levels' gradient": of_levels,
        "allowed ": gradient_allowed,
    }
    if compiled:
        to_eager = errors(two_steps(network, scale, scale.device))
        figures |= {"loss to eager": to_eager[0], "gradient to eager": to_eager[1]}
    return figures


@torch.inference_mode()
def decoding_errors(recursion: str, scale: Scale, engine: str, _: Found) -> Figures:
    """Cached decoding against recomputing whole rows, at one ACT step: largest differences of log p, nats."""
    models = {}
    for dtype in ("float32", "bfloat16"):
        config = configured(Network(recursion, dtype, "prefix"), scale, scale.device)
        models[dtype] = RecursiveModel(config.arch, _SMOKE_VOCABULARY).to(scale.device)
        models[dtype].cast_for_inference()

    def recomputed(dtype: str, ids: np.ndarray, prompt: int) -> Tensor:
        """log p [T, V] after the prompt's last id and those that follow."""
        model = models[dtype]
        ids_1T = torch.from_numpy(ids[None]).to(model.device)
        segments_1T = (torch.arange(len(ids), device=model.device) < prompt).long()[None]
        [refined] = model.refine_rows(ids_1T, segments_1T, act_steps=1)
        return log_probs(model.logits(refined.output_BTD[0, prompt - 1 :]), model.config.loss).double().cpu()

    prompts = [np.random.default_rng(row).integers(0, _SMOKE_VOCABULARY, length) for row, length in enumerate((17, 5, 40))]
    # Without candidates, ids are chosen on the device.
    top = _SMOKE_VOCABULARY if engine == "eager" else 0
    # As tensors, of which the largest is NaN where one is.
    cached, rounding = dict[str, float](), 0.0
    for dtype, model in models.items():
        decoder = Engine(model, eos_id=-1, act_steps=1, rows=len(prompts), positions=64, **engine_options(engine, scale))
        for prompt in prompts:
            decoder.submit(Request(Prompt(prompt, np.ones_like(prompt)), 8, top=top))
        answers: list[list[Token]] = [[] for _ in prompts]
        with no_engine_warnings():
            while decoder.busy:
                for token in decoder.tick():
                    answers[token.request].append(token)
        differences, roundings = list[Tensor](), list[Tensor]()
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = np.append(prompt, [token.id for token in answer[:-1]])
            exact_TV, same_TV = (recomputed(kind, ids, len(prompt)) for kind in ("float32", dtype))
            roundings.append((same_TV - exact_TV).abs().max())
            for place, token in enumerate(answer):
                compared, logps = zip((token.id, token.logp), *token.candidates, strict=True)
                differences.append((torch.tensor(logps).double() - exact_TV[place, list(compared)]).abs().max())
        cached[dtype], rounding = float(torch.stack(differences).max()), float(torch.stack(roundings).max())
    bound = _ALLOWED_BFLOAT16 * rounding
    return {
        "passed": cached["float32"] <= _ALLOWED_CACHED and cached["bfloat16"] <= bound,
        "float32": cached["float32"],
        "allowed": _ALLOWED_CACHED,
        "bfloat16": cached["bfloat16"],
        "allowed ": bound,
        "bfloat16 recomputed": rounding,
    }


def smoke(scale: Scale) -> Iterator[Case]:
    """Of untrained small models, at one ACT step.

    Training: relative errors against float64 on the CPU, of two steps' losses and the first step's gradients, by norm. Decoding:
    differences from log p recomputed in float32, nats.
    """

    def training(network: Network, compiled: bool) -> Case:
        code = "compiled" if compiled else "eager"
        name = f"{network.recursion}: {network.dtype}, {network.attention}, packing {network.packing}, {code}"
        seconds = COMPILING_SECONDS if compiled else 30
        return Case(name, functools.partial(training_errors, network, scale, compiled), seconds)

    # One case of each recursion after the other, so that each of six processes has a recursion to itself.
    for name in _RECURSIONS:
        yield training(Network(name, "float32", "causal"), compiled=False)
    for name in _RECURSIONS:
        yield training(Network(name, "bfloat16", "prefix", "packed"), compiled=False)
    for engine in ENGINES:
        seconds = COMPILING_SECONDS if engine == "compiled graphs" else 60
        for name in _RECURSIONS:
            yield Case(f"{name}: decoding, {engine}", functools.partial(decoding_errors, name, scale, engine), seconds)
    for name in _RECURSIONS:
        yield training(Network(name, "bfloat16", "prefix", "packed"), compiled=True)
    for name, (_, kind) in _RECURSIONS.items():
        yield training(Network(name, "float32", *kind), compiled=True)
