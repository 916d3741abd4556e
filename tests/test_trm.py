"""TRM against a straight-line program written from its formulas, its gradient knob, its names and its size."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from config.compose import compose_config
from config.schema import PretrainInstructConfig
from models.act import RecursiveModel

VOCABULARY, HIDDEN, HEADS, H_CYCLES, L_CYCLES, LAYERS = 11, 8, 2, 2, 3, 2
SIZES = (
    f"arch.hidden_size={HIDDEN}",
    f"arch.num_heads={HEADS}",
    f"arch.H_cycles={H_CYCLES}",
    f"arch.L_cycles={L_CYCLES}",
    f"arch.L_layers={LAYERS}",
)
IDS = torch.tensor([[1, 5, 2, 10, 0, 7], [3, 3, 8, 1, 9, 4]])
CALLS = H_CYCLES * (L_CYCLES + 1)


def formula_weights(model: RecursiveModel) -> dict[str, Tensor]:
    """Weights that depend on no random generator: sin of the element's number, scaled to keep values apart from zero."""
    weights = {}
    for k, (name, value) in enumerate(model.state_dict().items()):
        index = torch.arange(value.numel(), dtype=torch.float64)
        weights[name] = (torch.sin(0.7 * index + 1.3 * k) * 0.4 + 0.1 * torch.cos(0.13 * index * k)).view(value.shape)
    return weights


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-5)


def rope(x: Tensor) -> Tensor:
    """x [B, T, K], as complex numbers: channel k and k + K/2 are one."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double().unsqueeze(1) / 10000.0 ** (torch.arange(half).double() * 2 / x.shape[-1])
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def plain_stack(w: dict[str, Tensor], h: Tensor) -> Tensor:
    size, future = HIDDEN // HEADS, torch.ones(h.shape[1], h.shape[1]).triu(1).bool()
    for layer in range(LAYERS):
        at = f"L_level.layers.{layer}."
        q, k, v = (h @ part.T for part in w[at + "self_attn.qkv_proj.weight"].split(HIDDEN))
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = rope(q[..., part]) @ rope(k[..., part]).transpose(1, 2) / math.sqrt(size)
            heads.append(torch.softmax(scores.masked_fill(future, -math.inf), -1) @ v[..., part])
        h = rms(h + torch.cat(heads, -1) @ w[at + "self_attn.o_proj.weight"].T)
        gate, up = (h @ part.T for part in w[at + "mlp.gate_up_proj.weight"].chunk(2))
        h = rms(h + (gate / (1 + torch.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T)
    return h


def plain_step(w: dict[str, Tensor], z_h: Tensor, z_l: Tensor, x: Tensor, grad_calls: int) -> tuple[Tensor, Tensor]:
    """One ACT step; everything before the last `grad_calls` calls is computed without gradient."""
    left = CALLS

    def call(h: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left >= grad_calls:
            return plain_stack({name: value.detach() for name, value in w.items()}, h.detach()).detach()
        return plain_stack(w, h)

    for _ in range(H_CYCLES):
        for _ in range(L_CYCLES):
            z_l = call(z_l + z_h + x)
        z_h = call(z_h + z_l)
    return z_h, z_l


def loss_of(logits: Tensor, halting: Tensor) -> Tensor:
    """Any smooth function that weighs every logit differently."""
    weights = torch.cos(torch.arange(logits.numel(), dtype=torch.float64)).view(logits.shape)
    return (weights * logits.tanh()).sum() + (halting * torch.tensor([1.0, -0.5])).sum()


def build(tiny_config: Callable[..., PretrainInstructConfig], grad_calls: int | None) -> RecursiveModel:
    knob = "null" if grad_calls is None else grad_calls
    model = RecursiveModel(tiny_config(*SIZES, f"arch.grad_calls={knob}").arch, VOCABULARY)
    model.load_state_dict(formula_weights(model))
    return model


@pytest.mark.parametrize("grad_calls", [None, *range(1, CALLS + 1)])
def test_three_steps_equal_the_straight_line_program(
    tiny_config: Callable[..., PretrainInstructConfig], grad_calls: int | None
) -> None:
    model = build(tiny_config, grad_calls)
    w = {name: value.requires_grad_(not name.endswith("_init")) for name, value in formula_weights(model).items()}
    shape = (*IDS.shape, HIDDEN)
    z_h, z_l = w["H_init"].expand(shape), w["L_init"].expand(shape)
    states, total, plain_total = model.initial_states(*IDS.shape), torch.tensor(0.0), torch.tensor(0.0)
    for _ in range(3):
        # The original carries states, not gradients, from one ACT step to the next.
        states = tuple(state.detach() for state in states)
        states, output = model.act_step(
            states, model.embed(IDS), model.rotary(torch.arange(6)), model.row_attention(torch.zeros_like(IDS))
        )
        logits, halting = model.logits(output), model.halt_logits(output)
        x = w["embed_tokens.embedding_weight"][IDS] * math.sqrt(HIDDEN)
        z_h, z_l = plain_step(w, z_h.detach(), z_l.detach(), x, grad_calls or L_CYCLES + 1)
        plain_logits, plain_halting = z_h @ w["lm_head.weight"].T, z_h @ w["q_head.weight"].T + w["q_head.bias"]
        torch.testing.assert_close(logits, plain_logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(halting, plain_halting, rtol=0, atol=1e-9)
        torch.testing.assert_close(states, (z_h, z_l), rtol=0, atol=1e-9)
        total, plain_total = total + loss_of(logits, halting), plain_total + loss_of(plain_logits, plain_halting)
    total.backward()
    plain_total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert w[name].grad is None or not w[name].grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, w[name].grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    # With the last call alone, the input embedding is never reached: z_H = f(z_H + z_L).
    assert (model.embed_tokens.embedding_weight.grad is None) == (grad_calls == 1)


def test_the_knob_changes_gradients_and_no_output(tiny_config: Callable[..., PretrainInstructConfig]) -> None:
    gradients, outputs = [], []
    for grad_calls in (None, L_CYCLES + 1, L_CYCLES, CALLS):
        model = build(tiny_config, grad_calls)
        _, output = model.act_step(
            model.initial_states(*IDS.shape),
            model.embed(IDS),
            model.rotary(torch.arange(6)),
            model.row_attention(torch.zeros_like(IDS)),
        )
        output.sin().sum().backward()
        outputs.append(output)
        gradients.append(model.get_parameter("L_level.layers.0.mlp.down_proj.weight").grad)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2]) and not torch.allclose(gradients[0], gradients[3])


def test_names_shapes_and_number_of_parameters_are_the_originals() -> None:
    arch = compose_config("cfg_pretrain_instruct", ["arch=trm", "dataset.tokenizer_path=unused"]).arch
    with torch.device("meta"):
        model = RecursiveModel(arch.model_copy(update={"forward_dtype": "bfloat16"}), 32_000)
    expected = {
        "H_init": (512,),
        "L_init": (512,),
        "embed_tokens.embedding_weight": (32_000, 512),
        "lm_head.weight": (32_000, 512),
        "q_head.weight": (2, 512),
        "q_head.bias": (2,),
    }
    for layer in range(2):
        expected |= {
            f"L_level.layers.{layer}.self_attn.qkv_proj.weight": (1536, 512),
            f"L_level.layers.{layer}.self_attn.o_proj.weight": (512, 512),
            f"L_level.layers.{layer}.mlp.gate_up_proj.weight": (3072, 512),
            f"L_level.layers.{layer}.mlp.down_proj.weight": (512, 1536),
        }
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == 39_584_770
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.get_buffer("H_init").dtype == torch.bfloat16
