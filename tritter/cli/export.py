"""`tritter export`: write a checkpoint or a Lightning .ckpt as a plain Hugging Face folder."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritter.cli.options import (
    AsJson,
    DType,
    MaxShardSize,
    Overwrite,
    choice,
    flag,
    is_typed,
    option,
    parse_path,
    with_dashes,
)
from tritter.cli.output import (
    CommandConsole,
    display_path,
    note_if_written,
    print_json,
    progress_bars,
    refuse_damage,
    short,
)
from tritter.errors import Names, RequestError
from tritter.loading import loading
from tritter.report.table import count_text, si_text
from tritter.storage.hub import locate
from tritter.storage.reading import named_path
from tritter.storage.tensors import WEIGHT_DTYPES

if TYPE_CHECKING:
    from tritter.checkpoints import Source
    from tritter.checkpoints.export import Exported, Weights
    from tritter.cli.export_experts import Merge
    from tritter.core.families import LayoutKind

_FORMATS = ("hf", "peft")
_NAMES = Names.of({"dtype": "--dtype"})
_LAYOUTS: dict[str, LayoutKind] = {"hub": "hub", "fused": "live"}
_CKPT = "For a .ckpt"
_OF_FILE: tuple[str, ...] = ("config", "prefix")
_OF_FOLDER = ("drop_new_experts", "ignore_lineage")
_NO_FILE = (
    "--checkpoint {} is not a file; a folder has its own config and tensor names, and its state/ "
    "is never exported."
)

_ExportSource = Annotated[
    str, option("--checkpoint", "SRC", "Folder or hub id of the model, or a Lightning .ckpt.")
]
_ExportOutput = Annotated[Path, option("--output", "DST", "New folder.", parser=parse_path)]
_Format = Annotated[
    str,
    option(
        "--format",
        "hf|peft",
        "hf: a folder for Hugging Face transformers; peft: each LoRA expert as a PEFT adapter.",
    ),
]
_ExpertLayout = Annotated[
    str | None,
    option(
        "--expert-layout",
        "hub|fused",
        "hub: one tensor per matrix of an expert; fused: one tensor for all experts of a layer. "
        "Default: hub.",
    ),
]
_ConfigOf = Annotated[
    str | None,
    option(
        "--config",
        "PATH",
        "The config.json of the model, or a folder (or hub id) with it and a tokenizer.",
        panel=_CKPT,
    ),
]
_Prefix = Annotated[
    str | None,
    option(
        "--prefix",
        "PREFIX",
        "Prefix of the model's tensor names, such as student.; other tensors are dropped. "
        "Default: detected, no tensor is dropped.",
        panel=_CKPT,
    ),
]
_DropNewExperts = Annotated[
    bool,
    flag("--drop-new-experts", "For a folder: drop appended experts that are not fully open yet."),
]
_IgnoreLineage = Annotated[
    bool,
    flag(
        "--ignore-lineage",
        "For a folder: ignore tritter.json and read a plain Hugging Face folder. For "
        "checkpoints from before the first release.",
    ),
]
_MergeExperts = Annotated[
    bool,
    flag(
        "--merge",
        "For a folder with LoRA experts: merge them into the base (hf) or into one adapter "
        "(peft), by mean gates. Lossy; the loss is reported.",
    ),
]
_MergedRank = Annotated[
    int | None,
    option(
        "--rank",
        "R",
        "With --format peft --merge: rank of the adapter. Default: a lossless rank.",
        least=1,
        most=1024,
    ),
]


def export(
    context: typer.Context,
    checkpoint: _ExportSource,
    output: _ExportOutput,
    format: _Format = "hf",
    dtype: DType = None,
    expert_layout: _ExpertLayout = None,
    max_shard_size: MaxShardSize = 5 * 10**9,
    config: _ConfigOf = None,
    prefix: _Prefix = None,
    drop_new_experts: _DropNewExperts = False,
    ignore_lineage: _IgnoreLineage = False,
    merge: _MergeExperts = False,
    rank: _MergedRank = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> int:
    """Export a checkpoint as a plain Hugging Face folder or as adapters.

    tritter export grown --output grown-hf
    """
    choice("--format", format, _FORMATS)
    dtype = None if dtype is None else choice("--dtype", dtype, WEIGHT_DTYPES)
    is_file = _check_options(context)
    with loading("transformers"):
        import torch

        from tritter.checkpoints import Source
        from tritter.checkpoints.folder import copy_small_files
        from tritter.checkpoints.location import check_output
        from tritter.core.models import check_loadable, read_model

    if format == "peft":
        from tritter.cli.export_experts import export_adapters

        export_adapters(
            checkpoint, output, is_merged=merge, rank=rank, dtype=dtype, overwrite=overwrite,
            as_json=as_json,
        )  # fmt: skip
        return 0
    sources = [named_path(name, key="--checkpoint") for name in (checkpoint, config) if name]
    check_output(output, sources=sources, overwrite=overwrite)
    with refuse_damage():
        merged = None
        if is_file:
            weights, note = _of_file(checkpoint, config, prefix=prefix)
        else:
            folder = locate(checkpoint, key="--checkpoint")
            source = Source.open(folder, read_model(folder), has_lineage=not ignore_lineage)
            weights, note = _of_folder(source, is_without_new=drop_new_experts)
            if not named_path(checkpoint, key="--checkpoint").exists():
                weights = replace(weights, name=checkpoint)  # a download is named by its commit
            if (merged := _merge(source, is_requested=merge, is_plain=ignore_lineage)) is not None:
                weights = merged.added_to(weights)
        model, folder = weights.model, weights.source_paths[-1]
        check_loadable(model, folder=folder)
    if expert_layout is not None and not model.family.has_experts:
        raise RequestError(
            f"--expert-layout = {expert_layout}: a {model.model_type} model has no experts."
        )
    has_others = not is_file or not named_path(str(config), key="--config").is_file()
    to = getattr(torch, dtype) if dtype else (weights.widest_dtype if is_file else None)
    layout = _LAYOUTS[choice("--expert-layout", expert_layout or "hub", list(_LAYOUTS))]
    with note_if_written(output):
        with progress_bars(is_shown=not as_json) as new_bar, _NAMES.in_use():
            exported = weights.export(
                output,
                dtype=to,
                expert_layout=layout,
                artifacts=[partial(copy_small_files, folder)] if has_others else [],
                max_shard_bytes=max_shard_size,
                overwrite=overwrite,
                progress=new_bar("tensors"),
            )
        if as_json:
            print_json({"source": checkpoint, **_as_json(exported, note, merged)})
        else:
            _print(exported, note, merged)
    return 0


def _check_options(context: typer.Context) -> bool:
    """Return True if the checkpoint is a file."""
    options = context.params
    checkpoint, is_merged = options["checkpoint"], options["merge"]
    is_peft = options["format"] == "peft"
    is_file = named_path(checkpoint, key="--checkpoint").is_file()
    if is_file and (is_merged or is_peft):
        raise RequestError(
            f"{'--merge' if is_merged else '--format = peft'}: --checkpoint {checkpoint} is a "
            "file; must be a folder with LoRA experts."
        )
    if options["rank"] is not None and not (is_merged and is_peft):
        raise RequestError(f"--rank = {options['rank']}: allowed with --format peft --merge.")
    names, reason = _OF_FILE, _NO_FILE.format(checkpoint)
    if is_peft:
        names = (*_OF_FILE, "expert_layout", *_OF_FOLDER)
        reason = "allowed with --format hf; adapters have none."
    elif is_file:
        names, reason = _OF_FOLDER, f"{checkpoint} is a file; must be a folder."
    if typed := [f"--{with_dashes(name)}" for name in names if is_typed(context, name)]:
        raise RequestError(f"{', '.join(typed)}: {reason}")
    return is_file


def _of_folder(source: Source, *, is_without_new: bool) -> tuple[Weights, str]:
    """Return the weights of a checkpoint, and a note on the experts that are dropped."""
    from tritter.checkpoints.export import Weights

    weights, added = Weights.of(source), source.added
    if is_without_new:
        if added is None or added.is_settled:
            raise RequestError(
                f"--drop-new-experts: {source.folder} has no appended experts that are not "
                "fully open."
            )
        note = f"without the {len(added.experts)} appended experts of each layer"
        return weights.without_experts(added.num_settled_experts), note
    if added is not None and not added.is_settled:
        raise RequestError(
            f"{source.folder}: {added.stock_obstacle}. Train the model until the offset is 0, or "
            "drop them with --drop-new-experts."
        )
    return weights, ""


def _merge(source: Source, *, is_requested: bool, is_plain: bool) -> Merge | None:
    """Return the merged LoRA experts of a checkpoint; None if it has none."""
    from tritter.checkpoints.expert_files import ExpertsHead

    has_experts = not is_plain or (source.folder / ExpertsHead.PATH).exists()
    experts = source.experts if has_experts else None
    if experts is None and is_requested:
        raise RequestError(f"--merge: {source.folder} has no LoRA experts.")
    if experts is None:
        return None
    if not is_requested:
        raise RequestError(
            f"{source.folder} contains LoRA experts ({', '.join(experts.head.names)}), which a "
            "plain folder can't mix: --format peft writes each as an adapter, --merge merges them "
            "into the base (lossy; the loss is reported)."
        )
    from tritter.cli.export_experts import Merge

    return Merge.of(experts)


def _of_file(checkpoint: str, config: str | None, *, prefix: str | None) -> tuple[Weights, str]:
    """Return the weights of a .ckpt, and a note on what is skipped."""
    from tritter.checkpoints.lightning_file import read_lightning_file
    from tritter.core.models import read_model

    path = named_path(checkpoint, key="--checkpoint")
    if config is None:
        raise RequestError(
            f"--config is missing: {path.name} does not contain the model's config; name a "
            "config.json, or a folder with one."
        )
    config_path = named_path(config, key="--config")
    if config_path.is_file() and config_path.name != "config.json":
        raise RequestError(f"--config = {config}: must be a config.json, or a folder with one.")
    folder = config_path.parent if config_path.is_file() else locate(config, key="--config")
    weights, skipped = read_lightning_file(path, read_model(folder), prefix=prefix)
    return replace(weights, source_paths=(path, folder)), skipped


def _as_json(exported: Exported, note: str, merged: Merge | None) -> dict[str, Any]:
    return {
        "destination": str(exported.folder),
        "format": "hf",
        "dtype": exported.model.config["dtype"],
        "parameters": exported.model.num_parameters,
        "bytes": exported.num_bytes,
        "files": exported.num_files,
        "source_hash": exported.origin_hash,
        "model_hash": exported.model_hash,
        "notes": [note] if note else [],
        "merged": None if merged is None else merged.to_dict(),
    }


def _print(exported: Exported, note: str, merged: Merge | None) -> None:
    console = CommandConsole()
    model = exported.model
    parameters = count_text(model.num_parameters)
    files = "1 file" if exported.num_files == 1 else f"{exported.num_files} files"
    lines = [
        ("model", f"{model.family.architecture}, {parameters} parameters"),
        ("dtype", str(exported.model.config["dtype"])),
        ("size", f"{si_text(exported.num_bytes)}B in {files}"),
    ]
    if note:
        lines.append(("note", note))
    if merged is not None:
        lines += merged.lines()
    lines += [("from", short(exported.origin_hash)), ("hash", short(exported.model_hash))]
    console.print_lines(lines)
    console.print()
    console.print_command("written", display_path(exported.folder))
    quoted = shlex.quote(display_path(exported.folder))
    console.print_command("next   ", f"tritter inspect {quoted}")
