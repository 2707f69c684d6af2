"""Chat templates: Jinja in a sandbox, as transformers runs it, with the answers told apart from everything else.

A template that encloses answers in `{% generation %}` … `{% endgeneration %}` says itself what the assistant writes.
With any other, an answer is what its message adds to the conversation before it, from where the template asks for an
answer; white space after its end-of-turn token is nobody's. Where a template shows earlier turns otherwise once more
follow, this can't be seen, and the conversation is not used.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_tools.chat.conversation import Conversation, Message, Unusable
from data_tools.chat.options import ChatOptions

# Noncharacters, which no text should hold; they mark answers while a template is rendered.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"[{_BEGIN}{_END}]")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN_CHARACTERS = 120
REWRITTEN = (
    "the chat template shows this conversation otherwise while it grows, so answers can't be told apart: use "
    "--loss-on last, or a template with {% generation %}"
)
NO_ANSWER = "the chat template marks no answer"
NO_WEIGHT = "every answer to learn from has the weight 0"
NO_TOOLS = "the chat template has no place for tools (that of chatml has)"
MARKS_IN_TEXT = "a message holds U+FDD0 or U+FDD1"

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `spans` are the characters to learn, in order, None: all."""

    text: str
    spans: tuple[Span, ...] | None


class ChatTemplate:
    """A template with the tokens of a tokenizer.

    Args:
        options: with the template's text; its syntax was checked by `compile_template`.
    """

    def __init__(self, options: ChatOptions) -> None:
        self._template = compile_template(options.template)
        self._options = options
        self._source = _COMMENT.sub("", options.template)
        self._marks_answers = _GENERATION.search(self._source) is not None
        texts = sorted(options.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as text, which ends with EOS or with EOS and white space.

        Raises:
            Unusable: it holds texts of special tokens, or the template can't show it.
        """
        self._check(conversation)
        eos = self._options.tokens["eos_token"]
        if self._options.loss_on == "all":
            text = _without_marks(self._run(conversation, conversation.messages))[0]
            return Rendered(text if text.rstrip().endswith(eos) else text + eos, None)
        learned = self._learned(conversation)
        text, spans = (self._by_marks if self._marks_answers else self._by_growth)(conversation, learned)
        whole = text if text.rstrip().endswith(eos) else text + eos
        if learned[-1] == len(conversation.messages) - 1:
            spans[-1] = (spans[-1][0], max(spans[-1][1], len(whole.rstrip())))
        return Rendered(whole, tuple(spans))

    def _check(self, conversation: Conversation) -> None:
        for text in conversation.texts():
            if found := self._special.search(text):
                raise Unusable(f"a message holds the text of the special token {found.group()!r}")
            if _MARK.search(text):
                raise Unusable(MARKS_IN_TEXT)
        needed = ["tools"] * bool(conversation.tools) + ["tool_calls"] * conversation.calls_tools
        if any(name not in self._source for name in needed):
            raise Unusable(NO_TOOLS)

    def _learned(self, conversation: Conversation) -> list[int]:
        """The numbers of the messages that are learned."""
        answers = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        asked = answers[-1:] if self._options.loss_on == "last" else answers
        learned = [number for number in asked if number not in conversation.weightless]
        if not learned:
            raise Unusable(NO_WEIGHT)
        return learned

    def _by_marks(self, conversation: Conversation, learned: Sequence[int]) -> tuple[str, list[Span]]:
        """An answer may have several marks, so those of the messages before it tell which are its own."""
        messages = conversation.messages
        text, spans = _without_marks(self._run(conversation, messages))
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if learned == answers:
            chosen = spans
        elif len(spans) == len(answers):
            chosen = [span for span, number in zip(spans, answers, strict=True) if number in learned]
        elif learned == answers[-1:]:
            chosen = spans[len(_without_marks(self._run(conversation, messages[:-1]))[1]) :]
        else:
            raise Unusable(REWRITTEN)
        if not chosen:
            raise Unusable(NO_ANSWER)
        return text, chosen

    def _by_growth(self, conversation: Conversation, learned: Sequence[int]) -> tuple[str, list[Span]]:
        messages = conversation.messages
        text = self._run(conversation, messages)
        spans = []
        for index in learned:
            before = self._run(conversation, messages[:index], asks=True)
            whole = text if index == len(messages) - 1 else self._run(conversation, messages[: index + 1])
            if not (text.startswith(whole) and whole.startswith(before) and len(before) < len(whole)):
                raise Unusable(REWRITTEN)
            spans.append((len(before), self._end_of_turn(whole)))
        return text, spans

    def _end_of_turn(self, whole: str) -> int:
        """Where the last turn ends: after its special token, if nothing but white space follows that."""
        end = max((found.end() for found in self._special.finditer(whole)), default=0)
        return end if end and not whole[end:].strip() else len(whole)

    def _run(self, conversation: Conversation, messages: Sequence[Message], asks: bool = False) -> str:
        try:
            return self._template.render(
                **self._options.tokens,
                messages=list(messages),
                tools=list(conversation.tools) or None,
                documents=None,
                add_generation_prompt=asks,
                text_start=self._options.text_start,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise Unusable(f"the chat template refuses it: {str(error)[:_SHOWN_CHARACTERS]}") from error


@lru_cache(maxsize=1)
def compile_template(text: str) -> jinja2.Template:
    """A template, compiled in a sandbox: it can compute text from what it is given, and nothing else.

    The day's date is not among that: a dataset must not depend on when it is built.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(text)


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`, which puts marks around what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the block into a call of `_marked` with what is in it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does it: Jinja's own filter would escape what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _without_marks(marked: str) -> tuple[str, list[Span]]:
    text, spans = "", []
    for number, part in enumerate(_MARK.split(marked)):
        if number % 2 and part:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans
