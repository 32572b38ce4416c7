"""Novelty on a stream: false alarms where nothing is new, delays where something is, repeats.

    python experiments/benchmarks/novelty.py --output experiments/benchmarks/novelty.csv

A small Llama learns the standard library's prose. Every detector then sees (1) 5,000 batches of
prose that was held out, shuffled, and some see it in the order of the documents, (2) streams in
which the shipped skills and the library's code come one after the other, each twice, for 40 batches
with prose between. What is called new becomes known by the batches that were called so, and is
recalibrated on the next thirty, as an expert would be trained on them. (3) Single samples are
gathered from batches of which an eighth is new. (4) The loss rule sees simulated losses.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.benchmarks.table import tell  # noqa: E402
from tritter.core.families import Model  # noqa: E402
from tritter.core.families.tables import llama_config  # noqa: E402
from tritter.core.models import new_model  # noqa: E402
from tritter.data.built_in import built_in_documents  # noqa: E402
from tritter.data.corpus import Corpus  # noqa: E402
from tritter.data.skills import SKILLS  # noqa: E402
from tritter.data.split import SplitRule  # noqa: E402
from tritter.data.tokens import (  # noqa: E402
    END_OF_TEXT,
    TextBounds,
    TokenisedDocuments,
    train_tokenizer,
)
from tritter.methods.novelty import (  # noqa: E402
    NoveltyDetector,
    NoveltyOptions,
    Observation,
    SkillLibrary,
    observe,
)
from tritter.methods.novelty.detectors import NovelSamples  # noqa: E402
from tritter.methods.novelty.library import ProjectionOptions  # noqa: E402
from tritter.methods.novelty.statistics import share_bound  # noqa: E402

LENGTH, BATCH, PHASE, CALIBRATION = 128, 16, 40, 30
PROSE = "prose"
DETECTORS: Mapping[str, Any] = {
    "loss": "loss",
    "loss alone": {"name": "loss", "with_features": False},
    "mahalanobis": "mahalanobis",
    "cosine": "cosine",
    "cosine, decay 0.05": {"name": "cosine", "decay": 0.05},
    "cosine, mean": {"name": "cosine", "reduction": "mean"},
    "cosine, median": {"name": "cosine", "reduction": "median"},
    "cosine, head": "cosine",
    "cosine, average 0.5": "cosine",
}
SHUFFLED, ORDERED, BOTH_ORDERED = (
    "prose, shuffled",
    "prose in order, calibrated shuffled",
    "prose in order, calibrated so",
)
IN_ORDER = ("loss", "loss alone", "mahalanobis")  # that see the documents in their order as well
SIMULATED = (
    "normal",
    "log-normal samples",
    "t3 batches",
    "autocorrelated 0.8",
    "autocorrelated 0.8, t3",
)
CALIBRATIONS = 10  # of each simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one detector did on one kind of stream; 0 where the stream has none of it.

    Args:
        per_1000_upper: 95 % upper bound of the rate of false alarms (Clopper and Pearson).
        recognised: repeats that end as known by their own name.
        spawned_again: skills that are called new once more than the first time.
        purity: part of the bursts' samples that are of the new skill.
    """

    detector: str
    stream: str
    steps: int
    false_alarms: int
    per_1000: float
    per_1000_upper: float
    skills: int = 0
    found: int = 0
    largest_delay: int = 0
    median_delay: float = 0.0
    repeats: int = 0
    recognised: int = 0
    spawned_again: int = 0
    purity: float = 0.0
    milliseconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the base says of all sequences of each text: prose held out, skills."""

    prose: Observation
    skills: Mapping[str, Observation]


def rate(count: int, steps: int) -> dict[str, float]:
    upper = share_bound(count, steps, confidence=0.95, is_lower=False)
    return {"per_1000": round(1000 * count / steps, 3), "per_1000_upper": round(1000 * upper, 3)}


def trained_base(sequences: Tensor, *, vocab_size: int, steps: int, seed: int) -> nn.Module:
    """Return a Llama of two layers, trained on sequences [N, T] at a cosine rate."""
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 512,
        "initializer_range": 0.02,
    }  # fmt: skip
    model = new_model(Model(llama_config(vocab_size=vocab_size, **sizes)), seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(sequences), (BATCH,), generator=generator)
        ids = sequences[rows].long()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def seen_by_a_base(
    *, steps: int, seed: int, skills: Sequence[str], cache: Path, sequences: int = 640
) -> Seen:
    """Train a base on prose; return what it says of held-out prose and of skills."""
    names = {PROSE: "stdlib:prose"} | {
        name: "stdlib:code" if name == "code" else f"skills:{name}:12000" for name in skills
    }
    rule = SplitRule(seed=seed, validation_fraction=0.4)
    parted = rule.split({PROSE: built_in_documents(names[PROSE])})
    corpus = Corpus.build(
        {name: built_in_documents(path) for name, path in names.items()},
        origin="built in",
        vocab_size=1024,
        validation_fraction=0.4,
        max_validation_tokens_per_document=20_000,
        seed=seed,
        cache_dir=cache,
        tokenizer=train_tokenizer(parted[PROSE].train, vocab_size=1024),
    )
    end = corpus.tokenizer.token_to_id(END_OF_TEXT)

    def packed(documents: TokenisedDocuments) -> Tensor:
        return documents.pack(sequence_length=LENGTH, bounds=TextBounds(end))

    base = trained_base(
        packed(corpus.domains[PROSE].train),
        vocab_size=corpus.tokenizer.get_vocab_size(),
        steps=steps,
        seed=seed,
    )

    def observed(ids: Tensor) -> Observation:
        parts = [observe(base, part) for part in ids.split(64)]
        return Observation(
            losses=torch.cat([p.losses for p in parts]),
            features=torch.cat([p.features for p in parts]),
        )

    return Seen(
        observed(packed(corpus.domains[PROSE].validation)),
        {name: observed(packed(corpus.domains[name].train)[:sequences]) for name in skills},
    )


def batches(seen: Observation, *, seed: int, size: int = BATCH) -> Iterator[Observation]:
    """Yield batches without end, every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(seen), generator=generator)
        for rows in order[: len(order) // size * size].view(-1, size):
            yield seen.rows(rows)


def in_order(seen: Observation, *, size: int = BATCH) -> Iterator[Observation]:
    """Yield batches of neighbours without end; later rounds begin a few sequences further on."""
    shift = 0
    while True:
        order = torch.arange(len(seen)).roll(-shift)
        for rows in order[: len(order) // size * size].view(-1, size):
            yield seen.rows(rows)
        shift += 5


def detector_of(
    name: str, seen: Seen, *, seed: int, cooldown: int = CALIBRATION, is_in_order: bool = False
) -> tuple[NoveltyDetector, Observation]:
    """Return a detector that knows prose by 30 batches, and the prose of the others."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(seen.prose), generator=generator)
    if is_in_order:
        rows = torch.arange(len(seen.prose) // BATCH * BATCH).view(-1, BATCH)
        order = rows[torch.randperm(len(rows), generator=generator)].flatten()
    held, rest = order[: CALIBRATION * BATCH], order[CALIBRATION * BATCH :]
    average = 0.5 if "average" in name else 0.0
    made = NoveltyDetector(
        SkillLibrary(),
        detector=DETECTORS[name],
        options=NoveltyOptions(cooldown=cooldown, moving_average=average),
    )
    known = [seen.prose.rows(rows) for rows in held.view(-1, BATCH)]
    made.add(PROSE, known, is_base=True)
    if "head" in name:
        features = seen.prose.features[held]
        # The random mix: entries of the features shuffled among sequences
        mix = torch.stack(
            [each[torch.randperm(len(each), generator=generator)] for each in features.T], dim=1
        )
        made.library.train_projection({PROSE: features}, mix, ProjectionOptions(seed=seed))
    return made, seen.prose.rows(rest.sort().values)


def stationary(name: str, seen: Seen, *, steps: int, seed: int, stream: str) -> Row:
    """Count alarms on prose; without a cooldown, so that each of them counts."""
    detector, rest = detector_of(
        name, seen, seed=seed, cooldown=0, is_in_order=stream == BOTH_ORDERED
    )
    coming = batches(rest, seed=seed) if stream == SHUFFLED else in_order(rest)
    count, since = 0, time.perf_counter()
    for _ in range(steps):
        count += detector.observe(next(coming)).kind == "new"
    spent = 1000 * (time.perf_counter() - since) / steps
    return Row(
        detector=name,
        stream=stream,
        steps=steps,
        false_alarms=count,
        milliseconds=round(spent, 2),
        **rate(count, steps),
    )


def bursts(seen: Seen, *, steps: int, seed: int) -> Row:
    """Count bursts in prose, and batches until the first where two of sixteen samples are new."""
    order = torch.randperm(len(seen.prose), generator=torch.Generator().manual_seed(seed))
    size = CALIBRATION * BATCH
    parts = [order[:size], order[size : 2 * size], order[2 * size :]]
    known, held = ([seen.prose.rows(r) for r in part.view(-1, BATCH)] for part in parts[:2])
    rest = seen.prose.rows(parts[2])
    detector = NoveltyDetector(detector="loss")
    detector.add(PROSE, known, is_base=True)

    def gatherer() -> NovelSamples:
        made = NovelSamples(detector.detector, detector.library)
        made.calibrate(held)
        return made

    made, stream = gatherer(), batches(rest, seed=seed)
    rows = [torch.zeros(1)] * BATCH
    alarms = sum(made.add(next(stream), rows) is not None for _ in range(steps))
    delays, purities = [], []
    marks = [torch.ones(1)] * 2 + [torch.zeros(1)] * (BATCH - 2)
    for skill in seen.skills.values():
        made, new = gatherer(), batches(skill, seed=seed, size=2)
        for step in range(1, 129):
            mixed = Observation.concatenated(
                [next(new), next(stream).rows(torch.arange(BATCH - 2))]
            )
            burst = made.add(mixed, marks)
            if burst is not None:
                delays.append(step)
                purities.append(float(torch.cat(burst.rows).mean()))
                break
    return Row(
        detector="single samples",
        stream="two of sixteen new",
        steps=steps,
        false_alarms=alarms,
        skills=len(seen.skills),
        found=len(delays),
        purity=round(statistics.mean(purities), 3) if purities else 0.0,
        **_delays(delays),
        **rate(alarms, steps),
    )


def stream_of(name: str, seen: Seen, *, orders: int, seed: int) -> Row:
    """Let the skills come one after the other, then again in another order, prose between."""
    delays: list[int] = []
    skills = repeats = recognised = again = steps = alarms = 0
    for order in range(orders):
        detector, rest = detector_of(name, seen, seed=seed + order)
        prose = batches(rest, seed=order)
        sources = {each: batches(held, seed=order) for each, held in seen.skills.items()}
        names = list(seen.skills)
        random.Random(order).shuffle(names)
        for is_repeat in (False, True):
            for skill in names:
                for stream, phase, known in ((prose, PROSE, True), (sources[skill], skill, False)):
                    spawns, told = _phase(detector, stream, phase)
                    if known:
                        steps, alarms = steps + PHASE, alarms + len(spawns)
                    elif is_repeat:
                        repeats, again = repeats + 1, again + len(spawns)
                        recognised += told == skill
                    else:
                        skills += 1
                        delays += spawns[:1]
                        again += len(spawns[1:])
            random.Random(orders + order).shuffle(names)
    return Row(
        detector=name,
        stream="skills",
        steps=steps,
        false_alarms=alarms,
        skills=skills,
        found=len(delays),
        **_delays(delays),
        repeats=repeats,
        recognised=recognised,
        spawned_again=again,
        **rate(alarms, steps),
    )


def _delays(delays: list[int]) -> dict[str, Any]:
    median = statistics.median(delays) if delays else 0.0
    return {"largest_delay": max(delays, default=0), "median_delay": median}


def _phase(
    detector: NoveltyDetector, stream: Iterator[Observation], name: str
) -> tuple[list[int], str]:
    """Show a phase of a stream; return the batches after which it was new, and what it was last."""
    spawns, told = list[int](), ""
    collected: list[Observation] = []
    called = ""
    for step in range(1, PHASE + 1):
        seen = next(stream)
        if called:
            collected.append(seen)
            if len(collected) == CALIBRATION:
                detector.recalibrate(called, collected)
                called = ""
        decision = detector.observe(seen)
        if decision.kind == "new":
            called = name if name not in detector.library else f"{name} {len(detector.library)}"
            detector.add(called)
            spawns.append(step)
            collected = []
        elif decision.kind == "known":
            told = decision.skill
    if called and len(collected) > 2:
        detector.recalibrate(called, collected)
    return spawns, told


def simulated(kind: str, *, steps: int) -> Row:
    """Count alarms of the loss rule on losses around 4 nats whose batch means move as said."""
    count = 0
    for seed in range(CALIBRATIONS):
        generator = torch.Generator().manual_seed(seed)
        level = levels(kind, steps + 3000, generator)
        # Held-out batches are drawn at random from a long stretch, far from the stream that follows
        rows = torch.randperm(2000, generator=generator)[:CALIBRATION]
        is_skewed = kind == "log-normal samples"

        def seen(value: float, g: torch.Generator = generator, s: bool = is_skewed) -> Observation:
            noise = torch.randn(BATCH, generator=g, dtype=torch.float64)
            losses = 4 + 0.06 * value + ((noise.exp() - 1.65) if s else 0.2 * noise)
            return Observation(losses=losses, features=torch.randn(BATCH, 2, generator=g))

        detector = NoveltyDetector(detector="loss", options=NoveltyOptions(cooldown=0))
        detector.add(PROSE, [seen(float(v)) for v in level[rows]], is_base=True)
        for value in level[3000:].tolist():
            count += detector.observe(seen(value)).kind == "new"
    total = steps * CALIBRATIONS
    return Row(
        detector="loss", stream=f"simulated: {kind}", steps=total, false_alarms=count,
        **rate(count, total),
    )  # fmt: skip


def levels(kind: str, steps: int, generator: torch.Generator) -> Tensor:
    """Return how batch means move, in units of their deviation, float64 [steps]."""
    noise = torch.randn(steps, generator=generator, dtype=torch.float64)
    if "t3" in kind:
        squares = torch.randn(steps, 3, generator=generator, dtype=torch.float64).square()
        noise = noise / squares.mean(dim=1).sqrt() / 3**0.5
    if "autocorrelated" not in kind:
        return noise
    values, value = [], 0.0
    for each in noise.tolist():
        value = 0.8 * value + 0.6 * each
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--skills", nargs="+", default=[*SKILLS, "code"])
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        seen = seen_by_a_base(
            steps=asked.base_steps, seed=0, skills=asked.skills, cache=Path(folder)
        )
    tell(map(asdict, rows_of(seen, steps=asked.steps, orders=asked.orders)), asked.output)


def rows_of(seen: Seen, *, steps: int, orders: int) -> Iterator[Row]:
    """Yield all rows."""
    for name in DETECTORS:
        for stream in (SHUFFLED, ORDERED, BOTH_ORDERED):
            if stream == SHUFFLED or name in IN_ORDER:
                yield stationary(name, seen, steps=steps, seed=0, stream=stream)
        yield stream_of(name, seen, orders=orders, seed=1)
    yield bursts(seen, steps=steps, seed=2)
    for kind in SIMULATED:
        yield simulated(kind, steps=steps)


if __name__ == "__main__":
    main()
