"""Which domains of the stream does a novelty detector see? Writes `detection.csv`.

    python experiments/2026-11-26_gemma_experts/detection.py --model GEMMA --data DATA

Only the frozen base decides, so nothing is trained: it reads sequences of each domain once. Each
detector then sees the stream in several orders and batch sizes, and 1,000 repeats after it.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER)]

import torch  # noqa: E402
from gemma_experts import DOMAINS, STREAM, words_of, write_texts  # noqa: E402

from experiments.jobs import ROOT, append, done  # noqa: E402
from tritter.config.launch.composition import load_config  # noqa: E402
from tritter.core.models import load_model  # noqa: E402
from tritter.data.chat import ids_of  # noqa: E402
from tritter.data.packing import kept_tokens, labels_of  # noqa: E402
from tritter.methods.experts.method import DynamicExperts  # noqa: E402
from tritter.methods.experts.options import DynamicOptions  # noqa: E402
from tritter.methods.experts.registry import ExpertRegistry  # noqa: E402
from tritter.methods.novelty import Observation, observe  # noqa: E402
from tritter.methods.novelty.statistics import Calibration  # noqa: E402
from tritter.pipeline.ledger import Ledger  # noqa: E402
from tritter.pipeline.run import Run  # noqa: E402
from tritter.targets import values_of  # noqa: E402
from tritter.terminal import Console  # noqa: E402

OLD = "wikitext"
# Threshold of each batch size that has the effect of 6, which small batches do not reach
UNSCALED = {4: 12.0, 8: 6 * 2**0.5, 16: 6.0}
DETECTORS: dict[str, Any] = {
    "loss": "loss",
    "loss, 6 at any size": None,
    "mahalanobis": "mahalanobis",
    "cosine 0.85": {"name": "cosine", "threshold": 0.85},
    "cosine 0.75": {"name": "cosine", "threshold": 0.75},
}
REPEATED_STEPS = 1_000
COLUMNS = ("seed", "arm", "detector", "batch_size", "tokens", "phase", "domain", "created", "step")


def main() -> None:
    """Observe every domain, and let every detector see the stream."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Gemma 3 270M")
    parser.add_argument("--data", type=Path, required=True, help="code, problems, texts")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "gemma_detection")
    parser.add_argument("--output", type=Path, default=FOLDER / "detection.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--steps", type=int, default=42, help="of each of the seven phases")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence")
    parser.add_argument("--sequences", type=int, default=256, help="of a domain")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    observed = dict(observations(options))
    for seed in options.seeds:
        for batch_size in options.batch_sizes:
            for detector in DETECTORS:
                arm = f"{detector}, {batch_size} x {options.tokens}"
                if (str(seed), arm) in done(options.output):
                    continue
                fixed = {"seed": seed, "arm": arm, "detector": detector, "tokens": options.tokens}
                fixed["batch_size"] = batch_size
                found = detected(options, observed, detector, batch_size, seed)
                append(options.output, [fixed | row for row in found], columns=COLUMNS)


def observations(options: Any) -> Iterator[tuple[str, Observation]]:
    """Yield the losses and features of each domain's sequences under the base."""
    options.rate, options.full_rate, options.batch_size = 1e-3, 5e-5, 4  # not used
    options.documents, options.precision = 8, "bf16-mixed"
    write_texts(options)
    config = load_config([*words_of(options, "LoRA experts", 0), "trainer.progress=off"])
    folder, model = options.work, None
    context = Run(config=config, folder=folder, console=Console(quiet=True), ledger=Ledger(folder))
    for name in (OLD, *DOMAINS):
        path = folder / f"{name}_{options.tokens}.pt"
        if not path.is_file():
            model = model or context.data.masked(load_model(options.model))
            (rows,) = context.data.training_sequences([name]).values()
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
            seen = observe_all(model, rows[order[: options.sequences]])
            torch.save(seen.state_dict(), path)
            print(name, len(seen), float(seen.losses.mean()), flush=True)
        yield name, Observation(**torch.load(path, weights_only=True))


def observe_all(model: torch.nn.Module, rows: torch.Tensor) -> Observation:
    """Return what the base sees of sequences [N, T], as during training."""
    losses, features = [], []
    for ids in rows.long().split(4):
        kept = kept_tokens(model, ids)
        mask = None if kept is None else kept.long()
        with torch.autocast("cpu", torch.bfloat16):
            seen = observe(model, ids_of(ids), mask, labels=labels_of(model, ids))
        losses.append(seen.losses)
        features.append(seen.features)
    return Observation(losses=torch.cat(losses), features=torch.cat(features))


class Shuffled:
    """Batches of one domain, in a new random order in each pass over it."""

    def __init__(self, seen: Observation, batch_size: int, generator: torch.Generator) -> None:
        self._seen, self._size, self._generator = seen, batch_size, generator
        self._order = torch.empty(0, dtype=torch.int64)

    def draw(self) -> Observation:
        """Return the next batch."""
        if len(self._order) < self._size:
            fresh = torch.randperm(len(self._seen), generator=self._generator)
            self._order = torch.cat([self._order, fresh])
        taken, self._order = self._order[: self._size], self._order[self._size :]
        return self._seen.rows(taken)


def detected(
    options: Any, observed: Mapping[str, Observation], detector: str, batch_size: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield a row per phase, and one for all repeats after the stream: the experts created."""
    generator = torch.Generator().manual_seed(seed)
    batches = {name: Shuffled(each, batch_size, generator) for name, each in observed.items()}
    chosen = DETECTORS[detector] or {"name": "loss", "threshold": UNSCALED[batch_size]}
    dynamic = replace(load_options(), detector=chosen, max_experts=100)
    registry = DynamicExperts(**values_of(dynamic)).registry(max_steps=options.steps)
    assert registry.detector is not None
    known = [batches[OLD].draw() for _ in range(Calibration.full)]
    registry.detector.add(OLD, known, is_base=True)
    registry.expert_of[OLD] = DynamicOptions.first
    for phase, domain in enumerate(STREAM, start=1):
        steps = [s for s in range(options.steps) if is_created(registry, batches[domain].draw())]
        first = steps[0] + 1 if steps else ""
        yield {"phase": phase, "domain": domain, "created": len(steps), "step": first}
    false = 0
    for step in range(REPEATED_STEPS):
        if step % options.steps == 0:
            domain = DOMAINS[int(torch.randint(len(DOMAINS), (), generator=generator))]
        false += is_created(registry, batches[domain].draw())
    yield {"phase": "repeats", "domain": "all", "created": false, "step": ""}


def load_options() -> Any:
    """Return the options of `experts=dylora`."""
    experts = load_config(["experts=dylora", "forgetting=none"]).experts
    assert experts is not None
    return experts.options


def is_created(registry: ExpertRegistry, seen: Observation) -> bool:
    """Show a batch to the registry; return True if an expert is created for it."""
    registry.observe(seen, torch.zeros(1, 2, dtype=torch.int64))
    if registry.new_sequences is None:
        return False
    name = registry.next_name()
    registry.assign(name, name)
    return True


if __name__ == "__main__":
    main()
