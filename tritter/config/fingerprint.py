"""What of a config determines the result: two runs with one fingerprint are the same run."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tritter.config.problems import show
from tritter.config.schema import METHOD_GROUPS, SECTIONS, RunConfig

# What may differ between the parts of one run: where it is, who watches, and how.
_WITHOUT_EFFECT = {
    "logger": None,
    "trainer": ("devices", "strategy", "progress", "save_every_n_steps", "check_memory"),
}
_ABSENT = "(absent)"


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """Return, as plain JSON values, everything of a config that determines the result.

    `resume`, `cache_dir`, `logger` and, of `trainer`, `devices`, `strategy`, `progress`,
    `save_every_n_steps` and `check_memory` are left out. The methods of an ordered group stand
    beside the list of their names.
    """
    result: dict[str, Any] = {"seed": config.seed, "control": config.control}
    for section in SECTIONS:
        if section == "pipeline" and config.pipeline.target_params is None:
            continue  # one round, as every run had before there were more
        without = _WITHOUT_EFFECT.get(section, ())
        if without is not None:
            values = asdict(getattr(config, section))
            result[section] = {key: values[key] for key in values if key not in without}
    for group in METHOD_GROUPS:
        methods = getattr(config, group)
        bodies = {method.name: _plain(asdict(method)) for method in methods}
        result[group] = {"methods": [method.name for method in methods], **bodies}
    return result


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys whose values differ between two fingerprints."""
    before, after = _flatten(old), _flatten(new)
    keys = [*before, *(key for key in after if key not in before)]
    return [key for key in keys if before.get(key, _ABSENT) != after.get(key, _ABSENT)]


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line `key: old → new` for each changed key."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{key}: {show(before.get(key, _ABSENT))} → {show(after.get(key, _ABSENT))}"
        for key in changed_keys(old, new)
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(value) if isinstance(value, tuple) else value for k, value in values.items()}
