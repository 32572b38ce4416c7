"""The suites: which cases of a matrix stay quick, and that a file which costs too much fails."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import suites
from tests.suites import BUDGET, NOISE, THIRD

pytest_plugins = ["pytester"]

CONFTEST = """
from tests.suites import Suites

def pytest_configure(config):
    for marker in ("full", "gpu", "slow", "quick_cases(count)"):
        config.addinivalue_line("markers", marker)
    config.pluginmanager.register(Suites(config, import_torch_seconds=1.0))
"""
MATRIX = """
import pytest

@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "qwen2"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_matrix(family, size):
    pass

@pytest.mark.full
def test_repeated():
    pass

@pytest.mark.full
@pytest.mark.slow
def test_slow():
    pass
"""
QUICK = ("-m", suites.QUICK)
Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Return what runs the source of a test file in a pytest of its own, in this process."""
    pytester.makeconftest(CONFTEST)

    def run_source(source: str, *words: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v", *words)

    return run_source


def test_quick_cases_meet_all_sizes_and_the_six_families_first(run: Run):
    run_quick = run(MATRIX, *QUICK)
    run_quick.assert_outcomes(passed=3, deselected=11)
    lines = [line for line in run_quick.outlines if "PASSED" in line]
    assert {line.partition("[")[2].split("-")[0] for line in lines} == {"1", "2", "3"}
    assert {"llama", "qwen2"} <= {line.partition("]")[0].split("-")[-1] for line in lines}
    run(MATRIX, "-m", "not slow").assert_outcomes(passed=13, deselected=1)


def test_three_thirds_are_what_is_full_and_not_slow(run: Run, monkeypatch: pytest.MonkeyPatch):
    passed = 0
    for third in range(3):
        monkeypatch.setenv(THIRD, str(third))
        passed += run(MATRIX, "-m", "not slow").parseoutcomes().get("passed", 0)
    assert passed == 10


@pytest.mark.parametrize("words", [QUICK, ("-m", "not slow")])
def test_a_quick_file_over_its_budget_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    monkeypatch.setattr("tests.suites.cpu_seconds", iter([0.0, BUDGET * NOISE + 1]).__next__)
    outcome = run("def test_dear():\n    pass", *words)
    outcome.assert_outcomes(passed=1)
    is_quick = words == QUICK
    assert outcome.ret == (pytest.ExitCode.TESTS_FAILED if is_quick else pytest.ExitCode.OK)
    assert is_quick == ("pytest.mark.full" in outcome.stdout.str())
    assert Path("test_a_quick_file_over_its_budget_fails.py").is_file()
