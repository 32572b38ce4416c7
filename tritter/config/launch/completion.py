"""What may stand where the cursor is, as Hydra finds it: groups, options and keys of train.py."""

from collections.abc import Sequence

from hydra.plugins.completion_plugin import DefaultCompletionPlugin

from tritter.config.folders import composing_from, front, front_of
from tritter.config.launch.command_line import FLAGS, read_command_line
from tritter.config.launch.composition import composer
from tritter.errors import RequestError


def completions(words: Sequence[str]) -> list[str]:
    """Return what the last of some words may become; nothing behind what is wrong.

    Args:
        words: those behind the program; the last one is begun, and may be empty.
    """
    *before, word = words or [""]
    if word.startswith("-"):
        return sorted(flag for names in FLAGS for flag in names if flag.startswith(word))
    try:
        command = read_command_line(before)
        meant = front_of(command.config_folders, command.config_name, searchpath=command.searchpath)
        with composing_from(meant), composer() as composing:
            line = " ".join([*command.overrides, word])
            plugin = DefaultCompletionPlugin(composing.loader)
            found: list[str] = plugin._query(front().config_name, line)
    except RequestError:
        return []
    return [one for one in found if one != word]
