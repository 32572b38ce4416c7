"""Hydra's compositions of `conf/`, each put together once per process.

A composition takes a third of a second, most of it for the defaults list and the files that the
list names. Both depend on the chosen options alone, so they are kept; values are set on a copy.
Where a test brings option files of its own, nothing is kept.
"""

import copy
from collections.abc import Sequence
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from tritter.conf_folder import config_folder

_create = config_loader_impl.create_defaults_list
_put_together = ConfigLoaderImpl._compose_config_from_defaults_list
_read = FileConfigSource.load_config
_files: dict[str, ConfigResult] = {}
_lists: dict[tuple[Any, ...], DefaultsList] = {}
_configs: dict[tuple[Any, ...], DictConfig] = {}


def keep_compositions() -> None:
    """Let Hydra, in this process, take what it composed before."""
    config_loader_impl.create_defaults_list = _defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = _composed
    FileConfigSource.load_config = _file


def _is_constant(repo: CachingConfigRepository) -> bool:
    """True where all options are those of `conf/` and of installed packages."""
    own = str(config_folder())
    return all(each.scheme() != "file" or each.path == own for each in repo.get_sources())


def _file(source: FileConfigSource, config_path: str) -> ConfigResult:
    if source.path != str(config_folder()):
        return _read(source, config_path)
    if config_path not in _files:
        _files[config_path] = _read(source, config_path)
    return copy.deepcopy(_files[config_path])


def _defaults_list(
    repo: CachingConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> DefaultsList:
    chosen = Overrides(repo=repo, overrides_list=overrides_list)
    values = {id(each) for each in chosen.config_overrides}
    options = [each.input_line for each in overrides_list if id(each) not in values]
    key = (config_name, prepend_hydra, skip_missing, *options)
    if key not in _lists or not _is_constant(repo):
        made = _create(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        if not _is_constant(repo):
            return made
        _lists[key] = made
    kept = copy.copy(_lists[key])
    kept.config_overrides = chosen.config_overrides
    return kept


def _composed(
    loader: ConfigLoaderImpl, defaults: Sequence[ResultDefault], repo: CachingConfigRepository
) -> DictConfig:
    if not _is_constant(repo):
        return _put_together(loader, defaults, repo)
    key = tuple(map(repr, defaults))
    if key not in _configs:
        _configs[key] = _put_together(loader, defaults, repo)
    return copy.deepcopy(_configs[key])
