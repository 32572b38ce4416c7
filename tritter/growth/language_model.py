"""A causal language model whose FFNs grow, in a training loop of one's own."""

from dataclasses import asdict
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from tritter.checkpoint import ExpansionRecord
from tritter.checkpoint.expert_files import refuse_experts
from tritter.errors import RequestError
from tritter.growth.growable import Counts, Growable, counted
from tritter.growth.keywords import GrowthKeywords, made_grower
from tritter.growth.linear import GrowableLinear
from tritter.growth.places import freeze_all_but_ffns
from tritter.growth.plain_loop import PlainLoop
from tritter.growth.record import growth_record, map_digest
from tritter.growth.saving import save_grown
from tritter.models import config_of, load_model
from tritter.storage.hub import locate
from tritter.storage.names import named_path

QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


class GrowableCausalLM(Growable, nn.Module):
    """A stock model, called as it is, whose layers get neurons while it is trained.

    What is not found here is the model's own: `generate`, `config`, `device`.

    Args:
        path_or_model: a folder, a hub id, or a Hugging Face model that is grown in place. No code
            of a folder is run.
        enable_growth: `check_and_grow` may change the model.
        freeze_attention: train the FFNs alone.
        dtype: that a folder's weights are loaded in.
        growth: see `tritter.growth.keywords.GrowthKeywords`.

    Raises:
        RequestError: no such folder, and the hub does not give it; a model of experts, with LoRA
            experts beside it, below adapters, or of a family that is not known; a keyword or a
            value that there is not.
    """

    model: nn.Module

    def __init__(
        self,
        path_or_model: str | PathLike[str] | nn.Module = QWEN,
        *,
        enable_growth: bool = True,
        freeze_attention: bool = False,
        dtype: torch.dtype = torch.float32,
        **growth: Unpack[GrowthKeywords],
    ) -> None:
        super().__init__()
        grower = made_grower(growth)
        self._folder: Path | None = None
        if isinstance(path_or_model, nn.Module):
            self.model = path_or_model
        else:
            self._folder = locate(fspath(path_or_model), key="path_or_model")
            refuse_experts(self._folder, doing="growth", key="path_or_model")
            self.model = load_model(self._folder, dtype=dtype).train()
        _check_no_layer_grows_by_itself(self.model)
        self._grows = enable_growth
        self._loop = PlainLoop(
            self.model,
            grower,
            check_every=growth.get("check_every", 1),
            is_watched=enable_growth,
        )
        self._start = config_of(self.model)
        if freeze_attention:
            freeze_all_but_ffns(self.model)
        for place in grower.places if enable_growth else ():
            self._loop.hook_into(self.model.get_submodule(place.module), place.layer)

    @property
    def neurons(self) -> list[int]:
        """How many each layer has."""
        return [place.width(self.model) for place in self._loop.grower.places]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Return what the stock model does."""
        return self.model(*arguments, **named)

    def check_and_grow(self, *, optimizer: torch.optim.Optimizer | None = None) -> Counts:
        """See `Growable.check_and_grow`; with `enable_growth=False` nothing happens."""
        if not self._grows:
            return counted(None)
        return super().check_and_grow(optimizer=optimizer)

    def save_pretrained(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder that stock transformers loads, and that `GrowableCausalLM` goes on from.

        FFNs that are narrower than the widest are padded with zeros, which changes nothing;
        tritter.json says how wide they are. A tokenizer comes along from where the model does.

        Raises:
            RequestError: something stands there and `overwrite` is off, or it is no checkpoint.
        """
        save_grown(
            self.model,
            named_path(folder, key="folder"),
            origin=self._folder,
            record=self._record() if self._loop.journal else None,
            overwrite=overwrite,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Return the growth so far, which goes along in `state_dict`."""
        return self._loop.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the shapes of a grown model before its weights are loaded."""
        self._loop.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_loop"):  # it is not there yet
                raise
            return getattr(self.model, name)

    def _record(self) -> ExpansionRecord:
        grower = self._loop.grower
        return growth_record(
            self._start,
            config_of(self.model),
            options=asdict(grower.asked),
            seed=grower.seed,
            digest=map_digest(self._loop.journal),
            is_exact=grower.is_exact,
        )


GrowableQwen = GrowableCausalLM  # the README's name


def _check_no_layer_grows_by_itself(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, GrowableLinear):
            raise RequestError(
                f"growth: {name} is a GrowableLinear, whose neurons other tensors of the model "
                "have to follow; leave a plain nn.Linear there, and the whole model grows."
            )
