"""More experts in a mixture-of-experts model: appended and disabled at first, or doubled.

`append` adds any number of experts. A logit offset of −∞ keeps tokens away from them, which
preserves the function for any weights; training raises the offset to 0. Stock classes ignore the
offset, so until then the folder is exact in Tritter only. `replicate` doubles the experts and the
experts per token: each token is routed to both copies of its experts at half the weight (a softmax
over twice the experts, or a renormalised top-k). That is exact in stock classes too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tritter.core.expansions.specification import ExpansionSpec
from tritter.core.families import Config, LogicalTensor, Model, logical_name
from tritter.core.parameter_map import AxisFactor, AxisMap, Fill, ParameterMap, TensorMap
from tritter.errors import Problem, RequestError, key_name, refused
from tritter.limits import MAX_EXPERTS
from tritter.options import Text, options
from tritter.seeds import derived_seed

_ROUTES = ("routes", "experts")  # spaces with a coordinate for each expert
_DEFAULT_APPENDED = 4
_DEFAULT_NOISE = 0.01


@options
class MoeAdd:
    """More experts in every layer that has experts.

    Args:
        num_experts: number of added experts. Default: 4 for append; replicate doubles the experts.
        addition: `append`, exact in Tritter, with a router offset that starts at −∞; or
            `replicate`, twice the experts and twice as many per token, exact in stock classes.
        init: of appended experts and their router rows: `clone` of one expert, `mean` of all,
            `random` with the mean and deviation of the existing ones, `best`: clone of the expert
            of each layer with the largest gradient on domain data, or `distill`: clones that
            learn from `teacher` before any token is routed to them.
        clone_from: the expert to clone: one index, or one for each layer with experts. Default: 0;
            under `best` the experts that the data selects.
        teacher: folder or hub id of a model with the same vocabulary, for `distill`.
        noise: relative standard deviation of the noise on new copies of experts, and on the router
            rows of appended ones; without it copies stay equal.
    """

    name: ClassVar[str] = "moe_add"
    new_blocks_only: ClassVar[bool] = False
    expansion_type: ClassVar[str] = "moe"
    num_experts: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = None
    addition: Literal["append", "replicate"] = "append"
    init: Literal["clone", "mean", "random", "best", "distill"] = "clone"
    clone_from: tuple[Annotated[int, Field(ge=0, le=MAX_EXPERTS)], ...] | None = None
    teacher: Text | None = None
    noise: Annotated[float, Field(ge=0)] = _DEFAULT_NOISE

    @property
    def is_append(self) -> bool:
        return self.addition == "append"

    @property
    def is_chosen_by_data(self) -> bool:
        """True if domain data must select the experts to clone."""
        return self.init == "best" and self.clone_from is None

    @property
    def is_exact(self) -> bool:
        """True for append with any weights: no token is routed to new experts at step 0."""
        return self.is_append or self.noise == 0

    def problems(self, before: Sequence[ExpansionSpec], *, has_experts: bool) -> Iterator[Problem]:
        """Yield the problems of the initialisation of new experts in a run.

        Args:
            before: expansions of the run before this one.
            has_experts: the initial model of the run has experts.
        """
        if not self.is_chosen_by_data:
            return
        key, reason = "expansion.moe_add.init", ""
        if not has_experts:
            reason = (
                "the experts that moe makes from one FFN are equal; use clone, or add experts to a "
                "model that already has experts"
            )
            yield Problem(key, self.init, reason=reason)
        if deeper := [spec.name for spec in before if spec.expansion_type == "depth"]:
            reason = (
                "the experts are chosen layer by layer in the initial model; put moe_add before "
                f"{' and '.join(deeper)}"
            )
            yield Problem(key, self.init, reason=reason)

    def target_config(self, source: Model) -> Config:
        layers = sparse_layers(source)
        size, family = source.sizes, source.family
        self._check_options(size.num_experts, len(layers))
        if self.is_append and not family.has_table:
            reason = f"the family {source.model_type} has no table; use replicate"
            raise refused("expansion.moe_add.addition", "append", reason)
        if self.is_append:
            added = self.num_experts or _DEFAULT_APPENDED
            if self.init == "distill" and added < size.experts_per_token:
                raise refused(
                    "expansion.moe_add.num_experts",
                    added,
                    f"{key_name('expansion.moe_add.init')}=distill sends every token to "
                    f"{size.experts_per_token} of the new experts; must be at least "
                    f"{size.experts_per_token}",
                )
            total = size.num_experts + added
            return family.with_experts(source.config, total, size.experts_per_token)
        if self.num_experts not in (None, size.num_experts):
            addition = key_name("expansion.moe_add.addition")
            raise refused(
                "expansion.moe_add.num_experts",
                self.num_experts,
                f"{addition}=replicate doubles the {size.num_experts} experts, so it adds "
                f"{size.num_experts}; {addition}=append adds any number",
            )
        return family.with_experts(source.config, 2 * size.num_experts, 2 * size.experts_per_token)

    def parameter_map(self, source: Model, target: Model, *, seed: int) -> ParameterMap:
        if self.is_chosen_by_data:
            raise refused(
                "expansion.moe_add.init",
                "best",
                "domain data selects the expert, so it needs a run of train.py, or "
                f"--domain-data; or use clone with {key_name('expansion.moe_add.clone_from')}",
            )
        layers, chosen = sparse_layers(source), self.clone_from or (0,)
        experts = chosen if len(chosen) > 1 else chosen * len(layers)
        cloned: dict[int | None, int] = dict(zip(layers, experts, strict=True))
        old, new = (model.sizes.num_experts for model in (source, target))
        tensors, shapes = dict[str, TensorMap](), target.shapes
        for tensor in target.tensors:
            name = tensor.name
            if not self.is_append:
                rows = shapes[name][0] if tensor.axes else 1
                tensors[name] = self._replicated(tensor, rows, old, new, seed)
            elif tensor.kind == "router":
                tensors[name] = self._router(name, cloned[tensor.layer], old, new, seed)
            elif tensor.expert is None or tensor.expert < old:
                tensors[name] = TensorMap(source=name)
            else:
                clone = cloned[tensor.layer]
                tensors[name] = self._appended(tensor, clone, old, shapes[name], seed)
        num_layers = source.sizes.num_hidden_layers
        return ParameterMap(tensors=tensors, layer_sources=tuple(range(num_layers)))

    def _replicated(
        self, tensor: LogicalTensor, rows: int, num_old: int, num_new: int, seed: int
    ) -> TensorMap:
        """Return the map of a tensor when each expert gets a copy, with half of the gradient."""
        import torch

        is_copy = tensor.expert is not None and tensor.expert >= num_old
        noise = self.noise if is_copy else 0.0
        axes: list[AxisFactor | None] = [None] * len(tensor.axes)
        source, noise_seed = tensor.name, 0
        if tensor.expert is not None:
            noise_seed = derived_seed(seed, "noise", tensor.name)
            ones = torch.ones(rows, dtype=torch.float64)
            axes[0] = AxisFactor(torch.arange(rows), ones, ones / 2)
            source = _of_expert(tensor, tensor.expert % num_old)
        else:
            share = torch.full((num_new,), 0.5, dtype=torch.float64)
            routes = AxisMap.copied(num_old, torch.arange(num_new) % num_old, share)
            for number, axis in enumerate(tensor.axes):
                if axis.space.kind in _ROUTES:
                    rest = axis.length - num_new if axis.length else 0  # routes to no expert
                    axes[number] = AxisFactor.writes_nonlinear(routes.arranged((1,), rest))
                    if tensor.kind.startswith("experts."):
                        noise, noise_seed = self.noise, derived_seed(seed, "noise", tensor.name)
        return TensorMap(
            source=source,
            axes=tuple(axes) if any(axes) else (),
            noise=noise,
            noise_seed=noise_seed,
            is_copy=is_copy,
        )

    def _appended(
        self, tensor: LogicalTensor, source: int, num_old: int, shape: Sequence[int], seed: int
    ) -> TensorMap:
        """Return the map of a new expert's matrix, with fresh state."""
        import torch

        if self.init == "random":
            zeros = torch.zeros(shape[0], dtype=torch.float64)
            axes: list[AxisFactor | None] = [None] * len(shape)
            axes[0] = AxisFactor(torch.full((shape[0],), -1), zeros, zeros.clone())
            fill = Fill("matched", seed=derived_seed(seed, "fill", tensor.name))
            return TensorMap(_of_expert(tensor, 0), tuple(axes), fill=fill, state="fresh")
        blend = tuple(_of_expert(tensor, e) for e in range(1, num_old))
        is_mean = self.init == "mean"
        return TensorMap(
            source=_of_expert(tensor, 0 if is_mean else source),
            blend=blend if is_mean else (),
            state="fresh",
            noise=self.noise,
            noise_seed=derived_seed(seed, "noise", tensor.name),
            is_copy=True,
        )

    def _router(self, name: str, source: int, num_old: int, num_new: int, seed: int) -> TensorMap:
        """Return the map of a router; without noise, top-k would choose among equal scores."""
        import torch

        routes = AxisMap.padded(num_old, num_new)
        axes = (AxisFactor.writes_nonlinear(routes), None)
        if self.init == "random":
            fill = Fill("matched", seed=derived_seed(seed, "fill", name))
            return TensorMap(name, axes, fill=fill)
        if self.init == "mean":
            made = TensorMap(TensorMap(name, axes, fill=Fill("row_mean")), is_copy=True)
        else:
            index = torch.where(routes.source >= 0, routes.source, source)
            ones = torch.ones(num_new, dtype=torch.float64)
            made = TensorMap(name, (AxisFactor(index, ones, ones), None))
        made = replace(made, noise=self.noise, noise_seed=derived_seed(seed, "noise", name))
        return TensorMap(name, axes, fill=Fill("copy", donor=made))

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        old, new = source.sizes, target.sizes
        before, after = (model.num_active_parameters for model in (source, target))
        grown = f"experts {old.num_experts} → {new.num_experts}"
        if self.is_append:
            return (
                f"{grown}, still {new.experts_per_token} per token ({after:,} active parameters)",
                "a router offset of -inf in state/ disables the new experts; stock transformers "
                "computes the same function only after training has raised it to 0",
            )
        per_token = f"{old.experts_per_token} → {new.experts_per_token} per token"
        return (f"{grown}, {per_token} (active parameters {before:,} → {after:,})",)

    def _check_options(self, num_experts: int, num_layers: int) -> None:
        init, addition = map(key_name, ("expansion.moe_add.init", "expansion.moe_add.addition"))
        if not self.is_append and (self.init != "clone" or self.clone_from is not None):
            key, value = (
                ("init", self.init)
                if self.init != "clone"
                else ("clone_from", list(self.clone_from or ()))
            )
            raise refused(
                f"expansion.moe_add.{key}",
                value,
                f"it requires {addition}=append; {addition}=replicate clones every expert",
            )
        if (self.init == "distill") != (self.teacher is not None):
            raise refused(
                "expansion.moe_add.teacher",
                self.teacher,
                f"{init}=distill requires a teacher, a folder or hub id, and other values do not "
                f"use one ({init} = {self.init})",
            )
        if self.init in ("mean", "random") and self.clone_from is not None:
            raise refused(
                "expansion.moe_add.clone_from",
                list(self.clone_from),
                f"{init}={self.init} does not clone an expert; use {init}=clone",
            )
        if self.init == "random" and self.noise not in (0, _DEFAULT_NOISE):
            raise refused(
                "expansion.moe_add.noise",
                self.noise,
                f"only copies get noise, and {init}=random makes none; use {init}=clone or "
                f"{init}=mean",
            )
        donors = () if self.clone_from is None else self.clone_from
        wrong = [expert for expert in donors if not 0 <= expert < num_experts]
        reason = ""
        if self.clone_from is not None and len(donors) not in (1, num_layers):
            reason = f"must be one expert, or one for each of {num_layers} layers with experts"
        elif wrong:
            reason = f"there is no expert {wrong[0]}; must be from 0 to {num_experts - 1}"
        if reason:
            raise refused("expansion.moe_add.clone_from", list(donors), reason)


def sparse_layers(source: Model) -> tuple[int, ...]:
    """Return the layers that have experts."""
    sparse = tuple(layer for layer, kind in enumerate(source.layer_kinds) if kind == "sparse")
    if not sparse:
        first = "; apply moe first" if source.family.has_table else ""
        reason = f"this {source.model_type} model has no experts{first}"
        raise RequestError(Problem("expansion.moe_add", reason=reason))
    return sparse


def _of_expert(tensor: LogicalTensor, expert: int) -> str:
    """Return the name of the same matrix of another expert."""
    return logical_name(tensor.kind, layer=tensor.layer, expert=expert)
