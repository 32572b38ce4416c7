"""Memory and speed of training data that is read while the model trains (`data.streaming=true`).

    python experiments/benchmarks/streamed_data.py --megabytes 100 10000 --seconds 60

writes .jsonl files of made-up words, draws training sequences from each in a process of its own,
and prints a row per size. The same process then tokenises 25 MB with `datasets.map`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402

from experiments.benchmarks.corpus_memory import MEGABYTE, _Peak, write_text  # noqa: E402
from experiments.benchmarks.table import tell  # noqa: E402
from tritter.data.datasets import DatasetName  # noqa: E402
from tritter.data.documents import Document  # noqa: E402
from tritter.data.split import SplitRule  # noqa: E402
from tritter.data.stream import StreamedSequences  # noqa: E402
from tritter.data.tokens import TextBounds, parsed_tokenizer, train_tokenizer  # noqa: E402

LENGTH, BATCH = 512, 16
MAP_MEGABYTES = 25
BLOCK_MEGABYTES = 20  # of different paragraphs; further ones differ in their number


@dataclass(frozen=True, slots=True)
class Row:
    """One size.

    Args:
        filled_mb: peak of the process's own memory, beyond the imports, at the first batch.
        peak_mb: the same after all batches.
        state_mb: size of the saved position.
        tokens_per_second: of training sequences.
        map_tokens_per_second: of `datasets.map` with the same tokenizer.
        over_map: ratio of the two.
    """

    megabytes: int
    tokens: int
    filled_mb: float
    peak_mb: float
    state_mb: float
    tokens_per_second: int
    map_tokens_per_second: int
    over_map: float


def write_records(path: Path, *, megabytes: int) -> None:
    """Write records of one paragraph."""
    block = path.with_suffix(".txt")
    write_text(block, megabytes=min(megabytes, BLOCK_MEGABYTES))
    paragraphs = block.read_text(encoding="utf-8").split("\n\n")
    block.unlink()
    left = megabytes * MEGABYTE
    with path.open("w", encoding="utf-8") as file:
        for number, paragraph in enumerate(cycle(paragraphs)):
            left -= file.write(json.dumps({"text": f"{number} {paragraph}"}) + "\n")
            if left <= 0:
                return


def measure(path: Path, *, seconds: float) -> Row:
    """Draw batches of one file for some seconds."""
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, 2000)]
    tokenizer = train_tokenizer([Document("", text) for text in texts], vocab_size=4096)
    options = {
        "rule": SplitRule(seed=0, validation_fraction=0.01),
        "tokenizer": parsed_tokenizer(tokenizer.to_str()),
        "chat": None,
        "packing": "stream",
        "sequence_length": LENGTH,
        "bounds": TextBounds(0),
    }
    with _Peak() as peak:
        source = DatasetName.named("data.new", str(path))
        stream = StreamedSequences([source], key="data.new", **options, seed=0)
        stream.next_sequences(BATCH)
        filled, tokens, since = peak.mb, 0, time.perf_counter()
        while (elapsed := time.perf_counter() - since) < seconds:
            tokens += stream.next_sequences(BATCH).numel()
        total = peak.mb
    speed, mapped = tokens / elapsed, _map_speed(path, tokenizer)
    state = stream.state_dict()
    size = sum(state[name].nbytes for name in ("buffer", "tail")) / MEGABYTE
    megabytes = round(path.stat().st_size / MEGABYTE)
    return Row(
        megabytes, tokens, filled, total, round(size, 1), round(speed), round(mapped),
        round(speed / mapped, 2),
    )  # fmt: skip


def _map_speed(path: Path, tokenizer: object) -> float:
    """Return the tokens per second of `datasets.map` on the first part of a file."""
    part, size = path.with_name("part.jsonl"), MAP_MEGABYTES * MEGABYTE
    with path.open("rb") as file:
        part.write_bytes(file.read(size).rpartition(b"\n")[0])
    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "json", data_files=str(part), split="train", cache_dir=str(path.parent / "cache")
    )

    def tokenised(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encodings = tokenizer.encode_batch_fast(batch["text"])  # type: ignore[attr-defined]
        return {"input_ids": [encoding.ids for encoding in encodings]}

    since = time.perf_counter()
    found = rows.map(tokenised, batched=True, remove_columns=["text"])
    elapsed = time.perf_counter() - since
    return sum(len(ids) for ids in found["input_ids"]) / elapsed


def benchmark(sizes: list[int], place: Path, *, seconds: float) -> list[Row]:
    """Return a row for each size in megabytes."""
    rows = []
    for megabytes in sizes:
        path = place / f"{megabytes}.jsonl"
        write_records(path, megabytes=megabytes)
        words = [sys.executable, str(Path(__file__).resolve()), "--measure", str(path)]
        words += ["--seconds", str(seconds)]
        found = subprocess.run(words, capture_output=True, text=True, check=True)
        rows.append(Row(**json.loads(found.stdout)))
        path.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure is not None:
        print(json.dumps(asdict(measure(words.measure, seconds=words.seconds))))
        return
    with tempfile.TemporaryDirectory() as place:
        rows = benchmark(words.megabytes, Path(place), seconds=words.seconds)
        tell(map(asdict, rows), words.output)


if __name__ == "__main__":
    main()
