"""What a training reads: endless batches with a saved place, and the text it is evaluated on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from tritter.data.batches import this_rank
from tritter.data.packing import IGNORED, Window, window_batches, window_tensors, windows_of
from tritter.data.tokens import TokenisedDocuments
from tritter.seeds import derived_seed

Batch = dict[str, Any]
Batches = Iterable[Mapping[str, Tensor]]  # with a length


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationText:
    """The same part of every domain's validation text, all through a training.

    Of several processes that train together each reads every n-th batch; all read as many, since
    they meet at each one.

    Args:
        every_n_steps: optimizer steps between two evaluations.
        domains: their names.
        batches: {"domain": name, "input_ids": int64 [B, T], "targets": int64 [B, T]} each.
        lengths: tokens of every window, padding left out.
    """

    every_n_steps: int
    domains: tuple[str, ...]
    batches: tuple[Batch, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        documents: Mapping[str, TokenisedDocuments],
        *,
        every_n_steps: int,
        max_tokens: int,
        sequence_length: int,
        end_of_text_id: int,
        batch_size: int,
        seed: int,
    ) -> "EvaluationText":
        """Draw windows of each domain's documents.

        Args:
            max_tokens: of a domain; one window is always taken.
            batch_size: windows of a batch.
            seed: of the choice; that of a domain does not depend on the others.
        """
        batches: list[Batch] = []
        lengths: list[int] = []
        for domain, each in documents.items():
            windows = windows_of(each, sequence_length=sequence_length)
            generator = torch.Generator().manual_seed(derived_seed(seed, "evaluation", domain))
            left, chosen = max_tokens, list[Window]()
            for index in torch.randperm(len(windows), generator=generator).tolist():
                left -= windows[index].length
                if chosen and left < 0:
                    break
                chosen.append(windows[index])
            lengths += [window.length for window in chosen]
            for batch in window_batches(chosen, batch_size=batch_size):
                input_ids, targets = window_tensors(
                    batch, each.tokens, end_of_text_id=end_of_text_id
                )
                batches.append({"domain": domain, "input_ids": input_ids, "targets": targets})
        return cls(
            every_n_steps=every_n_steps,
            domains=tuple(documents),
            batches=tuple(batches),
            lengths=tuple(lengths),
        )

    def __len__(self) -> int:
        return -(-len(self.batches) // this_rank().count)

    def __iter__(self) -> Iterator[Batch]:
        rank = this_rank()
        for first in range(0, len(self.batches), rank.count):
            if first + rank.index < len(self.batches):
                yield self.batches[first + rank.index]
            else:
                batch = self.batches[first]
                yield {**batch, "targets": torch.full_like(batch["targets"], IGNORED)}


class TextModule(LightningDataModule):
    """The data of one training.

    Args:
        batches: to train on; the place of a stream is saved with the training.
        evaluation: None: the training is not evaluated on its way.
    """

    def __init__(self, batches: Batches, evaluation: EvaluationText | None = None) -> None:
        super().__init__()
        self.batches = batches
        self.evaluation = evaluation

    def train_dataloader(self) -> Batches:
        return self.batches

    def val_dataloader(self) -> EvaluationText | tuple[()]:
        return self.evaluation or ()
