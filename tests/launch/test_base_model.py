"""A GGUF file becomes a model folder with the same weights, tied, and no trace of quantization."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.quickstart import base_model

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, BLOCKS, VOCABULARY = 32, 4, 2, 64, 2, 300


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A tiny LLaMA as llama.cpp writes it, float32; returns its tensors that need no permutation."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    _add_tokenizer(writer)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    for block in range(BLOCKS):
        inner: dict[str, tuple[int, ...]] = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
        inner |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INTERMEDIATE, HIDDEN), "ffn_up": (INTERMEDIATE, HIDDEN)}
        inner |= {"ffn_down": (HIDDEN, INTERMEDIATE), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in inner.items()}
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "model.embed_tokens.weight": tensors["token_embd"],
        "model.layers.1.mlp.down_proj.weight": tensors["blk.1.ffn_down"],
    }


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    printable = [chr(byte) for byte in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *printable, "12"]
    tokens += [f"[unused{number}]" for number in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (VOCABULARY - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("converted")
    tensors = write_gguf(folder / "source.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            base_model, "extract_member", lambda material, downloads, target: (folder / "source.gguf").rename(target)
        )
        base_model.convert(folder, folder / "base")
    return folder, tensors


def test_weights_are_those_of_the_file_in_bf16(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, tensors = converted
    stored = load_file(folder / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], torch.from_numpy(tensor).to(torch.bfloat16)), name


def test_heads_stay_tied_and_quantization_leaves_no_trace(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, _ = converted
    config = json.loads((folder / "base" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert "lm_head.weight" not in load_file(folder / "base" / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(folder / "base").config.num_hidden_layers == BLOCKS


def test_digits_stay_single_and_the_template_is_kept(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert tokenizer.tokenize("a12") == ["a", "1", "2"]
    assert tokenizer.chat_template


def test_nothing_is_left_beside_the_result(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, _ = converted
    assert [path.name for path in folder.iterdir()] == ["base"]
