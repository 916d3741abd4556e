"""The network's settings."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from config.schema.base import Free, Reported, Section


class HaltConfig(Section):
    """How the halting head begins and learns."""

    bias: float
    """Initial bias of the halting head: -1 for text, -5 for puzzles."""
    backprop: bool
    """Let the halting loss reach the recursion. Off, its gradient stops at the halting head."""


class ArchConfig(Section):
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
    """Transformer blocks in the answer state's own stack (hrm, transformers_baseline); 0 where all calls share one stack."""
    L_layers: int = Field(ge=0)
    """Transformer blocks in the reasoning state's stack, which the trm family uses for the answer state, too."""
    H_cycles: PositiveInt
    """Updates of the answer state in one ACT step."""
    L_cycles: int = Field(ge=0)
    """Updates of the reasoning state before each update of the answer state; 0 for transformers_baseline, which has none. looped
    has one state, which is updated H_cycles * (L_cycles + 1) times."""
    grad_calls: PositiveInt | Literal["all"] | None
    """How many of the last level calls carry gradient. Puzzles: of each ACT step. Text: of all ACT steps of a row together.
    null: as in the original, the last H cycle of each ACT step (hrm: its last 2 calls), and none between ACT steps."""
    norm: Literal["post", "pre"]
    """post: normalise after each residual sum, as the original. pre: normalise the inputs of attention and SwiGLU, and the output
    of a level call."""
    qk_norm: bool
    """Normalise the queries and keys of each head (RMS, without a weight) before they are rotated and multiplied."""
    attention: Literal["full", "causal", "prefix"]
    """full: every position sees every other (puzzles). causal: only the past. prefix: causal, but a prompt segment sees all of
    itself."""
    mlp_t: bool
    """Puzzles: a SwiGLU over the positions of each channel in place of attention. Every position sees every other."""
    pos_encodings: Literal["rope", "learned", "none"]
    """Rotary positions, a learned vector for each place of a puzzle's row, or none."""
    rope_theta: float = Field(gt=0)
    """Base of the rotary frequencies."""
    tie_embeddings: bool
    """Use the embedding matrix as the vocabulary head."""
    forward_dtype: Reported[Literal["auto", "bfloat16", "float32", "float64"]]
    """Number format of activations; weights stay float32. auto: bfloat16 where the processor multiplies it natively."""
    activation_checkpointing: Free[bool]
    """Keep only the inputs of the level calls that carry gradient, and recompute the calls in the backward pass."""
    loss: Literal["stablemax", "softmax"]
    """How logits become probabilities, in training, measuring and sampling alike."""
    halt_max_steps: PositiveInt
    """N, the most ACT steps: the depth of evaluation and generation unless they set another."""
    no_ACT_continue: bool
    """Puzzles: a row halts when its halting logit is positive. Off: when it is above the continuing logit, which a second forward
    then trains to predict the next ACT step's logits (transformers_baseline compares the two without training it)."""
    halt_exploration_prob: float = Field(ge=0, le=1)
    """Puzzles: probability, drawn anew at each ACT step, that a row may not halt before a depth drawn from 2..halt_max_steps."""
    act_enabled: bool
    """Puzzles: rows may halt before halt_max_steps in training."""
    act_inference: bool
    """Puzzles: rows may halt before halt_max_steps in evaluation."""
    puzzle_emb_ndim: int = Field(ge=0)
    """Channels of the learned vector that each puzzle has; 0: none, as for text."""
    puzzle_emb_len: int = Field(ge=0)
    """Positions before the tokens that the vector fills, padded with zeros; 0: as few as it needs."""
    halt: Reported[HaltConfig]

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_level_calls(self) -> int:
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
    def _fits_the_recursion(self) -> Self:
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
        calls = self.num_level_calls * self.halt_max_steps
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
