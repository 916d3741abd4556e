"""The model around any recursion: embeddings, one ACT step at a time, vocabulary and halting heads.

It owns every weight, under the names of the published checkpoints. How many ACT steps a row takes in
training is decided by training/text.py and training/puzzle.py. `refine` lets tokens halt in
evaluation and in prompts, and generation/engine.py new ones. Shape suffixes as in models/layers.py;
N is any number of tokens, P the positions of a puzzle's vector, which come before the tokens.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config.errors import UsageError
from config.schema import ArchConfig
from models.cache import HeldAttention, StatefulAttention
from models.device import on_device
from models.document_attention import can_attend_in_documents
from models.layers import (
    Attend,
    BlockStack,
    Embedding,
    GroupedAttention,
    Linear,
    Rotary,
    RowAttention,
    TokenAttention,
    TokenRows,
    rotary_table,
    row_attention,
    truncated_normal_,
)
from models.recursive_reasoning import build_recursion
from models.recursive_reasoning.base import States
from models.sparse_embedding import SparseEmbedding


class Refined(NamedTuple):
    """Tokens after some ACT steps. Each output is of the token's last step: where it halted, if so."""

    output_BTD: Tensor
    steps_BT: Tensor
    is_last: bool


# Scales the sum of position and token embeddings to the standard deviation of each.
_SUM_OF_TWO_SCALE = 0.5**0.5

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class RecursiveModel(nn.Module):
    """A recursion with its embedding, heads and initial states; `forward_dtype` must be resolved
    (not auto).

    State-dict names and shapes are those of the original TinyRecursiveModels below its prefix
    `model.inner.`.

    A puzzle's row begins with the P = `prefix_len` positions of the puzzle's vector:
    `embed(inputs_BT, puzzle_ids_B)` returns [B, P + T, D]. States, rotary tables and attention
    cover P + T positions. The row's halting logits come from `output_BTD[:, 0]`, its token logits
    from `output_BTD[:, P:]`.
    """

    def __init__(
        self, config: ArchConfig, vocab_size: int, seed: int = 0, *, seq_len: int | None = None, puzzles: int | None = None
    ) -> None:
        """seq_len: tokens of a row, required by weights that have a position dimension (`mlp_t`,
        learned positions).

        puzzles: number of puzzle identifiers, required by puzzle vectors (`puzzle_emb_ndim`).
        """
        super().__init__()
        if (config.mlp_t or config.pos_encodings == "learned") and seq_len is None:
            raise ValueError("mlp_t and learned positions need the length of a row: pass seq_len")
        if config.puzzle_emb_ndim and not puzzles:
            raise ValueError("puzzle_emb_ndim needs the number of puzzle identifiers: pass puzzles")
        self.config = config
        self.prefix_len = config.prefix_len
        positions = None if seq_len is None else self.prefix_len + seq_len
        self.vocab_size = vocab_size
        self.dtype = DTYPES[config.forward_dtype]
        self.is_compiled = False
        self.recursion = build_recursion(config)
        self.level_calls = self.recursion.calls
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed_tokens = Embedding(vocab_size, config.hidden_size)
            self.lm_head = Linear(config.hidden_size, vocab_size)
            self.q_head = Linear(config.hidden_size, 2, bias=True)
            mixed = positions if config.mlp_t else None
            for name, layers in self.recursion.levels.items():
                self.add_module(name, BlockStack(layers, config, mixed))
            for name in self.recursion.initial_states:
                initial_D = truncated_normal_(torch.empty(config.hidden_size), 1.0)
                self.register_buffer(name, initial_D.to(self.dtype))
            self.embed_pos: Embedding | None = None
            if config.pos_encodings == "learned" and positions is not None:
                self.embed_pos = Embedding(positions, config.hidden_size)
        self.puzzle_emb = SparseEmbedding(puzzles, config.puzzle_emb_ndim) if config.puzzle_emb_ndim and puzzles else None
        # Scale and shift of the halting logit at each ACT step; the identity unless the checkpoint
        # was calibrated.
        self.halt_calibration: Tensor
        identity_2N = torch.tensor([[1.0], [0.0]]).repeat(1, config.halt_max_steps)
        self.register_buffer("halt_calibration", identity_2N, persistent=False)
        nn.init.zeros_(self.q_head.weight)
        assert self.q_head.bias is not None
        nn.init.constant_(self.q_head.bias, config.halt.bias)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.embedding_weight
        if self.dtype == torch.float64:
            self.double()
        levels = [self.get_submodule(name) for name in self.recursion.levels]
        self._level_linears = [module for level in levels for module in level.modules() if isinstance(module, Linear)]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embed_tokens.embedding_weight.device

    def initial_states(self, *shape: int) -> States:
        """Every latent state before the first ACT step, each a read-only view [*shape, D]."""
        return tuple(self.get_buffer(name).expand(*shape, -1) for name in self.recursion.initial_states)

    def embed(self, ids_BT: Tensor, puzzle_ids_B: Tensor | None = None) -> Tensor:
        """Input embedding, scaled by sqrt(D): [B, T, D], or [B, P + T, D] with the rows' puzzle
        vectors before the tokens.

        Raises UsageError for rows longer than the table of learned positions.
        """
        embedding: Tensor = self.embed_tokens(ids_BT, self.dtype)
        if self.puzzle_emb is not None:
            assert puzzle_ids_B is not None
            vector: Tensor = self.puzzle_emb(puzzle_ids_B, self.dtype)
            padding = self.prefix_len * self.config.hidden_size - vector.shape[-1]
            prefix_BPD = F.pad(vector, (0, padding)).unflatten(-1, (self.prefix_len, -1))
            embedding = torch.cat((prefix_BPD, embedding), dim=1)
        if self.embed_pos is not None:
            table, positions = self.embed_pos.embedding_weight, embedding.shape[1]
            if positions > len(table):
                raise UsageError(
                    f"a row of {positions} positions, but the model has {len(table)} learned ones: use rows of the length it was "
                    "trained on, or arch.pos_encodings=rope"
                )
            embedding = _SUM_OF_TWO_SCALE * (embedding + table[:positions].to(self.dtype))
        return embedding * math.sqrt(self.config.hidden_size)

    def rotary(self, positions: Tensor) -> Rotary | None:
        """Rotary tables for integer `positions` [T] or [B, T], computed on the host."""
        if self.config.pos_encodings != "rope":
            return None
        # As in the original: the angles of long rows need more than bfloat16's eight bits.
        exact = torch.promote_types(self.dtype, torch.float32)
        table = rotary_table(positions.cpu(), self.config.head_dim, self.config.rope_theta, exact)
        return Rotary(*(on_device(part.numpy(), self.device) for part in table))

    def row_attention(self, segments_BT: Tensor) -> RowAttention:
        """Attention within whole rows. segments_BT: prompt segments (0: assistant text, padding)."""
        return row_attention(self.config.attention, segments_BT, segments_BT.shape[1])

    def token_attention(self, groups: Sequence[TokenRows], segments_N: Tensor, documents_N: Tensor | None = None) -> Attend:
        """Attention for tokens without padding. The tokens of each of `groups` follow those of the
        one before.

        segments_N: prompt segments, as for `row_attention`. documents_N: document numbers from 0,
        given when several documents share a row.
        """
        sizes = [len(group.index_N) for group in groups]
        attends = []
        for number, (group, segments) in enumerate(zip(groups, segments_N.split(sizes), strict=True)):
            if self.is_compiled:
                # Add an empty row to a single one: torch.compile recompiles for a size of 1.
                group = group._replace(rows=max(2, group.rows))
            documents_BT = None
            if documents_N is not None:
                documents_BT = group.scatter(documents_N.split(sizes)[number] + 1)  # 0 marks padding
            segments_BT = group.scatter(segments)
            rows = row_attention(self.config.attention, segments_BT, group.positions, documents_BT)
            attends.append(TokenAttention(group, rows))
        return attends[0] if len(attends) == 1 else GroupedAttention(tuple(attends))

    @property
    def needs_no_rows(self) -> bool:
        """Whether to use models/document_attention.py: compiled, on a GPU that has kernels for it."""
        return self.is_compiled and can_attend_in_documents(self.config.attention, self.device, self.dtype, self.config.head_dim)

    def act_step(
        self,
        states: States,
        x_BTD: Tensor,
        rotary: Rotary | None,
        attend: Attend,
        grad_calls: int | None = None,
    ) -> tuple[States, Tensor]:
        """One ACT step: new states, and the output [B, T, D] for the heads.

        Only the last `grad_calls` level calls carry gradient. None: as many as `arch.grad_calls`
        gives a single ACT step.
        """
        calls_done = 0
        if grad_calls is None:
            [grad_calls] = self.grad_calls_by_step(1)
        casts = [linear.cast_weight(self.dtype) for linear in self._level_linears]
        if self.is_compiled:
            # The number of tokens is dynamic, but the weights' sizes are static: attention has no
            # kernel for dynamic ones.
            for cast in casts:
                if cast is not None:
                    torch._dynamo.mark_static(cast)

        def call(level: str, h_BTD: Tensor) -> Tensor:
            nonlocal calls_done
            stack = self.get_submodule(level)
            assert isinstance(stack, BlockStack)
            carries_gradient = torch.is_grad_enabled() and calls_done >= len(self.level_calls) - grad_calls
            calls_done += 1
            if not carries_gradient:
                h_BTD = h_BTD.detach()
            with torch.set_grad_enabled(carries_gradient):
                if isinstance(attend, StatefulAttention):
                    result: Tensor = attend.level_call(stack, h_BTD, rotary)
                elif carries_gradient and self.config.activation_checkpointing:
                    result = checkpoint(recomputed, stack, h_BTD, use_reentrant=False, preserve_rng_state=False)
                else:
                    result = stack(h_BTD, rotary, attend)
            return result

        def recomputed(stack: BlockStack, h_BTD: Tensor) -> Tensor:
            # Backward runs this later. With other casts it would recompile and save other tensors.
            with self._caching_casts(casts):
                result: Tensor = stack(h_BTD, rotary, attend)
            return result

        with self._caching_casts(casts):
            return self.recursion.step(states, x_BTD, call)

    def grad_calls_by_step(self, act_steps: int) -> list[int]:
        """How many of the last level calls of each of `act_steps` ACT steps carry gradient."""
        calls, last = len(self.level_calls), self.config.grad_calls
        if last is None:
            return [self.recursion.default_grad_calls] * act_steps
        if last == "all":
            return [calls] * act_steps
        return [min(calls, max(0, last - calls * later)) for later in reversed(range(act_steps))]

    def act_steps(self, x_BTD: Tensor, rotary: Rotary | None, attend: Attend, count: int) -> Iterator[Tensor]:
        """Run `count` ACT steps from the initial states, with gradient; yields the output [B, T, D]
        for the heads after each.

        Gradient flows through the last `arch.grad_calls` level calls, counted over all ACT steps.
        null: through the last calls of each ACT step, as many as in the original, and not from one
        ACT step to the next.
        """
        states = self.initial_states(*x_BTD.shape[:-1])
        for grad_calls in self.grad_calls_by_step(count):
            states, output_BTD = self.act_step(states, x_BTD, rotary, attend, grad_calls)
            if self.config.grad_calls is None:
                states = tuple(state.detach() for state in states)
            yield output_BTD

    def refine(
        self,
        ids_BT: Tensor,
        rotary: Rotary | None,
        attend: Attend,
        *,
        act_steps: int,
        halt_threshold: float | None = None,
        may_halt_BT: Tensor | None = None,
    ) -> Iterator[Refined]:
        """Refine tokens from the initial states, one ACT step at a time, for evaluation and
        generation.

        With `halt_threshold`, a token halts once its halting probability exceeds it, if
        `may_halt_BT` (None: all true) allows. Its states and output then stay, and deeper steps
        reuse the keys and values it halted with. Ends early once all tokens have halted. Tokens may
        come without padding: [N] in place of [B, T].
        """
        held = HeldAttention(attend)
        if halt_threshold is not None:
            attend = held
        x_BTD = self.embed(ids_BT)
        states = self.initial_states(*ids_BT.shape)
        active_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        steps_BT = torch.zeros_like(ids_BT)
        output_BTD: Tensor | None = None
        for step in range(act_steps):
            new_states, new_output_BTD = self.act_step(states, x_BTD, rotary, attend)
            steps_BT = steps_BT + active_BT
            if output_BTD is None or halt_threshold is None:
                states, output_BTD = new_states, new_output_BTD
            else:
                chosen_BT1 = active_BT.unsqueeze(-1)
                states = tuple(torch.where(chosen_BT1, new, old) for new, old in zip(new_states, states, strict=True))
                output_BTD = torch.where(chosen_BT1, new_output_BTD, output_BTD)
            if halt_threshold is not None:
                halting_BT = self.halting_probability(output_BTD, step) > halt_threshold
                active_BT = active_BT & ~(halting_BT if may_halt_BT is None else halting_BT & may_halt_BT)
                held.active_BT = active_BT
            is_last = step == act_steps - 1 or (halt_threshold is not None and not bool(active_BT.any()))
            yield Refined(output_BTD, steps_BT, is_last)
            if is_last:
                return

    def refine_rows(
        self, ids_BT: Tensor, segments_BT: Tensor, *, act_steps: int, halt_threshold: float | None = None
    ) -> Iterator[Refined]:
        """`refine` for right-padded rows. Prompt segments (above 0) don't halt early."""
        return self.refine(
            ids_BT,
            self.rotary(torch.arange(ids_BT.shape[1])),
            self.row_attention(segments_BT),
            act_steps=act_steps,
            halt_threshold=halt_threshold,
            may_halt_BT=segments_BT == 0,
        )

    def halt_logits(self, output_ND: Tensor) -> Tensor:
        """Halt and continue logits [N, 2] of outputs [N, D], of tokens or of puzzles' rows."""
        logits: Tensor = self.q_head(output_ND)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def halting_probability(self, output_ND: Tensor, act_step: int | Tensor) -> Tensor:
        """Probability [N] that the argmax is right after ACT step `act_step`, from 0 (one, or [N])."""
        deepest = self.halt_calibration.shape[1] - 1
        chosen = min(act_step, deepest) if isinstance(act_step, int) else act_step.clamp(max=deepest)
        scale, shift = self.halt_calibration[:, chosen]
        probability_N: Tensor = (self.halt_logits(output_ND)[..., 0] * scale + shift).sigmoid()
        return probability_N

    def logits(self, output_ND: Tensor) -> Tensor:
        """Vocabulary logits [N, V] of outputs [N, D], at least float32."""
        logits: Tensor = self.lm_head(output_ND)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def cast_for_inference(self) -> None:
        """Cast the weight matrices to `forward_dtype`. The model can't be trained afterwards."""
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight.data = module.weight.data.to(self.dtype)

    def compile_levels(self) -> None:
        """torch.compile each level's stack in place. Compile the losses of such a model too."""
        self.is_compiled = True
        for name in self.recursion.levels:
            self.get_submodule(name).compile(dynamic=True)

    @contextlib.contextmanager
    def _caching_casts(self, casts: Sequence[Tensor | None]) -> Iterator[None]:
        """Within the block, the levels' linear layers use these casts of their weights."""
        linears = self._level_linears
        before = [linear.cached_cast for linear in linears]
        for linear, cast in zip(linears, casts, strict=True):
            linear.cached_cast = cast
        try:
            yield
        finally:
            for linear, cast in zip(linears, before, strict=True):
                linear.cached_cast = cast
