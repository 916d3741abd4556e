"""Every knob of a run: its type, its limits and one sentence about it, checked when a config is built.

Plain pydantic: no Hydra, no torch, so every room may read a config. The defaults that a user sees stand in the YAML files beside
this one; a value that is wrong, or a key that does not exist, is a `UsageError` before any work is done.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from config.errors import UsageError

# What a run on puzzles can keep of each row of an evaluation.
PuzzleOutputName = Literal["inputs", "labels", "puzzle_identifiers", "q_halt_logits", "preds", "preds_by_step", "steps"]

FieldName = Literal[
    "messages", "prompt", "input", "context", "response", "system", "history", "text",
    "role", "content", "weight", "train", "loss", "mask",
]  # fmt: skip


class OnResume(Enum):
    """What it means that a field has another value when a run is resumed; a field without a mark has its section's."""

    FIXED = "the checkpoint means nothing under another value, so it is refused"
    REPORTED = "the run resumes, and says that it isn't quite the one that was begun"
    FREE = "no weight depends on it, or what it names is compared by content"


Value = TypeVar("Value")
Fixed = Annotated[Value, OnResume.FIXED]
Reported = Annotated[Value, OnResume.REPORTED]
Free = Annotated[Value, OnResume.FREE]
# A file or folder; a leading ~ is the home folder.
PathStr = Annotated[str, AfterValidator(os.path.expanduser)]


def user_path(text: str) -> Path:
    """A path that a person has typed: the `type=` of every flag that is one. A leading ~ is the home folder."""
    return Path(os.path.expanduser(text))  # pathlib's own raises for a user that there isn't


class TextType(NamedTuple):
    """What a field of text takes beside text."""

    is_list: bool
    takes_null: bool


def text_type(annotation: Any) -> TextType | None:
    """Whether a field of this type holds text, or a list of texts; None: something else, choices among fixed words included."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = {get_args(option)[0] if get_origin(option) is Annotated else option for option in options} - {NoneType}
    if kinds == {str}:
        return TextType(False, NoneType in options)
    [kind] = kinds if len(kinds) == 1 else [None]
    if get_origin(kind) in (list, tuple):
        item = get_args(kind)[0]
        if text_type(item) == TextType(False, False) or get_origin(item) is Literal:
            return TextType(True, NoneType in options)
    return None


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _text_may_look_like_anything(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` as a boolean where a text is meant, and one text stands for a list of one."""
        text = text_type(cls.model_fields[str(info.field_name)].annotation)
        if text is None:
            return value
        if text.is_list and isinstance(value, str | bool | int | float):
            value = [value]
        if isinstance(value, list | tuple):
            return [_without_booleans(item) for item in value]
        return _without_booleans(value)


def _without_booleans(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


class HaltConfig(_Section):
    """How the halting head begins and learns."""

    bias: float
    """Initial bias of the halting head: -1 for text, -5 for puzzles."""
    backprop: bool
    """Let the halting loss reach the recursion. Off, its gradient stops at the halting head."""


class ArchConfig(_Section):
    """The network: sizes, recursion, attention, number format, halting."""

    name: Literal["looped", "trm", "trm_singlez", "trm_hier6", "hrm", "transformers_baseline"]
    """The recursion, a file of models/recursive_reasoning/."""
    hidden_size: PositiveInt
    """Channels of the state."""
    num_heads: PositiveInt
    """Attention heads; each has hidden_size / num_heads channels, rounded down; an even number with rotary positions."""
    expansion: float = Field(gt=0)
    """SwiGLU width: expansion * hidden_size * 2/3, rounded up to a multiple of 256."""
    H_layers: int = Field(ge=0)
    """Transformer blocks in the answer state's own stack: hrm and transformers_baseline; 0 where all calls share one stack."""
    L_layers: int = Field(ge=0)
    """Transformer blocks in the reasoning state's stack, which the trm family uses for the answer state, too."""
    H_cycles: PositiveInt
    """Updates of the answer state in one ACT step."""
    L_cycles: int = Field(ge=0)
    """Updates of the reasoning state before each update of the answer state; 0 for transformers_baseline, which has none. looped
    has one state, which is updated H_cycles * (L_cycles + 1) times."""
    grad_calls: PositiveInt | Literal["all"] | None
    """How many of the last level calls carry gradient: of an ACT step's for puzzles, for text of all ACT steps of a row together.
    null: as the original, those of each ACT step's last H cycle, for hrm the last 2; none runs from one ACT step to the next."""
    norm: Literal["post", "pre"]
    """post: normalise after each residual sum, as the original. pre: the input of attention and of the SwiGLU, and the output of a
    level call."""
    qk_norm: bool
    """Normalise the queries and keys of each head (RMS, without a weight) before they are rotated and multiplied."""
    attention: Literal["full", "causal", "prefix"]
    """full: all see all (puzzles). causal: the past. prefix: causal, but a prompt segment sees itself whole."""
    mlp_t: bool
    """A SwiGLU over the positions of each channel in place of attention; every position sees every other, so for puzzles."""
    pos_encodings: Literal["rope", "learned", "none"]
    """Rotary positions, a learned vector for each place of a puzzle's row, or none."""
    rope_theta: float = Field(gt=0)
    """Base of the rotary frequencies."""
    tie_embeddings: bool
    """Use the embedding matrix as the vocabulary head."""
    forward_dtype: Reported[Literal["auto", "bfloat16", "float32", "float64"]]
    """Number format of activations; weights stay float32. auto: bfloat16 where the processor multiplies it natively."""
    activation_checkpointing: Free[bool]
    """Training keeps only the inputs of the level calls that carry gradient and computes them again in the backward pass."""
    loss: Literal["stablemax", "softmax"]
    """How logits become probabilities, in training, measuring and sampling alike."""
    halt_max_steps: PositiveInt
    """N, the most ACT steps: the depth of evaluation and generation unless they are told another."""
    no_ACT_continue: bool
    """Puzzles: a row halts when its halting logit is positive. Off, when it is above the continuing logit, which is then trained to
    foretell the next ACT step's logits by a second forward (transformers_baseline compares the two without training it)."""
    halt_exploration_prob: float = Field(ge=0, le=1)
    """Puzzles: probability, drawn anew at each ACT step, that a row may not halt before a depth drawn from 2..halt_max_steps."""
    act_enabled: bool
    """Puzzles: rows may halt before halt_max_steps in training."""
    act_inference: bool
    """Puzzles: rows may halt before halt_max_steps in evaluation."""
    puzzle_emb_ndim: int = Field(ge=0)
    """Channels of the learned vector that each puzzle has; 0: none, as for text."""
    puzzle_emb_len: int = Field(ge=0)
    """Positions before the tokens that the vector is laid out over, padded with zeros; 0: as few as it needs."""
    halt: Reported[HaltConfig]

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def level_calls(self) -> int:
        """Calls of a stack in one ACT step, of any recursion."""
        return self.H_cycles * (self.L_cycles + 1)

    @property
    def prefix_len(self) -> int:
        """Positions before the tokens that the puzzle's vector takes."""
        return self.puzzle_emb_len or -(-self.puzzle_emb_ndim // self.hidden_size)

    @property
    def trains_continue(self) -> bool:
        """Whether the continuing logit has a loss, which takes a second forward."""
        return not self.no_ACT_continue and self.name != "transformers_baseline"

    @model_validator(mode="after")
    def _recursion_has_its_parts(self) -> Self:
        has_H, has_L = self.name in ("hrm", "transformers_baseline"), self.name != "transformers_baseline"
        for key, has in (("H_layers", has_H), ("L_layers", has_L), ("L_cycles", has_L)):
            value = getattr(self, key)
            if has and not value and (self.name, key) != ("looped", "L_cycles"):
                raise ValueError(f"{key} must be at least 1 for {self.name}")
            if value and not has:
                raise ValueError(f"{key} {value} means nothing to {self.name}: set it to 0")
        if self.name == "transformers_baseline" and self.H_cycles != 1:
            raise ValueError(f"H_cycles {self.H_cycles}: transformers_baseline passes its blocks once per ACT step, set it to 1")
        if self.name == "trm_hier6" and self.L_cycles > 6:
            raise ValueError(f"L_cycles {self.L_cycles}: trm_hier6 has a state for each of at most 6 L calls")
        calls = self.level_calls * self.halt_max_steps
        if isinstance(self.grad_calls, int) and self.grad_calls > calls:
            raise ValueError(
                f"grad_calls {self.grad_calls} is more than the {calls} level calls of {self.halt_max_steps} ACT steps"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.head_dim == 0 or (self.pos_encodings == "rope" and self.head_dim % 2):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be num_heads {self.num_heads} times an even number or a little more: heads "
                f"have {self.head_dim} channels, rotary positions turn pairs"
            )
        if self.attention != "full" and (self.mlp_t or self.pos_encodings == "learned"):
            what = "mlp_t lets every position see every other" if self.mlp_t else "pos_encodings=learned is for rows of one length"
            raise ValueError(f"{what}: choose attention=full (puzzles), or leave it out")
        if self.norm == "pre" and self.mlp_t:
            raise ValueError("mlp_t normalises its residual sums over positions, which norm=pre has none of: choose norm=post")
        if self.puzzle_emb_ndim == 0 and self.puzzle_emb_len:
            raise ValueError(f"puzzle_emb_len {self.puzzle_emb_len} without a vector to fill it: set puzzle_emb_ndim, or this to 0")
        if self.puzzle_emb_ndim > self.prefix_len * self.hidden_size:
            raise ValueError(
                f"puzzle_emb_ndim {self.puzzle_emb_ndim} doesn't fit into puzzle_emb_len {self.puzzle_emb_len} positions of "
                f"{self.hidden_size} channels"
            )
        return self


class SourceConfig(_Section):
    """Where conversations come from."""

    source: Literal["slimorca", "openorca", "jsonl", "hub", "sample"]
    """slimorca, openorca, jsonl: files in data_dir. hub: a data set of the Hugging Face hub. sample: the bundled task families."""
    data_dir: Free[PathStr]
    """Folder of the data; or one that `datasets` has saved to."""
    files: Free[tuple[PathStr, ...]]
    """openorca, jsonl: names or globs in data_dir (docs/data.md has the formats); none: all files there that can be read."""
    shards: PositiveInt | None
    """openorca, jsonl: so many of these files, drawn by seed; null: all."""
    repo: Free[str | None]
    """Dataset repository on the Hugging Face hub. Not hub: the one that missing files are fetched from; null: none are fetched."""
    revision: Free[str]
    """Branch, tag or commit of it."""
    sha256: Free[dict[str, str]]
    """Expected SHA-256 of its files by name; a file that isn't named is checked against the hub's own."""
    config: Free[str | None]
    """hub: which of the repository's configurations; null: its default."""
    split: Free[str]
    """hub, and folders that `datasets` has saved to: the split to train on."""
    validation_split: Free[str | None]
    """hub, and folders that `datasets` has saved to: the split to measure on, in place of test_ratio; null: none."""
    validation_files: Free[tuple[PathStr, ...]]
    """openorca, jsonl: files to measure on, in place of test_ratio; as `files`."""
    fields: Free[dict[FieldName, str]]
    """What rows call a field, where that isn't one of its usual names (docs/data.md): {prompt: pregunta, response: respuesta}."""
    roles: Free[dict[str, Literal["system", "user", "assistant", "tool"]]]
    """Names of roles beside the usual ones, and whose turns theirs are."""
    tool_turns: Free[Literal["error", "drop", "as_user"]]
    """A tool's turn or call: stop; leave it out; or read what a tool says as the user's, and a call as the assistant's, in JSON."""
    ignore: Free[tuple[str, ...]]
    """Keys, of rows or within them, whose text is no part of the conversation. Text under any other unknown key stops the run."""
    subset_size: PositiveInt | None
    """Training rows taken, with the test split's proportional share; of a split opened by itself, its rows. null: all."""

    @property
    def has_own_validation(self) -> bool:
        """Whether rows to measure on are named, and not drawn from those of `files`."""
        return bool(self.source == "sample" or self.validation_split or self.validation_files)

    @model_validator(mode="after")
    def _fits_the_source(self) -> Self:
        if self.source not in ("openorca", "jsonl") and (self.files or self.shards or self.validation_files):
            raise ValueError(f"source {self.source} knows its files: files, shards and validation_files are for openorca and jsonl")
        if self.source != "hub" and self.config:
            raise ValueError(f"source {self.source} has no configurations: config is for hub")
        if self.source not in ("hub", "jsonl") and (self.split != "train" or self.validation_split):
            raise ValueError(f"source {self.source} has no splits of its own: split and validation_split are for hub and jsonl")
        if self.validation_split and self.validation_files:
            raise ValueError("validation_split and validation_files both say what to measure on: choose one")
        return self

    @model_validator(mode="after")
    def _one_meaning_a_key(self) -> Self:
        named = [*self.fields.values(), *self.ignore]
        twice = next((name for name in named if named.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"fields and ignore name the key {twice!r} twice: it has one meaning at most")
        return self


class DatasetConfig(SourceConfig):
    """Which conversations, how they become tokens, and how they are split."""

    tokenizer_path: Free[PathStr]
    """SentencePiece model, or tokenizer.json of Hugging Face tokenizers."""
    seq_len: Fixed[int] = Field(ge=2)
    """Most input positions of a row."""
    test_ratio: float = Field(ge=0, lt=1)
    """Share of the rows held out; 0 trains without evaluation."""
    seed: Fixed[int] = Field(ge=0)
    """Seed of the split."""
    default_system_prompt: str | None
    """System turn for rows that have none; null or empty: no system turn."""
    long_rows: Literal["keep_prompt_end", "truncate", "drop"]
    """A row longer than seq_len: cut the oldest of its prompt, then its end; or its end only; or drop it. All are counted."""
    on_bad_row: Literal["error", "skip"]
    """A malformed row stops the run with file and line, or is counted and skipped."""
    supervise: Literal["assistant", "all"]
    """Train on the assistant's text and its EOS, or on every token."""
    processes: Free[PositiveInt | None]
    """Processes that tokenize; the tokens are the same for any number. null: one for each CPU, at most 16."""
    cache_dir: Free[PathStr | None]
    """Where rows and tokens are kept for later runs, and a hub data set's files; null: where `datasets` keeps its (HF_HOME)."""


class StageConfig(_Section):
    """A part of a run: which sources, mixed how, for how long."""

    mix: dict[str, PositiveFloat | None] = Field(min_length=1)
    """Names of `sources`, each with its share of the examples, relative to the others'; null for all: by their numbers of rows."""
    epochs: PositiveInt | None = None
    """So many times all rows of every source; one that its share runs through faster comes again meanwhile."""
    examples: PositiveInt | None = None
    """Or so many examples in all."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.examples is None):
            raise ValueError("a stage has either epochs or examples: give one of them")
        if len({weight is None for weight in self.mix.values()}) > 1:
            raise ValueError("a mix has a share for each of its sources, or null for each: by their numbers of rows")
        return self


class GenerationConfig(_Section):
    """How answers are generated: depth, length, choice of tokens, and how many at a time."""

    act_steps: PositiveInt | None
    """Fixed ACT steps a token; null: arch.halt_max_steps."""
    halt_threshold: float | None = Field(gt=0, lt=1)
    """A token stops for good when its halting probability passes this; null: every token takes all steps."""
    max_output_tokens: PositiveInt | None
    """Longest answer; null: half of dataset.seq_len."""
    temperature: float = Field(ge=0)
    """0: the most probable token. Above: draw, the flatter the higher."""
    top_k: PositiveInt | None
    """Draw among the k most probable tokens only; null: all."""
    top_p: float = Field(gt=0, le=1)
    """Draw among the fewest tokens that together have this probability."""
    min_p: float = Field(ge=0, le=1)
    """Draw among tokens of at least this share of the most probable one's probability."""
    repetition_penalty: float = Field(gt=0)
    """Logits of tokens seen before, in the prompt too, are divided by this if positive, multiplied if negative; 1: nothing."""
    seed: int = Field(ge=0)
    """Seed of the draws; a request's draws don't depend on what else is answered beside it."""
    stop: list[str]
    """An answer ends before the first of these texts."""
    batch_size: PositiveInt
    """Answers that form at the same time, at most."""
    compile: bool
    """torch.compile what an answer's next token takes: faster after a warm-up. DISABLE_COMPILE=1 turns it off.

    On CUDA up to 16 answers of a float32 or bfloat16 model with arch.norm=post have a kernel of their own instead.
    """
    kv_budget_gb: float = Field(gt=0)
    """Most memory for keys and values, in GB (10^9 bytes); answers wait for room."""


def _off(value: object) -> object:
    return "off" if value is False else value  # YAML reads a bare off as false


def _auto_or_steps(value: object) -> object:
    # One message, where each kind that it may be would have its own.
    if value in ("auto", None) or (type(value) is int and value > 0):
        return value
    raise ValueError("should be auto, null or a number of optimizer steps from 1 on")


class CheckpointConfig(_Section):
    """When a run is saved beside its evaluations, and which of its checkpoints are kept."""

    every_minutes: float | None = Field(gt=0)
    """Save after so many minutes since the last checkpoint: the most work that a crash costs; null: not by the clock."""
    every_steps: PositiveInt | None
    """Save after every so many optimizer steps; null: not by steps."""
    keep_last: PositiveInt | None
    """Of the run's checkpoints keep so many of the newest; null: all."""
    keep_best: int = Field(ge=0)
    """With keep_last, also keep so many of those with the lowest held-out loss."""


class EarlyStoppingConfig(_Section):
    """When a run ends because its held-out loss has stopped falling."""

    patience: PositiveInt | None
    """End after so many evaluations in a row without a lower held-out loss, and keep the best checkpoint; null: never."""
    min_delta: float = Field(ge=0)
    """How much lower than the best loss before, in nats, an evaluation's must be to count as lower."""


class TrainingConfig(_Section):
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
    """auto: go on from the newest whole checkpoint of run_name, if there is one. A folder, step_<N> or a run's: from there."""
    load_checkpoint: Free[PathStr | None]
    """Begin with the weights of this checkpoint (their moving average, if it has one) instead of drawn ones, at step 0."""
    seed: Fixed[int] = Field(ge=0)
    """Seed of weights, order and drawn depths."""
    device: Literal["auto", "cpu", "cuda", "mps"]
    """auto: CUDA (of AMD's cards, too) if there is one, else MPS (Apple's), else the CPU."""
    compile: Literal["auto"] | bool
    """torch.compile the level stacks for training. auto: on CUDA. The environment variable DISABLE_COMPILE=1 turns it off."""
    tf32: bool
    """Multiply float32 matrices in TF32 on CUDA: faster, with 10 bits of mantissa. For arch.forward_dtype=float32."""
    epochs: PositiveInt
    """Passes over the training split."""
    global_batch_size: Fixed[PositiveInt]
    """Rows of an optimizer step, of all ranks together; for puzzles slots, in which rows stay for several."""
    micro_batch_size: PositiveInt | None
    """Most rows that one rank computes at the same time, to save memory; gradients add up to the same. null: all of its rows."""
    dist_timeout_minutes: Free[float] = Field(gt=0)
    """Several ranks: a rank that waits so long for another gives up."""
    eval_interval: Free[PositiveInt]
    """Epochs between evaluations; the end of the run is always evaluated."""
    eval_every_steps: Free[Annotated[Literal["auto"] | PositiveInt | None, BeforeValidator(_auto_or_steps)]]
    """Also evaluate after every so many optimizer steps. auto: ten times, evenly spaced, if the run is long enough; null: never."""
    max_steps: PositiveInt | None
    """End after so many optimizer steps; the learning rate reaches its end there. null: at the end of the data."""
    max_minutes: Free[float | None] = Field(gt=0)
    """End once the run has taken so long, restarts included; the learning rate doesn't know of it. null: at the end of the data."""
    early_stopping: Free[EarlyStoppingConfig]
    log_interval: Free[PositiveInt]
    """Optimizer steps between lines of metrics.jsonl."""
    wandb: Free[Literal["offline", "online", "disabled"] | None]
    """Log to W&B: into the run's folder for a later `wandb sync`, at once, not at all. null: as WANDB_MODE says, else offline."""
    tensorboard: Free[bool]
    """Log to TensorBoard, too, in the run's folder; needs `pip install tensorboard`."""
    plot: Free[bool]
    """Draw the run into its folder, run.png, at each evaluation."""
    dry_run: Free[bool]
    """Say what the run would take (parameters, memory, steps, FLOPs, time) and write nothing but the token cache of its data."""
    optimizer: Fixed[Literal["adam_atan2", "muon"]]
    """adam_atan2: for all weights. muon: Muon for the matrices of the level stacks, AdamATan2 for the rest."""
    lr: float = Field(gt=0)
    """Peak learning rate of AdamATan2."""
    muon_lr: float = Field(gt=0)
    """Peak learning rate of Muon."""
    grad_clip: float | None = Field(gt=0)
    """Scale the gradient of a step down to this norm if it is larger; null: never."""
    skip_limit: Free[PositiveInt]
    """A step whose loss or gradient isn't finite moves no weight; after so many of them in a row the run stops."""
    lr_min_ratio: float = Field(ge=0, le=1)
    """Share of the peak learning rates left at the end of the cosine."""
    lr_warmup_steps: int = Field(ge=0)
    """Warm-up. Puzzles: optimizer steps. Text: this times global_batch_size examples, at most a tenth of its schedule."""
    weight_decay: float = Field(ge=0)
    """Decoupled weight decay: a step multiplies weights by 1 - learning rate * weight_decay."""
    beta1: float = Field(ge=0, lt=1)
    """AdamATan2: decay of the gradient's running mean."""
    beta2: float = Field(ge=0, lt=1)
    """AdamATan2: decay of the squared gradient's running mean."""
    ema: Fixed[bool]
    """Keep an exponential moving average of the weights, evaluate and generate with it."""
    ema_rate: float = Field(gt=0, lt=1)
    """Decay of that average per optimizer step."""

    @property
    def saves_evaluations(self) -> bool:
        """Whether each evaluation leaves a checkpoint, and not the last one alone."""
        return True

    @property
    def unevaluated_intervals(self) -> int:
        """How many `eval_interval`s at the beginning end without an evaluation."""
        return 0


# Of the knobs for puzzles, what text must leave them at; the others are refused with causal attention.
_WITHOUT_PUZZLES: dict[str, object] = {
    "puzzle_emb_ndim": 0,
    "no_ACT_continue": True,
    "halt_exploration_prob": 0.0,
    "act_enabled": True,
    "act_inference": False,
}


class PretrainInstructConfig(TrainingConfig):
    """One instruction-tuning run."""

    dataset: DatasetConfig
    sources: dict[str, SourceConfig]
    """With `stages`: their sources, by the names that mixes use. Split, template, lengths and all else are `dataset`'s."""
    stages: tuple[StageConfig, ...]
    """What is trained on, one after the other, each with epochs of its own (one, if it counts examples); none: all of `dataset`."""
    lr_schedule: Literal["run", "stage"]
    """Warm-up and cosine once over the whole run, or anew over each of its stages."""
    generation: Free[GenerationConfig]
    act_steps: Literal["fixed", "growing", "drawn"]
    """How many ACT steps the rows of an optimizer step take: halt_max_steps; 1 at first and halt_max_steps from `grow_until` on; or
    a number drawn for the step, evenly of 1..halt_max_steps."""
    grow_until: float = Field(ge=0, le=1)
    """growing: share of the run at which the number of ACT steps has come to halt_max_steps, in even steps."""
    loss_discount: float = Field(ge=0, le=1)
    """Weight of an ACT step's loss, relative to that of the step after it. 1: all weigh the same; 0: the last one alone."""
    eval_examples: Free[PositiveInt | None]
    """Test rows of each source used in evaluations; null: all."""
    sample_answers: Free[int] = Field(ge=0)
    """Answers generated and shown at each evaluation."""
    dataloader_workers: Free[int] = Field(ge=0)
    """Background threads that read rows ahead of the training loop; 0 reads in the loop, as several ranks always do."""
    pad_multiple: Free[PositiveInt]
    """Row lengths are padded to a multiple of this for attention (few distinct shapes help compiled code)."""
    packing: Annotated[Literal["off", "bucketed", "packed"], BeforeValidator(_off)]
    """Attention rows in training: one conversation each, as wide as the longest; in groups of like length; or several to a row.

    Without effect where attention needs no rows: in bfloat16, compiled, on CUDA. Other compiled code takes bucketed for off.
    """

    @property
    def depth(self) -> int:
        """ACT steps a token takes, at most, in measuring and generating."""
        return self.generation.act_steps or self.arch.halt_max_steps

    @property
    def answer_limit(self) -> int:
        """Most tokens of a generated answer."""
        return self.generation.max_output_tokens or self.dataset.seq_len // 2

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.arch.attention == "prefix" and self.dataset.supervise == "all":
            raise ValueError(
                "dataset.supervise=all trains on the prompt, and arch.attention=prefix lets a prompt position see the token it "
                "should predict: choose dataset.supervise=assistant or arch.attention=causal"
            )
        if self.arch.attention == "full":
            raise ValueError("arch.attention=full lets a position see the token it should predict: choose causal or prefix")
        for key, value in _WITHOUT_PUZZLES.items():
            if getattr(self.arch, key) != value:
                raise ValueError(f"arch.{key}={getattr(self.arch, key)} is for puzzles, and text has none: leave it at {value}")
        if self.generation.act_steps is not None and self.generation.act_steps > self.arch.halt_max_steps:
            raise ValueError(
                f"generation.act_steps {self.generation.act_steps} is more than arch.halt_max_steps {self.arch.halt_max_steps}"
            )
        return self

    @model_validator(mode="after")
    def _stages_and_their_sources(self) -> Self:
        used = {name for stage in self.stages for name in stage.mix}
        if used != set(self.sources):
            raise ValueError(
                f"stages mix the sources {sorted(used)}, and sources has {sorted(self.sources)}: both must have the same names"
            )
        if any(source.source == "sample" for source in self.sources.values()):
            raise ValueError(
                "a source of stages can't be sample: its builder made its split, so what it holds out another source could train "
                "on; build it into a file of a jsonl source"
            )
        if len({source.has_own_validation for source in self.sources.values()}) > 1:
            raise ValueError(
                "some sources name what to measure on and others are split by hash, so what one holds out another could train on: "
                "give all of them validation_files or validation_split, or none"
            )
        if self.stages and self.epochs != 1:
            raise ValueError(f"epochs {self.epochs} is for a run without stages: give each stage its own")
        return self


class EvaluatorConfig(_Section):
    """A measure beyond the metrics of rows. Given in a list, so its defaults, the original's, stand here."""

    name: Literal["arc@ARC"]
    """arc@ARC: votes of a puzzle's augmented forms, pass@K and submission.json (evaluators/arc.py)."""
    pass_Ks: tuple[PositiveInt, ...] = (1, 2, 5, 10, 100, 1000)
    """K: a test is solved if its output is among the K grids with most votes."""
    submission_K: PositiveInt = 2
    """Grids of each test in submission.json."""
    aggregated_voting: bool = True
    """Votes of earlier evaluations of the run count on."""


class PretrainPuzzleConfig(TrainingConfig):
    """One run on puzzles, under the original's names."""

    data_paths: Free[tuple[PathStr, ...]] = Field(min_length=1)
    """Folders of puzzle data sets, trained on one after the other."""
    data_paths_test: Free[tuple[PathStr, ...]]
    """Folders whose test split is measured; none: those of data_paths."""
    evaluators: Free[tuple[EvaluatorConfig, ...]]
    """Measures beyond the metrics of rows."""
    puzzle_emb_lr: float = Field(ge=0)
    """Peak learning rate of the puzzles' vectors."""
    puzzle_emb_weight_decay: float = Field(ge=0)
    """Decoupled weight decay of the puzzles' vectors."""
    freeze_weights: bool
    """Learn the puzzles' vectors and nothing else."""
    min_eval_interval: Annotated[Free[int], Field(ge=0)]
    """So many `eval_interval`s at the beginning end without an evaluation."""
    checkpoint_every_eval: Free[bool]
    """Keep a checkpoint at each evaluation; off: at the end, and where `checkpoint` says so."""
    eval_save_outputs: Free[tuple[PuzzleOutputName, ...]]
    """Tensors of each evaluation that are kept in the run's folder."""

    @property
    def saves_evaluations(self) -> bool:
        """Whether each evaluation leaves a checkpoint, and not the last one alone."""
        return self.checkpoint_every_eval

    @property
    def unevaluated_intervals(self) -> int:
        """How many `eval_interval`s at the beginning end without an evaluation."""
        return self.min_eval_interval

    @model_validator(mode="before")
    @classmethod
    def _null_evaluates_at_the_end(cls, values: Any) -> Any:
        """eval_interval=null, as in the original: one interval, the whole run."""
        if isinstance(values, Mapping) and values.get("eval_interval", 1) is None:
            values = {**values, "eval_interval": values.get("epochs")}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.arch.attention != "full":
            raise ValueError(
                f"arch.attention={self.arch.attention} hides a puzzle from the position whose state says when it is solved: "
                "choose full"
            )
        if isinstance(self.arch.grad_calls, int) and self.arch.grad_calls > self.arch.level_calls:
            raise ValueError(
                f"arch.grad_calls {self.arch.grad_calls} is more than the {self.arch.level_calls} level calls of an ACT step, and "
                "an optimizer step on puzzles takes one"
            )
        if self.freeze_weights and not self.arch.puzzle_emb_ndim:
            raise ValueError("freeze_weights leaves nothing to learn without the puzzles' vectors: set arch.puzzle_emb_ndim")
        if self.early_stopping.patience is not None and not self.checkpoint_every_eval:
            raise ValueError(
                "early_stopping.patience keeps the checkpoint of the best evaluation, and checkpoint_every_eval=false saves none: "
                "set checkpoint_every_eval=true"
            )
        if self.epochs % self.eval_interval:
            raise ValueError(
                f"epochs {self.epochs} must be a multiple of eval_interval {self.eval_interval}: the order of puzzles is drawn "
                "for so many epochs at a time"
            )
        return self


Config = TypeVar("Config", bound=TrainingConfig)


# Keys of the original TRM that this program has another way for.
_ORIGINAL_KEYS = {
    "checkpoint_path": "the folder of a run is <checkpoint_dir>/<project_name>/<run_name>: set these three",
    "arch.loss.name": "there is one loss head; arch.loss says stablemax or softmax",
    "arch.rms_norm_eps": "it is fixed at the original's value, 1e-5",
}


def type_of_key(path: Sequence[str], kind: type[TrainingConfig]) -> Any:
    """The type of a key of a config of `kind`, given as the key's parts; None if there is no such key."""
    found: Any = kind
    for part in path:
        if isinstance(found, type) and issubclass(found, BaseModel):
            field = found.model_fields.get(part)
            found = None if field is None else field.annotation
        else:
            # The names in a dict are the user's; in a list sections are known by their numbers.
            is_item = get_origin(found) in (list, tuple) and part.isdecimal() and text_type(found) is None
            found = get_args(found)[1] if get_origin(found) is dict else get_args(found)[0] if is_item else None
    return found


def on_resume(key: str, kind: type[TrainingConfig]) -> OnResume:
    """What another value of `key`, a dotted name, means to a run of `kind` that is resumed."""
    found: Any = kind
    mark = OnResume.REPORTED
    for part in key.split("."):
        if get_origin(found) is dict:
            # The names in it are the user's.
            found = get_args(found)[1]
        elif isinstance(found, type) and issubclass(found, BaseModel) and part in found.model_fields:
            field = found.model_fields[part]
            mark = next((own for own in field.metadata if isinstance(own, OnResume)), mark)
            found = field.annotation
    return mark


def no_such_key(path: Sequence[int | str], kind: type[TrainingConfig]) -> str:
    """What to tell about a key that a config of `kind` doesn't have, given as its parts, with the nearest one that it has."""
    parts = [str(part) for part in path]
    key = ".".join(parts)
    if key in _ORIGINAL_KEYS:
        return f"{key}: no such key here, {_ORIGINAL_KEYS[key]}"
    known = 0
    while known < len(parts) - 1 and type_of_key(parts[: known + 1], kind) is not None:
        known += 1
    section = type_of_key(parts[:known], kind)
    beside = list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
    if not known:
        beside.append("experiment")  # a group of presets, and no key of the result
    elsewhere: dict[str, list[str]] = {}
    for other in _keys(kind):
        elsewhere.setdefault(other.rpartition(".")[2], []).append(other)
    near = (
        elsewhere.get(parts[-1])
        or difflib.get_close_matches(parts[known], beside, n=1)
        or [other for name in difflib.get_close_matches(parts[-1], elsewhere, n=1) for other in elsewhere[name]]
    )
    return f"{key}: no such key" + (f", did you mean {' or '.join(near[:3])}?" if near else "")


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def parse_config(values: Mapping[str, Any]) -> PretrainInstructConfig:
    """`parse_as` for an instruction run."""
    return parse_as(PretrainInstructConfig, values)


def parse_as(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Check `values` (a resolved config as plain dicts) against the schema of `kind`.

    Raises UsageError with one line per problem: the key, what was found, what is allowed.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"])) or "config"
            if problem["type"] == "extra_forbidden":
                lines.append(no_such_key(problem["loc"], kind))
            elif problem["type"] == "missing":
                lines.append(f"{key}: missing")
            else:
                # A rule over several keys names them itself; its input would be the whole section.
                found = "" if isinstance(problem["input"], Mapping) else f" (found {problem['input']!r})"
                lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}{found}"[:400])
        raise UsageError("the configuration does not fit config/schema.py:\n  " + "\n  ".join(lines)) from None
