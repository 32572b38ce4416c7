"""Experts for live models by the specification's names."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from tritter.data.documents import notes_of
from tritter.data.sources import source_documents
from tritter.data.tokens import pack, tokenise
from tritter.errors import RequestError
from tritter.expand.live import ModelExpander
from tritter.expansion import MoeAdd
from tritter.moe_routing.stages import adapt_router, check_router_update, train_new_experts
from tritter.stock_routers import Routing

logger = logging.getLogger(__name__)

MAX_SEQUENCE_LENGTH = 256
BATCH_SIZE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEExpansionConfig:
    """More experts in a model that has some.

    Args:
        base_experts: how many it has; another number is refused, so that none is mistaken.
        new_experts: how many are appended.
        freeze_base: keep everything but routers and new experts as it is while they are trained.
        router_update: `fine_tune`, `retrain` (rows of new experts drawn anew) or `frozen`.
        domain: what the new experts are for; a name.
        domain_data_path: text of the domain; a file, folder or glob. With it they are trained.
    """

    base_experts: int = 8
    new_experts: int = 4
    freeze_base: bool = True
    router_update: str = "fine_tune"
    domain: str | None = None
    domain_data_path: str | None = None


class ProgressiveMoE:
    """Appends experts to live models, and trains them where there is text.

    Args:
        tokenizer: of the models, needed for text (`tokenizers.Tokenizer`, as
            `transformers_tokenizer.backend_tokenizer`).
        end_of_text_id: the token between documents.
        seed: what is drawn from it.
    """

    def __init__(
        self, tokenizer: Tokenizer | None = None, *, end_of_text_id: int = 0, seed: int = 0
    ) -> None:
        self.tokenizer = tokenizer
        self.end_of_text_id = end_of_text_id
        self.seed = seed

    def add_experts(self, model: nn.Module, config: MoEExpansionConfig) -> nn.Module:
        """Return a model with more experts; the one that is given stays as it was.

        Without text the new experts are closed by a router offset of −∞ and the model computes
        what it did: `adapt_router` opens them and `train_new_experts` trains them, which
        `freeze_base` and `router_update` are for. With text both are done here.

        Raises:
            RequestError: another number of experts than was said, none, an unknown
                `router_update`, or text that can't be read, or not without a tokenizer.
        """
        routing = Routing.of(model)
        num_experts = 0 if routing is None else routing.num_experts
        if num_experts != config.base_experts:
            raise RequestError(
                f"base_experts = {config.base_experts}: the model has {num_experts} experts a "
                "layer."
            )
        check_router_update(config.router_update)
        batches = None
        if config.domain_data_path is not None:
            batches = self._batches(model, config.domain_data_path)
        spec = MoeAdd(num_experts=config.new_experts)
        grown = ModelExpander([spec], seed=self.seed).expand(model)
        if batches is not None:
            self._train(grown, config, batches)
        return grown

    def _train(
        self, model: nn.Module, config: MoEExpansionConfig, batches: Iterable[dict[str, Tensor]]
    ) -> None:
        new = range(config.base_experts, config.base_experts + config.new_experts)
        adapt_router(model, new, batches, router_update=config.router_update, seed=self.seed)
        train_new_experts(model, new, batches, freeze_base=config.freeze_base, seed=self.seed)

    def _batches(self, model: nn.Module, path: str) -> list[dict[str, Tensor]]:
        if self.tokenizer is None:
            raise RequestError(
                f"domain_data_path = {path}: a live model has no tokenizer; give one, "
                "ProgressiveMoE(tokenizer)."
            )
        place = str(Path(path).expanduser().resolve())
        documents = source_documents([place], key="domain_data_path", text_field="text")
        for note in notes_of(documents):
            logger.warning(note)
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        sequences = pack(
            tokenise(documents, self.tokenizer),
            sequence_length=min(MAX_SEQUENCE_LENGTH, limit or MAX_SEQUENCE_LENGTH),
            end_of_text_id=self.end_of_text_id,
        )
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(self.seed))
        return [{"input_ids": part.long()} for part in sequences[order].split(BATCH_SIZE)]
