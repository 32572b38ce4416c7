"""The fit of every training, for live models and loaders of one's own: no run folder, no words."""

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain, cycle, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning import Callback
from torch import Tensor, device, nn

from tritter.errors import TritterError
from tritter.evaluation.inference import device_of, modes_kept
from tritter.stopping import Stopped
from tritter.terminal import Console
from tritter.training import BaseModule, SideLoss, TrainerSettings, fit
from tritter.training.checkpoint_io import random_state, restore_random_state

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
                settings=_settings(home, seed),
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


def _settings(home: device, seed: int) -> TrainerSettings:
    """Return those of a model as it is: in its own dtype, on its own device."""
    return TrainerSettings(
        accelerator="gpu" if home.type == "cuda" else home.type,
        devices=1 if home.index is None else [home.index],
        precision="32-true",
        max_non_finite_steps=0,
        save_every_n_steps=0,
        progress="off",
        seed=seed,
    )
