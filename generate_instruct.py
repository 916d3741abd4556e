"""Answer one message: `python generate_instruct.py --checkpoint checkpoints/<project>/<run>/step_<N> --message "..."`.

Everything else comes from the checkpoint; flags and --overrides go on top.
"""

import argparse

from artifacts.checkpoint import open_checkpoint
from config.compose import add_model_arguments, settings_for_use
from config.errors import UsageError, one_clear_message
from dataset.text.conversation import Turn, with_default_system
from generation.answers import AnswerToken
from generation.loading import load_responder
from models.device import keep_freed_memory

_SHOWN_CANDIDATES = 5


def parse_arguments() -> argparse.Namespace:
    """The command line of this door."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--message", required=True, help="what the user says")
    parser.add_argument("--system-message", help="system turn; default: the one the model was trained with, if any")
    parser.add_argument("--max-output-tokens", type=int, help="longest answer; default: half of dataset.seq_len")
    parser.add_argument("-V", "--verbose", action="store_true", help="show each decoding step with its most probable tokens")
    return parser.parse_args()


def show(step: int, token: AnswerToken) -> None:
    """One decoding step: the token taken, its ACT steps, and what else was probable."""
    candidates = "  ".join(f"{c.piece!r} {c.probability:.3f}" for c in token.candidates)
    print(f"{step:4d}  {token.piece!r}  ({token.act_steps} ACT steps)  {candidates}")


def main() -> None:
    """Load, answer, print."""
    arguments = parse_arguments()
    if not arguments.message.strip():
        raise UsageError("--message is empty: there is nothing to answer")
    if arguments.max_output_tokens is not None and arguments.max_output_tokens < 1:
        raise UsageError(f"--max-output-tokens {arguments.max_output_tokens}: expected at least 1")
    for flag, text in (("--message", arguments.message), ("--system-message", arguments.system_message or "")):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(f"{flag} is not valid UTF-8 text: check the terminal's encoding")
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.tokenizer_path)
    config = settings_for_use(checkpoint.config, arguments)
    responder = load_responder(checkpoint, config)
    system = arguments.system_message if arguments.system_message is not None else config.dataset.default_system_prompt
    conversation = with_default_system((Turn("user", arguments.message),), system)
    limit = arguments.max_output_tokens or config.answer_limit
    if arguments.verbose:
        tokens = []
        for step, token in enumerate(responder.stream(conversation, max_output_tokens=limit, top=_SHOWN_CANDIDATES), 1):
            show(step, token)
            tokens.append(token.id)
        print(responder.text(tokens))
    else:
        print(responder.answers([conversation], max_output_tokens=limit, batch_size=1)[0].text)


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
