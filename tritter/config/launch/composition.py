"""From overrides to plain values through Hydra's composition, with its errors in our words."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tritter.conf_folder import config_folder
from tritter.config.components import clashes
from tritter.config.folders import LADDERS, body_of, front, option_files, option_folders
from tritter.config.ladder import RUNG_GROUPS, choice_problems, of_rung, on_top, rungs_of
from tritter.config.launch.hydra_settings import hydra_problems
from tritter.config.overrides import (
    forced,
    no_option,
    normalise,
    option_problems,
    parse,
    refuse_sweeps,
)
from tritter.config.run_folder import check_overrides
from tritter.config.schema import ONE_OF, OPEN_GROUPS, RunConfig
from tritter.config.selection import METHOD_GROUPS, Origin, method_names, nesting_problems
from tritter.config.suggestions import nearest_key
from tritter.config.training_steps import settled
from tritter.config.validation import Rule, validate
from tritter.errors import Problem, RequestError, raise_problems, refusal, show
from tritter.options import leaves

VERSION_BASE = "1.3"
Selection = dict[str, list[str]]

# Values of kinds that Hydra does not expect come out of it as whatever they lead it to
_HYDRA_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RecursionError,
    OverflowError,
)
_HYDRA_NOISE = re.compile(r"To append|object_type|reference_type|Config search path|provider=")


class Loader(ConfigLoaderImpl):
    """Hydra's, which keeps the list of files of its last job: to ask for it takes as long again."""

    files: Sequence[ResultDefault] = ()

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        self.files = defaults
        return super()._compose_config_from_defaults_list(defaults, repo)


@dataclass(frozen=True, slots=True)
class Composition:
    """One composed and validated job.

    Args:
        composed: all that Hydra made of it, its own settings too.
        loader: which composed it.
    """

    config: RunConfig
    composed: DictConfig
    loader: Loader

    @property
    def hydra(self) -> DictConfig:
        """Hydra's own settings for it."""
        return self.composed.hydra


class Composer:
    """Composes jobs over the option files; made by `composer()`."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    @cached_property
    def options(self) -> Mapping[str, Sequence[str]]:
        """Group → its options; Hydra's own groups are left out."""
        files = option_files()
        return {group: list(files[group]) for group in files if group != LADDERS}

    def compose(
        self,
        overrides: Sequence[str],
        *,
        job_number: int | None = None,
        rules: Sequence[Rule] = (),
    ) -> Composition:
        """Compose one job and validate it.

        Args:
            rules: to be asked besides those of every run.

        Raises:
            RequestError: whatever is wrong with it, in the words of the contract.
        """
        check_overrides(overrides)
        put = self._put_together(overrides)
        config = validate(put.raw, origin=put.origins, found=put.problems, rules=rules)
        config = self.with_rungs(config, overrides, rules=rules)
        if job_number is not None:
            with open_dict(put.composed.hydra):
                put.composed.hydra.job.num = job_number
                put.composed.hydra.job.id = str(job_number)
        return Composition(config, put.composed, self.loader)

    def with_rungs(
        self, config: RunConfig, overrides: Sequence[str], *, rules: Sequence[Rule] = ()
    ) -> RunConfig:
        """Return a run's config with what it tries after a rollback, composed and validated.

        Args:
            overrides: those that `config` was composed of.

        Raises:
            RequestError: whatever is wrong with any of the rungs.
        """
        rungs, problems = list[RunConfig](), list[Problem]()
        for number, typed in enumerate(rungs_of(config.gate), start=1):
            try:
                words = tuple(normalise(word, self.options) for word in typed)
                refuse_sweeps(parse(words))
                put = self._put_together(on_top(overrides, words))
                own = validate(put.raw, origin=put.origins, found=put.problems, rules=rules)
                tried = {group: getattr(own, group) for group in RUNG_GROUPS}
                rungs.append(replace(config, **tried, rung_words=words))
            except RequestError as error:
                problems += (of_rung(each, config.gate, number) for each in error.problems)
        raise_problems(problems)
        return replace(config, rungs=tuple(rungs))

    def hydra_settings(self, overrides: Sequence[str]) -> DictConfig:
        """Compose without validation and return Hydra's own settings.

        Raises:
            RequestError: the options can't be put together.
        """
        put = self._put_together(overrides)
        raise_problems([each for each in put.problems if each.key.startswith("hydra")])
        return put.composed.hydra

    def _put_together(self, overrides: Sequence[str]) -> "_Composed":
        """Compose a job, without what was typed of groups that have no such option.

        Raises:
            RequestError: Hydra can't.
        """
        parsed = parse(overrides)
        problems = [*option_problems(parsed, self.options), *choice_problems(parsed)]
        wrong = {problem.key for problem in problems}
        if "experiment" in wrong:  # it would choose options of all groups
            raise refusal(problems)
        sound = [o for o in parsed if o.key_or_group.partition(".")[0] not in wrong]
        lines = [forced(override, self.options) for override in sound]
        name = front().config_name
        try:
            composed = compose(name, overrides=lines, return_hydra_config=True)
            files = self.loader.files
            own = [str(key) for key in composed if key != "hydra"]
            raw = plain_config(OmegaConf.masked_copy(composed, own))
            origins = _Origins(parsed, files, composed.hydra.runtime.config_sources)
            problems += hydra_problems(composed.hydra, _plain_hydra(), parsed, origin=origins)
        except _HYDRA_ERRORS as error:
            raise refusal([*problems, self._explain(error, parsed)]) from error
        problems += _selection_problems(raw, _selection(files), origins)
        return _Composed(composed, settled(raw, origins.exactly), origins, problems)

    def _explain(self, error: Exception, overrides: Sequence[Override]) -> Problem:
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            return self._explain_missing_option(error, error.missing_cfg_file, overrides)
        text = str(error).strip()
        if merged := re.search(r"Could not override '(hydra.+?)'", text):
            return self._explain_hydra_key(merged.group(1), overrides)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            mark = error.problem_mark
            told = f"{mark.name}, line {mark.line + 1} is no YAML: {error.problem}."
            return Problem("", reason=told)
        cause = str(error.__cause__ or "")
        lines = [line.strip().replace("++", "") for line in f"{text}\n{cause}".splitlines()]
        said = [line for line in dict.fromkeys(lines) if line and not _HYDRA_NOISE.match(line)]
        return Problem("", reason="the options can't be put together: " + "; ".join(said))

    def _explain_missing_option(
        self, error: MissingConfigException, path: str, overrides: Sequence[Override]
    ) -> Problem:
        known = [group for group in self.options if path.startswith(f"{group}/")]
        group = known[0] if known else path.rpartition("/")[0]
        options = error.options or self.loader.get_group_options(group)
        is_typed = any(override.key_or_group == group for override in overrides)
        experiment = None if is_typed else _value_of("experiment", overrides)
        origin = f"experiment/{experiment}.yaml" if experiment else None
        return replace(no_option(group, path[len(group) + 1 :], options), origin=origin)

    def _explain_hydra_key(self, key: str, overrides: Sequence[Override]) -> Problem:
        keys = list(leaves(OmegaConf.to_container(_plain_hydra()), "hydra"))
        reason = "Hydra has no such setting (python train.py --hydra-help)"
        value = _value_of(key, overrides)
        return Problem(key, value, reason=reason, nearest=nearest_key(key, keys))


class OutsideFolders(SearchPathPlugin):
    """Lets Hydra find the options of installed packages and of `--config-dir`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        _, *outside = option_folders().items()
        for provider, folder in outside:
            search_path.append(provider, f"file://{folder}")


Plugins.instance().register(OutsideFolders)


def _plain_hydra() -> DictConfig:
    """Return Hydra's own settings of a job without overrides."""
    return _plain_hydra_of(front().config_name, tuple(option_folders().values()))


@cache
def _plain_hydra_of(config_name: str, _folders: tuple[Path, ...]) -> DictConfig:
    return compose(config_name, return_hydra_config=True).hydra


@contextmanager
def composer() -> Iterator[Composer]:
    """Yield a Composer over `conf/`; Hydra's global state is as before afterwards."""
    raise_problems(nesting_problems())
    with no_running_hydra():
        folder = str(config_folder())
        with initialize_config_dir(folder, job_name="train", version_base=VERSION_BASE):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            hydra.config_loader = loader = Loader(hydra.config_loader.get_search_path())
            yield Composer(loader)


@contextmanager
def no_running_hydra() -> Iterator[None]:
    """Set aside a Hydra that is running already (we may be called from one), and bring it back."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """Return the RunConfig of a command line, without running anything.

    Raises:
        RequestError: whatever is wrong with it.
    """
    with composer() as composing:
        return composing.compose(overrides).config


def plain_config(config: DictConfig) -> dict[str, Any]:
    """Return a job's config as plain values, interpolations resolved."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@dataclass(frozen=True, slots=True)
class _Composed:
    """A job as it is composed.

    Args:
        composed: by Hydra.
        raw: plain values, without the node `hydra`.
        origins: tells where they come from.
        problems: what is wrong with options that were chosen and with Hydra's settings.
    """

    composed: DictConfig
    raw: dict[str, Any]
    origins: Origin
    problems: list[Problem]


class _Origins:
    """Tells which option file a dotted key came from; None for the command line."""

    def __init__(
        self,
        overrides: Sequence[Override],
        files: Sequence[ResultDefault],
        sources: Iterable[Any],
    ) -> None:
        self._command_line = [override.key_or_group for override in overrides]
        self._files = files
        self._folders = [Path(source.path) for source in sources if source.schema == "file"]

    def __call__(self, key: str) -> str | None:
        if any(f"{key}.".startswith(f"{typed}.") for typed in self._command_line):
            return None
        if any(typed.startswith(f"{key}.") for typed in self._command_line):
            return None  # a key below a value was set, which replaced the value
        return self._file_of(key)

    def exactly(self, key: str) -> str | None:
        """Tell the same of a value whose group may have been typed, but not it itself."""
        return None if key in self._command_line else self._file_of(key)

    def _file_of(self, key: str) -> str | None:
        for file in reversed(self._files):
            package, path = file.package or "", file.config_path
            if path and (not package or key.startswith(f"{package}.")):
                inner = key[len(package) :].lstrip(".")
                if any(_holds(folder / f"{path}.yaml", inner) for folder in self._folders):
                    return f"{path}.yaml"
        return None


def _holds(path: Path, key: str) -> bool:
    """True when the file sets the key, be it to null."""
    keys = leaves(body_of(path)) if path.is_file() else ()
    return any(f"{each}.".startswith(f"{key}.") for each in keys)


def _selection_problems(
    raw: Mapping[str, Any], selected: Selection, origins: Origin
) -> list[Problem]:
    """Return what Hydra lets pass in the ordered lists, and take it out of `raw`.

    A method that stands twice is merged into one, and a file may hold the body of a method that
    no list selects, which would then be selected without a word.
    """
    problems = []
    for group, names in selected.items():
        if len(set(names)) < len(names):
            reason = f"each once, as in {show(list(dict.fromkeys(names)))}"
            problems.append(Problem(group, names, reason=f"one stands twice; {reason}"))
        if group in ONE_OF and len(names) > 1:
            reason = f"one at a time; -m {group}={','.join(names)} tries them one after the other"
            problems.append(Problem(group, names, reason=reason))
        elif group in OPEN_GROUPS:
            problems += clashes(group, names)
    for group in METHOD_GROUPS:
        names = selected[group]
        for name in set(method_names(group)) & set(raw.get(group) or ()) - set(names):
            wanted = [*(other for other in names if other != "none"), name]
            reason = f"{name} is not selected; select it with {group}={show(wanted)}"
            body = raw[group].pop(name)
            keys = list(body) if isinstance(body, Mapping) else []
            for dotted in [f"{group}.{name}.{key}" for key in keys] or [f"{group}.{name}"]:
                value = body[dotted.rpartition(".")[2]] if keys else body
                problems.append(Problem(dotted, value, reason=reason, origin=origins(dotted)))
    return problems


def _selection(files: Sequence[ResultDefault]) -> Selection:
    """Return the options that the defaults lists select for each ordered group."""
    paths = [(file.config_path or "").partition("/") for file in files]
    return {
        group: [option for first, _, option in paths if first == group]
        for group in (*METHOD_GROUPS, *OPEN_GROUPS)
    }


def _value_of(key: str, overrides: Sequence[Override]) -> object:
    lines = [o.input_line or "" for o in overrides if o.key_or_group == key]
    return lines[-1].partition("=")[2] if lines else None
