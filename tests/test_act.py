"""The ACT wrapper: what sees what, initial weights, number formats. Per-token halting: test_language.py and test_engine.py."""

from collections.abc import Callable

import pytest
import torch

from config.schema import PretrainInstructConfig
from models.act import RecursiveModel

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
            states, output = model.act_step(states, x, model.rotary(torch.arange(positions)), model.mask(segments_BT))
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
