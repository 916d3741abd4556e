"""Many prompts, answered in their order: a file of rows becomes a file of answers, and a kill in the middle costs neither.

Rows come and go in blocks, so memory doesn't grow with the file, and several processes can share it. Knows nothing of training,
flags or Hydra.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from config.errors import StoppedBySignal, UsageError
from dataset.text.conversation import Conversation, with_default_system
from dataset.text.forms import FLAGS, USUAL, FormOptions, parse_turns
from dataset.text.rows import BadRow, NothingToLearn, RowFile, open_row_file, parse_row, to_json
from generation.answers import Responder, Speaker
from generation.engine import Prompt, cache_bytes, rows_that_fit

# The keys of an answered row, which the row's own keys must not take the place of.
_RECORD_KEYS = frozenset(
    {
        "index", "prompt", "reference", "prompt_tokens", "answer", "finish", "log_probability", "mean_act_steps", "act_steps",
        "tokens", "answer_tokens", "error", "context",
    }
)  # fmt: skip
# What a request of a batch file holds besides the conversation: text that is no part of it.
_REQUEST_SETTINGS = (
    "stop", "user", "metadata", "response_format", "tool_choice", "service_tier", "reasoning_effort", "verbosity", "modalities",
)  # fmt: skip
# What a block has of the rows that form at the same time, and how many blocks a file of middling length has.
_FEWEST_ROUNDS, _MOST_ROUNDS, _BLOCKS = 2, 16, 8


@dataclass(frozen=True)
class InputRow:
    """A history to answer, and the answer it had in its row, if it had one. `sample` sets its draws apart from other rows'.

    extra: the other keys of the row, under names that an answer doesn't use. ignored_settings: settings of its own that the row
    asks for. error: why it can't be answered; its history is empty then. prompt: the history encoded, where that has been done.
    """

    history: Conversation
    reference: str | None = None
    sample: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    ignored_settings: tuple[str, ...] = ()
    error: str | None = None
    prompt: Prompt | None = None


def positions_needed(responder: Responder, lengths: Iterable[int]) -> tuple[int, int]:
    """How many prompts of these lengths there are, and the most positions that answering one takes (0: none fits the context)."""
    count, positions = 0, 0
    for length in lengths:
        count += 1
        if length <= responder.context:
            positions = max(positions, min(length + responder.options.max_output_tokens - 1, responder.context))
    return count, positions


def block_size(count: int, rows: int) -> int:
    """How many of `count` rows a block has, if `rows` are answered at a time.

    Longer blocks waste less at their ends, where the last answers form alone; shorter ones are shared more evenly, and a kill
    costs less.
    """
    return rows * min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, count // (_BLOCKS * rows)))


def answers_in_order(
    responder: Responder, inputs: Iterable[InputRow], *, rows: int, positions: int, block: int
) -> Iterator[dict[str, Any]]:
    """The answer to each, in the given order, as plain values for JSON. At most `rows` form at the same time.

    Every `block` of them begins when the one before has ended, so that its answers are the same bits whatever else is answered
    before or elsewhere: sums round differently beside other rows. `positions` as from `positions_needed`.

    Keys: those of `InputRow.extra`; prompt (messages), reference (if there is one), prompt_tokens; answer, finish, log_probability
    (nats), mean_act_steps, and with the EOS where there is one act_steps (of each token), tokens (the text that each made certain)
    and answer_tokens. For a history longer than the context: error and context instead of an answer; for what can't be answered:
    error alone. Raises UsageError if the keys and values of one row are over the budget.
    """
    speaker = Speaker(responder, rows=rows, positions=max(1, positions))
    coming = iter(inputs)
    while window := deque(_submitted(speaker, responder, one) for one in itertools.islice(coming, block)):
        in_work = {number: record for number, record in window if number is not None}
        while window:
            while window and window[0][0] not in in_work:
                yield window.popleft()[1]
            for piece in speaker.tick() if speaker.busy else ():
                in_work[piece.request].setdefault("tokens", []).append(piece.text)
                if (answer := piece.answer) is not None:
                    in_work.pop(piece.request).update(
                        answer=answer.text,
                        finish=answer.finish,
                        log_probability=answer.log_probability,
                        mean_act_steps=sum(answer.act_steps) / len(answer.act_steps),
                        act_steps=answer.act_steps,
                        answer_tokens=len(answer.act_steps),
                    )


def _submitted(speaker: Speaker, responder: Responder, one: InputRow) -> tuple[int | None, dict[str, Any]]:
    """The number of a request, and the record that its answer completes; None: the record is complete, with an error."""
    if one.error is not None:
        return None, {**one.extra, "error": one.error}
    record = {**one.extra, "prompt": [{"role": turn.role, "content": turn.text} for turn in one.history]}
    if one.reference is not None:
        record["reference"] = one.reference
    try:
        request = responder.request(one.prompt or one.history, responder.options, one.sample)
    except UsageError as error:
        length = responder.prompt_length(one.history)
        return None, {**record, "prompt_tokens": length, "error": str(error), "context": responder.context}
    record["prompt_tokens"] = len(request.prompt.ids)
    return speaker.submit(request, responder.options.stop), record


# Rows of a file.


def read_inputs(file: RowFile, system: str | None, forms: FormOptions = USUAL) -> Iterator[InputRow]:
    """What each row of a file asks, blank lines left out; `system` opens those that have no system turn.

    A row has one of the forms of training data, with or without its last answer, or is a request of an OpenAI batch file
    (`custom_id`, `body`). One that can't be read, or asks nothing, has an error with its place.
    """
    # What isn't trained on is asked all the same.
    forms = dataclasses.replace(forms, ignore=(*forms.ignore, *FLAGS))
    count = 0
    for number, data in file.rows():
        row: Mapping[str, Any] = {}
        try:
            if isinstance(data, BadRow):
                raise data
            plain = parse_row(to_json(data))
            row = data if isinstance(data, dict) else plain
            asked = _input_row(row, plain, system, forms)
        except NothingToLearn:  # a blank line
            continue
        except BadRow as error:
            asked = InputRow((), extra=_without_record_keys(row), error=f"{file.where(number)}: {error}")
        yield dataclasses.replace(asked, sample=count)
        count += 1


def _input_row(row: Mapping[str, Any], plain: Mapping[str, Any], system: str | None, forms: FormOptions) -> InputRow:
    """The history of a row, its last answer if it ends with one, and its other keys. Raises BadRow if nothing is asked.

    plain: the row as JSON has it.
    """
    body = plain.get("body")
    if isinstance(body, Mapping):
        parsed = parse_turns(body, dataclasses.replace(forms, ignore=(*forms.ignore, *_REQUEST_SETTINGS)))
        settings = {key: value for key, value in body.items() if key not in parsed.columns and value is not None}
        keys = {key: settings if key == "body" else value for key, value in row.items()}
    else:
        parsed, settings = parse_turns(plain, forms), {}
        keys = {key: value for key, value in row.items() if key not in parsed.columns}
    turns = list(parsed.turns)
    answer = turns.pop().text if turns and turns[-1].role == "assistant" else ""
    if not any(turn.role == "user" and turn.text.strip() for turn in turns):
        raise BadRow("nothing_asked", "expected a user turn with text to answer, found none")
    reference = answer if answer.strip() else None
    ignored_settings = tuple(key for key in settings if key != "model")
    return InputRow(
        with_default_system(turns, system), reference, extra=_without_record_keys(keys), ignored_settings=ignored_settings
    )


def _without_record_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """A row's own keys under names that an answer doesn't use: `answer` becomes `row.answer`."""
    free = {}
    for key, value in keys.items():
        name = key
        while name in _RECORD_KEYS or (name != key and name in keys):
            name = f"row.{name}"
        free[name] = value
    return free


# Files that survive a kill, and may be shared, without locks, which some file systems don't have. Every file appears whole, and
# whoever writes it writes the same. The record comes before the first block, the last block before the target, and the target
# before blocks are removed. So what happens later is looked for first: a missing block, then the target; a target, then its record.


@dataclass(frozen=True)
class Shard:
    """Which of `count` processes that share a file: number `index`, from 0."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard()


def answer_file(
    responder: Responder,
    source: Path,
    target: Path,
    *,
    forms: FormOptions = USUAL,
    shard: Shard = WHOLE,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Answer each row of `source` into a row of `target`, in its order.

    A row that can't be answered becomes a row with an error. Finished blocks of rows (`block_size`) are files in the folder
    `target`.partial; the same call goes on with the others. `target` appears whole or not at all. `target`.about.json says what the
    answers depend on, and stays: with the same model, input and settings there is nothing left to do, with others the call is
    refused, as it is if `target` has no such record.

    shard: take turns at the blocks with other processes that are given the same files and settings. The one that finishes last
    makes `target`, the same bytes as a single process. What all have in common is told by the first, which shows its progress.

    `tell` gets lines on size and progress, and on rows that can't be answered or not as they ask. Raises UsageError for a file of
    which no row can be answered.
    """
    folder = _folder(target)
    if (target.exists() or any(folder.glob("*.jsonl"))) and not _record(target).exists():
        found = target if target.exists() else folder
        raise UsageError(f"{found} exists already and is not overwritten: name another output file, or delete it")
    if not source.is_file():
        raise UsageError(f"no input file at {source}: expected rows as .jsonl, .json, .csv, .tsv, .parquet or .arrow")
    file = open_row_file(source)
    overview = _scan(responder, read_inputs(file, responder.system, forms))
    count, positions = overview.asking + overview.bad, overview.positions
    if not count:
        raise UsageError(f"{source} has no rows: there is nothing to answer")
    if not overview.asking:
        raise UsageError(f"none of the {count} rows of {source} can be answered; the first: {overview.first_error}")
    is_first = shard.index == 0
    if overview.bad and is_first:
        tell(
            f"{overview.bad} of {count} rows can't be answered: they become lines with an error; the first: {overview.first_error}"
        )
    if overview.ignored_settings and is_first:
        names = ", ".join(overview.ignored_settings)
        tell(f"rows ask for settings of their own ({names}): this command's settings are used instead")
    model, options = responder.model, responder.options
    rows = rows_that_fit(model, options.act_steps, max(1, positions), responder.kv_budget_gb, min(responder.rows, overview.asking))
    size = cache_bytes(model, options.act_steps, rows, positions) / 1e9
    block = _begin(target, _identity(responder, source, forms), block_size(count, rows))
    own = range(shard.index * block, count, shard.count * block)
    missing = deque(begin for begin in own if not _block_file(target, begin).exists())
    if target.exists():  # those that are missing have become part of it
        missing.clear()
    total, left = (sum(min(block, count - begin) for begin in begins) for begins in (own, missing))
    if is_first:
        begun = f", going on after {total - left} finished rows" if left < total else ""
        tell(f"{rows} answers at a time, {positions} positions each: {size:.3f} GB of keys and values{begun}")
    numbered = enumerate(read_inputs(file, responder.system, forms))
    begins = set(missing)
    inputs = (one for number, one in numbered if number - number % block in begins)
    records = answers_in_order(responder, inputs, rows=rows, positions=positions, block=block)
    lines: list[str] = []
    try:
        for answered in tqdm(records, desc="answers", unit="row", initial=total - left, total=total, disable=not is_first):
            index = missing[0] + len(lines)
            # A row's own values may be of any type.
            lines.append(json.dumps({"index": index, **answered}, ensure_ascii=False, default=str) + "\n")
            if len(lines) == block or index + 1 == count:
                # It may hold half a surrogate pair, which is then written as JSON's escape.
                content = "".join(lines).encode(errors="backslashreplace")
                _write_new(_block_file(target, missing.popleft()), target, [content])
                left -= len(lines)
                lines.clear()
    except (KeyboardInterrupt, StoppedBySignal):
        of_shard = "" if shard == WHOLE else f" of shard {shard}"
        tell(f"stopped after {total - left} of {total} rows{of_shard}: the same command goes on from there")
        raise
    blocks = [_block_file(target, begin) for begin in range(0, count, block)]
    if not target.exists() and all(path.exists() for path in blocks):
        _write_new(target, target, (path.read_bytes() for path in blocks))
    if target.exists():
        # Where another process has one of them open, a network mount may keep it until that ends.
        shutil.rmtree(folder, ignore_errors=True)
        tell(f"{count} rows: {target}")
    else:
        tell(f"shard {shard} is finished; the last one to finish makes {target}")


@dataclass(frozen=True)
class _Overview:
    """What a file asks: rows that can be answered, and the most positions that one of them takes; rows that can't, and why the
    first one can't; settings that rows ask for and that aren't followed."""

    asking: int
    positions: int
    bad: int
    first_error: str
    ignored_settings: list[str]


def _scan(responder: Responder, rows: Iterable[InputRow]) -> _Overview:
    bad, first_error = 0, ""
    ignored_settings: set[str] = set()

    def lengths() -> Iterator[int]:
        nonlocal bad, first_error
        for asked in rows:
            ignored_settings.update(asked.ignored_settings)
            if asked.error is None:
                yield responder.prompt_length(asked.history)
            else:
                bad, first_error = bad + 1, first_error or asked.error

    asking, positions = positions_needed(responder, lengths())
    return _Overview(asking, positions, bad, first_error, sorted(ignored_settings))


def _identity(responder: Responder, source: Path, forms: FormOptions) -> dict[str, Any]:
    """All that answers depend on, as plain values: input, weights, tokenizer and settings."""
    weights = hashlib.sha256()
    for name, tensor in sorted(responder.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    with source.open("rb") as handle:
        content = hashlib.file_digest(handle, "sha256").hexdigest()
    identity = {
        "input": content,
        "weights": weights.hexdigest(),
        "tokenizer": responder.tokenizer.sha256,
        "template": responder.template.to_dict(),
        "system": responder.system,
        "forms": forms.to_dict(),
        "context": responder.context,
        # It matters to a threshold alone.
        "halt_calibration": None if responder.options.halt_threshold is None else responder.model.halt_calibration.tolist(),
        **dataclasses.asdict(responder.options),
        **{f"arch.{key}": value for key, value in responder.model.config.model_dump().items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _folder(target: Path) -> Path:
    """Where finished blocks are kept."""
    return target.with_name(f"{target.name}.partial")


def _record(target: Path) -> Path:
    """The file that says what the answers depend on."""
    return target.with_name(f"{target.name}.about.json")


def _block_file(target: Path, begin: int) -> Path:
    # So many digits that names are in the order of the rows: `cat` joins them.
    return _folder(target) / f"{begin:012}.jsonl"


def _begin(target: Path, identity: dict[str, Any], block: int) -> int:
    """Record what work depends on that begins; of work that has begun, check that it is the same. Returns the size of its blocks.

    That one is kept: rows at a time and their budget may change.
    """
    record = _record(target)
    if not record.exists():
        _write_new(record, target, [json.dumps({"block": block, **identity}, indent=2).encode()])
    try:
        begun_with = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        begun_with = {}
    block = begun_with.pop("block", block)
    changed = sorted(key for key in identity.keys() | begun_with.keys() if identity.get(key) != begun_with.get(key))
    if changed:
        told = ", ".join(f"{key} {_short(begun_with.get(key))} then, {_short(identity.get(key))} now" for key in changed[:3])
        raise UsageError(
            f"{target} was begun with something else ({told}): go on with what it was begun with, name another output file, or "
            f"delete {target.name}, {record.name} and {_folder(target).name}, as far as they are there, to begin anew"
        )
    return block


def _write_new(path: Path, target: Path, parts: Iterable[bytes]) -> None:
    """Write a file that appears whole at the end, unless one is there by then.

    Raises UsageError for a full disk or a folder that is read-only, unless `target` is there and nothing is left to do.
    """
    unfinished = _folder(target) / f"{path.name}.{uuid.uuid4().hex}"
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            _publish(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        if not target.exists():
            raise UsageError(
                f"{target} can't be written ({error.strerror}): mend that and give the same command again, which goes on after the "
                f"rows that are finished, or name another output file"
            ) from error


def _publish(unfinished: Path, path: Path) -> None:
    """Give a file the name `path`, unless there is one of that name."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            unfinished.rename(path)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
