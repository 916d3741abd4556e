"""The ACT wrapper: what sees what, initial weights, number formats. Per-token halting: test_language.py and test_engine.py."""

import functools
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pytest
import torch

from config.schema import PretrainInstructConfig
from dataset.text.loader import Example, collate
from dataset.text.packing import Packing, row_layout
from models.act import RecursiveModel
from models.device import has_compiler
from models.layers import TokenRows
from models.losses import log_probs

ModelFactory = Callable[..., RecursiveModel]
VOCABULARY = 13
# Two documents-in-a-row kinds of segments: prompt 1, answer, prompt 2 (a further turn), answer.
SEGMENTS = torch.tensor([[1, 1, 1, 0, 0, 2, 2, 2, 0, 0]])


def heads_at_depth(model: RecursiveModel, ids_BT: torch.Tensor, segments_BT: torch.Tensor, steps: int) -> torch.Tensor:
    """Vocabulary and halting logits of every position after each of `steps` ACT steps [steps, B, T, V + 2]."""
    positions = ids_BT.shape[1]
    states, x = model.initial_states(len(ids_BT), positions), model.embed(ids_BT)
    results = []
    with torch.no_grad():
        for _ in range(steps):
            states, output = model.act_step(states, x, model.rotary(torch.arange(positions)), model.row_attention(segments_BT))
            results.append(torch.cat((model.logits(output), model.halt_logits(output)), -1))
    return torch.stack(results)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("position_kind", ["rope", "none"])
def test_a_changed_token_changes_nothing_before_it(tiny_model: ModelFactory, attention: str, position_kind: str) -> None:
    model = tiny_model(f"arch.attention={attention}", f"arch.pos_encodings={position_kind}")
    ids = torch.randint(0, VOCABULARY, SEGMENTS.shape, generator=torch.Generator().manual_seed(1))
    before = heads_at_depth(model, ids, SEGMENTS, 3)
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCABULARY
        difference = (heads_at_depth(model, changed, SEGMENTS, 3) - before).abs().amax(dim=(0, 1, 3))
        segment = int(SEGMENTS[0, t])
        same_prompt = (SEGMENTS[0] == segment) & (segment != 0) & (attention == "prefix")
        may_change = same_prompt | (torch.arange(ids.shape[1]) >= t)
        assert (difference[~may_change] <= 1e-12).all(), f"position {t} is seen before it"
        assert (difference[may_change] > 1e-6).all(), f"position {t} is not seen where it should be"


def test_full_attention_sees_everything(tiny_model: ModelFactory, tiny_config: Callable[..., PretrainInstructConfig]) -> None:
    arch = tiny_config().arch.model_copy(update={"attention": "full"})
    model = RecursiveModel(arch, VOCABULARY)
    ids = torch.randint(0, VOCABULARY, SEGMENTS.shape, generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, -1] += 1
    difference = heads_at_depth(model, changed % VOCABULARY, SEGMENTS, 1) - heads_at_depth(model, ids, SEGMENTS, 1)
    assert (difference[0, 0, :, :VOCABULARY].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_two_prompts_give_different_halting_logits(tiny_model: ModelFactory, attention: str) -> None:
    model = tiny_model(f"arch.attention={attention}")
    prompts = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 7, 4, 5]])
    halting = heads_at_depth(model, prompts, torch.ones_like(prompts), 2)[:, :, -1, VOCABULARY]
    assert ((halting[:, 0] - halting[:, 1]).abs() > 1e-6).all()


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_padding_and_neighbours_change_nothing(tiny_model: ModelFactory, attention: str) -> None:
    model = tiny_model(f"arch.attention={attention}")
    alone = torch.tensor([[3, 1, 4, 1, 5]])
    segments = torch.tensor([[1, 1, 1, 0, 0]])
    padded = torch.cat((alone, torch.zeros(1, 4, dtype=torch.int64)), 1)
    batch = torch.cat((padded, torch.randint(0, VOCABULARY, (2, 9))))
    padded_segments = torch.cat((segments, torch.zeros(1, 4, dtype=torch.int64)), 1).expand(3, -1)
    got = heads_at_depth(model, batch, padded_segments, 3)[:, :1, :5]
    torch.testing.assert_close(got, heads_at_depth(model, alone, segments, 3), rtol=0, atol=1e-9)


def test_a_new_model_says_to_go_on_everywhere_and_its_seed_decides_it(tiny_config: Callable[..., PretrainInstructConfig]) -> None:
    arch = tiny_config().arch
    random_before = torch.random.get_rng_state()
    first, again, other = (RecursiveModel(arch, VOCABULARY, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), random_before)
    halting = first.halt_logits(torch.randn(4, 16, dtype=torch.float64))
    assert torch.equal(halting, torch.full((4, 2), -1.0, dtype=torch.float64))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_input_embeddings_are_scaled_by_the_root_of_their_width(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    torch.testing.assert_close(model.embed(torch.tensor([[2]]))[0, 0], 4.0 * model.embed_tokens.embedding_weight[2])


def test_bfloat16_gives_float32_logits_near_those_of_float32(tiny_model: ModelFactory) -> None:
    ids = torch.arange(8).unsqueeze(0)
    segments = torch.zeros_like(ids)
    exact = heads_at_depth(tiny_model("arch.forward_dtype=float32"), ids, segments, 1)
    rough = heads_at_depth(tiny_model("arch.forward_dtype=bfloat16"), ids, segments, 1)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.3


@pytest.mark.parametrize("tied", ["true", "false"])
def test_casting_for_inference_changes_no_result(tiny_model: ModelFactory, tied: str) -> None:
    ids = torch.arange(8).unsqueeze(0)
    segments = torch.zeros_like(ids)
    model = tiny_model("arch.forward_dtype=bfloat16", f"arch.tie_embeddings={tied}")
    before = heads_at_depth(model, ids, segments, 2)
    model.cast_for_inference()
    assert model.lm_head.weight.dtype == torch.bfloat16 and not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(heads_at_depth(model, ids, segments, 2), before, rtol=0, atol=0)


def one_gradient(model: RecursiveModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Logits after two ACT steps, gradients of a loss at both, and the bytes that autograd saved for them, weights left out."""
    ids, segments = torch.arange(20).view(2, 10) % VOCABULARY, SEGMENTS.expand(2, -1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    states, loss = model.initial_states(2, 10), torch.zeros(())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(2):
            states, output = model.act_step(
                tuple(state.detach() for state in states),
                model.embed(ids),
                model.rotary(torch.arange(10)),
                model.row_attention(segments),
            )
            loss = loss + model.logits(output).square().mean()
    loss.backward()
    return (
        model.logits(output).detach(),
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        sum(saved.values()),
    )


def assert_like(
    got: tuple[torch.Tensor, dict[str, torch.Tensor], int],
    expected: tuple[torch.Tensor, dict[str, torch.Tensor], int],
    tolerance: float,
) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=tolerance)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            got[1][name], gradient, rtol=0, atol=tolerance * float(gradient.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_activations_computed_again_give_the_same_gradients_for_less_memory(tiny_model: ModelFactory, dtype: str) -> None:
    settings = (f"arch.forward_dtype={dtype}", "arch.attention=prefix")
    kept = one_gradient(tiny_model(*settings))
    again = one_gradient(tiny_model(*settings, "arch.activation_checkpointing=true"))
    assert_like(again, kept, 0.0)
    # What a level call is given isn't among what autograd saves: a state for each of three calls of two ACT steps.
    inputs = 2 * 3 * 2 * 10 * 16 * {"float64": 8, "bfloat16": 2}[dtype]
    assert again[2] + inputs < kept[2] / 5


# Rounding of the number format, grown on the way back; a compiler rounds bfloat16 in fewer places.
TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.1}


# aot_eager is all of torch.compile but the generated code: graphs, guards, what is saved for the backward pass.
@pytest.mark.parametrize(
    ("backend", "dtype", "again"),
    [
        ("aot_eager", "bfloat16", "true"),
        *(pytest.param("inductor", dtype, again, marks=pytest.mark.slow) for dtype in TOLERANCE for again in ("false", "true")),
    ],
)
def test_compiled_levels_equal_eager_ones(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: str, again: str
) -> None:
    if backend == "inductor" and not has_compiler():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    settings = (
        f"arch.forward_dtype={dtype}",
        f"arch.activation_checkpointing={again}",
        "arch.L_layers=1",
        "arch.H_cycles=1",
        "arch.grad_calls=2",
    )
    eager, compiled = tiny_model(*settings), tiny_model(*settings)
    compiled.compile_levels()
    assert compiled.state_dict().keys() == eager.state_dict().keys(), "checkpoints load either way"
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        # One graph with gradient, and one without for the first of three calls, at every ACT step.
        assert_like(one_gradient(compiled), one_gradient(eager), TOLERANCE[dtype])


def test_weights_held_in_the_compute_format_are_let_go_after_a_step(tiny_model: ModelFactory) -> None:
    model = tiny_model("arch.forward_dtype=bfloat16")
    ids, segments = torch.arange(4).unsqueeze(0), torch.zeros(1, 4, dtype=torch.int64)
    before = heads_at_depth(model, ids, segments, 1)
    with torch.no_grad():
        for p in model.get_submodule("L_level").parameters():
            p.mul_(2.0)
    assert not torch.equal(heads_at_depth(model, ids, segments, 1), before)


def test_tied_heads_are_one_tensor(tiny_model: ModelFactory) -> None:
    tied, untied = tiny_model("arch.tie_embeddings=true"), tiny_model()
    assert tied.lm_head.weight is tied.embed_tokens.embedding_weight
    count = {model: sum(p.numel() for p in model.parameters()) for model in (tied, untied)}
    assert count[untied] - count[tied] == VOCABULARY * 16


@torch.no_grad()
def losses_in_rows(model: RecursiveModel, rows: Sequence[Example], packing: Packing, steps: int) -> list[torch.Tensor]:
    """Nats of each document's labels after the last of `steps` ACT steps, all documents side by side."""
    layout = row_layout(np.array([len(row.ids) - 1 for row in rows]), packing, multiple=4, token_multiple=8)
    batch = collate(rows, pad_id=0, length_multiple=4)
    room = ((0, 0), (0, layout.width - batch["inputs"].shape[1]))
    inputs_N, labels_N, segments_N = (
        torch.from_numpy(np.pad(batch[name], room).ravel()[layout.place_N]).long() for name in ("inputs", "labels", "segment")
    )
    groups = [TokenRows(torch.from_numpy(group.index_N), *group[1:]) for group in layout.groups]
    documents_N = torch.from_numpy(layout.document_N)
    attend = model.token_attention(groups, segments_N, documents_N if packing == "packed" else None)
    states, x, rotary = (
        model.initial_states(len(inputs_N)),
        model.embed(inputs_N),
        model.rotary(torch.from_numpy(layout.position_N)),
    )
    for _ in range(steps):
        states, output = model.act_step(states, x, rotary, attend)
    nll_N = -log_probs(model.logits(output), model.config.loss).gather(1, labels_N.clamp(min=0).unsqueeze(1)).squeeze(1)
    return [nll_N[(documents_N == document) & (labels_N >= 0)] for document in range(len(rows))]


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("packing", get_args(Packing))
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_a_documents_losses_do_not_depend_on_what_it_is_packed_with(
    tiny_model: ModelFactory,
    random_examples: Callable[..., list[Example]],
    attention: str,
    packing: Packing,
    dtype: str,
    tolerance: float,
) -> None:
    model = tiny_model(f"arch.attention={attention}", f"arch.forward_dtype={dtype}")
    rows = random_examples(9, vocab_size=VOCABULARY, longest=24)
    alone = [losses_in_rows(model, [row], "off", 2)[0] for row in rows]
    for company in (rows, rows[::-1], rows[:3], [rows[0]] * 5):
        for row, got in zip(company, losses_in_rows(model, company, packing, 2), strict=True):
            expected = next(losses for other, losses in zip(rows, alone, strict=True) if other is row)
            assert len(got) == row.supervised[1:].sum() > 0
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
