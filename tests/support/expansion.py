"""Helpers for tests of expansion: edit one tensor of a safetensors file in place, load logits, rewrite a config."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def tensor_span(folder: Path, name: str) -> tuple[Path, int, int]:
    """File, start and end byte of one tensor, found by reading the header here and not with the code under test."""
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        if name in header:
            begin, end = header[name]["data_offsets"]
            return file, 8 + size + begin, 8 + size + end
    raise KeyError(name)


def flip_bit(folder: Path, name: str, byte: int = 0) -> None:
    """Flip the lowest bit of one byte of one tensor."""
    file, start, _ = tensor_span(folder, name)
    raw = bytearray(file.read_bytes())
    raw[start + byte] ^= 1
    file.write_bytes(raw)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def logits(folder: Path, *, cached: bool) -> torch.Tensor:
    """float32 logits of plain transformers on fixed ids; with `cached`, one token at a time after a prefill of 5."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = (torch.arange(24) * 37 % model.config.vocab_size).reshape(2, 12)
    prefill = 5 if cached else 12
    with torch.inference_mode():
        output = model(ids[:, :prefill], use_cache=cached)
        parts = [output.logits]
        for position in range(prefill, 12):
            step = ids[:, position : position + 1]
            output = model(step, past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


def update_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Change some top-level keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
