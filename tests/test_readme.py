"""Nothing documented may rot: commands, snippets, names, paths and links of all Markdown files."""

import ast
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml

from tests.config.conftest import planned
from tests.evaluation.published import PUBLISHED
from tests.evaluation.test_benchmark_files import written
from tests.oracle import relative_difference, saved, stock, tiny_llama, tokens
from tests.oracle.children import child
from tests.report.conftest import SUMMARY
from tritter.checkpoints.expert_files import AdapterShape
from tritter.cli import main
from tritter.config.components import known_keys
from tritter.config.launch.command_line import CommandLine
from tritter.config.launch.composition import Loader
from tritter.config.launch.help import help_text
from tritter.config.launch.plan import _RUNS
from tritter.config.run_folder import RunRecord
from tritter.core.expansions import Width
from tritter.core.models import new_model, save_tokenizer
from tritter.data.documents import Document as TextDocument
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.launched import Launch
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import ExpertFolder
from tritter.training.options import _trainer_parameters
from tritter.transform import expand

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDERS = (".", "experiments", "outputs")
DOCUMENTS = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.md")]
DOCUMENTS = sorted([*DOCUMENTS, *(ROOT / "docs").rglob("*.md")])
# Their examples are run by tests/config/test_outside.py
_OUTSIDE = ("write_an_extension", "write_an_expansion", "write_a_stage")
OUTSIDE = tuple(f"docs/how-to/{name}.md" for name in _OUTSIDE)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
T = TypeVar("T")
_LANGUAGES = {"bash", "python", "text"}


@dataclass(frozen=True, slots=True)
class Document:
    """One Markdown file, taken apart."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        return _FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        return [body for found, body in _FENCE.findall(self.text) if found == language]

    @property
    def commands(self) -> Iterator[str]:
        """Yield shell commands, continued lines joined; in prose, code that starts like one."""
        for block in self.blocks("bash"):
            yield from filter(None, map(str.strip, block.replace("\\\n", " ").splitlines()))
        for code in _CODE.findall(self.prose):
            if re.match(r"(python|make|source|pip|tritter|[A-Z_]+=\S+) ", code) and "…" not in code:
                yield code

    @property
    def table_entries(self) -> Iterator[tuple[str, str]]:
        """Yield (header, code) for everything in code style in the first column of a table."""
        header = ""
        for line in self.prose.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not line.startswith("|"):
                header = ""
            elif not header:
                header = cells[0]
            else:
                for code in _CODE.findall(cells[0]):
                    yield header, code


HOUSE = [Document(path) for path in DOCUMENTS]
COMMANDS = list(dict.fromkeys(command for doc in HOUSE for command in doc.commands))


def quick_of_readme(items: Iterable[T], is_of_readme: Callable[[T], bool]) -> list[Any]:
    """Return parameters of a test: those of the README are quick, those of other pages full."""
    full = pytest.mark.full
    return [pytest.param(item, marks=() if is_of_readme(item) else full) for item in items]


# Commands


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, with an unfinished run of each configuration that is resumed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def check_train(words: list[str]) -> None:
    """Compose and validate a command line of train.py; refusals are raised.

    What is for a GPU is validated for the CPU: machines that run tests have none.
    """
    cpu = {"trainer=gpu": "trainer=cpu", "trainer.accelerator=gpu": "trainer.accelerator=cpu"}
    words = [cpu.get(word, word) for word in words if word != "--find-lr"]
    if "--help" in words:
        assert "Examples" in help_text()
        return
    if "evaluation.tasks_path=benchmarks" in words:
        Path("benchmarks").mkdir()
    command = CommandLine.parse(words)
    if command.info_flag == "hydra_help":
        return
    _leave_unfinished_run(command)
    plan = planned(command)
    assert plan.jobs
    assert (len(plan.jobs) > 1) == command.is_multirun


def _leave_unfinished_run(command: CommandLine) -> None:
    """Put the run there that the command resumes: of the same configuration, and started."""
    resumed = [word for word in command.overrides if word.startswith("resume=")]
    if not resumed:
        return
    value = resumed[0].partition("=")[2]
    rest = [word for word in command.overrides if word not in resumed]
    with Loader.opened() as composing:
        config = composing.compose(rest)
    folder = _RUNS / "earlier" if value == "latest" else Path(value)
    RunRecord.of(folder, config, status="running").write(folder)


def check_tritter(words: list[str]) -> None:
    """Run a command on tiny models in the places that it names; alone, look for its help.

    Raises:
        ValueError: it exits with another code than 0.
    """
    if words[0] == "train" and "--help" not in words:
        return check_train(words[1:])
    if len(words) == 1:  # prose that speaks of the command
        words = [*words, "--help"]
    if words[0] in ("report", "compare"):
        _leave_finished_runs(words[1:])
    elif "--help" not in words:
        _leave_checkpoints(words)
        _leave_recipes(words)
        if "notes.jsonl" in words:
            shutil.copy(ROOT / "tests/fixtures/tiny_run/text/new.jsonl", "notes.jsonl")
        if words[0] == "evaluate":
            _leave_benchmarks()
    code = main(words)
    if code:
        raise ValueError(f"exit code {code}")
    return None


def _leave_checkpoints(words: list[str]) -> None:
    """Put a tiny model at every checkpoint that is read; one called base-… or grown came from it.

    One called ….ckpt is a training's of the base, and one called skilled has LoRA experts.
    """
    # What the documents call base: that of a first run, so that their sizes fit it
    with Loader.opened() as composing:
        model = composing.compose([]).base_model()
    base = saved(new_model(model, seed=0), Path("base"))
    tokenizer = train_tokenizer([TextDocument("d", "the class is one\n")], vocab_size=300)
    save_tokenizer(tokenizer, base, end_of_text=END_OF_TEXT)
    children = (word for option, word in pairwise(words) if option == "--experts-from")
    _leave_children(base, next(children, "").split(","))
    read = [word for option, word in pairwise(words) if option in CHECKPOINTS]
    read += words[2:3] if words[0] == "validate" else []
    for name in read:
        if name.startswith("base-") or name == "grown" or name.endswith("/checkpoint"):
            expand(base, Path(name), [Width()])
        if name == "skilled":
            shutil.copytree(base, name)
            live = new_model(model, seed=0)
            mixture = ExpertMixture(live)
            mixture.add("code", AdapterShape(2, 4.0, ("q_proj",)), seed=0)
            ExpertFolder.of(mixture).write(Path(name))
        if name.endswith(".ckpt"):
            weights = {f"model.{key}": value for key, value in stock(base).state_dict().items()}
            torch.save({"state_dict": weights}, name)


def _leave_children(base: Path, names: Iterable[str]) -> None:
    """Put models there that look as if they were trained from a base."""
    for number, name in enumerate(set(names) - {"", "base"}):
        child(Path(name), base, seed=number)


def _leave_recipes(words: list[str]) -> None:
    """Put the recipes there that a command reads: a block of a document that begins with # NAME."""
    blocks = [block for document in HOUSE for block in document.blocks("text")]
    for option, name in pairwise(words):
        if option == "--recipe":
            (recipe,) = (block for block in blocks if block.startswith(f"# {name}\n"))
            Path(name).write_text(recipe)


def _leave_benchmarks() -> None:
    """Put files of the benchmarks that the documents name at `benchmarks`, and text to be read."""
    Path("notes.txt").write_text("the class is one\n")
    arc, bbh = PUBLISHED["arc_easy"], PUBLISHED["bbh_cot_fewshot_snarks"]
    mmlu, truthfulqa = PUBLISHED["mmlu_anatomy"], PUBLISHED["truthfulqa_mc1"]
    for name in ("arc_challenge_test", "arc_easy_test", "arc_easy_train"):
        written(Path(f"benchmarks/{name}.jsonl"), arc)
    written(Path("benchmarks/hellaswag_val.jsonl"), PUBLISHED["hellaswag"])
    written(Path("benchmarks/mmlu_test.jsonl.gz"), mmlu)
    written(Path("benchmarks/truthfulqa_mc.jsonl"), truthfulqa)
    written(Path("benchmarks/gsm8k_test.jsonl"), PUBLISHED["gsm8k"])
    written(Path("benchmarks/bbh/snarks.jsonl"), bbh)


def _leave_finished_runs(words: list[str]) -> None:
    for word in words:
        if word.startswith("outputs/"):
            Path(word).mkdir(parents=True)
            (Path(word) / "summary.json").write_text(json.dumps(SUMMARY))


def check_torchrun(words: list[str]) -> None:
    at = words.index("train.py")
    options = dict(pairwise(words[:at]))
    each = options["--nproc-per-node"]
    started = {"RANK": "0", "WORLD_SIZE": each, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": each}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TORCHELASTIC_RUN_ID": "none", **started}.items():
            patch.setenv(name, value)
        assert Launch.of() == Launch("torchrun", 0, int(each), 0, int(each))
        check_train(words[at + 1 :])


def check_sbatch(words: list[str]) -> None:
    """The line with srun in the script of the documents, as SLURM starts its first process."""
    blocks = [block for document in HOUSE for block in document.blocks("text")]
    (script,) = (block for block in blocks if block.startswith("#!/bin/bash\n"))
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    (line,) = (line for line in script.splitlines() if line.startswith("srun"))
    started = shlex.split(line)
    nodes, each = int(options["nodes"]), int(options["ntasks-per-node"])
    assert len(words) == 1 and options["gpus-per-node"] == options["ntasks-per-node"]
    with pytest.MonkeyPatch.context() as patch:
        step = {"STEP_NUM_TASKS": nodes * each, "STEP_NUM_NODES": nodes}
        for name, value in {"NODEID": 0, "LOCALID": 0, **step}.items():
            patch.setenv(f"SLURM_{name}", str(value))
        assert Launch.of() == Launch("srun", 0, nodes * each, 0, each)
        check_train(started[started.index("train.py") + 1 :])


def check_reference(words: list[str]) -> None:
    """That the page is what it writes, tests/test_reference.py sees."""
    from tests import test_reference

    assert not words and test_reference.REFERENCE.is_file()


def check_language(words: list[str]) -> None:
    assert words and all((ROOT / word).exists() for word in words)


def check_drawn(words: list[str]) -> None:
    """It draws its figure, here below another name."""
    script = (ROOT / "docs/figures/parameter_map.py").read_text()
    exec(compile(script, "parameter_map.py", "exec"), {"__file__": str(Path("drawn.py").resolve())})
    assert not words and Path("drawn.png").is_file()


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert words and set(words) <= targets


def check_source(words: list[str]) -> None:
    assert words == [".venv/bin/activate"]


def check_eval(words: list[str]) -> None:
    """What a shell evaluates is a command that prints it."""
    (inner,) = words
    start, *rest = re.split(r" (?=-)", inner.removeprefix("$(").removesuffix(")"), maxsplit=1)
    assert start == "python train.py"
    command = CommandLine.parse(shlex.split(*rest))
    assert (command.info_flag, command.overrides) == ("shell_completion", ("install=bash",))


def check_module(words: list[str]) -> None:
    """`python -m tritter` is the command without words: help."""
    assert main(words) == 0


def check_pytest(words: list[str]) -> None:
    paths = [word for option, word in pairwise(["", *words]) if "-m" not in (option, word)]
    assert paths and all((ROOT / path).exists() for path in paths)


def check_golden(words: list[str]) -> None:
    """What it writes, and that it is the same, tests/training/test_golden.py sees."""
    from tests.training import test_golden

    assert not words and test_golden.CURVE.is_file()


def check_pre_commit(words: list[str]) -> None:
    assert words == ["install"]
    entries = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {entry["id"] for entry in entries} == {"ruff-check", "ruff-format", "mypy"}


def check_install(words: list[str]) -> None:
    """The name is not published: packages come from the checkout or from git."""
    name = words[1] if words[0] == "-e" else words[0].partition(" @ git+https://")[0]
    assert words[0] == "-e" or " @ git+https://" in words[0]
    extras = re.fullmatch(r"(?:\.|tritter)(?:\[([\w,]+)\])?", name)
    assert extras
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    known = declared["project"]["optional-dependencies"].keys()
    assert {*(extras[1] or "dev").split(",")} <= known


CHECKPOINTS = (
    "--checkpoint",
    "--result",
    "evaluate",
    "expand",
    "export",
    "generate",
    "history",
    "inspect",
    "push",
)  # the words that name one which is read


KINDS: dict[tuple[str, ...], Callable[[list[str]], None]] = {
    ("python", "train.py"): check_train,
    ("torchrun",): check_torchrun,
    ("sbatch",): check_sbatch,
    ("tritter",): check_tritter,
    ("python", "-m", "tritter"): check_module,
    ("python", "-m", "tests.training.test_golden"): check_golden,
    ("python", "-m", "tests.test_reference"): check_reference,
    ("python", "-m", "tests.language"): check_language,
    ("python", "docs/figures/parameter_map.py"): check_drawn,
    ("make",): check_make,
    ("pip", "install"): check_install,
    ("source",): check_source,
    ("eval",): check_eval,
    (".venv/bin/python", "-m", "pytest"): check_pytest,
    (".venv/bin/pre-commit",): check_pre_commit,
}


def check_command(command: str) -> None:
    """Check one documented command.

    Raises:
        LookupError: there is no check for a command of this kind.
    """
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    for start, check in KINDS.items():
        if tuple(words[: len(start)]) == start:
            return check(words[len(start) :])
    raise LookupError(f"no test knows what to do with: {command}")


@pytest.mark.parametrize(
    "command", quick_of_readme(COMMANDS, set(Document(README).commands).__contains__)
)
def test_command(command, place):
    check_command(command)
    assert not (place / "cache").exists()


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python train.py expansoin=dus", ValueError),
        ("python train.py expansion=dsu", ValueError),
        ("python train.py expansion=none,dus", ValueError),
        ("python train.py --helpp", ValueError),
        ("make tests", AssertionError),
        (".venv/bin/python -m pytest tests/nowhere", AssertionError),
        ("tritter expand --method dus", ValueError),
        ("tritter expand --checkpoint base --method mow", ValueError),
        ("tritter inspect elsewhere", ValueError),
        ("tritter expnd", ValueError),
        ("tritter train expansion=dsu", ValueError),
        ("pip install 'tritter[evaluation]'", AssertionError),
        ("pip install -e '.[evalution]'", AssertionError),
        ("curl https://example.org", LookupError),
    ],
)
def test_a_command_that_rots_is_seen(command, error, place):
    with pytest.raises(error):
        check_command(command)


def test_the_commands_are_found():
    assert {"make demo", "make test", "python train.py resume=latest"} <= set(COMMANDS)


def test_ci_runs_the_readme_test_command():
    test_command = next(each for each in Document(README).commands if each.endswith("test"))
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_image_and_its_documented_uses_run_known_commands():
    image = (ROOT / "Dockerfile").read_text()
    (steps,) = re.findall(r"^CMD (.*)$", image, re.MULTILINE)
    uses = [shlex.join(json.loads(steps)), *re.findall(r"^RUN (make .*)$", image, re.MULTILINE)]
    page = (ROOT / "docs/how-to/run_on_a_gpu.md").read_text()
    uses += re.findall(r"^docker run .* tritter ((?:make|python) .*)$", page, re.MULTILINE)
    assert len(uses) == 4
    for use in uses:
        check_command(use)


def test_every_block_is_of_a_kind_that_is_checked():
    languages = {
        (document.name, language)
        for document in HOUSE
        if document.name not in OUTSIDE
        for language, _ in _FENCE.findall(document.text)
    }
    assert not [found for found in languages if found[1] not in _LANGUAGES]


# Snippets


@pytest.mark.parametrize(
    "document",
    quick_of_readme(
        [document for document in HOUSE if document.blocks("python")],
        lambda document: document.path == README,
    ),
    ids=lambda document: document.name,
)
def test_snippets_run_in_order(document, place):
    if document.name in ("docs/reference/python.md", "docs/how-to/extend_the_vocabulary.md"):
        _leave_own_data()
    else:
        saved(tiny_llama(), place / "base")
    if document.name == "docs/how-to/mix_children_into_experts.md":
        _leave_children(place / "base", ("code", "maths"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(document.blocks("python")):
        exec(compile(source, f"{document.name}[{number}]", "exec"), namespace)


def _leave_own_data() -> None:
    """Leave a checkpoint with a tokenizer, and texts for a run on it."""
    model = tiny_llama(vocab_size=300, initializer_range=0.02, max_position_embeddings=128)
    tokenizer = train_tokenizer([TextDocument("d", "the class is one\n")], vocab_size=300)
    save_tokenizer(tokenizer, saved(model, Path("base")), end_of_text=END_OF_TEXT)
    texts = ROOT / "tests/fixtures/tiny_run/text"
    shutil.copytree(texts / "old", "articles")
    shutil.copy(texts / "new.jsonl", "notes.jsonl")


def test_the_readme_snippet_keeps_the_function(place):
    saved(tiny_llama(), place / "base")
    exec(Document(README).blocks("python")[0], {"__name__": "__main__"})
    assert relative_difference(stock(place / "base"), stock(place / "grown"), tokens()) < 1e-4


# Names


@cache
def _literals() -> set[str]:
    """Return every string and every record's field in the sources; f-strings hold <>."""
    found: set[str] = set()
    for path in (ROOT / "tritter").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Constant(value=str(text)):
                    found.add(text)
                case ast.JoinedStr(values=parts):
                    texts = (getattr(part, "value", "") for part in parts)
                    found.add("".join(t if isinstance(t, str) else "<>" for t in texts))
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(name)
    return found


def _codes(pattern: str) -> list[tuple[str, str]]:
    return [
        (document.name, code)
        for document in HOUSE
        for code in _CODE.findall(document.prose)
        if re.fullmatch(pattern, code)
    ]


@pytest.mark.parametrize("header", ["key", "metric"])
def test_keys_and_metrics_of_tables_occur_in_the_code(header):
    pages = {"key": "summary", "metric": "metrics"}
    page = Document(ROOT / "docs/reference" / f"{pages[header]}.md")
    names = [code for found, code in page.table_entries if found == header]
    literals = _literals()
    assert len(names) >= 7
    assert not [name for name in names if re.sub(r"<[^>]*>", "<>", name) not in literals]


def test_config_keys_exist():
    groups = "|".join(sorted({key.partition(".")[0] for key in known_keys() if "." in key}))
    codes = _codes(rf"(?:{groups})(?:\.[a-z_0-9]+)+")
    files = (".py", ".md", ".json", ".png", ".safetensors")
    codes = [(name, code) for name, code in codes if not code.endswith(files)]
    codes = [found for found in codes if found[0] != "docs/reference.md"]  # read from conf/ itself
    codes = [
        found for found in codes if found[1] not in ("training.epochs", "trainer.gpus")
    ]  # hints
    loggers = [yaml.safe_load(f.read_text("utf-8")) for f in (ROOT / "conf/logger").glob("*.yaml")]
    of_loggers = [f"logger.{n}.{key}" for file in loggers for n in file or () for key in file[n]]
    further = (*_trainer_parameters(), "optimizer.betas", *of_loggers)
    keys = (*known_keys(), *(name if "." in name else f"trainer.{name}" for name in further))
    assert len(codes) >= 20
    assert not [
        found for found in codes if not any(f"{key}.".startswith(f"{found[1]}.") for key in keys)
    ]


def test_options_of_the_groups_table_are_all_there_are():
    document = Document(ROOT / "docs/reference/configuration.md")
    rows = 0
    for line in document.prose.splitlines():
        row = re.match(r"\| `(\w+)` \| (`\w+`(?: `\w+`)*) \|", line)
        if row and (ROOT / "conf" / row[1]).is_dir():
            options = {path.stem for path in (ROOT / "conf" / row[1]).glob("*.yaml")}
            assert set(_CODE.findall(row[2])) == options, row[1]
            rows += 1
    assert rows >= 7


def test_paths_exist():
    codes = _codes(r"(?:tritter|tests|conf|docs|notebooks|\.ci)/[\w./-]*")
    assert len(codes) >= 15
    real = [(name, code) for name, code in codes if "NAME" not in code]
    assert not [(name, code) for name, code in real if not (ROOT / code).exists()]


def test_the_way_of_a_run_names_what_is_there():
    text = (ROOT / "docs/way_of_a_run.md").read_text(encoding="utf-8")
    turns = re.findall(r"`(tritter/[\w/]+\.py)` `([\w.]+)`", text)
    assert len(turns) >= 30
    for path, name in turns:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        kinds = ast.FunctionDef | ast.ClassDef
        there = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
        assert set(name.split(".")) <= there, (path, name)


@pytest.mark.parametrize("document", HOUSE, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    for link in _LINK.findall(document.text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.path.parent / path).resolve() if path else document.path
        assert target.exists(), link
        assert not anchor or anchor in _anchors(Document(target)), link


def _anchors(document: Document) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
