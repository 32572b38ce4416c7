"""docs/reference.md lists every key and every option; it is generated, and this keeps it current.

`python -m tests.test_reference` writes it anew.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main
import yaml

from tritter.cli.main import app
from tritter.conf_folder import config_folder
from tritter.config.launch.help import comments, description
from tritter.config.validation import known_keys

REFERENCE = Path(__file__).parents[1] / "docs/reference.md"
_WRITE = "`python -m tests.test_reference`"
_HEAD = f"""# Reference

Every key of a run's configuration and every option of the commands, with defaults and meaning. \
Generated from `conf/` and the commands themselves by {_WRITE}: change those, not this page. What \
things are for stands in the other pages; `python train.py expansion=dus --cfg job` shows what a \
command line comes to.

Keys stand as they are typed: `training.max_steps=400`. Where options of a group differ in a \
default, each is named."""


def reference() -> str:
    """Return the whole page."""
    groups = sorted(path.name for path in config_folder().iterdir() if path.is_dir())
    root = _plain(config_folder() / "config.yaml")
    own = [key for key in root if key not in {*groups, "hydra", "defaults"}]
    told = comments(config_folder() / "config.yaml")
    blocks = [_HEAD, "## The run", _table(("key", "default", ""), [
        (f"`{key}`", _value(root[key]), told.get(key, "")) for key in own
    ])]  # fmt: skip
    for group in groups:
        blocks += _of_group(group)
    blocks.append("# Commands")
    command = typer.main.get_command(app)
    for name, each in sorted(command.commands.items()):  # type: ignore[attr-defined]
        blocks += _of_command(name, each)
    return "\n\n".join(blocks) + "\n"


def _of_group(group: str) -> Iterator[str]:
    files = sorted((config_folder() / group).glob("*.yaml"))
    yield f"## {group}"
    rows = [(f"`{group}={path.stem}`", description(path)) for path in files]
    yield _table(("option", ""), rows)
    values: dict[str, dict[str, str]] = defaultdict(dict)
    told: dict[str, str] = {}
    for path in files if group not in ("experiment", "ladder") else ():
        said = comments(path)
        for key, value in _leaves(_plain(path)):
            values[key][path.stem] = _value(value)
            told[key] = told.get(key) or said.get(key.rpartition(".")[2], "")
    if values:
        rows_of_keys = [(f"`{group}.{k}`", _defaults(values[k]), told[k]) for k in values]
        yield _table(("key", "default", ""), rows_of_keys)


def _of_command(name: str, command: Any) -> Iterator[str]:
    yield f"## tritter {name}"
    yield (command.help or "").split("\n\n")[0].replace("\n", " ").strip()
    rows = []
    for parameter in command.params:
        if "--help" in parameter.opts or getattr(parameter, "hidden", False):
            continue
        words = ", ".join(f"`{opt}`" for opt in (*parameter.opts, *parameter.secondary_opts))
        if parameter.param_type_name == "argument":
            words = f"`{parameter.metavar or parameter.name.upper()}`"
        default = "required" if parameter.required else _default_of(parameter)
        rows.append((words, default, (getattr(parameter, "help", None) or "")))
    if rows:
        yield _table(("option", "default", ""), rows)


def _default_of(parameter: Any) -> str:
    default = parameter.default
    is_told = default not in (None, False, (), [], "") and not callable(default)
    return f"`{getattr(default, 'value', default)}`" if is_told else ""


def _plain(path: Path) -> Mapping[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _leaves(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if key in ("_target_", "defaults") or value == {}:
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return (
        f"`{'null' if value is None else str(value).lower() if value in (True, False) else value}`"
    )


def _defaults(values: Mapping[str, str]) -> str:
    """Return the one default, or each with the options that have it."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    names = defaultdict(list)
    for option, value in values.items():
        names[value].append(option)
    return "; ".join(f"{value} ({', '.join(options)})" for value, options in names.items())


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def test_the_page_is_what_the_code_says() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference(), f"{_WRITE} writes it anew"


def test_no_key_is_left_out() -> None:
    page = reference()
    assert not [key for key in known_keys() if f"`{key}`" not in page]


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
