"""From a conversation to the text of its next answer: the prompt, the engine, the text. Greedy.

Prompts are built by the same functions as training's (dataset/text/conversation.py). Knows nothing of training.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from config.errors import UsageError
from dataset.text.conversation import Conversation, Template, encode_prompt
from dataset.text.tokenizer import Tokenizer
from generation.engine import Engine, Prompt
from models.act import RecursiveModel


@dataclass
class Answer:
    """One generated answer."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    """Its ids, EOS left out."""
    log_probability: float = 0.0
    """Sum over the generated ids, EOS included, in nats."""
    act_steps: list[int] = field(default_factory=list)
    """ACT steps behind each generated id, EOS included."""


@dataclass(frozen=True)
class Candidate:
    """A token that might have come next."""

    piece: str
    probability: float


@dataclass(frozen=True)
class AnswerToken:
    """One decoding step of a single answer, for showing."""

    id: int
    piece: str
    act_steps: int
    candidates: list[Candidate]


@dataclass(frozen=True)
class Responder:
    """A model with its tokenizer and template, ready to answer.

    `context` is the most input positions the model was trained on; a prompt must leave room for at least one new token in it.
    """

    model: RecursiveModel
    tokenizer: Tokenizer
    template: Template
    context: int
    act_steps: int
    halt_threshold: float | None = None

    def prompt(self, conversation: Conversation) -> Prompt:
        """Encode a history for its next answer. Raises UsageError with the counts if it is longer than the context."""
        encoded = encode_prompt(conversation, self.tokenizer, self.template)
        if len(encoded.ids) > self.context:
            raise UsageError(
                f"the prompt has {len(encoded.ids)} tokens, the context holds {self.context} (dataset.seq_len): shorten the message"
            )
        return Prompt(encoded.ids, encoded.segment)

    def fits(self, conversation: Conversation) -> bool:
        """Whether the history leaves room for an answer in the context."""
        return len(encode_prompt(conversation, self.tokenizer, self.template).ids) <= self.context

    def answers(
        self,
        conversations: Sequence[Conversation],
        *,
        max_output_tokens: int,
        batch_size: int,
        progress: Callable[[Sequence[Sequence[int]]], Iterable[Sequence[int]]] = iter,
    ) -> list[Answer]:
        """Answer each conversation (which ends before the answer), batched by prompt length; results in the given order."""
        prompts = [self.prompt(conversation) for conversation in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        answers = [Answer() for _ in prompts]
        for batch in progress(batches):
            for tokens in self._engine().decode([prompts[i] for i in batch], self._limits(prompts, batch, max_output_tokens)):
                logp_B = tokens.logp_BV.gather(1, tokens.ids_B.unsqueeze(1)).squeeze(1).tolist()
                ids, steps = tokens.ids_B.tolist(), tokens.act_steps_B.tolist()
                for row in np.flatnonzero(tokens.alive).tolist():
                    answer = answers[batch[row]]
                    answer.log_probability += logp_B[row]
                    answer.act_steps.append(steps[row])
                    if ids[row] != self.tokenizer.eos_id:
                        answer.ids.append(ids[row])
        for answer in answers:
            answer.text = self.text(answer.ids)
        return answers

    def stream(self, conversation: Conversation, *, max_output_tokens: int, top: int) -> Iterator[AnswerToken]:
        """Answer one conversation token by token, EOS included, each with its `top` most probable candidates."""
        prompt = self.prompt(conversation)
        for tokens in self._engine().decode([prompt], self._limits([prompt], [0], max_output_tokens)):
            best = torch.topk(tokens.logp_BV[0], top)
            candidates = [
                Candidate(self.tokenizer.piece(token), float(np.exp(logp)))
                for token, logp in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            token_id = int(tokens.ids_B[0])
            yield AnswerToken(token_id, self.tokenizer.piece(token_id), int(tokens.act_steps_B[0]), candidates)

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids; an EOS is left out."""
        return self.tokenizer.decode([token for token in ids if token != self.tokenizer.eos_id])

    def at_depth(self, act_steps: int) -> "Responder":
        """The same model at another fixed number of ACT steps."""
        return dataclasses.replace(self, act_steps=act_steps)

    def _engine(self) -> Engine:
        return Engine(self.model, eos_id=self.tokenizer.eos_id, act_steps=self.act_steps, halt_threshold=self.halt_threshold)

    def _limits(self, prompts: Sequence[Prompt], batch: Sequence[int], max_output_tokens: int) -> list[int]:
        # The last token of an answer is never fed back, so it may stand one position beyond the context.
        return [min(max_output_tokens, self.context - len(prompts[i].ids) + 1) for i in batch]
