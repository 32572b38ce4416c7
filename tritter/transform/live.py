"""Expansion of live models, by the names that the literature uses.

The same pure functions as `tritter.transform.folder` on folders; each returns a new model on the
CPU and leaves the one it was given as it was.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritter.checkpoints import (
    ExpansionRecord,
    Lineage,
    Source,
    read_lineage,
    write_checkpoint,
)
from tritter.checkpoints.folder import Artifact, TokenizerFiles
from tritter.checkpoints.location import check_output, check_replaceable
from tritter.checkpoints.state import LazyTensors
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    ResolvedExpansion,
    Width,
    build_steps,
    checked_specs,
    composed,
)
from tritter.core.expansions.heads import Strategy, copied_sources, split_shares
from tritter.core.expansions.width import Init, Shares
from tritter.core.families import Config, family_of, layout, match, unpack_all
from tritter.core.models import config_of, model_with_tensors, named_tensors, read_config
from tritter.core.parameter_map import AxisFactor, AxisMap, TensorMap, map_tensor, rounded_weight
from tritter.core.stock_routers import AddedExperts
from tritter.errors import RequestError
from tritter.storage.hashing import merkle_hash, tensor_digest
from tritter.storage.reading import named_path
from tritter.storage.writer import TensorStream
from tritter.transform.change import Change
from tritter.transform.folder import added_experts, expansion_records


class ModelExpander:
    """Expansions in order, applied to live models.

    Args:
        specs: what is to be done, such as `[Width(hidden_size=2048), LlamaPro()]`.
        seed: what random fills and choices are drawn from.
    """

    def __init__(self, specs: Sequence[ExpansionSpec], *, seed: int = 0) -> None:
        self.specs = checked_specs(specs)
        self.seed = seed

    def steps(self, config: Config) -> tuple[ResolvedExpansion, ...]:
        """Resolve the expansions against a config.

        Raises:
            RequestError: unknown family, or targets that cannot be had.
        """
        return build_steps(config, self.specs, seed=self.seed)

    def change(self, model: nn.Module) -> Change:
        """Return what the expansions change of a live model; nothing is changed yet.

        Raises:
            RequestError: unknown family, or targets that cannot be had.
        """
        config = config_of(model)
        steps = self.steps(config)
        return Change.of(composed(steps, config), config, steps[-1].target_config)

    def expand(self, model: nn.Module) -> nn.Module:
        """Return the expanded model.

        Raises:
            RequestError: unknown family, or targets that cannot be had.
        """
        return self._expanded(model, self.steps(config_of(model)))

    def write(self, model: nn.Module, folder: Path, *, overwrite: bool = False) -> Lineage:
        """Write the expanded model as a checkpoint folder and return its lineage.

        The lineage starts with the model's own tensors. Tokenizer files are copied from the folder
        that the model was loaded from, if it still exists.

        Raises:
            RequestError: unknown family, impossible targets, or a folder that may not be written.
        """
        origin = Path(str(getattr(model, "name_or_path", "") or ""))
        sources = (origin,) if origin.name and origin.is_dir() else ()
        check_output(folder, sources=sources, overwrite=overwrite)
        config = config_of(model)
        steps = self.steps(config)
        digests = {n: tensor_digest(n, t.cpu()) for n, t in named_tensors(model, config)}
        parent = merkle_hash(digests)
        added = added_experts(AddedExperts.of(model), steps)
        lineage = Lineage(
            model_hash="",
            parent_hash=parent,
            parent_tensor_digests=digests,
            base_model_hash=parent,
            tensor_digests={},
            file_digests={},
            expansion_history=expansion_records(steps, seed=self.seed),
            stock_loadable="yes" if added is None else "after adaptation",
        )
        return write_model(
            self._expanded(model, steps),
            folder,
            lineage=lambda: lineage,
            artifacts=(*map(TokenizerFiles, sources), added),
            sources=sources,
            overwrite=overwrite,
        )

    def _expanded(self, model: nn.Module, steps: Sequence[ResolvedExpansion]) -> nn.Module:
        config, state = config_of(model), model.state_dict()
        held = unpack_all(match(config, state), state)
        maps = composed(steps, config).tensors

        def read(name: str) -> Tensor:
            stem = held[maps[name].origin or "embed"]
            value = rounded_weight(maps[name], held.__getitem__, stem.dtype)
            return value.to(stem, copy=maps[name].is_verbatim)  # else both models train the one

        target = steps[-1].target_config
        tensors = {t.name: read(t.name) for t in family_of(target).logical_tensors(target)}
        grown = model_with_tensors(target, tensors).train(model.training)
        added = added_experts(AddedExperts.of(model), steps)
        if added is not None:
            added.apply(grown)
        return grown


def write_model(
    model: nn.Module,
    folder: Path,
    *,
    lineage: Callable[[], Lineage],
    artifacts: Iterable[Artifact | None] = (),
    sources: Sequence[Path] = (),
    overwrite: bool = False,
) -> Lineage:
    """Write a live model as a checkpoint folder that stock transformers loads.

    Args:
        lineage: called after the tensors are written.
        artifacts: files next to the model; None entries are left out.
        sources: folders that the model was loaded from, which are never replaced.
        overwrite: replace a checkpoint at `folder`.

    Raises:
        RequestError: something is at `folder` and may not be replaced.
    """
    known = config_of(model)
    tensors = [(name, tensor.cpu()) for name, tensor in named_tensors(model, known)]
    widest = reduce(torch.promote_types, (tensor.dtype for _, tensor in tensors))
    config: Config = {
        **known,
        "architectures": [family_of(known).architecture],
        "dtype": str(widest).removeprefix("torch."),
    }
    return write_checkpoint(
        folder,
        config=config,
        tensors=TensorStream.of(tensors),
        lineage=lineage,
        artifacts=artifacts,
        overwrite=overwrite,
        check=partial(check_replaceable, sources=sources),
    )


def depth_upscale(
    model: nn.Module,
    target_layers: int | None = None,
    *,
    removal_layers: int | None = None,
    identity_init: bool = False,
) -> nn.Module:
    """Return a deeper model by SOLAR's rule (arXiv 2312.15166).

    Args:
        target_layers: even, above the present count and at most twice it. Default: the even
            count nearest to 1.5 times.
        removal_layers: layers that each copy drops. Default: what the target asks for.
        identity_init: zero what the copies write, so that the function is preserved.

    Raises:
        RequestError: the target cannot be had; names those that can.
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
    """Return a wider model; it computes the same but for `aki` and `split`.

    Args:
        new_hidden_size: Default: doubled when no other target is given.
        new_intermediate_size: Default: follows the hidden size by ratio.
        new_num_heads: Default: follows where the proportion is whole, else stays.
        new_num_kv_heads: as above.
        head_strategy: `fresh`, `copy`, `gqa` or `split`. Default: what `init` implies.
        init: `fresh`, `net2net`, `zero_pad` or `aki`.
        shares: `unequal` or `equal`, of the copies of neurons and heads.
        seed: of random fills and choices.

    Raises:
        RequestError: a target is smaller than what is there or not accepted by the family.
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

    Input and output keep their sizes. It computes the same, but for `split`, which also halves
    the size of a head, so that the new module wants rotary positions of that size.

    Args:
        attention: of a model of a supported family, such as `model.model.layers[0].self_attn`.
        strategy: `fresh`, `copy`, `gqa` or `split`.
        new_num_kv_heads: Default: as many as keep the size of a group where that is whole; under
            `gqa` they stay.
        shares: `unequal` or `equal`, of the copies under copy and gqa.
        seed: of random fills.

    Raises:
        RequestError: no attention module of a supported family, or head counts that cannot be
            had; names the nearest.
    """
    config = config_of(attention)
    family = family_of(config)
    layer = getattr(attention, "layer_idx", None)
    if layer is None:
        raise RequestError(f"{type(attention).__name__} has no layer_idx; it is no attention.")
    old = family.dimensions(config)
    kv_heads = new_num_kv_heads
    if kv_heads is None and strategy in ("fresh", "copy"):
        followed, rest = divmod(new_num_heads * old.num_key_value_heads, old.num_attention_heads)
        kv_heads = None if rest else followed
    spec = Width(
        num_attention_heads=new_num_heads,
        num_key_value_heads=kv_heads,
        head_strategy=strategy,
        shares=shares,
    )
    (step,) = build_steps(family.with_layers(config, [layer]), [spec], seed=seed)
    grown = deepcopy(attention.config)
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        key = family.sizes[name]
        setattr(grown, key, step.target_config[key])
    new = type(attention)(grown, layer).train(attention.training)
    prefix = "model.layers.0.self_attn."
    held = {prefix + name: value.detach() for name, value in attention.named_parameters()}
    before, after = (
        [stored for stored in layout(each, "live") if stored.name.startswith(prefix)]
        for each in (step.source_config, step.target_config)
    )
    for stored in before:
        if stored.name not in held:
            raise RequestError(
                f"{type(attention).__name__} has no {stored.name.removeprefix(prefix)}; it is no "
                f"attention of {family.model_type}."
            )
    values, maps = unpack_all(before, held), step.parameter_map.tensors
    for stored in after:
        value = stored.pack(lambda name: map_tensor(maps[name], values[name]))
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

    Rows are copied as they are; the share of each copied input is taken on the columns, so
    `new(copy(x)) = copy(old(x))`. To chain two layers, give the second the first one's
    `output_map` as its `input_map`.

    Args:
        input_map: which old input each new one copies, with shares; default: drawn from `seed`.
        output_map: the same of the outputs.

    Raises:
        RequestError: a size shrinks.
        ValueError: a map does not fit the layer.
    """
    inputs = input_map or copied_axis(linear.in_features, new_in_features, seed=seed)
    outputs = output_map or copied_axis(linear.out_features, new_out_features, seed=seed + 1)
    _check_fit(inputs, linear.in_features, new_in_features)
    _check_fit(outputs, linear.out_features, new_out_features)
    write, read = AxisFactor.writes(outputs), AxisFactor.reads(inputs)
    has_bias = linear.bias is not None
    new = nn.Linear(new_in_features, new_out_features, bias=has_bias, dtype=linear.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(_mapped(linear.weight, write, read))
        if has_bias:
            new.bias.copy_(_mapped(linear.bias, write))
    return new


def copied_axis(old_size: int, new_size: int, *, seed: int, equal: bool = False) -> AxisMap:
    """Return a map that copies coordinates in random rounds and splits their shares.

    Raises:
        RequestError: the axis would shrink.
    """
    if new_size < old_size:
        raise RequestError(f"{new_size} features are fewer than the layer's {old_size}.")
    source = copied_sources(old_size, new_size, seed=seed)
    return AxisMap.copied(old_size, source, split_shares(source, old_size, equal=equal))


def _mapped(tensor: Tensor, *axes: AxisFactor) -> Tensor:
    return map_tensor(TensorMap(source="", axes=axes), tensor.detach())


def _check_fit(axis_map: AxisMap, old_size: int, new_size: int) -> None:
    if (axis_map.old_size, axis_map.new_size) != (old_size, new_size):
        raise ValueError(
            f"a map from {axis_map.old_size} to {axis_map.new_size} met a layer that goes from "
            f"{old_size} to {new_size}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressiveCheckpoint:
    """What a checkpoint holds; tensors are read when they are asked for.

    Args:
        model_state_dict: name on disk → tensor.
        optimizer_state_dict: kind (`exp_avg`, `exp_avg_sq`, and what methods against forgetting
            keep) → name on disk → tensor; None where no state lies beside the model.
        scheduler_state_dict: `last_epoch`, the steps taken, from which the rate follows; None
            where no state lies beside the model.
        base_model_hash: Merkle hash at the start of the chain.
        training_config: what the last training was told; None where there was none.
        best_loss: nats per token; None where none was taken.
        benchmark_scores: domain or task → score, when it was last gated.
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
        """Open a checkpoint folder; a plain one of Hugging Face begins a chain.

        Raises:
            TritterError: it is damaged, or of a newer format.
        """
        place = named_path(folder, key="folder")
        config, lineage = read_config(place), read_lineage(place)
        source = Source(place, config, lineage)
        state = source.state
        if lineage is None:
            source.check()
            base_hash = merkle_hash(source.read_digests())
        else:
            base_hash = lineage.base_model_hash
        kinds = None if state is None else {k: LazyTensors(v) for k, v in state.kinds.items()}
        return cls(
            model_state_dict=LazyTensors(source.tensors),
            optimizer_state_dict=kinds,
            scheduler_state_dict=None if state is None else {"last_epoch": state.step},
            expansion_history=lineage.expansion_history if lineage else (),
            base_model_hash=base_hash,
            model_config=config,
            training_config=(lineage.training_config or None) if lineage else None,
            step=lineage.step if lineage else 0,
            epoch=lineage.epoch if lineage else 0,
            best_loss=lineage.best_loss if lineage else None,
            benchmark_scores=lineage.benchmark_scores if lineage else {},
        )
