"""The model of a step through torch.compile, and when it is compiled anew."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BACKEND = "inductor"


class CompiledModel:
    """Calls a model as torch.compile makes it: the same modules, parameters and names.

    Compiled at the first call, in the process that trains. Evaluations are better off with the
    model itself: each shape of theirs would be compiled too.

    Args:
        model: it stays as it is.

    Attributes:
        is_watched: hooks stand on modules inside, which compiled code would pass over: the model
            itself computes until they are gone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._compiled: Callable[..., Any] | None = None
        self.is_watched = False

    def __call__(self, **inputs: Any) -> Any:
        if self.is_watched:
            return self._model(**inputs)
        if self._compiled is None:
            self._compiled = torch.compile(self._model, backend=BACKEND)
        return self._compiled(**inputs)

    def forget(self) -> None:
        """Compile at the next call what the model is then.

        By itself torch would do so a few times, and then never compile the model again.
        """
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()
