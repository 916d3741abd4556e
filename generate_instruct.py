"""Answer one message: `python generate_instruct.py --checkpoint checkpoints/<project>/<run>
--message "..."`.

`--chat` starts a chat. `--input FILE --output FILE` answers a file, which several processes can
share. All settings come from the checkpoint; flags and --overrides override them.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import sys

from artifacts.checkpoint import open_checkpoint
from config.compose import add_model_arguments, add_sampling_arguments, settings_for_use
from config.errors import UsageError, one_clear_message, refuse_several_ranks, stopped_by_sigterm
from config.schema import user_path
from dataset.text.conversation import Conversation
from dataset.text.forms import form_options
from generation import load
from generation.answers import Piece, Responder
from generation.batch import InputRow, Shard, answer_file, answers_in_order, positions_needed
from generation.chat import Chat
from models.device import keep_freed_memory
from models.distributed import take_local_gpu

_SHOWN_CANDIDATES = 5


def shard(text: str) -> Shard:
    """Read I/N, where I is at least 0 and less than N."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, such as 0/4")
    return Shard(int(index), int(count))


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises UsageError for flags that don't go together."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--message", help="the user's message; the answer is streamed")
    what.add_argument("--chat", action="store_true", help="chat, with a history; /help lists the commands")
    what.add_argument(
        "--input", type=user_path, metavar="FILE", help="answer each row of a .jsonl, .json, .jsonl.zst or .parquet file"
    )
    parser.add_argument(
        "--output", type=user_path, metavar="FILE", help="with --input: the answers, as JSON lines; resumes after a kill"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="with --input: answer the part of process I (from 0) of N; torchrun sets it itself",
    )
    parser.add_argument(
        "--transcript", type=user_path, metavar="FILE", help="with --chat: append each conversation to FILE, as a row of JSON lines"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="with --message: answer it N times")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("-V", "--verbose", action="store_true", help="show each decoding step with its most probable tokens")
    shown.add_argument("--json", action="store_true", help="with --message: a JSON object for each answer, and nothing else")
    parser.add_argument("--system-message", help="system turn; default: the one the model was trained with, if any")
    add_sampling_arguments(parser)
    arguments = parser.parse_args()
    given = {name for name, value in vars(arguments).items() if value is not None and value is not False}
    needs = {"samples": "message", "json": "message", "verbose": "message", "output": "input", "input": "output"}
    for flag, other in (needs | {"shard": "input", "transcript": "chat"}).items():
        if flag in given and other not in given:
            raise UsageError(f"--{flag} goes with --{other}: give both")
    if arguments.samples is not None and arguments.samples < 1:
        raise UsageError(f"--samples {arguments.samples}: expected at least 1")
    if arguments.message is not None and not arguments.message.strip():
        raise UsageError("--message is empty: there is nothing to answer")
    return arguments


def show(responder: Responder, step: int, piece: Piece) -> None:
    """Print one decoding step: the token, its ACT steps, and the most probable tokens."""
    name, token = responder.tokenizer.piece, piece.token
    candidates = "  ".join(f"{name(rival)!r} {math.exp(logp):.3f}" for rival, logp in token.candidates)
    print(f"{step:4d}  {name(token.id)!r}  ({token.act_steps} ACT steps)  {candidates}", flush=True)


def answer_message(responder: Responder, conversation: Conversation, arguments: argparse.Namespace) -> None:
    """Print the answer or answers, in the requested form."""
    samples = arguments.samples or 1
    if samples > 1 and responder.options.sampling.temperature == 0:
        raise UsageError(f"--samples {samples} at temperature 0 would be the same answer {samples} times: set --temperature")
    if samples > 1 and arguments.verbose:
        raise UsageError(f"-V shows the steps of one answer: leave it or --samples {samples} out")
    if arguments.json or samples > 1:
        prompt = responder.prompt(conversation)  # raises for a message that is too long
        _, positions = positions_needed(responder, [len(prompt.ids)])
        inputs = (InputRow(conversation, sample=sample, prompt=prompt) for sample in range(samples))
        records = answers_in_order(responder, inputs, rows=min(responder.rows, samples), positions=positions, block=samples)
        for number, record in enumerate(records, 1):
            print(json.dumps(record) if arguments.json else f"[{number} of {samples}]\n{record['answer']}", flush=True)
    elif arguments.verbose:
        said = ""
        for step, piece in enumerate(responder.stream(conversation, top=_SHOWN_CANDIDATES), 1):
            show(responder, step, piece)
            said += piece.text
        print(said)
    else:
        for piece in responder.stream(conversation):
            print(piece.text, end="", flush=True)
        print()


def main() -> None:
    """Load, answer, print."""
    arguments = parse_arguments()
    if arguments.input is None:
        refuse_several_ranks()
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.tokenizer_path)
    config = settings_for_use(checkpoint.config, arguments)
    take_local_gpu(config.device)
    responder = load(checkpoint, config, system=arguments.system_message)
    if arguments.chat:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # report bytes that aren't UTF-8 without a traceback
        Chat(responder, input, sys.stdout, arguments.transcript).run()
    elif arguments.input is not None:
        tell = functools.partial(print, file=sys.stderr)
        forms = form_options(config.dataset)
        own = arguments.shard or Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        with stopped_by_sigterm():
            answer_file(responder, arguments.input, arguments.output, forms=forms, shard=own, tell=tell)
    else:
        answer_message(responder, responder.conversation(arguments.message), arguments)


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
