"""Rows of every format become the same conversation; what can't be used is refused with a reason."""

from typing import Any

import pytest

from data_tools.chat.conversation import Unusable
from data_tools.chat.formats import format_of_row, read_conversation
from data_tools.chat.options import ChatFormat

EXPECTED = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
)
MESSAGES = [dict(message) for message in EXPECTED]
ROWS: list[tuple[ChatFormat, dict[str, Any]]] = [
    ("messages", {"messages": MESSAGES}),
    ("messages", {"conversations": MESSAGES}),
    ("messages", {"messages": [{**message, "tool_calls": None, "name": None} for message in MESSAGES], "tools": None}),
    ("messages", {"messages": [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "H"},
                                                                        {"type": "text", "text": "i"}]}, MESSAGES[2]]}),
    ("messages", {"messages": [MESSAGES[0], {"role": "user", "content": [{"type": "text", "value": "Hi"}],
                                             "loss_weight": 0.0}, MESSAGES[2]]}),
    ("sharegpt", {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"},
                                    {"from": "gpt", "value": "Ho"}]}),
    ("sharegpt", {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"},
                                                           {"from": "gpt", "value": "Ho"}]}),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Ho", "system": "Be brief."}),
    ("prompt-completion", {"prompt": "Hi", "completion": "Ho", "system": "Be brief."}),
    ("prompt-completion", {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}),
    ("prompt-completion", {"query": "Hi", "response": "Ho", "system": "Be brief."}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "row"), ROWS)
def test_every_format_gives_the_same_conversation(form: ChatFormat, row: dict[str, Any]) -> None:
    assert format_of_row(row) == form
    found = read_conversation(row, form)
    assert [{key: message[key] for key in ("role", "content")} for message in found.messages] == list(EXPECTED)
    assert found.tools == () and not found.calls_tools


def test_alpaca_joins_instruction_and_input_and_reads_the_history() -> None:
    row = {"instruction": "Add", "input": "1, 2", "output": "3", "history": [["Hi", "Ho"]]}
    contents = [message["content"] for message in read_conversation(row, "alpaca").messages]
    assert contents == ["Hi", "Ho", "Add\n1, 2", "3"]


def test_a_system_message_without_text_is_none() -> None:
    row = {"messages": [{"role": "system", "content": " "}, *MESSAGES[1:]]}
    assert [message["role"] for message in read_conversation(row, "messages").messages] == ["user", "assistant"]


def test_calls_of_both_formats_are_the_same() -> None:
    function = {"name": "add", "arguments": {"a": 1}}
    sharegpt = {
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "One."},
        ],
    }
    messages = {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [
            {"role": "user", "content": "1?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {**function, "arguments": '{"a":1}'}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "One."},
        ],
    }
    found = read_conversation(sharegpt, "sharegpt")
    assert found == read_conversation(messages, "messages")
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": function}]
    assert found.tools == ({"type": "function", "function": {"name": "add"}},)


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


BAD: list[tuple[ChatFormat, Any, str]] = [
    ("messages", {}, "no field 'messages' or 'conversations'"),
    ("messages", {"messages": "x"}, "field 'messages' is not a list"),
    ("messages", {"messages": []}, "no messages"),
    ("messages", {"messages": ["x"]}, "a message is not an object"),
    ("messages", {"messages": [{"content": "x"}]}, "a message has no field 'role'"),
    ("messages", {"messages": [{"role": "user"}]}, "a message has no field 'content'"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "a message's content is not text"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "a message's content has a part that is not text"),
    ("messages", turns("user", "robot"), "unknown role 'robot'"),
    ("messages", turns("assistant"), "roles out of order: assistant at the beginning"),
    ("messages", turns("user", "user", "assistant"), "roles out of order: user after user"),
    ("messages", turns("user", "assistant", "assistant"), "roles out of order: assistant after assistant"),
    ("messages", turns("user", "system", "assistant"), "roles out of order: system after user"),
    ("messages", turns("user", "assistant", "tool", "assistant"), "roles out of order: tool without a call before it"),
    ("messages", turns("user", "assistant", "user"), "the last message is not the assistant's"),
    ("messages", turns("system"), "the last message is not the assistant's"),
    ("messages", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
     "empty assistant message"),
    ("messages", {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]},
     "empty user message"),
    ("messages", {**turns("user", "assistant"), "tools": "{"}, "field 'tools' is not valid JSON"),
    ("messages", {"messages": [{"role": "user", "content": "x"},
                               {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "a tool call has no name"),
    ("messages", {"messages": [{"role": "user", "content": "x", "weight": 0.5}, {"role": "assistant", "content": "y"}]},
     "a message's weight is neither 0 nor 1"),
    ("sharegpt", {"conversations": [{"value": "x"}]}, "a message has no field 'from'"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "a message has no text in field 'value'"),
    ("sharegpt", {"conversations": [{"from": "cat", "value": "x"}]}, "unknown role 'cat'"),
    ("alpaca", {"instruction": "x"}, "no field 'output'"),
    ("alpaca", {"instruction": 1, "output": "x"}, "field 'instruction' is not text"),
    ("prompt-completion", {"prompt": "x"}, "no field 'completion'"),
    ("prompt-completion", {"other": "x"}, "no field 'prompt'"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "row", "reason"), BAD)
def test_what_can_not_be_used_has_a_reason(form: ChatFormat, row: Any, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        read_conversation(row, form)
    assert str(caught.value) == reason
