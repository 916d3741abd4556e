"""Recursion against plain Transformers on deep families, many small networks at once on one GPU.

    python -m dataset.build_sample_dataset --families deep_arithmetic deep_boolean \\
        --train-size 400000 --test-per-family 3000
    python -m benchmarks.deep_families --steps 10400 --grow deep_boolean --output checkpoints/deep

Every network learns one family, from random weights, in the same number of optimizer steps. Those
of one seed and family see the same rows in the same order, unless the family grows (`--grow`): then
a network's next number of hops joins when its own answers are right. An optimizer step is a CUDA
graph, and the networks' graphs run concurrently: at this size, kernel launches of the real trainer
(training/loop.py) leave a GPU idle most of the time. Network, loss and update rule are the same. On
a CPU the steps run in turn, without graphs. Each network writes a checkpoint for
inference_instruct.py, scripts/calibrate_halting.py and benchmarks/depth.py. A table shows the exact
answers by hops.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from artifacts.checkpoint import Snapshot, TrainerState, save_checkpoint
from artifacts.outputs import output_folder, write_json
from config.compose import compose_config
from config.errors import UsageError, one_clear_message
from config.schema import PretrainInstructConfig
from dataset.deep_tasks import DEEP_FAMILIES, MOST_HOPS
from dataset.text.conversation import Encoded, Template, Turn, encode_conversation
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path
from models.act import RecursiveModel
from models.device import pick_device, resolve_arch, set_matmul_precision
from models.layers import Block, row_attention
from models.losses import token_loss
from training.optimizer import muon_matrices

SPLITS = ("train", "test", "test_deeper")
# Two blocks of width 128 in every recursive network, so 0.33 M parameters.
COMMON = (
    *("arch=looped", "arch.hidden_size=128", "arch.num_heads=4", "arch.expansion=2", "arch.attention=prefix"),
    *("arch.tie_embeddings=true", "optimizer=muon", "lr=1.2e-3", "lr_min_ratio=0.02", "lr_warmup_steps=200"),
)
ARMS = {
    "looped": (),
    "plain_2": ("arch.halt_max_steps=1",),
    # The same FLOPs as the ACT steps of the recursive network: two blocks for each.
    "plain_deep": ("arch.halt_max_steps=1", "arch.L_layers={blocks}"),
    "plain_deep_pre": ("arch.halt_max_steps=1", "arch.L_layers={blocks}", "arch.norm=pre"),
}
# The learning rate stays at its peak for this fraction of the steps, then decays by a cosine.
_CONSTANT = 0.7
# With --grow: add the next number of hops once this fraction with the current one is right.
_GROW_AT = 0.9
# Steps between updates of the schedule, which wait for the device.
_STEPS_AT_ONCE = 50


def _encode(lines: Sequence[str], tokenizer: Path) -> list[tuple[list[int], Encoded]]:
    rows = [json.loads(line) for line in lines]
    conversations = [
        [Turn("user" if turn["from"] == "human" else "assistant", turn["value"]) for turn in row["conversations"]] for row in rows
    ]
    hops = [row["hops"] if isinstance(row["hops"], list) else [row["hops"]] for row in rows]
    opened = Tokenizer(tokenizer)
    return [(asked, encode_conversation(turns, opened, Template())) for asked, turns in zip(hops, conversations, strict=True)]


@dataclass(frozen=True)
class Bins:
    """Rows of one family, packed in R bins of T tokens, with at most S supervised tokens and Q
    questions each.

    hops_RQ is 0 where there is no question. question_RS: the question of the bin that a supervised
    token answers; Q: none.
    """

    ids_RT: Tensor
    segments_RT: Tensor
    documents_RT: Tensor
    positions_RT: Tensor
    place_RS: Tensor
    labels_RS: Tensor
    question_RS: Tensor
    hops_RQ: Tensor

    def __len__(self) -> int:
        return len(self.ids_RT)

    def __getitem__(self, index_B: Tensor) -> "Bins":
        return Bins(*(value[index_B].long() for value in vars(self).values()))


def fill_bins(rows: Sequence[tuple[Sequence[int], Encoded]], width: int, device: torch.device) -> Bins:
    """Pack `rows` (hops of each question, ids) into bins. Rows of one question share bins with
    others of the same hops.

    width: the most tokens of a row, T.
    """
    bins: list[list[tuple[Sequence[int], Encoded]]] = []
    for hops, encoded in sorted(rows, key=lambda row: row[0][0] if len(row[0]) == 1 else 0):
        last = bins[-1] if bins else []
        taken = sum(len(other.ids) - 1 for _, other in last)
        if not last or taken + len(encoded.ids) - 1 > width or (last[0][0] != hops and 1 in map(len, (last[0][0], hops))):
            bins.append([])
        bins[-1].append((hops, encoded))
    supervised = max(sum(int(encoded.supervised[1:].sum()) for _, encoded in rows) for rows in bins)
    questions = max(sum(len(hops) for hops, _ in rows) for rows in bins)
    shapes = dict.fromkeys(("ids", "segments", "documents", "positions"), width)
    shapes |= {"place": supervised, "labels": supervised, "question": supervised, "hops": questions}
    arrays = {name: np.zeros((len(bins), size), np.int32) for name, size in shapes.items()}
    arrays["question"] += questions
    for r, in_bin in enumerate(bins):
        begin = tokens = asked = 0
        for number, (hops, encoded) in enumerate(in_bin, 1):
            end = begin + len(encoded.ids) - 1
            arrays["ids"][r, begin:end] = encoded.ids[:-1]
            arrays["segments"][r, begin:end] = encoded.segment[:-1]
            arrays["documents"][r, begin:end] = number
            arrays["positions"][r, begin:end] = np.arange(end - begin)
            places = np.flatnonzero(encoded.supervised[1:])
            chosen = slice(tokens, tokens + len(places))
            arrays["place"][r, chosen], arrays["labels"][r, chosen] = begin + places, encoded.ids[places + 1]
            # A gap between supervised positions begins the next answer.
            arrays["question"][r, chosen] = asked + np.cumsum(np.diff(places, prepend=places[0]) > 1)
            arrays["hops"][r, asked : asked + len(hops)] = hops
            begin, tokens, asked = end, chosen.stop, asked + len(hops)
    return Bins(*(torch.from_numpy(array).to(device) for array in arrays.values()))


class Update:
    """training.optimizer.ModelOptimizer's update with state on the device, for a CUDA graph."""

    def __init__(self, config: PretrainInstructConfig, model: RecursiveModel) -> None:
        self._config = config
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for p in muon_matrices(config, model):
            by_shape.setdefault(tuple(p.shape), []).append(p)
        self._muon = list(by_shape.values())
        owned = {id(p) for group in self._muon for p in group}
        self._rest: list[Tensor] = [p for p in model.parameters() if id(p) not in owned]
        self._momentum = [torch.zeros_like(torch.stack(group)) for group in self._muon]
        self._m, self._v = ([torch.zeros_like(p) for p in self._rest] for _ in range(2))
        self._steps = torch.zeros((), device=model.device)
        self.lr_factor = torch.zeros((), device=model.device)

    def forget(self) -> None:
        """Reset the state."""
        for tensor in (self._steps, *self._momentum, *self._m, *self._v):
            tensor.zero_()

    @torch.no_grad()
    def __call__(self) -> None:
        """Update every parameter, at `lr_factor` of the peak learning rates."""
        config = self._config
        self._steps += 1
        lr, beta1, beta2 = config.lr * self.lr_factor, config.beta1, config.beta2
        grads = [p.grad for p in self._rest if p.grad is not None]
        torch._foreach_mul_(self._rest, 1 - lr * config.weight_decay)
        torch._foreach_lerp_(self._m, grads, 1 - beta1)
        torch._foreach_mul_(self._v, beta2)
        torch._foreach_addcmul_(self._v, grads, grads, 1 - beta2)
        scale = lr / (1 - beta1**self._steps)
        for p, m, v in zip(self._rest, self._m, self._v, strict=True):
            p.sub_(scale * torch.atan2(m, (v / (1 - beta2**self._steps)).sqrt()))
        lr = config.muon_lr * self.lr_factor
        for group, momentum in zip(self._muon, self._momentum, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            momentum.lerp_(gradient, 0.05)
            rows, columns = gradient.shape[1:]
            directions = orthogonal(gradient.lerp(momentum, 0.95)) * math.sqrt(max(1, rows / columns))
            for matrix, direction in zip(group, directions, strict=True):
                matrix.mul_(1 - lr * config.weight_decay).sub_(lr * direction)


def orthogonal(matrices: Tensor) -> Tensor:
    """Approximately the nearest orthogonal matrices of `matrices` [M, A, B]: five Newton-Schulz
    steps in bfloat16, as in Muon.
    """
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


class Network:
    """One arm and seed, trained on one family."""

    def __init__(self, config: PretrainInstructConfig, vocabulary: int, family: str, train: Bins, grows: bool) -> None:
        self.config, self.family, self._train = config, family, train
        device = train.ids_RT.device
        self.model = RecursiveModel(config.arch, vocabulary, seed=config.seed).to(device)
        self._rotary = self.model.rotary(torch.arange(train.ids_RT.shape[1]))
        self.update = Update(config, self.model)
        hops = train.hops_RQ.cpu().numpy()
        self._fewest_hops_R = np.where(hops > 0, hops, MOST_HOPS + 1).min(1)
        self._pass, self._order = 0, torch.empty(0, dtype=torch.long, device=device)
        self._index_B = torch.arange(config.global_batch_size, device=device) % len(train)
        self.hops = 1 if grows else MOST_HOPS
        self._hops = torch.tensor(self.hops, device=device)
        self.answered = self._no_answers()
        self.steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream()
            for module in self.model.modules():
                if isinstance(module, Block):
                    # All blocks of all networks share compiled code: weights are its inputs.
                    module.compile(dynamic=False)

    def _no_answers(self) -> Tensor:
        """[hops, ACT step, (right, all)]"""
        return torch.zeros(MOST_HOPS + 1, self.config.arch.halt_max_steps, 2, device=self.model.device)

    def capture(self) -> None:
        """Record an optimizer step, on CUDA. torch needs three steps before it, which change
        nothing with `lr_factor` 0.
        """
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                self._work()
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._work()
        self.update.forget()
        self.answered.zero_()

    def loss(self, bins: Bins, answered: Tensor) -> Tensor:
        """The mean loss over ACT steps and supervised tokens of admitted hops; counts answers."""
        model, steps = self.model, self.config.arch.halt_max_steps
        attend = row_attention("prefix", bins.segments_RT, bins.ids_RT.shape[1], bins.documents_RT)
        rotary = None if self._rotary is None else self._rotary.at(bins.positions_RT)
        places = bins.place_RS.unsqueeze(-1).expand(-1, -1, self.config.arch.hidden_size)
        outputs = model.act_steps(model.embed(bins.ids_RT), rotary, attend, steps)
        output_ND = torch.stack([output.gather(1, places) for output in outputs]).flatten(0, 2)
        hops_RQ1 = torch.nn.functional.pad(bins.hops_RQ, (0, 1))
        hops_RS = hops_RQ1.gather(1, bins.question_RS)
        weights_RS = ((hops_RS > 0) & (hops_RS <= self._hops)).float()
        weights_RS = weights_RS / weights_RS.sum().clamp(min=1) / steps
        loss = token_loss(
            output_ND, model.lm_head.weight, model.halt_logits(output_ND.detach())[:, 0], bins.labels_RS.flatten().repeat(steps),
            weights_RS.flatten().repeat(steps), self.config.arch.loss,
        )  # fmt: skip
        with torch.no_grad():
            is_wrong = (loss.argmax_N.view(steps, *bins.labels_RS.shape) != bins.labels_RS).float()
            wrong = hops_RQ1.float().mul(0).expand(steps, -1, -1).scatter_add(2, bins.question_RS.expand(steps, -1, -1), is_wrong)
            counted = torch.stack(((wrong == 0).float(), torch.ones_like(wrong)), -1)
            answered.index_add_(0, hops_RQ1.flatten(), counted.permute(1, 2, 0, 3).flatten(0, 1))
        return loss.total

    def _work(self) -> None:
        for p in self.model.parameters():
            p.grad = None
        self.loss(self._train[self._index_B], self.answered).backward()
        self.update()

    def step(self) -> None:
        """Run an optimizer step on the next bins. On CUDA the host doesn't wait for it."""
        batch = len(self._index_B)
        if len(self._order) < batch:
            admitted = np.flatnonzero(self._fewest_hops_R <= self.hops)
            if self._stream is not None:
                self._stream.synchronize()  # wait for steps that read the old order, whose memory is freed
            drawn = np.random.Generator(np.random.Philox(key=self.config.seed, counter=[0, 0, self._pass, 0]))
            self._pass += 1
            order = np.concatenate([drawn.permutation(admitted) for _ in range(-(-batch // len(admitted)))])
            self._order = torch.from_numpy(order).to(self._order.device)
        with torch.cuda.stream(self._stream):
            self._index_B.copy_(self._order[:batch])
            if self._graph is None:
                self._work()
            else:
                self._graph.replay()
        self._order = self._order[batch:]
        self.steps += 1

    def look(self, spent: float) -> None:
        """Between steps, after waiting for the device: set the learning rate at this fraction of
        the run, and maybe add hops.
        """
        falling = max(0.0, spent - _CONSTANT) / (1 - _CONSTANT)
        floor = self.config.lr_min_ratio
        warm = min(1.0, (self.steps + 1) / self.config.lr_warmup_steps)
        self.update.lr_factor.fill_(warm * (floor + (1 - floor) / 2 * (1 + math.cos(math.pi * falling))))
        right, count = self.answered[self.hops, -1].tolist() if self.hops < MOST_HOPS else (0, 1)
        if count and right / count >= _GROW_AT:
            self.hops += 1
            self._hops.fill_(self.hops)
            self._order = self._order[:0]
        self.answered.zero_()

    def measure(self, bins: Bins) -> list[list[float | None]]:
        """Fraction of exact answers, teacher-forced, by hops (from 1) and ACT step; or None."""
        answered = self._no_answers()
        batch = len(self._index_B)
        self._hops.fill_(MOST_HOPS)
        for begin in range(0, len(bins), batch):
            index_B = torch.arange(begin, begin + batch, device=self.model.device)
            # As it was compiled: with gradients, and a full batch. Padding at the end has no questions.
            chosen = bins[index_B.clamp(max=len(bins) - 1)]
            chosen.hops_RQ.masked_fill_((index_B >= len(bins)).unsqueeze(1), 0)
            self.loss(chosen, answered)
        return [[right / count if count else None for right, count in steps] for steps in answered[1:].tolist()]


def read_family(data: Path, family: str, split: str) -> list[str]:
    """The lines of this family in a split."""
    path = data / f"{split}.jsonl"
    if not path.is_file():
        raise UsageError(f"expected {path}, found none: build it by python -m dataset.build_sample_dataset --families {family} ...")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if f'"task": "{family}"' in line]
    if not lines:
        raise UsageError(f"{path} has no row of {family}: build it with --families {family}")
    return lines


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table per family: exact answers at the first and last ACT step, in %, by hops."""
    lines = []
    for family in dict.fromkeys(result["family"] for result in results.values()):
        lines += [f"\n{family}\n", "| network | ACT step | " + " | ".join(f"k = {hops}" for hops in range(1, MOST_HOPS + 1)) + " |"]
        lines.append("|---" * (MOST_HOPS + 2) + "|")
        for name, result in results.items():
            if result["family"] != family:
                continue
            depth = len(result["exact"][0])
            for step in sorted({0, depth - 1}):
                cells = [f"{100 * steps[step]:.1f}" if steps[step] is not None else "" for steps in result["exact"]]
                lines.append(f"| {name} | {step + 1} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, write."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", type=Path, default=Path("data/deep"), help="folder of dataset.build_sample_dataset")
    flags.add_argument("--families", nargs="+", choices=list(DEEP_FAMILIES), default=["deep_arithmetic", "deep_boolean"])
    flags.add_argument("--grow", nargs="*", choices=list(DEEP_FAMILIES), default=[], help="families that begin with one hop")
    flags.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="networks")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--act-steps", type=int, default=6, help="of the recursive networks")
    flags.add_argument("--batch", type=int, default=64, help="bins an optimizer step")
    flags.add_argument("--steps", type=int, required=True, help="optimizer steps of every network")
    flags.add_argument("--processes", type=int, default=multiprocessing.cpu_count(), help="that read rows")
    flags.add_argument("--output", type=Path, required=True, help="folder of checkpoints, deep_families.json and .md")
    flags.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every network")
    options = flags.parse_args(arguments)
    with one_clear_message():
        folder = output_folder(options.output)
        results = run(options, folder)
        write_json(folder / "deep_families.json", results)
        table = markdown(results)
        (folder / "deep_families.md").write_text(table + "\n", encoding="utf-8")
        print(table)
        print(json.dumps(results))


def run(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Train every network and write its checkpoint; returns metrics by name."""

    def config_of(arm: str, seed: int, family: str) -> PretrainInstructConfig:
        settings = (
            f"seed={seed}", f"arch.halt_max_steps={options.act_steps}", f"global_batch_size={options.batch}", "dataset=sample",
            f"dataset.data_dir={options.data}", f"run_name={family}_{arm}_{seed}",
        )  # fmt: skip
        of_arm = [setting.format(blocks=2 * options.act_steps) for setting in ARMS[arm]]
        config = compose_config("cfg_pretrain_instruct", [*COMMON, *settings, *of_arm, *options.overrides])
        return config.model_copy(update={"arch": resolve_arch(config.arch, pick_device(config.device))})

    config = config_of(options.arms[0], 0, "any")
    device = pick_device(config.device)
    set_matmul_precision(config.tf32, device)
    torch._dynamo.config.recompile_limit = 64
    path = resolve_tokenizer_path(config.dataset.tokenizer_path)
    tokenizer = Tokenizer(path)
    rows: dict[tuple[str, str], list[tuple[list[int], Encoded]]] = {}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for family in options.families:
            for split in SPLITS:
                lines = read_family(options.data, family, split)
                parts = [lines[begin : begin + 2000] for begin in range(0, len(lines), 2000)]
                rows[family, split] = [row for part in pool.map(partial(_encode, tokenizer=path), parts) for row in part]
    # One width for all, so that blocks are compiled once. Two short rows fit in it.
    longest = max(len(encoded.ids) - 1 for of_split in rows.values() for _, encoded in of_split)
    width = -(-longest * (1 if longest > 96 else 2) // 8) * 8
    bins = {key: fill_bins(of_split, width, device) for key, of_split in rows.items()}
    networks: dict[str, Network] = {}
    began = time.perf_counter()
    for family in options.families:
        for arm in options.arms:
            for seed in options.seeds:
                config = config_of(arm, seed, family)
                network = Network(config, tokenizer.vocab_size, family, bins[family, "train"], family in options.grow)
                network.capture()
                networks[config.run_name or ""] = network
    print(f"{len(networks)} networks ready after {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    for step in range(0, options.steps, _STEPS_AT_ONCE):
        if step % max(_STEPS_AT_ONCE, options.steps // 10 // _STEPS_AT_ONCE * _STEPS_AT_ONCE) == 0:
            for name, network in networks.items():
                right = " ".join(f"{100 * r / max(1, n):.0f}" for r, n in network.answered[1:, -1].tolist())
                print(f"{time.perf_counter() - began:.0f} s, step {step}, {name}: hops {network.hops}, right {right} %", flush=True)
        for network in networks.values():
            network.look(step / options.steps)
        for _ in range(min(_STEPS_AT_ONCE, options.steps - step)):
            for network in networks.values():
                network.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    results: dict[str, dict[str, Any]] = {}
    for name, network in networks.items():
        shares = [network.measure(bins[network.family, split]) for split in SPLITS[1:]]
        exact = [few if few[0] is not None else deep for few, deep in zip(*shares, strict=True)]
        parameters = sum(p.numel() for p in network.model.get_submodule("L_level").parameters())
        results[name] = {
            "family": network.family, "steps": network.steps, "bins": network.steps * options.batch, "hops": network.hops,
            "core_parameters": parameters, "exact": exact,
        }  # fmt: skip
        save_checkpoint(
            folder / name / f"step_{network.steps}",
            Snapshot(network.steps, network.model.state_dict(), None, {"test": results[name]}, TrainerState({}, {})),
            config=network.config,
            tokenizer=tokenizer,
            template=Template(),
            data_hash="",
        )
    return results


if __name__ == "__main__":
    main()
