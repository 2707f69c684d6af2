"""A conversation as chat templates take it, and what makes one unusable."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

ROLES = ("system", "user", "assistant", "tool")
_SHOWN_CHARACTERS = 40
_WEIGHTS = ("weight", "loss_weight")
# Who may speak after whom; None is the beginning, after the system message.
_MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {
    None: ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool"),
}  # fmt: skip

Message = dict[str, Any]
"""`role` and `content` (text), as OpenAI names them; an assistant's may have `tool_calls`, their arguments objects."""


class Unusable(ValueError):
    """A row that can't be learned from; its text is the reason, the same for all rows of that kind."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools that the assistant may call, as JSON schemas.

    Attributes:
        weightless: numbers of the assistant's messages that are not to be learned.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    weightless: frozenset[int] = frozenset()

    @property
    def calls_tools(self) -> bool:
        """Whether a tool is called, or answers."""
        return any(message["role"] == "tool" or message.get("tool_calls") for message in self.messages)

    def texts(self) -> Iterator[str]:
        """Every text in it, but for names of fields and roles."""
        for message in self.messages:
            yield from strings_in([value for key, value in message.items() if key != "role"])
        yield from strings_in(list(self.tools))


def strings_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value; names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings_in(item)


def checked_conversation(messages: Sequence[Any], tools: Any) -> Conversation:
    """Messages and tools in OpenAI's form, brought into the one that templates expect.

    Absent and null fields are the same, parts of text are joined, arguments in JSON become objects, and a system
    message without text is none. A message's `weight` (or `loss_weight`) of 0 says that it is not to be learned.

    Raises:
        Unusable: with the reason.
    """
    found = [_message(message) for message in messages]
    kept = [message for message in found if message["role"] != "system" or message["content"].strip()]
    _check_order([message["role"] for message in kept])
    for message in kept:
        if not message["content"].strip() and not message.get("tool_calls") and message["role"] != "tool":
            raise Unusable(f"empty {message['role']} message")
    weights = [_weight(message) for message in kept]
    weightless = frozenset(n for n, message in enumerate(kept) if message["role"] == "assistant" and not weights[n])
    conversation = Conversation(tuple(kept), tuple(_tools(tools)), weightless)
    if any(message["role"] == "tool" and not _was_called(kept[:index]) for index, message in enumerate(kept)):
        raise Unusable("roles out of order: tool without a call before it")
    return conversation


def shown(value: Any) -> str:
    """A value in a reason, short."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def parsed(value: Any, name: str) -> Any:
    """A value that may be given as JSON in a text."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise Unusable(f"{name} is not valid JSON") from error


def without_nulls(value: Any) -> Any:
    """A JSON value without fields that are null, which tables are full of."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise Unusable("a message is not an object")
    message = without_nulls(value)
    role = message.get("role")
    if role is None:
        raise Unusable("a message has no field 'role'")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise Unusable(f"unknown role {shown(role)}")
    calls = message.get("tool_calls")
    if "content" not in message and not calls:
        raise Unusable("a message has no field 'content'")
    result = {**message, "role": role, "content": _content(message.get("content", ""))}
    if "tool_calls" in result:
        del result["tool_calls"]
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise Unusable(f"field 'tool_calls' of a {role} message is not a list of an assistant's calls")
        result["tool_calls"] = [_tool_call(call) for call in calls]
    return result


def _weight(message: Message) -> bool:
    """Whether a message is to be learned; what says so is taken out of it."""
    stated = [message.pop(name) for name in _WEIGHTS if name in message]
    if any(isinstance(weight, bool) or weight not in (0, 1) for weight in stated):
        raise Unusable("a message's weight is neither 0 nor 1")
    return all(stated)


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Unusable("a message's content is not text")
    return "".join(map(_part, value))


def _part(part: Any) -> str:
    stated = part if isinstance(part, Mapping) and part.get("type", "text") == "text" else {}
    text = stated.get("text", stated.get("value"))
    if not isinstance(text, str):
        raise Unusable("a message's content has a part that is not text")
    return text


def _tool_call(value: Any) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call has no name")
    arguments = parsed(function.get("arguments", {}), "a tool call's arguments")
    rest = {key: item for key, item in value.items() if key not in ("name", "arguments", "function", "type")}
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: Any) -> Iterator[dict[str, Any]]:
    listed = parsed(value, "field 'tools'") if value else []
    if not isinstance(listed, list):
        raise Unusable("field 'tools' is not a list")
    for item in listed:
        tool = parsed(item, "a tool")
        if not isinstance(tool, Mapping):
            raise Unusable("a tool is not an object")
        yield without_nulls(tool if "function" in tool else {"type": "function", "function": tool})


def _check_order(roles: Sequence[str]) -> None:
    if not roles:
        raise Unusable("no messages")
    before: str | None = None
    for role in roles[1:] if roles[0] == "system" else roles:
        if role not in _MAY_FOLLOW[before]:
            after = "at the beginning" if before is None else f"after {before}"
            raise Unusable(f"roles out of order: {role} {after}")
        before = role
    if before != "assistant":
        raise Unusable("the last message is not the assistant's")


def _was_called(earlier: Sequence[Message]) -> bool:
    """Whether the last message that is not a tool's calls tools."""
    speaker = next((message for message in reversed(earlier) if message["role"] != "tool"), {})
    return bool(speaker.get("tool_calls"))
