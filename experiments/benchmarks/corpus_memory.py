"""How much memory it takes to make a text into a corpus and to pack it, by the size of the text.

    python experiments/benchmarks/corpus_memory.py --megabytes 25 100

writes texts of made-up words, reads each in a process of its own, trains on some of it, and prints
a row per size: the largest memory of the process's own beyond what the imports take. Pages of
files that are mapped don't count: the system drops and reads them again as it likes.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.benchmarks.table import tell  # noqa: E402
from tritter.data.batches import SequenceStream  # noqa: E402
from tritter.data.corpus import Corpus  # noqa: E402
from tritter.data.sources import TextRequest  # noqa: E402
from tritter.data.tokens import TextBounds  # noqa: E402

MEGABYTE = 2**20
NUM_WORDS, WORDS_OF_PARAGRAPH = 20_000, 150


@dataclass(frozen=True, slots=True)
class Row:
    """One size.

    Args:
        read_mb: peak once the documents are there, beyond the imports.
        corpus_mb: once they are tokenised and cached.
        packed_mb: once they are packed into sequences, a quarter of which was handed out.
    """

    megabytes: int
    tokens: int
    read_mb: float
    corpus_mb: float
    packed_mb: float
    seconds: float


def write_text(path: Path, *, megabytes: int, seed: int = 0) -> None:
    """Write paragraphs of words whose frequencies fall as their ranks."""
    source = random.Random(seed)
    words = [
        "".join(source.choices("etaoinshrdlu", k=source.randint(2, 9))) for _ in range(NUM_WORDS)
    ]
    weights = list(accumulate(1 / rank for rank in range(1, NUM_WORDS + 1)))
    left = megabytes * MEGABYTE
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            chosen = source.choices(words, cum_weights=weights, k=WORDS_OF_PARAGRAPH)
            left -= file.write(" ".join(chosen) + "\n\n")


def measure(path: Path) -> Row:
    """Make a corpus of one text in this process."""
    with _Peak() as peak:
        since = time.perf_counter()
        documents = TextRequest([str(path)], key="text", text_field="text").documents()
        read = peak.mb
        corpus = Corpus.build(
            {"text": documents},
            origin="made up",
            vocab_size=1024,
            validation_fraction=0.2,
            max_validation_tokens_per_document=512,
            seed=0,
            cache_dir=path.parent / "cache",
        )
        cached, training = peak.mb, corpus.domains["text"].train
        stream = SequenceStream(training.pack(sequence_length=128, bounds=TextBounds(0)), seed=0)
        for _ in range(len(stream) // 4 // 16):
            stream.next_sequences(16)
        peaks = (read, cached, peak.mb)
        seconds = round(time.perf_counter() - since, 1)
    megabytes = round(path.stat().st_size / MEGABYTE)
    return Row(megabytes, training.num_tokens, *peaks, seconds)


class _Peak:
    """The most memory of this process's own (RssAnon) since it was begun, looked at all the time.

    Linux alone tells it from pages of files.
    """

    def __enter__(self) -> "_Peak":
        self._begin = self._most = _own_kb()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def mb(self) -> float:
        """Megabytes beyond those at the beginning."""
        return round((self._most - self._begin) / 1024, 1)

    def _look(self) -> None:
        while not self._is_over.wait(0.01):
            self._most = max(self._most, _own_kb())


def _own_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def benchmark(sizes: list[int], place: Path) -> list[Row]:
    """Return a row for each size in megabytes; texts and caches are left in `place`."""
    rows = []
    for megabytes in sizes:
        path = place / f"{megabytes}.txt"
        write_text(path, megabytes=megabytes)
        words = [sys.executable, str(Path(__file__).resolve()), "--measure", str(path)]
        found = subprocess.run(words, capture_output=True, text=True, check=True)
        rows.append(Row(**json.loads(found.stdout)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[25, 100])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure is not None:
        print(json.dumps(asdict(measure(words.measure))))
        return
    with tempfile.TemporaryDirectory() as place:
        tell(map(asdict, benchmark(words.megabytes, Path(place))), words.output)


if __name__ == "__main__":
    main()
