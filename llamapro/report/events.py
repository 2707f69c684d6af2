"""What happened in a run, in words; a save and the proof that went with it are one line."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from llamapro.report.facts import Event

Line = Mapping[str, Any]
GRAVE = frozenset({"skip", "rollback", "no rollback", "save failed", "retention"})


def events_of(lines: Sequence[Line]) -> tuple[Event, ...]:
    """The event lines of metrics.jsonl, in their order."""
    return tuple(_events(lines))


def _events(lines: Sequence[Line]) -> Iterator[Event]:
    proof: Line | None = None
    for line in lines:
        if proof is not None and line["event"] == "save":
            yield _event(line, f"{_details(line)}; {proof_text(proof)}")
            proof = None
            continue
        if proof is not None:
            yield _event(proof, _details(proof))
        proof = line if line["event"] == "proof" and is_whole(line) else None
        if proof is None:
            yield _event(line, _details(line))
    if proof is not None:
        yield _event(proof, _details(proof))


def proof_text(line: Line) -> str:
    """A proof event's sentence."""
    return str(line.get("text") or f"{line.get('equal', 0)} of {line.get('total', 0)} base tensors equal the record")


def is_whole(proof: Line) -> bool:
    """Whether nothing differed."""
    return bool(proof.get("equal", 0) == proof.get("total", 0))


def _event(line: Line, details: str) -> Event:
    grave = line["event"] in GRAVE or (line["event"] == "proof" and not is_whole(line))
    step = "" if line.get("step") is None else f"{line['step']:,}"
    return Event(_time(str(line.get("time", ""))), step, str(line["event"]), details, grave)


def _time(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = moment.strftime("%z")
    return f"{moment:%Y-%m-%d %H:%M:%S} {'UTC' if zone in ('', '+0000') else zone}"


def _details(line: Line) -> str:
    known = _SENTENCES.get(str(line["event"]))
    try:
        return known(line) if known else _facts(line)
    except (KeyError, TypeError, ValueError):  # written by another version
        return _facts(line)


def _facts(line: Line) -> str:
    shown = {key: value for key, value in line.items() if key not in {"event", "time", "step"}}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def _resume(line: Line) -> str:
    return "; ".join([f"from {line['checkpoint']}", *line.get("changes", ())])


def _save(line: Line) -> str:
    return f"in {line['seconds']:.1f} s; training stood still for {line['stalled_seconds']:.2f} s of it"


def _save_failed(line: Line) -> str:
    return f"{line['reason']} ({line['in_a_row']} in a row)"


def _rollback(line: Line) -> str:
    first, last = line["skipped_steps"]
    undone = f"to {line['checkpoint']}; steps {first:,} to {last:,} are undone"
    return f"{undone}: {line['reason']}" if line.get("reason") else undone


def _identity(line: Line) -> str:
    blocks = ", ".join(map(str, line["blocks"]))
    return f"max |Δlogit| {line['max_logit_difference']:g} against the model without its new blocks {blocks}"


def _retention(line: Line) -> str:
    return f"{line['set']} is {line['increase']:.2%} above the base, the bound is {line['bound']:.2%}: {line['action']}"


_SENTENCES: dict[str, Callable[[Line], str]] = {
    "start": lambda line: "from the model folder",
    "resume": _resume,
    "skip": lambda line: str(line["reason"]),
    "no rollback": lambda line: str(line["reason"]),
    "save": _save,
    "save failed": _save_failed,
    "rollback": _rollback,
    "proof": proof_text,
    "identity": _identity,
    "retention": _retention,
}
