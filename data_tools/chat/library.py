"""Where chat templates come from: the model's folder, this package by name, or a file."""

import re
from pathlib import Path
from typing import Any

import jinja2
import orjson

from data_tools.chat.options import MODEL_TEMPLATE, ChatFormat, ChatOptions, ChatRequest
from data_tools.chat.template import compile_template
from data_tools.plan import TokenizerFacts
from data_tools.tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON, named_tokens, special_tokens, token_ids
from llamapro import console
from llamapro.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES = Path(__file__).parent / "templates"
_CONTROL = re.compile(r"<\|\w+\|>")


def template_names() -> list[str]:
    """The names of the packaged templates."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def chat_options(request: ChatRequest, form: ChatFormat, folder: Path, facts: TokenizerFacts) -> ChatOptions:
    """What a build does with conversations.

    Args:
        form: what the rows are; folder: of the tokenizer.

    Raises:
        DataError: there is no such template, it has mistakes, or the tokenizer is of a kind that can't be used.
    """
    if facts.file != TOKENIZER_JSON:
        raise DataError(
            f"{folder} has no {TOKENIZER_JSON}, which --format {form} needs: load the tokenizer with transformers and "
            "save it into that folder (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    text = find_template(request.template, folder)
    try:
        compile_template(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"--chat-template {request.template}: line {error.lineno}: {error.message}") from error
    ids = token_ids(folder)
    texts = {number: token for token, number in ids.items()}
    if spelt := sorted({mark for mark in _CONTROL.findall(text) if mark not in ids}):
        console.info(
            f"--chat-template {request.template}: the tokenizer has no token {', '.join(spelt)}; each is spelt out in "
            "several tokens"
        )
    bos = {"bos_token": texts[facts.bos_id]} if facts.bos_id is not None else {}
    return ChatOptions(
        format=form,
        template_name=request.template,
        template=text,
        loss_on=request.loss_on,
        max_tokens=request.max_tokens,
        tokens=named_tokens(folder) | bos | {"eos_token": texts[facts.eos_id]},
        special=tuple(special_tokens(folder)),
        text_start=bos["bos_token"] if facts.bos_inserted else "",
    )


def find_template(name: str, folder: Path) -> str:
    """The text of a template.

    Args:
        name: `model`, the name of a packaged one, or a file; folder: of the model.

    Raises:
        DataError: there is none.
    """
    if name == MODEL_TEMPLATE:
        return _template_of_model(folder)
    if name in template_names():
        return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"--chat-template {name}: there is no such file and no template of that name; give {MODEL_TEMPLATE}, "
            f"{', '.join(template_names())}, or a file"
        )
    return _text(path)


def _template_of_model(folder: Path) -> str:
    if (folder / TEMPLATE_FILE).is_file():
        return _text(folder / TEMPLATE_FILE)
    stated = _stated_template(folder / TOKENIZER_CONFIG)
    if isinstance(stated, list):
        named = {one.get("name"): one.get("template") for one in stated if isinstance(one, dict)}
        stated = named.get("default")
    if not isinstance(stated, str):
        raise DataError(
            f"--chat-template {MODEL_TEMPLATE}: {folder} has no chat template ({TEMPLATE_FILE}, or chat_template in "
            f"{TOKENIZER_CONFIG}); name one of {', '.join(template_names())}, or give a file"
        )
    return stated


def _stated_template(path: Path) -> Any:
    try:
        settings = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    return settings.get("chat_template") if isinstance(settings, dict) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat-template {path} can't be read: {error}") from error
