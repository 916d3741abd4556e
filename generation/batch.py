"""Many prompts, answered in their order: a file of rows becomes a file of answers, and a kill in the middle costs neither.

Rows come and go through a window, so memory doesn't grow with the file. Knows nothing of training, flags or Hydra.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from config.errors import UsageError
from dataset.text.conversation import Conversation, with_default_system
from dataset.text.files import BadRow, DataFile, open_data_file
from dataset.text.sources import NothingToLearn, parse_row, to_turns
from generation.answers import Responder, Speaker
from generation.engine import cache_bytes, rows_that_fit

# Rows in the window for each that can be in work: one long answer holds back that many short ones before work stalls.
_WINDOW = 8


@dataclass(frozen=True)
class Asked:
    """A history to answer, and the answer it had in its row, if it had one. `sample` sets its draws apart from other rows'."""

    history: Conversation
    reference: str | None = None
    sample: int = 0


def positions_needed(responder: Responder, histories: Iterable[Conversation]) -> tuple[int, int]:
    """How many histories there are, and the most positions that answering one of them takes (0: none fits the context)."""
    count, positions = 0, 0
    for history in histories:
        count += 1
        length = responder.prompt_length(history)
        if length <= responder.context:
            positions = max(positions, min(length + responder.options.max_output_tokens - 1, responder.context))
    return count, positions


def answers_in_order(responder: Responder, asked: Iterable[Asked], *, rows: int, positions: int) -> Iterator[dict[str, Any]]:
    """The answer to each, in the given order, as plain values for JSON. At most `rows` form at the same time.

    `positions` as from `positions_needed`. Keys: prompt (messages), reference (if there is one), prompt_tokens; answer, finish,
    log_probability (nats), mean_act_steps, act_steps (of each token), answer_tokens, the last three with the EOS where there is
    one. For a history longer than the context: error and context instead of an answer. Raises UsageError if the keys and values
    of one row are over the budget.
    """
    speaker = Speaker(responder, rows=rows, positions=max(1, positions))
    coming = iter(asked)
    window: deque[tuple[int | None, dict[str, Any]]] = deque()
    in_work: dict[int | None, dict[str, Any]] = {}
    while True:
        for one in itertools.islice(coming, _WINDOW * rows - len(window)):
            record: dict[str, Any] = {"prompt": [{"role": turn.role, "content": turn.text} for turn in one.history]}
            if one.reference is not None:
                record["reference"] = one.reference
            number = None
            try:
                request = responder.request(one.history, responder.options, one.sample)
            except UsageError as error:
                record |= {"prompt_tokens": responder.prompt_length(one.history), "error": str(error), "context": responder.context}
            else:
                record["prompt_tokens"] = len(request.prompt.ids)
                number = speaker.submit(request, responder.options.stop)
                in_work[number] = record
            window.append((number, record))
        if not window:
            return
        while window and window[0][0] not in in_work:
            yield window.popleft()[1]
        for piece in speaker.tick() if speaker.busy else ():
            if (answer := piece.answer) is not None:
                in_work.pop(piece.request).update(
                    answer=answer.text,
                    finish=answer.finish,
                    log_probability=answer.log_probability,
                    mean_act_steps=sum(answer.act_steps) / len(answer.act_steps),
                    act_steps=answer.act_steps,
                    answer_tokens=len(answer.act_steps),
                )


# Rows of a file.


def read_asked(file: DataFile, system: str | None) -> Iterator[Asked]:
    """What each row of a file asks, blank lines left out; `system` opens those that have no system turn.

    A row has one of the forms of training data, with or without its last answer, or {"messages": [{"role", "content"}]}.
    Raises UsageError, with the line, for one that has none of them or asks nothing.
    """
    count = 0
    for raw, _ in file.rows():
        try:
            if isinstance(raw.data, BadRow):
                raise raw.data
            history, reference = _exchange(parse_row(raw.data) if isinstance(raw.data, bytes) else raw.data)
        except NothingToLearn:  # a blank line
            continue
        except BadRow as error:
            raise UsageError(f"{file.where(raw.number)}: {error}") from error
        yield Asked(with_default_system(history, system), reference, sample=count)
        count += 1


def _exchange(row: dict[str, Any]) -> tuple[Conversation, str | None]:
    """The history of a row, and its last answer if it ends with one. Raises BadRow if nothing is asked."""
    messages = row.get("conversations", row.get("messages"))
    if isinstance(messages, list):
        row = {"conversations": [_from_value(message) for message in messages]}
    turns = to_turns(row)
    answer = turns.pop().text if turns and turns[-1].role == "assistant" else ""
    if not any(turn.role == "user" and turn.text.strip() for turn in turns):
        raise BadRow("nothing_asked", "expected a user turn with text to answer, found none")
    return tuple(turns), answer if answer.strip() else None


def _from_value(message: Any) -> Any:
    """A message {"role", "content"} under the keys of training data; anything else as it is."""
    if isinstance(message, dict) and "role" in message and "content" in message:
        return {"from": message["role"], "value": message["content"]}
    return message


# Files that survive a kill.


def answer_file(
    responder: Responder, source: Path, target: Path, *, system: str | None, tell: Callable[[str], None] = lambda _: None
) -> int:
    """Answer each row of `source` into a row of `target`, in its order. Returns the number of rows.

    Finished rows are kept in `target`.partial; the same call goes on after them, and a call with another model, input or
    settings is refused. `target` appears whole or not at all; one that is there is refused. `tell` gets one line on size and
    progress. Raises UsageError for rows that can't be read, before any is answered.
    """
    if target.exists():
        raise UsageError(f"{target} exists already and is not overwritten: name another output file, or delete it")
    if not source.is_file():
        raise UsageError(f"no input file at {source}: expected rows as .jsonl, .json, .jsonl.zst or .parquet")
    file = open_data_file(source)
    count, positions = positions_needed(responder, (asked.history for asked in read_asked(file, system)))
    if not count:
        raise UsageError(f"{source} has no rows: there is nothing to answer")
    model, options = responder.model, responder.options
    rows = rows_that_fit(model, options.act_steps, max(1, positions), responder.kv_budget_gb, min(responder.rows, count))
    size = cache_bytes(model, options.act_steps, rows, positions) / 1e9
    partial = target.with_name(target.name + ".partial")
    about = target.with_name(target.name + ".partial.about.json")
    with _alone(partial) as lines:
        done = _resume(lines, partial, about, _identity(responder, source, system))
        begun = f", going on after {done} finished rows" if done else ""
        tell(f"{rows} answers at a time, {positions} positions each: {size:.3f} GB of keys and values{begun}")
        asked = itertools.islice(read_asked(file, system), done, None)
        records = answers_in_order(responder, asked, rows=rows, positions=positions)
        try:
            for record in tqdm(records, desc="answers", unit="row", initial=done, total=count):
                with _writing(partial):
                    lines.write(json.dumps({"index": done, **record}, ensure_ascii=False).encode() + b"\n")
                    lines.flush()
                done += 1
        except KeyboardInterrupt:
            tell(f"stopped after {done} of {count} rows: the same command goes on from there")
            raise
        with _writing(target):
            os.fsync(lines.fileno())
            partial.rename(target)
            about.unlink(missing_ok=True)
    return count


def _identity(responder: Responder, source: Path, system: str | None) -> dict[str, Any]:
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
        "system": system,
        "context": responder.context,
        # It matters to a threshold alone.
        "halt_calibration": None if responder.options.halt_threshold is None else responder.model.halt_calibration.tolist(),
        **dataclasses.asdict(responder.options),
        **{f"arch.{key}": value for key, value in responder.model.config.model_dump().items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a folder that is read-only into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{path} can't be written ({error.strerror}): mend that and give the same command again, which goes on after the rows "
            f"that are finished, or name another output file"
        ) from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """`path` to read and to append to, for one process at a time."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("ab+")
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{path} is being written by another process: wait for it, or name another file") from error
        yield handle
    finally:
        # What a full disk didn't take is tried once more, and has been told.
        with contextlib.suppress(OSError):
            handle.close()


def _resume(lines: BinaryIO, path: Path, about: Path, identity: dict[str, Any]) -> int:
    """Check that `lines`, the file at `path`, was begun with `identity`, which `about` keeps; drop a torn end; count the rows."""
    if lines.seek(0, os.SEEK_END) == 0:
        with _writing(about):
            about.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        return 0
    try:
        begun_with = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        begun_with = {}
    changed = sorted(key for key in identity.keys() | begun_with.keys() if identity.get(key) != begun_with.get(key))
    if changed:
        told = ", ".join(f"{key} {_short(begun_with.get(key))} then, {_short(identity.get(key))} now" for key in changed[:3])
        raise UsageError(
            f"{path} was begun with something else ({told}): go on with what it was begun with, name another output file, or "
            f"delete it to begin anew"
        )
    rows, end = 0, 0
    lines.seek(0)
    for line in lines:
        if not _is_row(line, rows):
            break
        rows, end = rows + 1, end + len(line)
    lines.truncate(end)
    return rows


def _is_row(line: bytes, index: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["index"] == index
    except (ValueError, KeyError, TypeError):
        return False


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
