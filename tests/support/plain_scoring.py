"""Multiple choice and log-likelihoods by transformers alone, one text at a time: what lm-eval's scores are held to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Question:
    """A prompt, the texts that may follow it (each with the white space before it), and which of them is right."""

    prompt: str
    continuations: tuple[str, ...]
    gold: int

    @classmethod
    def of(cls, prompt: str, choices: Sequence[str], gold: int) -> "Question":
        """A question whose choices follow a space."""
        return cls(prompt, tuple(f" {choice}" for choice in choices), gold)


class PlainScoring:
    """A model folder in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def log_likelihood(self, context: str, continuation: str) -> float:
        """Of a continuation after a context."""
        whole = self.tokenizer(context + continuation)["input_ids"]
        given = len(self.tokenizer(context)["input_ids"])
        with torch.no_grad():
            logits = self.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return float(sum(logits[place - 1, whole[place]].double() for place in range(given, len(whole))))

    def log_likelihoods(self, question: Question) -> list[float]:
        """Of each continuation."""
        return [self.log_likelihood(question.prompt, continuation) for continuation in question.continuations]


def is_right(question: Question, log_likelihoods: Sequence[float]) -> bool:
    """Whether the likeliest continuation is the right one."""
    return max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__) == question.gold


def is_right_per_character(question: Question, log_likelihoods: Sequence[float]) -> bool:
    """Whether the right one is the likeliest per character; the space before a continuation does not count."""
    sizes = [len(continuation.removeprefix(" ")) for continuation in question.continuations]
    return is_right(question, [value / size for value, size in zip(log_likelihoods, sizes, strict=True)])
