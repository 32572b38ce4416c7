"""Generators of damaged checkpoints, places and words; each sets up the sandbox of its case."""

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.hostile import values
from tests.hostile.case import Case
from tests.hostile.sandbox import Sandbox, special
from tests.hostile.templates import ROOT
from tritter.storage.records import signed_text

_CHECKPOINTS = ("base", "grown", "grown", "sparse", "skilled")
_MAX_BYTES = 2**26  # more are those of a sparse file, which an earlier damage left
KEYS = (ROOT / "tests/config/keys.txt").read_text().split()


def folders(rng: random.Random, sandbox: Sandbox) -> Case:
    """A checkpoint folder in which files are damaged, missing, special, or too many."""
    folder = sandbox.take(rng.choice(_CHECKPOINTS), "source")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    story = []
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(files)
        story.append(damage_file(rng, path, sandbox))
    return _read_by(rng, "; ".join(story))


def tensors(rng: random.Random, sandbox: Sandbox) -> Case:
    """Tensors that are not those of the config: types, shapes, names, values, indexes."""
    folder = sandbox.take(rng.choice(_CHECKPOINTS), "source")
    path = folder / "model.safetensors"
    held = load_file(path)
    name = rng.choice(sorted(held))
    kind = rng.randrange(8)
    index = {"metadata": {}, "weight_map": dict.fromkeys(held, path.name)}
    if kind == 0:
        dtype = rng.choice((torch.int64, torch.int8, torch.bool, torch.float16, torch.float64))
        held = {key: value.to(dtype) for key, value in held.items() if rng.random() < 0.9}
    elif kind == 1:
        held[name] = held[name].new_full(held[name].shape, rng.choice((float("nan"), float("inf"))))
    elif kind == 2:
        held[name] = held[name].new_zeros(rng.choice(((0,), (), (3, 1, 2), (1, 1), (2**16,))))
    elif kind == 3:
        held[values.word(rng).replace("\ud800", "?")] = held.pop(name)
    elif kind == 4:
        held["model.extra" + rng.choice(values.ESCAPES)] = torch.ones(2)
    elif kind == 5:
        index["weight_map"][name] = rng.choice(
            ("../outside/secret.txt", "/etc/hostname", "x" * 300, "nowhere.safetensors", "", "\x00")
        )
    elif kind == 6:
        index = values.mutated_json(rng, index)
    if kind in (5, 6, 7):
        place = folder / "model.safetensors.index.json"
        place.write_bytes(values.json_bytes(index))
        if rng.random() < 0.5:
            path.rename(folder / "model-00001-of-00001.safetensors")
    else:
        save_file(held, path, metadata={"format": "pt"})
    return _read_by(rng, f"tensors, kind {kind}, {name}")


def records(rng: random.Random, sandbox: Sandbox) -> Case:
    """Entries of config.json, tritter.json, the states' and tokenizer's files, changed."""
    folder = sandbox.take(rng.choice(_CHECKPOINTS), "source")
    names = ["config.json", "config.json", "tritter.json", "tritter.json", "state/state.json"]
    names += ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    names += ["state/experts.json", "state/experts.json", "experts/e0/adapter_config.json"]
    path = folder / rng.choice([name for name in names if (folder / name).is_file()])
    plain = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 1, 3))):
        plain = values.mutated_json(rng, plain)
    content = values.json_bytes(plain)
    is_record = path.name in ("tritter.json", "state.json", "experts.json")
    if is_record and isinstance(plain, dict) and rng.random() < 0.8:
        # So that what is wrong is read, not only noticed
        with suppress(ValueError):  # what is no text can't be digested
            content = signed_text(plain).encode()
    path.write_bytes(content)
    if (folder / "experts").is_dir() and rng.random() < 0.5:
        (folder / "tritter.json").unlink()  # which would tell the change before it is read
    return _read_by(rng, f"{path.name} changed")


def places(rng: random.Random, sandbox: Sandbox) -> Case:
    """Outputs at places that hold something: other files, the source, links, special files."""
    source = sandbox.take("grown", "source")
    target = sandbox.inside / "target"
    (sandbox.inside / "notes").mkdir()
    (sandbox.inside / "notes/thesis.txt").write_text("years of work")
    kind = rng.randrange(12)
    output = "target"
    if kind == 0:
        output = rng.choice(("source", "source/.", "source/../source", ".", "..", "./source/", "/"))
    elif kind == 1:
        output = rng.choice(("source/deep", "source/state", "source/state/deep/er"))
    elif kind == 2:
        target.write_text("a plain file")
    elif kind in (3, 4):
        special(target, rng.choice(("fifo", "zero", "loop", "sparse")))
    elif kind == 5:
        special(target, "link", target=rng.choice((source, sandbox.outside, Path("notes"))))
    elif kind == 6:
        output = "notes"
    elif kind == 7:
        sandbox.take("base", "target")
        (target / rng.choice(("thesis.txt", ".hidden", "data.bin"))).write_text("years of work")
    elif kind == 8:
        sandbox.take("base", "target")
        (target / "deep").mkdir()
        (target / "deep/thesis.txt").write_text("years of work")
    elif kind == 9:
        output = values.word(rng)
    elif kind == 10:
        output = rng.choice(("notes/thesis.txt", "notes/thesis.txt/deep", "x" * 256, "a\x00b"))
    else:
        sandbox.take("base", "target")
        special(target / "extra", rng.choice(("fifo", "link", "folder")), target=source)
    words = rng.choice(
        (
            ["expand", "--checkpoint", "source", "--method", "llama-pro", "--no-measure"],
            ["expand", "--checkpoint", "source", "--method", "dus", "--measure"],
            ["export", "--checkpoint", "source"],
        )
    )
    words += ["--output", output, *(["--overwrite"] if rng.random() < 0.7 else [])]
    is_replaceable = kind == 11 and not (target / "extra").exists()
    may_change = ("inside/target",) if is_replaceable else ()
    return Case(f"output kind {kind}", "tritter", tuple(words), may_change)


def commands(rng: random.Random, sandbox: Sandbox) -> Case:
    """Command lines whose options hold what nobody should type."""
    import typer

    from tritter.cli.main import app

    sandbox.take("grown", "source")
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = rng.choice(sorted(_NEEDED))
    words = [name, *_NEEDED[name]]
    options = [option for p in known[name].params for option in p.opts if option[:2] == "--"]
    for _ in range(rng.randint(1, 3)):
        words.append(rng.choice([*options, "--" + values.word(rng)]))
        if rng.random() < 0.85:
            words.append(values.number(rng) if rng.random() < 0.5 else values.word(rng))
    if rng.random() < 0.2:
        words[rng.randrange(len(words))] = values.word(rng)
    return Case("options", "tritter", tuple(words), ("inside/out", "inside/source-llama-pro"))


def recipes(rng: random.Random, sandbox: Sandbox) -> Case:
    """Recipes of expand: damaged byte by byte, or with values that nobody should write."""
    sandbox.take("base", "source")
    sound = "steps:\n- width: {hidden_size: 48}\n- llama_pro: {target_layers: 5}\nseed: 3\n"
    kind = rng.random()
    if kind < 0.5:
        content = values.mutated_bytes(rng, sound.encode())
    elif kind < 0.9:
        old = rng.choice(("48", "5", "3", "width", "hidden_size", "seed", "steps", "[", "{"))
        new = values.number(rng) if rng.random() < 0.5 else values.word(rng)
        content = sound.replace(old, new, 1).encode(errors="surrogatepass")
    else:
        content = rng.choice((b"&a [*a]", b"a: &a [x]\nsteps: " + b"[*a," * 50, b"[" * 10**5))
    (sandbox.inside / "grow.yaml").write_bytes(content)
    words = ("expand", "--checkpoint", "source", "--recipe", "grow.yaml", "--output", "out")
    free = ("inside/out", "inside/grow.yaml")
    return Case("a recipe", "tritter", (*words, "--no-measure"), free)


def overrides(rng: random.Random, sandbox: Sandbox) -> Case:
    """Settings of train.py: every key with every kind of value, and words that are none."""
    words = []
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice([*KEYS, *KEYS, *_GROUPS, *_GROUPS, *_HYDRA])
        group, _, rest = key.partition(".")
        if group in ("expansion", "forgetting") and rest and rng.random() < 0.9:
            words.append(f"{group}={rest.partition('.')[0]}")  # else the key is refused unread
        sign = rng.choice(("", "", "", "", "", "", "+", "++", "~"))
        value = values.number(rng) if rng.random() < 0.7 else values.word(rng)
        words.append(f"{sign}{key}={value}" if rng.random() < 0.9 else sign + key)
    if rng.random() < 0.1:
        words.append(values.word(rng))
    if rng.random() < 0.1:
        words.append("-m")
    return Case("overrides", "train.py --dry", tuple(words), ("inside/outputs",))


_NEEDED = {
    "expand": ("--checkpoint", "source", "--method", "llama-pro", "--output", "out"),
    "export": ("--checkpoint", "source", "--output", "out"),
    "history": ("source",),
    "inspect": ("source",),
    "compare": ("source", "source"),
    "report": ("source", "--output", "out"),
    "validate": ("--source", "source", "--result", "source"),
    "generate": ("--checkpoint", "source", "--prompt", "the", "--max-new-tokens", "2"),
    "plan": ("--source", "125M", "--target", "350M", "--gpu-hours", "10"),
}
_GROUPS = (*sorted({key.partition(".")[0] for key in KEYS}), "model", "experiment")
_HYDRA = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.output_subdir", "hydra.launcher._target_"),
    *("hydra.job.name", "hydra.sweeper._target_", "hydra.callbacks.x._target_", "hydra.verbose"),
    *("hydra.job_logging.handlers.file._target_", "hydra.run", "hydra", "hydra.searchpath"),
)


def _read_by(rng: random.Random, story: str) -> Case:
    """Return a case in which one of the commands reads `source`."""
    checkpoint = ("--checkpoint", "source")
    words = rng.choice(
        (
            ("expand", *checkpoint, "--method", "width", "--output", "out", "--no-measure"),
            ("expand", *checkpoint, "--method", "llama-pro", "--output", "out", "--measure"),
            ("export", *checkpoint, "--output", "out"),
            ("export", *checkpoint, "--output", "out", "--merge"),
            ("export", *checkpoint, "--output", "out", "--format", "peft"),
            ("history", "source", "--verify"),
            ("inspect", "source"),
            ("generate", *checkpoint, "--prompt", "the", "--max-new-tokens", "2"),
            ("plan", "--source", "source", "--target", "1M", "--gpu-hours", "1"),
        )
    )
    return Case(story, "tritter", words, ("inside/out",))


def damage_file(rng: random.Random, path: Path, sandbox: Sandbox) -> str:
    """Change, remove or replace one file; return what was done."""
    kind = rng.random()
    name = path.relative_to(sandbox.inside)
    is_plain = path.is_file() and not path.is_symlink() and path.stat().st_size < _MAX_BYTES
    if kind < 0.6 and is_plain:
        path.write_bytes(values.mutated_bytes(rng, path.read_bytes()))
        return f"{name} damaged"
    if path.exists() or path.is_symlink():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind < 0.7:
        return f"{name} removed"
    what = rng.choice(("fifo", "zero", "sparse", "folder", "loop", "link", "link"))
    secret = rng.choice((sandbox.outside / "secret.txt", Path("../../outside/secret.txt")))
    special(path, what, target=secret)
    return f"{name} is a {what}"
