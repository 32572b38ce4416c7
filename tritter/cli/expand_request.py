"""What `tritter expand` is asked for, by words or by a recipe; nothing here needs transformers."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritter.cli.domain import DomainOptions
from tritter.cli.request import in_options, method_names, specs_of
from tritter.cli.values import spelled
from tritter.config.recipe import Recipe, read_recipe
from tritter.errors import Problem, RequestError, TritterError, raise_problems, show
from tritter.expansion import ExpansionSpec
from tritter.storage.hashing import DigestQueue
from tritter.storage.reading import named_path
from tritter.storage.tensors import TensorFolder


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

    @contextmanager
    def begun_digests(self, *, is_read: bool) -> Iterator[DigestQueue]:
        """Yield the digests of the source's tensors, begun while all else is still to be imported.

        Whether it is a source at all, those find out who read it.

        Args:
            is_read: its tensors will be.
        """
        digests = DigestQueue()
        with suppress(OSError, TritterError):
            if is_read:
                folder = TensorFolder.open(named_path(self.checkpoint, key="checkpoint"))
                digests.begin(folder.raw(), check=folder.check_unchanged)
        try:
            yield digests
        finally:
            digests.close()

    def speaks(self, step: int | None = None) -> AbstractContextManager[None]:
        """Let refusals name what a person wrote: options, or keys and lines of the recipe."""
        return in_options() if self.recipe is None else self.recipe.speaks(step)


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
