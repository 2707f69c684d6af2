"""The model that the engine trains: a transformers model whose forward pass is the loss of packed rows."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llamapro.errors import ModelRefused
from llamapro.modeling.attention import AttentionChoice, PackedDocuments, pack_documents
from llamapro.modeling.blocks import bypass, uncompiled
from llamapro.modeling.loss import IGNORED_LABEL, LossHead
from llamapro.modeling.masks import DocumentMasks
from llamapro.modeling.replay import Replay, divergence_of_rows
from llamapro.modeling.stored_parts import StoredParts
from llamapro.modeling.trainable import TrainableSet


class LossOutput(NamedTuple):
    """The loss of a batch.

    Attributes:
        loss_sum: scalar float32, the sum of all token losses in nats, and of the weighted divergences from the base
            where they are asked for; differentiable, also when no token has a target.
        row_loss_sums: (rows,) float32, detached; of token losses alone.
        row_tokens: (rows,) int64, target tokens of each row.
        divergence_sum: scalar float32, detached: the sum of KL(base ‖ model) in nats over the targets of the replayed
            rows, not weighted; None where it is not asked for.
    """

    loss_sum: torch.Tensor
    row_loss_sums: torch.Tensor
    row_tokens: torch.Tensor
    divergence_sum: torch.Tensor | None = None


class LanguageModel(nn.Module):
    """A transformers model made ready by `build_model`.

    Attributes:
        hf: the transformers model.
        decoder_prefix: name of the decoder's list of blocks in `hf`, with its closing dot.
        trainable: what learns.
        attention: the attention kernel in use, and why.
        masks: what keeps documents apart where the model attends by itself; None where a kernel does.
        stored: the tensors of the folder that its parameters are made of.
        compiled: what of it is compiled, and why, in words.
        longest_row: tokens of the longest row in which a document's positions mean what they mean when it stands alone;
            None: of any.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        decoder_prefix: str,
        trainable: TrainableSet,
        attention: AttentionChoice,
        masks: DocumentMasks | None,
        stored: StoredParts,
    ) -> None:
        super().__init__()
        self.hf = hf
        self.decoder_prefix = decoder_prefix
        self.trainable = trainable
        self.attention = attention
        self.masks = masks
        self.stored = stored
        self.longest_row = _longest_row(hf.config)
        self.compiled = "nothing"
        self._all_attended = False
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the transformers model stays in evaluation mode.

        In training mode it would drop values and whole blocks, and some models would choose experts by chance, so that
        frozen blocks didn't compute the same always.
        """
        super().train(mode)
        self.hf.eval()  # type: ignore[no-untyped-call]
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's own list of blocks."""
        blocks = self.hf.get_submodule(self.decoder_prefix.removesuffix("."))
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def head(self) -> LossHead:
        """The output projection."""
        head = self.hf.get_output_embeddings()  # type: ignore[no-untyped-call]
        assert isinstance(head, LossHead)
        return head

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        boundaries: torch.Tensor | None = None,
        replay: Replay | None = None,
    ) -> LossOutput:
        """The loss of packed rows.

        Args:
            input_ids: (rows, S) int64.
            labels: (rows, S) int64, already shifted: the target of each position, -100 where there is none.
            position_ids: (rows, S) int64; a document begins wherever they don't go on by one.
            boundaries: (documents + 1,) int32, `document_boundaries` of these, where that is known already.
            replay: the rows at whose targets divergence from the base is added; None: none.
        """
        row_tokens = (labels != IGNORED_LABEL).sum(1)
        if replay is None:
            loss_sum, token_losses = self.head(self.hidden_states(input_ids, position_ids, boundaries), labels)
            return LossOutput(loss_sum, token_losses.sum(1), row_tokens)
        base_states = self._base_states(input_ids, position_ids, replay)
        beside = divergence_of_rows(replay, base_states, labels, self.head.steps.after)
        states = self.hidden_states(input_ids, position_ids, boundaries)
        loss_sum, token_losses, weighted, divergence_sum = self.head(states, labels, beside)
        return LossOutput(loss_sum + weighted, token_losses.sum(1), row_tokens, divergence_sum)

    def _base_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor, replay: Replay) -> torch.Tensor:
        """(k, S, hidden) states of the base before the projection, for the replayed rows."""
        ids, positions = (tensor.index_select(0, replay.rows) for tensor in (input_ids, position_ids))
        with torch.no_grad(), self.bypassed(replay.base_blocks):
            return self.head.steps.before(self.hidden_states(ids, positions, replay.boundaries))

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(rows, S, vocabulary) logits of packed rows, in the model's dtype: for checks on short inputs."""
        logits: torch.Tensor = self.head(self.hidden_states(input_ids, position_ids))
        return logits

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, boundaries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(rows, S, hidden) states after the final norm.

        Raises:
            ModelRefused: a block didn't attend through the kernel, so nobody knows what it saw; or rows are too long.
        """
        self._check_length(input_ids.shape[1])
        states: torch.Tensor
        if self.masks is not None:
            self.masks.lay(position_ids)
            # A mask without holes: with none at all, some models make out documents themselves, and others don't.
            whole = torch.ones_like(input_ids)
            states = self._decoder(input_ids=input_ids, position_ids=position_ids, attention_mask=whole)
            return states
        documents = pack_documents(position_ids, self.attention, boundaries)
        if not self._all_attended:
            return self._watched(input_ids, position_ids, documents)
        if any(block.compiled is not None for block in self.blocks):
            torch._dynamo.maybe_mark_dynamic(documents.boundaries, 0)  # their number differs from batch to batch
        # Held-out text is scored operation by operation, so that a run says what `llamapro evaluate` says.
        with nullcontext() if torch.is_grad_enabled() else uncompiled(self.blocks):
            return self._decoder(input_ids=input_ids, position_ids=position_ids, documents=documents)

    def _watched(self, input_ids: torch.Tensor, position_ids: torch.Tensor, documents: PackedDocuments) -> torch.Tensor:
        """The states of the first forward pass, which shows whether every block attends through the kernel."""
        attended: set[int] = set()
        with uncompiled(self.blocks):
            documents = replace(documents, attended=attended)
            states = self._decoder(input_ids=input_ids, position_ids=position_ids, documents=documents)
        active = sum(not block.bypassed for block in self.blocks)
        if len(attended) < active:
            raise ModelRefused(
                f"{type(self.hf).__name__}: only {len(attended)} of {active} blocks attend through "
                "transformers' attention interface; what the others see of a packed row is unknown"
            )
        self._all_attended = active == len(self.blocks)
        return states

    def _check_length(self, length: int) -> None:
        if self.longest_row is not None and length > self.longest_row:
            raise ModelRefused(
                f"{type(self.hf).__name__} turns to other rotary frequencies for a whole batch as soon as one of its "
                f"documents is longer than {self.longest_row} tokens (rope_type longrope), so what a document is taken "
                f"for would depend on the others; set data.sequence_length to at most {self.longest_row}"
            )

    def _decoder(self, **inputs: Any) -> torch.Tensor:
        states: torch.Tensor = self.hf.base_model(**inputs, use_cache=False).last_hidden_state
        return states

    def bypassed(self, blocks: Iterable[int]) -> AbstractContextManager[None]:
        """While the context lasts, these blocks pass their residual stream straight on.

        With every new block bypassed an expanded model is its base.
        """
        return bypass(self.blocks, blocks)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that learn, by their names in `hf`, in the model's order; shared ones once."""
        return [(name, parameter) for name, parameter in self.hf.named_parameters() if parameter.requires_grad]

    def trainable_tensors(self) -> list[str]:
        """The stored tensors that learn."""
        return self.stored.names(name for name, _ in self.trainable_parameters())

    def frozen_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Every parameter that doesn't learn, and every buffer that is stored, by their names in `hf`."""
        frozen = [(name, parameter) for name, parameter in self.hf.named_parameters() if not parameter.requires_grad]
        return frozen + [(name, buffer) for name, buffer in self.hf.named_buffers() if name in self.stored]

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which each stored tensor is held."""
        held = [*self.hf.named_parameters(), *self.hf.named_buffers()]
        known = [(name, tensor.dtype) for name, tensor in held if name in self.stored]
        return {stored: dtype for name, dtype in known for stored in self.stored.names([name])}


def _longest_row(config: PretrainedConfig) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]  # one, or one per kind of block
    lengths = [table["original_max_position_embeddings"] for table in tables if table.get("rope_type") == "longrope"]
    return min(lengths, default=None)
