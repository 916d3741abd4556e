"""Solves a person's own puzzles, checks answers by the rules, and prints them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from artifacts.puzzle_checkpoint import PuzzleCheckpoint
from config.errors import UsageError
from config.schema import PretrainPuzzleConfig
from dataset.puzzles.arc_grids import Grid, Pair, grid_hash, lay_out, parse_grid, parse_name
from dataset.puzzles.kinds import Arc, Kind, Tokens, kind_of, read_questions
from dataset.puzzles.loader import IGNORE_LABEL_ID, PuzzleBatch
from dataset.puzzles.storage import BLANK_IDENTIFIER_ID, read_identifiers, read_json
from evaluators.arc import ATTEMPTS, Votes
from evaluators.puzzles import PuzzleOutput, solve
from evaluators.search import Search
from models.act import RecursiveModel


def answer_file(
    path: Path,
    checkpoint: PuzzleCheckpoint,
    config: PretrainPuzzleConfig,
    search: Search,
    *,
    data_paths: Sequence[str],
    max_batches: int | None,
    show: bool,
) -> Iterator[str]:
    """The text to print for each puzzle of a file of the checkpoint's kind. Raises UsageError.

    data_paths: the model's training data, for the names of ARC's puzzles. show: each ACT step, too.
    """
    kind = kind_of(checkpoint.metadata)
    solver = Solver(checkpoint.model(config), kind, search, config.global_batch_size, max_batches)
    if isinstance(kind, Arc):
        checkpoint.check_identifiers(data_paths)
        return solver.solve_task(path, [read_identifiers(data_path) for data_path in data_paths], show)
    return solver.solve_file(path, show)


@dataclass(frozen=True)
class Solver:
    """A model that solves puzzles without labels, `rows_at_once` samples in a batch, in at most `max_batches`."""

    model: RecursiveModel
    kind: Kind
    search: Search
    rows_at_once: int
    max_batches: int | None = None

    def solve_file(self, path: Path, show: bool) -> Iterator[str]:
        """The text for each puzzle of a file. show: include each ACT step. Raises UsageError."""
        questions = read_questions(path, self.kind)
        number = 0
        for output in self._outputs(questions, np.full(len(questions), BLANK_IDENTIFIER_ID)):
            answers = output.tensors()["preds"].cpu().numpy()
            solved = self.kind.solves(output.inputs_BT.cpu().numpy(), answers)
            for index, (answer, is_right) in enumerate(zip(answers, solved.tolist(), strict=True)):
                number += 1
                told = [f"puzzle {number} of {len(questions)}"] if len(questions) > 1 else []
                told += [*_steps(self.kind, output, index)] if show else [self.kind.text(answer)]
                told.append(f"{_how_sure(output, index)}: {'right' if is_right else 'wrong'} by the rules of {self.kind.name}")
                yield "\n".join(told)

    def solve_task(self, path: Path, names: Sequence[Sequence[str]], show: bool) -> Iterator[str]:
        """The text for each test input of an ARC task (JSON), by votes over its augmented forms.

        names: names of the puzzle identifiers, for each data set. Raises UsageError.
        """
        tests = _read_tests(path)
        named = [(number, parse_name(name)) for of_path in names for number, name in enumerate(of_path)]
        forms = {number: form for number, form in named if form[0] == path.stem}
        if not forms:
            raise UsageError(
                f"{path}: the model knows no puzzle {path.stem!r}. It learns a task's demonstrations in training, as the task's "
                "own vector: build a data set that has it, and train its vector with load_checkpoint and freeze_weights=true"
            )
        codes = np.array([[form.form, *form.colours] for _, form in forms.values()], np.uint8)
        inputs, _ = lay_out([Pair(grid, grid) for grid in tests], codes, None)
        votes, shown = Votes(), 0
        for output in self._outputs(inputs.reshape(-1, inputs.shape[-1]), np.repeat(list(forms), len(tests))):
            # Of the first form only, which isn't augmented.
            for index in range(min(len(tests) - shown, len(output.row)) if show else 0):
                shown += 1
                yield "\n".join([f"test {shown} of {len(tests)}", *_steps(self.kind, output, index)])
            ballots = output.ballots() if self.search.choose == "votes" else output.tensors()
            of_rows = [forms[identifier] for identifier in ballots.pop("puzzle_identifiers").tolist()]
            votes.add_rows(of_rows, **{key: ballots[key] for key in ("inputs", "preds", "q_halt_logits")})
        for number, test in enumerate(tests, 1):
            question = path.stem, grid_hash(test)
            candidates = votes.counts.get(question, {})
            total = sum(count for count, _ in candidates.values())
            told = [f"test {number} of {len(tests)}; ARC has no rules to check an answer"]
            for attempt, key in enumerate(votes.ranked(question)[:ATTEMPTS], 1):
                count, probability = candidates[key]
                told.append(
                    f"attempt {attempt}: {count} of {total} votes, mean halting probability {probability / count:.3f}\n"
                    + Arc.grid_text(votes.grids[key])
                )
            yield "\n".join(told)

    def _outputs(self, inputs: Tokens, identifiers: Tokens) -> Iterator[PuzzleOutput]:
        """The model's outputs for rows of tokens [N, T] of puzzles with these identifiers [N]."""
        at_once = self.search.puzzles_at_once(self.rows_at_once)
        for start in itertools.islice(range(0, len(inputs), at_once), self.max_batches):
            rows = np.arange(start, min(start + at_once, len(inputs)))
            batch = PuzzleBatch(
                set_name="own",
                inputs=inputs[rows].astype(np.int32),
                labels=np.full((len(rows), inputs.shape[1]), IGNORE_LABEL_ID, np.int64),
                puzzle_identifiers=identifiers[rows].astype(np.int32),
                rows=rows,
            )
            yield solve(self.model, batch, self.search)[0]


def _read_tests(path: Path) -> list[Grid]:
    task = read_json(path)
    try:
        tests = [parse_grid(pair["input"]) for pair in task["test"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path}: expected an ARC task, {{"train": [...], "test": [{{"input": grid}}]}}: {error!r}') from None
    if not tests:
        raise UsageError(f"{path} has no test input")
    return tests


def _steps(kind: Kind, output: PuzzleOutput, index: int) -> Iterator[str]:
    """The question, and the answer after each ACT step of the row; skips unchanged grids."""
    sample = index, output.chosen_B[index]
    before = output.inputs_BT[index]
    yield kind.text(before.cpu().numpy())
    steps = zip(output.preds_BKST[sample], output.halt_logits_BKS[sample].sigmoid().tolist(), strict=True)
    for step, (tokens, probability) in enumerate(steps, 1):
        if step <= output.steps_BK[sample]:
            changed = int((tokens != before).sum())
            yield f"ACT step {step}: {changed} cells changed, halting probability {probability:.3f}"
            if changed:
                yield kind.text(tokens.cpu().numpy())
            before = tokens


def _how_sure(output: PuzzleOutput, index: int) -> str:
    """The chosen answer's halting probability and depth, and how many samples agree."""
    sample = index, output.chosen_B[index]
    answers_KT = output.preds_BKST[index, :, -1]
    probability = output.halt_logits_BKS[sample][-1].sigmoid().item()
    sure = f"halting probability {probability:.3f} after {output.steps_BK[sample]} ACT steps"
    if len(answers_KT) > 1:
        sure += f", the answer of {int((answers_KT == answers_KT[sample[1]]).all(dim=1).sum())} of {len(answers_KT)} samples"
    return sure
