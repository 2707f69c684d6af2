"""The model card of an export: what the model is, how it was made, what was measured, what is unchanged.

The same run gives the same card: no dates, no local paths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from llamapro.expansion.record import RECORD_NAME, ExpansionRecord
from llamapro.expansion.source import hub_repository
from llamapro.export.history import History, source_facts
from llamapro.export.terms import Terms

NAMES_SHOWN = 8


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from.

    Attributes:
        architecture: class name that loads the model, e.g. "LlamaForCausalLM".
        record: of the export; None for a model that was never expanded.
        history: of the run, up to the exported step; None where the run folder is unknown.
        step: optimizer steps behind the exported weights.
        unchanged: base tensors that are bit-identical to the base as written by the expansion.
        terms: of the base.
        strength: of new blocks that are not as training left them, in words; "" where all are.
    """

    architecture: str
    record: ExpansionRecord | None
    history: History | None
    step: int
    unchanged: int
    terms: Terms
    strength: str = ""


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with its YAML header."""
    sections = (
        f"# {_title(facts)}",
        _introduction(facts),
        _recipe(facts),
        _data(facts.history),
        _strength(facts.strength),
        _results(facts.history, facts.strength),
        _unchanged(facts),
        _use(facts.architecture),
        _license(facts),
    )
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{_header(facts)}\n---\n\n{body}\n"


def _header(facts: CardFacts) -> str:
    record, terms = facts.record, facts.terms
    data = ModelCardData(
        base_model=hub_repository(record.base_id) if record else None,
        license=terms.license,
        license_name=terms.license_name,
        license_link=terms.license_link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llama-pro", "block-expansion", "llamapro"] if record else ["llamapro"],
    )
    return data.to_yaml().strip()


def _title(facts: CardFacts) -> str:
    names = ", ".join(facts.history.setting("data", "sources") or ()) if facts.history else ""
    record = facts.record
    what = f"{record.base_id}, expanded from {record.base_blocks} to {record.blocks} blocks" if record else "Model"
    return f"{what}, trained on {names}" if names else what


def _introduction(facts: CardFacts) -> str:
    if facts.record is None:
        return f"A plain `{facts.architecture}`: no code of its own is needed to load it."
    blocks = ", ".join(map(str, facts.record.new_blocks))
    return (
        f"Made by block expansion (LLaMA Pro, [arXiv 2401.02415](https://arxiv.org/abs/2401.02415)): copies of some "
        f"blocks of {facts.record.base_id} were inserted that at first change nothing (new blocks {blocks}), then "
        f"trained. It is a plain `{facts.architecture}`: no code of its own is needed to load it."
    )


def _named(tensors: Sequence[str]) -> str:
    """All of a few, or their number: adapters leave their mark on every linear of a block."""
    if len(tensors) > NAMES_SHOWN:
        return f"{len(tensors)}, listed in {RECORD_NAME}"
    return ", ".join(tensors) or "none"


def _recipe(facts: CardFacts) -> str:
    rows = [("optimizer steps", f"{facts.step:,}")]
    if facts.record is not None:
        trained = facts.record.trained
        rows += [("trained blocks", ", ".join(map(str, trained.blocks)) or "none")]
        rows += [("other trained tensors", _named(trained.tensors))]
    if facts.history is not None:
        if facts.history.tokens:
            rows.append(("tokens trained on", f"{facts.history.tokens:,}"))
        rows += _settings(facts.history)
    return "## Recipe\n\n" + _table(("setting", "value"), rows)


def _settings(history: History) -> list[tuple[str, str]]:
    shown: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("sequence length, tokens", ("data", "sequence_length")),
        ("packing", ("data", "packing")),
        ("global batch, sequences", ("batch", "global_sequences")),
        ("peak learning rate", ("schedule", "learning_rate")),
        ("decay", ("schedule", "decay")),
        ("warm-up, fraction of steps", ("schedule", "warmup_fraction")),
        ("AdamW betas", ("optimizer", "betas")),
        ("weight decay, matrices only", ("optimizer", "weight_decay")),
        ("gradient clip norm", ("optimizer", "gradient_clip_norm")),
        ("precision", ("engine", "precision")),
        ("seed", ("run", "seed")),
    )
    values: list[tuple[str, Any]] = [(label, history.setting(*keys)) for label, keys in shown]
    return [(label, str(value)) for label, value in values if value is not None]


def _data(history: History | None) -> str:
    facts = source_facts(history) if history else ()
    if not facts:
        return ""
    rows = [(source.name, source.share, source.license or "not recorded") for source in facts]
    return "## Training data\n\n" + _table(("source", "share", "licence"), rows)


def _strength(strength: str) -> str:
    if not strength:
        return ""
    return (
        "## Strength\n\nThe matrices (or norms) through which the new blocks write to the residual stream are scaled: "
        f"at strength 0 the model is its base, at 1 what training made of it. Here it is {strength}."
    )


def _results(history: History | None, strength: str) -> str:
    if history is None:
        return ""
    parts = ["Measured at strength 1, not at that of this model:"] if strength else []
    if scores := history.before_after():
        rows = [
            (s.name, f"{s.before.bits_per_byte:.4f}", f"{s.after.bits_per_byte:.4f}", f"{s.change:+.1%}")
            for s in scores
        ]
        text = "Held-out text never trained on, bits per byte (lower is better), by the run's own validation:"
        parts.append(f"{text}\n\n" + _table(("text", "before", "after", "change"), rows))
    if history.evaluation is not None:
        measured = [
            (name, f"{score.bits_per_byte:.4f} ± {score.bits_per_byte_half_width or 0:.4f}", f"{score.tokens:,}")
            for name, score in history.evaluation.model.sets.items()
        ]
        parts.append(
            f"`llamapro evaluate` of {_shown_name(history.evaluation.model.name)}:\n\n"
            + _table(("text", "bits per byte", "tokens"), measured)
        )
    return "## Results\n\n" + "\n\n".join(parts) if parts[bool(strength) :] else ""


def _shown_name(model: str) -> str:
    return model if hub_repository(model) else Path(model).name


def _unchanged(facts: CardFacts) -> str:
    if facts.record is None:
        return ""
    total = len(facts.record.base_tensors)
    return (
        f"## What is unchanged\n\n{facts.unchanged} of {total} base tensors are bit-identical to the expanded base; "
        f"their digests are in `expansion.json`. `llamapro verify MODEL --base {facts.record.base_id}` proves it."
    )


def _use(architecture: str) -> str:
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")\n'
        f'model = AutoModelForCausalLM.from_pretrained("MODEL")  # {architecture}\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```"
    )


def _license(facts: CardFacts) -> str:
    terms = facts.terms
    parts = []
    if terms.license:
        link = f" ({terms.license_link})" if terms.license_link else ""
        parts.append(f"The base model's licence is {terms.license_name or terms.license}{link}.")
    if terms.files:
        parts.append(f"The base model's terms are in {', '.join(f'`{name}`' for name in terms.files)}.")
    if parts and facts.history and source_facts(facts.history):
        parts.append("Those of the training data are in the table above.")
    return "## Licence\n\n" + " ".join(parts) if parts else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
