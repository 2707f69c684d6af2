"""The formats of instruction data: a row becomes a conversation, and is told apart by its fields."""

from collections.abc import Callable, Mapping
from typing import Any

from data_tools.chat.conversation import Conversation, Message, Unusable, checked_conversation, parsed, shown
from data_tools.chat.options import ChatFormat

_LISTS = ("messages", "conversations", "conversation")
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "function_call": "function_call",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# What well-known sets call the two sides of an exchange.
_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("question", "answer"),
    ("question", "response"), ("input", "output"),
)  # fmt: skip

Row = Mapping[str, Any]


def read_conversation(row: Row, form: ChatFormat) -> Conversation:
    """The conversation in a row.

    Raises:
        Unusable: with the reason.
    """
    return _READERS[form](row)


def format_of_row(row: Row) -> ChatFormat | None:
    """What a row is, by its fields; None where they say nothing."""
    for name in _LISTS:
        if isinstance(row.get(name), list):
            first = next(iter(row[name]), None)
            return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    return "prompt-completion" if _pair(row) is not None else None


def _messages(row: Row) -> Conversation:
    return checked_conversation(_listed(row), row.get("tools"))


def _sharegpt(row: Row) -> Conversation:
    turns = [_sharegpt_message(turn) for turn in _listed(row)]
    return checked_conversation([*_system(row), *turns], row.get("tools"))


def _sharegpt_message(turn: Any) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
        raise Unusable("a message has no field 'from'")
    if not isinstance(turn.get("value"), str):
        raise Unusable("a message has no text in field 'value'")
    role = _SHAREGPT_ROLES.get(turn["from"])
    if role is None:
        raise Unusable(f"unknown role {shown(turn['from'])}")
    if role != "function_call":
        return {"role": role, "content": turn["value"]}
    calls = parsed(turn["value"], "a function call")
    return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _alpaca(row: Row) -> Conversation:
    instruction, answer = _text(row, "instruction"), _text(row, "output")
    more = row.get("input") or ""
    if not isinstance(more, str):
        raise Unusable("field 'input' is not text")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unusable("field 'history' is not a list of pairs")
    earlier = [message for pair in history for message in _exchange(*pair)]
    asked = "\n".join(part for part in (instruction, more) if part)
    return checked_conversation([*_system(row), *earlier, *_exchange(asked, answer)], None)


def _prompt_completion(row: Row) -> Conversation:
    pair = _pair(row)
    if pair is None:
        present = next((one for one in _PAIRS if one[0] in row), _PAIRS[0])
        raise Unusable(f"no field {present[1]!r}" if present[0] in row else f"no field {present[0]!r}")
    prompt, completion = (row[name] for name in pair)
    if isinstance(prompt, list) and isinstance(completion, list):
        return checked_conversation([*prompt, *completion], row.get("tools"))
    return checked_conversation([*_system(row), *_exchange(_text(row, pair[0]), _text(row, pair[1]))], None)


def _pair(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if all(row.get(name) is not None for name in pair)), None)


def _exchange(asked: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _system(row: Row) -> list[Message]:
    system = row.get("system")
    return [{"role": "system", "content": system}] if system else []


def _listed(row: Row) -> list[Any]:
    for name in _LISTS:
        if row.get(name) is not None:
            if not isinstance(row[name], list):
                raise Unusable(f"field {name!r} is not a list")
            return list(row[name])
    raise Unusable(f"no field {_LISTS[0]!r} or {_LISTS[1]!r}")


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        raise Unusable(f"no field {name!r}")
    if not isinstance(value, str):
        raise Unusable(f"field {name!r} is not text")
    return value


_READERS: dict[ChatFormat, Callable[[Row], Conversation]] = {
    "messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca, "prompt-completion": _prompt_completion,
}  # fmt: skip
