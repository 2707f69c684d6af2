"""The identity promise, measured: an expanded model's logits against its base's, bit for bit, by plain transformers.

Both models run in float32 on the CPU over the same token ids, one model at a time: all positions at once, then with
the KV cache (a prefill, single steps over given ids, then greedy steps), which shows colliding cache slots.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamapro.expansion.source import read_config

PROBE_SEQUENCES = 2
PROBE_TOKENS = 32
PREFILL_TOKENS = 24
GREEDY_STEPS = 8
SEED = 1234

Logits = dict[str, NDArray[np.float32]]


def identity_difference(model: Path, base: Path) -> list[str]:
    """Where a model's logits differ from its base's: one sentence for each way of computing them that differs.

    Raises:
        Corrupted, ModelRefused: a folder whose config can't be used (checked before transformers sees it).
    """
    expected, found = probe_logits(base), probe_logits(model)
    return [problem for way in expected if (problem := _difference(way, expected[way], found[way]))]


def probe_logits(folder: Path) -> Logits:
    """Logits of a model on the probe ids, by the way they were computed; each (sequences, tokens, vocabulary)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    ids = torch.from_numpy(_probe_ids(read_config(folder)))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        prefill = model(ids[:, :PREFILL_TOKENS], use_cache=True)
        logits = {
            "without cache": model(ids, use_cache=False).logits.numpy(),
            "prefill": prefill.logits.numpy(),
        }
        cache, token, steps = prefill.past_key_values, ids[:, PREFILL_TOKENS], []
        for position in range(PREFILL_TOKENS, PROBE_TOKENS + GREEDY_STEPS):
            output = model(token[:, None], past_key_values=cache, use_cache=True)
            steps.append(output.logits.numpy())
            given = position + 1 < PROBE_TOKENS
            token = ids[:, position + 1] if given else output.logits[:, -1].argmax(-1)
        logits["steps with cache"] = np.concatenate(steps, axis=1)
    return logits


def _probe_ids(config: Mapping[str, Any]) -> NDArray[np.int64]:
    generator = np.random.default_rng(SEED)
    return generator.integers(0, config["vocab_size"], size=(PROBE_SEQUENCES, PROBE_TOKENS))


def _difference(way: str, expected: NDArray[np.float32], found: NDArray[np.float32]) -> str | None:
    if expected.shape != found.shape:
        return f"logits {way} have shape {found.shape}, the base's {expected.shape}"
    if not np.isfinite(expected).all():
        return f"logits {way} of the base are not finite: nothing can be compared"
    if np.array_equal(expected.view(np.uint32), found.view(np.uint32)):
        return None
    return f"logits {way} differ from the base's, by up to {np.abs(expected - found).max():.3g}"
