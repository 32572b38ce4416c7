"""The memory of the machine, read from synthetic cgroup files."""

from pathlib import Path

import pytest

from tritter.planning import memory
from tritter.planning.memory import machine_memory

MB = 2**20


@pytest.fixture(autouse=True)
def _physical(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PAGE_SIZE": MB, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__)


def limited(place: Path, lines: str, **limits: object) -> int | None:
    (place / "cgroup").write_text(lines)
    for name, limit in limits.items():
        file = place / "groups" / name.replace("__", "/").replace("_max", ".max")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    return machine_memory(process_groups=place / "cgroup", groups=place / "groups")


@pytest.mark.parametrize(
    ("lines", "limits", "expected"),
    [
        ("0::/", {}, 1000),
        ("0::/a/b\n", {"a__b__memory_max": 300 * MB}, 300),
        ("0::/a/b\n", {"a__b__memory_max": "max", "a__memory_max": 200 * MB}, 200),
        ("0::/a/b\n", {"a__b__memory_max": 400 * MB, "memory_max": 5000 * MB}, 400),
        ("0::/of/the/host", {"memory_max": 100 * MB}, 100),
        ("0::/../..", {"memory_max": "max"}, 1000),
        ("4:memory:/a\n0::/", {"memory__a__memory.limit_in_bytes": 50 * MB}, 50),
        ("4:cpu,memory:/gone", {"memory__memory.limit_in_bytes": 60 * MB}, 60),
        ("4:memory:/", {"memory__memory.limit_in_bytes": 9223372036854771712}, 1000),
        ("4:cpu:/a", {"memory__a__memory.limit_in_bytes": 60 * MB}, 1000),
        ("no such\nform::::", {"memory_max": "lots"}, 1000),
    ],
)
def test_the_smallest_limit_counts(
    tmp_path: Path, lines: str, limits: dict[str, object], expected: int
) -> None:
    assert limited(tmp_path, lines, **limits) == expected * MB


def test_without_groups_it_is_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_memory(process_groups=tmp_path / "none", groups=tmp_path) == 1000 * MB
    monkeypatch.setattr(memory.os, "sysconf", lambda name: int(name))  # as of an unknown name
    assert machine_memory(process_groups=tmp_path / "none", groups=tmp_path) is None


def test_this_machine_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = machine_memory()
    assert found is not None and 2**26 < found < 2**50
