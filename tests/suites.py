"""Which tests are quick, and what the quick ones may cost.

Quick is what `pytest` runs without arguments. `full` is on top of it: the rest of large matrices,
processes, sweeps, repeated pipelines. `slow` takes minutes a test and is run before a release.
`gpu` needs a GPU.
"""

import os
import resource
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest

QUICK = "not slow and not full and not gpu"
SIX_FAMILIES = ("llama", "qwen2", "gemma3_text", "gpt2", "phi3", "qwen3_moe")

THIRD = "TRITTER_TEST_THIRD"  # 0, 1 or 2: that third of the files of the full suite alone
COST = "cpu_in_imports_of_torch"
# Of a quick file, in the CPU time of `import torch`, measured in the same process. The aim is 3; a
# file that is run first, or alone, pays as much again for imports and the embedded corpus
BUDGET = 6.0
NOISE = 3.0  # between two runs on a shared machine


class Suites:
    """A pytest plugin that marks the tests beyond `quick_cases` and adds up what files cost.

    Args:
        import_torch_seconds: CPU time of `import torch` in this process.
    """

    def __init__(self, config: pytest.Config, *, import_torch_seconds: float) -> None:
        self.config = config
        self.unit = max(import_torch_seconds, 0.5)  # less: it was imported before we measured
        self.costs: dict[str, float] = defaultdict(float)
        self.started = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        matrices = defaultdict(list)
        for item in items:
            marker = item.get_closest_marker("quick_cases")
            is_quick = not any(map(item.get_closest_marker, ("slow", "full", "gpu")))
            if marker and is_quick and isinstance(item, pytest.Function):
                matrices[item.nodeid.partition("[")[0], marker.args[0]].append(item)
        for (_, count), cases in matrices.items():
            for case in set(cases) - set(spread(cases, count)):
                case.add_marker("full")
        if third := os.environ.get(THIRD):
            kept = [item for item in items if is_of_third(item, int(third))]
            self.config.hook.pytest_deselected(items=[i for i in items if i not in set(kept)])
            items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self.started = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        if call.when == "teardown":
            item.user_properties.append((COST, (cpu_seconds() - self.started) / self.unit))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            measured = dict(report.user_properties)
            self.costs[report.nodeid.partition("::")[0]] += measured.get(COST, 0.0)

    @property
    def over_budget(self) -> list[str]:
        """What to print of each quick file that costs too much."""
        if self.config.option.markexpr != QUICK:
            return []
        return [
            f"{file} costs {cost:.1f} x `import torch` of CPU time, and a quick file may cost "
            f"{BUDGET:.0f} (x {NOISE:.0f} for noise): make it cheaper, or mark what repeats "
            "`full` (pytest.mark.full, pytest.mark.quick_cases)"
            for file, cost in self.costs.items()
            if cost > BUDGET * NOISE
        ]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over_budget and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.costs:
            total = sum(self.costs.values())
            terminalreporter.write_line(f"CPU time of these tests: {total:.0f} x `import torch`")
        for line in self.over_budget:
            terminalreporter.write_line(line, red=True)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def spread(cases: Sequence[pytest.Function], count: int) -> list[pytest.Function]:
    """Choose cases of a matrix, so that as many values as possible are met; always the same.

    The six families that differ most come before the others. The name of the test says which of
    them is first, so that each is met by some tests.
    """
    step = len(cases) / min(count, len(cases))
    first = zlib.crc32(cases[0].nodeid.partition("[")[0].encode()) % max(int(step), 1)
    even = [cases[first + int(number * step)] for number in range(min(count, len(cases)))]
    rest = [case for case in cases if case not in set(even)]
    waiting = sorted([*even, *rest], key=_is_further)
    chosen: list[pytest.Function] = []
    seen: set[tuple[str, int]] = set()
    while waiting and len(chosen) < count:
        best = max(waiting, key=lambda case: len(_values(case) - seen))
        waiting.remove(best)
        chosen.append(best)
        seen |= _values(best)
    return chosen


def _values(case: pytest.Function) -> set[tuple[str, int]]:
    """Return the parameters of a case; a value is the same object in all cases that have it."""
    params = case.callspec.params if hasattr(case, "callspec") else {}
    return {(name, id(value)) for name, value in params.items()}


def _is_further(case: pytest.Function) -> bool:
    family = case.callspec.params.get("family") if hasattr(case, "callspec") else None
    return family is not None and family not in SIX_FAMILIES


def is_of_third(item: pytest.Item, third: int) -> bool:
    """True if a test is in the full suite alone, and its file in this third of it."""
    file = item.nodeid.partition("::")[0]
    is_full = item.get_closest_marker("full") and not item.get_closest_marker("slow")
    return bool(is_full) and zlib.crc32(file.encode()) % 3 == third
