"""Batch inference: answers a file of rows, in order. A run that was killed resumes after its
finished rows.

Rows are processed in blocks, so memory doesn't grow with the file, and several processes can share
it. Knows nothing of training, flags or Hydra.
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from artifacts.files import whole_file
from config.errors import StoppedBySignal, UsageError
from config.progress import progress_bar
from dataset.text.conversation import Conversation, with_default_system
from dataset.text.forms import DEFAULT_OPTIONS, FLAGS, FormOptions, parse_turns
from dataset.text.rows import BadRow, NothingToLearn, RowFile, open_row_file, parse_row, to_json
from generation.answers import Responder, Speaker
from generation.engine import Prompt, cache_bytes, rows_that_fit

# The keys of an answered row; the row's own keys must not replace them.
_RECORD_KEYS = frozenset(
    {
        "index", "prompt", "reference", "prompt_tokens", "answer", "finish", "log_probability", "mean_act_steps", "act_steps",
        "tokens", "answer_tokens", "error", "context",
    }
)  # fmt: skip
# Keys of a request in an OpenAI batch file that aren't part of the conversation.
_REQUEST_SETTINGS = (
    "stop", "user", "metadata", "response_format", "tool_choice", "service_tier", "reasoning_effort", "verbosity", "modalities",
)  # fmt: skip
# A block has at most this many times the rows that run at the same time; a file of medium length
# has this many blocks.
_FEWEST_ROUNDS, _MOST_ROUNDS, _BLOCKS = 2, 16, 8


@dataclass(frozen=True)
class InputRow:
    """A history to answer, and its row's reference answer, if any. `sample` separates its draws
    from those of other rows.

    extra: the row's other keys, renamed if an answer has the same key. ignored_settings: generation
    settings in the row, which aren't used. error: why the row can't be answered; its history is
    then empty. prompt: the encoded history, if it has been encoded already.
    """

    history: Conversation
    reference: str | None = None
    sample: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    ignored_settings: tuple[str, ...] = ()
    error: str | None = None
    prompt: Prompt | None = None


def positions_needed(responder: Responder, lengths: Iterable[int]) -> tuple[int, int]:
    """The number of prompts, of `lengths` tokens, and the most positions that answering one of them
    takes (0: none fits the context).
    """
    count, positions = 0, 0
    for length in lengths:
        count += 1
        if length <= responder.context:
            positions = max(positions, min(length + responder.options.max_output_tokens - 1, responder.context))
    return count, positions


def block_size(count: int, rows: int) -> int:
    """Rows per block, for `count` rows of which `rows` run at a time.

    At the end of a block its last answers run alone, so longer blocks waste less. Shorter ones are
    shared more evenly, and a kill loses less.
    """
    return rows * min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, count // (_BLOCKS * rows)))


def answers_in_order(
    responder: Responder, inputs: Iterable[InputRow], *, rows: int, positions: int, block: int
) -> Iterator[dict[str, Any]]:
    """The answer to each, in the given order, as values for JSON. At most `rows` run at the same
    time.

    A `block` begins only after the one before has ended. So its answers are the same bits whatever
    other blocks a process answers: rounding depends on the other rows of a batch. `positions` as
    from `positions_needed`.

    Keys: those of `InputRow.extra`; prompt (messages), reference (if any), prompt_tokens; answer,
    finish, log_probability (nats), mean_act_steps; and, including EOS, act_steps (of each token),
    tokens (the text that each made final) and answer_tokens. A history longer than the context has
    error and context in place of an answer; a row that can't be answered has only error. Raises
    UsageError if the KV cache of one row exceeds the budget.
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
    """A request's number, and the record to complete with its answer. None: the record is complete,
    with an error.
    """
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


def read_inputs(file: RowFile, system: str | None, forms: FormOptions = DEFAULT_OPTIONS) -> Iterator[InputRow]:
    """The prompts of a file's rows, without blank lines. system: text of the system turn for rows
    without one.

    A row has one of the forms of training data, with or without the last answer, or is a request of
    an OpenAI batch file (`custom_id`, `body`). A row that can't be read, or has no question, has an
    error with its place.
    """
    # Rows that training leaves out are answered too.
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
    """The history of a row, its last answer if it ends with one, and its other keys. Raises BadRow
    if it has no question.

    plain: the row as JSON values.
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
    """Rename a row's keys that an answer uses: `answer` becomes `row.answer`."""
    free = {}
    for key, value in keys.items():
        name = key
        while name in _RECORD_KEYS or (name != key and name in keys):
            name = f"row.{name}"
        free[name] = value
    return free


# Resumable files of answers, written by one process or several.

# There are no locks, which some file systems lack. Every file appears whole, and whoever writes it
# writes the same bytes. The record is written before the first block, the last block before the
# target, and the target before blocks are removed. So checks go the other way round: first whether
# a block is missing, then whether the target exists; first the target, then its record.


@dataclass(frozen=True)
class Shard:
    """Process number `index`, from 0, of `count` processes that share a file."""

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
    forms: FormOptions = DEFAULT_OPTIONS,
    shard: Shard = WHOLE,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Answer each row of `source` in a row of `target`, in the same order.

    A row that can't be answered becomes a row with an error. Finished blocks of rows (`block_size`)
    are files in the folder `target`.partial. The same call resumes with the other blocks. `target`
    is written atomically. `target`.about.json, which stays, has everything that the answers depend
    on: with the same model, input and settings nothing is left to do; a call with others is
    refused, and so is one where `target` has no such record.

    shard: take turns at the blocks with other processes that have the same files and settings. The
    last to finish writes `target`, the same bytes as a single process would. The first reports what
    all share, and its progress.

    `tell` gets lines on size and progress, on rows that can't be answered, and on settings in rows
    that are ignored. Raises UsageError if no row of the file can be answered.
    """
    folder = _folder(target)
    if (target.exists() or any(folder.glob("*.jsonl"))) and not _record(target).exists():
        found = target if target.exists() else folder
        raise UsageError(f"{found} exists already and is not overwritten: name another output file, or delete it")
    if not source.is_file():
        raise UsageError(f"no input file at {source}: expected rows as .jsonl, .json, .csv, .tsv, .parquet or .arrow")
    file = open_row_file(source)
    asking, positions, bad, first_error, ignored = _scan(responder, read_inputs(file, responder.system, forms))
    count = asking + bad
    if not count:
        raise UsageError(f"{source} has no rows: there is nothing to answer")
    if not asking:
        raise UsageError(f"none of the {count} rows of {source} can be answered; the first: {first_error}")
    is_first = shard.index == 0
    if bad and is_first:
        tell(f"{bad} of {count} rows can't be answered: they become lines with an error; the first: {first_error}")
    if ignored and is_first:
        names = ", ".join(sorted(ignored))
        tell(f"rows have settings of their own ({names}): ignored, this command's settings are used")
    model, options = responder.model, responder.options
    rows = rows_that_fit(model, options.act_steps, positions, responder.kv_budget_gb, min(responder.rows, asking))
    size = cache_bytes(model, options.act_steps, rows, positions) / 1e9
    block = _begin(target, _identity(responder, source, forms), block_size(count, rows))
    own = range(shard.index * block, count, shard.count * block)
    missing = deque(begin for begin in own if not _block_file(target, begin).exists())
    if target.exists():  # it has the blocks that are missing
        missing.clear()
    total, left = (sum(min(block, count - begin) for begin in begins) for begins in (own, missing))
    if is_first:
        begun = f", resuming after {total - left} finished rows" if left < total else ""
        tell(f"{rows} answers at a time, {positions} positions each: a KV cache of {size:.3f} GB{begun}")
    numbered = enumerate(read_inputs(file, responder.system, forms))
    begins = set(missing)
    inputs = (one for number, one in numbered if number - number % block in begins)
    records = answers_in_order(responder, inputs, rows=rows, positions=positions, block=block)
    lines: list[str] = []
    try:
        bar = progress_bar(records, shown=is_first, desc="answers", unit="row", initial=total - left, total=total)
        for record in bar:
            index = missing[0] + len(lines)
            # The row's own values may have any type.
            lines.append(json.dumps({"index": index, **record}, ensure_ascii=False, default=str) + "\n")
            if len(lines) == block or index + 1 == count:
                # A lone surrogate in the row's own values is written as a JSON escape.
                content = "".join(lines).encode(errors="backslashreplace")
                _write_new(_block_file(target, missing.popleft()), target, [content])
                left -= len(lines)
                lines.clear()
    except (KeyboardInterrupt, StoppedBySignal):
        of_shard = "" if shard == WHOLE else f" of shard {shard}"
        tell(f"stopped after {total - left} of {total} rows{of_shard}: the same command resumes from there")
        raise
    blocks = [_block_file(target, begin) for begin in range(0, count, block)]
    if not target.exists() and all(path.exists() for path in blocks):
        _write_new(target, target, (path.read_bytes() for path in blocks))
    if target.exists():
        # A network mount may keep a file that another process has open.
        shutil.rmtree(folder, ignore_errors=True)
        tell(f"{count} rows: {target}")
    else:
        tell(f"shard {shard} is finished; the last one to finish makes {target}")


def _scan(responder: Responder, rows: Iterable[InputRow]) -> tuple[int, int, int, str, set[str]]:
    """The number of rows that can be answered, and the most positions that one takes; the number of
    the others, and the first error; settings in rows that are ignored.
    """
    asking = positions = bad = 0
    first_error = ""
    ignored: set[str] = set()
    for asked in rows:
        ignored.update(asked.ignored_settings)
        try:
            if asked.error is not None:
                raise UsageError(asked.error)
            _, own = positions_needed(responder, [len(responder.prompt(asked.history).ids)])
            asking, positions = asking + 1, max(positions, own)
        except UsageError as error:
            bad, first_error = bad + 1, first_error or str(error)
    return asking, positions, bad, first_error, ignored


def _identity(responder: Responder, source: Path, forms: FormOptions) -> dict[str, Any]:
    """Everything that answers depend on, as JSON: input, weights, tokenizer and settings."""
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
        "forms": dataclasses.asdict(forms),
        "context": responder.context,
        # It matters only with a threshold.
        "halt_calibration": None if responder.options.halt_threshold is None else responder.model.halt_calibration.tolist(),
        **dataclasses.asdict(responder.options),
        **{f"arch.{key}": value for key, value in responder.model.config.model_dump().items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.about.json")


def _block_file(target: Path, begin: int) -> Path:
    # Enough digits for names to sort in the order of the rows: `cat` joins them.
    return _folder(target) / f"{begin:012}.jsonl"


def _begin(target: Path, identity: dict[str, Any], block: int) -> int:
    """Record `identity` and `block` unless `target` has a record. Returns the recorded block size: a
    resumed call keeps it, though rows at a time and the budget may change.

    Raises UsageError if another identity is recorded.
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
            f"{target} was begun with other settings or files ({told}): use the old ones, name another output file, or delete "
            f"{target.name}, {record.name} and {_folder(target).name} (those that exist) to start over"
        )
    return block


def _write_new(path: Path, target: Path, parts: Iterable[bytes]) -> None:
    """Write `path` atomically, unless it exists by then.

    Raises UsageError if it can't be written, unless `target` exists: then nothing is left to do.
    """
    remedy = "fix that and run the same command again, which resumes after the finished rows, or name another output file"
    try:
        with whole_file(path, remedy, keep_existing=True) as partial:
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.writelines(parts)
    except UsageError:
        if not target.exists():
            raise


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
