"""The two trainings that make appended experts useful, on live models and loaders of one's own.

First the routers alone learn to send the new domain's tokens to the new experts, then the new
experts learn the domain while the base stays as it is. The main job does the same with its own
batches, methods against forgetting and saved state.
"""

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from tokenizers import Tokenizer
from torch import Tensor, nn

from tritter.core.expansions import MoeAdd
from tritter.core.families import LogicalTensor, layout
from tritter.core.models import config_of
from tritter.core.stock_routers import AddedExperts, Routing
from tritter.data.documents import notes_of
from tritter.data.packing import labels_of
from tritter.data.sources import source_documents
from tritter.data.tokens import pack, tokenise
from tritter.errors import RequestError, TritterError
from tritter.evaluation.inference import device_of, modes_kept
from tritter.methods.moe_routing.objective import RoutingObjective, RoutingSettings
from tritter.seeds import derived_seed
from tritter.stopping import Stopped
from tritter.terminal import Console
from tritter.training import BaseModule, OptimizerSettings, Schedule, SideLoss, TrainerSettings, fit
from tritter.training.checkpoint_io import random_state, restore_random_state
from tritter.training.module import base_of
from tritter.training.parameters import BASE, NEW, live_layout
from tritter.transform import declared
from tritter.transform.live import ModelExpander

Batch = Mapping[str, Tensor]
_OLD = "old_input_ids"


class LoaderBatches:
    """What a loader gives in some epochs; one without a length is read whole first.

    Args:
        loader: `{"input_ids": integers [B, T]}`; iterated once for each epoch.
        replay: the same of old text; each batch takes one of them along.
    """

    def __init__(
        self, loader: Iterable[Batch], epochs: int, *, replay: Iterable[Batch] | None = None
    ) -> None:
        if not isinstance(loader, Sized):
            loader, epochs = [*chain.from_iterable(repeat(loader, epochs))], 1
        self._loader, self._epochs, self._replay = loader, epochs, replay
        self._length = len(loader) * epochs
        self.side_losses = () if replay is None else (OldText(),)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        old = None if self._replay is None else cycle(self._replay)
        for batch in chain.from_iterable(repeat(self._loader, self._epochs)):
            yield batch if old is None else {**batch, _OLD: next(old)["input_ids"]}


class OldText(SideLoss):
    """The next-token loss of the old text that `LoaderBatches` sends along."""

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch[_OLD]
        loss = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=False).loss
        return loss, {"train/old_loss": loss}


def fit_live(
    module: BaseModule, batches: LoaderBatches, *, seed: int, controls: Sequence[Callback] = ()
) -> None:
    """Train a live model where it lies; it stays there, in the modes that it was in.

    Torch's global generators are left as they were.

    Args:
        seed: of what layers draw in training, as for dropout.

    Raises:
        TritterError: a step was not finite; the weights are those from before it.
    """
    if not len(batches):
        return
    model = module.model
    home, random = device_of(model), random_state()
    try:
        with modes_kept(model), TemporaryDirectory(prefix="tritter-") as folder:
            result = fit(
                module,
                batches,
                # Of a model as it is: in its own dtype, on its own device
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
        restore_random_state(random)
        model.to(home)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None
    if result.stopped_because is not None:
        raise TritterError(f"adaptation: {result.stopped_because}.")


ROUTER_UPDATES = ("fine_tune", "retrain", "frozen")


def adapt_router(
    model: nn.Module,
    new_expert_indices: Sequence[int],
    domain_dataloader: Iterable[Batch],
    epochs: int = 3,
    *,
    encouragement: float = 0.1,
    auxiliary_loss: float = 0.01,
    z_loss: float = 1e-3,
    replay: Iterable[Batch] | None = None,
    router_update: str = "fine_tune",
    learning_rate: float = 3e-3,
    anneal_steps: int | None = None,
    seed: int = 0,
) -> None:
    """Train the routers of a model, and nothing else, to send a domain to its new experts.

    The loss is that of the task, minus `encouragement` times the probability of the new experts
    (a mean between 0 and 1, so that it can't be had without limit), plus balance. A router offset
    that keeps the new experts back is raised to 0 meanwhile. Afterwards parameters need gradients
    as they did before, also when an error came up.

    Args:
        model: a stock model with experts.
        new_expert_indices: the last ones of each layer.
        domain_dataloader: `{"input_ids": integers [B, T]}`; iterated once for each epoch.
        auxiliary_loss: weight of the load balancing loss.
        z_loss: weight of the router z-loss.
        replay: batches of old text; one is trained on beside each of the domain.
        router_update: `fine_tune` from the rows as they are, `retrain` with new rows drawn anew,
            or `frozen`: the routers stay, and only an offset is raised.
        anneal_steps: after which the offset is 0. Default: all steps, for which the loader needs
            a length.
        seed: of rows drawn anew, and of what layers draw in training, as for dropout.

    Raises:
        RequestError: no experts, no such experts, an unknown `router_update`, or a loader without
            the length that is needed.
    """
    check_router_update(router_update)
    experts = checked_experts(model, new_expert_indices)
    added = AddedExperts.of(model)
    controls: list[Callback] = []
    if added is not None:
        if anneal_steps:
            steps = anneal_steps
        elif isinstance(domain_dataloader, Sized):
            steps = epochs * len(domain_dataloader)
        else:
            raise RequestError(
                "anneal_steps: the loader has no length; say after how many steps the router "
                "offset is to be 0."
            )
        controls = [ExpertOpening(added, anneal_steps=steps)]
    if router_update == "retrain":
        redraw_rows(model, experts, seed=seed)
    if router_update != "frozen":
        balance = RoutingSettings(auxiliary_loss=auxiliary_loss, z_loss=z_loss)
        settings = replace(balance, encouragement=encouragement, new_experts=experts)
        batches = LoaderBatches(domain_dataloader, epochs, replay=replay)
        own = derived_seed(seed, "routers")
        with only_trainable(model, is_router):
            _train(
                model, batches, settings, learning_rate=learning_rate, controls=controls, seed=own
            )
    if added is not None:
        added.at(steps, anneal_steps=steps).apply(model)


def train_new_experts(
    model: nn.Module,
    new_expert_indices: Sequence[int],
    domain_dataloader: Iterable[Batch],
    epochs: int = 1,
    *,
    freeze_base: bool = True,
    train_routers: bool = False,
    unfreeze_after: int | None = None,
    auxiliary_loss: float = 0.01,
    z_loss: float = 1e-3,
    replay: Iterable[Batch] | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> None:
    """Train new experts on a domain, while the base stays as it is, bit for bit.

    Args:
        model: a stock model with experts.
        new_expert_indices: the last ones of each layer.
        domain_dataloader: as for `adapt_router`.
        freeze_base: False trains all parameters.
        train_routers: let the routers go on learning.
        unfreeze_after: steps after which the base is trained too. Default: never.
        seed: of what layers draw in training, as for dropout.

    Raises:
        RequestError: no experts, no such experts, or `unfreeze_after` without a frozen base.
    """
    experts = checked_experts(model, new_expert_indices)
    if unfreeze_after is not None and not freeze_base:
        raise RequestError("unfreeze_after: with freeze_base=False nothing is frozen.")
    batches = LoaderBatches(domain_dataloader, epochs, replay=replay)

    def is_trained(tensor: LogicalTensor) -> bool:
        is_new = tensor.expert in experts
        return not freeze_base or is_new or (train_routers and is_router(tensor))

    separated = separate_experts(model, experts[0]) if freeze_base else nullcontext()
    with separated, only_trainable(model, is_trained):
        controls: list[Callback] = []
        if unfreeze_after is not None:
            held = [p for p in model.parameters() if not p.requires_grad]
            controls.append(Unfreezing(held, after_steps=unfreeze_after))
        _train(
            model,
            batches,
            RoutingSettings(auxiliary_loss=auxiliary_loss, z_loss=z_loss),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            controls=controls,
            seed=derived_seed(seed, "experts"),
        )


def check_router_update(word: str) -> None:
    """Refuse a word that says nothing about routers.

    Raises:
        RequestError: names those that do.
    """
    if word not in ROUTER_UPDATES:
        raise RequestError(f"router_update = {word!r}: must be one of {', '.join(ROUTER_UPDATES)}.")


def checked_experts(model: nn.Module, indices: Sequence[int]) -> tuple[int, ...]:
    """Return indices of new experts in their order.

    Raises:
        RequestError: the model has no experts, or these are not its last ones.
    """
    routing = Routing.of(model)
    if routing is None:
        raise RequestError("adaptation: the model has no experts; expand it with moe first.")
    experts = tuple(sorted(set(indices)))
    last = tuple(range(routing.num_experts - len(experts), routing.num_experts))
    if not experts or experts != last or not last[0] > 0:
        raise RequestError(
            f"new_expert_indices = {list(indices)}: new experts are the last of the "
            f"{routing.num_experts} of a layer, and at least one stands before them."
        )
    return experts


def redraw_rows(model: nn.Module, experts: Sequence[int], *, seed: int) -> None:
    """Draw the router rows of new experts anew, with the deviation of each router's other rows."""
    routing = Routing.of(model)
    assert routing is not None
    for layer in routing.layers:
        generator = torch.Generator().manual_seed(derived_seed(seed, "router", layer))
        weight = routing.router(layer).weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            drawn = torch.randn(len(experts), weight.shape[1], generator=generator)
            weight[list(experts)] = (drawn * weight[: experts[0]].std().cpu()).to(weight)


def _train(
    model: nn.Module,
    batches: LoaderBatches,
    settings: RoutingSettings,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    controls: Sequence[Callback],
    seed: int,
) -> None:
    """Train what needs a gradient at one rate, the terms of the routers in the loss."""
    module = BaseModule(
        model,
        schedule=Schedule.constant(learning_rate, max_steps=len(batches)),
        optimizer=OptimizerSettings(weight_decay=weight_decay),
        side_losses=[RoutingObjective(model, settings), *batches.side_losses],
    )
    fit_live(module, batches, seed=seed, controls=controls)


class ExpertOpening(Callback):
    """Raise the router offset of appended experts before each step of a training.

    Args:
        added: what they are when the training begins.
        anneal_steps: steps from the appending on, after which the offset is 0.
    """

    def __init__(self, added: AddedExperts, *, anneal_steps: int) -> None:
        self._added = added
        self._anneal_steps = anneal_steps

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._at(trainer.global_step).apply(base_of(pl_module).model)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at(trainer.global_step).apply(base_of(pl_module).model)

    def _at(self, step: int) -> AddedExperts:
        return self._added.at(self._added.step + step, anneal_steps=self._anneal_steps)


class Unfreezing(Callback):
    """Hold parameters still until a step, then let them be trained.

    They need gradients from now on, so that the optimizer takes them in at the start; one that has
    none in a step is passed over there: it is not decayed and has no state. In one process only:
    DDP waits for the gradients of all that it was shown.

    Args:
        parameters: those that are held.
        after_steps: of this training.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, after_steps: int) -> None:
        self._parameters = tuple(parameters)
        self._after_steps = after_steps
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(trainer.global_step >= self._after_steps)


def is_router(tensor: LogicalTensor) -> bool:
    """Return whether a tensor is a router's."""
    return tensor.kind == "router"


@contextmanager
def only_trainable(model: nn.Module, is_trained: Callable[[LogicalTensor], bool]) -> Iterator[None]:
    """Let only some tensors of a live model need a gradient inside the block, whatever happens.

    Args:
        is_trained: says so of a tensor; a parameter that holds several needs a gradient for all
            of them, or none.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    known = {stored.name: stored for stored in live_layout(model)}
    try:
        for name, parameter in model.named_parameters():
            stored = known.get(name) or declared(name, tuple(parameter.shape))
            parameter.requires_grad_(all(is_trained(part.tensor) for part in stored.parts))
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


# Some experts of a layer on their own, so that the others can be frozen.
#
# A stock model holds all experts of a layer in one parameter, which is trained whole or not at
# all: with a gradient of zero its old part would still move under weight decay and old momentum.
# Here the parameter is taken apart into that of the base's experts, which needs no gradient and
# so stays out of the optimizer, and that of the new ones; each forward pass puts them together.
# Cost: a copy of the experts' weights in every forward pass.

_HANDLES = "separate_experts_handles"


class SeparateExperts:
    """The experts of a model, taken apart at one index.

    Args:
        model: a stock model with experts, which is changed.
        first_new: experts from this one on are new.

    Raises:
        RequestError: the model has no experts, or none on one of the sides.
    """

    def __init__(self, model: nn.Module, first_new: int) -> None:
        routing = Routing.of(model)
        if routing is None:
            raise RequestError("adaptation: the model has no experts.")
        if not 0 < first_new < routing.num_experts:
            raise RequestError(
                f"adaptation: new experts from {first_new} on; of {routing.num_experts} experts "
                f"must be 1 to {routing.num_experts - 1}."
            )
        self.first_new = first_new
        self.names = shared_names(model)
        self._attributes: dict[nn.Module, list[str]] = {}
        for name in self.names:
            module, _, attribute = name.rpartition(".")
            self._attributes.setdefault(model.get_submodule(module), []).append(attribute)

    def split_shared(self) -> None:
        """Replace each shared parameter by its two parts; the base's needs no gradient."""
        for module, attributes in self._attributes.items():
            for attribute in attributes:
                whole = module.get_parameter(attribute)
                delattr(module, attribute)
                base, new = (part.clone() for part in whole.detach().tensor_split([self.first_new]))
                module.register_parameter(attribute + BASE, nn.Parameter(base, requires_grad=False))
                needs_grad = whole.requires_grad
                module.register_parameter(attribute + NEW, nn.Parameter(new, needs_grad))
            # During its forward pass a module finds the whole under its old name
            before = partial(_put_together, tuple(attributes))
            after = partial(_forget, tuple(attributes))
            module.__dict__[_HANDLES] = [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, always_call=True),
            ]

    def join(self) -> None:
        """Put the parts together again; the base's values are those from before, bit for bit."""
        for module, attributes in self._attributes.items():
            for handle in module.__dict__.pop(_HANDLES):
                handle.remove()
            for attribute in attributes:
                parts = [module.get_parameter(attribute + ending) for ending in (BASE, NEW)]
                for ending in (BASE, NEW):
                    delattr(module, attribute + ending)
                whole = torch.cat([part.detach() for part in parts])
                needs_grad = any(part.requires_grad for part in parts)
                module.register_parameter(attribute, nn.Parameter(whole, needs_grad))

    def follow(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values by parameter name for the parts in place of the whole."""
        followed = dict(values)
        for name in self.names:
            if name in followed:
                whole = followed.pop(name)
                followed[name + BASE] = whole[: self.first_new]
                followed[name + NEW] = whole[self.first_new :]
        return followed


@contextmanager
def separate_experts(model: nn.Module, first_new: int) -> Iterator[SeparateExperts]:
    """Take the experts of a model apart inside the block, and join them whatever happens.

    Raises:
        RequestError: the model has no experts, or none on one of the sides.
    """
    parts = SeparateExperts(model, first_new)
    parts.split_shared()
    try:
        yield parts
    finally:
        parts.join()


def shared_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that all experts of a layer share."""
    stored = layout(config_of(model), "live")
    return tuple(tensor.name for tensor in stored if tensor.is_of_experts)


def _put_together(attributes: Sequence[str], module: nn.Module, arguments: Any) -> None:
    for attribute in attributes:
        # Tensors that are no parameters where gradients are taken of a functional call
        parts = (getattr(module, attribute + ending) for ending in (BASE, NEW))
        setattr(module, attribute, torch.cat(tuple(parts)))


def _forget(attributes: Sequence[str], module: nn.Module, arguments: Any, output: Any) -> None:
    for attribute in attributes:
        module.__dict__.pop(attribute, None)


# Which expert a domain moves most: the one to clone for it.
#
# Utility of an expert = mean over batches of Σ |∂L/∂w · w| over its weights: the first-order
# change of the loss if they were taken away (Molchanov et al. 2019, arXiv 1906.10771, without the
# square). The choice of what to clone by gradients is that of Expert Upcycling (arXiv
# 2604.19835); here the most useful expert of each layer gives all the new ones of it.


def expert_utility(model: nn.Module, sequences: Tensor, *, batch_size: int = 8) -> Tensor:
    """Return the utility of every expert, [layers that have experts, E].

    Args:
        sequences: integers [N, T], of the domain.

    Raises:
        RequestError: the model has no experts, or there is no sequence.
    """
    routing = Routing.of(model)
    if routing is None or not len(sequences):
        raise RequestError("expert utility needs a model with experts, and text.")
    shared = [stored for stored in live_layout(model) if stored.is_of_experts]
    weights = [model.get_parameter(stored.name) for stored in shared]
    rows: dict[int | None, int] = {layer: row for row, layer in enumerate(routing.layers)}
    utility = torch.zeros(len(rows), routing.num_experts)
    device, batches = weights[0].device, sequences.split(batch_size)
    with modes_kept(model):
        model.eval()
        for batch in batches:
            ids = batch.long().to(device)
            loss = model(input_ids=ids, labels=labels_of(model, ids), use_cache=False).loss
            for stored, weight, gradient in zip(
                shared, weights, torch.autograd.grad(loss, weights), strict=True
            ):
                change = (gradient * weight).detach().abs().flatten(1).sum(dim=1)
                utility[rows[stored.layer]] += change.float().cpu() / len(batches)
    return utility


def best_experts(model: nn.Module, sequences: Tensor, *, batch_size: int = 8) -> tuple[int, ...]:
    """Return the expert of the highest utility, for each layer that has experts."""
    return tuple(expert_utility(model, sequences, batch_size=batch_size).argmax(dim=1).tolist())


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
        place, seed = config.domain_data_path, self.seed
        batches = None if place is None else self._batches(model, place)
        grown = ModelExpander([MoeAdd(num_experts=config.new_experts)], seed=seed).expand(model)
        if batches is not None:
            new = range(config.base_experts, config.base_experts + config.new_experts)
            adapt_router(grown, new, batches, router_update=config.router_update, seed=seed)
            train_new_experts(grown, new, batches, freeze_base=config.freeze_base, seed=seed)
        return grown

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
