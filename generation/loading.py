"""Loads a checkpoint to answer with it. Knows nothing of training, flags or Hydra."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from artifacts.checkpoint import Checkpoint, open_checkpoint
from artifacts.halting import read_halting_calibration
from artifacts.weights import load_weights
from config.schema import PretrainInstructConfig, parse_config
from dataset.text.conversation import Template
from dataset.text.tokenizer import Tokenizer
from generation.answers import Options, Responder
from generation.sampling import Sampling
from models.act import RecursiveModel
from models.device import pick_device, resolve_arch, should_compile


def load(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    config: PretrainInstructConfig | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    system: str | None = None,
    **options: Any,
) -> Responder:
    """Load a trained model, ready to answer.

    checkpoint: a folder step_<N>, a run's folder (for its newest checkpoint), or an opened
    checkpoint. config: settings to use; None: the checkpoint's.
    device: auto, cpu, cuda or mps. dtype: auto, bfloat16, float32 or float64. None: as in `config`.
    system: text of the system turn for a question without one, "" for none; None: as in training.
    options: keys of `generation` in config/schema, which override `config`.

    Raises UsageError for a checkpoint that is missing or damaged, for an option that is unknown or
    out of range, and for compiling on a CPU without a C++ compiler.

    >>> model = load("checkpoints/demo/run", device="cpu", act_steps=1, temperature=0.8, batch_size=16)
    >>> model.options.act_steps
    1
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(Path(checkpoint).expanduser())
    values = (config or opened.config).model_dump()
    values["generation"] |= options
    values["device"] = device or values["device"]
    values["arch"]["forward_dtype"] = dtype or values["arch"]["forward_dtype"]
    if system is not None:
        values["dataset"]["default_system_prompt"] = system
    used = parse_config(values)
    model = load_model(opened, used)
    responder = make_responder(model, opened.tokenizer, opened.template, used)
    # Compiled code has a copy of the weights, so a model in training isn't compiled.
    return dataclasses.replace(responder, compiled=should_compile(used.generation.compile, model.device))


def load_model(checkpoint: Checkpoint, config: PretrainInstructConfig) -> RecursiveModel:
    """The checkpoint's model (moving average if there is one) on `config.device`, cast for
    inference, with any calibration.
    """
    device = pick_device(config.device)
    arch = resolve_arch(config.arch, device)
    model = RecursiveModel(arch, checkpoint.tokenizer.vocab_size)
    load_weights(model, checkpoint.weights(ema=True), checkpoint.folder)
    calibration = read_halting_calibration(checkpoint)
    if calibration is not None:
        model.halt_calibration = torch.tensor([calibration.scale, calibration.shift], dtype=model.halt_calibration.dtype)
    model.to(device).eval()
    model.cast_for_inference()
    return model


def make_responder(model: RecursiveModel, tokenizer: Tokenizer, template: Template, config: PretrainInstructConfig) -> Responder:
    """A responder with `model` and the settings of `config`, except `generation.compile`."""
    generation = config.generation
    sampling = Sampling(**{field.name: getattr(generation, field.name) for field in dataclasses.fields(Sampling)})
    return Responder(
        model=model,
        tokenizer=tokenizer,
        template=template,
        context=config.dataset.seq_len,
        options=Options(config.answer_limit, config.depth, generation.halt_threshold, sampling, tuple(generation.stop)),
        rows=generation.batch_size,
        kv_budget_gb=generation.kv_budget_gb,
        system=config.dataset.default_system_prompt,
    )
