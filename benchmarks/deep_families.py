"""Recursion against plain Transformers on deep families, many small networks at once on one GPU.

    python -m dataset.build_sample_dataset --families deep_arithmetic deep_boolean \\
        --train-size 400000 --test-per-family 3000
    python -m benchmarks.deep_families --steps 10400 --grow deep_boolean --output checkpoints/deep

Every network learns one family, from random weights, in the same number of optimizer steps. Those
of one seed and family see the same rows in the same order, unless the family grows (`--grow`): then
a network's next number of hops joins when its own answers are right. An optimizer step is a CUDA
graph, and the networks' graphs run concurrently: at this size, kernel launches of the real trainer
(training/loop.py) leave a GPU idle most of the time. Network, loss and optimizer are the same. On
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from artifacts.checkpoint import Snapshot, TrainerState, save_checkpoint
from artifacts.outputs import output_folder, write_json
from benchmarks.common import benchmark_config, markdown_table, parser
from config.errors import UsageError, one_clear_message
from config.schema import DatasetConfig, PretrainInstructConfig
from dataset.deep_tasks import DEEP_FAMILIES, MOST_HOPS
from dataset.instruct import MeasuredSplit, Source
from dataset.text.conversation import Template
from dataset.text.loader import Example
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path
from models.act import RecursiveModel
from models.device import pick_device, set_matmul_precision
from models.layers import Block, row_attention
from models.losses import token_loss
from training.optimizer import ModelOptimizer

# A conversation, and the hops of each of its questions.
Row = tuple[list[int], Example]
SPLITS: tuple[MeasuredSplit, ...] = ("train", "test", "test_deeper")
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
# More tokens than any row of these families has.
_LONGEST = 4096
# Steps before one is recorded as a graph, which repeats numbers of the host: by then AdamATan2's corrections
# of its averages for the number of steps are 1.
_STEPS_BEFORE_GRAPH = 200
# Steps between updates of the schedule, which wait for the device.
_STEPS_AT_ONCE = 50


def read_rows(config: DatasetConfig, split: MeasuredSplit, tokenizer: Tokenizer, families: Sequence[str]) -> dict[str, list[Row]]:
    """The whole rows of each of `families` in a split. Raises UsageError if one has none."""
    whole = config.model_copy(update={"seq_len": _LONGEST})
    data = Source(whole).open_split(split, tokenizer, Template())
    found: dict[str, list[Row]] = {family: [] for family in families}
    for index in range(len(data)):
        row = data.row(index)
        if row.get("task") in found:
            hops = row["hops"]
            found[row["task"]].append((hops if isinstance(hops, list) else [hops], data[index]))
    for family, rows in found.items():
        if not rows:
            raise UsageError(f"{config.data_dir}/{split}.jsonl has no row of {family}: build it with --families {family}")
    return found


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


def fill_bins(rows: Sequence[Row], width: int, device: torch.device) -> Bins:
    """Pack `rows` into bins, in order of their hops. Rows of one question share bins with others of
    the same hops.

    width: the most tokens of a row, T.
    """
    bins: list[list[Row]] = []
    for hops, example in sorted(rows, key=lambda row: row[0][0] if len(row[0]) == 1 else 0):
        last = bins[-1] if bins else []
        taken = sum(len(other.ids) - 1 for _, other in last)
        if not last or taken + len(example.ids) - 1 > width or (last[0][0] != hops and 1 in map(len, (last[0][0], hops))):
            bins.append([])
        bins[-1].append((hops, example))
    columns = []
    for in_bin in bins:
        examples, lengths = [example for _, example in in_bin], [len(example.ids) - 1 for _, example in in_bin]
        place = np.flatnonzero(np.concatenate([example.supervised[1:] for example in examples]))
        columns.append(
            (
                np.concatenate([example.ids[:-1] for example in examples]),
                np.concatenate([example.segment[:-1] for example in examples]),
                np.repeat(np.arange(1, len(examples) + 1), lengths),
                np.concatenate(list(map(np.arange, lengths))),
                place,
                np.concatenate([example.ids[1:] for example in examples])[place],
                # A gap between supervised positions begins the next answer.
                np.cumsum(np.diff(place, prepend=-2) > 1) - 1,
                np.concatenate([hops for hops, _ in in_bin]),
            )
        )
    questions = max(len(column[-1]) for column in columns)
    padding = (0, 0, 0, 0, 0, 0, questions, 0)
    filled = [
        pad_sequence([torch.from_numpy(values).int() for values in column], batch_first=True, padding_value=value).to(device)
        for column, value in zip(zip(*columns, strict=True), padding, strict=True)
    ]
    return Bins(*(F.pad(values, (0, width - values.shape[1])) for values in filled[:4]), *filled[4:])


class Network:
    """One arm and seed, trained on one family."""

    def __init__(self, config: PretrainInstructConfig, vocabulary: int, family: str, train: Bins, grows: bool) -> None:
        self.config, self.family, self._train = config, family, train
        device = train.ids_RT.device
        self.model = RecursiveModel(config.arch, vocabulary, seed=config.seed).to(device)
        self._rotary = self.model.rotary(torch.arange(train.ids_RT.shape[1]))
        self._optimizer = ModelOptimizer(config, self.model)
        self.lr_factor = torch.zeros((), device=device)
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

    def loss(self, bins: Bins, answered: Tensor) -> Tensor:
        """The mean loss over ACT steps and supervised tokens of admitted hops; counts answers."""
        model, steps = self.model, self.config.arch.halt_max_steps
        attend = row_attention("prefix", bins.segments_RT, bins.ids_RT.shape[1], bins.documents_RT)
        rotary = None if self._rotary is None else self._rotary.at(bins.positions_RT)
        places = bins.place_RS.unsqueeze(-1).expand(-1, -1, self.config.arch.hidden_size)
        outputs = model.act_steps(model.embed(bins.ids_RT), rotary, attend, steps)
        output_ND = torch.stack([output.gather(1, places) for output in outputs]).flatten(0, 2)
        hops_RQ1 = F.pad(bins.hops_RQ, (0, 1))
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
        self._optimizer.zero_grad()
        self.loss(self._train[self._index_B], self.answered).backward()
        # An update is proportional to the learning rate: take all of it at the peak, and go the part
        # of the way that a number on the device says, which a graph reads each time.
        before = [p.detach().clone() for p in self.model.parameters()]
        self._optimizer.step(1.0)
        with torch.no_grad():
            for p, was in zip(self.model.parameters(), before, strict=True):
                p.copy_(was.lerp(p, self.lr_factor.to(p.dtype)))

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
        if self._stream is not None and self.steps == _STEPS_BEFORE_GRAPH:
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._work()
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
        self.lr_factor.fill_(warm * (floor + (1 - floor) / 2 * (1 + math.cos(math.pi * falling))))
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


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table per family: exact answers at the first and last ACT step, in %, by hops."""
    lines = []
    for family in dict.fromkeys(result["family"] for result in results.values()):
        rows = []
        for name, result in results.items():
            if result["family"] == family:
                for step in sorted({0, len(result["exact"][0]) - 1}):
                    exact = {f"k = {hops}": steps[step] for hops, steps in enumerate(result["exact"], 1)}
                    cells = {title: "" if share is None else f"{100 * share:.1f}" for title, share in exact.items()}
                    rows.append({"network": name, "ACT step": str(step + 1), **cells})
        lines += [f"\n{family}\n", *markdown_table(rows)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, write."""
    flags = parser(__doc__, "overrides")
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
    options = flags.parse_args(arguments)
    with one_clear_message():
        folder = output_folder(options.output)
        results = run(options, folder)
        write_json(folder / "deep_families.json", results)
        table = markdown(results)
        (folder / "deep_families.md").write_text(table + "\n", encoding="utf-8")
        print(table)
        print(json.dumps(results))


def config_of(options: argparse.Namespace, arm: str, seed: int, family: str) -> PretrainInstructConfig:
    """The settings of one network."""
    settings = [f"seed={seed}", f"arch.halt_max_steps={options.act_steps}", f"global_batch_size={options.batch}"]
    settings += ["dataset=sample", f"dataset.data_dir={options.data}", f"run_name={family}_{arm}_{seed}"]
    settings += [setting.format(blocks=2 * options.act_steps) for setting in ARMS[arm]]
    return benchmark_config([*settings, *options.overrides], "auto", COMMON)


def run(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Train every network and write its checkpoint; returns metrics by name."""
    config = config_of(options, options.arms[0], 0, "any")
    device = pick_device(config.device)
    set_matmul_precision(config.tf32, device)
    torch._dynamo.config.recompile_limit = 64
    tokenizer = Tokenizer(resolve_tokenizer_path(config.dataset.tokenizer_path))
    data = config.dataset.model_copy(update={"processes": options.processes})
    of_splits = {split: read_rows(data, split, tokenizer, options.families) for split in SPLITS}
    rows = {(family, split): of_splits[split][family] for family in options.families for split in SPLITS}
    # One width for all, so that blocks are compiled once. Two short rows fit in it.
    longest = max(len(example.ids) - 1 for of_split in rows.values() for _, example in of_split)
    width = -(-longest * (1 if longest > 96 else 2) // 8) * 8
    bins = {key: fill_bins(of_split, width, device) for key, of_split in rows.items()}
    networks: dict[str, Network] = {}
    began = time.perf_counter()
    for family in options.families:
        for arm in options.arms:
            for seed in options.seeds:
                config = config_of(options, arm, seed, family)
                network = Network(config, tokenizer.vocab_size, family, bins[family, "train"], family in options.grow)
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
