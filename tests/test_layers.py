"""Layers against their plain formulas, and masks against their definition."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from config.schema import PretrainInstructConfig
from models.layers import (
    Attention,
    BlockStack,
    Embedding,
    Linear,
    RowAttention,
    SwiGLU,
    TokenAttention,
    TokenRows,
    rms_norm,
    rotary_table,
    rotate,
    row_attention,
    truncated_normal_,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_has_the_epsilon_inside_and_no_weight() -> None:
    x = random(3, 4) * torch.tensor([[1.0], [1e-3], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x), x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_masks_show_what_their_definition_says(segments: list[int]) -> None:
    count = len(segments)
    mask = row_attention("prefix", torch.tensor([segments]), count)
    assert mask.visible is not None and not mask.is_causal
    for i in range(count):
        for j in range(count):
            expected = j <= i or (segments[i] == segments[j] != 0)
            assert bool(mask.visible[0, 0, i, j]) == expected
    assert row_attention("full", None, count) == RowAttention(None, False)
    assert row_attention("causal", None, count) == RowAttention(None, True)


def test_a_mask_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="expected full, causal"):
        row_attention("sideways", torch.zeros(1, 3), 3)
    with pytest.raises(ValueError, match="prefix with segments"):
        row_attention("prefix", None, 3)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 300))
def test_rotary_scores_depend_on_the_distance_only(a: int, b: int, shift: int) -> None:
    q, k = random(1, 1, 1, 8, seed=1), random(1, 1, 1, 8, seed=2)  # T, queries or keys, H, K

    def score(i: int, j: int) -> float:
        def at(x: torch.Tensor, position: int) -> torch.Tensor:
            return rotate(x, rotary_table(torch.tensor([position]), 8, 10000.0, torch.float64))

        return float((at(q, i) * at(k, j)).sum())

    assert score(a, b) == pytest.approx(score(a + shift, b + shift), abs=1e-9)


def test_rotation_turns_half_split_pairs_by_the_position_angle() -> None:
    x = random(2, 5, 2, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 20, 300]])
    turned = rotate(x, rotary_table(positions, 8, 100.0, torch.float64))
    for row in range(2):
        for t in range(5):
            for pair in range(4):
                angle = float(positions[row, t]) * 100.0 ** (-2 * pair / 8)
                low, high = x[row, t, 1, 2, pair], x[row, t, 1, 2, pair + 4]
                expected = (low * math.cos(angle) - high * math.sin(angle), high * math.cos(angle) + low * math.sin(angle))
                assert turned[row, t, 1, 2, pair] == pytest.approx(float(expected[0]), abs=1e-12)
                assert turned[row, t, 1, 2, pair + 4] == pytest.approx(float(expected[1]), abs=1e-12)
    shared = rotate(x, rotary_table(positions[0], 8, 100.0, torch.float64))
    torch.testing.assert_close(shared[0], turned[0])


@pytest.mark.parametrize("kind", ["full", "causal", "prefix"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_the_plain_formula(kind: str, qk_norm: bool) -> None:
    B, T, D, H = 2, 5, 12, 3
    layer = Attention(D, H, qk_norm).double()
    x, segments = random(B, T, D), torch.tensor([[1, 1, 0, 2, 2], [1, 1, 1, 0, 0]])
    rotary = rotary_table(torch.arange(T), D // H, 10000.0, torch.float64)
    got = layer(x, rotary, row_attention(kind, segments, T))
    qkv = layer.qkv_proj.weight
    heads = []
    for h in range(H):
        part = slice(h * D // H, (h + 1) * D // H)
        q, k, v = (x @ qkv[i * D : (i + 1) * D][part].T for i in range(3))
        if qk_norm:
            q, k = (y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5) for y in (q, k))
        q, k = rotate(torch.stack((q, k), 2).unsqueeze(3), rotary).squeeze(3).unbind(2)
        scores = q @ k.transpose(1, 2) / math.sqrt(D // H)
        for i in range(T):
            for j in range(i + 1, T):
                if kind == "causal":
                    scores[:, i, j] = -math.inf
                elif kind == "prefix":
                    same = (segments[:, i] == segments[:, j]) & (segments[:, i] != 0)
                    scores[:, i, j] = torch.where(same, scores[:, i, j], -math.inf)
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(got, torch.cat(heads, -1) @ layer.o_proj.weight.T)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_scale_of_queries_and_keys_counts_unless_they_are_normalised(qk_norm: bool) -> None:
    torch.manual_seed(0)
    # Large ones for the norm's epsilon to be nothing; without a norm they would leave attention nothing to choose.
    layer, x, attend = Attention(12, 3, qk_norm).double(), (30 if qk_norm else 1) * random(2, 5, 12), RowAttention(is_causal=True)
    rotary = rotary_table(torch.arange(5), 4, 10000.0, torch.float64)
    before = layer(x, rotary, attend)
    with torch.no_grad():
        layer.qkv_proj.weight[:12] *= 3
        layer.qkv_proj.weight[12:24] *= 2
    # As equal as the epsilon of the norm lets it be.
    assert torch.allclose(layer(x, rotary, attend), before, rtol=0, atol=1e-4) == qk_norm


@pytest.mark.parametrize("kind", ["causal", "prefix"])
def test_tokens_without_padding_attend_as_in_padded_rows(kind: str) -> None:
    lengths, T, D = (5, 2, 1), 6, 8
    layer = Attention(D, 2, qk_norm=False).double()
    segments = torch.tensor([[1, 1, 0, 2, 2, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    is_token = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    token_rows = TokenRows(torch.nonzero(is_token.flatten()).squeeze(1), len(lengths), T)
    x_ND, attend = random(sum(lengths), D), row_attention(kind, segments, T)
    x_BTD = token_rows.scatter(x_ND)
    assert torch.equal(x_BTD[~is_token], torch.zeros(3 * T - 8, D)) and torch.equal(token_rows.gather(x_BTD), x_ND)
    padded = layer(x_BTD, rotary_table(torch.arange(T), 4, 10000.0, torch.float64), attend)
    rotary_N = rotary_table(token_rows.index_N % T, 4, 10000.0, torch.float64)
    torch.testing.assert_close(layer(x_ND, rotary_N, TokenAttention(token_rows, attend)), padded[is_token])


@pytest.mark.parametrize(("hidden", "expansion", "width"), [(512, 4, 1536), (16, 1, 256), (384, 1, 256), (386, 1, 512)])
def test_swiglu_width_is_rounded_up_to_256_and_gate_comes_first(hidden: int, expansion: float, width: int) -> None:
    layer = SwiGLU(hidden, expansion).double()
    assert layer.gate_up_proj.weight.shape == (2 * width, hidden) and layer.down_proj.weight.shape == (hidden, width)
    x = random(2, hidden)
    gate, up = x @ layer.gate_up_proj.weight[:width].T, x @ layer.gate_up_proj.weight[width:].T
    torch.testing.assert_close(layer(x), (gate * gate.sigmoid() * up) @ layer.down_proj.weight.T)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_stack_normalises_where_it_says(tiny_config: Callable[..., PretrainInstructConfig], norm: str) -> None:
    stack, x, attend = BlockStack(2, tiny_config(f"arch.norm={norm}").arch).double(), random(1, 4, 16), RowAttention(is_causal=True)
    h = x
    for block in stack.layers:
        if norm == "post":
            h = rms_norm(h + block.self_attn(h, None, attend))
            h = rms_norm(h + block.mlp(h))
        else:
            h = h + block.self_attn(rms_norm(h), None, attend)
            h = h + block.mlp(rms_norm(h))
    torch.testing.assert_close(stack(x, None, attend), h if norm == "post" else rms_norm(h))


def test_linear_keeps_float32_weights_and_computes_in_its_inputs_format() -> None:
    layer = Linear(6, 4, bias=True)
    x = torch.randn(3, 6).bfloat16()
    assert layer.weight.dtype == torch.float32 and layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16()))
    layer.cached_cast = layer.cast_weight(torch.bfloat16)
    (layer(x).float().sum() + layer(2 * x).float().sum()).backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad[0], 3 * x.float().sum(0), rtol=2e-2, atol=2e-2)


def test_a_weight_that_has_the_format_is_not_copied() -> None:
    layer = Linear(2, 2)
    assert layer.cast_weight(torch.float32) is None and layer.cast_weight(torch.float64).dtype == torch.float64


def test_embedding_looks_up_in_float32_and_casts() -> None:
    table = Embedding(5, 64)
    assert table.embedding_weight.dtype == torch.float32
    rows = table(torch.tensor([[4, 0]]), torch.bfloat16)
    assert rows.shape == (1, 2, 64) and torch.equal(rows[0, 0], table.embedding_weight[4].bfloat16())


def packed_mask(kind: str, documents: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    mask = row_attention(kind, segments, documents.shape[1], documents)
    assert mask.visible is not None and not mask.is_causal
    return mask.visible[:, 0]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=7), st.sampled_from(["full", "causal", "prefix"])
)
def test_no_document_sees_another(tokens: list[tuple[int, int]], kind: str) -> None:
    documents, segments = (torch.tensor([column]) for column in zip(*tokens, strict=True))
    alone = row_attention(kind, segments, len(tokens))
    for i, (document, segment) in enumerate(tokens):
        for j, (other, other_segment) in enumerate(tokens):
            allowed = {"full": True, "causal": j <= i, "prefix": j <= i or segment == other_segment != 0}[kind]
            assert bool(packed_mask(kind, documents, segments)[0, i, j]) == (allowed and document == other)
    one_document = packed_mask(kind, torch.ones_like(documents), segments)
    if alone.visible is not None:
        assert torch.equal(one_document, alone.visible[:, 0])


@pytest.mark.parametrize("std", [1.0, 0.05])
def test_the_deviation_after_truncation_is_the_one_asked_for(std: float) -> None:
    torch.manual_seed(0)
    values = truncated_normal_(torch.empty(400_000), std)
    assert values.std().item() == pytest.approx(std, rel=5e-3)
    assert abs(values.mean().item()) < 0.01 * std
    # Cut at two deviations of the normal before truncation, 2 / 0.8796 of the final one.
    assert 2.2 * std < values.abs().max().item() <= 2.2737 * std


def test_layers_take_one_over_the_root_of_their_input() -> None:
    torch.manual_seed(0)
    assert Linear(400, 300).weight.std().item() == pytest.approx(400**-0.5, rel=2e-2)
    assert Embedding(300, 400).embedding_weight.std().item() == pytest.approx(400**-0.5, rel=2e-2)
