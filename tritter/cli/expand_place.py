"""Where an expansion's source lies and where its result goes; transformers reads the config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritter.checkpoint import Source
from tritter.checkpoint.expert_files import refuse_experts
from tritter.checkpoint.place import check_output
from tritter.cli.domain import check_domain_options
from tritter.cli.expand_request import ExpandRequest
from tritter.cli.request import damage_is_a_wrong_request
from tritter.cli.values import spelled
from tritter.errors import RequestError
from tritter.expansion import ExpansionSpec
from tritter.expansion.specification import target_config
from tritter.expansion.targets import reach_parameters
from tritter.models import read_config
from tritter.storage.hashing import DigestQueue
from tritter.storage.hub import locate

_DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class ExpandPlace:
    """Where the source lies, where the result goes, and by which expansions.

    Args:
        opened: the source.
        obstacle: of a dry run: why the result could not go there as things are; empty: it could.
    """

    opened: Source
    destination: Path
    specs: tuple[ExpansionSpec, ...]
    obstacle: str

    @property
    def source(self) -> Path:
        return self.opened.folder


def place_of(
    request: ExpandRequest,
    specs: tuple[ExpansionSpec, ...],
    digests: DigestQueue,
    *,
    dry_run: bool,
    overwrite: bool,
) -> ExpandPlace:
    """Resolve source, destination and the sizes of expansions; writes nothing.

    Args:
        specs: the expansions that are asked for.
        digests: those of the source that were begun.

    Raises:
        RequestError: one of them can't be had.
    """
    with damage_is_a_wrong_request():
        folder = locate(request.checkpoint)
        source = Source.open(folder, read_config(folder), digests=digests)
        refuse_experts(folder, doing="an expansion", key="--checkpoint")
    names = [spec.name for spec in specs]
    destination = request.output or _default_output(request.checkpoint, folder, names)
    obstacle = ""
    try:
        check_output(destination, sources=[folder], overwrite=overwrite)
    except RequestError as error:
        if not dry_run:
            raise
        obstacle = str(error)
    with request.speaks():
        if request.target_params is not None:
            specs = reach_parameters(source.config, specs, request.target_params)
    config = source.config
    for number, spec in enumerate(specs):
        with request.speaks(number):
            config = target_config(config, [spec])
    check_domain_options(request.domain, specs, _unsupported(request))
    return ExpandPlace(source, destination, specs, obstacle)


def _unsupported(request: ExpandRequest) -> dict[str, Any]:
    """Return the options that were given and that a training can't honour."""
    given = {
        "dtype": request.dtype,
        "measure": request.is_measured,
        "moments": _unless(request.moments, "carry"),
        "max_shard_size": _unless(request.max_shard_bytes, _DEFAULT_SHARD_BYTES),
    }
    return {option: value for option, value in given.items() if value is not None}


def _unless(value: Any, default: Any) -> Any:
    return None if value == default else value


def _default_output(checkpoint: str, folder: Path, methods: list[str]) -> Path:
    """Return SRC-METHOD: beside a folder, and here for a model from the hub."""
    ending = "-".join(map(spelled, methods))
    if Path(checkpoint).is_dir():
        place = folder if folder.name not in ("", "..") else folder.resolve()
        return place.with_name(f"{place.name}-{ending}")
    return Path(f"{checkpoint.rstrip('/').rpartition('/')[2]}-{ending}")
