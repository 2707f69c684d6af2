"""What decides how conversations become documents: as a user asks for it, and as a build's plan states it."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

ChatFormat = Literal["messages", "sharegpt", "alpaca", "prompt-completion"]
InputFormat = Literal["auto", "text", "messages", "sharegpt", "alpaca", "prompt-completion"]
LossOn = Literal["assistant", "last", "all"]

CHAT_FORMATS: tuple[ChatFormat, ...] = ("messages", "sharegpt", "alpaca", "prompt-completion")
INPUT_FORMATS: tuple[InputFormat, ...] = ("auto", "text", *CHAT_FORMATS)
LOSS_ON: tuple[LossOn, ...] = ("assistant", "last", "all")
MODEL_TEMPLATE = "model"


@dataclass(frozen=True)
class ChatRequest:
    """What a user asks for.

    Attributes:
        format: what a row is; auto: found by looking.
        template: `model` for the model's own chat template, the name of a packaged one, or a file.
        loss_on: which tokens are learned: of all assistant messages, of the last one, or all.
        max_tokens: longer conversations are cut; None: none is.
    """

    format: InputFormat = "auto"
    template: str = MODEL_TEMPLATE
    loss_on: LossOn = "assistant"
    max_tokens: int | None = None

    def problems(self) -> list[str]:
        """What is wrong with it, one sentence each."""
        if self.max_tokens is not None and self.max_tokens < 1:
            return [f"--max-tokens {self.max_tokens}: give at least 1"]
        return []

    def ignored_by_text(self) -> list[str]:
        """The flags given that mean nothing for plain text."""
        unset = ChatRequest()
        flags = {"--chat-template": "template", "--loss-on": "loss_on", "--max-tokens": "max_tokens"}
        return [flag for flag, name in flags.items() if getattr(self, name) != getattr(unset, name)]


class ChatOptions(BaseModel):
    """What a build does with conversations.

    Attributes:
        format, loss_on, max_tokens: see `ChatRequest`.
        template_name: as the user gave it; template: its text.
        tokens: what the template may name: `bos_token`, `eos_token` and the like, as texts.
        special: texts of all special tokens of the tokenizer, which no message may hold.
        text_start: what the tokenizer puts before a text: BOS or nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: ChatFormat
    template_name: str
    template: str
    loss_on: LossOn
    max_tokens: int | None
    tokens: dict[str, str]
    special: tuple[str, ...]
    text_start: str

    def stated(self) -> dict[str, str]:
        """As flags of the command line; the template with the beginning of its SHA-256."""
        digest = hashlib.sha256(self.template.encode()).hexdigest()[:16]
        stated = {"format": self.format, "chat_template": f"{self.template_name} ({digest})", "loss_on": self.loss_on}
        return stated | ({"max_tokens": str(self.max_tokens)} if self.max_tokens is not None else {})
