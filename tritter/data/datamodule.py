"""Data of a training run: endless training batches and a validation subset."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from tritter.data.batches import num_ranks, this_rank
from tritter.data.packing import IGNORED, Windows
from tritter.data.tokens import TextBounds, TokenisedDocuments
from tritter.seeds import derived_seed

_Batch = dict[str, Any]
Batches = Iterable[Mapping[str, Tensor]]  # with a length


class ValidationSubset:
    """A fixed subset of every domain's validation data for evaluation during training.

    It contains windows of each domain's documents. With several processes, each reads every n-th
    batch. All read the same number of batches, because they synchronise at each one.

    Args:
        documents: domain → its validation documents.
        every_n_steps: optimizer steps between two evaluations.
        max_tokens: limit per domain; at least one window is used.
        sequence_length: tokens per window.
        bounds: start and end of a text.
        batch_size: windows per batch.
        seed: seed of the sample; the sample of a domain does not depend on other domains.

    Attributes:
        domains: names of the domains.
        batches: {"domain": name, "input_ids": int64 [B, T], "targets": int64 [B, T]} each.
        lengths: tokens of each window, without padding.
    """

    def __init__(
        self,
        documents: Mapping[str, TokenisedDocuments],
        *,
        every_n_steps: int,
        max_tokens: int,
        sequence_length: int,
        bounds: TextBounds,
        batch_size: int,
        seed: int,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.domains = tuple(documents)
        self.batches: list[_Batch] = []
        self.lengths: list[int] = []
        for domain, each in documents.items():
            windows = Windows(each, sequence_length=sequence_length, bounds=bounds)
            generator = torch.Generator().manual_seed(derived_seed(seed, "evaluation", domain))
            chosen = windows.sample(max_tokens, generator=generator)
            self.lengths += [window.length for window in chosen]
            for batch in windows.batches(chosen, batch_size=batch_size):
                input_ids, targets = windows.tensors(batch)
                self.batches.append({"domain": domain, "input_ids": input_ids, "targets": targets})

    def __len__(self) -> int:
        return -(-len(self.batches) // num_ranks())

    def __iter__(self) -> Iterator[_Batch]:
        rank = this_rank()
        for first in range(0, len(self.batches), num_ranks()):
            if first + rank < len(self.batches):
                yield self.batches[first + rank]
            else:
                batch = self.batches[first]
                yield {**batch, "targets": torch.full_like(batch["targets"], IGNORED)}


class TextDataModule(LightningDataModule):
    """The data module of one training run.

    Args:
        batches: training batches; checkpoints include the position of a stream.
        evaluation: validation subset; None disables evaluation during training.
    """

    def __init__(self, batches: Batches, evaluation: ValidationSubset | None = None) -> None:
        super().__init__()
        self.batches = batches
        self.evaluation = evaluation

    def train_dataloader(self) -> Batches:
        return self.batches

    def val_dataloader(self) -> ValidationSubset | tuple[()]:
        return self.evaluation or ()
