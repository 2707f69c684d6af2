"""Token shift: at which places of a text a model would go on otherwise than its base.

At every target position the model's most likely token is looked up in the base's prediction from the same text:
unshifted when it is the base's most likely too, marginal at rank 2 or 3, shifted beyond. The classes are those of Lin
et al. 2023 (arXiv 2312.01552), which appendix G of LLaMA Pro takes up; they look at answers that the tuned model wrote,
here the text is given, so that both models and every run see the same places.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
import torch

from llamapro import console
from llamapro.evaluation.measure import (
    Batches,
    Settings,
    TextSet,
    compute_dtype,
    load_model,
    measurement_key,
    text_batches,
)
from llamapro.evaluation.model_digest import model_digest
from llamapro.evaluation.results import MEASUREMENTS, TokenShift
from llamapro.files.atomic import write_atomic
from llamapro.modeling.loss import IGNORED_LABEL
from llamapro.modeling.model import LanguageModel

MARGINAL_RANK = 3
LOGITS_AT_ONCE = 1 << 24


def measure_shifts(
    model: Path, base: Path, sets: Sequence[TextSet], settings: Settings, store: Path
) -> dict[str, TokenShift]:
    """The token shift of a model against its base, by text; one model is in memory at a time.

    Args:
        store: the folder that measurements are kept in.
    """
    files = {text.name: _file(model, base, text, settings, store) for text in sets}
    found = {name: TokenShift.model_validate_json(file.read_bytes()) for name, file in files.items() if file.is_file()}
    missing = [text for text in sets if text.name not in found]
    if missing:
        tokens = _chosen_tokens(model, missing, settings)
        for name, shift in _shifts(base, missing, settings, tokens):
            files[name].parent.mkdir(parents=True, exist_ok=True)
            write_atomic(files[name], shift.model_dump_json())
            found[name] = shift
    return {text.name: found[text.name] for text in sets}


def _chosen_tokens(folder: Path, sets: Sequence[TextSet], settings: Settings) -> dict[str, list[torch.Tensor]]:
    """The most likely token at every target position, by text and batch."""
    model = load_model(folder, compute_dtype(folder, settings.precision), settings.device)
    with console.progress("most likely tokens", len(sets), "texts") as advance:
        tokens = {}
        for text in sets:
            batches = text_batches(text, settings)
            tokens[text.name] = [
                torch.cat([logits.argmax(-1).cpu() for logits in part]) for part in _logits(model, batches, settings)
            ]
            advance(1)
    return tokens


def _shifts(
    folder: Path, sets: Sequence[TextSet], settings: Settings, tokens: dict[str, list[torch.Tensor]]
) -> Iterator[tuple[str, TokenShift]]:
    model = load_model(folder, compute_dtype(folder, settings.precision), settings.device)
    with console.progress("their ranks in the base", len(sets), "texts") as advance:
        for text in sets:
            ranks = []
            for part, chosen in zip(
                _logits(model, text_batches(text, settings), settings), tokens[text.name], strict=True
            ):
                low = 0
                for logits in part:
                    ranks.append(token_ranks(logits, chosen[low : low + len(logits)].to(logits.device)).cpu())
                    low += len(logits)
            yield text.name, shift_of(torch.cat(ranks))
            advance(1)


def token_ranks(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The rank of a token among logits: 1 for the most likely; equal logits share the better rank.

    Args:
        logits: (positions, vocabulary); tokens: (positions,). A token beyond the vocabulary comes last.
    """
    vocabulary = logits.shape[-1]
    own = logits.gather(-1, tokens.clamp(max=vocabulary - 1).unsqueeze(-1))
    ranks = 1 + (logits > own).sum(-1)
    return torch.where(tokens < vocabulary, ranks, vocabulary + 1)


def shift_of(ranks: torch.Tensor) -> TokenShift:
    """The classes of ranks."""
    unshifted = int((ranks == 1).sum())
    shifted = int((ranks > MARGINAL_RANK).sum())
    return TokenShift(
        positions=len(ranks), unshifted=unshifted, marginal=len(ranks) - unshifted - shifted, shifted=shifted
    )


def _logits(model: LanguageModel, batches: Batches, settings: Settings) -> Iterator[Iterator[torch.Tensor]]:
    """For each batch the logits of its target positions, some positions at a time."""
    for batch, _ in batches:
        with torch.no_grad():
            ids, labels, positions = (
                torch.from_numpy(array).to(settings.device)
                for array in (batch.input_ids, batch.labels, batch.position_ids)
            )
            states = model.hidden_states(ids, positions)[labels != IGNORED_LABEL]
        yield _in_parts(model, states)


def _in_parts(model: LanguageModel, states: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = max(1, LOGITS_AT_ONCE // model.head.weight.shape[0])
    for part in torch.split(states, rows):
        with torch.no_grad():
            logits: torch.Tensor = model.head(part)
        yield logits


def _file(model: Path, base: Path, text: TextSet, settings: Settings, store: Path) -> Path:
    keys = [
        measurement_key(text, model_digest(folder), compute_dtype(folder, settings.precision), settings).model_dump()
        for folder in (model, base)
    ]
    digest = hashlib.sha256(orjson.dumps(["shift", *keys], option=orjson.OPT_SORT_KEYS)).hexdigest()
    return store / MEASUREMENTS / f"shift-{digest[:24]}.json"
