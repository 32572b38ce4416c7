"""The house: which room may import which, which library belongs where, and how long code may be."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tritter"
PROGRAM = "train"

# Small modules that every room may import, and that import no room.
OPEN = {
    "conf_folder",
    "errors",
    "launched",
    "limits",
    "loading",
    "options",
    "seeds",
    "stopping",
    "targets",
    "terminal",
}

# Room → rooms that it may import besides; what is missing is refused. A name that stands for
# a package of rooms, as `core` does, stands for all of them.
_BELOW_TRAINING = {"core", "storage", "checkpoints", "data"}
_TRAINING = _BELOW_TRAINING | {"transform", "evaluation", "training"}
_BELOW_PIPELINE = _TRAINING | {"methods", "config", "planning"}
ARROWS: dict[str, set[str]] = {
    "storage": set(),
    "core.parameter_map": set(),
    "core.stock_routers": {"storage"},
    "core.families": {"core.parameter_map", "storage"},
    "core.models": {"core.families", "core.stock_routers", "storage"},
    "core.streamed": {"core.families", "core.models", "storage"},
    "core.expansions": {"core.families", "core.parameter_map"},
    "data": {"storage"},
    "checkpoints": {"core.stock_routers", "core.families", "core.parameter_map", "storage", "data"},
    "transform": _BELOW_TRAINING,
    "evaluation": _BELOW_TRAINING | {"transform"},
    "planning": {"core", "checkpoints"},
    "training": _TRAINING - {"training"},
    "methods.forgetting": _TRAINING,
    "methods.moe_routing": _TRAINING,
    "methods.growth": _TRAINING,
    "methods.novelty": {"core.models", "data", "evaluation"},
    "methods.experts": _TRAINING | {"methods.novelty"},
    "methods.whole": _BELOW_TRAINING | {"methods.experts"},
    "integrations": _TRAINING | {"methods.forgetting"},
    "config": _TRAINING | {"methods.moe_routing", "planning"},
    "report": {"checkpoints", "evaluation", "storage"},
    "pipeline": _BELOW_PIPELINE | {"report"},
    "cli": _BELOW_PIPELINE | {"report", "pipeline"},
    "api": _BELOW_PIPELINE | {"report", "pipeline"},
    "__main__": {"cli"},
    PROGRAM: {"config", "pipeline", "report"},
}
PACKAGES_OF_ROOMS = {"core", "methods"}

# Room → its top floor, which uses the rest of the room and is used by none of it.
TOP_FLOORS = {"config": "launch"}

# Library → where it may be imported: rooms, or single modules.
LIBRARIES: dict[str, set[str]] = {
    "lightning": {"data", "training", "methods", "pipeline"},
    "hydra": {"config", PROGRAM},
    "omegaconf": {"config", "tritter.cli.recipe", PROGRAM},
    "transformers": {"core", "tritter.methods.experts.adapters", "integrations", "tritter.api"},
    "wandb": {"tritter.pipeline.metrics"},
    "peft": {"methods.experts"},
    "lm_eval": {f"tritter.evaluation.benchmarks.{name}" for name in ("harness", "formats")},
}
LAZY_LIBRARIES = {"wandb", "lm_eval", "peft"}  # slow, and not needed by every run
TORCH_ONLY_ROOMS = {"core.parameter_map", "core.stock_routers"}  # the standard library and torch

# Room → most files and lines: both may only fall, until the redesign of issue 25 ends
RATCHET = {
    "(top)": (13, 2_344),
    "checkpoints": (12, 2_986),
    "cli": (20, 5_675),
    "config": (18, 4_960),
    "core": (37, 11_539),
    "data": (24, 8_737),
    "evaluation": (16, 4_244),
    "integrations": (2, 796),
    "methods": (45, 12_055),
    "pipeline": (28, 7_075),
    "planning": (9, 2_050),
    "report": (15, 4_270),
    "storage": (10, 1_999),
    "training": (15, 4_962),
    "transform": (6, 1_756),
}
# What there is to know; both may only fall: names of modules without an underscore, and classes
# that only hold values
MAX_PUBLIC_NAMES, MAX_RECORDS = 1_145, 249
# Capability → its modules, and most other modules that import them; the figures may only fall
CAPABILITIES: dict[str, tuple[int, tuple[str, ...]]] = {
    "LoRA experts": (6, (
        "methods.experts", "checkpoints.expert_files", "cli.export_experts",
        "report.topics.experts",
    )),
    "mixture of experts": (14, (
        "methods.moe_routing", "core.expansions.moe", "core.expansions.moe_add",
        "core.expansions.moe_children", "core.stock_routers",
        "pipeline.moe", "pipeline.stages.appended", "planning.upcycling", "transform.children",
    )),
    "growth": (2, ("methods.growth", "report.topics.growth")),
    "vocabulary": (6, (
        "core.expansions.vocab", "data.vocabulary", "pipeline.stages.vocabulary",
        "transform.vocabulary",
    )),
    "discovery": (6, ("core.expansions.on_twin", "core.families.discovery")),
    "context": (6, ("core.expansions.context", "pipeline.windows")),
}  # fmt: skip
MAX_LONELY_MODULES = 20  # with a single caller, which is in their own room

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 80


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's target; `is_lazy` in a function or for types alone."""

    module: str
    line: int
    is_lazy: bool


@dataclass(frozen=True)
class Module:
    """One file of the house, parsed once."""

    name: str
    source: str

    @property
    def room(self) -> str:
        """Return the package below `tritter`, with what contains it: `data`, `core.families`."""
        return room_of(self.name) if "." in self.name else self.name

    @property
    def whole_room(self) -> str:
        return self.room.partition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        return tuple(_imports(self.tree, is_lazy=False))


def _imports(node: ast.AST, *, is_lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, is_lazy)
        elif isinstance(child, ast.ImportFrom):
            # A relative import would hide its target from this test, and from a reader.
            module = "." * child.level + (child.module or "")
            for alias in child.names:
                yield Import(f"{module}.{alias.name}", child.lineno, is_lazy)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            inside |= isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from _imports(child, is_lazy=is_lazy or inside)


def room_of(module: str) -> str:
    """Return the room of a dotted name below `tritter`."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[0] in PACKAGES_OF_ROOMS else 1])


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _house() -> list[Module]:
    files = [*sorted((ROOT / PACKAGE).rglob("*.py")), ROOT / f"{PROGRAM}.py"]
    return [Module(_name(path), path.read_text(encoding="utf-8")) for path in files]


def arrow_violations(module: Module) -> list[str]:
    """Return the imports of rooms that stand below, and relative imports."""
    found = []
    for entry in module.imports:
        where = f"{module.name}:{entry.line}"
        if entry.module.startswith("."):
            found.append(f"{where} imports {entry.module} relatively")
        parts = entry.module.split(".")
        if parts[0] == PROGRAM:
            found.append(f"{where} imports the program")
        if parts[0] != PACKAGE or module.name == PACKAGE:
            continue
        room = room_of(entry.module) if len(parts) > 1 else PACKAGE
        allowed = OPEN | {"__version__", module.room} | ARROWS.get(module.room, set())
        if not {room, room.partition(".")[0]} & allowed:
            found.append(f"{where} imports {entry.module}; {module.room} may not use {room}")
    return found


def floor_violations(module: Module) -> list[str]:
    """Return the imports of its own room's top floor from below it."""
    top = f"{PACKAGE}.{module.room}.{TOP_FLOORS.get(module.room)}."
    if module.name.startswith(top) or module.room not in TOP_FLOORS:
        return []
    return [
        f"{module.name}:{entry.line} imports {entry.module}, which stands above it"
        for entry in module.imports
        if entry.module.startswith(top)
    ]


def library_violations(module: Module) -> list[str]:
    """Return the imports of libraries that belong elsewhere, or should wait for a call."""
    found = []
    for entry in module.imports:
        where = f"{module.name}:{entry.line}"
        library = entry.module.split(".")[0]
        allowed = LIBRARIES.get(library)
        if allowed is not None and not {module.room, module.whole_room, module.name} & allowed:
            found.append(f"{where} imports {library}, which belongs to {sorted(allowed)}")
        if library in LAZY_LIBRARIES and not entry.is_lazy:
            found.append(f"{where} imports {library} at its top; import it where it is used")
        if module.room in TORCH_ONLY_ROOMS and library not in {PACKAGE, "torch", *_STANDARD}:
            found.append(f"{where} imports {library}; {module.room} has torch alone")
    return found


_STANDARD = {
    "__future__",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "hashlib",
    "json",
    "math",
}
_STANDARD |= {"functools", "pathlib", "re", "types", "typing"}


def length_violations(module: Module) -> list[str]:
    """Return files and functions that are too long to be read at once."""
    lines = module.source.count("\n")
    found = [f"{module.name} has {lines} lines"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{module.name}.{node.name} has {length} lines")
    return found


def circle(modules: list[Module]) -> list[str]:
    """Return the modules of an import circle, or nothing; lazy imports count as well."""
    names = {module.name for module in modules}
    graph = {
        module.name: {
            target
            for entry in module.imports
            if (target := _own_module(entry.module, names)) not in (None, module.name)
        }
        for module in modules
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _own_module(target: str, names: set[str]) -> str | None:
    """Return the module that an import of a module, or of a name in one, reads."""
    return next((name for name in (target, target.rpartition(".")[0]) if name in names), None)


HOUSE = _house()


def test_a_module_with_one_caller_is_seen():
    first = Module("tritter.data.a", "from tritter.data.b import x")
    second = Module("tritter.data.b", "x = 1")
    assert lonely([first, second]) == ["tritter.data.b"]
    assert not lonely([first, second, Module("tritter.cli.c", first.source)])


def test_the_house_is_found():
    assert {"tritter.core.parameter_map.tensor_map", "tritter.pipeline.pipeline", "train"} <= {
        module.name for module in HOUSE
    }


def test_every_room_stands_in_the_table():
    rooms = {module.room for module in HOUSE} - {PACKAGE} - PACKAGES_OF_ROOMS
    assert rooms == OPEN | set(ARROWS)


def test_the_table_itself_has_no_circle():
    TopologicalSorter(ARROWS).prepare()


def test_arrows_libraries_and_lengths():
    rules = (arrow_violations, floor_violations, library_violations, length_violations)
    assert not [found for module in HOUSE for rule in rules for found in rule(module)]


def test_no_circles():
    assert not circle(HOUSE)


def sizes(modules: list[Module]) -> dict[str, tuple[int, int]]:
    """Return files and lines of each whole room; what lies beside them is one of its own."""
    folders = {module.whole_room for module in modules if module.name.count(".") > 1}
    found: dict[str, tuple[int, int]] = {}
    for module in modules:
        room = module.whole_room if module.whole_room in folders else "(top)"
        files, lines = found.get(room, (0, 0))
        found[room] = (files + 1, lines + module.source.count("\n"))
    return found


def lonely(modules: list[Module]) -> list[str]:
    """Return the modules that one other imports, which stands in their own folder."""
    names = {module.name for module in modules}
    callers: dict[str, set[str]] = {name: set() for name in names}
    for module in modules:
        for entry in module.imports:
            target = _own_module(entry.module, names)
            if target is not None and target != module.name:
                callers[target].add(module.name)
    return [
        name
        for name, found in sorted(callers.items())
        if len(found) == 1 and name.rpartition(".")[0] == min(found).rpartition(".")[0]
    ]


def test_rooms_only_shrink():
    """A merge that makes a room smaller writes the new figures down."""
    found = sizes([module for module in HOUSE if module.name != PROGRAM])
    most = {room: RATCHET.get(room, (0, 0)) for room in found}
    grown = [
        f"{room} has {now} files and lines, at most {most[room]}"
        for room, now in found.items()
        if now[0] > most[room][0] or now[1] > most[room][1]
    ]
    assert not grown


def public_names(module: Module) -> set[str]:
    """Return the names that a module defines for others."""
    found = set()
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inner = (each for target in targets for each in ast.walk(target))
            found |= {n.id for n in inner if isinstance(n, ast.Name) and type(n.ctx) is ast.Store}
    return {name for name in found if not name.startswith("_")}


def records(module: Module) -> list[str]:
    """Return the dataclasses, options and named tuples of a module."""
    kinds = re.compile(r"(dataclass|options|NamedTuple|TypedDict)\b")
    return [
        node.name
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        and any(kinds.match(ast.unparse(n)) for n in (*node.decorator_list, *node.bases))
    ]


def test_what_there_is_to_know_only_shrinks():
    own = [module for module in HOUSE if module.name != PROGRAM]
    assert sum(len(public_names(module)) for module in own) <= MAX_PUBLIC_NAMES
    assert sum(len(records(module)) for module in own) <= MAX_RECORDS


def test_names_and_records_are_counted():
    source = "A: int = 1\n_b = 2\nc, d = 3, 4\n@dataclass(frozen=True)\nclass E:\n    f = 1\n"
    module = Module("tritter.data.a", source + "class G(NamedTuple):\n    x: int\n")
    assert public_names(module) == {"A", "c", "d", "E", "G"} and records(module) == ["E", "G"]


def modules_that_import(capability: Iterable[str], house: Iterable[Module]) -> list[str]:
    """Return the modules that import those of a capability, without its own."""
    own = tuple(f"{PACKAGE}.{name}." for name in capability)
    return [
        module.name
        for module in house
        if not f"{module.name}.".startswith(own)
        and any(f"{entry.module}.".startswith(own) for entry in module.imports)
    ]


@pytest.mark.parametrize("name", CAPABILITIES)
def test_few_modules_know_a_capability(name):
    most, modules = CAPABILITIES[name]
    for module in modules:  # one that has moved would count as nothing
        assert any(f"{each.name}.".startswith(f"{PACKAGE}.{module}.") for each in HOUSE), module
    assert len(modules_that_import(modules, HOUSE)) <= most


def test_modules_that_import_a_capability_are_found():
    inside = Module("tritter.data.a.b", "from tritter.data.a import c")
    outside = Module("tritter.core.d", "def f():\n    from tritter.data.a.b import c")
    namesake = Module("tritter.core.e", "from tritter.data.ab import c")
    house = [inside, outside, namesake]
    assert modules_that_import(["data.a"], house) == ["tritter.core.d"]


def late_constants(module: Module) -> list[str]:
    """Return constants after the first definition that are not computed from one."""
    defined, found = set[str](), []
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and defined:
            names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
            if defined & {each.id for each in names}:
                defined |= {each.id for each in names if type(each.ctx) is ast.Store}
            else:
                found.append(f"{module.name}:{node.lineno}")
    return found


def test_constants_stand_before_definitions():
    late = Module("x", "A = 1\n\ndef f(): ...\n\nB = f()\nC = (B, A)\nD = 2\n")
    assert late_constants(late) == ["x:7"]
    assert not [place for module in HOUSE for place in late_constants(module)]


def test_few_modules_have_one_caller():
    found = lonely(HOUSE)
    assert len(found) <= MAX_LONELY_MODULES, found


def test_no_rooms_for_odds_and_ends():
    assert not [m.name for m in HOUSE if FORBIDDEN_NAMES & set(m.name.split("."))]


@pytest.mark.parametrize(
    ("name", "source", "word"),
    [
        (
            "tritter.core.families.tables",
            "from tritter.training import fit",
            "may not use training",
        ),
        ("tritter.data.x", "def f():\n    from tritter.core.models import load_model", "models"),
        ("tritter.data.x", "from tritter.core import expansions", "may not use core.expansions"),
        ("tritter.core.models", "from tritter.methods import growth", "may not use methods.growth"),
        ("tritter.data.x", "from . import cache", "relatively"),
        ("tritter.report.x", "import train", "imports the program"),
    ],
)
def test_a_wrong_arrow_is_seen(name, source, word):
    assert word in " ".join(arrow_violations(Module(name, source)))


def test_an_arrow_to_the_top_floor_is_seen():
    plan = "from tritter.config.launch.plan import Plan"
    assert floor_violations(Module("tritter.config.rules", plan))
    assert not floor_violations(Module("tritter.config.launch.sweep", plan))
    assert not floor_violations(Module("tritter.cli.train", plan))


@pytest.mark.parametrize(
    ("name", "source", "word"),
    [
        ("tritter.core.families.tables", "import lightning.pytorch as pl", "belongs to"),
        ("tritter.training.x", "def f():\n    from omegaconf import OmegaConf", "omegaconf"),
        ("tritter.pipeline.metrics", "import wandb", "at its top"),
        ("tritter.pipeline.pipeline", "def f():\n    import wandb", "belongs to"),
        ("tritter.core.parameter_map.x", "import numpy as np", "torch alone"),
    ],
)
def test_a_misplaced_library_is_seen(name, source, word):
    assert word in " ".join(library_violations(Module(name, source)))


def test_what_is_allowed_is_not_seen():
    module = Module(
        "tritter.pipeline.metrics",
        "from tritter.errors import TritterError\nfrom tritter.training import fit\n"
        "from lightning import Trainer\ndef f():\n    import wandb\n",
    )
    assert not [*arrow_violations(module), *library_violations(module)]


def test_a_circle_and_a_long_function_are_seen():
    first = Module("tritter.data.a", "from tritter.data.b import x")
    second = Module("tritter.data.b", "def f():\n    import tritter.data.a")
    assert {"tritter.data.a", "tritter.data.b"} == set(circle([first, second]))
    long = Module("tritter.data.a", "def f():\n" + "    x = 1\n" * MAX_FILE_LINES)
    assert len(length_violations(long)) == 2


def test_there_is_one_training_loop():
    """Lightning takes every step, so that all are saved, refused, counted and logged alike."""
    found = [
        f"{module.name}:{node.lineno}"
        for module in HOUSE
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "backward"
    ]
    assert not found


def test_what_is_printed_goes_through_the_terminals_border():
    """Rich's own console and a bare print would let what steers a terminal through."""
    found = [
        f"{module.name}:{entry.line}"
        for module in HOUSE
        for entry in module.imports
        if entry.module == "rich.console.Console" and module.name != "tritter.terminal"
    ]
    allowed = {"tritter.terminal", "tritter.cli.output"}  # the latter prints JSON, which is ASCII
    for module in HOUSE:
        for node in ast.walk(module.tree):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            if is_print and module.name not in allowed:
                found.append(f"{module.name}:{node.lineno}")
    assert not found
