"""How much memory there is: of the machine, or of the control group that a process was put into."""

import os
from collections.abc import Iterator
from pathlib import Path

PROCESS_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# Version 1 writes a huge number where there is no limit, rounded down to a page.
_NO_LIMIT = 2**62


def machine_memory(*, process_groups: Path = PROCESS_GROUPS, groups: Path = GROUPS) -> int | None:
    """Return the bytes that this process may use: the machine's, or its group's if that is less.

    Args:
        process_groups: the file that lists the groups of the process.
        groups: where the groups' own files are mounted.

    Returns:
        None where the system does not tell.
    """
    found = [*_physical(), *_group_limits(process_groups, groups)]
    return min(found) if found else None


def _physical() -> Iterator[int]:
    try:
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # a system that has no such numbers
        return


def _group_limits(process_groups: Path, groups: Path) -> Iterator[int]:
    """Yield the limits of the process's group and of those above it, of both versions.

    In a container the path may be one of the host, which does not exist within: then the mount's
    own file holds the limit.
    """
    try:
        lines = process_groups.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            yield from _limit(folder / name)
            if folder == mount:
                break


def _limit(file: Path) -> Iterator[int]:
    try:
        limit = int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or "max"
        return
    if 0 < limit < _NO_LIMIT:
        yield limit
