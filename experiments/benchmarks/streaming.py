"""Peak memory and time of an expansion, beside `cp` of the same bytes.

    python experiments/benchmarks/streaming.py --megabytes 500 2000

writes synthetic bf16 Llamas of these sizes (same layer, more of them), expands each in a process
of its own, and prints a row per size and method. Everything it writes is deleted.

Memory is sampled from outside in /proc/PID/status every two milliseconds. `RssAnon` is what the
process allocated; pages of the source that safetensors maps (`RssFile`) are the page cache's and
can be dropped at any time, yet `ru_maxrss` and VmHWM count them, so both are shown.
"""

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.benchmarks.table import tell  # noqa: E402

METHODS = ("dus", "width")
SAMPLE_SECONDS = 0.002
MEGABYTE = 10**6


@dataclass(frozen=True, slots=True)
class Row:
    """One expansion. Megabytes of 10⁶ bytes; medians over the repeats, memory the largest."""

    method: str
    source_mb: int
    result_mb: int
    expand_seconds: float
    cp_source_seconds: float
    cp_result_seconds: float
    sha256_seconds: float
    idle_anonymous_mb: int
    peak_anonymous_mb: int
    peak_resident_mb: int

    @property
    def growth_mb(self) -> int:
        """Allocated by the expansion itself, on top of Python, torch and transformers."""
        return self.peak_anonymous_mb - self.idle_anonymous_mb


def write_source(
    folder: Path, *, megabytes: int, hidden_size: int, is_repeated: bool = False
) -> None:
    """Write a Llama with random bf16 weights and as many layers as fit, in several shards.

    Args:
        is_repeated: tensors of one shape hold the same numbers, which are drawn once.
    """
    from tritter.core.families import Config, Model, llama_config

    def config_of(layers: int) -> Config:
        return llama_config(
            vocab_size=8192,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 128,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            max_position_embeddings=256,
            initializer_range=0.02,
        )

    one, two = (2 * Model(config_of(layers)).num_parameters for layers in (1, 2))
    layers = max(2, (megabytes * MEGABYTE - one) // (two - one) + 1)
    write_random(
        folder, config_of(layers), shards=max(2, megabytes // 250), is_repeated=is_repeated
    )


def write_random(
    folder: Path, config: Mapping[str, Any], *, shards: int, is_repeated: bool = False
) -> None:
    """Write a Llama with random bf16 weights in several files; `is_repeated` as `write_source`."""
    import torch
    from safetensors.torch import save_file

    from tritter.core.families import Model

    config = {**config, "dtype": "bfloat16"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    model = Model(config)
    tensors, shapes = model.tensors, model.shapes
    bounds = [len(tensors) * part // shards for part in range(shards + 1)]
    weight_map: dict[str, str] = {}
    drawn: dict[torch.Size, torch.Tensor] = {}
    for begin, end in pairwise(bounds):
        name = f"model-{begin:05d}.safetensors"
        shard = {
            tensor.disk_name: torch.empty(shapes[tensor.name], dtype=torch.bfloat16)
            for tensor in tensors[begin:end]
        }
        for value in shard.values():
            known = drawn.get(value.shape) if is_repeated else None
            if known is None:
                drawn[value.shape] = value.normal_(std=0.02, generator=generator)
            else:
                value.copy_(known)
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run_expansion(source: Path, destination: Path, method: str) -> None:
    """Expand in this process, after telling the parent that everything is imported.

    Args:
        method: dus, width or moe; moe and dus of a model with experts also with `_fused` behind,
            which writes the experts of a layer as one tensor.
    """
    from tritter.core.expansions import Dus, ExpansionSpec, Moe, Width
    from tritter.core.families import LayoutKind
    from tritter.transform import expand, plan_expansion

    intermediate_size = json.loads((source / "config.json").read_text())["intermediate_size"]
    spec: ExpansionSpec = Dus()
    kind: LayoutKind = "live" if method.endswith("_fused") else "hub"
    if method.startswith("moe"):
        spec = Moe(num_experts=4)
    if method == "width":
        spec = Width(intermediate_size=intermediate_size * 3 // 2, init="net2net")
    plan_expansion(source, [spec])  # transformers imports some of itself at first use
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    expand(source, destination, [spec], expert_layout=kind, max_shard_bytes=500 * MEGABYTE)
    print(time.perf_counter() - started, flush=True)
    sys.stdin.readline()


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: float
    cpu_seconds: float
    idle_anonymous_mb: int
    peak_anonymous_mb: int
    peak_resident_mb: int


def measure(source: Path, destination: Path, method: str) -> Measured:
    """Run one expansion in a child and sample its memory until it says that it is done."""
    return sampled([sys.executable, __file__, "--child", str(source), str(destination), method])


def sampled(command: Sequence[str]) -> Measured:
    """Run a child that says when it is ready, begins when told to, and says how long it took."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{command} did not start")
        idle = peak = memory_mb(child.pid)["RssAnon"]
        cpu_before = _cpu_seconds(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while not select.select([child.stdout], [], [], SAMPLE_SECONDS)[0]:
            peak = max(peak, memory_mb(child.pid)["RssAnon"])
        answer = child.stdout.readline()
        if not answer:
            raise RuntimeError(f"{command} failed")
        resident, cpu = memory_mb(child.pid)["VmHWM"], _cpu_seconds(child.pid) - cpu_before
        child.stdin.write("bye\n")
        child.stdin.flush()
    return Measured(float(answer), cpu, idle, peak, resident)


def memory_mb(process: int) -> dict[str, int]:
    """Return /proc's memory figures of a process in megabytes; none of one that has just ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {key: int(value.split()[0]) * 1024 // MEGABYTE for key, value in pairs}


def _cpu_seconds(process: int) -> float:
    """Return the processor time of a process so far, the kernel's on its behalf included."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def copy_seconds(source: Path, destination: Path) -> float:
    """Return how long `cp -r` takes until the bytes are on the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    wait_for_disk(destination)
    seconds = time.perf_counter() - started
    shutil.rmtree(destination)
    return seconds


def wait_for_disk(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def hash_seconds(*folders: Path) -> float:
    """Return how long SHA-256 over all files takes in one thread."""
    import hashlib

    started = time.perf_counter()
    for path in (path for folder in folders for path in folder.iterdir()):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    return time.perf_counter() - started


def benchmark(
    megabytes: Sequence[int],
    *,
    place: Path,
    methods: Sequence[str] = METHODS,
    repeats: int = 1,
    hidden_size: int = 1024,
) -> Iterator[Row]:
    """Measure each size and method; the runs that are compared follow each other directly."""
    for size in megabytes:
        source, result = place / f"source{size}", place / "result"
        write_source(source, megabytes=size, hidden_size=hidden_size)
        for method in methods:
            runs: list[Measured] = []
            copies: list[tuple[float, float, float]] = []
            for _ in range(repeats):
                runs.append(measure(source, result, method))
                copies.append(
                    (
                        copy_seconds(source, place / "copy"),
                        copy_seconds(result, place / "copy"),
                        hash_seconds(source, result),
                    )
                )
                result_bytes = _bytes(result)
                shutil.rmtree(result)
            cp_source, cp_result, sha256 = map(_median, zip(*copies, strict=True))
            yield Row(
                method=method,
                source_mb=_bytes(source) // MEGABYTE,
                result_mb=result_bytes // MEGABYTE,
                expand_seconds=_median([run.seconds for run in runs]),
                cp_source_seconds=cp_source,
                cp_result_seconds=cp_result,
                sha256_seconds=sha256,
                idle_anonymous_mb=max(run.idle_anonymous_mb for run in runs),
                peak_anonymous_mb=max(run.peak_anonymous_mb for run in runs),
                peak_resident_mb=max(run.peak_resident_mb for run in runs),
            )
        shutil.rmtree(source)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _median(values: Sequence[float]) -> float:
    return round(sorted(values)[len(values) // 2], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="CSV file for the rows")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, destination, method = options.child
        run_expansion(Path(source), Path(destination), method)
        return
    with tempfile.TemporaryDirectory(prefix="tritter-streaming-") as place:
        rows = benchmark(
            options.megabytes,
            repeats=options.repeats,
            hidden_size=options.hidden_size,
            place=Path(place),
        )
        tell(({**asdict(row), "growth_mb": row.growth_mb} for row in rows), options.output)


if __name__ == "__main__":
    main()
