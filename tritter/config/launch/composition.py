"""Composes overrides into plain values with Hydra, and rewrites Hydra's error messages."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tritter.conf_folder import config_folder
from tritter.config.components import BASES, CHOSEN_GROUPS, METHOD_GROUPS, Origin, method_names
from tritter.config.fallbacks import FallbackChain, with_fallback
from tritter.config.folders import (
    CHOSEN_BY,
    LADDERS,
    body_of,
    option_files,
    search_path,
)
from tritter.config.overrides import (
    normalise,
    parse,
    refuse_sweeps,
)
from tritter.config.run_folder import check_overrides
from tritter.config.schema import RunConfig
from tritter.config.suggestions import Hint, nearest_key
from tritter.config.validation import Rule, validate
from tritter.errors import Problem, RequestError, nearest, raise_problems, refusal, show
from tritter.options import leaves
from tritter.targets import dotted
from tritter.training.options import resolve_training_limits

_VERSION_BASE = "1.3"
_VALIDATION = "tritter.config.launch.plan.RequestValidation"
_SECTIONS_WITH_CODE = ("callbacks", "launcher", "sweeper", "hydra_logging", "job_logging")
_NAMES_OF_CODE = ("_target_", "()", "class")
_REFERENCE = re.compile(r"\$\{(?!hydra\.|now:|oc\.env:)")  # references that may resolve to code
_KNOWN_CODE = ("logging.", "colorlog.", "optuna.samplers.")

# Keys that a run reads only with a value of another one: that one, its values (default: any), names
_READ_WITH = (
    ("evaluation.code_sandbox", ("external",), "code_sandbox_command"),
    ("evaluation.tasks", (), "tasks_path task_limit chat_template num_fewshot"),
    ("evaluation.tasks", (), "allow_code code_sandbox code_sandbox_command"),
    ("gate.ladder", (), "max_attempts"),
    ("pipeline.target_params", (), "max_rounds strategy"),
    ("pretraining.schedule", ("wsd",), "decay_ratio"),
    ("training.schedule", ("wsd",), "decay_ratio"),
    ("experts.boundaries", ("detected",), "detector min_samples in_a_row confidence cooldown"),
    ("experts.boundaries", ("detected",), "moving_average"),
    ("experts.router", ("learned", "both"), "shared_router balance entropy z"),
    ("experts.router", ("evidence", "both"), "prior inner_prior evidence_scale evidence_window"),
    ("experts.rehearsal", (), "exemplars"),
    ("experts.freeze_converged", (), "freeze_projections"),
    ("growth.trigger", ("percentile", "within_layer"), "gradient_percentile"),
    ("growth.trigger", ("percentile",), "history_checks"),
    ("growth.enable_replacement", (), "dead_quantile"),
)

# Group=option → the extra of Tritter that installs it
_EXTRAS = {
    "hydra/launcher=joblib": "sweeps",
    "hydra/launcher=submitit_local": "sweeps",
    "hydra/launcher=submitit_slurm": "sweeps",
    "hydra/launcher=ray": "ray",
    "hydra/sweeper=optuna": "sweeps",
}

# Exceptions that Hydra raises for values of unexpected types
_HYDRA_ERRORS = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError, RecursionError, OverflowError),
)
_HYDRA_NOISE = re.compile(r"To append|object_type|reference_type|Config search path|provider=")


class SweepInConfig(Exception):
    """A single run was composed, but its config has `hydra.mode: MULTIRUN`."""


class Loader(ConfigLoaderImpl):
    """Composes jobs: Hydra's loader with Tritter's errors; any key is left to the validation.

    Selections of missing options are reported and skipped, so that everything else is validated
    too. A launcher sends the loader to its worker processes, so it stores the search path.

    Attributes:
        search_path: folders with options of the user.
        options: group → its options, without Hydra's own groups.
        files: option files of the last composed job.
        problems: skipped selections of the last composed job.
        is_sweep: True while it composes the jobs of a sweep.
        shown: config that Hydra prints without composing it again.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        found = option_files()
        self.search_path = search_path()
        self.options = {group: list(found[group]) for group in found if group not in CHOSEN_BY}
        self.files: Sequence[ResultDefault] = ()
        self.problems: tuple[Problem, ...] = ()
        self.is_sweep = True
        self.shown: DictConfig | None = None

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[Self]:
        """Yield the loader of `conf/`; Hydra's global state is restored afterwards."""
        raise_problems(_nesting_problems())
        # This may be called from inside a Hydra app: suspend it
        running, folder = GlobalHydra.instance().hydra, str(config_folder())
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(folder, job_name="train", version_base=_VERSION_BASE):
                hydra = GlobalHydra.instance().hydra
                assert hydra is not None
                hydra.config_loader = loader = cls(hydra.config_loader.get_search_path())
                yield loader
        finally:
            GlobalHydra.instance().hydra = running

    @classmethod
    def proposed(cls, composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
        """Return the validated config of a job that a sweeper proposed."""
        config = validate(_plain_config(composed))
        if config.gate.ladder is None:
            return config
        with cls.opened() as loader:
            return loader._with_fallbacks(config, overrides)

    @property
    def hydra(self) -> Hydra:
        """The Hydra that composes with this loader."""
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return hydra

    def compose(self, overrides: Sequence[str]) -> RunConfig:
        """Return the validated config of a job."""
        return self.validated(self.composed(overrides), overrides)

    def composed(self, overrides: Sequence[str], *, mode: RunMode = RunMode.RUN) -> DictConfig:
        """Compose a job including Hydra's settings, without validation."""
        return self.load_configuration(
            search_path().config_name, list(overrides), mode, from_shell=False
        )

    def validated(
        self, composed: DictConfig, overrides: Sequence[str], *, rules: Sequence[Rule] = ()
    ) -> RunConfig:
        """Return the validated config of the last composed job.

        Args:
            overrides: overrides of the job.
            rules: rules in addition to those of every run.
        """
        check_overrides(overrides)
        config = self._validated(composed, overrides, rules=rules)
        return self._with_fallbacks(config, overrides, rules=rules)

    def _with_fallbacks(
        self, config: RunConfig, overrides: Sequence[str], *, rules: Sequence[Rule] = ()
    ) -> RunConfig:
        """Return a run's config with its fallbacks, composed and validated.

        Args:
            overrides: overrides of `config`.
        """
        chain, fallbacks, problems = FallbackChain(config.gate), list[RunConfig](), list[Problem]()
        for number, typed in enumerate(chain.overrides(), start=1):
            try:
                own_overrides = tuple(normalise(override, self.options) for override in typed)
                refuse_sweeps(parse(own_overrides))
                all_overrides = with_fallback(overrides, own_overrides)
                attempt = self._validated(self.composed(all_overrides), all_overrides, rules=rules)
                values = {group: getattr(attempt, group) for group in chain.GROUPS}
                fallbacks.append(replace(config, **values, fallback_overrides=own_overrides))
            except RequestError as error:
                problems += (chain.locate(each, number) for each in error.problems)
        raise_problems(problems)
        return replace(config, fallbacks=tuple(fallbacks))

    def _validated(
        self, composed: DictConfig, overrides: Sequence[str], *, rules: Sequence[Rule]
    ) -> RunConfig:
        files, problems, parsed = self.files, [*self.problems], parse(overrides)
        origins = _Origins(parsed, files, composed.hydra.runtime.config_sources)
        try:
            own = [str(key) for key in composed if key != "hydra"]
            raw = _plain_config(OmegaConf.masked_copy(composed, own))
        except _HYDRA_ERRORS as error:
            raise refusal([*problems, _explain(error, parsed, self)]) from error
        # The options selected by the defaults lists for each ordered group
        paths = [(file.config_path or "").partition("/") for file in files]
        selected = {
            group: [option for first, _, option in paths if first == group]
            for group in (*METHOD_GROUPS, "optimizer", *BASES, *CHOSEN_GROUPS)
        }
        problems += _selection_problems(raw, selected, origins)
        raw = resolve_training_limits(raw, origins.file_of_key)
        return validate(raw, origin=origins, found=problems, rules=rules)

    def show(self, config: DictConfig, *, is_resolved: bool) -> None:
        """Let Hydra print a validated config, without the keys that its run does not read."""
        OmegaConf.set_struct(config, False)
        if is_resolved:  # keys may refer to those that are removed
            hydra = config.pop("hydra")
            OmegaConf.resolve(config)
            config.hydra = hydra
        for key in self.unread_keys(config):
            section, _, name = key.rpartition(".")
            (OmegaConf.select(config, section) if section else config).pop(name, None)
        self.shown = config

    @staticmethod
    def unread_keys(config: DictConfig) -> dict[str, str]:
        """Return the keys and sections that a run does not read, each with what it would need."""
        found: dict[str, str] = {}
        for key, values, names in _READ_WITH:
            section, _, name = key.partition(".")
            part = config.get(section) or {}  # of experts: none
            value = part.get(name)
            if isinstance(value, DictConfig):  # an own trigger may read all keys
                value = value.get("name", (values or (value,))[0])
            if name in part and not (value in values if values else value):
                need = f"{key}={' or '.join(values)}" if values else key
                for each in names.split():
                    found[f"{section}.{each}"] = need
        if config.experts and not (config.control or "moe_add" in config.expansion):
            found["training.learning_rate"] = "experts=none; set experts.learning_rate"
        if config.model.model_type == "hf":
            found |= dict.fromkeys(("data.vocab_size", "pretraining"), "a base that the run trains")
        width = config.expansion.get("width")
        if (
            width
            and width.get("init", "fresh") == (width.get("head_strategy") or "fresh") == "fresh"
        ):
            unread = ("expansion.width.shares", "expansion.width.noise")
            found |= dict.fromkeys(unread, "copies (expansion.width.init)")
        return found

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a job like Hydra; `SweepInConfig` if that of a single run selects a sweep."""
        if self.shown is not None:
            return self.shown
        parsed = parse(overrides, loader=self)
        with self.search_path.in_use():  # a launcher's worker process does not have it
            problems = list(_option_problems(parsed, self.options))
        rejected = {problem.key for problem in problems}
        if "experiment" in rejected:  # an experiment selects options of all groups
            raise refusal(problems)
        sound = [o for o in parsed if o.key_or_group.partition(".")[0] not in rejected]
        forced_overrides = [_force_override(override, self.options) for override in sound]
        try:
            composed = super().load_configuration(
                config_name, forced_overrides, run_mode, from_shell, validate_sweep_overrides
            )
            origins = _Origins(parsed, self.files, composed.hydra.runtime.config_sources)
            code = [*_code_problems(composed.hydra, parsed, origins)]
        except _HYDRA_ERRORS as error:
            raise refusal([*problems, _explain(error, parsed, self)]) from error
        if code:
            raise refusal([*problems, *code])
        if not self.is_sweep and composed.hydra.mode == RunMode.MULTIRUN:
            raise SweepInConfig
        others = dict(composed.hydra.callbacks or {})
        with open_dict(composed.hydra):
            composed.hydra.callbacks = {"tritter": {"_target_": _VALIDATION}, **others}
        self.problems = tuple(problems)
        return composed

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        self.files = defaults
        return super()._compose_config_from_defaults_list(defaults, repo)


def _explain(error: Exception, overrides: Sequence[Override], loader: Loader) -> Problem:
    if isinstance(error, MissingConfigException) and (path := error.missing_cfg_file):
        known = [group for group in loader.options if path.startswith(f"{group}/")]
        group = known[0] if known else path.rpartition("/")[0]
        options = error.options or loader.get_group_options(group)
        is_typed = any(override.key_or_group == group for override in overrides)
        experiment = None if is_typed else _value_of("experiment", overrides)
        origin = f"experiment/{experiment}.yaml" if experiment else None
        return replace(_no_option(group, path[len(group) + 1 :], options), origin=origin)
    text = str(error).strip()
    if merged := re.search(r"Could not override '(hydra.+?)'", text):
        key = merged.group(1)
        usual = loader.load_configuration(loader.search_path.config_name, [], RunMode.RUN).hydra
        keys = list(leaves(OmegaConf.to_container(usual), "hydra"))
        reason = "Hydra has no such setting; list them with python train.py --cfg hydra"
        value = _value_of(key, overrides)
        return Problem(key, value, reason=reason, nearest=nearest_key(key, keys))
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return Problem(
            "", reason=f"{mark.name}, line {mark.line + 1} is not valid YAML: {error.problem}."
        )
    cause = str(error.__cause__ or "")
    lines = [line.strip().replace("++", "") for line in f"{text}\n{cause}".splitlines()]
    messages = [line for line in dict.fromkeys(lines) if line and not _HYDRA_NOISE.match(line)]
    return Problem("", reason="composition failed: " + "; ".join(messages))


def _option_problems(
    overrides: Sequence[Override], options: Mapping[str, Sequence[str]]
) -> Iterator[Problem]:
    """Yield a problem for each selected option that its group does not have.

    A fallback chain is an option file, but no option of a group.
    """
    for override in overrides:
        if override.key_or_group == LADDERS:
            chain, chains = str(override.value()), ", ".join(option_files().get(LADDERS, {}))
            reason = f"select a fallback chain with gate.{LADDERS}=NAME; available: {chains}"
            yield Problem(LADDERS, chain, reason=reason, nearest=f"gate.{LADDERS}={chain}")
        known = options.get(override.key_or_group)
        if known is None or override.is_delete() or override.is_sweep_override():
            continue
        value = override.value()
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name not in known and not {"/", "$"} & {*name}:
                yield _no_option(override.key_or_group, name, known)


def _no_option(group: str, name: str, options: Sequence[str]) -> Problem:
    """Return the problem of a missing option, with the available options of its group."""
    reason = f"there is no such option; allowed: {', '.join(options) or 'none'}"
    if (extra := _EXTRAS.get(f"{group}={name}")) is not None:
        advice = f"install the extra: pip install 'tritter[{extra}]'"
        return Problem(group, name, reason=reason, advice=advice)
    if (hint := Hint.of(group, name)) is not None:
        return Problem(group, name, reason=reason, nearest=hint.advice)
    return Problem(group, name, reason=reason, nearest=nearest(name, options))


def _force_override(override: Override, options: Mapping[str, Sequence[str]]) -> str:
    """Return the override in a form that lets Hydra set any key; Tritter's schema validates it."""
    line = override.input_line or ""
    is_ours = not override.is_hydra_override() and override.key_or_group not in options
    if is_ours and not override.is_delete() and override.package is None:
        return "++" + line.lstrip("+")
    return line


class _OutsideFolders(SearchPathPlugin):
    """Adds option folders of installed packages and `--config-dir` to Hydra's search path."""

    def manipulate_search_path(self, hydra_path: ConfigSearchPath) -> None:
        _, *outside = search_path().option_folders.items()
        for provider, folder in outside:
            hydra_path.append(provider, f"file://{folder}")


Plugins.instance().register(_OutsideFolders)


def load_config(overrides: Sequence[str] = ()) -> RunConfig:
    """Return the RunConfig of a command line, without running it."""
    with Loader.opened() as loader:
        return loader.compose(overrides)


def _plain_config(config: DictConfig) -> dict[str, Any]:
    """Return a job's config as plain values with interpolations resolved."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


class _Origins:
    """Maps a dotted key to the option file that sets it, or to None for the command line."""

    def __init__(
        self, overrides: Sequence[Override], files: Sequence[ResultDefault], sources: Iterable[Any]
    ) -> None:
        self._command_line = [override.key_or_group for override in overrides]
        self._files = files
        self._folders = [Path(source.path) for source in sources if source.schema == "file"]

    def __call__(self, key: str) -> str | None:
        if any(f"{key}.".startswith(f"{typed}.") for typed in self._command_line):
            return None
        if any(typed.startswith(f"{key}.") for typed in self._command_line):
            return None  # a nested key was set, which replaced the value
        return self._file_of(key)

    def file_of_key(self, key: str) -> str | None:
        """Return the file of a key that was not typed itself, even if its group was."""
        return None if key in self._command_line else self._file_of(key)

    def _file_of(self, key: str) -> str | None:
        for file in reversed(self._files):
            package, path = file.package or "", file.config_path
            if path and (not package or key.startswith(f"{package}.")):
                inner = key[len(package) :].lstrip(".")
                for source in (folder / f"{path}.yaml" for folder in self._folders):
                    keys = leaves(body_of(source)) if source.is_file() else ()
                    if any(f"{each}.".startswith(f"{inner}.") for each in keys):
                        return f"{path}.yaml"
        return None


def _code_problems(
    hydra: DictConfig, overrides: Sequence[Override], origins: Origin
) -> Iterator[Problem]:
    """Yield code and folders that option files set in Hydra's own settings.

    Hydra would run such code before validation, so only the command line may set it.
    """
    plugins = Plugins.instance()
    own = {dotted(kind) for base in (Launcher, Sweeper) for kind in plugins.discover(base)}
    typed = [f"{override.key_or_group}." for override in overrides]
    plain = OmegaConf.to_container(hydra)
    assert isinstance(plain, dict)
    sections = {name: plain[name] for name in _SECTIONS_WITH_CODE}
    for key, value in leaves(sections, "hydra").items():
        is_code = key.rpartition(".")[2] in _NAMES_OF_CODE or _REFERENCE.match(str(value))
        is_known = str(value) in own or str(value).startswith(_KNOWN_CODE)
        if is_code and not is_known and not any(f"{key}.".startswith(prefix) for prefix in typed):
            reason = "set Hydra classes on the command line only, or use an installed one"
            yield Problem(key, value, reason=reason, origin=origins(key))
    if folders := [*(hydra.searchpath or ())]:
        reason = "set folders on the command line only: hydra.searchpath=[DIR] or --config-dir DIR"
        key = "hydra.searchpath"
        yield Problem(key, folders, reason=reason, origin=origins(key))


def _selection_problems(
    raw: Mapping[str, Any], selected: Mapping[str, list[str]], origins: Origin
) -> list[Problem]:
    """Return problems of selections that Hydra accepts, and remove these entries from `raw`.

    Hydra merges a method that is listed twice. It also accepts the options of a method that no
    list selects, which would select the method silently.
    """
    problems = []
    for group, names in selected.items():
        if len(set(names)) < len(names):
            reason = f"list each once: {show(list(dict.fromkeys(names)))}"
            problems.append(Problem(group, names, reason=f"duplicate entry; {reason}"))
        if group in CHOSEN_GROUPS and len(names) > 1:
            reason = f"select one; -m {group}={','.join(names)} runs them in turn"
            problems.append(Problem(group, names, reason=reason))
        elif group not in METHOD_GROUPS:
            problems += _conflict_problems(group, names)
    for group in METHOD_GROUPS:
        names = selected[group]
        for name in set(method_names(group)) & set(raw.get(group) or ()) - set(names):
            selection = [*(other for other in names if other != "none"), name]
            reason = f"{name} is not selected; select it with {group}={show(selection)}"
            body = raw[group].pop(name)
            keys = list(body) if isinstance(body, Mapping) else []
            for full_key in [f"{group}.{name}.{key}" for key in keys] or [f"{group}.{name}"]:
                value = body[full_key.rpartition(".")[2]] if keys else body
                problems.append(Problem(full_key, value, reason=reason, origin=origins(full_key)))
    return problems


def _value_of(key: str, overrides: Sequence[Override]) -> object:
    lines = [o.input_line or "" for o in overrides if o.key_or_group == key]
    return lines[-1].partition("=")[2] if lines else None


def _conflict_problems(group: str, selected: Sequence[str]) -> Iterator[Problem]:
    """Yield the names that two selected option files both define: their bodies would merge."""
    files = option_files().get(group, {})
    providers: dict[str, list[str]] = {}
    for option in dict.fromkeys(selected):
        for name in body_of(files[option]) if option in files else ():
            providers.setdefault(str(name), []).append(option)
    for name, options in providers.items():
        if len(options) > 1:
            reason = f"{' and '.join(options)} both define {name}; leave one out"
            yield Problem(group, list(selected), reason=reason)


def _nesting_problems() -> list[Problem]:
    """Return the option files of ordered groups with keys outside the method's own section."""
    files = option_files()
    return [
        Problem(
            f"{group}={name}",
            list(body_of(path)),
            reason=f"{path} must nest all keys under {name}, the name of the option",
        )
        for group in METHOD_GROUPS
        for name, path in files.get(group, {}).items()
        if list(body_of(path)) != [name]
    ]
