"""The method options of `tritter expand`, and the expansions that they describe.

The options are the keys in a method's option file. Help only reads these files and imports
nothing; the method's own options class validates the values when the command runs.
"""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache, cached_property
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritter.cli.options import CheckpointCommand, with_dashes
from tritter.config.folders import SearchPath, body_of, option_files, search_path
from tritter.config.launch.help import comments
from tritter.errors import Problem, RequestError, nearest, raise_problems
from tritter.targets import TARGET

if TYPE_CHECKING:
    from tritter.core.expansions import ExpansionSpec

# Keys with another option name: shorter, or unambiguous between methods
_OPTION_OF_KEY = {
    "width.num_attention_heads": "num_heads",
    "width.num_key_value_heads": "num_kv_heads",
    "width.init": "width_init",
    "layers.slices": "layers",
    "moe.layers": "sparse_layers",
    "moe.target": "moe_target",
    "moe_add.init": "expert_init",
    "vocab.init": "vocab_init",
    "context.method": "context_method",
}
# Of training, and set by Tritter
_NO_OPTION = (TARGET, "new_blocks_only", "freeze_old_rows", "merges", "expert_hashes")
# Keys of ctx.meta: the requested methods (None: all), and the options that help describes
_METHODS, _SHOWN = "tritter.methods", "tritter.shown"


class MethodCommand(CheckpointCommand):
    """A command with the options of all methods; their values are stored in `ctx.obj`."""

    def get_params(self, ctx: Any) -> list[Any]:
        options = ExpansionMethods.current().parameters
        if (shown := ctx.meta.get(_SHOWN)) is not None:
            options = [each for each in options if each.name in shown]
        return [*super().get_params(ctx), *options]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Describe the options of the requested methods, and only list those of the others."""
        values = ctx.meta[_METHODS]
        if values is None:  # --help-all
            return super().format_help(ctx, formatter)
        methods = ExpansionMethods.current()
        takers = methods.options
        chosen = {name.strip().replace("-", "_") for word in values for name in word.split(",")}
        ctx.meta[_SHOWN] = {option for option in takers if chosen & takers[option].keys()}
        lines = ["Options of the methods (--method METHOD --help or --help-all describes them):"]
        for method in methods.bodies:
            own = [f"--{with_dashes(option)}" for option in takers if method in takers[option]]
            lines += [f"{with_dashes(method)}: {' '.join(own)}"] if method not in chosen else []
        self.epilog = "\n\n".join(lines) if len(lines) > 1 else None
        return super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # The folders of --config-dir may define more options
        parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--config-dir", "--config_dir", "-cd", action="append", default=[])
        parser.add_argument("--method", action="append", default=[])
        folders: list[str] = []
        ctx.meta[_METHODS] = []
        with suppress(ArgumentError):  # a value is missing: reported when the options are read
            known, _ = parser.parse_known_args(list(args))
            folders, ctx.meta[_METHODS] = known.config_dir, known.method
        if ctx.obj is False:  # --help-all
            ctx.meta[_METHODS] = None
        ctx.with_resource(SearchPath.of(folders, None).in_use())
        rest = super().parse_args(ctx, args)
        values = {name: ctx.params.pop(name) for name in ExpansionMethods.current().options}
        ctx.obj = {name: value for name, value in values.items() if value is not None}
        return rest


class ExpansionMethods:
    """The expansion methods of a search path, and the options of a command line for their keys.

    Attributes:
        bodies: method → key → default, from the option files.
        options: option → method that has it → its key in that method.
    """

    def __init__(self) -> None:
        self.bodies: dict[str, dict[str, Any]] = {}
        self.options: dict[str, dict[str, str]] = {}
        for method, path in option_files()["expansion"].items():
            if method != "none" and isinstance(body := body_of(path).get(method), dict):
                self.bodies[method] = body
        for method, body in self.bodies.items():
            for key in body:
                if key not in _NO_OPTION:
                    option = _OPTION_OF_KEY.get(f"{method}.{key}", key)
                    self.options.setdefault(option, {})[method] = key

    @classmethod
    def current(cls) -> ExpansionMethods:
        """Return the methods of the search path of the current command."""
        return _methods_of(search_path())

    @cached_property
    def parameters(self) -> list[Any]:
        """The options as Typer builds them from a function's parameters."""
        bodies, parameters = self.bodies, []
        notes = {method: comments(option_files()["expansion"][method]) for method in bodies}
        for option, takers in self.options.items():
            helps: dict[str, list[str]] = {}
            for method, key in takers.items():
                comment, default = notes[method].get(key, ""), bodies[method][key]
                stated = (
                    [] if default is None or isinstance(default, bool) else [f"default: {default}"]
                )
                line = "; ".join([*filter(None, [comment]), *stated])
                line = line.replace("null = ", "default: ").replace("[", r"\[")  # no markup
                helps.setdefault(line, []).append(method)
            is_flag = all(isinstance(bodies[method][key], bool) for method, key in takers.items())
            is_on = is_flag and all(bodies[method][key] for method, key in takers.items())
            name = with_dashes(option)
            declared = typer.Option(
                f"--{name}/--no-{name}" if is_on else f"--{name}",
                metavar=" " if is_flag else "VALUE",
                help=" ".join(
                    f"{with_dashes(', '.join(names))}: {text}." for text, names in helps.items()
                ),
                rich_help_panel="Methods",
            )
            kind: Any = bool if is_flag else str
            annotation = Annotated[kind | None, declared]
            parameters.append(
                Parameter(option, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )

        def carrier() -> None: ...

        carrier.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        one = typer.Typer(add_completion=False, context_settings={"help_option_names": []})
        one.command()(carrier)
        return typer.main.get_command(one).params

    def option_names(self) -> dict[str, str | None]:
        """Return dotted key → option name for all methods."""
        names: dict[str, str | None] = {"expansion": "--method"}
        for method in self.bodies:
            names[f"expansion.{method}"] = f"--method {with_dashes(method)}"
        for option, takers in self.options.items():
            for method, key in takers.items():
                names[f"expansion.{method}.{key}"] = f"--{with_dashes(option)}"
        return names

    def words(self, spec: ExpansionSpec) -> list[str]:
        """Return the words of a command line that request an expansion."""
        takers = self.options
        options = {keys[spec.name]: o for o, keys in takers.items() if spec.name in keys}
        words = ["--method", with_dashes(spec.name)]
        for field in fields(spec):  # type: ignore[arg-type] # each is a dataclass
            value = getattr(spec, field.name)
            if value == field.default:
                continue
            words.append(f"--{with_dashes(options[field.name])}")
            if isinstance(value, tuple):
                words.append(",".join(map(str, value)))
            elif value is not True:
                words.append(str(value))
        return words

    def specs(self, words: Sequence[str], typed: Mapping[str, Any]) -> tuple[ExpansionSpec, ...]:
        """Return the expansions named by `--method`, in order, with option → typed value."""
        from tritter.config.components import Reader, method_class
        from tritter.options import parse_word

        problems, methods = [], self._names(words)
        fields: dict[str, dict[str, Any]] = {name: {} for name in methods}
        for option, value in typed.items():
            takers = self.options[option]
            taking = [name for name in methods if name in takers]
            if len(taking) == 1:
                fields[taking[0]][takers[taking[0]]] = value
                continue
            if taking:
                share = "both" if len(taking) == 2 else "all"
                reason = f"{_join_names(taking)} {share} have this option; "
                reason += "use a separate command for each method"
            else:
                reason = (
                    f"--method {','.join(map(with_dashes, methods))} does not have this option; "
                    f"{_join_names(takers)} {'does' if len(takers) == 1 else 'do'}"
                )
            problems.append(Problem(f"--{with_dashes(option)}", value, reason=reason))
        raise_problems(problems)
        reader, specs = Reader(tuple), []
        for name in methods:  # options are read like those of a config file, with defaults
            body = self.bodies[name]
            record = method_class("expansion", name, {name: body})
            values = {key: parse_word(record, key, word) for key, word in fields[name].items()}
            bodies, classes = {name: {**body, **values}}, {f"expansion.{name}": record}
            specs += [
                one.options for one in reader.read_methods(bodies, classes, group="expansion")
            ]
        raise_problems(reader.problems)
        return tuple(specs)

    def _names(self, values: Sequence[str]) -> tuple[str, ...]:
        """Return the methods named by `--method`, in order."""
        names = [name.strip().replace("-", "_") for word in values for name in word.split(",")]
        for name in names:
            if name not in self.bodies:
                shown, allowed = with_dashes(name), [*map(with_dashes, self.bodies)]
                reason = f"must be one of {', '.join(allowed)}, or several joined by commas"
                near = nearest(shown, allowed)
                raise RequestError(Problem("expansion", shown, reason, nearest=near))
        return tuple(names)


@cache
def _methods_of(_search_path: SearchPath) -> ExpansionMethods:
    return ExpansionMethods()


def _join_names(names: Iterable[str]) -> str:
    """Return `dus, stack and llama-pro` for these names."""
    *others, last = map(with_dashes, names)
    return f"{', '.join(others)} and {last}" if others else last
