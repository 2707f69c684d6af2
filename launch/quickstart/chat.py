"""Talk to a model: `python -m launch.quickstart.chat MODEL`. An empty line or Ctrl-D ends it; plain transformers."""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

DEFAULT_MODEL = Path("work/quickstart/export")
NEW_TOKENS = 200

Conversation = list[dict[str, str]]


def main() -> None:
    """Read one line at a time and answer it, keeping the conversation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=DEFAULT_MODEL, help=f"default: {DEFAULT_MODEL}")
    folder = parser.parse_args().model
    if not folder.is_dir():
        parser.error(f"{folder} is no folder; run `make quickstart` first or name a model folder")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages: Conversation = []
    while question := _ask():
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(model, tokenizer, messages)})


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> str:
    """The model's next message, printed while it is generated."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=streamer)  # type: ignore[operator]
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _ask() -> str:
    sys.stdout.write("you> ")
    sys.stdout.flush()
    return sys.stdin.readline().strip()


if __name__ == "__main__":
    main()
