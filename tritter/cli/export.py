"""`tritter export`: a checkpoint, or a .ckpt of Lightning, as a plain stock folder."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tritter.checkpoint import Source
from tritter.checkpoint.expert_files import ExpertFiles
from tritter.checkpoint.export import Exported, Weights, export_model
from tritter.checkpoint.folder import Artifact
from tritter.checkpoint.lightning_file import read_lightning_file
from tritter.checkpoint.place import check_output
from tritter.checkpoint.tokenizer_files import TokenizerFiles
from tritter.cli.output import (
    new_console,
    print_command,
    print_json,
    print_lines,
    progress_bar,
    says_if_written,
    short,
    shown_path,
)
from tritter.cli.request import choice, damage_is_a_wrong_request, in_options
from tritter.errors import RequestError
from tritter.families import Config, LayoutKind, family_of
from tritter.loadable import check_loadable
from tritter.models import read_config
from tritter.report.wording import count_text, si_text
from tritter.stock_routers import AddedExperts, stock_obstacle
from tritter.storage.hub import locate
from tritter.storage.reading import named_path
from tritter.storage.tensors import WEIGHT_DTYPES

if TYPE_CHECKING:
    from tritter.cli.export_experts import Merge

FORMATS = ("hf", "peft")
LAYOUTS: dict[str, LayoutKind] = {"hub": "hub", "fused": "live"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """The words of the command, numbers read.

    Args:
        dtype: None: that of most values of a folder, the widest of a file.
        expert_layout: None: as on the hub.
        config: of a file: a folder or hub id with config.json, or that file.
        prefix: of a file: what stands before the model's own names.
        is_without_state: of a file: leave the optimizer's moments out.
        is_without_new_experts: of a folder: leave out appended experts that are not open yet.
        is_merged: of a folder with LoRA experts: make one of them, or put them into the base.
        rank: of merged experts as an adapter; None: as much as loses nothing.
    """

    checkpoint: str
    output: Path
    format: str
    dtype: str | None
    expert_layout: str | None
    max_shard_bytes: int
    config: str | None
    prefix: str | None
    is_without_state: bool
    is_without_new_experts: bool
    is_merged: bool
    rank: int | None


@dataclass(frozen=True, slots=True)
class _Origin:
    """What is to be exported, what goes along, and what there is to say about it."""

    weights: Weights
    artifacts: Sequence[Artifact]
    notes: tuple[str, ...] = ()
    merged: "Merge | None" = None


def run_export(request: ExportRequest, *, overwrite: bool, as_json: bool) -> int:
    """Write the folder and print what it holds.

    Raises:
        RequestError: the checkpoint, an option or the destination cannot be had; nothing is
            written.
        TritterError: writing failed, or a tensor turned out damaged while it was read.
    """
    choice("format", request.format, FORMATS)
    dtype = None
    if request.dtype is not None:
        dtype = getattr(torch, choice("dtype", request.dtype, WEIGHT_DTYPES))
    is_file = named_path(request.checkpoint, key="--checkpoint").is_file()
    _check_expert_options(request, is_file=is_file)
    if request.format == "peft":
        return _run_adapters(request, dtype=dtype, overwrite=overwrite, as_json=as_json)
    check_output(request.output, sources=_places(request), overwrite=overwrite)
    with damage_is_a_wrong_request():
        origin = _file(request) if is_file else _folder(request)
        check_loadable(origin.weights.config, folder=origin.weights.places[-1])
    layout = _layout(request.expert_layout, origin.weights.config)
    if dtype is None and is_file:
        dtype = origin.weights.widest_dtype
    with says_if_written(request.output):
        with in_options(), progress_bar(is_shown=not as_json) as progress:
            exported = export_model(
                origin.weights,
                request.output,
                dtype=dtype,
                expert_layout=layout,
                artifacts=origin.artifacts,
                max_shard_bytes=request.max_shard_bytes,
                overwrite=overwrite,
                progress=progress,
            )
        if as_json:
            print_json(_as_json(request, origin, exported))
        else:
            _print(origin, exported)
    return 0


def _check_expert_options(request: ExportRequest, *, is_file: bool) -> None:
    """Refuse options that speak of LoRA experts, or of none, where that can't be."""
    if is_file and (request.is_merged or request.format == "peft"):
        option = "--merge" if request.is_merged else "--format = peft"
        raise RequestError(
            f"{option}: --checkpoint {request.checkpoint} is a file; allowed is a folder with "
            "LoRA experts."
        )
    if request.rank is not None and not (request.is_merged and request.format == "peft"):
        raise RequestError(f"--rank = {request.rank}: allowed with --format peft --merge.")
    of_models = {
        "--config": request.config,
        "--prefix": request.prefix,
        "--no-state": request.is_without_state or None,
        "--expert-layout": request.expert_layout,
        "--drop-new-experts": request.is_without_new_experts or None,
    }
    given = [option for option, value in of_models.items() if value is not None]
    if given and request.format == "peft":
        raise RequestError(f"{', '.join(given)}: allowed with --format hf; adapters have none.")


def _run_adapters(
    request: ExportRequest, *, dtype: torch.dtype | None, overwrite: bool, as_json: bool
) -> int:
    """Write LoRA experts as adapters, and print what they are."""
    from tritter.cli.export_experts import (
        LARGEST_RANK,
        base_of,
        check_place,
        export_adapters,
        merge,
        print_adapters,
    )

    with damage_is_a_wrong_request():
        folder = locate(request.checkpoint)
        check_place(request.output, source=folder, overwrite=overwrite)
        Source.open(folder, read_config(folder))  # which holds it against its own record
        if ExpertFiles.read(folder) is None:
            raise RequestError(
                f"--format = peft: {folder} has no LoRA experts; allowed is hf, a plain folder."
            )
        merged = None
        if request.is_merged:
            merged = merge(folder, rank=request.rank, largest_rank=LARGEST_RANK)
    told = export_adapters(
        folder,
        request.output,
        base=base_of(request.checkpoint, folder),
        merged=merged,
        dtype=dtype,
        overwrite=overwrite,
    )
    with says_if_written(request.output):
        if as_json:
            print_json(told)
        else:
            print_adapters(told, merged)
    return 0


def _folder(request: ExportRequest) -> _Origin:
    misplaced = {
        "--config": request.config,
        "--prefix": request.prefix,
        "--no-state": request.is_without_state or None,
    }
    given = [option for option, value in misplaced.items() if value is not None]
    if given:
        raise RequestError(
            f"{', '.join(given)}: --checkpoint {request.checkpoint} is no file; a folder has a "
            "config and names of its own, and its state/ is never exported."
        )
    folder = locate(request.checkpoint)
    source = Source.open(folder, read_config(folder))
    weights = Weights.of(source)
    is_download = not named_path(request.checkpoint, key="--checkpoint").exists()
    if is_download:  # which lies under its commit's name
        weights = replace(weights, name=request.checkpoint)
    obstacle, notes = stock_obstacle(folder), tuple[str, ...]()
    if request.is_without_new_experts:
        weights, notes = _without_new_experts(weights, folder)
    elif obstacle is not None:
        raise RequestError(
            f"{folder}: {obstacle}. Train the model until the offset is 0, or leave them out with "
            "--drop-new-experts."
        )
    merged = _merged(request, folder)
    if merged is not None:
        from tritter.cli.export_experts import with_merged

        weights = with_merged(weights, merged)
    return _Origin(weights, [TokenizerFiles(folder)], notes, merged)


def _merged(request: ExportRequest, folder: Path) -> "Merge | None":
    """Return the LoRA experts of a folder as one, where it has any and that is asked."""
    files = ExpertFiles.read(folder)
    if files is None:
        if request.is_merged:
            raise RequestError(f"--merge: {folder} has no LoRA experts.")
        return None
    if not request.is_merged:
        raise RequestError(
            f"{folder} holds LoRA experts ({', '.join(files.head.names)}), which a plain folder "
            "can't mix: --format peft writes each as an adapter, --merge puts them into the base "
            "(lossy; it says how much)."
        )
    from tritter.cli.export_experts import merge

    return merge(folder)


def _without_new_experts(weights: Weights, folder: Path) -> tuple[Weights, tuple[str, ...]]:
    added = AddedExperts.read(folder)
    if added is None or added.is_settled:
        raise RequestError(
            f"--drop-new-experts: {folder} has no appended experts that are not wholly open."
        )
    note = f"without the {len(added.experts)} appended experts of each layer"
    return weights.without_experts(added.num_settled_experts), (note,)


def _file(request: ExportRequest) -> _Origin:
    path = named_path(request.checkpoint, key="--checkpoint")
    if request.is_without_new_experts:
        raise RequestError(f"--drop-new-experts: {path.name} is a file; a folder's state says it.")
    if request.config is None:
        raise RequestError(
            f"--config is missing: {path.name} does not say what its model is; a config.json, or "
            "a folder that holds one, does."
        )
    folder = _config_folder(request.config)
    found = read_lightning_file(path, read_config(folder), prefix=request.prefix)
    weights = replace(found.weights, places=(path, folder))
    notes = (found.left_out, found.why_no_moments)
    if request.is_without_state:
        weights, notes = replace(weights, moments=None), (found.left_out, "")
    has_tokenizer = not named_path(request.config, key="--config").is_file()

    beside = [TokenizerFiles(folder)] if has_tokenizer else []
    return _Origin(weights, beside, tuple(note for note in notes if note))


def _config_folder(config: str) -> Path:
    path = named_path(config, key="--config")
    if not path.is_file():
        return locate(config)
    if path.name != "config.json":
        raise RequestError(f"--config = {config}: allowed is a config.json, or a folder with one.")
    return path.parent


def _places(request: ExportRequest) -> list[Path]:
    """Return the folders and files that were named to be read; a hub id is none."""
    named = (request.checkpoint, request.config)
    return [named_path(word, key="--checkpoint") for word in named if word is not None]


def _layout(word: str | None, config: Config) -> LayoutKind:
    if word is None:
        return "hub"
    if not family_of(config).has_experts:
        raise RequestError(
            f"--expert-layout = {word}: a {config['model_type']} model has no experts."
        )
    return LAYOUTS[choice("expert-layout", word, list(LAYOUTS))]


def _as_json(request: ExportRequest, origin: _Origin, exported: Exported) -> dict[str, Any]:
    moments = origin.weights.moments
    return {
        "source": request.checkpoint,
        "destination": str(exported.folder),
        "format": request.format,
        "dtype": exported.config["dtype"],
        "parameters": family_of(exported.config).count_parameters(exported.config),
        "bytes": exported.num_bytes,
        "files": exported.num_files,
        "source_hash": exported.origin_hash,
        "model_hash": exported.model_hash,
        "state": {"step": moments.step, "kinds": sorted(moments.kinds)} if moments else None,
        "notes": list(origin.notes),
        "merged": None if origin.merged is None else origin.merged.to_dict(),
    }


def _print(origin: _Origin, exported: Exported) -> None:
    console = new_console()
    family, moments = family_of(exported.config), origin.weights.moments
    parameters = count_text(family.count_parameters(exported.config))
    files = "1 file" if exported.num_files == 1 else f"{exported.num_files} files"
    lines = [
        ("model", f"{family.architecture}, {parameters} parameters"),
        ("dtype", str(exported.config["dtype"])),
        ("size", f"{si_text(exported.num_bytes)}B in {files}"),
    ]
    if moments is not None:
        lines.append(("state", f"{', '.join(sorted(moments.kinds))} after {moments.step} steps"))
    lines += [("note", note) for note in origin.notes]
    if origin.merged is not None:
        from tritter.cli.export_experts import merge_lines

        lines += merge_lines(origin.merged)
    lines += [("from", short(exported.origin_hash)), ("hash", short(exported.model_hash))]
    print_lines(console, lines)
    console.print()
    print_command(console, "written", shown_path(exported.folder))
    here = shlex.quote(shown_path(exported.folder))
    print_command(console, "next   ", f"tritter inspect {here}")
