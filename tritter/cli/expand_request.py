"""What `tritter expand` is asked for, by words or by a recipe, and where its result goes."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritter.checkpoint import Source
from tritter.checkpoint.expert_files import refuse_experts
from tritter.checkpoint.place import check_output
from tritter.cli.domain import DomainOptions, check_domain_options
from tritter.cli.request import damage_is_a_wrong_request, in_options, method_names, specs_of
from tritter.cli.values import spelled
from tritter.config.recipe import Recipe, read_recipe
from tritter.errors import Problem, RequestError, raise_problems, show
from tritter.expansion import ExpansionSpec
from tritter.expansion.specification import target_config
from tritter.expansion.targets import reach_parameters
from tritter.models import read_config
from tritter.storage.hub import locate
from tritter.storage.names import named_path

_DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class ExpandRequest:
    """The words of the command, numbers read, and what its recipe says.

    Args:
        given: option of the methods → what was typed; of a flag True.
        recipe: names the steps in place of methods and their options.
        target_params: a number of parameters to come near to.
        domain: what appended experts are to be trained on.
    """

    checkpoint: str
    output: Path | None
    methods: tuple[str, ...]
    given: Mapping[str, Any]
    recipe: Recipe | None
    target_params: int | None
    moments: str
    seed: int
    dtype: str | None
    max_shard_bytes: int
    is_measured: bool | None
    domain: DomainOptions

    @classmethod
    def of(
        cls, words: Mapping[str, Any], given: Mapping[str, Any], *, typed: Collection[str]
    ) -> "ExpandRequest":
        """Sort the words of the command, and read its recipe.

        Args:
            typed: which of the words were typed; the others are defaults.

        Raises:
            RequestError: neither methods nor a recipe, a recipe that can't be read, or one that
                says something else than the words.
        """
        recipe, said = None, dict(words)
        if words.get("recipe") is None:
            if not words["method"]:
                raise RequestError(
                    "--method is missing: name what is to grow, --method width, or a file of "
                    "steps, --recipe grow.yaml."
                )
        else:
            recipe = read_recipe(words["recipe"])
            said |= _of_recipe(recipe, words, given, typed)
        return cls(
            checkpoint=said["checkpoint"],
            output=said["output"],
            methods=tuple(said["method"] or ()),
            given=given,
            recipe=recipe,
            target_params=said["target_params"],
            moments=said["moments"],
            seed=said["seed"],
            dtype=said["dtype"],
            max_shard_bytes=said["max_shard_size"],
            is_measured=said["measure"],
            domain=DomainOptions.of(said),
        )

    def specs(self) -> tuple[ExpansionSpec, ...]:
        """Return the expansions that are asked for.

        Raises:
            RequestError: there is no such method, or one can't be had with these options.
        """
        if self.recipe is not None:
            return self.recipe.steps
        return specs_of(method_names(self.methods), self.given)

    def speaks(self) -> AbstractContextManager[None]:
        """Let refusals name what a person wrote: options, or keys and lines of the recipe."""
        return in_options() if self.recipe is None else self.recipe.speaks()


def _of_recipe(
    recipe: Recipe, words: Mapping[str, Any], given: Mapping[str, Any], typed: Collection[str]
) -> dict[str, Any]:
    """Return what a recipe says in place of words.

    Raises:
        RequestError: words say something else, or what the steps are.
    """
    said = recipe.given()
    if "output" in said:
        said["output"] = named_path(said["output"], key="output")
    elsewhere = {"method": ",".join(words["method"] or ()), **given}
    problems = [
        Problem(f"--{spelled(name)}", value, f"--recipe {recipe.path} says what the steps are")
        for name, value in elsewhere.items()
        if value
    ]
    problems += [
        Problem(
            f"--{spelled(name)}",
            words[name],
            f"{recipe.origin.origin(name)} says {name} = {show(value)}; leave one of the two out",
        )
        for name, value in said.items()
        if name in typed and words[name] != value
    ]
    raise_problems(problems)
    return said


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


def place_of(request: ExpandRequest, *, dry_run: bool, overwrite: bool) -> ExpandPlace:
    """Resolve source, destination and expansions; writes nothing.

    Raises:
        RequestError: one of them can't be had.
    """
    specs = request.specs()
    with damage_is_a_wrong_request():
        folder = locate(request.checkpoint)
        source = Source.open(folder, read_config(folder))
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
        target_config(source.config, specs)
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
