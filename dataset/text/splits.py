"""Hashes of conversations, to split them and find duplicates. Knows no files, forms or tokens."""

import hashlib

import numpy as np
import numpy.typing as npt

from dataset.text.conversation import Conversation


def prompt_hash(conversation: Conversation) -> int:
    """64 bits over system text and first question, stripped: the key of the split."""
    system = next((turn.text for turn in conversation if turn.role == "system"), "")
    return _hash(system, next(iter(questions(conversation)), ""))


def question_hash(conversation: Conversation) -> int:
    """64 bits over all questions, whatever the system prompt and the answers."""
    return _hash(*questions(conversation))


def conversation_hash(conversation: Conversation) -> int:
    """64 bits over all turns, to find duplicate rows."""
    return _hash(*(part for turn in conversation for part in (turn.role, turn.text)))


def questions(conversation: Conversation) -> list[str]:
    """The texts of all user turns; for raw text, all of it."""
    return [turn.text for turn in conversation if turn.role in ("user", "text")]


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        field = text.strip().encode("utf-8")
        digest.update(len(field).to_bytes(8, "little") + field)
    return int.from_bytes(digest.digest(), "little")


def are_test_hashes(hashes: npt.NDArray[np.uint64], seed: int, test_ratio: float) -> npt.NDArray[np.bool_]:
    """For each `prompt_hash`: whether it is in the test split of (seed, test_ratio).

    Equal prompts are always in the same split; a larger `test_ratio`, from 0 to below 1, only adds
    test rows.
    """
    salt = np.frombuffer(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "<u8")
    # Finaliser of SplitMix64 (Steele et al. 2014): one pass splits cached hashes by any seed.
    mixed = hashes ^ salt
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    in_test: npt.NDArray[np.bool_] = mixed < np.uint64(int(test_ratio * 2**64))
    return in_test
