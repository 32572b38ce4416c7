"""What `--hydra-help` prints: of Hydra's flags and settings those that work here, and no others."""

import textwrap
from collections.abc import Iterable, Iterator

from hydra import __version__

from tritter.config.launch.composition import composer
from tritter.config.launch.flags import FLAGS, REFUSED
from tritter.config.launch.hydra_settings import ALLOWED

_WIDTH, _COLUMN = 79, 35
_HEAD = f"""\
Hydra {__version__} puts the configuration together and starts the jobs of a
sweep. Of its flags and settings those below work; every other one is refused
by name."""


def hydra_help() -> str:
    """Return the flags and settings of Hydra that work, and why others don't."""
    flags = [(flag.shown, flag.told) for flag in FLAGS]
    refused = [(", ".join(names), why) for names, why in REFUSED.items()]
    settings = [(f"hydra.{name}", told) for name, told in ALLOWED.items()]
    with composer() as composing:
        plugins = [
            (f"hydra/{kind}", ", ".join(composing.loader.get_group_options(f"hydra/{kind}")))
            for kind in ("launcher", "sweeper")
        ]
    blocks = {
        "Flags": flags,
        "Flags of Hydra's that are refused": refused,
        "Settings (KEY=VALUE)": settings,
        "Installed to choose from (GROUP=OPTION)": plugins,
    }
    return "\n\n".join(
        [_HEAD, *("\n".join([title, *_table(rows)]) for title, rows in blocks.items())]
    )


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, told in rows:
        yield from textwrap.wrap(
            told,
            width=_WIDTH,
            initial_indent=f"  {name:<{_COLUMN}}",
            subsequent_indent=" " * (_COLUMN + 2),
            break_on_hyphens=False,
        )
