"""Documents side by side: what each token sees, and that blocks hide none of it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from models.document_attention import can_attend_in_documents, documents_side_by_side
from models.layers import row_attention

# Of some documents, the prompt segments and their lengths; two of one number that touch are one.
DOCUMENTS = st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 150)), min_size=1, max_size=4), min_size=1, max_size=4)


def side_by_side(documents: list[list[tuple[int, int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where documents begin and end, and of each token the document and a segment number that no other run has."""
    runs = [
        (document, place, number, length)
        for document, parts in enumerate(documents)
        for place, (number, length) in enumerate(parts)
    ]
    lengths = torch.tensor([length for *_, length in runs])
    document_N = torch.tensor([document for document, *_ in runs]).repeat_interleave(lengths)
    segments_N = torch.tensor([place + 1 if number else 0 for _, place, number, _ in runs]).repeat_interleave(lengths)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), document_N.bincount().cumsum(0)])
    return starts, document_N, segments_N


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(DOCUMENTS)
def test_tokens_see_what_a_dense_mask_shows(documents: list[list[tuple[int, int]]]) -> None:
    starts, document_N, segments_N = side_by_side(documents)
    tokens = len(document_N)
    dense = row_attention("prefix", segments_N[None], tokens, document_N[None]).visible
    assert dense is not None
    blocks = documents_side_by_side("prefix", starts.numpy(), segments_N).blocks
    token_N = torch.arange(tokens)
    assert torch.equal(blocks.mask_mod(0, 0, token_N[:, None], token_N), dense[0, 0])
    rest = -tokens % 128
    shown = torch.nn.functional.pad(dense[0, 0], (0, rest, 0, rest)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
    assert (blocks.to_dense()[0, 0].bool() >= shown).all(), "a block that is not attended to hides nothing"


def windowed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What torch says of `varlen_attn`, whose kernels are for CUDA: tokens see so many before and after them, -1: all of them."""
    assert torch.equal(starts_q, starts_k) and longest_q == longest_k == starts_q.diff().max()
    parts = []
    for begin, end in itertools.pairwise(starts_q.tolist()):
        place = torch.arange(end - begin)
        ahead = place - place[:, None]
        before, after = (len(place) if size < 0 else size for size in window_size)
        rows = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*rows, attn_mask=(-ahead <= before) & (ahead <= after)).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["causal", "prefix"])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_equals_that_with_a_dense_mask(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without gradients, and causal with a stand-in for the kernel."""
    if device == "cpu":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", windowed)
    starts, document_N, segments_N = (
        x.to(device) for x in side_by_side([[(1, 40), (0, 70)], [(1, 3)], [(1, 130), (0, 5), (2, 9), (0, 60)]])
    )
    generator = torch.Generator().manual_seed(0)
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 0.03)
    qkv = [torch.randn(len(document_N), 2, 16, generator=generator).to(device, dtype) for _ in range(3)]
    inputs = [x.requires_grad_(device == "cuda") for x in qkv]
    attend = documents_side_by_side(kind, starts.cpu().numpy(), segments_N)
    assert attend.longest == 204
    function = torch.compile(attend.__call__, dynamic=True) if device == "cuda" else attend
    dense = row_attention(kind, segments_N[None], len(document_N), document_N[None])
    rows = (x[None].to(torch.promote_types(dtype, torch.float32)) for x in qkv)
    results = [function(*qkv).float(), dense(*rows)[0]]
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)
    if device == "cuda":
        gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in results]
        torch.testing.assert_close(*gradients, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("kind", "device", "dtype", "head_dim", "can"),
    [
        ("causal", "cuda", torch.bfloat16, 64, True),
        ("prefix", "cuda", torch.bfloat16, 64, True),
        ("full", "cuda", torch.bfloat16, 64, False),
        ("causal", "cpu", torch.bfloat16, 64, False),
        ("causal", "cuda", torch.float32, 64, False),
        ("causal", "cuda", torch.bfloat16, 42, False),
    ],
)
def test_it_is_used_where_there_are_kernels(kind: str, device: str, dtype: torch.dtype, head_dim: int, can: bool) -> None:
    assert can_attend_in_documents(kind, torch.device(device), dtype, head_dim) == can
