"""The run's two proofs, said in one line each: frozen weights equal the record, and a fresh expansion is the identity.

The identity is measured, not assumed: logits of real text with the new blocks in place against those with the new
blocks bypassed, which are the base's. It holds before the first step only, so it is checked only there.
"""

from dataclasses import replace

import torch

from llamapro import console
from llamapro.checkpoint.frozen import FrozenProof, prove_frozen
from llamapro.errors import CheckFailed
from llamapro.modeling.fp8 import quantized_parameters
from llamapro.training.fp8 import prove_fp8_unchanged
from llamapro.training.progress import Progress
from llamapro.training.session import Session

PROBE_TOKENS = 128


def prove_frozen_weights(session: Session, progress: Progress) -> None:
    """Compare the live frozen weights with the record, bit for bit, and those in FP8 with their start; collective.

    The line that says it also says what the run began with.

    Raises:
        CheckFailed: naming the first tensors that differ.
    """
    model, ranks = session.engine.model, session.ranks
    proofs = [_proof_of_record(session), prove_fp8_unchanged(model, session.fp8_start, ranks)]
    proofs = [proof for proof in proofs if proof.total]  # where everything trains nothing is frozen
    if not proofs:
        return
    equal, total = (sum(getattr(proof, name) for proof in proofs) for name in ("equal", "total"))
    different = [name for proof in proofs for name in proof.different]
    text = "; ".join([*map(str, proofs), *_start(progress)])
    session.metrics.event("proof", equal=equal, total=total, different=different, text=text)
    if different:
        raise CheckFailed(f"frozen weights changed while they were in memory: {text}; nothing was saved")
    console.info(text)


def _start(progress: Progress) -> list[str]:
    difference = progress.start_difference
    return [] if difference is None else [f"max |Δlogit| at start {difference:g}"]


def _proof_of_record(session: Session) -> FrozenProof:
    """Of the base tensors that are in memory as they are in the folder."""
    record, engine = session.live_record, session.engine
    if record is None:
        return FrozenProof(0, 0, ())
    in_fp8 = engine.model.stored.names(quantized_parameters(engine.model.hf))
    apart = [*engine.model.trainable_tensors(), *in_fp8]
    proof = prove_frozen(engine.frozen_slices(), record, session.ranks, apart)
    claim = "base tensors in bf16 equal the record" if in_fp8 else proof.claim
    return replace(proof, claim=claim if session.facts.record else "base tensors equal the model folder")


def prove_identity(session: Session, progress: Progress) -> Progress:
    """Check that the expanded model computes what its base computes, before anything is trained; collective.

    Blocks that were trained earlier are part of what is compared against, so only fresh ones are bypassed. A run that
    begins with another run's weights has no fresh blocks.

    Returns:
        The progress, with what was measured.

    Raises:
        CheckFailed: a fresh new block changes the logits.
    """
    record = session.facts.record
    fresh = record.untrained_blocks() if record else ()
    if not fresh or session.config.checkpoint.start_from is not None:
        return progress
    difference = _logit_difference(session, fresh)
    session.metrics.event("identity", max_logit_difference=difference, blocks=list(fresh))
    if difference > 0.0:
        raise CheckFailed(
            f"the new blocks {', '.join(map(str, fresh))} change the logits by up to {difference:g} before any "
            "training, so the model is not its base; `llamapro verify` names the tensor, expand the base again"
        )
    console.info(f"max |Δlogit| between the expanded model and its base at start: {difference:g}")
    return replace(progress, start_difference=difference)


def _logit_difference(session: Session, blocks: tuple[int, ...]) -> float:
    model, ranks = session.engine.model, session.ranks
    sample = session.stream.sample(0)
    ids = torch.from_numpy(sample.input_ids[None, :PROBE_TOKENS]).to(ranks.device)
    positions = torch.from_numpy(sample.position_ids[None, :PROBE_TOKENS]).to(ranks.device)
    with session.engine.evaluating():
        expanded = model.logits(ids, positions)
        with model.bypassed(blocks):
            base = model.logits(ids, positions)
    mine = float((expanded.float() - base.float()).abs().max())
    return max(float(other) for other in ranks.all_gather_json(mine))
