"""The settings of a run on text: where conversations come from, how they are trained on, and how answers are generated."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from config.schema.base import Fixed, Free, PathStr, Section
from config.schema.training import TrainingConfig

FieldName = Literal[
    "messages", "prompt", "input", "context", "response", "system", "history", "text",
    "role", "content", "weight", "train", "loss", "mask",
]  # fmt: skip


class SourceConfig(Section):
    """Where conversations come from."""

    source: Literal["slimorca", "openorca", "jsonl", "hub", "sample"]
    """slimorca, openorca, jsonl: files in data_dir. hub: a data set of the Hugging Face hub. sample: the bundled task families."""
    data_dir: Free[PathStr]
    """Folder of the data, which may be one of `datasets`' save_to_disk."""
    files: Free[tuple[PathStr, ...]]
    """openorca, jsonl: names or globs in data_dir (docs/data.md has the formats); none: all files there that can be read."""
    shards: PositiveInt | None
    """openorca, jsonl: how many of these files to take, drawn by seed; null: all."""
    repo: Free[str | None]
    """Dataset repository on the Hugging Face hub. Not hub: the one that missing files are fetched from; null: none are fetched."""
    revision: Free[str]
    """Branch, tag or commit of the repository."""
    sha256: Free[dict[str, str]]
    """Expected SHA-256 of its files by name; a file that isn't named is checked against the hub's own."""
    config: Free[str | None]
    """hub: which of the repository's configurations; null: its default."""
    split: Free[str]
    """hub, and folders of save_to_disk: the split to train on."""
    validation_split: Free[str | None]
    """hub, and folders of save_to_disk: the split to measure on, in place of test_ratio; null: none."""
    validation_files: Free[tuple[PathStr, ...]]
    """openorca, jsonl: files to measure on, in place of test_ratio; as `files`."""
    fields: Free[dict[FieldName, str]]
    """The rows' own names of fields, in place of the usual ones (docs/data.md): {prompt: pregunta, response: respuesta}."""
    roles: Free[dict[str, Literal["system", "user", "assistant", "tool"]]]
    """Further names of roles, each with the role that it means."""
    tool_turns: Free[Literal["error", "drop", "as_user"]]
    """A tool's turn or call. error: stop; drop: leave it out; as_user: a tool's text is the user's, a call the assistant's JSON."""
    ignore: Free[tuple[str, ...]]
    """Keys, of rows or within them, whose text isn't part of the conversation. Text under any other unknown key stops the run."""
    subset_size: PositiveInt | None
    """Training rows taken, with the test split's proportional share (of held-out files as many); of a split opened by itself, its
    own rows. null: all."""

    @property
    def has_own_validation(self) -> bool:
        """Whether the source names its held-out rows, so that none are split off by hash."""
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
    def _keys_differ(self) -> Self:
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
    """A row longer than seq_len: cut the oldest part of its prompt, then its end; cut its end; or drop it. All are counted."""
    on_bad_row: Literal["error", "skip"]
    """A malformed row stops the run with file and line, or is counted and skipped."""
    supervise: Literal["assistant", "all"]
    """Train on the assistant's text and its EOS, or on every token."""
    processes: Free[PositiveInt | None]
    """Processes that tokenize; the tokens are the same for any number. null: one for each CPU, at most 16."""
    cache_dir: Free[PathStr | None]
    """Folder of the token cache and of hub data sets; null: where `datasets` keeps its own (HF_HOME)."""


class StageConfig(Section):
    """A part of a run: a mix of sources, and its length."""

    mix: dict[str, PositiveFloat | None] = Field(min_length=1)
    """Names of `sources`, each with its weight in the mix; null for all: each weighs its number of rows."""
    epochs: PositiveInt | None = None
    """Passes over every source. A source that is used up early is reshuffled and repeated until the slowest one is done."""
    examples: PositiveInt | None = None
    """In place of epochs: the number of examples."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.examples is None):
            raise ValueError("a stage has either epochs or examples: give one of them")
        if len({weight is None for weight in self.mix.values()}) > 1:
            raise ValueError("a mix has a weight for each of its sources, or null for each: by their numbers of rows")
        return self


class GenerationConfig(Section):
    """How answers are generated: depth, length, choice of tokens, and how many at a time."""

    act_steps: PositiveInt | None
    """Fixed ACT steps a token; null: arch.halt_max_steps."""
    halt_threshold: float | None = Field(gt=0, lt=1)
    """A token halts when its halting probability passes this; null: every token takes all steps."""
    max_output_tokens: PositiveInt | None
    """Longest answer; null: half of dataset.seq_len."""
    temperature: float = Field(ge=0)
    """0: the most probable token. Above: sample, from a flatter distribution the higher it is."""
    top_k: PositiveInt | None
    """Sample among the k most probable tokens only; null: all."""
    top_p: float = Field(gt=0, le=1)
    """Sample among the fewest tokens that together have this probability."""
    min_p: float = Field(ge=0, le=1)
    """Sample among tokens with at least this share of the most probable token's probability."""
    repetition_penalty: float = Field(gt=0)
    """Logits of tokens seen before, in the prompt too, are divided by this if positive, multiplied if negative; 1: nothing."""
    seed: int = Field(ge=0)
    """Seed of the samples. A request's samples don't depend on other requests."""
    stop: list[str]
    """An answer ends before the first of these texts."""
    batch_size: PositiveInt
    """Most answers generated at the same time."""
    compile: bool
    """torch.compile the decoding of the next token: faster after a warm-up. DISABLE_COMPILE=1 turns it off.

    On CUDA up to 16 answers of a float32 or bfloat16 model with arch.norm=post use a kernel of their own instead.
    """
    kv_budget_gb: float = Field(gt=0)
    """Most memory for keys and values, in GB (10^9 bytes); answers wait for room."""


def _off(value: object) -> object:
    return "off" if value is False else value  # YAML reads a bare off as false


# Settings for puzzles, and the values that text must leave them at.
_WITHOUT_PUZZLES: dict[str, object] = {
    "puzzle_emb_ndim": 0,
    "no_ACT_continue": True,
    "halt_exploration_prob": 0.0,
    "act_enabled": True,
    "act_inference": False,
}


class PretrainInstructConfig(TrainingConfig):
    """One instruction-tuning run: stages one after the other, each a mix of sources."""

    dataset: DatasetConfig
    sources: dict[str, SourceConfig]
    """The sources of `stages`, by the names that mixes use. Everything but where their rows come from is `dataset`'s."""
    stages: tuple[StageConfig, ...]
    """Parts of the run, trained one after the other; none: a single one, `epochs` of `dataset`."""
    lr_schedule: Literal["run", "stage"]
    """Warm-up and cosine once over the whole run, or once in each of its stages."""
    generation: Free[GenerationConfig]
    eval_examples: Free[PositiveInt | None]
    """Test rows of each source used in evaluations; null: all."""
    sample_answers: Free[int] = Field(ge=0)
    """Answers generated and shown at each evaluation."""
    dataloader_workers: Free[int] = Field(ge=0)
    """Background threads that read rows ahead of the training loop; 0: none, as with several ranks."""
    pad_multiple: Free[PositiveInt]
    """Row lengths are padded to a multiple of this for attention (compiled code needs few distinct shapes)."""
    packing: Annotated[Literal["off", "bucketed", "packed"], BeforeValidator(_off)]
    """Rows of attention in training. off: a conversation each, as wide as the longest. bucketed: in groups of similar length.
    packed: several conversations to a row.

    Without effect where attention needs no rows: in bfloat16, compiled, on CUDA. Other compiled code treats bucketed as off.
    """

    @property
    def all_sources(self) -> dict[str, DatasetConfig]:
        """The settings of each source by its name: `sources` over `dataset`; or `dataset` alone, named by its kind."""
        if not self.sources:
            return {self.dataset.source: self.dataset}
        return {name: self.dataset.model_copy(update=dict(source)) for name, source in self.sources.items()}

    @property
    def all_stages(self) -> tuple[StageConfig, ...]:
        """`stages`; or the one that `epochs` of `dataset` are."""
        return self.stages or (StageConfig(mix={self.dataset.source: None}, epochs=self.epochs),)

    @property
    def depth(self) -> int:
        """Most ACT steps of a token in evaluation and generation."""
        return self.generation.act_steps or self.arch.halt_max_steps

    @property
    def answer_limit(self) -> int:
        """Most tokens in a generated answer."""
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

    @field_validator("sources", mode="before")
    @classmethod
    def _refuse_sample(cls, sources: Any) -> Any:
        # Before the keys are checked: those of the bundled data's split would only be told as unknown.
        if isinstance(sources, Mapping) and any(isinstance(s, Mapping) and s.get("source") == "sample" for s in sources.values()):
            raise ValueError(
                "a source of stages can't be sample: its builder made its split, so what it holds out another source could train "
                "on; build it into a file of a jsonl source"
            )
        return sources

    @model_validator(mode="after")
    def _stages_and_their_sources(self) -> Self:
        used = {name for stage in self.stages for name in stage.mix}
        if used != set(self.sources):
            raise ValueError(
                f"stages mix the sources {sorted(used)}, and sources has {sorted(self.sources)}: both must have the same names"
            )
        if len({source.has_own_validation for source in self.sources.values()}) > 1:
            raise ValueError(
                "some sources name what to measure on and others are split by hash, so what one holds out another could train on: "
                "give all of them validation_files or validation_split, or none"
            )
        if self.stages and self.epochs != 1:
            raise ValueError(f"epochs {self.epochs} is for a run without stages: give each stage its own")
        if not self.dataset.test_ratio and any(s.validation_files or s.validation_split for s in self.all_sources.values()):
            raise ValueError(
                "dataset.test_ratio=0 trains without evaluation, and validation_files or validation_split says what to measure on: "
                "leave out one of them"
            )
        return self
