"""Expansion of live models, under the names of the literature.

These functions apply the same maps as `tritter.transform.folder`. Each returns a new model on the
CPU and does not modify its argument.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritter.checkpoints import ExpansionRecord, Lineage, Source, write_checkpoint
from tritter.checkpoints.folder import Artifact, copy_small_files
from tritter.checkpoints.location import check_output, check_replaceable
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    ResolvedExpansion,
    Width,
    build_steps,
    check_specs,
)
from tritter.core.expansions.heads import Strategy, copied_axis
from tritter.core.expansions.width import Init, Shares
from tritter.core.families import Config, Model, unpack_all
from tritter.core.models import model_of, model_with_tensors, read_model
from tritter.core.parameter_map import AxisFactor, AxisMap, TensorMap
from tritter.core.stock_routers import AddedExperts
from tritter.errors import RequestError
from tritter.storage.hashing import merkle_hash, tensor_digest
from tritter.storage.hub import cached_snapshot
from tritter.storage.reading import named_path
from tritter.storage.writer import TensorStream
from tritter.transform.change import Change, PlannedExpansion


class ModelExpander:
    """Expansions in order, applied to live models.

    Args:
        specs: the expansions, such as `[Width(hidden_size=2048), LlamaPro()]`.
        seed: of random fills and choices.
    """

    def __init__(self, specs: Sequence[ExpansionSpec], *, seed: int = 0) -> None:
        self.specs = check_specs(specs)
        self.seed = seed

    def steps(self, model: Model) -> tuple[ResolvedExpansion, ...]:
        """Resolve the expansions against the shapes of a model."""
        return build_steps(model, self.specs, seed=self.seed)

    def change(self, model: nn.Module) -> Change:
        """Return the change of a live model without applying it.

        Raises:
            RequestError: unknown family, or impossible targets.
        """
        return PlannedExpansion.of(model_of(model), self.specs, seed=self.seed).change

    def expand(self, model: nn.Module) -> nn.Module:
        """Return the expanded model.

        Raises:
            RequestError: unknown family, or impossible targets.
        """
        return self._expand(model, self._plan(model, _model_of(model, is_whole=True)))

    def write(self, model: nn.Module, folder: Path, *, overwrite: bool = False) -> Lineage:
        """Write the expanded model as a checkpoint folder and return its lineage.

        The lineage starts with the model's own tensors. Tokenizer and licence files are copied from
        the folder, or snapshot of the hub, that the model was loaded from, if it still exists.

        Raises:
            RequestError: unknown family, impossible targets, or a folder that may not be written.
        """
        sources = tuple(_origin_of(model))
        check_output(folder, sources=sources, overwrite=overwrite)
        source = _model_of(model)
        plan = self._plan(model, source)
        digests = {n: tensor_digest(n, t.cpu()) for n, t in source.disk_tensors(model.state_dict())}
        parent = merkle_hash(digests)
        added = plan.added_experts
        lineage = Lineage(
            model_hash="",
            parent_hash=parent,
            parent_tensor_digests=digests,
            base_model_hash=parent,
            tensor_digests={},
            file_digests={},
            expansion_history=plan.records,
            stock_loadable="yes" if added is None else "after adaptation",
        )
        others = [partial(copy_small_files, source) for source in sources]
        return write_model(
            self._expand(model, plan),
            folder,
            lineage=lambda: lineage,
            artifacts=[*others, None if added is None else added.write],
            overwrite=overwrite,
        )

    def _plan(self, model: nn.Module, source: Model) -> PlannedExpansion:
        added = AddedExperts.of(model)
        return PlannedExpansion.of(source, self.specs, seed=self.seed, added=added)

    def _expand(self, model: nn.Module, plan: PlannedExpansion) -> nn.Module:
        state, target = model.state_dict(), plan.target
        held = unpack_all(plan.steps[0].source.match(state), state)
        maps = plan.parameter_map.tensors

        def read(name: str) -> Tensor:
            stem = held[maps[name].origin or "embed"]
            value = maps[name].rounded_weight(held.__getitem__, stem.dtype)
            return value.to(stem, copy=maps[name].is_verbatim)  # else both models train the one

        tensors = {t.name: read(t.name) for t in target.tensors}
        grown = model_with_tensors(target, tensors).train(model.training)
        if hasattr(model, "generation_config"):  # its end tokens, for example
            grown.generation_config = deepcopy(model.generation_config)
        if plan.added_experts is not None:
            plan.added_experts.apply(grown)
        return grown


def _origin_of(model: nn.Module) -> Iterator[Path]:
    """Yield the folder that a model was loaded from, if it is still on this machine."""
    name = str(getattr(model, "name_or_path", "") or "")
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    if Path(name).name and Path(name).is_dir():
        yield Path(name)
    elif (snapshot := cached_snapshot(name, revision=revision)) is not None:
        yield snapshot


def _model_of(live: nn.Module, *, is_whole: bool = False) -> Model:
    """Return `model_of`; a head that only the config ties is refused, as it would be left out."""
    model, state = model_of(live, is_whole=is_whole), live.state_dict()
    ties: Mapping[str, str] = getattr(live, "all_tied_weights_keys", {})
    for name in sorted(model.family.tied_names(model.config).keys() & state.keys() & ties.keys()):
        own, other = state[name], state.get(ties[name], state[name])
        if not own.is_set_to(other) and not own.equal(other):
            raise RequestError(
                f"{name} differs from {ties[name]}, although the config of the model ties them. To "
                "keep both, set config.tie_word_embeddings to False; otherwise, call tie_weights()."
            )
    return model


def write_model(
    model: nn.Module,
    folder: Path,
    *,
    lineage: Callable[[], Lineage],
    artifacts: Iterable[Artifact | None] = (),
    overwrite: bool = False,
) -> Lineage:
    """Write a live model as a checkpoint folder that stock transformers loads.

    Args:
        lineage: called after the tensors are written.
        artifacts: files next to the model; None entries are left out.
        overwrite: replace a checkpoint at `folder`.
    """
    known = _model_of(model)
    tensors = [(name, tensor.cpu()) for name, tensor in known.disk_tensors(model.state_dict())]
    widest = reduce(torch.promote_types, (tensor.dtype for _, tensor in tensors))
    config: Config = {
        **known.config,
        "architectures": [known.family.architecture],
        "dtype": str(widest).removeprefix("torch."),
    }
    return write_checkpoint(
        folder,
        config=config,
        tensors=TensorStream.of(tensors),
        lineage=lineage,
        artifacts=[*artifacts, partial(_write_generation_config, model)],
        overwrite=overwrite,
        check=check_replaceable,
    )


def _write_generation_config(model: nn.Module, folder: Path) -> None:
    """Write generation settings that a model's config lacks, unless a source's were copied."""
    settings: Any = getattr(model, "generation_config", None)
    if settings is None or (folder / "generation_config.json").exists():
        return
    of_config = type(settings).from_model_config(model.config)
    if settings.to_diff_dict() != of_config.to_diff_dict():
        # Not `save_pretrained`, which refuses what loading had accepted
        settings.to_json_file(folder / "generation_config.json", use_diff=True)


def depth_upscale(
    model: nn.Module,
    target_layers: int | None = None,
    *,
    removal_layers: int | None = None,
    identity_init: bool = False,
) -> nn.Module:
    """Return a deeper model by SOLAR's rule (arXiv 2312.15166).

    Args:
        model: the model to expand.
        target_layers: even, above the current number of layers and at most twice that number.
            Default: the even number nearest to 1.5 times.
        removal_layers: layers that each copy drops. Default: derived from the target.
        identity_init: zero the output projections of the copies, which preserves the function.

    Raises:
        RequestError: the target is impossible; lists the possible ones.
    """
    spec = Dus(target_layers=target_layers, drop_layers=removal_layers, identity_init=identity_init)
    return ModelExpander([spec]).expand(model)


def width_upscale(
    model: nn.Module,
    new_hidden_size: int | None = None,
    *,
    new_intermediate_size: int | None = None,
    new_num_heads: int | None = None,
    new_num_kv_heads: int | None = None,
    head_strategy: Strategy | None = None,
    init: Init = "fresh",
    shares: Shares = "unequal",
    seed: int = 0,
) -> nn.Module:
    """Return a wider model; function-preserving except with `aki` and `split`.

    Args:
        model: the model to expand.
        new_hidden_size: Default: twice the current size if no other target is set.
        new_intermediate_size: Default: scaled with the hidden size.
        new_num_heads: Default: scaled with the hidden size if the result is an integer, else
            unchanged.
        new_num_kv_heads: as `new_num_heads`.
        head_strategy: `fresh`, `copy`, `gqa` or `split`. Default: derived from `init`.
        init: `fresh`, `net2net`, `zero_pad` or `aki`.
        shares: `unequal` or `equal` shares of the copies of neurons and heads.
        seed: of random fills and choices.

    Raises:
        RequestError: a target is smaller than the current size, or the family rejects it.
    """
    spec = Width(
        hidden_size=new_hidden_size,
        intermediate_size=new_intermediate_size,
        num_attention_heads=new_num_heads,
        num_key_value_heads=new_num_kv_heads,
        head_strategy=head_strategy,
        init=init,
        shares=shares,
    )
    return ModelExpander([spec], seed=seed).expand(model)


def expand_attention_heads(
    attention: nn.Module,
    new_num_heads: int,
    strategy: Strategy = "fresh",
    *,
    new_num_kv_heads: int | None = None,
    shares: Shares = "unequal",
    seed: int = 0,
) -> nn.Module:
    """Return an attention module with more heads, its output projection included.

    Input and output keep their sizes. All strategies but `split` preserve the function. `split`
    halves the head size, so the new module needs rotary embeddings of that size.

    Args:
        attention: of a model of a supported family, such as `model.model.layers[0].self_attn`.
        new_num_heads: number of query heads.
        strategy: `fresh`, `copy`, `gqa` or `split`.
        new_num_kv_heads: Default: keeps the group size if possible; unchanged under `gqa`.
        shares: `unequal` or `equal` shares of the copies under `copy` and `gqa`.
        seed: of random fills.

    Raises:
        RequestError: not an attention module of a supported family, or impossible head counts;
            names the nearest possible ones.
    """
    source = model_of(attention)
    if (layer := getattr(attention, "layer_idx", None)) is None:
        raise RequestError(f"{type(attention).__name__} has no layer_idx: not an attention module.")
    old, kv_heads = source.sizes, new_num_kv_heads
    if kv_heads is None and strategy in ("fresh", "copy"):
        scaled, rest = divmod(new_num_heads * old.num_key_value_heads, old.num_attention_heads)
        kv_heads = None if rest else scaled
    spec = Width(
        num_attention_heads=new_num_heads,
        num_key_value_heads=kv_heads,
        head_strategy=strategy,
        shares=shares,
    )
    (step,) = build_steps(source.with_layers([layer]), [spec], seed=seed)
    grown = deepcopy(attention.config)
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        key = source.family.sizes[name]
        setattr(grown, key, step.target.config[key])
    new = type(attention)(grown, layer).train(attention.training)
    prefix = "model.layers.0.self_attn."
    tensors = {prefix + name: value.detach() for name, value in attention.named_parameters()}
    before, after = (
        [stored for stored in each.layout("live") if stored.name.startswith(prefix)]
        for each in (step.source, step.target)
    )
    for stored in before:
        if stored.name not in tensors:
            raise RequestError(
                f"{type(attention).__name__} has no {stored.name.removeprefix(prefix)}: not an "
                f"attention module of {source.model_type}."
            )
    values, maps = unpack_all(before, tensors), step.parameter_map.tensors
    for stored in after:
        value = stored.pack(lambda name: maps[name].apply(values[name]))
        module, _, attribute = stored.name.removeprefix(prefix).rpartition(".")
        setattr(new.get_submodule(module), attribute, nn.Parameter(value))
    return new


def expand_linear(
    linear: nn.Linear,
    new_in_features: int,
    new_out_features: int,
    *,
    input_map: AxisMap | None = None,
    output_map: AxisMap | None = None,
    seed: int = 0,
) -> nn.Linear:
    """Return a larger linear layer that computes copies of the old outputs (Net2Net).

    Rows are copied unchanged and columns are scaled by the share of each copied input, so
    `new(copy(x)) = copy(old(x))`. To chain two layers, pass the `output_map` of the first as the
    `input_map` of the second.

    Args:
        linear: the layer to expand.
        new_in_features: number of inputs.
        new_out_features: number of outputs.
        input_map: the old input that each new one copies, with shares. Default: drawn from `seed`.
        output_map: the old output that each new one copies. Default: drawn from `seed`.
        seed: of the default maps.

    Raises:
        RequestError: a size shrinks.
        ValueError: a map does not match the layer.
    """
    inputs = input_map or _copied_axis(linear.in_features, new_in_features, seed=seed)
    outputs = output_map or _copied_axis(linear.out_features, new_out_features, seed=seed + 1)
    _check_fit(inputs, linear.in_features, new_in_features)
    _check_fit(outputs, linear.out_features, new_out_features)
    write, read = AxisFactor.writes(outputs), AxisFactor.reads(inputs)
    has_bias = linear.bias is not None
    new = nn.Linear(new_in_features, new_out_features, bias=has_bias, dtype=linear.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(_map_parameter(linear.weight, write, read))
        if has_bias:
            new.bias.copy_(_map_parameter(linear.bias, write))
    return new


def _copied_axis(old_size: int, new_size: int, *, seed: int) -> AxisMap:
    """Return a map that copies coordinates in random rounds and splits their shares."""
    if new_size < old_size:
        raise RequestError(f"{new_size} features are fewer than the layer's {old_size}.")
    return copied_axis(old_size, new_size, seed=seed, equal=False)


def _map_parameter(tensor: Tensor, *axes: AxisFactor) -> Tensor:
    return TensorMap(source="", axes=axes).apply(tensor.detach())


def _check_fit(axis_map: AxisMap, old_size: int, new_size: int) -> None:
    if (axis_map.old_size, axis_map.new_size) != (old_size, new_size):
        raise ValueError(
            f"a map from {axis_map.old_size} to {axis_map.new_size} features does not match a "
            f"layer that grows from {old_size} to {new_size}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressiveCheckpoint:
    """The contents of a checkpoint; tensors are read on access.

    Args:
        model_state_dict: name on disk → tensor.
        optimizer_state_dict: kind of state (`fisher`, `anchor`, …) → name on disk → tensor; None
            for a checkpoint without state.
        scheduler_state_dict: `last_epoch`, the optimizer steps so far, which determine the
            learning rate; None for a checkpoint without state.
        expansion_history: its expansions, the oldest first.
        base_model_hash: Merkle hash of the first model of the lineage.
        model_config: config.json.
        training_config: settings of the last training run; None if there was none.
        step: optimizer steps of the last training run.
        epoch: epochs of the last training run.
        best_loss: validation loss in nats per token; None if it was never evaluated.
        benchmark_scores: domain or task → score at the last gate.
    """

    model_state_dict: Mapping[str, Tensor]
    optimizer_state_dict: Mapping[str, Mapping[str, Tensor]] | None
    scheduler_state_dict: Mapping[str, int] | None
    expansion_history: Sequence[ExpansionRecord]
    base_model_hash: str
    model_config: Config
    training_config: Mapping[str, Any] | None
    step: int
    epoch: int
    best_loss: float | None
    benchmark_scores: Mapping[str, float]

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "ProgressiveCheckpoint":
        """Open a checkpoint folder; a plain Hugging Face folder starts a lineage.

        Raises:
            TritterError: the checkpoint is damaged, or its format is newer.
        """
        path = named_path(folder, key="folder")
        lineage = Lineage.read(path)
        source = Source(path, read_model(path), lineage)
        state = source.state
        if lineage is None:
            source.check()
            base_hash = merkle_hash(source.read_digests())
        else:
            base_hash = lineage.base_model_hash
        return cls(
            model_state_dict=source.tensors,
            optimizer_state_dict=None if state is None else state.kinds,
            scheduler_state_dict=None if state is None else {"last_epoch": state.step},
            expansion_history=lineage.expansion_history if lineage else (),
            base_model_hash=base_hash,
            model_config=source.config,
            training_config=(lineage.training_config or None) if lineage else None,
            step=lineage.step if lineage else 0,
            epoch=lineage.epoch if lineage else 0,
            best_loss=lineage.best_loss if lineage else None,
            benchmark_scores=lineage.benchmark_scores if lineage else {},
        )
