"""Cross-entropy of all documents of a domain, each token scored once.

B: windows per batch · T: positions per window · V: vocabulary size
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tritter.data.packing import (
    IGNORED,
    Windows,
    inputs_for,
    labels_of,
)
from tritter.data.tokens import TextBounds, TokenisedDocuments
from tritter.errors import TritterError
from tritter.evaluation.inference import eval_mode
from tritter.evaluation.statistics import PairedScores

_MAX_LOGITS = 2**28
_SEQUENCES_AT_ONCE = 16
_MAX_LOGITS_OF_LOSS = 2**24  # the loss needs two more float32 copies of the logits that it reads


def document_losses(
    model: nn.Module,
    documents: TokenisedDocuments,
    *,
    sequence_length: int,
    bounds: TextBounds,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    positions: Tensor | None = None,
) -> PairedScores:
    """Score every token of every document exactly once; of a conversation, its answers.

    Documents are cut into windows of `sequence_length` positions. Each is conditioned on the start
    of a text, like packed training sequences. If the tokenizer has no start, the first window is
    conditioned on end-of-text, later ones on one preceding token. This needs one position per
    token; a strided window would need two. All models use the same windows, so comparisons are
    fair.

    Args:
        model: `model(input_ids=[B, T], use_cache=False).logits` is [B, T, V], causal.
        documents: the documents; those without a predicted token are skipped.
        sequence_length: positions of a window.
        bounds: start and end of a text.
        batch_size: windows per forward pass, see `batch_that_fits`.
        progress: called with (windows done, total windows) after each batch.
        positions: float64 [2, sequence_length], to which the nats and the number of tokens at each
            position of a window are added.
    """
    windows = Windows(documents, sequence_length=sequence_length, bounds=bounds)
    if not windows:
        raise TritterError("evaluation: the validation documents contain no tokens")
    nats = torch.zeros(len(documents), dtype=torch.float64)
    num_tokens = torch.zeros(len(documents), dtype=torch.int64)
    with eval_mode(model) as device:
        done = 0
        longest = max(window.length for window in windows)
        batch_size = batch_that_fits(batch_size, longest, vocab_size_of(model))
        for batch in windows.batches(batch_size=batch_size):
            input_ids, targets = windows.tensors(batch)
            inputs = inputs_for(model, input_ids.to(device))
            logits = model(input_ids=inputs, use_cache=False).logits
            row = torch.tensor([window.document for window in batch])
            nats_BT = _token_nats(logits, targets.to(device))
            nats.index_add_(0, row, nats_BT.sum(dim=1).cpu())
            if positions is not None:
                sums = torch.stack([nats_BT.cpu(), (targets != IGNORED).double()]).sum(dim=1)
                positions[:, : targets.shape[1]] += sums
            num_tokens.index_add_(0, row, (targets != IGNORED).sum(dim=1))
            done += len(batch)
            if progress is not None:
                progress(done, len(windows))
    # An empty answer has an end of turn to predict, but no bytes
    kept = ((num_tokens > 0) & (documents.num_bytes > 0)).nonzero().flatten()
    return PairedScores(
        identifiers=tuple(documents.identifiers[index] for index in kept.tolist()),
        values=nats[kept],
        weights={"tokens": num_tokens[kept], "bytes": documents.num_bytes[kept]},
        unit="nats",
        start=bounds.start,
    )


def batch_that_fits(batch_size: int, length: int, vocab_size: int) -> int:
    """Return at most `batch_size` sequences, so that float32 logits stay within 1 GiB, or one."""
    return max(1, min(batch_size, _MAX_LOGITS // (length * vocab_size)))


def vocab_size_of(model: nn.Module) -> int:
    """Return the number of logits of a position; 1 for a model that does not name its head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return 1 if head is None else len(head.weight)


def sequence_losses(model: nn.Module, sequences: Tensor) -> Tensor:
    """Return the mean cross-entropy of each sequence, nats per token, float32 [N].

    Args:
        model: a causal language model.
        sequences: int [N, T]; all tokens except the first are scored. With a document mask,
            padding is ignored.
    """
    nats = []
    with eval_mode(model) as device:
        batch_size = batch_that_fits(_SEQUENCES_AT_ONCE, sequences.shape[1], vocab_size_of(model))
        for rows in sequences.split(batch_size):
            rows = rows.long().to(device)
            logits = model(input_ids=inputs_for(model, rows), use_cache=False).logits
            targets = labels_of(model, rows)[:, 1:]
            counts = (targets != IGNORED).sum(dim=1)
            nats.append((nats_per_row(logits[:, :-1], targets) / counts.clamp(min=1)).cpu())
    return torch.cat(nats).float()


def nats_per_row(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of each row, float64 [B]; per token it is computed in float32."""
    return _token_nats(logits, targets).sum(dim=1)


def _token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each token, float64 [B, T]; it is computed in float32."""
    step = max(1, _MAX_LOGITS_OF_LOSS // logits.shape[-1])
    parts = zip(logits.flatten(0, 1).split(step), targets.flatten().split(step), strict=True)
    nats_BT = torch.cat(
        [
            cross_entropy(some.float(), wanted, ignore_index=IGNORED, reduction="none")
            for some, wanted in parts
        ]
    ).view_as(targets)
    if nats_BT.device.type == "mps":  # MPS has no float64
        nats_BT = nats_BT.cpu()
    return nats_BT.double()
