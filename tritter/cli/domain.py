"""`tritter expand --domain-data`: experts that are added and trained on a domain in one go."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritter.cli.output import new_table
from tritter.cli.request import in_options
from tritter.cli.values import spelled
from tritter.config.schema import TextSources
from tritter.config.text_files import read_sources
from tritter.data.local_files import TextFileError
from tritter.data.records import DEFAULT_FIELD
from tritter.data.sources import TextRequest, check_contents
from tritter.errors import Problem, RequestError, raise_problems
from tritter.expansion import ExpansionSpec
from tritter.report.moe import expert_table
from tritter.terminal import Console

if TYPE_CHECKING:
    from tritter.pipeline.domain import DomainExpansion

DEFAULT_STEPS = 200
DEFAULT_LEARNING_RATE = 1e-4
DEFAULT_DOMAIN = "new"
_OPTION_OF_KEY = {
    "data.new": "--domain-data",
    "data.old": "--old-data",
    "model.path": "--checkpoint",
    "training.max_steps": "--steps",
    "training.learning_rate": "--learning-rate",
}
_ADVICE = re.compile(
    r"^trainer\.check_memory = true: |; with [^;]* it fits|; trainer\.check_memory=false [^;.]*"
)
_KEYS = re.compile("|".join(map(re.escape, _OPTION_OF_KEY)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainOptions:
    """The words that speak of a domain, as typed; None where there was none."""

    domain: str | None = None
    data: tuple[str, ...] = ()
    old_data: tuple[str, ...] = ()
    steps: int | None = None
    learning_rate: float | None = None

    @classmethod
    def of(cls, words: Mapping[str, Any]) -> "DomainOptions":
        """Pick them from all words of the command."""
        return cls(
            domain=words.get("domain"),
            data=tuple(words.get("domain_data") or ()),
            old_data=tuple(words.get("old_data") or ()),
            steps=words.get("steps"),
            learning_rate=words.get("learning_rate"),
        )

    @property
    def is_given(self) -> bool:
        return self != DomainOptions()


@dataclass(frozen=True, slots=True)
class DomainText:
    """Domain → absolute paths, of what is to be learned and of what is to be kept."""

    new: TextSources
    old: TextSources


def check_domain_options(
    options: DomainOptions, specs: Sequence[ExpansionSpec], unsupported: Mapping[str, Any]
) -> None:
    """Refuse what says nothing, or can't be done; writes nothing.

    Args:
        unsupported: option → value, of those that were given and that a training can't honour.

    Raises:
        RequestError: no text or none that can be read, no experts to train on it, or an option
            that does not go with it.
    """
    if not options.is_given:
        if any(getattr(spec, "teacher", None) for spec in specs):
            raise RequestError(
                "--expert-init = distill: new experts learn from a teacher on text; name it, "
                "--domain-data PATH."
            )
        return
    if not any(getattr(spec, "is_append", False) for spec in specs):
        methods = ",".join(spelled(spec.name) for spec in specs)
        raise RequestError(
            f"--domain-data: --method {methods} appends no experts that could learn it; moe-add "
            "does, with --addition append."
        )
    for option, value in unsupported.items():
        raise RequestError(
            f"--{spelled(option)} = {value}: not with --domain-data, which trains the model and "
            "writes it in float32; `tritter export` converts it."
        )
    text = domain_text(options)
    asked = {"--domain-data": text.new, "--old-data": text.old}
    check_contents(
        TextRequest(key, tuple(paths), DEFAULT_FIELD)
        for key, sources in asked.items()
        for paths in sources.values()
    )


def domain_text(options: DomainOptions) -> DomainText:
    """Return the text that the options name.

    Raises:
        RequestError: there is none, a path means none, or old and new text share a name.
    """
    if not options.data:
        raise RequestError(
            "--domain-data is missing: name the text that the new experts are to learn, "
            "--domain-data PATH."
        )
    name = options.domain or DEFAULT_DOMAIN
    problems: list[Problem] = []
    new = read_sources("--domain-data", list(options.data), default_name=name, problems=problems)
    old = read_sources(
        "--old-data", list(options.old_data) or None, default_name="old", problems=problems
    )
    raise_problems(problems)
    if name in old:
        raise RequestError(f"--domain = {name}: that is what the old text is called.")
    return DomainText(new, old)


def train_domain(
    options: DomainOptions,
    source: Path,
    destination: Path,
    specs: Sequence[ExpansionSpec],
    *,
    seed: int,
    console: Console,
    overwrite: bool,
) -> "DomainExpansion":
    """Add the experts and train them.

    Raises:
        RequestError: the checkpoint has no tokenizer, or the text is too small; nothing is
            written.
        TritterError: a stage failed; nothing is left.
    """
    # Only here: it brings Lightning, for which a refusal need not wait
    from tritter.pipeline.domain import DomainTask, expand_for_domain

    text = domain_text(options)
    task = DomainTask(
        new=text.new,
        old=text.old,
        steps=DEFAULT_STEPS if options.steps is None else options.steps,
        learning_rate=DEFAULT_LEARNING_RATE
        if options.learning_rate is None
        else options.learning_rate,
        seed=seed,
    )
    try:
        with in_options():
            return expand_for_domain(
                source, destination, specs, task, console=console, overwrite=overwrite
            )
    except TextFileError as error:
        raise TextFileError([_in_words(problem) for problem in error.problems]) from error
    except RequestError as error:
        raise RequestError(_in_words(str(error))) from error


def _in_words(problem: str) -> str:
    """Return a problem in the names of the options, without advice that they can't express."""
    return _KEYS.sub(lambda key: _OPTION_OF_KEY[key[0]], _ADVICE.sub("", problem))


def print_domain(console: Console, experts: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Print the loss of each domain and where its tokens go."""
    table = new_table("loss", "before", "after", numbers=("before", "after"))
    for domain, before in scores["before"].items():
        table.add_row(domain, *(f"{r['loss']:.3f}" for r in (before, scores["after"][domain])))
    console.print()
    console.print(table)
    console.print()
    console.print(expert_table(experts))
