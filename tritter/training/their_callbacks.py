"""Callbacks that a run is asked for, built from their options where the training runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from tritter.errors import RequestError
from tritter.targets import TARGET, NamedTarget, built, imported

CHECKPOINTS_NAME = "checkpoints"  # where a ModelCheckpoint writes, below the training's folder


@dataclass(frozen=True, slots=True, kw_only=True)
class TheirCallbacks:
    """What a LightningModule adds to the callbacks of its Trainer, when the fit begins.

    Args:
        options: in the order in which they were asked for.
        folder: of the training.
        last: stands behind them.
    """

    options: Sequence[NamedTarget]
    folder: Path
    last: Callback

    def build(self) -> list[Callback]:
        """Return them all, those that write checkpoints before `last`.

        Raises:
            RequestError: two of them save their state under one name.
        """
        named = {one.name: self._build(one) for one in self.options}
        _check_states(named)
        return [*named.values(), self.last]

    def _build(self, options: NamedTarget) -> Callback:
        body = dict(options.body)
        if issubclass(imported(body[TARGET]), ModelCheckpoint):  # which would take it from the cwd
            body["dirpath"] = str(self.folder / (body.get("dirpath") or CHECKPOINTS_NAME))
        callback = built(body)
        assert isinstance(callback, Callback)
        return callback


def _check_states(named: Mapping[str, Callback]) -> None:
    first: dict[str, str] = {}
    for name, callback in named.items():
        other = first.setdefault(callback.state_key, name)
        if other != name and type(callback).state_dict is not Callback.state_dict:
            raise RequestError(
                f"callbacks.{name} and callbacks.{other} are both {callback.state_key}: nothing "
                "tells their saved states apart; let them differ in what they monitor, or leave "
                "one out."
            )
