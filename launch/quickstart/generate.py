"""Continues texts with each given model, by plain transformers alone: nothing of this project is imported.

python generate.py --prompt TEXT [--prompt TEXT …] MODEL [MODEL …]    prints one JSON object a line
"""

import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

NEW_TOKENS = 40


def main() -> None:
    """Print {"model", "prompt", "continuation"} for each model and prompt; greedy, so that it can be repeated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for folder in arguments.models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for prompt in arguments.prompt:
            ids = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[misc]
            text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            line = json.dumps({"model": folder, "prompt": prompt, "continuation": text}, ensure_ascii=False)
            sys.stdout.write(line + "\n")
    foreign = sorted(name for name in sys.modules if name.partition(".")[0] == "llamapro")
    assert not foreign, f"imported {foreign}"


if __name__ == "__main__":
    main()
