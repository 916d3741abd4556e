"""From a checkpoint to a model that answers. Knows nothing of training, flags or Hydra."""

from artifacts.checkpoint import Checkpoint, load_weights
from config.schema import PretrainInstructConfig
from generation.answers import Responder
from models.act import RecursiveModel
from models.device import pick_device, resolve_dtype


def load_model(checkpoint: Checkpoint, config: PretrainInstructConfig) -> RecursiveModel:
    """The checkpoint's model (its moving average if it has one) on `config.device`, cast for inference."""
    device = pick_device(config.device)
    arch = config.arch.model_copy(update={"forward_dtype": resolve_dtype(config.arch.forward_dtype, device)})
    model = RecursiveModel(arch, checkpoint.tokenizer.vocab_size)
    load_weights(model, checkpoint.weights(ema=True), checkpoint.folder)
    model.to(device).eval()
    model.cast_for_inference()
    return model


def load_responder(checkpoint: Checkpoint, config: PretrainInstructConfig) -> Responder:
    """The checkpoint's model with its tokenizer and template, at the depth that `config` asks for."""
    return Responder(
        load_model(checkpoint, config),
        checkpoint.tokenizer,
        checkpoint.template,
        context=config.dataset.seq_len,
        act_steps=config.depth,
        halt_threshold=config.generation.halt_threshold,
    )
