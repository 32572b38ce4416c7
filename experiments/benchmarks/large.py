"""Expansions at the sizes of the specification, from disk to disk, beside `cp` of the result.

    python experiments/benchmarks/large.py --place /a/folder/with/60/GB

writes random bf16 Llamas of 3 and 7 billion parameters, one at a time, expands each with the whole
command, with and without its check, and copies the result in the same round. Everything that it
writes is removed at once. The largest case needs 58 GB: `--cases` selects others.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.benchmarks.expand_speed import run_words  # noqa: E402
from experiments.benchmarks.streaming import (  # noqa: E402
    copy_seconds,
    write_random,
)
from experiments.benchmarks.table import tell  # noqa: E402

SPARE_BYTES = 2 * 10**9
SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Row:
    """One round of a case. Memory is the largest that was seen, in megabytes of 10⁶ bytes.

    Args:
        over_cp: seconds over those of `cp` of the result and the wait for the disk.
        check_seconds: that the check of the result takes: the difference of two commands.
    """

    case: str
    source_gb: float
    result_gb: float
    cp_seconds: float
    seconds: float
    over_cp: float
    cpu_seconds: float
    anonymous_mb: int
    resident_mb: int
    checked_seconds: float
    checked_over_cp: float
    check_seconds: float
    checked_anonymous_mb: int
    checked_resident_mb: int


# The shapes of Llama 3.2 3B and Mistral 7B
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "3B": {
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "7B": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
CASES = {
    "3B dus 28 → 42": ("3B", "--method dus --target-layers 42"),
    "3B width 3072 → 4608": ("3B", "--method width --hidden-size 4608"),
    "7B dus 32 → 48": ("7B", "--method dus --target-layers 48"),
    "7B width 4096 → 5120": ("7B", "--method width --hidden-size 5120"),
}


def config_of(shape: str) -> dict[str, Any]:
    """Return the config of a source."""
    from tritter.core.families import llama_config

    return llama_config(
        **SHAPES[shape],
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=8192,
        initializer_range=0.02,
    )


def benchmark(cases: Sequence[str], *, place: Path, rounds: int) -> Iterator[Row]:
    """Measure each case; neighbouring cases share their source if the disk has room."""
    written, source = None, place / "source"
    for case in [case for case in cases for _ in range(rounds)]:
        shape, words = CASES[case]
        if written != shape or not source.is_dir():
            shutil.rmtree(source, ignore_errors=True)
            write_random(source, config_of(shape), shards=12, is_repeated=True)
            written = shape
        yield measure(case, source, place, words.split())


def measure(case: str, source: Path, place: Path, words: Sequence[str]) -> Row:
    """Expand twice and copy once; without room for the copy, the source is removed before."""
    result, shards = place / "result", f"--max-shard-size={SHARD_BYTES}"
    plain = run_words(source, result, [*words, shards, "--no-measure"]).measured
    shutil.rmtree(result)
    checked = run_words(source, result, [*words, shards, "--measure"]).measured
    source_size, size = _bytes(source), _bytes(result)
    if shutil.disk_usage(place).free < size + SPARE_BYTES:
        shutil.rmtree(source)
    copied = copy_seconds(result, place / "copy")
    shutil.rmtree(result)
    return Row(
        case=case,
        source_gb=round(source_size / 1e9, 1),
        result_gb=round(size / 1e9, 1),
        cp_seconds=round(copied, 1),
        seconds=round(plain.seconds, 1),
        over_cp=round(plain.seconds / copied, 2),
        cpu_seconds=round(plain.cpu_seconds, 1),
        anonymous_mb=plain.peak_anonymous_mb,
        resident_mb=plain.peak_resident_mb,
        checked_seconds=round(checked.seconds, 1),
        checked_over_cp=round(checked.seconds / copied, 2),
        check_seconds=round(checked.seconds - plain.seconds, 1),
        checked_anonymous_mb=checked.peak_anonymous_mb,
        checked_resident_mb=checked.peak_resident_mb,
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Measure the cases and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--place", type=Path, help="an existing folder; default: a temporary one")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV file for the rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tritter-large-", dir=options.place) as place:
        rows = benchmark(options.cases, place=Path(place), rounds=options.rounds)
        tell(map(asdict, rows), options.output)


if __name__ == "__main__":
    main()
