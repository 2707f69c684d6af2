"""The five packaged templates, and models' own: ids and masks against constructions by hand and transformers'."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_tools.chat.conversation import Unusable, checked_conversation
from data_tools.chat.encode import ChatEncoder
from data_tools.chat.library import chat_options, find_template, template_names
from data_tools.chat.options import ChatRequest
from data_tools.chat.template import NO_TOOLS, REWRITTEN, ChatTemplate, Rendered
from data_tools.tokenizer import read_tokenizer
from llamapro.errors import DataError
from tests.support.chats import SPECIAL, TWO_ROUNDS, save_byte_level, save_llama_2

FIVE = ("llama-2", "llama-3", "chatml", "mistral", "zephyr")
# What each template makes of `TWO_ROUNDS`, by hand: pieces of text or control tokens, and whether they are learned.
Pieces = list[tuple[str, bool]]
GOLDEN: dict[str, Pieces] = {
    "llama-3": [
        *[(text, False) for text in ("<|begin_of_text|>", "<|start_header_id|>", "system", "<|end_header_id|>")],
        *[(text, False) for text in ("\n\nBe brief.", "<|eot_id|>", "<|start_header_id|>", "user")],
        *[(text, False) for text in ("<|end_header_id|>", "\n\nWhat is a lung?", "<|eot_id|>")],
        *[(text, False) for text in ("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")],
        ("An organ. 🙂", True),
        ("<|eot_id|>", True),
        *[(text, False) for text in ("<|start_header_id|>", "user", "<|end_header_id|>", "\n\nAnd été?\nIn 日本?")],
        *[(text, False) for text in ("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")],
        ("A season:\n\nsummer.", True),
        ("<|eot_id|>", True),
    ],
    "chatml": [
        *[(text, False) for text in ("<|im_start|>", "system\nBe brief.", "<|im_end|>", "\n")],
        *[(text, False) for text in ("<|im_start|>", "user\nWhat is a lung?", "<|im_end|>", "\n")],
        *[(text, False) for text in ("<|im_start|>", "assistant\n")],
        ("An organ. 🙂", True),
        ("<|im_end|>", True),
        *[(text, False) for text in ("\n", "<|im_start|>", "user\nAnd été?\nIn 日本?", "<|im_end|>", "\n")],
        *[(text, False) for text in ("<|im_start|>", "assistant\n")],
        ("A season:\n\nsummer.", True),
        ("<|im_end|>", True),
        ("\n", False),
    ],
    "zephyr": [
        *[(text, False) for text in ("<|system|>\nBe brief.", "</s>", "\n<|user|>\nWhat is a lung?", "</s>")],
        ("\n<|assistant|>\n", False),
        ("An organ. 🙂", True),
        ("</s>", True),
        *[(text, False) for text in ("\n<|user|>\nAnd été?\nIn 日本?", "</s>", "\n<|assistant|>\n")],
        ("A season:\n\nsummer.", True),
        ("</s>", True),
        ("\n", False),
    ],
    "llama-2": [
        ("<s>", False),
        ("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is a lung? [/INST]", False),
        ("An organ. 🙂 ", True),
        ("</s>", True),
        ("<s>", False),
        ("[INST] And été?\nIn 日本? [/INST]", False),
        ("A season:\n\nsummer. ", True),
        ("</s>", True),
    ],
    "mistral": [
        ("<s>", False),
        ("[INST] Be brief.\n\nWhat is a lung? [/INST]", False),
        ("An organ. 🙂", True),
        ("</s>", True),
        ("[INST] And été?\nIn 日本? [/INST]", False),
        ("A season:\n\nsummer.", True),
        ("</s>", True),
    ],
}
# Templates of models, without {% generation %}: ChatML, and one that leaves out what was thought in earlier turns.
OWN_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a tokenizer for each template."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: save_byte_level(root / name, name) for name in SPECIAL}
    llama = save_llama_2(root / "llama-2")
    return folders | {"llama-2": llama, "mistral": llama}


def prepared(folder: Path, template: str, loss_on: Any = "assistant") -> ChatTemplate:
    request = ChatRequest(template=template, loss_on=loss_on)
    return ChatTemplate(chat_options(request, "messages", folder, read_tokenizer(folder)))


def rendered(folder: Path, template: str, messages: Any = TWO_ROUNDS, loss_on: Any = "assistant") -> Rendered:
    return prepared(folder, template, loss_on).render(checked_conversation(messages, None))


def encoded(folder: Path, found: Rendered) -> tuple[list[int], list[bool]]:
    (chat,) = ChatEncoder(folder / "tokenizer.json", None).encode([found.text], [found.spans])
    return chat.ids.tolist(), chat.scored.tolist()


def read_names(folder: Path) -> dict[str, str]:
    """What the tokenizer's settings call BOS and EOS."""
    stated = orjson.loads((folder / "tokenizer_config.json").read_bytes())
    return {name: stated[name] for name in ("bos_token", "eos_token")}


def by_hand(folder: Path, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """Ids and marks of pieces, each encoded by itself: sentencepiece's own model where there is one."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain: Callable[[str], list[int]] = lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)  # noqa: E731
    if (folder / "model").is_dir():
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "model" / "tokenizer.model"))
        plain = lambda text: list(processor.encode(text))  # noqa: E731
    control = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    ids: list[int] = []
    marks: list[bool] = []
    for text, learned in pieces:
        found = [control[text]] if text in control else plain(text)
        ids += found
        marks += [learned] * len(found)
    return ids, marks


def test_these_are_the_templates() -> None:
    assert template_names() == sorted((*FIVE, "plain"))


@pytest.mark.parametrize("name", FIVE)
def test_ids_and_mask_are_those_constructed_by_hand(models: dict[str, Path], name: str) -> None:
    folder = models[name]
    assert encoded(folder, rendered(folder, name)) == by_hand(folder, GOLDEN[name])


@pytest.mark.parametrize("name", FIVE)
def test_ids_and_mask_are_those_of_transformers(models: dict[str, Path], name: str) -> None:
    folder = models[name]
    # AutoTokenizer would give tokenizer.json another normalizer than it states.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(read_names(folder))
    theirs = tokenizer.apply_chat_template(
        TWO_ROUNDS,
        chat_template=find_template(name, folder),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, marks = encoded(folder, rendered(folder, name))
    assert ids == theirs["input_ids"]
    assert marks == [bool(mark) for mark in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", FIVE)
def test_only_the_last_answer_or_everything_is_learned(models: dict[str, Path], name: str) -> None:
    folder = models[name]
    ids, marks = encoded(folder, rendered(folder, name))
    first_answer = marks.index(True)
    second_answer = marks.index(True, marks.index(False, first_answer))
    last = encoded(folder, rendered(folder, name, loss_on="last"))
    assert last == (ids, [learned and number >= second_answer for number, learned in enumerate(marks)])
    assert encoded(folder, rendered(folder, name, loss_on="all")) == (ids, [True] * len(ids))


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co")), min_size=1, max_size=30)
ANSWERS = WORDS.map(str.strip).filter(lambda text: bool(text) and not any(mark in text for mark in "<>|[]"))


@pytest.mark.parametrize("name", [*FIVE, "plain"])
@settings(max_examples=40)
@given(rounds=st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=4))
def test_what_is_learned_is_what_the_assistant_says(
    models: dict[str, Path], name: str, rounds: list[tuple[str, str]]
) -> None:
    folder = models[name]
    roles = ("user", "assistant")
    # Without control tokens between them, a question must end so that no token reaches into the answer.
    asked = [(question + "\n" if name == "plain" else question, answer) for question, answer in rounds]
    messages = [{"role": role, "content": text} for pair in asked for role, text in zip(roles, pair, strict=True)]
    found = rendered(folder, name, messages)
    ends = {"llama-2": " </s>", "mistral": "</s>", "llama-3": "<|eot_id|>", "chatml": "<|im_end|>"}
    before = " " if name in ("llama-2", "mistral") else ""
    assert found.spans is not None
    said = [found.text[start:stop] for start, stop in found.spans]
    assert said == [before + answer + ends.get(name, "</s>") for _, answer in rounds]
    ids, marks = encoded(folder, found)
    if not (folder / "model").is_dir():  # byte-level ids decode exactly
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        learned = [token for token, mark in zip(ids, marks, strict=True) if mark]
        assert tokenizer.decode(learned, skip_special_tokens=False) == "".join(said)


def test_an_answer_without_weight_is_not_learned(models: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(OWN_CHATML)
    first, second = "An organ. 🙂<|im_end|>", "A season:\n\nsummer.<|im_end|>"
    for name in ("chatml", str(own)):
        for weightless, expected in ((2, [second]), (4, [first])):
            messages = [{**m, "weight": int(n != weightless)} for n, m in enumerate(TWO_ROUNDS)]
            found = rendered(models["chatml"], name, messages)
            assert found.spans is not None and found.text == rendered(models["chatml"], name).text
            assert [found.text[start:stop] for start, stop in found.spans] == expected
        with pytest.raises(Unusable, match="every answer to learn from has the weight 0"):
            rendered(models["chatml"], name, messages, loss_on="last")


def test_a_models_own_template_gives_the_same_mask_by_growth(models: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(OWN_CHATML)
    for loss_on in ("assistant", "last", "all"):
        packaged = rendered(models["chatml"], "chatml", loss_on=loss_on)
        assert rendered(models["chatml"], str(own), loss_on=loss_on) == packaged


def test_a_template_that_forgets_is_used_for_the_last_answer_only(models: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(FORGETFUL)
    messages = [*TWO_ROUNDS[:2], {"role": "assistant", "content": "hm</think>An organ."}, *TWO_ROUNDS[3:]]
    with pytest.raises(Unusable) as caught:
        rendered(models["chatml"], str(own), messages)
    assert str(caught.value) == REWRITTEN
    found = rendered(models["chatml"], str(own), messages, loss_on="last")
    assert found.spans is not None and "hm" not in found.text
    assert [found.text[start:stop] for start, stop in found.spans] == ["A season:\n\nsummer.<|im_end|>"]


def test_eos_is_added_and_learned_where_the_template_has_none(models: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                   "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")  # fmt: skip
    found = rendered(models["zephyr"], str(own))
    assert found.text.endswith("summer.\n</s>")
    assert found.spans is not None
    assert found.text[slice(*found.spans[-1])] == "A season:\n\nsummer.\n</s>"


def test_a_text_of_a_control_token_in_a_message_is_refused(models: dict[str, Path]) -> None:
    messages = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(Unusable, match=r"special token '<\|im_end\|>'"):
        rendered(models["chatml"], "chatml", messages)


CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]}
TOOLS = [{"name": "add", "parameters": {"type": "object"}}]
WITH_TOOLS = [
    {"role": "user", "content": "1 + 2?"},
    CALL,
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


def test_calls_of_tools_are_learned_and_their_results_are_not(models: dict[str, Path]) -> None:
    template = prepared(models["chatml"], "chatml")
    found = template.render(checked_conversation(WITH_TOOLS, TOOLS))
    assert found.spans is not None
    assert [found.text[start:stop] for start, stop in found.spans] == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>',
        "It is 3.<|im_end|>",
    ]
    assert '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}' in found.text
    assert "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n" in found.text


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "mistral", "zephyr"])
def test_a_template_without_tools_refuses_them_instead_of_dropping_them(models: dict[str, Path], name: str) -> None:
    template = prepared(models[name], name)
    for messages, tools in ((WITH_TOOLS, None), (TWO_ROUNDS, TOOLS)):
        with pytest.raises(Unusable) as caught:
            template.render(checked_conversation(messages, tools))
        assert str(caught.value) == NO_TOOLS


@pytest.mark.parametrize("attack", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
                                    "{% for i in range(999999999) %}x{% endfor %}"])  # fmt: skip
def test_a_template_computes_text_and_nothing_else(models: dict[str, Path], tmp_path: Path, attack: str) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(attack)
    with pytest.raises(Unusable, match="the chat template refuses it"):
        rendered(models["chatml"], str(own))


def test_the_models_template_is_found_in_both_places(models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_byte_level(tmp_path / "own", "chatml")
    with pytest.raises(DataError, match=r"has no chat template.*name one of chatml, llama-2"):
        find_template("model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = OWN_CHATML
    tokenizer.save_pretrained(folder)
    assert find_template("model", folder) == OWN_CHATML
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "chat_template": "{{ 1 }}"}')
    assert find_template("model", folder) == "{{ 1 }}"
