"""Generates answers for a split, to score them by family at every depth or to write them."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from artifacts.files import whole_file
from config.errors import UsageError
from config.progress import progress_bar
from dataset.instruct import last_exchange
from dataset.text.conversation import Conversation
from dataset.text.loader import TextCorpus, TextDataset
from evaluators.answer_scores import is_exact, score_answers, score_by_hops
from generation.answers import Responder
from generation.batch import InputRow, answers_in_order, block_size, positions_needed
from models.distributed import ALONE, Ranks


def evaluate_generated(
    responder: Responder, split: TextCorpus | TextDataset, *, rows: Sequence[int], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Answer the last turn of the split's `rows` and score the answers, by the rows' `task`.

    `ranks` share the rows, and each gets the whole result. Raw text is left out. Returns the result
    of `score_answers` at the responder's depth, with `by_act_step` (overall accuracy at 1, 2, ...
    ACT steps; one entry with a halting threshold), `mean_act_steps` per generated token,
    `longer_than_context` (rows without room for an answer; they aren't scored), and `by_hops` for
    the bundled deep families: the result at each of these depths (`by_act_step`) and
    `mean_act_steps`. Raises UsageError if no row is left.
    """
    inputs, lengths, references, rows_asked = list[InputRow](), list[int](), list[str](), list[Mapping[str, Any]]()
    longer = 0
    for i, history, reference in _exchanges(split, rows):
        try:
            prompt = responder.prompt(history)
        except UsageError:
            longer += 1
        else:
            inputs.append(InputRow(history, sample=i, prompt=prompt))
            lengths.append(len(prompt.ids))
            references.append(reference)
            rows_asked.append(split.row(i))
    families = [str(row.get("task", "no task")) for row in rows_asked]
    hops = [row["hops"] if isinstance(row.get("hops"), int) else None for row in rows_asked]
    options = responder.options
    depths = range(1, options.act_steps + 1) if options.halt_threshold is None else [options.act_steps]
    by_depth, by_hops = [], []
    for depth in depths:
        at_depth = responder.at_depth(depth, options.halt_threshold)
        answered = list(_answered(at_depth, inputs, lengths, f"answers at {depth} ACT steps", ranks))
        texts = [record["answer"] for record in answered]
        act_steps = [record["act_steps"] for record in answered]
        by_depth.append(score_answers(families, references, texts))
        by_hops.append(score_by_hops(hops, families, references, texts))
    return {
        **by_depth[-1],
        "by_act_step": [scores["overall"]["accuracy"] for scores in by_depth],
        "mean_act_steps": _mean_act_steps(act_steps),
        "longer_than_context": longer,
        "by_hops": {
            str(number): {
                "by_act_step": [scores[number] for scores in by_hops],
                "mean_act_steps": _mean_act_steps([steps for steps, found in zip(act_steps, hops, strict=True) if found == number]),
            }
            for number in by_hops[-1]
        },
    }


def _mean_act_steps(act_steps: Sequence[Sequence[int]]) -> float:
    return sum(map(sum, act_steps)) / sum(map(len, act_steps))


def write_generated(
    responder: Responder, split: TextCorpus | TextDataset, path: Path, *, rows: Sequence[int], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Answer the last turn of the split's `rows`, in order, into JSON lines, over any file at `path`.

    `ranks` share the rows; the first writes, and each gets the whole result. Raw text is left out.
    Lines have the keys of `generation.batch.answers_in_order` and the row's `index`; `error`
    without room for an answer. Returns ratios of sums over the answers: `count`, `exact_accuracy`,
    `mean_act_steps` and `log_probability_per_token` (nats) of generated tokens, EOS included (None
    without an answer), and `longer_than_context`.
    """

    def inputs() -> Iterator[InputRow]:
        for i, history, reference in _exchanges(split, rows):
            yield InputRow(history, reference, sample=i, extra={"index": i})

    lengths = (responder.prompt_length(one.history) for one in inputs())
    longer = count = exact = tokens = steps = 0
    log_probability = 0.0
    with contextlib.ExitStack() as files:
        lines = None
        if ranks.is_first:
            lines = files.enter_context(files.enter_context(whole_file(path)).open("w", encoding="utf-8"))
        for record in _answered(responder, inputs(), lengths, "generated", ranks):
            if lines is not None:
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            if "error" in record:
                longer += 1
                continue
            count += 1
            exact += is_exact(record["reference"], record["answer"])
            tokens += record["answer_tokens"]
            steps += sum(record["act_steps"])
            log_probability += record["log_probability"]
    return {
        "count": count,
        "exact_accuracy": exact / count if count else None,
        "mean_act_steps": steps / tokens if count else None,
        "log_probability_per_token": log_probability / tokens if count else None,
        "longer_than_context": longer,
    }


def _answered(
    responder: Responder, inputs: Iterable[InputRow], lengths: Iterable[int], name: str, ranks: Ranks
) -> Iterator[dict[str, Any]]:
    """The records of `answers_in_order`, all of them on each rank. lengths: tokens of the prompts."""
    count, positions = positions_needed(responder, lengths)
    rows = min(responder.rows, max(1, count))
    block = block_size(count, rows)
    own = (one for number, one in enumerate(inputs) if number // block % ranks.size == ranks.rank)
    records = answers_in_order(responder, own, rows=rows, positions=positions, block=block)
    total = sum(min(block, count - begin) for begin in range(ranks.rank * block, count, ranks.size * block))
    shown = iter(progress_bar(records, shown=ranks.is_first, desc=name, unit="answer", total=total))
    for _ in range(0, count, block * ranks.size):
        for answered in ranks.gather(list(itertools.islice(shown, block))):
            yield from answered


def _exchanges(split: TextCorpus | TextDataset, rows: Sequence[int]) -> Iterator[tuple[int, Conversation, str]]:
    """Index, history and last answer of each of `rows` that has an answer."""
    for index in rows:
        exchange = last_exchange(split.conversation(index))
        if exchange is not None:
            yield index, *exchange
