"""From a checkpoint to a model that answers. Knows nothing of training, flags or Hydra."""

import dataclasses

import torch

from artifacts.checkpoint import Checkpoint, load_weights
from artifacts.halting import read_halting_calibration
from config.schema import PretrainInstructConfig
from dataset.text.conversation import Template
from dataset.text.tokenizer import Tokenizer
from generation.answers import Options, Responder
from generation.sampling import Sampling
from models.act import RecursiveModel
from models.device import pick_device, resolve_arch, should_compile


def load_model(checkpoint: Checkpoint, config: PretrainInstructConfig) -> RecursiveModel:
    """The checkpoint's model (its moving average if it has one) on `config.device`, cast for inference, calibrated if it was."""
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


def load_responder(checkpoint: Checkpoint, config: PretrainInstructConfig) -> Responder:
    """The checkpoint's model with its tokenizer and template, answering as `config` asks for.

    Raises UsageError if it asks for compiled code on a CPU without a C++ compiler.
    """
    model = load_model(checkpoint, config)
    responder = make_responder(model, checkpoint.tokenizer, checkpoint.template, config)
    # Not a model in training: compiled code keeps the weights it was made with.
    return dataclasses.replace(responder, compiled=should_compile(config.generation.compile, model.device))


def make_responder(model: RecursiveModel, tokenizer: Tokenizer, template: Template, config: PretrainInstructConfig) -> Responder:
    """`model` answering as `config` asks for, but for `generation.compile`."""
    generation = config.generation
    sampling = Sampling(
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        seed=generation.seed,
    )
    return Responder(
        model=model,
        tokenizer=tokenizer,
        template=template,
        context=config.dataset.seq_len,
        options=Options(config.answer_limit, config.depth, generation.halt_threshold, sampling, tuple(generation.stop)),
        rows=generation.batch_size,
        kv_budget_gb=generation.kv_budget_gb,
    )
