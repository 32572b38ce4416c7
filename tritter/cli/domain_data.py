"""The options of `tritter expand` that name data: for new experts, and for new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritter.cli.options import with_dashes
from tritter.errors import Problem, RequestError, raise_problems

if TYPE_CHECKING:
    from tritter.cli.recipe import Settings
    from tritter.core.expansions import ExpansionSpec
    from tritter.data.options import TextSources

SHARD_BYTES = 5 * 10**9  # default of --max-shard-size
_DEFAULT_STEPS = 200
_DEFAULT_LEARNING_RATE = 1e-4
_DEFAULT_DOMAIN = "new"


@dataclass(frozen=True, slots=True)
class DomainRun:
    """New and old data (domain → absolute paths) and settings of the training run."""

    new: TextSources
    old: TextSources
    steps: int
    learning_rate: float


def domain_text(
    specs: Sequence[ExpansionSpec],
    domain: str | None,
    data: Sequence[str] | None,
    old_data: Sequence[str] | None,
    steps: int | None,
    learning_rate: float | None,
) -> DomainRun:
    """Return the data that the options name."""
    from tritter.data.options import read_sources

    if not any(getattr(spec, "is_append", False) for spec in specs):
        methods = ",".join(with_dashes(spec.name) for spec in specs)
        raise RequestError(
            "--domain, --domain-data, --old-data, --steps, --learning-rate: --method "
            f"{methods} appends no experts to train; moe-add does, with --addition append."
        )
    if not data:
        raise RequestError("--domain-data is missing: the training data of the new experts.")
    name = domain or _DEFAULT_DOMAIN
    problems: list[Problem] = []
    new = read_sources("--domain-data", list(data), default_name=name, problems=problems)
    old = read_sources(
        "--old-data", list(old_data or ()) or None, default_name="old", problems=problems
    )
    raise_problems(problems)
    if name in old:
        raise RequestError(f"--domain = {name}: the old data already has this name.")
    rate = _DEFAULT_LEARNING_RATE if learning_rate is None else learning_rate
    return DomainRun(new, old, steps or _DEFAULT_STEPS, rate)


def check_domain(
    specs: Sequence[ExpansionSpec],
    settings: Settings,
    text: DomainRun | None,
    *,
    is_measured: bool | None,
) -> None:
    """Check a request to train experts on a domain. Writes nothing."""
    from tritter.data.sources import TextRequest, check_contents

    if text is None:
        if any(getattr(spec, "teacher", None) for spec in specs):
            raise RequestError(
                "--expert-init = distill: new experts learn from a teacher and need training "
                "data, --domain-data PATH."
            )
        return
    unsupported = (
        ("dtype", settings.dtype, None),
        ("measure", is_measured, None),
        ("max-shard-size", settings.max_shard_size, SHARD_BYTES),
    )
    for name, value, default in unsupported:
        if value not in (None, default):
            raise RequestError(
                f"--{name} = {value}: not allowed with --domain-data, which trains and writes the "
                "model in float32; `tritter export` converts it."
            )
    check_contents(
        TextRequest(tuple(paths), key=key)
        for key, sources in (("--domain-data", text.new), ("--old-data", text.old))
        for paths in sources.values()
    )


def token_sources(
    specs: Sequence[ExpansionSpec], domain: str | None, data: Sequence[str] | None, *others: Any
) -> TextSources:
    """Return domain → paths of the data for new tokens; empty if the tokens are given."""
    from tritter.core.expansions import Vocab
    from tritter.data.options import read_sources

    spec = next(each for each in specs if isinstance(each, Vocab))
    if domain or any(others):
        raise RequestError("--domain, --old-data, --steps, --learning-rate: vocab trains nothing.")
    if data and any(getattr(each, "is_append", False) for each in specs):
        raise RequestError("--domain-data: for vocab or for moe-add; use two commands.")
    if data and not spec.is_learned:
        raise RequestError("--domain-data is not needed: the new tokens are given.")
    if not data and spec.is_learned:
        raise RequestError("--domain-data is missing; or set --tokens, or --tokenizer.")
    problems: list[Problem] = []
    sources = read_sources("--domain-data", data or None, default_name="new", problems=problems)
    raise_problems(problems)
    return sources
