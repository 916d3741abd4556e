"""One ACT step of the next token of a few rows as a single CUDA kernel, in Triton.

A token of one row takes thousands of matrix-vector products in sequence, each shorter than a kernel
launch. So one persistent kernel runs a whole ACT step, with one program per multiprocessor. The
programs split the outputs of each product and pass results on without a barrier: each number is
sent in a 64-bit word together with the number of the ACT step, and the reader polls until the word
has that number. A program loads its weights, or the past keys and values, before it polls. Between
products numbers are float32.

Import it only where Triton is installed. Shape suffixes as in models/layers.py; W width of all
heads, I width of a SwiGLU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.act import RecursiveModel
from models.cache import KVCache
from models.layers import RMS_EPS, BlockStack, Rotary

_MOST_ROWS = 16
_DTYPES = (torch.float32, torch.bfloat16)
# A program stops polling after this many reads. That only happens by a bug: its results are then
# wrong, but it ends.
_MOST_READS = tl.constexpr(2**18)
_EPS = tl.constexpr(RMS_EPS)


class _Plan(NamedTuple):
    """An ACT step as blocks, each with a sum of numbered vectors as input; its index is its lane.

    Vectors 0 to n are the n states and the embedding, the others the outputs of the blocks.
    """

    blocks: list[tuple[int, tuple[int, ...]]]
    """Index of the layer among the layers of all levels, and the numbers of the vectors to sum."""
    results: list[int]
    """The vectors that are the new states and the output."""


def plan_of(model: RecursiveModel) -> _Plan:
    """The blocks of one ACT step, which may only add vectors and pass them to levels."""
    first_layer, layers = {}, 0
    for level, count in model.recursion.levels.items():
        first_layer[level], layers = layers, layers + count
    states = len(model.recursion.initial_states)
    blocks: list[tuple[int, tuple[int, ...]]] = []

    # A tuple of numbers stands for a sum of vectors: adding two sums concatenates their tuples.
    def call(level: str, terms: tuple[int, ...]) -> tuple[int, ...]:
        for layer in range(model.recursion.levels[level]):
            blocks.append((first_layer[level] + layer, terms))
            terms = (states + len(blocks),)
        return terms

    step: Callable[..., Any] = model.recursion.step
    new_states, output = step(tuple((number,) for number in range(states)), (states,), call)
    return _Plan(blocks, [number for (number,) in (*new_states, output)])


class ActStepKernel:
    """The ACT step of a model, with the latent vectors of all rows in one tensor."""

    def __init__(self, model: RecursiveModel, cache: KVCache, rotary: Rotary, vectors: Tensor) -> None:
        """vectors: [n states + embedding + output, rows, D], written to. rotary: all tables."""
        self._cache = cache.buffer
        self._rotary = rotary
        self._vectors = vectors
        self._qk_norm = model.config.qk_norm
        stacks = [model.get_submodule(level) for level in model.recursion.levels]
        blocks = [block for stack in stacks if isinstance(stack, BlockStack) for block in stack.layers]

        def weights(name: str) -> Tensor:
            return torch.stack([block.get_parameter(f"{name}.weight").detach().to(model.dtype) for block in blocks])

        self._weights = tuple(
            weights(name) for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        )
        plan = plan_of(model)
        most_terms = max(len(terms) for _, terms in plan.blocks)
        table = [[layer, len(terms), *terms, *[0] * (most_terms - len(terms))] for layer, terms in plan.blocks]
        device = vectors.device
        self._blocks = torch.tensor(table, dtype=torch.int32, device=device)
        targets = [*range(len(plan.results) - 1), len(plan.results)]
        # Write only results that changed. Numbers from the output's place in `vectors` on are
        # outputs of blocks.
        pairs = zip(targets, plan.results, strict=True)
        moved = [(target, number) for target, number in pairs if number >= len(vectors) - 1 or number != target]
        self._results = torch.tensor(moved, dtype=torch.int32, device=device)
        self._epoch = torch.zeros(1, dtype=torch.int64, device=device)
        self._words: dict[int, list[Tensor]] = {}

    @staticmethod
    def knows(model: RecursiveModel) -> bool:
        """Whether there is a kernel for this model: blocks with attention, rotary positions and norms after their sums."""
        config = model.config
        return config.norm == "post" and not config.mlp_t and config.pos_encodings == "rope" and model.dtype in _DTYPES

    @staticmethod
    def serves(rows: int) -> bool:
        """Whether there is a kernel for this number of rows."""
        return rows <= _MOST_ROWS

    def __call__(self, rows: int, positions_B: Tensor, act_steps_B: Tensor) -> None:
        """One ACT step of the first `rows` rows, given their positions and ACT steps so far."""
        _, steps, lanes, _, heads, positions, head_dim = self._cache.shape
        capacity, dim = self._vectors.shape[1:]
        width, inner = heads * head_dim, self._weights[3].shape[-1]
        sizes = block_sizes(rows, dim, heads, head_dim, inner)
        padded = sizes["BLOCK_B"]
        words = self._words.get(padded)
        if words is None:
            widths = (dim, 3 * width, sizes["SPLITS"] * 2 * width, dim, inner)
            words = [self._epoch.new_zeros(len(self._blocks), padded, each) for each in widths]
            self._words[padded] = words
        device = self._vectors.device
        programs = 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
        self._epoch += 1
        _act_step[(programs,)](
            self._vectors,
            *words,
            self._blocks,
            self._results,
            *self._weights,
            self._cache,
            self._rotary.cos,
            self._rotary.sin,
            positions_B,
            act_steps_B,
            self._epoch,
            rows,
            capacity,
            steps,
            positions,
            len(self._blocks),
            len(self._results),
            programs,
            VECTORS=len(self._vectors) - 1,
            TABLE=self._blocks.shape[1],
            LANES=lanes,
            QK_NORM=self._qk_norm,
            D=dim,
            H=heads,
            K=head_dim,
            I=inner,
            **sizes,
            num_warps=8,
            # Programs wait for each other, so all must run at the same time.
            launch_cooperative_grid=True,
        )


def block_sizes(rows: int, dim: int, heads: int, head_dim: int, inner: int) -> dict[str, int]:
    """Tile sizes of the kernel's products and attention for this number of rows."""

    def block(size: int) -> int:
        return max(16, 1 << (size - 1).bit_length())

    is_one = rows == 1
    return {
        # Tensor cores need at least 16 rows.
        "BLOCK_B": 1 if is_one else _MOST_ROWS,
        "BLOCK_D": block(dim),
        "BLOCK_W": block(heads * head_dim),
        "BLOCK_K": block(head_dim),
        "BLOCK_I": block(inner) if is_one else min(block(inner), 512),
        # Outputs per program: products of the default sizes then occupy about 100 programs.
        "TILE": 16,
        "TILE_D": 4 if is_one else 16,
        # Programs that share the past of a head.
        "SPLITS": 4 if is_one else 1,
        "CHUNK": 128,
    }


@triton.jit
def _send(pointers, values, mask, epoch):
    """Send numbers to other programs, as words."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(pointers, bits | (epoch << 32), mask=mask)


@triton.jit
def _receive(pointers, mask, epoch):
    """Wait for numbers from other programs; 0 where `mask` is false."""
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    missing = tl.max((mask & ((words >> 32) != epoch)).to(tl.int32), axis=None)
    reads = 1
    while (missing > 0) & (reads < _MOST_READS):
        words = tl.load(pointers, mask=mask, other=0, volatile=True)
        missing = tl.max((mask & ((words >> 32) != epoch)).to(tl.int32), axis=None)
        reads += 1
    return _number(words)


@triton.jit
def _receive_both(pointers, others, mask, epoch):
    """`_receive` from two places at once."""
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    more = tl.load(others, mask=mask, other=0, volatile=True)
    missing = tl.max((mask & (((words >> 32) != epoch) | ((more >> 32) != epoch))).to(tl.int32), axis=None)
    reads = 1
    while (missing > 0) & (reads < _MOST_READS):
        words = tl.load(pointers, mask=mask, other=0, volatile=True)
        more = tl.load(others, mask=mask, other=0, volatile=True)
        missing = tl.max((mask & (((words >> 32) != epoch) | ((more >> 32) != epoch))).to(tl.int32), axis=None)
        reads += 1
    return _number(words), _number(more)


@triton.jit
def _number(words):
    return (words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _vector(
    vectors, values, number, row, columns, mask, epoch, capacity, VECTORS: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Columns of a numbered vector: a state, the embedding, or a block's output before its norm."""
    if number < VECTORS:
        x = tl.load(vectors + (number * capacity + row) * D + columns, mask=mask, other=0).to(tl.float32)
    else:
        x = _receive(values + ((number - VECTORS) * BLOCK_B + row) * D + columns, mask, epoch)
    return x


@triton.jit
def _rms_scale(x, D: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, axis=1) / D + _EPS)[:, None]


@triton.jit
def _block_input(
    vectors,
    values,
    entry,
    row,
    columns,
    rows,
    epoch,
    capacity,
    IS_WHOLE: tl.constexpr,
    VECTORS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """These columns [1, C] of a block's input. IS_WHOLE: they are the whole vector."""
    every = tl.arange(0, BLOCK_D)[None, :]
    is_there = (row < rows) & (every < D)
    is_asked = (row < rows) & (columns < D)
    total = tl.zeros(is_asked.shape, tl.float32)
    terms = tl.load(entry + 1)
    for place in range(terms):
        number = tl.load(entry + 2 + place)
        whole = _vector(vectors, values, number, row, every, is_there, epoch, capacity, VECTORS, D, BLOCK_B)
        scale = tl.where(number < VECTORS, 1.0, _rms_scale(whole, D))
        if IS_WHOLE:
            total += whole * scale
        else:
            total += scale * _vector(vectors, values, number, row, columns, is_asked, epoch, capacity, VECTORS, D, BLOCK_B)
    return total


@triton.jit
def _product(x, weight, pointers, never, BLOCK_B: tl.constexpr):
    """x [B, C] @ weight^T -> [B, N], with weight [N, C] loaded from `pointers`."""
    if BLOCK_B == 1:
        # Triton computes in the layout of the last load. A load that never runs makes it convert
        # the vector, not the weight.
        weight = tl.load(pointers, mask=never, other=weight)
        y = tl.sum(weight.to(tl.float32) * x, axis=1)[None, :]
    else:
        y = tl.trans(tl.dot(weight, tl.trans(x.to(weight.dtype)), input_precision="ieee"))
    return y


# Arguments that differ between calls: specializing on them would recompile the kernel often.
@triton.jit(do_not_specialize=["rows", "capacity", "steps", "room", "block_count", "result_count", "programs"])
def _act_step(
    vectors,
    values,
    qkv,
    heard,
    middle,
    gated,
    blocks,
    results,
    w_qkv,
    w_o,
    w_gate_up,
    w_down,
    cache,
    cos,
    sin,
    positions,
    act_steps,
    epochs,
    rows,
    capacity,
    steps,
    room,
    block_count,
    result_count,
    programs,
    VECTORS: tl.constexpr,
    TABLE: tl.constexpr,
    LANES: tl.constexpr,
    QK_NORM: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    TILE: tl.constexpr,
    TILE_D: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """See `ActStepKernel`. `values`, `qkv`, `heard`, `middle` and `gated` are words [blocks, BLOCK_B, ...] between programs."""
    W: tl.constexpr = H * K
    program = tl.program_id(0)
    epoch = tl.load(epochs)
    never = programs < 0
    row = tl.arange(0, BLOCK_B)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    w = tl.arange(0, BLOCK_W)[None, :]
    k = tl.arange(0, BLOCK_K)
    for block in range(block_count):
        entry = blocks + block * TABLE
        layer = tl.load(entry)
        first_row = block * BLOCK_B

        # Queries, keys and values.
        for tile in range(program, tl.cdiv(3 * W, TILE), programs):
            n = tile * TILE + tl.arange(0, TILE)
            from_weight = w_qkv + (layer * 3 * W + n[:, None]) * D + d
            weight = tl.load(from_weight, mask=(n[:, None] < 3 * W) & (d < D), other=0)
            h = _block_input(vectors, values, entry, row, d, rows, epoch, capacity, True, VECTORS, D, BLOCK_B, BLOCK_D)
            is_there = (row < rows) & (n[None, :] < 3 * W)
            _send(qkv + (first_row + row) * 3 * W + n[None, :], _product(h, weight, from_weight, never, BLOCK_B), is_there, epoch)

        # Attention of one head of one row to a part of its past. Starts at the last program: the
        # first ones have more to do.
        for tile in range(programs - 1 - program, rows * H * SPLITS, programs):
            split, head, b = tile % SPLITS, (tile // SPLITS) % H, tile // (SPLITS * H)
            # The position of an idle row may be beyond the cache.
            position = tl.minimum(tl.load(positions + b), room - 1)
            act_step = tl.minimum(tl.load(act_steps + b), steps - 1)
            lane = (b * steps + act_step).to(tl.int64) * LANES + block
            keys = cache + (lane * 2 * H + head) * room * K
            vals = keys + H * room * K
            share = tl.cdiv(position, SPLITS * CHUNK) * CHUNK
            first = split * share
            end = tl.minimum(first + share, position)
            s = first + tl.arange(0, CHUNK)
            places = s[:, None] * K + k[None, :]
            is_seen = (s[:, None] < end) & (k[None, :] < K)
            k_past = tl.load(keys + places, mask=is_seen, other=0)
            v_past = tl.load(vals + places, mask=is_seen, other=0)
            # One read: the token's query and key, each with its rotation partners, and its value.
            is_low = k < K // 2
            part = tl.arange(0, 8)[:, None]
            is_partner = part % 2 == 1
            partner = tl.where(is_low, k + K // 2, k - K // 2)
            columns = tl.minimum(part // 2, 2) * W + head * K + tl.where(is_partner, partner[None, :], k[None, :])
            own = _receive(qkv + (first_row + b) * 3 * W + columns, (part < 5) & (k[None, :] < K), epoch)
            if QK_NORM:
                # A channel's rotation partner is in the same head, so both lines of a query or key
                # have the same norm.
                own *= tl.where(part < 4, _rms_scale(own, K), 1.0)
            angle = position * (K // 2) + tl.where(is_low, k, k - K // 2)
            cosine = tl.load(cos + angle, mask=k < K, other=0).to(tl.float32)
            sine = tl.load(sin + angle, mask=k < K, other=0).to(tl.float32)
            turned = own * tl.where(is_partner, tl.where(is_low, -sine, sine)[None, :], cosine[None, :])
            q = tl.sum(tl.where(part // 2 == 0, turned, 0), axis=0) * (1 / tl.sqrt(K + 0.0))
            best = float("-inf")
            total = 0.0
            y = tl.zeros((BLOCK_K,), tl.float32)
            if split == 0:
                k_own = tl.sum(tl.where(part // 2 == 1, turned, 0), axis=0)
                v_own = tl.sum(tl.where(part == 4, own, 0), axis=0)
                tl.store(keys + position * K + k, k_own.to(k_past.dtype), mask=k < K)
                tl.store(vals + position * K + k, v_own.to(v_past.dtype), mask=k < K)
                best = tl.sum(q * k_own)
                total = 1.0
                y = v_own
            for start in range(first, end, CHUNK):
                s = start + tl.arange(0, CHUNK)
                scores = tl.where(s < end, tl.sum(k_past.to(tl.float32) * q[None, :], axis=1), float("-inf"))
                highest = tl.maximum(best, tl.max(scores))
                weights = tl.exp(scores - highest)
                kept = tl.exp(best - highest)
                y = y * kept + tl.sum(v_past.to(tl.float32) * weights[:, None], axis=0)
                total = total * kept + tl.sum(weights)
                best = highest
                places = (s[:, None] + CHUNK) * K + k[None, :]
                is_seen = (s[:, None] + CHUNK < end) & (k[None, :] < K)
                k_past = tl.load(keys + places, mask=is_seen, other=0)
                v_past = tl.load(vals + places, mask=is_seen, other=0)
            mine = heard + ((first_row + b) * SPLITS + split) * 2 * W + head * K + k
            some = tl.maximum(total, 1e-30)
            _send(mine, y / some, k < K, epoch)
            if SPLITS > 1:
                log_total = tl.where(total > 0, best + tl.log(some), float("-inf"))
                _send(mine + W, tl.zeros_like(y) + log_total, k < K, epoch)

        # Output projection, plus the block's input.
        for tile in range(program, tl.cdiv(D, TILE_D), programs):
            n = tile * TILE_D + tl.arange(0, TILE_D)
            from_weight = w_o + (layer * D + n[:, None]) * W + w
            weight = tl.load(from_weight, mask=(n[:, None] < D) & (w < W), other=0)
            is_there = (row < rows) & (n[None, :] < D)
            h = _block_input(vectors, values, entry, row, n[None, :], rows, epoch, capacity, False, VECTORS, D, BLOCK_B, BLOCK_D)
            if SPLITS == 1:
                y = _receive(heard + (first_row + row) * 2 * W + w, (row < rows) & (w < W), epoch)
            else:
                tl.static_assert(BLOCK_B == 1)
                # The parts are the last dimension, so that one thread holds all of them.
                part = tl.arange(0, SPLITS)[None, :]
                channel = tl.arange(0, BLOCK_W)[:, None]
                from_part = heard + (first_row * SPLITS + part) * 2 * W + channel
                y, logs = _receive_both(from_part, from_part + W, (channel < W) & (part < SPLITS), epoch)
                shares = tl.exp(logs - tl.max(logs, axis=1)[:, None])
                y = (tl.sum(y * shares, axis=1) / tl.sum(shares, axis=1))[None, :]
            _send(
                middle + (first_row + row) * D + n[None, :], h + _product(y, weight, from_weight, never, BLOCK_B), is_there, epoch
            )

        # Gate and up.
        for tile in range(program, tl.cdiv(I, TILE), programs):
            n = tile * TILE + tl.arange(0, TILE)
            from_gate = w_gate_up + (layer * 2 * I + n[:, None]) * D + d
            is_weight = (n[:, None] < I) & (d < D)
            w_gate = tl.load(from_gate, mask=is_weight, other=0)
            w_up = tl.load(from_gate + I * D, mask=is_weight, other=0)
            x = _receive(middle + (first_row + row) * D + d, (row < rows) & (d < D), epoch)
            x *= _rms_scale(x, D)
            gate = _product(x, w_gate, from_gate, never, BLOCK_B)
            y = gate * tl.sigmoid(gate) * _product(x, w_up, from_gate, never, BLOCK_B)
            _send(gated + (first_row + row) * I + n[None, :], y, (row < rows) & (n[None, :] < I), epoch)

        # Down.
        for tile in range(program, tl.cdiv(D, TILE_D), programs):
            n = tile * TILE_D + tl.arange(0, TILE_D)
            is_there = (row < rows) & (n[None, :] < D)
            x = _receive(middle + (first_row + row) * D + d, (row < rows) & (d < D), epoch)
            y = _receive(middle + (first_row + row) * D + n[None, :], is_there, epoch) * _rms_scale(x, D)
            for start in range(0, I, BLOCK_I):
                i = start + tl.arange(0, BLOCK_I)[None, :]
                from_weight = w_down + (layer * D + n[:, None]) * I + i
                weight = tl.load(from_weight, mask=(n[:, None] < D) & (i < I), other=0)
                inner = _receive(gated + (first_row + row) * I + i, (row < rows) & (i < I), epoch)
                y += _product(inner, weight, from_weight, never, BLOCK_B)
            _send(values + (first_row + row) * D + n[None, :], y, is_there, epoch)

    # Write the new states and the output in place. All reads of the old ones come before: these
    # results depend on them.
    for place in range(program, result_count, programs):
        target, number = tl.load(results + 2 * place), tl.load(results + 2 * place + 1)
        is_there = (row < rows) & (d < D)
        x = _vector(vectors, values, number, row, d, is_there, epoch, capacity, VECTORS, D, BLOCK_B)
        scale = tl.where(number < VECTORS, 1.0, _rms_scale(x, D))
        tl.store(vectors + (target * capacity + row) * D + d, (x * scale).to(vectors.dtype.element_ty), mask=is_there)
