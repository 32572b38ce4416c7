"""A built wheel works outside the checkout: commands, every option file, an expansion, a training.

The environment of the wheel sees the packages that Tritter needs and nothing of the checkout.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from tests.oracle import relative_difference, saved, stock, tiny_llama, tokens
from tritter import __version__
from tritter.core.models import save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "the model grows a layer where data asks for one and keeps what it knew\n"
COMPOSE_ALL = """
import tritter
from tritter.conf_folder import config_folder
from tritter.config.launch.composition import Loader
from tritter.config.folders import CHOSEN_BY, option_files
from tritter.errors import RequestError
with Loader.opened() as composing:
    for group, options in option_files().items():
        for name in options if group not in CHOSEN_BY else ():
            try:
                composing.compose([f"{group}={name}"])
                print(group, name, "composes")
            except RequestError as error:  # it needs a word besides, or another machine
                print(group, name, *str(error).split())
print(tritter.__file__)
print(config_folder())
"""
SMALL_RUN = (
    *("model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=2"),
    *("model.num_attention_heads=2", "model.num_key_value_heads=1", "data=text"),
    *("data.vocab_size=280", "data.sequence_length=32", "data.batch_size=2", "gate=off"),
    *("pretraining.max_steps=2", "training.max_steps=2", "trainer.progress=off", "logger=csv"),
    *("evaluation.max_tokens_per_document=32", "evaluation.sample_tokens=2"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    words = ["pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", *words, "-q", "-w", str(place)], check=True)
    (built,) = place.glob("*.whl")
    return built


class Installed:
    """An environment that holds the wheel, and a folder to run in."""

    def __init__(self, wheel: Path, place: Path) -> None:
        self.folder = place / "elsewhere"
        self.folder.mkdir()
        venv.create(place / "venv", with_pip=False)
        self.programs = place / "venv/bin"
        words = ["pip", "--python", str(self.programs / "python"), "install", "--no-deps"]
        subprocess.run([sys.executable, "-m", *words, "--no-index", "-q", str(wheel)], check=True)
        (packages,) = (place / "venv").glob("lib/python*/site-packages")
        # A line of a .pth adds the folder and not what its own .pth files name, the checkout
        (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(self, program: str, *words: str) -> str:
        environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
        environment |= {"TRITTER_CACHE": str(self.folder / "cache"), "COLUMNS": "100"}
        ended = subprocess.run(
            [str(self.programs / program), *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_metadata_says_what_the_project_does(wheel: Path) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(files.read(name).decode())
        names = set(files.namelist())
    assert (told["Name"], told["Version"]) == ("tritter", __version__)
    assert told["Requires-Python"] == declared["requires-python"]
    assert told["License-Expression"] == declared["license"]
    assert told["Summary"] == declared["description"]
    needed = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(needed) == len(declared["dependencies"])
    versions = [f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)]
    assert set(versions) <= set(told.get_all("Classifier"))
    tracked = subprocess.run(
        ["git", "ls-files", "tritter", "conf"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    there = {path for path in tracked if (ROOT / path).exists()}
    expected = {p if p.startswith("tritter/") else f"tritter/{p}" for p in there}
    assert expected <= names
    assert not [name for name in names if name.startswith(("tests/", "experiments/"))]


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["cff-version"], cited["version"]) == ("1.2.0", __version__)
    assert cited["license"] == declared["license"]
    assert cited["title"] and cited["authors"] and cited["message"]


def test_commands_answer(installed: Installed) -> None:
    assert installed.run("tritter", "--version") == f"tritter {__version__}\n"
    assert "compare" in installed.run("tritter", "--help")
    assert "hydra" in installed.run("tritter", "train", "--help").lower()


def test_every_option_of_every_group_composes(installed: Installed) -> None:
    *composed, package, conf = installed.run("python", "-c", COMPOSE_ALL).splitlines()
    for found in (package, conf):
        assert Path(found).is_relative_to(installed.programs.parent)
    beside = subprocess.run(
        [sys.executable, "-c", COMPOSE_ALL],
        cwd=installed.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    *expected, _, conf = beside.stdout.splitlines()
    assert Path(conf) == ROOT / "conf"
    assert composed == expected
    assert len([line for line in composed if line.endswith(" composes")]) > 50


def test_a_checkpoint_is_expanded_and_a_model_trained(installed: Installed) -> None:
    place = installed.folder
    tokenizer = train_tokenizer([Document("d", SENTENCE * 20)], vocab_size=300)
    base = saved(tiny_llama(vocab_size=300), place / "base")
    save_tokenizer(tokenizer, base, end_of_text=END_OF_TEXT)
    (place / "grow.yaml").write_text("steps: [width: {hidden_size: 48}, llama_pro]\n")
    told = installed.run(
        *("tritter", "expand", "--checkpoint", "base", "--recipe", "grow.yaml", "--json")
    )
    grown = json.loads(told)["destination"]
    assert relative_difference(stock(place / "base"), stock(place / grown), tokens(300)) < 1e-4
    for folder, sentence in (("old", SENTENCE), ("new", SENTENCE[::-1])):
        (place / folder).mkdir()
        for number in range(60):
            (place / f"{folder}/{number}.txt").write_text(f"{number} " + sentence * 3)
    words = (*SMALL_RUN, "data.old=old", "data.new=new", "hydra.run.dir=run")
    installed.run("tritter", "train", *words)
    assert json.loads((place / "run/summary.json").read_text())["status"]
    installed.run("tritter", "report", "run")
    assert "Each run" in (place / "run/report.html").read_text()
