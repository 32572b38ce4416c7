"""Two training stages for appended experts, on live models and your own data loaders.

First the routers alone learn to send tokens of the new domain to the new experts. Then the new
experts learn the domain while the base is frozen. `tritter train` does the same with its own
batches, forgetting mitigation and saved state.
"""

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, cycle, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning import Callback
from tokenizers import Tokenizer
from torch import Tensor, nn

from tritter.core.expansions import MoeAdd
from tritter.core.families import LogicalTensor
from tritter.core.models import model_of
from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.data.packing import MarkedText
from tritter.data.sources import TextRequest
from tritter.data.tokens import TextBounds, TokenisedDocuments, parsed_tokenizer
from tritter.errors import RequestError, TritterError
from tritter.evaluation.inference import device_of, preserve_modes
from tritter.methods.moe_routing.objective import RoutingObjective
from tritter.methods.moe_routing.opening import ExpertOpening, Unfreezing, redraw_rows
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.methods.moe_routing.separate import SeparateExperts, only_trainable
from tritter.seeds import derived_seed
from tritter.stopping import Stopped
from tritter.terminal import Console
from tritter.training import BaseModule, OptimizerSettings, Schedule, SideLoss, TrainerSettings, fit
from tritter.training.callbacks import same_random_state
from tritter.transform.live import ModelExpander

_Batch = Mapping[str, Tensor]
_OLD = "old_input_ids"
_ROUTER_UPDATES = ("fine_tune", "retrain", "frozen")
_MAX_SEQUENCE_LENGTH = 256
_BATCH_SIZE = 8


class _LoaderBatches:
    """The batches of a loader in several epochs; a loader without a length is first read in full.

    Args:
        loader: yields `{"input_ids": integers [B, T]}`; iterated once per epoch.
        epochs: number of epochs.
        replay: the same for old data; each batch gets one of its batches.
    """

    def __init__(
        self, loader: Iterable[_Batch], epochs: int, *, replay: Iterable[_Batch] | None = None
    ) -> None:
        if not isinstance(loader, Sized):
            loader, epochs = [*chain.from_iterable(repeat(loader, epochs))], 1
        self._loader, self._epochs, self._replay = loader, epochs, replay
        self._length = len(loader) * epochs
        self.side_losses = () if replay is None else (_OldDataLoss(),)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Batch]:
        old = None if self._replay is None else cycle(self._replay)
        for batch in chain.from_iterable(repeat(self._loader, self._epochs)):
            yield batch if old is None else {**batch, _OLD: next(old)["input_ids"]}


class _OldDataLoss(SideLoss):
    """The next-token loss of the old data that `_LoaderBatches` adds."""

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch[_OLD]
        loss = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=False).loss
        return loss, {"train/old_loss": loss}


@same_random_state()
def _fit_live(
    module: BaseModule, batches: _LoaderBatches, *, seed: int, controls: Sequence[Callback] = ()
) -> None:
    """Train a live model in place; its device and its training mode are restored.

    Torch's global generators are restored as well.
    """
    if not len(batches):
        return
    model = module.model
    home = device_of(model)
    try:
        with preserve_modes(model), TemporaryDirectory(prefix="tritter-") as folder:
            result = fit(
                module,
                batches,
                # Use the model's own dtype and device
                settings=TrainerSettings(
                    accelerator="gpu" if home.type == "cuda" else home.type,  # type: ignore[arg-type]
                    devices=1,
                    device_index=home.index,
                    strategy="auto",
                    precision="32-true",
                    gradient_clip_val=1.0,
                    log_every_n_steps=10,
                    check_memory=False,
                    activation_checkpointing=False,
                    compile=False,
                    max_non_finite_steps=0,
                    save_every_n_steps=0,
                    progress="off",
                    seed=seed,
                ),
                folder=Path(folder),
                label="adaptation",
                console=Console(quiet=True),
                controls=controls,
            )
    except Stopped as stopped:
        if stopped.signal_number == signal.SIGINT:
            raise KeyboardInterrupt from stopped  # as in any other call
        raise
    finally:
        model.to(home)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None
    if result.stopped_because is not None:
        raise TritterError(f"adaptation: {result.stopped_because}.")


def adapt_router(
    model: nn.Module,
    new_expert_indices: Sequence[int],
    domain_dataloader: Iterable[_Batch],
    epochs: int = 3,
    *,
    encouragement: float = 0.1,
    auxiliary_loss: float = 0.01,
    z_loss: float = 1e-3,
    replay: Iterable[_Batch] | None = None,
    router_update: str = "fine_tune",
    learning_rate: float = 3e-3,
    anneal_steps: int | None = None,
    seed: int = 0,
) -> None:
    """Train only the routers of a model to send a domain to its new experts.

    The loss is that of the task plus balance, minus `encouragement` times the mean probability of
    the new experts (at most 1, so it is bounded). A router offset that keeps the new experts closed
    is raised to 0 during training. `requires_grad` of all parameters is restored afterwards, also
    after an error.

    Args:
        model: a stock model with experts.
        new_expert_indices: the last experts of each layer.
        domain_dataloader: yields `{"input_ids": integers [B, T]}`; iterated once per epoch.
        epochs: number of epochs.
        encouragement: see above.
        auxiliary_loss: weight of the load balancing loss.
        z_loss: weight of the router z-loss.
        replay: batches of old data; each batch of the domain is trained together with one of them.
        router_update: `fine_tune` from the current rows, `retrain` from random new rows, or
            `frozen`: routers are not trained, and only an offset is raised.
        learning_rate: constant learning rate.
        anneal_steps: steps after which the offset is 0. Default: all steps.
        seed: seed of random rows, and of random layers in training, such as dropout.

    Raises:
        RequestError: the model has no experts or not these, or `router_update` is unknown.
    """
    _check_router_update(router_update)
    experts = _check_experts(model, new_expert_indices)
    added = AddedExperts.of(model)
    is_read = router_update != "frozen" or (added is not None and not anneal_steps)
    batches = _LoaderBatches(domain_dataloader if is_read else [], epochs, replay=replay)
    steps, controls = anneal_steps or len(batches), list[Callback]()
    if added is not None:
        controls = [ExpertOpening(added, anneal_steps=steps)]
    if router_update == "retrain":
        redraw_rows(model, experts, seed=seed)
    if router_update != "frozen":
        objective = RoutingObjective(
            model,
            RoutingOptions(auxiliary_loss=auxiliary_loss, z_loss=z_loss),
            encouragement=encouragement,
            new_experts=experts,
        )
        own = derived_seed(seed, "routers")
        with only_trainable(model, lambda tensor: tensor.kind == "router"):
            _train(
                model, batches, objective, learning_rate=learning_rate, controls=controls, seed=own
            )
    if added is not None:
        added.at(steps, anneal_steps=steps).apply(model)


def train_new_experts(
    model: nn.Module,
    new_expert_indices: Sequence[int],
    domain_dataloader: Iterable[_Batch],
    epochs: int = 1,
    *,
    freeze_base: bool = True,
    train_routers: bool = False,
    unfreeze_after: int | None = None,
    auxiliary_loss: float = 0.01,
    z_loss: float = 1e-3,
    replay: Iterable[_Batch] | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> None:
    """Train new experts on a domain, while the base is frozen, bit for bit.

    Args:
        model: a stock model with experts.
        new_expert_indices: the last experts of each layer.
        domain_dataloader: as for `adapt_router`.
        epochs: number of epochs.
        freeze_base: False trains all parameters.
        train_routers: also train the routers.
        unfreeze_after: number of steps after which the base is trained as well. Default: never.
        auxiliary_loss: weight of the load balancing loss.
        z_loss: weight of the router z-loss.
        replay: as for `adapt_router`.
        learning_rate: constant learning rate.
        weight_decay: of AdamW.
        seed: seed of random layers in training, such as dropout.

    Raises:
        RequestError: the model has no experts or not these, or `unfreeze_after` is set without a
            frozen base.
    """
    experts = _check_experts(model, new_expert_indices)
    if unfreeze_after is not None and not freeze_base:
        raise RequestError("unfreeze_after: has no effect with freeze_base=False.")
    batches = _LoaderBatches(domain_dataloader, epochs, replay=replay)

    def is_trained(tensor: LogicalTensor) -> bool:
        is_router = tensor.kind == "router"
        return not freeze_base or tensor.expert in experts or (train_routers and is_router)

    separated = SeparateExperts(model, experts[0]) if freeze_base else nullcontext()
    with separated, only_trainable(model, is_trained):
        controls: list[Callback] = []
        if unfreeze_after is not None:
            frozen = [p for p in model.parameters() if not p.requires_grad]
            controls.append(Unfreezing(frozen, after_steps=unfreeze_after))
        _train(
            model,
            batches,
            RoutingObjective(model, RoutingOptions(auxiliary_loss=auxiliary_loss, z_loss=z_loss)),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            controls=controls,
            seed=derived_seed(seed, "experts"),
        )


def _check_router_update(update: str) -> None:
    """Refuse an unknown kind of router update."""
    if update not in _ROUTER_UPDATES:
        raise RequestError(
            f"router_update = {update!r}: must be one of {', '.join(_ROUTER_UPDATES)}."
        )


def _check_experts(model: nn.Module, indices: Sequence[int]) -> tuple[int, ...]:
    """Return the sorted indices of new experts."""
    routing = RouterControl.of(model)
    if routing is None:
        raise RequestError("adaptation: the model has no experts; expand it with moe first.")
    experts = tuple(sorted(set(indices)))
    last = tuple(range(routing.num_experts - len(experts), routing.num_experts))
    if not experts or experts != last or not last[0] > 0:
        raise RequestError(
            f"new_expert_indices = {list(indices)}: must be the last of the {routing.num_experts} "
            "experts of a layer, and not all of them."
        )
    return experts


def _train(
    model: nn.Module,
    batches: _LoaderBatches,
    objective: RoutingObjective,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    controls: Sequence[Callback],
    seed: int,
) -> None:
    """Train the parameters that need gradients at one learning rate, with the router terms."""
    module = BaseModule(
        model,
        schedule=Schedule.constant(learning_rate, max_steps=len(batches)),
        optimizer=OptimizerSettings(weight_decay=weight_decay),
        side_losses=[objective, *batches.side_losses],
    )
    _fit_live(module, batches, seed=seed, controls=controls)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEExpansionConfig:
    """Options of `ProgressiveMoE.add_experts`.

    Args:
        base_experts: number of experts that the model has, as a safeguard.
        new_experts: number of experts to append.
        freeze_base: freeze everything except routers and new experts during training.
        router_update: `fine_tune`, `retrain` (random rows for new experts) or `frozen`.
        domain: name of the new experts' domain.
        domain_data_path: data of the domain: a file, folder or glob. If set, experts are trained.
    """

    base_experts: int = 8
    new_experts: int = 4
    freeze_base: bool = True
    router_update: str = "fine_tune"
    domain: str | None = None
    domain_data_path: str | None = None


class ProgressiveMoE:
    """Appends experts to live models, and trains them if there is data.

    Args:
        tokenizer: of the models, needed for data (`tokenizers.Tokenizer`, such as
            `transformers_tokenizer.backend_tokenizer`).
        end_of_text_id: the token between documents.
        seed: seed of all random numbers.
    """

    def __init__(
        self, tokenizer: Tokenizer | None = None, *, end_of_text_id: int = 0, seed: int = 0
    ) -> None:
        self.tokenizer = tokenizer
        self.end_of_text_id = end_of_text_id
        self.seed = seed

    def add_experts(self, model: nn.Module, config: MoEExpansionConfig) -> nn.Module:
        """Return a model with more experts; the input model is unchanged.

        Without data, a router offset of −∞ closes the new experts, and the function is preserved.
        Open them with `adapt_router` and train them with `train_new_experts`. With data, both are
        done here, according to `freeze_base` and `router_update`.

        Raises:
            RequestError: the number of experts differs from `base_experts`, `router_update` is
                unknown, or the data can't be read, or there is no tokenizer.
        """
        routing = RouterControl.of(model)
        num_experts = 0 if routing is None else routing.num_experts
        if num_experts != config.base_experts:
            raise RequestError(
                f"base_experts = {config.base_experts}: the model has {num_experts} experts per "
                "layer."
            )
        _check_router_update(config.router_update)
        path, seed = config.domain_data_path, self.seed
        bounds = self._bounds()
        batches = None if path is None else self._batches(model, path, bounds)
        grown = ModelExpander([MoeAdd(num_experts=config.new_experts)], seed=seed).expand(model)
        if batches is not None:
            new = range(config.base_experts, config.base_experts + config.new_experts)
            with MarkedText(bounds).attached(grown):
                adapt_router(grown, new, batches, router_update=config.router_update, seed=seed)
                train_new_experts(grown, new, batches, freeze_base=config.freeze_base, seed=seed)
        return grown

    def _bounds(self) -> TextBounds:
        if self.tokenizer is None:
            return TextBounds(self.end_of_text_id)
        return TextBounds.of(parsed_tokenizer(self.tokenizer.to_str()), self.end_of_text_id)

    def _batches(self, model: nn.Module, path: str, bounds: TextBounds) -> list[dict[str, Tensor]]:
        if self.tokenizer is None:
            raise RequestError(
                f"domain_data_path = {path}: a live model has no tokenizer; pass one to "
                "ProgressiveMoE(tokenizer)."
            )
        path = str(Path(path).expanduser().resolve())
        documents = TextRequest([path], key="domain_data_path").noted_documents()
        limit = model_of(model).position_limit
        sequences = TokenisedDocuments.of(documents, self.tokenizer).pack(
            sequence_length=min(_MAX_SEQUENCE_LENGTH, limit or _MAX_SEQUENCE_LENGTH),
            bounds=bounds,
        )
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(self.seed))
        return [{"input_ids": part.long()} for part in sequences[order].split(_BATCH_SIZE)]
