"""GGUF files made into model folders: transformers converts, and here it is proved that nothing was lost on the way.

transformers leaves out what it does not know, without a word. So every setting that the file states about its
architecture must be found again in the converted configuration, every tensor must have a place in the model, and the
rule that divides text into words must be one that is known; anything else is refused by name.
"""

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from llamapro import console
from llamapro.errors import Corrupted, ModelRefused, UserError
from llamapro.expansion.conversion import conversion_folder
from llamapro.expansion.gguf_tokenizer import save_tokenizer, word_rule
from llamapro.expansion.record import CONFIG_NAME
from llamapro.expansion.source import CARD_NAME, companion_files, has_safetensors
from llamapro.files.disk import GIB, require_free_space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PACKAGES = ("gguf", "accelerate")
# Architectures of which the file states all that the computation depends on.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
# Lists as long as the vocabulary.
LONG_FIELDS = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
ROPE_FACTORS = "rope_freqs.weight"
# Left in the configuration by the loader: the first would make transformers take the folder for a quantized model.
LOADER_FIELDS = ("quantization_config", "dtype", "transformers_version")
DTYPES = {"bf16": "bfloat16", "float32": "float32"}
EXACT_DTYPES = {"BF16": "bfloat16", "F16": "float16"}

# What a file states about its architecture, and the field of the converted configuration that must say the same.
SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Settings that change nothing when they have this value.
WITHOUT_EFFECT = {
    "rope.scaling.type": "none",
    "tensor_data_layout": "Meta AI original pth",
    "expert_count": 0,
    "expert_used_count": 0,
}


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about itself.

    Attributes:
        settings: of its architecture, without the architecture's name in front.
        tensor_types: of each tensor, as GGUF names them: F32, BF16, Q4_K, …
        text_settings: of its tokenizer, without "tokenizer." in front and without the vocabulary.
        parameters: elements of all tensors but the rotary factors; `largest`: of the largest of them.
        rope_factors: by which each rotary frequency is divided, if they are stored.
    """

    path: Path
    architecture: str
    settings: dict[str, Any]
    text_settings: dict[str, Any]
    tensor_types: dict[str, str]
    parameters: int
    largest: int
    rope_factors: tuple[float, ...] | None


def find_gguf(given: str) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder with no other model; None if it names none.

    Raises:
        UserError: the file does not exist, or the folder holds several.
    """
    place = Path(given).expanduser()
    if given and place.is_dir():
        if (place / CONFIG_NAME).exists() or has_safetensors(place):
            return None
        files = sorted(place.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(f"{given} holds several models, {', '.join(file.name for file in files)}: give one's path")
        return files[0] if files else None
    if place.suffix != ".gguf":
        return None
    if not place.is_file():
        raise UserError(f"{given} does not exist")
    return place


@contextmanager
def converted_gguf(given: str, path: Path, out: Path, dtype: str) -> Iterator[Path]:
    """Yield a temporary model folder beside `out` with the model of a GGUF file; removed at the end.

    Args:
        given: what the user named: the file, or its folder, whose tokenizer and licence files are then taken.
        dtype: as for `convert_gguf`.
    """
    folder = Path(given).expanduser()
    companions = companion_files(folder) if folder.is_dir() else []
    cards = [Path(CARD_NAME)] if (folder / CARD_NAME).is_file() else []
    own_tokenizer = any(str(name) in TOKENIZER_FILES for name in companions)
    _require_packages(path)
    with conversion_folder(out, path.stat().st_size) as target:
        convert_gguf(path, target, dtype, tokenizer=not own_tokenizer)
        for name in (*companions, *cards):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)
        yield target


def convert_gguf(path: Path, target: Path, dtype: str = "keep", *, tokenizer: bool = True) -> None:
    """Write the model of a GGUF file as safetensors, with configuration and tokenizer, into the folder `target`.

    Quantized weights become the numbers that they stand for. The whole model is in memory.

    Args:
        dtype: "keep" (the narrowest that holds every value exactly; float32 for quantized weights), "bf16" or
            "float32".
        tokenizer: whether to rebuild the tokenizer too.

    Raises:
        UserError: packages, memory or disk space are missing.
        ModelRefused: the model can't be converted exactly.
        Corrupted: the file can't be read.
    """
    _require_packages(path)
    file = read_gguf(path)
    _check_supported(file)
    rule = word_rule(path, file.text_settings) if tokenizer else None
    _require_memory(file, dtype)
    require_free_space(target, _stored_bytes(file, dtype), "the converted base")
    console.info(f"converting {path} with the whole model in memory, {_memory_bytes(file, dtype) / GIB:.1f} GiB")
    with tempfile.TemporaryDirectory(prefix="gguf-") as name:
        # Alone in a folder, so that nothing that lies beside it is read.
        (alone := Path(name) / "model.gguf").symlink_to(path.resolve())
        model = _load(file, alone, DTYPES.get(dtype, "float32"))
        if dtype == "keep":
            _narrow(model, file)
        model.save_pretrained(target)
        if tokenizer:
            save_tokenizer(alone, target, rule, max_positions=model.config.max_position_embeddings)


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's header.

    Raises:
        Corrupted: it can't be read, or is cut short.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if name not in LONG_FIELDS}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise Corrupted(f"{path} can't be read as GGUF ({error}); fetch it again") from error
    architecture = str(fields.get("general.architecture", ""))
    if fields.get("split.count", 1) != 1:
        raise ModelRefused(f"{path} is one of {fields['split.count']} parts; join them with llama-gguf-split --merge")
    factors = tensors.get(ROPE_FACTORS)
    sizes = [int(tensor.n_elements) for name, tensor in tensors.items() if name != ROPE_FACTORS]
    return GgufFile(
        path=path,
        architecture=architecture,
        settings=_below(f"{architecture}.", fields),
        text_settings=_below("tokenizer.", fields),
        tensor_types={name: tensor.tensor_type.name for name, tensor in tensors.items()},
        parameters=sum(sizes),
        largest=max(sizes, default=0),
        rope_factors=None if factors is None else tuple(map(float, factors.data)),
    )


def _below(prefix: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}


def _require_packages(path: Path) -> None:
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"{path}: GGUF needs {' and '.join(missing)}; install them with pip install 'llamapro[gguf]'")


def _check_supported(file: GgufFile) -> None:
    if file.architecture not in ARCHITECTURES:
        raise ModelRefused(
            f"{file.path} has the GGUF architecture {file.architecture!r}; only {', '.join(ARCHITECTURES)} are known "
            "to be converted without loss; take the safetensors version of the model"
        )


def _require_memory(file: GgufFile, dtype: str) -> None:
    needed, available = _memory_bytes(file, dtype), psutil.virtual_memory().available
    if needed > available:
        half = "" if dtype == "bf16" else "pass --dtype bf16, which needs about half of it, or "
        raise UserError(
            f"{file.path} has {file.parameters:,} parameters, which are converted in memory: {needed / GIB:.1f} GiB, "
            f"of which {available / GIB:.1f} GiB are free; {half}take the safetensors version, which is streamed"
        )


def _memory_bytes(file: GgufFile, dtype: str) -> int:
    """The whole model, and three times in float32 the tensor that is just being converted (measured)."""
    return _stored_bytes(file, dtype) + 3 * 4 * file.largest


def _stored_bytes(file: GgufFile, dtype: str) -> int:
    return file.parameters * (2 if dtype == "bf16" else 4)


def _load(file: GgufFile, alone: Path, dtype: str) -> "PreTrainedModel":
    """The model as transformers loads it, proved complete, in a class that knows nothing of GGUF."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            both: Any = AutoModelForCausalLM.from_pretrained(
                alone.parent, gguf_file=alone.name, dtype=getattr(torch, dtype), output_loading_info=True
            )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelRefused(f"{file.path}: transformers can't make a model of it: {error}") from error
    loaded, info = both
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            raise ModelRefused(f"{file.path}: transformers reports {kind.replace('_', ' ')}, first {names[0]}")
    _check_settings(file, loaded.config)
    _check_parameters(file, loaded)
    fields = {
        name: value
        for name, value in loaded.config.to_dict().items()
        if name not in LOADER_FIELDS and not name.startswith("_")
    }
    if file.rope_factors is not None:
        fields["rope_parameters"] = _llama3_rope(file, loaded.config)
    config = type(loaded.config)(**fields, dtype=dtype)
    with torch.device("meta"):
        model: PreTrainedModel = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its warnings, which are about computing with packed weights: nothing is computed here."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_settings(file: GgufFile, config: "PretrainedConfig") -> None:
    for name, value in file.settings.items():
        if name in WITHOUT_EFFECT and WITHOUT_EFFECT[name] == value:
            continue
        found = _setting(config, SETTINGS[name]) if name in SETTINGS else None
        if found != value:
            raise ModelRefused(
                f"{file.path}: {file.architecture}.{name} is {value!r}, but the model that transformers makes of the "
                f"file has {found!r}; take the safetensors version of the model"
            )


def _setting(config: "PretrainedConfig", field: str) -> Any:
    if field == "head_dim":
        return getattr(config, field, None) or config.hidden_size // config.num_attention_heads
    return config.rope_parameters[field] if field == "rope_theta" else getattr(config, field, None)


def _check_parameters(file: GgufFile, model: "PreTrainedModel") -> None:
    placed = sum(parameter.numel() for parameter in model.parameters())
    if placed != file.parameters:
        raise ModelRefused(
            f"{file.path} holds {file.parameters:,} parameters, but the model that transformers makes of it has "
            f"{placed:,}: tensors of the file would be left out; take the safetensors version of the model"
        )


def _llama3_rope(file: GgufFile, config: "PretrainedConfig") -> dict[str, Any]:
    """The rotary settings of Llama 3.1 and later, of which GGUF stores only the resulting factors."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert file.rope_factors is not None
    stored = torch.tensor(file.rope_factors, dtype=torch.float64)
    theta = config.rope_parameters["rope_theta"]
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        # The lowest frequency is divided by the whole factor.
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    candidate = type(config)(**{**config.to_dict(), "quantization_config": None, "rope_parameters": parameters})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](candidate, torch.device("cpu"))
    size = _setting(config, "head_dim")
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    expected = plain / frequencies
    if expected.shape != stored.shape or not torch.allclose(expected, stored, rtol=1e-4, atol=0):
        raise ModelRefused(
            f"{file.path}: the rotary factors in {ROPE_FACTORS} are not those of Llama 3.1, 3.2 or 3.3; take the "
            "safetensors version of the model"
        )
    return parameters


def _narrow(model: "PreTrainedModel", file: GgufFile) -> None:
    """Give the model the file's 16-bit dtype, if it is stored in one and every value is exact in it."""
    import torch

    types = set(file.tensor_types.values()) - {"F32"}
    if len(types) != 1 or (name := EXACT_DTYPES.get(types.pop())) is None:
        return
    dtype: torch.dtype = getattr(torch, name)
    if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in model.parameters()):
        model.config.dtype = dtype
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
