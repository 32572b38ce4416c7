"""`tritter inspect`: what a checkpoint is, and how its last expansion made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from tritter.cli.options import AsJson, Folder, spelled
from tritter.cli.output import (
    SHAPES,
    new_console,
    new_table,
    print_json,
    print_lines,
    refuse_damage,
    shapes_of,
    short,
    signs_of,
)
from tritter.errors import TritterError
from tritter.loading import loading
from tritter.report.wording import ACCURACY, count_text
from tritter.storage.hub import locate
from tritter.terminal import Console

if TYPE_CHECKING:
    from tritter.checkpoint import ExpansionRecord, Source
    from tritter.checkpoint.expert_files import ExpertFiles
    from tritter.cli.map_table import MapRow

_PARTS = ("embedding", "positions", "attention", "FFN", "router", "experts", "norms", "output head")
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
}
_WITHOUT_MAP = {
    "experts": "none: the base is as it was",
    "growth": "none: neurons came one event after the other, while it was trained",
}


@dataclass(frozen=True, slots=True)
class RecordedMap:
    """The map of an expansion, rebuilt from its record.

    Args:
        digest: of the map as rebuilt; None when it could not be, or when there is none.
        problem: why it could not be rebuilt, or that it is not the one that was recorded.
    """

    digest: str | None
    rows: tuple[MapRow, ...]
    problem: str | None

    @classmethod
    def of(cls, record: ExpansionRecord) -> RecordedMap:
        from tritter.cli.map_table import map_rows, rebuilt_map

        if record.expansion_type in _WITHOUT_MAP:
            return cls(None, (), None)
        try:
            rebuilt = rebuilt_map(record)
            rows = map_rows(rebuilt, dict(record.source_config), dict(record.target_config))
        except (TritterError, KeyError) as error:
            return cls(None, (), f"cannot be rebuilt: {error}")
        digest = rebuilt.digest()
        differs = digest != record.map_digest
        problem = f"differs from the recorded {short(record.map_digest)}" if differs else None
        return cls(digest, rows, problem)


def inspect(folder: Folder, as_json: AsJson = False) -> int:
    """Show a checkpoint's shapes and parameters, and the map of its last expansion."""
    with loading("torch"):
        from tritter.checkpoint import Source
        from tritter.families.config_file import read_config_file

    with refuse_damage():
        place = locate(folder)
        source = Source.open(place, read_config_file(place))
        dtypes = Counter(source.tensors.headers[t.name].dtype for t in source.stored)
        experts = source.experts
        experts_record = None if experts is None else _experts_json(experts)
    lineage = source.lineage
    last = lineage.expansion_history[-1] if lineage and lineage.expansion_history else None
    last_map = RecordedMap.of(last) if last else None
    if as_json:
        print_json({**_as_json(source, dtypes, last_map), "experts": experts_record})
    else:
        _print(source, dtypes, last, last_map)
        if experts is not None:
            _print_experts(new_console(), experts)
    return 0


def parameters_of_parts(source: Source) -> dict[str, int]:
    """Count the parameters of each part; a tied head counts with the embedding."""
    counts = dict.fromkeys(_PARTS, 0)
    for tensor in source.family.logical_tensors(source.config):
        size = prod(source.family.shape(tensor, source.config))
        part = "norms" if tensor.is_of_norm else _PART_OF[tensor.kind.partition(".")[0]]
        counts[part] += size
    return {part: count for part, count in counts.items() if count}


def _as_json(
    source: Source, dtypes: Mapping[str, int], last_map: RecordedMap | None
) -> dict[str, Any]:
    from tritter.families import ffn_sizes, on_disk
    from tritter.storage.records import plain_record

    lineage = source.lineage
    return {
        "folder": str(source.folder),
        "family": source.family.model_type,
        "architecture": source.family.architecture,
        "shapes": shapes_of(source.config),
        "parameters": {
            "total": source.family.count_parameters(source.config),
            "parts": parameters_of_parts(source),
        },
        "parameters_on_disk": source.family.count_parameters(on_disk(source.config)),
        "ffn_sizes": list(ffn_sizes(source.config)),
        "dtypes": dict(dtypes),
        "is_tied": bool(source.config.get("tie_word_embeddings")),
        "beside": _beside(source.folder),
        "lineage": None
        if lineage is None
        else {
            key: value
            for key, value in plain_record(lineage).items()
            if not key.endswith("_digests") and key != "training_config"
        },
        "last_map": None
        if last_map is None
        else {
            "digest": last_map.digest,
            "problem": last_map.problem,
            "rows": [asdict(row) for row in last_map.rows],
        },
    }


def _print(
    source: Source,
    dtypes: Mapping[str, int],
    last: ExpansionRecord | None,
    last_map: RecordedMap | None,
) -> None:
    console = new_console()
    _print_model(console, source, dtypes)
    lineage = source.lineage
    lines = []
    if lineage is None:
        lines.append(("lineage", "none: a plain Hugging Face folder"))
    else:
        methods = [spelled(record.method) for record in lineage.expansion_history]
        lines.append(("hash", short(lineage.model_hash)))
        lines.append(("parent", short(lineage.parent_hash)))
        lines.append(("expansions", ", ".join(methods) or "none"))
        if lineage.stock_loadable != "yes":
            lines.append(("stock classes", f"exact {lineage.stock_loadable}, not yet"))
        if lineage.step:
            lines.append(("trained", f"{lineage.step} steps"))
        for name, score in lineage.benchmark_scores.items():
            if name.endswith(ACCURACY):  # of a task; else it is the loss on a domain
                lines.append(
                    (f"right {name.removesuffix(ACCURACY)}", f"{score:.1%} of the answers")
                )
            else:
                lines.append((f"loss {name}", f"{score:.4f} nats per token"))
    console.print()
    print_lines(console, lines)
    if last is not None and last_map is not None:
        _print_expansion(console, last, last_map)


def _print_model(console: Console, source: Source, dtypes: Mapping[str, int]) -> None:
    from tritter.families import ffn_sizes, on_disk

    table = new_table("shape", "", numbers=("",))
    for name, size in shapes_of(source.config).items():
        table.add_row(SHAPES[name], str(size))
    parts = new_table("parameters", "", " ", numbers=("", " "))
    total = source.family.count_parameters(source.config)
    for part, count in parameters_of_parts(source).items():
        parts.add_row(part, count_text(count), f"{100 * count / total:.1f} %")
    parts.add_section()
    parts.add_row("all", count_text(total), f"{total:,}")
    console.print(table)
    console.print()
    console.print(parts)
    console.print()
    words = sorted(dtypes)
    kinds = words if len(words) == 1 else [f"{w} ({dtypes[w]} tensors)" for w in words]
    tie = "tied to the embedding" if source.config.get("tie_word_embeddings") else "untied"
    lines = [("family", f"{source.family.model_type} ({source.family.architecture})")]
    lines += [("on disk", ", ".join(kinds)), ("output head", tie)]
    names = _beside(source.folder)
    lines.append(("beside", ", ".join(names) or "no tokenizer, no state"))
    if names and "tokenizer.json" not in names:
        lines.append(("", "no tokenizer.json, which text is read with"))
    if sizes := ffn_sizes(source.config):
        padded = count_text(source.family.count_parameters(on_disk(source.config)))
        lines += [
            ("FFN of each layer", " ".join(map(str, sizes))),
            ("padded", f"on disk to the widest: {padded} parameters"),
        ]
    print_lines(console, lines)


def _beside(folder: Path) -> list[str]:
    """Return what lies beside config and weights: tokenizer files, then what is in `state/`."""
    from tritter.checkpoint.folder import TOKENIZER_FILES

    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    state = folder / "state"
    return [*names, *sorted(f"state/{each.name}" for each in state.glob("*"))]


def _print_expansion(console: Console, record: ExpansionRecord, last: RecordedMap) -> None:
    error = record.step0_error
    delta = [f"{name} {100 * change:+.2f} %" for name, change in record.performance_delta.items()]
    lines = [
        ("last expansion", f"{spelled(record.method)} ({record.timestamp}, seed {record.seed})"),
        ("layers from", " ".join(map(str, record.layer_sources))),
        ("exact", "yes, by its method" if record.claims_exact else "no"),
        ("step-0 error", "not measured" if error is None else f"{error:.1e}"),
        ("steps after", str(record.continued_training_steps)),
    ]
    if delta:
        lines.append(("loss per byte", ", ".join(delta)))
    without = _WITHOUT_MAP.get(record.expansion_type)
    lines.append(("map", without or last.problem or f"{short(last.digest)}, as recorded"))
    console.print()
    print_lines(console, lines)
    if not last.rows:
        return
    console.print()
    arrow = signs_of(console).arrow
    headers = ("tensor", "layers", "shape", "weight", "gradient", "fill", "state")
    table = new_table(*headers, wrapped=("tensor", "shape", "fill"))
    for row in last.rows:
        before, after = (
            "x".join(map(str, shape)) for shape in (row.source_shape, row.target_shape)
        )
        shape = after if before == after else f"{before} {arrow} {after}"
        cells = (row.kind, row.layers, shape, row.weight, row.gradient, row.fill, row.state)
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    console.print()
    console.print(
        "weight, gradient: factors where an entry has a source; fill: what stands where it has "
        "none, random with its standard deviation; state: whether moments follow"
    )


def _experts_json(files: ExpertFiles) -> dict[str, Any]:
    """Return everything that the files say without a tensor being opened."""
    head = files.head
    adapters = {
        name: {
            "rank": each.rank,
            "alpha": each.alpha,
            "targets": list(each.targets),
            "parameters": files.num_parameters[name],
        }
        for name, each in files.configs.items()
    }
    return {
        "names": list(head.names),
        "router": head.router,
        "is_shared": head.is_shared,
        "top_k": head.top_k,
        "temperature": head.temperature,
        "capacity_factor": head.capacity_factor,
        "adapters": adapters,
        "usage": {domain: dict(gates) for domain, gates in head.usage.items()},
        "mean_gates": files.mean_gates(),
    }


def _print_experts(console: Console, files: ExpertFiles) -> None:
    """Print the experts as a table, and how they are mixed."""
    head = files.head
    table = new_table(
        "expert", "rank", "alpha", "parameters", "on",
        numbers=("rank", "alpha", "parameters"), wrapped=("on",),
    )  # fmt: skip
    signs = signs_of(console)
    for name in head.names:
        cells = ("-", "-", "-", "the base itself")
        if (shape := files.configs.get(name)) is not None:
            count, targets = count_text(files.num_parameters[name]), " ".join(shape.targets)
            cells = (str(shape.rank), f"{shape.alpha:g}", count, targets)
        table.add_row(name, *(Text(signs.printable(cell)) for cell in cells))
    console.print()
    console.print(table)
    console.print()
    mixed = "all" if head.top_k is None else f"the best {head.top_k}"
    whose = "one for all layers" if head.is_shared else "one in each layer"
    router = {"learned": whose, "evidence": "token counts", "both": f"{whose}, and token counts"}
    lines = [
        ("router", router[head.router]),
        ("mixed", f"{mixed}, temperature {head.temperature:g}"),
    ]
    for number, (domain, gates) in enumerate(head.usage.items()):
        shown = ", ".join(f"{name} {gates.get(name, 0.0):.2f}" for name in head.names)
        lines.append(("" if number else "mean gates", f"{domain}: {shown}"))
    print_lines(console, lines)
