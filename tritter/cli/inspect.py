"""`tritter inspect`: describe a checkpoint and the parameter map of its last expansion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tritter.cli.options import AsJson, Folder, flag, with_dashes
from tritter.cli.output import (
    SHAPES,
    CommandConsole,
    print_json,
    refuse_damage,
    shapes_of,
    short,
)
from tritter.errors import RequestError, TritterError
from tritter.loading import loading
from tritter.report.table import ACCURACY, MISSING, Table, count_text
from tritter.storage.hub import locate
from tritter.terminal import status

if TYPE_CHECKING:
    from torch import Tensor

    from tritter.checkpoints import ExpansionRecord, Source
    from tritter.core.families import Model
    from tritter.core.parameter_map import ParameterMap, TensorMap

_PARTS = (
    *("embedding", "positions", "attention", "FFN", "router", "experts", "norms", "other"),
    "output head",
)
_PART_OF = {
    "embed": "embedding",
    "embed_positions": "positions",
    "attention": "attention",
    "ffn": "FFN",
    "router": "router",
    "experts": "experts",
    "shared_expert": "experts",
    "shared_expert_gate": "router",
    "head": "output head",
    "norm": "norms",
}
_WITHOUT_MAP = {
    "experts": "none: the base is unchanged",
    "growth": "none: neurons were added during training",
    "vocab": "rows of old tokens are kept",
}
_MAX_FACTORS = 3
_PORTS = {"read": "reads ", "gain": "norm of "}  # what a tensor does with the space of an axis

_ShowFamily = Annotated[
    bool, flag("--family", "Show what can grow exactly, and the axes of the tensors.")
]


def _without_map(record: ExpansionRecord) -> str | None:
    """Return a description of an expansion whose record does not determine its map, or None."""
    if listed := record.options.get("experts_from"):
        is_list = isinstance(listed, list | tuple) and all(isinstance(one, str) for one in listed)
        return f"experts are the FFNs of {', '.join(listed) if is_list else 'other models'}"
    return _WITHOUT_MAP.get(record.expansion_type)


@dataclass(frozen=True, slots=True)
class _MapRow:
    """Tensors of one kind with the same mapping.

    Args:
        kind: kind of the logical tensors.
        layers: target layers, such as `0, 2-4`; empty for a tensor outside the layers.
        source_shape: shape before.
        target_shape: shape after.
        weight: factors of mapped weights.
        gradient: factors of mapped gradients.
        fill: value of entries without a source; for random ones the standard deviation.
        state: mapping of importances, and of optimizer moments during training.
    """

    kind: str
    layers: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    weight: str
    gradient: str
    fill: str
    state: str


@dataclass(frozen=True, slots=True)
class _RecordedMap:
    """The map of an expansion, rebuilt from its record.

    Args:
        digest: digest of the rebuilt map; None without a map or if rebuilding failed.
        problem: the reason of the failure, or a note that the digest differs from the record.
        rows: rows of the map's table.
    """

    digest: str | None = None
    problem: str | None = None
    rows: tuple[_MapRow, ...] = ()

    @classmethod
    def of(cls, record: ExpansionRecord) -> _RecordedMap:
        if _without_map(record) is not None:
            return cls()
        from tritter.core.families import Model

        try:
            with status("rebuilding the parameter map"):
                rebuilt = _rebuild_map(record)
            ends = (Model(dict(each)) for each in (record.source_config, record.target_config))
            rows = _map_rows(rebuilt, *ends)
        except (TritterError, KeyError) as error:
            return cls(problem=f"cannot be rebuilt: {error}")
        digest = rebuilt.digest()
        differs = digest != record.map_digest
        problem = f"differs from the recorded {short(record.map_digest)}" if differs else None
        return cls(digest, problem, rows)


def inspect(folder: Folder, family: _ShowFamily = False, as_json: AsJson = False) -> int:
    """Show shapes and parameters of a checkpoint, and the parameter map of its last expansion."""
    with loading("torch"):
        from tritter.checkpoints import Source
        from tritter.core.families.config_file import read_model_file

    with refuse_damage():
        located = locate(folder, key="checkpoint")
        source = Source.open(located, read_model_file(located))
        dtypes = Counter(source.tensors.headers[t.name].dtype for t in source.stored)
        experts_record = _experts_json(source)
    lineage = source.lineage
    last = lineage.expansion_history[-1] if lineage and lineage.expansion_history else None
    last_map = _RecordedMap.of(last) if last else None
    growth = _growth(source) if family else {}
    if as_json:
        plain = {**_as_json(source, dtypes, last_map), "experts": experts_record}
        print_json({**plain, "growth": growth} if family else plain)
        return 0
    console = CommandConsole()
    if family:
        _print_family(console, source, growth)
        return 0
    _print_model(console, source, dtypes)
    _print_lineage(console, source)
    if last is not None and last_map is not None:
        _print_expansion(console, last, last_map)
    _print_experts(console, source)
    return 0


def _count_parameters_by_part(source: Source) -> dict[str, int]:
    """Count the parameters of each part; a tied head counts with the embedding."""
    counts = dict.fromkeys(_PARTS, 0)
    shapes = source.model.shapes
    for tensor in source.model.tensors:
        part = (
            "norms" if tensor.is_of_norm else _PART_OF.get(tensor.kind.partition(".")[0], "other")
        )
        counts[part] += prod(shapes[tensor.name])
    return {part: count for part, count in counts.items() if count}


def _as_json(
    source: Source, dtypes: Mapping[str, int], last_map: _RecordedMap | None
) -> dict[str, Any]:
    from tritter.storage.records import plain_record

    lineage = None
    if source.lineage is not None:
        lineage = {
            key: value
            for key, value in plain_record(source.lineage).items()
            if not key.endswith("_digests") and key != "training_config"
        }
    return {
        "folder": str(source.folder),
        "family": source.model.model_type,
        "architecture": source.model.family.architecture,
        "shapes": shapes_of(source.model),
        "positions": _positions(source),
        "parameters": {
            "total": source.model.num_parameters,
            "parts": _count_parameters_by_part(source),
        },
        "parameters_on_disk": source.model.on_disk.num_parameters,
        "ffn_sizes": list(source.model.ffn_sizes),
        "dtypes": dict(dtypes),
        "is_tied": source.model.is_tied,
        "beside": _other_files(source.folder),
        "lineage": lineage,
        "last_map": None if last_map is None else asdict(last_map),
    }


def _experts_json(source: Source) -> dict[str, Any] | None:
    """Return the experts' records without opening a tensor; None: there are no experts."""
    if (files := source.experts) is None:
        return None
    head = files.head
    return {
        "names": list(head.names),
        "router": head.router,
        "is_shared": head.is_shared,
        "top_k": head.top_k,
        "temperature": head.temperature,
        "capacity_factor": head.capacity_factor,
        "adapters": {
            name: {**asdict(each), "parameters": files.num_parameters[name]}
            for name, each in files.configs.items()
        },
        "usage": {domain: dict(gates) for domain, gates in head.usage.items()},
        "mean_gates": files.mean_gates(),
    }


def _positions(source: Source) -> dict[str, str]:
    """Return the context length and RoPE's base and scaling, as config.json states them."""
    config: Any = source.config
    rotary = config.get("rope_parameters") or config.get("rope_scaling")
    rotary = rotary if isinstance(rotary, dict) else {}
    kinds = [each for each in rotary.values() if isinstance(each, dict)]  # one per kind of layer
    bases = [each.get("rope_theta") for each in (config, rotary, *kinds)]  # may be damaged
    texts = dict.fromkeys(f"{float(b):.10g}" for b in bases if isinstance(b, int | float) and b)
    found = {"context": source.model.position_limit, "RoPE base": ", ".join(texts)}
    for each in (rotary, *kinds):
        kind, factor = each.get("rope_type", each.get("type", "default")), each.get("factor")
        if kind != "default":
            found["RoPE scaling"] = f"{kind}, factor {factor}" if factor else kind
    return {name: str(value) for name, value in found.items() if value}


def _print_model(console: CommandConsole, source: Source, dtypes: Mapping[str, int]) -> None:
    shapes = tuple((SHAPES[name], str(size)) for name, size in shapes_of(source.model).items())
    shapes += tuple(_positions(source).items())
    console.print_table(Table(("shape", ""), shapes, numbers=(1,)))
    console.print()
    total = source.model.num_parameters
    rows = [
        (part, count_text(count), f"{100 * count / total:.1f} %")
        for part, count in _count_parameters_by_part(source).items()
    ]
    rules = (len(rows),)
    rows.append(("all", count_text(total), f"{total:,}"))
    parts = Table(("parameters", "", " "), tuple(rows), numbers=(1, 2), rules=rules)
    console.print_table(parts)
    console.print()
    words = sorted(dtypes)
    kinds = words if len(words) == 1 else [f"{w} ({dtypes[w]} tensors)" for w in words]
    tie = "tied to the embedding" if source.model.is_tied else "untied"
    lines = [("family", f"{source.model.model_type} ({source.model.family.architecture})")]
    if not source.model.family.has_table:
        lines.append(("new layers", _new_layers(source)))
    lines += [("on disk", ", ".join(kinds)), ("output head", tie)]
    names = _other_files(source.folder)
    lines.append(("other files", ", ".join(names) or "no tokenizer, no state"))
    if names and "tokenizer.json" not in names:
        lines.append(("", "no tokenizer.json, which training needs"))
    if sizes := source.model.ffn_sizes:
        padded = count_text(source.model.on_disk.num_parameters)
        lines += [
            ("FFN of each layer", " ".join(map(str, sizes))),
            ("padded", f"on disk to the widest: {padded} parameters"),
        ]
    console.print_lines(lines)


def _growth(source: Source) -> dict[str, str]:
    """Return each size that may grow → how it grows exactly, or why it can't."""
    from tritter.core.expansions import target_model
    from tritter.core.expansions.targets import growth_examples

    depth = "any number of new layers" if source.model.family.has_table else _new_layers(source)
    found = {"depth": depth}
    for size, examples in growth_examples(source.model).items():
        words = ("any larger size", "whole multiples, with init=net2net")
        if size == "heads":
            words = ("whole groups of heads", "whole multiples, with init=net2net")
        elif size == "experts":
            is_any = source.model.family.has_table
            words = ("any number" if is_any else "twice as many, with addition=replicate", "")
        for word, example in zip(words, examples, strict=False):
            try:
                target_model(source.model, [example])
            except RequestError as error:
                found[size] = f"no: {error.problems[0].reason or error}"
            else:
                found[size] = word
                break
    fixed = source.model.family.fixed_neurons(source.config)
    found["neurons"] = (
        f"no: {fixed}" if fixed else "of single layers, during training (growth=gradmax)"
    )
    return found


def _print_family(console: CommandConsole, source: Source, growth: Mapping[str, str]) -> None:
    """Print what can grow, and the axes of the tensors outside the layers and of each kind."""
    model = source.model.widened
    family = model.family
    lines = [("family", f"{family.model_type} ({family.architecture})")]
    lines.append(("axes", "of a table" if family.has_table else "found on a tiny random model"))
    console.print_lines([*lines, *growth.items()])
    console.print()
    kinds: dict[int, set[str]] = {}
    for tensor in model.tensors:
        if tensor.layer is not None:
            kinds.setdefault(tensor.layer, set()).add(tensor.kind)
    first = {str(sorted(kinds[layer])): layer for layer in sorted(kinds, reverse=True)}
    shown, rows = {None, *first.values()}, []
    for tensor in model.tensors:
        if tensor.layer not in shown or tensor.expert:
            continue
        axes = [
            f"{_PORTS.get(axis.port.value, '')}{axis.space.kind} {size}"
            if axis.length or family.has_table
            else str(size)
            for axis, size in zip(tensor.axes, model.shapes[tensor.name], strict=True)
        ]
        zero = "one" if family.zero_of(tensor) > 0 else "zero"
        zeroed = (f"{zero} in new layers",) if family.branch_output(tensor) else ()
        rows.append((tensor.disk_name, "; ".join([" x ".join(axes), *zeroed])))
    console.print_lines([("tensor", "axes"), *rows])


def _new_layers(source: Source) -> str:
    """Return the line about new layers of a model type without a table."""
    from tritter.core.families.discovery import DiscoveredFamily

    family = source.model.family
    assert isinstance(family, DiscoveredFamily)
    if family.refusal:
        return f"copies only: {family.refusal}"
    return f"function-preserving with zero {', '.join(family.zeroed_names)}"


def _other_files(folder: Path) -> list[str]:
    """Return the names of tokenizer and licence files and of the content of `state/`."""
    from tritter.checkpoints.card import licence_files
    from tritter.checkpoints.folder import tokenizer_files

    state = sorted(f"state/{each.name}" for each in (folder / "state").glob("*"))
    return [*tokenizer_files(folder), *(path.name for path in licence_files(folder)), *state]


def _print_lineage(console: CommandConsole, source: Source) -> None:
    lineage = source.lineage
    lines = []
    if lineage is None:
        lines.append(("lineage", "none: a plain Hugging Face folder"))
    else:
        methods = [with_dashes(record.method) for record in lineage.expansion_history]
        lines.append(("hash", short(lineage.model_hash)))
        lines.append(("parent", short(lineage.parent_hash)))
        lines.append(("expansions", ", ".join(methods) or "none"))
        if lineage.stock_loadable != "yes":
            lines.append(("stock classes", f"exact {lineage.stock_loadable}, not yet"))
        if lineage.step:
            lines.append(("trained", f"{lineage.step} steps"))
        for name, score in lineage.benchmark_scores.items():
            if name.endswith(ACCURACY):  # other scores are losses on a domain
                label, text = f"accuracy {name.removesuffix(ACCURACY)}", f"{score:.1%}"
            else:
                label, text = f"loss {name}", f"{score:.4f} nats per token"
            lines.append((label, text))
    console.print()
    console.print_lines(lines)


def _print_expansion(console: CommandConsole, record: ExpansionRecord, last: _RecordedMap) -> None:
    from tritter.checkpoints.record import layers_text

    error = record.step0_error
    delta = [f"{name} {100 * change:+.2f} %" for name, change in record.performance_delta.items()]
    lines = [
        (
            "last expansion",
            f"{with_dashes(record.method)} ({record.timestamp}, seed {record.seed})",
        ),
        ("layers from", layers_text(record.layer_sources)),
        ("exact", "yes, according to its method" if record.claims_exact else "no"),
        ("step-0 error", "not measured" if error is None else f"{error:.1e}"),
        ("steps after", str(record.continued_training_steps)),
    ]
    if delta:
        lines.append(("loss per byte", ", ".join(delta)))
    without = _without_map(record)
    lines.append(("map", without or last.problem or f"{short(last.digest)}, as recorded"))
    console.print()
    console.print_lines(lines)
    if not last.rows:
        return
    console.print()
    rows = []
    for row in last.rows:
        shapes = ("x".join(map(str, shape)) for shape in (row.source_shape, row.target_shape))
        shape = " → ".join(dict.fromkeys(shapes))
        rows.append((row.kind, row.layers, shape, row.weight, row.gradient, row.fill, row.state))
    header = ("tensor", "layers", "shape", "weight", "gradient", "fill", "state")
    console.print_table(Table(header, tuple(rows)), wrapped=("layers", "shape", "fill"))
    console.print()
    console.print(
        "weight, gradient: factors of mapped entries; fill: value of new entries (random: "
        "standard deviation); state: mapping of importances and moments"
    )


def _print_experts(console: CommandConsole, source: Source) -> None:
    """Print a table of the experts, if there are any, and the settings of the router."""
    if (files := source.experts) is None:
        return
    head = files.head
    rows = []
    for name in head.names:
        if (shape := files.configs.get(name)) is None:
            rows.append((name, MISSING, MISSING, MISSING, "base model"))
        else:
            count = count_text(files.num_parameters[name])
            rows.append((name, str(shape.rank), f"{shape.alpha:g}", count, " ".join(shape.targets)))
    console.print()
    header = ("expert", "rank", "alpha", "parameters", "on")
    console.print_table(Table(header, tuple(rows), numbers=(1, 2, 3)), wrapped=("on",))
    console.print()
    mixed = "all" if head.top_k is None else f"top {head.top_k}"
    learned = "one for all layers" if head.is_shared else "one per layer"
    router = {
        "learned": learned,
        "evidence": "token counts",
        "both": f"{learned}, and token counts",
    }
    lines = [
        ("router", router[head.router]),
        ("mixed", f"{mixed}, temperature {head.temperature:g}"),
    ]
    for number, (domain, gates) in enumerate(head.usage.items()):
        shown = ", ".join(f"{name} {gates.get(name, 0.0):.2f}" for name in head.names)
        lines.append(("" if number else "mean gates", f"{domain}: {shown}"))
    console.print_lines(lines)


# The map of a recorded expansion


def _rebuild_map(record: ExpansionRecord) -> ParameterMap:
    """Return the parameter map that a record describes."""
    from tritter.core.expansions import EXPANSIONS
    from tritter.core.families import Model, check_config

    spec_type = EXPANSIONS.get(record.method)
    if spec_type is None:
        raise TritterError(f"this version of Tritter has no method '{record.method}'")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in record.options.items()}
    try:
        source, target = Model(dict(record.source_config)), Model(dict(record.target_config))
        for model in (source, target):
            check_config(model)
        spec = spec_type(**options)
        if spec.expansion_type != "depth":
            source = source.widened
        target = source.changed(target.config)
        rebuilt: ParameterMap = spec.parameter_map(source, target, seed=record.seed)
    # The options and configs come from an untrusted file, so the map's arithmetic may raise any
    # exception
    except Exception as error:
        raise TritterError(f"its record does not describe a map ({error})") from error
    return rebuilt


def _map_rows(parameter_map: ParameterMap, source: Model, target: Model) -> tuple[_MapRow, ...]:
    """Return the rows of a map's table in forward order, with equal layers joined."""
    layers: dict[_MapRow, list[int]] = {}
    for tensor in target.tensors:
        tensor_map = parameter_map.tensors[tensor.name]
        row = _MapRow(
            kind=tensor.kind,
            layers="",
            source_shape=source.shapes[tensor_map.origin] if tensor_map.origin else (),
            target_shape=target.shapes[tensor.name],
            weight="0" if tensor_map.is_zeroed else _factors(tensor_map, "weight"),
            gradient=_factors(tensor_map, "gradient"),
            fill=_fill(tensor_map),
            state=tensor_map.state,
        )
        layers.setdefault(row, []).extend([] if tensor.layer is None else [tensor.layer])
    kinds = list(dict.fromkeys(row.kind for row in layers))
    ordered = sorted(layers, key=lambda row: kinds.index(row.kind))
    return tuple(replace(row, layers=_ranges(layers[row])) for row in ordered)


def _ranges(numbers: list[int]) -> str:
    """Return `0, 2-4` for 0, 2, 3, 4."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _factors(tensor_map: TensorMap, quantity: str) -> str:
    """Return the distinct products of the axes' factors over mapped entries."""
    import torch

    values = torch.ones(1, dtype=torch.float64)
    for axis in tensor_map.axes:
        if axis is not None:
            along: Tensor = getattr(axis, quantity)[axis.index >= 0].unique()
            values = torch.outer(values, along).flatten().unique()
    texts = list(dict.fromkeys(f"{value:.4g}" for value in values.tolist()))
    if len(texts) > _MAX_FACTORS:
        return f"{texts[0]} .. {texts[-1]}"
    return ", ".join(texts)


def _fill(tensor_map: TensorMap) -> str:
    """Return the value of new entries and the noise on copies."""
    has_gaps = tensor_map.source is None or any(
        axis is not None and bool((axis.index < 0).any()) for axis in tensor_map.axes
    )
    parts = []
    if has_gaps:
        fill = tensor_map.fill
        parts.append(f"random {fill.std:.2g}" if fill.kind == "random" else fill.kind)
    if tensor_map.noise:
        parts.append(f"noise {tensor_map.noise:g} on copies")
    return "; ".join(parts) or MISSING
