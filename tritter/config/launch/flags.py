"""Every flag of `python train.py`, once: the parser, `--hydra-help` and completion read it here."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that works.

    Args:
        names: as it is typed, the short one first.
        told: what it does.
        value: what stands behind it; empty: nothing does.
        choices: all that may stand behind it.
        is_asking: it asks for something of its own, and only one such flag can be given.
    """

    names: tuple[str, ...]
    told: str
    value: str = ""
    choices: tuple[str, ...] = ()
    is_asking: bool = False

    @property
    def shown(self) -> str:
        """The names, and what stands behind them."""
        return ", ".join(self.names) + (f" {self.value or '|'.join(self.choices)}".rstrip())


FLAGS = (
    Flag(("-h", "--help"), "groups and their options; with GROUP=OPTION, the keys of that option"),
    Flag(("--hydra-help",), "this text", is_asking=True),
    Flag(("--version",), "the version of Tritter (and not of Hydra)"),
    Flag(("-m", "--multirun"), "a run for each combination of the listed values", is_asking=True),
    Flag(
        ("-c", "--cfg"),
        "print every key and value that comes of the command line: of the job, of Hydra, of both",
        choices=("job", "hydra", "all"),
        is_asking=True,
    ),
    Flag(("-p", "--package"), "with --cfg: only what is below this key", value="KEY"),
    Flag(("--resolve",), "with --cfg: values in place of what refers to them, as in ${seed}"),
    Flag(
        ("-i", "--info"),
        "print from which files the command line is put together; WHAT is all (without a word), "
        "config, defaults, defaults-tree, plugins or searchpath",
        value="[WHAT]",
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        is_asking=True,
    ),
    Flag(("-cd", "--config-dir"), "a folder of options of yours; may be repeated", value="DIR"),
    Flag(("-cn", "--config-name"), "begin with F.yaml instead of config.yaml", value="F"),
    Flag(
        ("-sc", "--shell-completion"),
        "print what a shell has to know: "
        'eval "$(python train.py -sc install=bash)" turns completion on, uninstall=bash off; '
        "query=bash is what the shell then asks",
        is_asking=True,
    ),
)
# Those of Hydra's that are none here → why
REFUSED: Mapping[tuple[str, ...], str] = {
    ("-r", "--run"): "one run is what happens without a flag; hydra.mode=RUN says it where a file "
    "says MULTIRUN",
    ("-cp", "--config-path"): "Tritter's own options are always there; --config-dir DIR adds yours",
    ("--experimental-rerun",): "it reads a pickle, which may run anything; resume=DIR goes on with "
    "a run, and its .hydra/overrides.yaml says how it was started",
}
SHELL_REQUESTS = ("install=bash", "uninstall=bash", "query=bash")


def flag_of(word: str) -> Flag | None:
    """Return the flag of a name."""
    return next((flag for flag in FLAGS if word in flag.names), None)
