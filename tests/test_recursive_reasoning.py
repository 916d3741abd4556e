"""Each recursion against a straight-line program written from its formulas, with its names, shapes and default gradient."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from config.compose import compose_config
from config.errors import UsageError
from config.schema import ArchConfig, PretrainInstructConfig
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example, ExampleStream
from models.act import RecursiveModel
from models.layers import RowAttention
from models.losses import row_loss
from models.recursive_reasoning import build_recursion
from models.row_halting import continue_target, halted
from models.sparse_embedding import sign_sgd_
from training.loop import Trainer
from training.optimizer import AdamATan2
from training.text import TextTask

ALL = ["looped", "trm", "trm_singlez", "trm_hier6", "hrm", "transformers_baseline"]
VOCABULARY, HIDDEN, SEQ_LEN, PUZZLES = 11, 8, 5, 4
IDS = torch.tensor([[1, 5, 2, 10, 0], [3, 3, 8, 1, 9], [7, 0, 0, 2, 4]])
# Two rows of one puzzle: their gradients meet in one vector.
PUZZLE_IDS = torch.tensor([3, 1, 3])

Call = Callable[[str, Tensor], Tensor]
States = tuple[Tensor, ...]


def puzzle_arch(name: str, **changes: Any) -> ArchConfig:
    """The recursion's own settings at toy size, in float64, as a puzzle has them."""
    text = compose_config("cfg_pretrain_instruct", [f"arch={name}", "dataset.tokenizer_path=unused"]).arch
    toy = {"hidden_size": HIDDEN, "num_heads": 2, "expansion": 1, "forward_dtype": "float64", "attention": "full"}
    toy |= {"grad_calls": None, "qk_norm": False}
    toy |= {key: min(value, most) for key, most in (("H_layers", 2), ("L_layers", 1)) if (value := getattr(text, key))}
    return ArchConfig.model_validate({**text.model_dump(), **toy, "puzzle_emb_ndim": HIDDEN, "puzzle_emb_len": 2, **changes})


def formula_weights(model: RecursiveModel) -> dict[str, Tensor]:
    """Weights that depend on no random generator, the halting head's and the puzzles' vectors among them: none is zero."""
    weights = {}
    for k, (name, value) in enumerate(model.state_dict().items()):
        index = torch.arange(value.numel(), dtype=torch.float64)
        weights[name] = (torch.sin(0.7 * index + 1.3 * k) * 0.4 + 0.1 * torch.cos(0.13 * index * k)).view(value.shape)
    return weights


def build(arch: ArchConfig) -> RecursiveModel:
    model = RecursiveModel(arch, VOCABULARY, seq_len=SEQ_LEN, puzzles=PUZZLES)
    model.load_state_dict(formula_weights(model))
    return model


def rms(x: Tensor, dim: int = -1) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim, keepdim=True) / x.shape[dim] + 1e-5)


def rope(x: Tensor) -> Tensor:
    """x [B, T, K], as complex numbers: channel k and k + K/2 are one."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double().unsqueeze(1) / 10000.0 ** (torch.arange(half).double() * 2 / x.shape[-1])
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def swiglu(w: dict[str, Tensor], at: str, h: Tensor) -> Tensor:
    gate, up = (h @ part.T for part in w[at + "gate_up_proj.weight"].chunk(2))
    return (gate / (1 + torch.exp(-gate)) * up) @ w[at + "down_proj.weight"].T


def plain_block(w: dict[str, Tensor], at: str, h: Tensor, arch: ArchConfig) -> Tensor:
    if arch.mlp_t:
        h = rms(h + torch.einsum("bdt->btd", swiglu(w, at + "mlp_t.", torch.einsum("btd->bdt", h))), dim=1)
    else:
        size = HIDDEN // arch.num_heads
        q, k, v = (h @ part.T for part in w[at + "self_attn.qkv_proj.weight"].chunk(3))
        turn = rope if arch.pos_encodings == "rope" else lambda part: part
        heads = []
        for head in range(arch.num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = turn(q[..., part]) @ turn(k[..., part]).transpose(1, 2) / math.sqrt(size)
            heads.append(torch.softmax(scores, -1) @ v[..., part])
        h = rms(h + torch.cat(heads, -1) @ w[at + "self_attn.o_proj.weight"].T)
    return rms(h + swiglu(w, at + "mlp.", h))


def plain_input(w: dict[str, Tensor], arch: ArchConfig, prefix_len: int) -> Tensor:
    vectors = w["puzzle_emb.weights"][PUZZLE_IDS]
    filled = torch.cat((vectors, torch.zeros(len(IDS), prefix_len * HIDDEN - vectors.shape[1], dtype=torch.float64)), 1)
    x = torch.cat((filled.view(len(IDS), prefix_len, HIDDEN), w["embed_tokens.embedding_weight"][IDS]), 1)
    if arch.pos_encodings == "learned":
        x = (x + w["embed_pos.embedding_weight"]) / math.sqrt(2)
    return x * math.sqrt(HIDDEN)


def trm(f: Call, z: States, x: Tensor, H: int, L: int) -> tuple[States, Tensor]:
    z_h, z_l = z
    for _ in range(H):
        for _ in range(L):
            z_l = f("L_level", z_l + z_h + x)
        z_h = f("L_level", z_h + z_l)
    return (z_h, z_l), z_h


def singlez(f: Call, z: States, x: Tensor, H: int, L: int) -> tuple[States, Tensor]:
    (z_l,) = z
    for _ in range(H):
        for _ in range(L):
            z_l = f("L_level", z_l + x)
        z_l = f("L_level", z_l)
    return (z_l,), z_l


def looped(f: Call, z: States, x: Tensor, H: int, L: int) -> tuple[States, Tensor]:
    (z_l,) = z
    for _ in range(H * (L + 1)):
        z_l = f("L_level", z_l + x)
    return (z_l,), z_l


def hier6(f: Call, z: States, x: Tensor, H: int, L: int) -> tuple[States, Tensor]:
    z_h, a, b, c, d, e, g = z
    for _ in range(H):
        a = f("L_level", a + b + c + d + e + g + z_h + x)
        b = f("L_level", a + b + c + d + e + g + z_h + x) if L > 1 else b
        c = f("L_level", a + b + c + d + e + g + z_h + x) if L > 2 else c
        d = f("L_level", a + b + c + d + e + g + z_h + x) if L > 3 else d
        e = f("L_level", a + b + c + d + e + g + z_h + x) if L > 4 else e
        g = f("L_level", a + b + c + d + e + g + z_h + x) if L > 5 else g
        z_h = f("L_level", z_h + a + b + c + d + e + g)
    return (z_h, a, b, c, d, e, g), z_h


def hrm(f: Call, z: States, x: Tensor, H: int, L: int) -> tuple[States, Tensor]:
    z_h, z_l = z
    for _ in range(H):
        for _ in range(L):
            z_l = f("L_level", z_l + z_h + x)
        z_h = f("H_level", z_h + z_l)
    return (z_h, z_l), z_h


def baseline(f: Call, z: States, x: Tensor, H: int, L: int) -> tuple[States, Tensor]:
    z_h = f("H_level", z[0] + x)
    return (z_h,), z_h


PLAIN = {
    "looped": looped,
    "trm": trm,
    "trm_singlez": singlez,
    "trm_hier6": hier6,
    "hrm": hrm,
    "transformers_baseline": baseline,
}
# H cycles, L cycles, level calls of an ACT step, and how many of them carry gradient: of HRM, the last of each level.
SHAPE = {
    "looped": (2, 1, 4, 2),
    "trm": (2, 3, 8, 4),
    "trm_singlez": (2, 3, 8, 4),
    "trm_hier6": (2, 6, 14, 7),
    "hrm": (2, 3, 8, 2),
    "transformers_baseline": (1, 0, 1, 1),
}
GOLDEN: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ALL] + [
    ("trm", {"mlp_t": True, "pos_encodings": "none"}),
    ("trm", {"pos_encodings": "learned"}),
    ("trm", {"puzzle_emb_ndim": 12, "puzzle_emb_len": 3}),
    ("looped", {"grad_calls": "all"}),
    ("looped", {"L_cycles": 0, "grad_calls": 1}),
    ("trm_singlez", {"grad_calls": 1}),
    ("trm_hier6", {"L_cycles": 2, "grad_calls": 5}),
    ("hrm", {"grad_calls": 1}),
    ("hrm", {"grad_calls": 8}),
    ("hrm", {"mlp_t": True, "puzzle_emb_ndim": 12, "puzzle_emb_len": 0}),
    ("transformers_baseline", {"num_heads": 3, "puzzle_emb_len": 0}),
]


def loss_of(logits: Tensor, halting: Tensor) -> Tensor:
    """Any smooth function that weighs every logit differently."""
    weights = torch.cos(torch.arange(logits.numel(), dtype=torch.float64)).view(logits.shape)
    return (weights * logits.tanh()).sum() + (halting * torch.tensor([1.0, -0.5])).sum()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("H", "L"), [(1, 1), (3, 2), (2, 6)])
def test_a_step_makes_as_many_calls_as_the_settings_are_checked_by(name: str, H: int, L: int) -> None:
    """The limit of arch.grad_calls, which config/schema knows without a recursion."""
    cycles = {"H_cycles": 1, "L_cycles": 0} if name == "transformers_baseline" else {"H_cycles": H, "L_cycles": L}
    arch = puzzle_arch(name, **cycles, halt_max_steps=1)
    calls = len(build_recursion(arch).calls)
    puzzle_arch(name, **cycles, halt_max_steps=1, grad_calls=calls)
    with pytest.raises(ValidationError, match=f"grad_calls {calls + 1} is more than the {calls} level calls"):
        puzzle_arch(name, **cycles, halt_max_steps=1, grad_calls=calls + 1)


@pytest.mark.parametrize(("name", "changes"), GOLDEN, ids=[f"{name}-{'-'.join(map(str, c.values()))}" for name, c in GOLDEN])
def test_three_steps_equal_the_straight_line_program(name: str, changes: dict[str, Any]) -> None:
    H, L, calls, gradient_calls = SHAPE[name]
    arch = puzzle_arch(name, **{"H_cycles": H, "L_cycles": L, **changes})
    if "L_cycles" in changes:
        L, calls = arch.L_cycles, H * (arch.L_cycles + 1)
    model = build(arch)
    w = {key: value.requires_grad_(not key.endswith("_init")) for key, value in formula_weights(model).items()}
    prefix = arch.puzzle_emb_len or math.ceil(arch.puzzle_emb_ndim / HIDDEN)
    shape = (len(IDS), prefix + SEQ_LEN)
    layers = {level: len({key.split(".")[2] for key in w if key.startswith(level)}) for level in ("H_level", "L_level")}
    left = 0

    def call(level: str, h: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        with torch.set_grad_enabled(left < (calls if arch.grad_calls == "all" else arch.grad_calls or gradient_calls)):
            for layer in range(layers[level]):
                h = plain_block(w, f"{level}.layers.{layer}.", h, arch)
            return h

    inits = [key for key in ("H_init", "L_init", *(f"L{i}_init" for i in range(1, 7))) if key in w]
    plain_states = tuple(w[key].expand(*shape, HIDDEN) for key in inits)
    states, total, plain_total = model.initial_states(*shape), torch.tensor(0.0), torch.tensor(0.0)
    for _ in range(3):
        # The original carries states, not gradients, from one ACT step to the next.
        states, plain_states = (tuple(state.detach() for state in group) for group in (states, plain_states))
        x = model.embed(IDS, PUZZLE_IDS)
        states, output = model.act_step(states, x, model.rotary(torch.arange(shape[1])), RowAttention())
        logits, halting = model.logits(output[:, model.prefix_len :]), model.halt_logits(output[:, 0])
        left = calls
        plain_states, z = PLAIN[name](call, plain_states, plain_input(w, arch, prefix), H, L)
        assert left == 0
        plain_logits, plain_halting = z[:, prefix:] @ w["lm_head.weight"].T, z[:, 0] @ w["q_head.weight"].T + w["q_head.bias"]
        torch.testing.assert_close(logits, plain_logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(halting, plain_halting, rtol=0, atol=1e-9)
        torch.testing.assert_close(states, plain_states, rtol=0, atol=1e-9)
        total, plain_total = total + loss_of(logits, halting), plain_total + loss_of(plain_logits, plain_halting)
    total.backward()
    plain_total.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is None:
            assert w[key].grad is None or not w[key].grad.any(), key
        else:
            torch.testing.assert_close(parameter.grad, w[key].grad, rtol=0, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")
    taken = model.puzzle_emb.take_gradient()
    if taken is None:
        # One call with gradient doesn't see the input: z_H = f(z_H + z_L).
        assert arch.grad_calls == 1 and w["puzzle_emb.weights"].grad is None
    else:
        ids, gradient = taken
        assert ids.tolist() == [1, 3] and gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, w["puzzle_emb.weights"].grad[ids], rtol=0, atol=1e-9)


BLOCK = {
    "self_attn.qkv_proj.weight": (1536, 512),
    "self_attn.o_proj.weight": (512, 512),
    "mlp.gate_up_proj.weight": (3072, 512),
    "mlp.down_proj.weight": (512, 1536),
}
MIXING_BLOCK = {
    # 81 cells behind a prefix of 16: 4 * 97 * 2/3 rounded up to 512.
    "mlp_t.gate_up_proj.weight": (1024, 97),
    "mlp_t.down_proj.weight": (97, 512),
    "mlp.gate_up_proj.weight": (3072, 512),
    "mlp.down_proj.weight": (512, 1536),
}
NARROW_BLOCK = {**BLOCK, "self_attn.qkv_proj.weight": (1512, 512), "self_attn.o_proj.weight": (512, 504)}


@pytest.mark.parametrize(
    ("name", "changes", "inits", "levels", "block"),
    [
        ("trm", {}, ["H_init", "L_init"], {"L_level": 2}, BLOCK),
        ("trm", {"mlp_t": True, "pos_encodings": "learned"}, ["H_init", "L_init"], {"L_level": 2}, MIXING_BLOCK),
        ("looped", {}, ["L_init"], {"L_level": 2}, BLOCK),
        ("trm_singlez", {}, ["L_init"], {"L_level": 2}, BLOCK),
        ("trm_hier6", {}, ["H_init", *(f"L{i}_init" for i in range(1, 7))], {"L_level": 2}, BLOCK),
        ("hrm", {}, ["H_init", "L_init"], {"H_level": 4, "L_level": 4}, BLOCK),
        ("transformers_baseline", {}, ["H_init"], {"H_level": 8}, NARROW_BLOCK),
    ],
)
def test_names_and_shapes_are_the_originals(
    name: str, changes: dict[str, Any], inits: list[str], levels: dict[str, int], block: dict[str, tuple[int, ...]]
) -> None:
    text = compose_config("cfg_pretrain_instruct", [f"arch={name}", "dataset.tokenizer_path=unused"]).arch
    prefix = {} if name in ("hrm", "transformers_baseline") else {"puzzle_emb_len": 16}
    values = {**text.model_dump(), "attention": "full", "forward_dtype": "bfloat16", "puzzle_emb_ndim": 512, **prefix, **changes}
    with torch.device("meta"):
        model = RecursiveModel(ArchConfig.model_validate(values), 12, seq_len=81, puzzles=1001)
    expected = dict.fromkeys(inits, (512,)) | {
        "embed_tokens.embedding_weight": (12, 512),
        "lm_head.weight": (12, 512),
        "q_head.weight": (2, 512),
        "q_head.bias": (2,),
        "puzzle_emb.weights": (1001, 512),
    }
    if "pos_encodings" in changes:
        expected["embed_pos.embedding_weight"] = (97, 512)
    for level, layers in levels.items():
        expected |= {f"{level}.layers.{i}.{key}": shape for i in range(layers) for key, shape in block.items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert {key for key, _ in model.named_buffers()} == {*inits, "puzzle_emb.weights", "halt_calibration"}
    assert all(model.get_buffer(key).dtype == torch.bfloat16 for key in inits)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_puzzles_vector_starts_at_zero_and_has_positions_of_its_own() -> None:
    model = RecursiveModel(puzzle_arch("trm", pos_encodings="learned"), VOCABULARY, seq_len=SEQ_LEN, puzzles=PUZZLES)
    x = model.embed(IDS, PUZZLE_IDS)
    table = model.embed_pos.embedding_weight
    assert x.shape == (3, 2 + SEQ_LEN, HIDDEN)
    torch.testing.assert_close(x[:, :2], (table[:2] * 2.0).expand(3, -1, -1))
    # Shorter rows take the first of the positions, longer ones have none.
    torch.testing.assert_close(model.embed(IDS[:, :2], PUZZLE_IDS), x[:, :4])
    with pytest.raises(UsageError, match="a row of 12 positions, but the model has 7 learned ones"):
        model.embed(torch.cat((IDS, IDS), 1), PUZZLE_IDS)


@pytest.mark.parametrize(
    ("changes", "given"), [({"mlp_t": True}, {"puzzles": 4}), ({"pos_encodings": "learned"}, {"puzzles": 4}), ({}, {"seq_len": 5})]
)
def test_weights_of_positions_and_puzzles_need_their_number(changes: dict[str, Any], given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="pass"):
        RecursiveModel(puzzle_arch("trm", **changes), VOCABULARY, **given)


@pytest.mark.parametrize("name", ALL)
def test_every_recursion_learns_as_a_language_model(
    tiny_config: Callable[..., PretrainInstructConfig], random_examples: Callable[..., list[Example]], name: str
) -> None:
    config = tiny_config(f"arch={name}", "epochs=40", "lr=2e-3", "lr_min_ratio=1", "arch.halt_max_steps=2")
    examples = random_examples(4)
    model = RecursiveModel(config.arch, 13)
    curriculum = Curriculum.of_epochs(len(examples), 0, config.epochs)
    trainer = Trainer(config, model, TextTask(config, model, ExampleStream(examples, curriculum, 0), curriculum))
    losses = [float(result.sums["nll"]) / result.weight for result in trainer.steps()]
    assert losses[0] == pytest.approx(math.log(13), abs=1.0) and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("trm", {"mlp_t": True, "pos_encodings": "none"}),
        ("trm", {"no_ACT_continue": False}),
        ("trm", {"forward_dtype": "bfloat16", "pos_encodings": "learned"}),
        ("trm_singlez", {"no_ACT_continue": False, "loss": "softmax"}),
        ("trm_hier6", {}),
        ("hrm", {"no_ACT_continue": False}),
        ("transformers_baseline", {"no_ACT_continue": False}),
    ],
)
def test_every_recursion_learns_puzzles(name: str, changes: dict[str, Any]) -> None:
    """The original's training step, on two rows of one puzzle and one of another, all with the same input."""
    short = {"forward_dtype": "float32", "halt_max_steps": 2, "H_cycles": 1, "L_cycles": min(2, SHAPE[name][1])}
    arch = puzzle_arch(name, **{**short, **changes})
    model = RecursiveModel(arch, VOCABULARY, seq_len=SEQ_LEN, puzzles=PUZZLES)
    optimizer = AdamATan2(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    # The same input has another answer in another puzzle: only the puzzle's vector can tell.
    inputs, labels = IDS[[0, 0, 0]], IDS[[1, 2, 1]]
    labels[:, 3] = -100
    states, steps = model.initial_states(3, model.prefix_len + SEQ_LEN), torch.zeros(3, dtype=torch.int64)
    losses, trained_to_continue = [], False
    for update in range(100):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - update / 100)
        if update % arch.halt_max_steps == 0:
            states, steps = model.initial_states(3, model.prefix_len + SEQ_LEN), torch.zeros(3, dtype=torch.int64)
        x, rotary = model.embed(inputs, PUZZLE_IDS), model.rotary(torch.arange(model.prefix_len + SEQ_LEN))
        states, output = model.act_step(states, x, rotary, RowAttention())
        states, steps = tuple(state.detach() for state in states), steps + 1
        target = None
        if arch.trains_continue:
            with torch.no_grad():
                _, next_output = model.act_step(states, x, rotary, RowAttention())
                target = continue_target(model.halt_logits(next_output[:, 0]), steps >= arch.halt_max_steps)
        halt_logits = model.halt_logits(output[:, 0])
        tokens = output[:, model.prefix_len :]
        loss = row_loss(tokens, model.lm_head.weight, halt_logits, labels, arch.loss, target)
        assert halted(arch, halt_logits, steps, torch.zeros(3)).shape == (3,)
        optimizer.zero_grad(set_to_none=True)
        (loss.total / 3).backward()
        trained_to_continue |= bool(model.q_head.weight.grad[1].any())
        optimizer.step()
        sign_sgd_(model.puzzle_emb, lr=1e-2, weight_decay=0.1)
        losses.append(float(loss.nll_B.mean()))
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=1.5) and losses[-1] < 0.5 * losses[0]
    assert trained_to_continue == arch.trains_continue
    moved = model.puzzle_emb.weights.any(dim=1).tolist()
    assert moved == [False, True, False, True]
