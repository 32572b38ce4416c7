"""Every kind of hostile input, and how many cases of it a run makes."""

import random
from collections.abc import Callable

from tests.hostile import generators, run_generators
from tests.hostile.case import Case
from tests.hostile.sandbox import Sandbox

Generator = Callable[[random.Random, Sandbox], Case]

KINDS: dict[str, tuple[Generator, int]] = {
    "folders": (generators.folders, 700),
    "tensors": (generators.tensors, 350),
    "records": (generators.records, 750),
    "places": (generators.places, 300),
    "commands": (generators.commands, 500),
    "recipes": (generators.recipes, 150),
    "overrides": (generators.overrides, 600),
    "adapters": (run_generators.adapters, 150),
    "benchmarks": (run_generators.benchmarks, 120),
    "reports": (run_generators.reports, 200),
    "outputs": (run_generators.outputs, 200),
    "validations": (run_generators.validations, 120),
    "runs": (run_generators.runs, 120),
    "resumptions": (run_generators.resumptions, 300),
    "texts": (run_generators.texts, 140),
    "continued": (run_generators.continued, 60),
    "datasets": (run_generators.datasets, 120),
}
"""Kind → its generator, and its number of cases."""
