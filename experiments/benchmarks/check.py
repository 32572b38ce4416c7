"""Peak memory and time of the check of an expansion, beside reading the bytes.

    python experiments/benchmarks/check.py --megabytes 500 --large 10000

writes a synthetic bf16 Llama, expands it, and compares source and result in processes of their
own: layer by layer, as `tritter expand` does, and with both loaded in float32. In a round they
follow each other, a plain read of the same files first. Of a large one (`--large 0` leaves it out;
it takes three times its size of the disk) `dus` alone is checked, layer by layer alone, once.
Every time begins after the imports. Everything it writes is deleted.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.benchmarks.streaming import (  # noqa: E402
    MEGABYTE,
    Measured,
    sampled,
    write_source,
)
from experiments.benchmarks.table import tell  # noqa: E402

CONTENDERS = ("layer by layer", "both loaded")
METHODS = ("dus", "llama_pro", "width", "moe")
SHARD_BYTES = 500 * MEGABYTE


@dataclass(frozen=True, slots=True)
class Row:
    """One check: medians over the rounds, memory the largest.

    Args:
        over_read: seconds over those of reading both folders in the same round.
        own_mb: anonymous memory beyond what its imports take.
    """

    method: str
    source_mb: int
    result_mb: int
    contender: str
    expand_seconds: float
    read_seconds: float
    seconds: float
    cpu_seconds: float
    over_read: float
    own_mb: int
    anonymous_mb: int
    resident_mb: int


def run_expansion(source: Path, destination: Path, method: str) -> float:
    """Expand as the command does, and return the seconds it takes."""
    from tritter.core.expansions import Dus, ExpansionSpec, LlamaPro, Moe, Width
    from tritter.transform import expand

    ffn = json.loads((source / "config.json").read_text())["intermediate_size"]
    specs: dict[str, ExpansionSpec] = {
        "dus": Dus(),
        "llama_pro": LlamaPro(),
        "width": Width(intermediate_size=ffn * 3 // 2, init="net2net"),
        "moe": Moe(num_experts=4),
    }
    started = time.perf_counter()
    expand(source, destination, [specs[method]], max_shard_bytes=SHARD_BYTES)
    return time.perf_counter() - started


def run_check(source: Path, result: Path, contender: str) -> None:
    """Compare both in this process, after telling the parent that everything is imported."""
    from tritter.core.models import load_model, read_model, uninitialised_model
    from tritter.evaluation.jump import Jump
    from tritter.evaluation.measure import random_tokens

    tokens = random_tokens(read_model(result))
    uninitialised_model(
        read_model(source).config
    )  # transformers imports some of itself at first use
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    if contender == "both loaded":
        jump = Jump.between(load_model(source), load_model(result), tokens)
    else:
        jump = Jump.of_folders(source, result, tokens)[0]
    print(time.perf_counter() - started, flush=True)
    print(f"{contender}: {jump.relative_to_std:.3e}", file=sys.stderr)
    sys.stdin.readline()


def read_seconds(*folders: Path) -> float:
    """Return how long it takes to read all files once, as `cat` does."""
    piece = bytearray(16 * 2**20)
    started = time.perf_counter()
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return time.perf_counter() - started


def benchmark(
    megabytes: int,
    *,
    place: Path,
    methods: Sequence[str] = METHODS,
    contenders: Sequence[str] = CONTENDERS[:1],
    rounds: int = 1,
    hidden_size: int = 1024,
) -> Iterator[Row]:
    """Measure every contender on each method's result of one source."""
    source, result = place / f"source{megabytes}", place / "result"
    write_source(source, megabytes=megabytes, hidden_size=hidden_size, is_repeated=True)
    for method in methods:
        expanding = run_expansion(source, result, method)
        reads: dict[str, list[float]] = {each: [] for each in contenders}
        runs: dict[str, list[Measured]] = {each: [] for each in contenders}
        for contender in [each for _ in range(rounds) for each in contenders]:
            reads[contender].append(read_seconds(source, result))
            words = [str(source), str(result), contender]
            runs[contender].append(sampled([sys.executable, __file__, "--child", *words]))
        sizes = [sum(path.stat().st_size for path in each.iterdir()) for each in (source, result)]
        for contender in contenders:
            yield _row(method, contender, sizes, expanding, reads[contender], runs[contender])
        shutil.rmtree(result)
    shutil.rmtree(source)


def _row(
    method: str,
    contender: str,
    sizes: Sequence[int],
    expanding: float,
    reads: Sequence[float],
    runs: Sequence[Measured],
) -> Row:
    ratios = [run.seconds / read for run, read in zip(runs, reads, strict=True)]
    return Row(
        method=method,
        source_mb=sizes[0] // MEGABYTE,
        result_mb=sizes[1] // MEGABYTE,
        contender=contender,
        expand_seconds=round(expanding, 2),
        read_seconds=round(statistics.median(reads), 2),
        seconds=round(statistics.median(run.seconds for run in runs), 2),
        cpu_seconds=round(statistics.median(run.cpu_seconds for run in runs), 2),
        over_read=round(statistics.median(ratios), 2),
        own_mb=max(run.peak_anonymous_mb - run.idle_anonymous_mb for run in runs),
        anonymous_mb=max(run.peak_anonymous_mb for run in runs),
        resident_mb=max(run.peak_resident_mb for run in runs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--large", type=int, default=10_000, help="megabytes; 0: none")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="CSV file for the rows")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, result, contender = options.child
        run_check(Path(source), Path(result), contender)
        return
    with tempfile.TemporaryDirectory(prefix="tritter-check-") as name:
        place = Path(name)
        asked = {"place": place, "rounds": options.rounds, "contenders": CONTENDERS}
        found = [benchmark(options.megabytes, methods=options.methods, **asked)]
        if options.large:
            found.append(benchmark(options.large, place=place, methods=["dus"], hidden_size=4096))
        tell(map(asdict, chain(*found)), options.output)


if __name__ == "__main__":
    main()
