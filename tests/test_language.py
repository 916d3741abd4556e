"""Language metrics against a hand computation, and causality with per-token halting (contracts 2 and 3)."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import evaluators.language
from dataset.text.loader import Example, TextCorpus, TextDataset
from dataset.text.tokenizer import Tokenizer
from evaluators.language import DepthOutput, LanguageResult, LanguageSums, evaluate_language, evaluate_sources
from models.act import RecursiveModel
from models.distributed import Ranks
from models.losses import log_probs

ModelFactory = Callable[..., RecursiveModel]
ExampleFactory = Callable[..., list[Example]]
EOS = 2


@torch.no_grad()
def by_hand(model: RecursiveModel, example: Example, act_steps: int) -> list[list[tuple[int, float, bool]]]:
    """For each depth: (label, nats, right) of every supervised token of one row on its own."""
    inputs, segments = torch.from_numpy(example.ids[:-1]).long()[None], torch.from_numpy(example.segment[:-1]).long()[None]
    states, depths = model.initial_states(1, inputs.shape[1]), []
    for _ in range(act_steps):
        states, output = model.act_step(
            states, model.embed(inputs), model.rotary(torch.arange(inputs.shape[1])), model.row_attention(segments)
        )
        logp = log_probs(model.logits(output[0]), model.config.loss)
        tokens = []
        for t in range(len(example.ids) - 1):
            if example.supervised[t + 1]:
                label = int(example.ids[t + 1])
                tokens.append((label, -float(logp[t, label]), int(logp[t].argmax()) == label))
        depths.append(tokens)
    return depths


@pytest.fixture
def examples(random_examples: ExampleFactory, tiny_model: ModelFactory) -> list[Example]:
    """Uneven rows; the first one is made of what the model says itself at its last depth, so it is exactly right."""
    rows = random_examples(9, seed=3)
    for row in rows[::3]:
        row.ids[-1] = EOS
    first = rows[0]
    for t in np.flatnonzero(first.supervised):
        cut = Example(first.ids[: t + 1], first.supervised[: t + 1], first.segment[: t + 1], 0)
        inputs = torch.from_numpy(cut.ids[:-1]).long()[None]
        model = tiny_model()
        states = model.initial_states(1, inputs.shape[1])
        for _ in range(3):
            states, output = model.act_step(
                states,
                model.embed(inputs),
                model.rotary(torch.arange(inputs.shape[1])),
                model.row_attention(torch.zeros_like(inputs)),
            )
        first.ids[t] = int(model.logits(output[0, -1]).argmax())
    return rows


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_metrics_are_sums_over_the_corpus_at_every_depth(
    tiny_model: ModelFactory, examples: list[Example], batch_size: int
) -> None:
    model = tiny_model()
    result = evaluate_language(model, examples, eos_id=EOS, batch_size=batch_size, act_steps=3)
    report: Any = result.report()
    rows = [by_hand(model, example, 3) for example in examples]
    text_bytes = sum(example.turn_bytes for example in examples)
    assert len(report["by_act_step"]) == 3
    for depth, metrics in enumerate(report["by_act_step"]):
        tokens = [token for row in rows for token in row[depth]]
        nats = sum(nll for _, nll, _ in tokens)
        text_bits = sum(nll for label, nll, _ in tokens if label != EOS) / math.log(2)
        assert text_bits < nats / math.log(2), "an EOS must be among the labels for this test to mean anything"
        assert metrics["loss_per_token"] == pytest.approx(nats / len(tokens), rel=1e-9)
        assert metrics["bits_per_byte"] == pytest.approx(text_bits / text_bytes, rel=1e-9)
        assert metrics["token_accuracy"] == pytest.approx(sum(right for *_, right in tokens) / len(tokens))
        assert metrics["exact_accuracy"] == pytest.approx(sum(all(r for *_, r in row[depth]) for row in rows) / len(rows))
    final = report["by_act_step"][-1]
    assert {key: report[key] for key in final} == final and 0 < final["exact_accuracy"] < 1
    assert report["mean_act_steps"] == 3.0
    assert report["counts"] == {
        "conversations": 9,
        "supervised_tokens": sum(int(example.supervised[1:].sum()) for example in examples),
        "text_bytes": text_bytes,
    }


def test_bytes_of_text_are_those_of_the_answers(
    tiny_tokenizer: Tokenizer, tiny_model: ModelFactory, text_dataset: Callable[..., TextDataset]
) -> None:
    answers = ["blue 1 plus 2", "é\n\n日本", "Red"]
    dataset = text_dataset([{"prompt": "What is", "answer": answer} for answer in answers])
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    result = evaluate_language(model, dataset, eos_id=tiny_tokenizer.eos_id, batch_size=2, act_steps=1)
    expected = sum(len(answer.encode()) for answer in answers)
    assert result.by_depth[0].text_bytes == expected
    eos_nats = sum(nll for i in range(3) for label, nll, _ in by_hand(model, dataset[i], 1)[0] if label == tiny_tokenizer.eos_id)
    sums = result.by_depth[0]
    assert sums.nll - sums.text_nll == pytest.approx(eos_nats, rel=1e-9) and eos_nats > 0
    assert sums.metrics()["bits_per_byte"] == pytest.approx(sums.text_nll / math.log(2) / expected)


def test_sources_are_measured_together_and_each_by_itself(
    tiny_tokenizer: Tokenizer, tiny_model: ModelFactory, text_dataset: Callable[..., TextDataset]
) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    parts = {
        name: text_dataset([{"prompt": f"{name} {i}", "answer": "blue " * (i + 1)} for i in range(rows)])
        for name, rows in (("Red", 5), ("What", 3))
    }
    options: dict[str, Any] = {"eos_id": tiny_tokenizer.eos_id, "batch_size": 2, "act_steps": 2}
    seen: list[int] = []
    report: Any = evaluate_sources(model, TextCorpus(parts), on_output=lambda o: seen.extend(o.rows.tolist()), **options).report()
    assert sorted(seen) == list(range(8)), "rows have their numbers in the whole corpus"
    alone: Any = {name: evaluate_language(model, part, **options).report() for name, part in parts.items()}
    assert report["by_source"] == alone
    tokens = {name: part["counts"]["supervised_tokens"] for name, part in alone.items()}
    assert report["loss_per_token"] == pytest.approx(
        sum(alone[name]["loss_per_token"] * tokens[name] for name in parts) / sum(tokens.values()), rel=1e-12
    )
    assert len(report["by_act_step"]) == 2 and report["mean_act_steps"] == 2.0
    assert {name: report["counts"][name] for name in ("conversations", "supervised_tokens")} == {
        "conversations": 8,
        "supervised_tokens": sum(tokens.values()),
    }
    limited: Any = evaluate_sources(model, TextCorpus(parts), limit=2, **options).report()
    assert limited["counts"]["conversations"] == 4
    single: Any = evaluate_sources(model, TextCorpus({"Red": parts["Red"]}), **options).report()
    assert single == alone["Red"]


def test_limit_takes_the_first_rows_and_max_batches_the_first_batches(tiny_model: ModelFactory, examples: list[Example]) -> None:
    model = tiny_model()

    def measure(rows: list[Example], **options: Any) -> Any:
        seen: list[int] = []
        result = evaluate_language(
            model, rows, eos_id=EOS, batch_size=2, act_steps=1, on_output=lambda o: seen.extend(o.rows.tolist()), **options
        )
        return result.report(), seen

    limited, seen = measure(examples, limit=5)
    assert sorted(seen) == [0, 1, 2, 3, 4] and limited == measure(examples[:5])[0]
    assert measure(examples, limit=100)[0] == measure(examples)[0]
    few, seen = measure(examples, max_batches=2)
    assert few["counts"]["conversations"] == len(set(seen)) == 4


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_measure_the_bits_of_one_process(tiny_model: ModelFactory, examples: list[Example], size: int) -> None:
    """Five batches of at most two: shared evenly by no number of ranks, and two ranks of seven have none."""
    model, meeting, lists = tiny_model(), threading.Barrier(size), [[]] * size

    class Together(Ranks):
        def gather(self, value: Any) -> list[Any]:
            lists[self.rank] = value
            meeting.wait()
            return lists

    def measure(rank: int, size: int) -> tuple[LanguageResult, list[int]]:
        ranks, seen = Together(rank, size) if size > 1 else Ranks(), []
        options = {"eos_id": EOS, "batch_size": 2, "act_steps": 3, "ranks": ranks}
        return evaluate_language(model, examples, on_output=lambda output: seen.extend(output.rows.tolist()), **options), seen

    whole, rows = measure(0, 1)
    with ThreadPoolExecutor(size) as threads:
        parts = list(threads.map(measure, range(size), [size] * size))
    assert all(result == whole for result, _ in parts)
    assert sorted(row for _, seen in parts for row in seen) == sorted(rows) == list(range(len(examples)))


def test_outputs_name_what_was_read_where(tiny_model: ModelFactory, examples: list[Example]) -> None:
    model, outputs = tiny_model(), []
    result = evaluate_language(model, examples, eos_id=EOS, batch_size=4, act_steps=2, on_output=outputs.append)
    assert sorted(np.concatenate([o.rows for o in outputs]).tolist()) == list(range(9))
    for output in outputs:
        tensors = output.tensors()
        for place, row in enumerate(output.rows.tolist()):
            example, length = examples[row], len(examples[row].ids) - 1
            assert tensors["inputs"][place, :length].tolist() == example.ids[:-1].tolist()
            mask = torch.from_numpy(example.supervised[1:])
            hand = by_hand(model, example, 2)[-1]
            assert tensors["labels"][place, :length][mask].tolist() == [label for label, *_ in hand]
            assert ((tensors["preds"][place, :length] == tensors["labels"][place, :length])[mask]).tolist() == [r for *_, r in hand]
            assert tensors["nll"][place, :length][mask].tolist() == pytest.approx([nll for _, nll, _ in hand], rel=1e-9)
            assert (tensors["nll"][place, :length][~mask] == 0).all() and (tensors["preds"][place, length:] == -100).all()
            assert (tensors["act_steps"][place] == 2).all()
    total = sum(float(o.nll_BT.sum()) for o in outputs)
    assert total == pytest.approx(result.by_depth[-1].nll, rel=1e-9)


def test_nothing_counted_is_nan_and_not_a_perfect_score() -> None:
    assert all(math.isnan(value) for value in LanguageSums().metrics().values())


def watched_evaluation(
    monkeypatch: pytest.MonkeyPatch, model: RecursiveModel, example: Example, threshold: float, act_steps: int
) -> tuple[torch.Tensor, DepthOutput]:
    """Logits [T, V] that each position's answer is taken from (every position must be supervised), and the outputs."""
    read: list[torch.Tensor] = []
    real = evaluators.language.linear_cross_entropy

    def spy(output_ND: torch.Tensor, *arguments: Any) -> Any:
        read.append(model.logits(output_ND))
        return real(output_ND, *arguments)

    outputs: list[DepthOutput] = []
    with monkeypatch.context() as patched:
        patched.setattr(evaluators.language, "linear_cross_entropy", spy)
        evaluate_language(
            model,
            [example],
            eos_id=EOS,
            batch_size=1,
            act_steps=act_steps,
            halt_threshold=threshold,
            pad_multiple=1,
            on_output=outputs.append,
        )
    return read[-1], outputs[0]


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_with_per_token_halting_a_changed_token_changes_nothing_before_it(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    model = tiny_model(f"arch.attention={attention}", halt_scale=3.0)
    segment = np.array([1, 1, 1, 0, 0, 0, 2, 2, 0, 0, 0, 0], np.int32)
    ids = np.random.default_rng(1).integers(0, 13, len(segment)).astype(np.int32)
    everywhere = np.ones(len(ids), bool)
    halted_at = set()

    def evaluate(row: np.ndarray) -> tuple[torch.Tensor, DepthOutput]:
        return watched_evaluation(monkeypatch, model, Example(row, everywhere, segment, 1), 0.5, 6)

    logits, before = evaluate(ids)
    for t in range(len(ids) - 1):
        changed = ids.copy()
        changed[t] = (changed[t] + 1) % 13
        new_logits, after = evaluate(changed)
        same_prompt = (segment[:-1] == segment[t]) & (segment[t] != 0) & (attention == "prefix")
        earlier = torch.from_numpy(~same_prompt & (np.arange(len(ids) - 1) < t))
        torch.testing.assert_close(new_logits[earlier], logits[earlier], rtol=0, atol=1e-12)
        torch.testing.assert_close(after.halt_logits_BT[0, earlier], before.halt_logits_BT[0, earlier], rtol=0, atol=1e-12)
        assert torch.equal(after.act_steps_BT[0, earlier], before.act_steps_BT[0, earlier])
        assert (new_logits[t:] - logits[t:]).abs().amax(-1).min() > 1e-9, "what follows must feel it"
        halted_at |= set(after.act_steps_BT[0, torch.from_numpy(segment[:-1] == 0)].tolist())
    assert len(halted_at) >= 3, "tokens must halt at different steps for this test to mean anything"
    assert (before.act_steps_BT[0, torch.from_numpy(segment[:-1] != 0)] == 6).all(), "prompts take all steps"


def test_thresholds_at_the_ends_are_fixed_depths(tiny_model: ModelFactory, examples: list[Example]) -> None:
    model = tiny_model()

    def measure(**options: Any) -> Any:
        return evaluate_language(model, examples, eos_id=EOS, batch_size=3, **options).report()

    never = measure(act_steps=3, halt_threshold=1 - 1e-12)
    deep: Any = measure(act_steps=3)
    assert never["by_act_step"] == [] and never["mean_act_steps"] == 3.0
    for name in ("loss_per_token", "bits_per_byte", "token_accuracy", "exact_accuracy"):
        assert never[name] == pytest.approx(deep[name], rel=1e-9)
    single = Example(np.array([5, 7, 1, EOS], np.int32), np.array([0, 1, 1, 1], bool), np.array([0, 0, 0, 0], np.int32), 3)
    at_once = evaluate_language(model, [single], eos_id=EOS, batch_size=1, act_steps=3, halt_threshold=1e-12).report()
    shallow = evaluate_language(model, [single], eos_id=EOS, batch_size=1, act_steps=1).report()
    assert at_once["mean_act_steps"] == 1.0 and at_once["loss_per_token"] == pytest.approx(shallow["loss_per_token"], rel=1e-9)


def test_mean_act_steps_counts_supervised_tokens_where_they_halted(tiny_model: ModelFactory, examples: list[Example]) -> None:
    outputs: list[DepthOutput] = []
    result = evaluate_language(
        tiny_model(halt_scale=3.0),
        examples,
        eos_id=EOS,
        batch_size=4,
        act_steps=5,
        halt_threshold=0.5,
        on_output=outputs.append,
    )
    steps = np.concatenate([o.act_steps_BT[torch.from_numpy(o.labels_BT) != -100].numpy() for o in outputs])
    assert result.report()["mean_act_steps"] == pytest.approx(steps.mean()) and 1 < steps.mean() < 5


def test_evaluation_asks_for_no_gradient_of_trainable_weights(tiny_model: ModelFactory, examples: list[Example]) -> None:
    model = tiny_model()
    assert all(p.requires_grad for p in model.parameters())
    evaluate_language(model, examples, eos_id=EOS, batch_size=4, act_steps=2)
    assert all(p.grad is None for p in model.parameters())


def test_a_step_whose_loss_rises_beyond_the_gate_is_named() -> None:
    losses = (1.0, 0.9, 0.909, 0.95, 0.951)
    result = LanguageResult([LanguageSums(nll=10 * loss, tokens=10) for loss in losses])
    assert result.worse_steps() == [4]
    assert result.report()["worse_act_steps"] == [4]
