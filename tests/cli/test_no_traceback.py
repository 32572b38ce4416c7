"""No words and no file make a command show a traceback: each is refused in a line, or done."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tritter.core.expansions import LlamaPro, Width
from tritter.errors import RequestError, TritterError
from tritter.transform import expand

STRANGE = {
    "long name": "x" * 300,
    "long path": "/".join(["x" * 200] * 30),
    "nul": "a\0b",
    "half a character": "a\udc80b",
    "no such user": "~nosuchuser/model",
    "nothing": "",
    "a slash": "/",
    "a device": "/dev/null",
    "below a file": "base/config.json/model",
    "digits": "9" * 5_000,
    "brackets": "[" * 500,
    "a tab": "\t",
    "a hub id that is none": "../..",
    "a pattern": "[z-a]*",
}
COMMANDS = (
    "inspect {}",
    "history {}",
    "history {} --verify",
    "generate --checkpoint {} --prompt a",
    "generate --checkpoint base --prompt a --max-new-tokens {}",
    "expand --checkpoint {} --method width",
    "expand --checkpoint base --method {} --dry-run",
    "expand --checkpoint base --method width --hidden-size {} --dry-run",
    "expand --checkpoint base --method llama-pro --positions {} --dry-run",
    "expand --checkpoint base --method width --output out/a/b/{}/x",
    "export --checkpoint {} --output out",
    "export --checkpoint base --output out/a/b/{}/x",
    "export --checkpoint {} --config {} --output out",
    "plan --source {} --target 10B --gpu-hours 1",
    "plan --source 1B --target {} --gpu-hours 1",
    "train --checkpoint {} --data base",
    "train --checkpoint base --data {}",
    "train seed={}",
    "train model.path={} model=hf",
    "train resume={}",
    "train {}",
    "{}",
)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("word", STRANGE.values(), ids=STRANGE.keys())
def test_strange_words(run: Run, place: Path, word: str) -> None:
    for command in COMMANDS:
        result = run("", *(part.replace("{}", word) for part in command.split()))
        if command == "{}" and word == "":
            continue
        is_named = "--output" in command  # some of these words are names like any other
        assert result.code in ((0, 1, 2) if is_named else (1, 2)), (command, result)
        assert result.code == 0 or result.err.startswith("error: "), (command, result)
        assert "Traceback" not in result.err
        shutil.rmtree(place / "out", ignore_errors=True)


VALUES = [
    "{a:1}", "[1,[2,{b:3}]]", "1e400", "-1e400", "nan", "inf", "9" * 400, "9" * 5_000, "null",
    "''", "true", "0x10", "[[[[]]]]", "{}", "${seed}", "${nothing}", "${oc.env:HOME}", "???",
    "a=b", "1_0", "'\\x1b[2J'", "[]", "~", "!!python/object:os.system", "${a", "\\", "]", "'",
]  # fmt: skip
KEYS = [
    "seed", "control", "cache_dir", "resume", "expansion", "forgetting", "model", "data",
    "experiment", "model.hidden_size", "model.path", "data.new", "data.old", "data.batch_size",
    "training.max_steps", "training.schedule", "training.learning_rate", "expansion.dus",
    "expansion.width.hidden_size", "forgetting.ewc.ewc_lambda", "gate.retention", "logger",
    "logger.wandb.tags", "trainer.devices", "pipeline.target_params", "hydra.run.dir",
    "hydra.job.name", "evaluation.batch_size", "nothing", "a.b.c",
]  # fmt: skip


@pytest.mark.slow
def test_strange_overrides(run: Run, place: Path) -> None:
    """Drawn pairs; each run of the test draws the same. A run itself never starts."""
    chance = random.Random(8)
    pairs = [(key, chance.choice(VALUES)) for key in KEYS for _ in range(2)]
    for key, value in pairs:
        # The last word is refused in any case, so that nothing is trained
        words = ["train", f"{key}={value}", "training.schedule=no-such-schedule"]
        result = run("", *words)
        assert result.code == 2, (words, result)
        assert result.err.startswith("error: "), (words, result)


def _unreadable(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FILES: dict[str, Callable[[Path], object]] = {
    "pipe": _unreadable,
    "zero device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_bytes(b""),
    "list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "number": lambda path: path.write_text("9" * 5_000),
    "deep": lambda path: path.write_text("[" * 100_000),
    "half a character": lambda path: path.write_text('{"a": "\\ud800"}'),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 20),
}
NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
NAMES += ["generation_config.json", "tritter.json", "model.safetensors.index.json"]
READERS = ("inspect base", "history base --verify", "generate --checkpoint base --prompt a")
READERS += (
    "expand --checkpoint base --method width --dry-run",
    "export --checkpoint base --output o",
)
READERS += (
    "plan --source ./base --target 200k --gpu-hours 1",
    "train --checkpoint base --data base",
)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_strange_files(run: Run, place: Path, name: str, content: Callable[[Path], object]) -> None:
    path = place / "base" / name
    path.touch()
    content(path)
    for command in random.Random(name).sample(READERS, 3):
        result = run(command)
        assert result.code in (0, 1, 2, 3), (command, result)
        assert result.code in (0, 3) or result.err.startswith("error: "), (command, result)
    (place / "base").rename(place / "was")


MUTATIONS: list[object] = [None, True, -1, 0, 1.5, 10**18, 1e308, "", "x", "\x1b[2J", [], [[]], {}]
MUTATIONS += [{"a": {}}, ["a", 1], "9" * 4_000, float("nan"), float("-inf")]


@pytest.mark.full
def test_strange_values_in_a_config(run: Run, place: Path) -> None:
    chance = random.Random(15)
    path = place / "base" / "config.json"
    plain = json.loads(path.read_text())
    keys = [*plain, "auto_map", "quantization_config", "attn_implementation", "num_labels"]
    keys += [
        "experts_implementation",
        "rope_scaling",
        "layer_types",
        "per_layer_config",
        "use_cache",
    ]
    for key in keys:
        for value in chance.sample(MUTATIONS, 2):
            path.write_text(json.dumps({**plain, key: value}))
            for command in chance.sample(READERS[:5], 1):
                result = run(command)
                assert result.code in (0, 1, 2), (key, value, command, result)
                assert result.code == 0 or result.err.startswith("error: ")
            shutil.rmtree(place / "o", ignore_errors=True)


def test_a_folder_that_cannot_be_one(run: Run, place: Path) -> None:
    (place / "file").write_text("")
    for folder in ("file", "file/run", "/proc/run", "x" * 300, "a/" + "y" * 256):
        result = run("", "train", f"hydra.run.dir={folder}")
        assert result.code in (1, 2), (folder, result)
        assert result.err.startswith("error: "), (folder, result)


def test_the_library_takes_text_and_refuses_the_rest(place: Path) -> None:
    assert expand("base", "grown", [LlamaPro()]).folder == Path("grown")
    for specs in (LlamaPro(), "width", [LlamaPro], ["width"], [None], [], None, 3):
        with pytest.raises(RequestError):
            expand("base", "out", specs)  # type: ignore[arg-type]
    for spec in (Width(hidden_size="wide"), Width(noise=float("nan")), Width(init=3)):  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"expansion\.width"):
            expand("base", "out", [spec])
    for path in (None, 3, b"base", "a\0b", "~nosuchuser", "x" * 300):
        with pytest.raises(TritterError):
            expand(path, "out", [LlamaPro()])  # type: ignore[arg-type]
        with pytest.raises(TritterError):
            expand("base", path, [LlamaPro()])  # type: ignore[arg-type]
    assert not Path("out").exists()
