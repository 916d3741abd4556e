"""The settings of a run on puzzles, under the original's names."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from config.schema.base import Free, PathStr, Section
from config.schema.training import TrainingConfig

# What an evaluation on puzzles can save of each row.
PuzzleOutputName = Literal["inputs", "labels", "puzzle_identifiers", "q_halt_logits", "preds", "preds_by_step", "steps"]


class EvaluatorConfig(Section):
    """A measure beyond the metrics of rows. It stands in a list, so its defaults (the original's) are here and not in YAML."""

    name: Literal["arc@ARC"]
    """arc@ARC: votes of a puzzle's augmented forms, pass@K and submission.json (evaluators/arc.py)."""
    pass_Ks: tuple[PositiveInt, ...] = (1, 2, 5, 10, 100, 1000)
    """K: a test is solved if its output is among the K grids with most votes."""
    submission_K: PositiveInt = 2
    """Grids of each test in submission.json."""
    aggregated_voting: bool = True
    """Votes of the run's earlier evaluations are added."""


class PretrainPuzzleConfig(TrainingConfig):
    """One training run on puzzles, with the original's names."""

    data_paths: Free[tuple[PathStr, ...]] = Field(min_length=1)
    """Folders of puzzle data sets, trained on one after the other."""
    data_paths_test: Free[tuple[PathStr, ...]]
    """Folders whose test split is evaluated; none: those of data_paths."""
    evaluators: Free[tuple[EvaluatorConfig, ...]]
    """Measures beyond the metrics of rows."""
    puzzle_emb_lr: float = Field(ge=0)
    """Peak learning rate of the puzzles' vectors."""
    puzzle_emb_weight_decay: float = Field(ge=0)
    """Decoupled weight decay of the puzzles' vectors."""
    freeze_weights: bool
    """Train the puzzles' vectors and nothing else."""
    min_eval_interval: Annotated[Free[int], Field(ge=0)]
    """How many `eval_interval`s at the start of the run end without an evaluation."""
    checkpoint_every_eval: Free[bool]
    """Save a checkpoint at each evaluation; off: at the end, and as `checkpoint` says."""
    eval_save_outputs: Free[tuple[PuzzleOutputName, ...]]
    """Tensors of each evaluation that are saved in the run's folder."""

    @property
    def saves_evaluations(self) -> bool:
        """Whether every evaluation saves a checkpoint, not only the last one."""
        return self.checkpoint_every_eval

    @property
    def unevaluated_intervals(self) -> int:
        """How many `eval_interval`s at the start of the run end without an evaluation."""
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
        if isinstance(self.arch.grad_calls, int) and self.arch.grad_calls > self.arch.num_level_calls:
            raise ValueError(
                f"arch.grad_calls {self.arch.grad_calls} is more than the {self.arch.num_level_calls} level calls of an ACT step, "
                "and an optimizer step on puzzles takes one"
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
