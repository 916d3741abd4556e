"""The settings that every training run has, whatever it trains on."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from config.schema.arch import ArchConfig
from config.schema.base import Fixed, Free, PathStr, Section


def _auto_or_steps(value: object) -> object:
    # Else each type of the union would add a message of its own.
    if value in ("auto", None) or (type(value) is int and value > 0):
        return value
    raise ValueError("should be auto, null or a number of optimizer steps from 1 on")


class CheckpointConfig(Section):
    """When a run saves checkpoints besides those of its evaluations, and which it keeps."""

    every_minutes: float | None = Field(gt=0)
    """Minutes between checkpoints: the most work that a crash can lose; null: not by time."""
    every_steps: PositiveInt | None
    """Optimizer steps between checkpoints; null: not by steps."""
    keep_last: PositiveInt | None
    """How many of the newest checkpoints to keep; null: all."""
    keep_best: int = Field(ge=0)
    """With keep_last: how many of those with the lowest held-out loss to keep as well."""


class EarlyStoppingConfig(Section):
    """When a run ends because its held-out loss has stopped falling."""

    patience: PositiveInt | None
    """Evaluations in a row without a lower held-out loss after which the run ends. The best checkpoint is kept. null: never."""
    min_delta: float = Field(ge=0)
    """By how many nats an evaluation's loss must be below the best one to count as lower."""


class TrainingConfig(Section):
    """What every training run has, whatever it trains on."""

    arch: Fixed[ArchConfig]
    project_name: Free[str] = Field(min_length=1)
    """Folder of the run under checkpoint_dir, and its W&B project."""
    run_name: Free[str | None]
    """Name of the run; null: generated."""
    checkpoint_dir: Free[PathStr]
    """Where runs are kept: <checkpoint_dir>/<project_name>/<run_name>/step_<N>."""
    checkpoint: Free[CheckpointConfig]
    resume: Free[PathStr | None]
    """auto: resume from the newest whole checkpoint of run_name, if there is one. A folder, step_<N> or a run's: from there."""
    load_checkpoint: Free[PathStr | None]
    """Start at step 0 with the weights of this checkpoint (their moving average, if it has one) instead of random ones."""
    seed: Fixed[int] = Field(ge=0)
    """Seed of the initial weights, the order of examples and the drawn depths."""
    device: Literal["auto", "cpu", "cuda", "mps"]
    """auto: CUDA (AMD's cards, too) if there is one, else MPS (Apple), else the CPU."""
    compile: Literal["auto"] | bool
    """torch.compile the level stacks for training. auto: on CUDA. The environment variable DISABLE_COMPILE=1 turns it off."""
    tf32: bool
    """Multiply float32 matrices in TF32 on CUDA: faster, with 10 bits of mantissa. For arch.forward_dtype=float32."""
    epochs: PositiveInt
    """Passes over the training split."""
    global_batch_size: Fixed[PositiveInt]
    """Rows of an optimizer step, of all ranks together; for puzzles slots, in which rows stay for several."""
    micro_batch_size: PositiveInt | None
    """Most rows that one rank computes at a time, to save memory. The gradient is the same. null: all of its rows."""
    dist_timeout_minutes: Free[float] = Field(gt=0)
    """How long a rank waits for another before it gives up."""
    eval_interval: Free[PositiveInt]
    """Epochs between evaluations; the end of the run is always evaluated."""
    eval_every_steps: Free[Annotated[Literal["auto"] | PositiveInt | None, BeforeValidator(_auto_or_steps)]]
    """Optimizer steps between further evaluations. auto: ten in the run, evenly spaced, if it is long enough; null: none."""
    max_steps: PositiveInt | None
    """Optimizer steps after which the run ends; its learning-rate schedule ends there, too. null: at the end of the data."""
    max_minutes: Free[float | None] = Field(gt=0)
    """Minutes after which the run ends, restarts included; the learning-rate schedule ignores it. null: at the end of the data."""
    early_stopping: Free[EarlyStoppingConfig]
    log_interval: Free[PositiveInt]
    """Optimizer steps between lines of metrics.jsonl."""
    wandb: Free[Literal["offline", "online", "disabled"] | None]
    """Log to W&B. offline: into the run's folder, for `wandb sync`. null: as WANDB_MODE says, else offline."""
    tensorboard: Free[bool]
    """Log to TensorBoard in the run's folder; needs `pip install tensorboard`."""
    plot: Free[bool]
    """Draw run.png in the run's folder at each evaluation."""
    report: Free[bool]
    """Write what became of the run into its folder at its end, as a page: report.html."""
    dry_run: Free[bool]
    """Print what the run would take (parameters, memory, steps, FLOPs, time); write nothing but the token cache of its data."""
    optimizer: Fixed[Literal["adam_atan2", "muon"]]
    """adam_atan2: for all weights. muon: Muon for the matrices of the level stacks, AdamATan2 for the rest."""
    lr: float = Field(gt=0)
    """Peak learning rate of AdamATan2."""
    muon_lr: float = Field(gt=0)
    """Peak learning rate of Muon."""
    grad_clip: float | None = Field(gt=0)
    """Clip the gradient to this norm; null: never."""
    skip_limit: Free[PositiveInt]
    """Steps in a row with a loss or gradient that isn't finite after which the run stops. Such a step updates no weight."""
    lr_min_ratio: float = Field(ge=0, le=1)
    """Learning rate at the end of the cosine, as a share of the peak."""
    lr_warmup_steps: int = Field(ge=0)
    """Warm-up. Puzzles: optimizer steps. Text: this times global_batch_size examples, at most a tenth of its schedule."""
    weight_decay: float = Field(ge=0)
    """Decoupled weight decay: a step multiplies weights by 1 - learning rate * weight_decay."""
    beta1: float = Field(ge=0, lt=1)
    """AdamATan2: decay of the gradient's running mean."""
    beta2: float = Field(ge=0, lt=1)
    """AdamATan2: decay of the squared gradient's running mean."""
    ema: Fixed[bool]
    """Keep an exponential moving average of the weights, and evaluate and generate with it."""
    ema_rate: float = Field(gt=0, lt=1)
    """Decay of that average per optimizer step."""

    @property
    def saves_evaluations(self) -> bool:
        """Whether every evaluation saves a checkpoint, not only the last one."""
        return True

    @property
    def unevaluated_intervals(self) -> int:
        """How many `eval_interval`s at the start of the run end without an evaluation."""
        return 0
