"""Answers a model generates for a split, scored by family at every depth. Knows no training and no command line."""

from functools import partial
from typing import Any

from tqdm import tqdm

from dataset.instruct import last_exchange
from dataset.text.loader import TextDataset
from evaluators.answers import score_answers
from generation.answers import Responder


def evaluate_generated(
    responder: Responder, split: TextDataset, *, rows: int, max_output_tokens: int, batch_size: int
) -> dict[str, Any]:
    """Answer the last turn of the first `rows` rows and score the answers against the references, by the rows' `task`.

    Returns `score_answers`' result at the responder's depth, and beside it `by_act_step` (accuracy of all at 1, 2, ... ACT steps;
    with a halting threshold one entry), `mean_act_steps` of a generated token, and `longer_than_context`: rows whose history
    leaves no room for an answer and that are not scored. Raises UsageError if no row is left.
    """
    exchanges = [last_exchange(split.conversation(i)) for i in range(rows)]
    fitting = [i for i, (history, _) in enumerate(exchanges) if responder.fits(history)]
    histories, references = [exchanges[i][0] for i in fitting], [exchanges[i][1] for i in fitting]
    families = [str(split.row(i).get("task", "no task")) for i in fitting]
    depths = range(1, responder.act_steps + 1) if responder.halt_threshold is None else [responder.act_steps]
    by_depth, steps = [], []
    for depth in depths:
        answers = responder.at_depth(depth).answers(
            histories,
            max_output_tokens=max_output_tokens,
            batch_size=batch_size,
            progress=partial(tqdm, desc=f"answers at {depth} ACT steps", unit="batch"),
        )
        by_depth.append(score_answers(families, references, [answer.text for answer in answers]))
        steps = [step for answer in answers for step in answer.act_steps]
    return {
        **by_depth[-1],
        "by_act_step": [scores["overall"]["accuracy"] for scores in by_depth],
        "mean_act_steps": sum(steps) / len(steps),
        "longer_than_context": rows - len(fitting),
    }
