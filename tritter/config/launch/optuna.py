"""The Optuna sweeper: which of its settings a sweep can have, and which values it may try.

Its jobs are not known beforehand. What is checked before the first starts is every value that a
choice lists and both ends of every interval, one at a time beside the first values of the others.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from tritter.config.overrides import first_value
from tritter.errors import Problem, RequestError
from tritter.targets import TARGET, resolve

_CLASS = "OptunaSweeper"
_SEED = "hydra.sweeper.sampler.seed"
_REFUSED = {
    "custom_search_space": "it is code that adds values which can't be checked before the first "
    "job; name them as KEY=choice(A,B) or KEY=interval(LOW,HIGH)",
    "search_space": "Hydra gave it up; name values as KEY=choice(A,B) or KEY=interval(LOW,HIGH), "
    "or in hydra.sweeper.params",
}
_MOST_VALUES = 100  # of one parameter that are looked at before the first job


def is_optuna(hydra: DictConfig) -> bool:
    """Say whether jobs are thought of by Optuna."""
    return str(hydra.sweeper.get(TARGET)).rpartition(".")[2] == _CLASS


def pinned(hydra: DictConfig) -> tuple[str, ...]:
    """Return what is set so that a sweep that is begun again thinks of the same jobs.

    A study that is stored goes on elsewhere, with others.
    """
    is_alone = is_optuna(hydra) and hydra.sweeper.get("storage") is None
    sampler = hydra.sweeper.get("sampler") if is_alone else None
    is_open = sampler is not None and "seed" in sampler and sampler.seed is None
    return (f"{_SEED}=0",) if is_open else ()


def sweeper_problems(hydra: DictConfig) -> Iterator[Problem]:
    """Yield settings with which Optuna would fail after folders were made, or mislead."""
    if not is_optuna(hydra):
        return
    sweeper = hydra.sweeper
    for key in ("n_trials", "n_jobs"):
        if sweeper.get(key, 1) < 1:
            reason = "allowed is a whole number at least 1"
            yield Problem(f"hydra.sweeper.{key}", sweeper[key], reason=reason)
    direction = sweeper.get("direction")
    if str(getattr(direction, "name", direction)) != "minimize":
        shown = OmegaConf.to_container(direction) if OmegaConf.is_config(direction) else direction
        reason = "the number of a job is a loss, which is to fall; allowed is minimize"
        yield Problem("hydra.sweeper.direction", getattr(shown, "name", shown), reason=reason)
    for key, reason in _REFUSED.items():
        if sweeper.get(key) is not None:
            yield Problem(f"hydra.sweeper.{key}", sweeper[key], reason=reason)
    yield from _sampler_problems(str(sweeper.sampler.get(TARGET)))


def storage_problems(hydra: DictConfig, folder: Path) -> Iterator[Problem]:
    """Yield a stored study for a folder that has jobs of it: its next ones are other jobs."""
    storage = hydra.sweeper.get("storage") if is_optuna(hydra) else None
    if storage is not None and folder.is_dir() and any(folder.iterdir()):
        reason = (
            f"a study that is stored goes on with new jobs, and {folder} has some already; give it "
            "another hydra.sweep.dir, or leave the storage out to go on with what was cut off there"
        )
        yield Problem("hydra.sweeper.storage", storage, reason=reason)


def _sampler_problems(target: str) -> Iterator[Problem]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # our table tells what it would
    key = f"hydra.sweeper.sampler.{TARGET}"
    try:
        kind = resolve(key, target, base="optuna.samplers.BaseSampler")
    except RequestError as error:
        yield from error.problems
        return
    if kind.__name__ == "GridSampler":
        reason = (
            "it tries all combinations in an order that chance gives it, and can't go on when it "
            "was stopped; leave hydra/sweeper=optuna out, and list the values: KEY=A,B"
        )
        yield Problem("hydra/sweeper/sampler", "grid", reason=reason)


def tried(overrides: Sequence[Override]) -> list[list[str]]:
    """Return jobs that show every listed value and both ends of intervals, one at a time."""
    first = [first_value(override) for override in overrides]
    jobs = [first]
    for place, override in enumerate(overrides):
        for word in _values(override):
            if word != first[place]:
                jobs.append([*first[:place], word, *first[place + 1 :]])
    return jobs


def _values(override: Override) -> Iterator[str]:
    if not override.is_sweep_override():
        return
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        yield from (f"{key}={value.start}", f"{key}={value.end}")
        return
    for number, text in enumerate(override.sweep_string_iterator()):
        if number == _MOST_VALUES:
            return
        yield f"{key}={text}"
    if isinstance(value, RangeSweep):
        yield f"{key}={value.stop}"  # which Optuna tries too
