"""One LoRA expert for code on a base that knows prose, gated by what the tokens so far say.

    python experiments/2026-11-21_evidence_routing/trial.py CHECKPOINT > results.csv

trains each arm for as many steps and tokens on code, and prints the losses of both domains before
and after. The gate is that of naive Bayes: sigmoid of half the sum, over the tokens up to this one,
of log p(token | code) − log p(token | prose), from the counts of both. Counts of prose are all
that is kept of it.
"""

import csv
import math
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tritter.checkpoints.expert_files import AdapterShape  # noqa: E402
from tritter.core.models import load_model  # noqa: E402
from tritter.data.sources import TextRequest  # noqa: E402
from tritter.methods.experts.mixture import ExpertMixture  # noqa: E402

LENGTH, BATCH, STEPS, SEEDS = 128, 16, 250, (0, 1, 2)
MAX_TOKENS, MAX_HELD_OUT = 1_500_000, 200  # of a domain; sequences
RANK = 32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Sequences = dict[str, tuple[Tensor, Tensor]]


def sequences(checkpoint: Path) -> Sequences:
    """Return training and held-out sequences [N, T] of each domain, documents kept apart."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    found = {}
    for domain in ("prose", "code"):
        documents = TextRequest([f"stdlib:{domain}"], key=domain, text_field="text").documents()
        texts = sorted(document.text for document in documents)
        random.Random(0).shuffle(texts)
        ids: list[list[int]] = []
        while texts and sum(map(len, ids)) < MAX_TOKENS:
            ids.append([*tokenizer.encode(texts.pop()).ids, 0])
        split = int(0.85 * len(ids))
        found[domain] = (_cut(ids[:split]), _cut([each[:512] for each in ids[split:]]))
    return {d: (train, held[:MAX_HELD_OUT]) for d, (train, held) in found.items()}


def _cut(documents: Sequence[Sequence[int]]) -> Tensor:
    whole = torch.tensor([token for document in documents for token in document])
    return whole[: len(whole) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.no_grad()
def loss(model: nn.Module, held_out: Tensor) -> float:
    """Return the mean next-token loss, nats."""
    model.eval()
    nats = []
    for ids in held_out.split(32):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats.append(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
    model.train()
    return float(torch.cat(nats).mean())


def train(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    data: Sequences,
    *,
    learning_rate: float,
    replay: float = 0.0,
) -> int:
    """Train on code; return how many parameters were trained."""
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    old = round(BATCH * replay)
    for step in range(STEPS):
        part = min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = learning_rate * part
        parts = [
            data[domain][0][torch.randint(0, len(data[domain][0]), (count,))]
            for domain, count in (("code", BATCH - old), ("prose", old))
        ]
        ids = torch.cat(parts)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return sum(parameter.numel() for parameter in trained)


def full(base: nn.Module, data: Sequences, *, replay: float) -> tuple[nn.Module, int]:
    trained = list(base.parameters())
    return base, train(base, trained, data, learning_rate=3e-3, replay=replay)


def lora(base: nn.Module, data: Sequences, *, vocabulary: bool) -> tuple[nn.Module, int]:
    """One adapter of PEFT, everywhere alike."""
    names = [*LINEAR, "embed_tokens", "lm_head"] if vocabulary else list(LINEAR)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, train(model, trained, data, learning_rate=1e-2)


class Evidence(nn.Module):
    """Log-odds of code at each token, in the place of a router.

    Args:
        vocabulary: a change of the (tied) embedding that has the same gate.
        prior: log-odds before any token.
    """

    def __init__(
        self, data: Sequences, size: tuple[int, int], *, vocabulary: bool, prior: float
    ) -> None:
        super().__init__()
        self.prior = prior
        counts = [
            torch.bincount(data[domain][0].flatten(), minlength=size[0]) + 0.5
            for domain in ("prose", "code")
        ]
        self.ratio = (counts[1] / counts[1].sum()).log() - (counts[0] / counts[0].sum()).log()
        self.change = nn.Parameter(torch.zeros(size), requires_grad=vocabulary)
        self.ids = self.odds = torch.empty(0)

    def look(self, ids: Tensor) -> None:
        self.ids = ids
        self.odds = (self.prior + 0.5 * self.ratio[ids].cumsum(1)).clamp(-8, 8)  # [B, T]

    @property
    def gate(self) -> Tensor:
        return torch.sigmoid(self.odds).unsqueeze(-1)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(self.odds), self.odds], dim=-1)


def gated(
    base: nn.Module, data: Sequences, *, vocabulary: bool, prior: float = 0.0
) -> tuple[nn.Module, int]:
    """An expert that does nothing, and one that learns, mixed by the evidence."""
    mixture = ExpertMixture(base)
    mixture.add("nothing", AdapterShape(1, 2.0, ("q_proj",)), seed=0)
    mixture.add("code", AdapterShape(RANK, 2.0 * RANK, LINEAR), seed=1)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".code." in name)
    table = base.get_input_embeddings()  # type: ignore[operator]
    evidence = Evidence(data, tuple(table.weight.shape), vocabulary=vocabulary, prior=prior)
    for mix in mixture._mixes.values():
        mix.router = evidence  # type: ignore[assignment]
    base.register_forward_pre_hook(
        lambda _, args, kwargs: evidence.look(kwargs["input_ids"]), with_kwargs=True
    )
    table.register_forward_hook(
        lambda _, args, out: out + evidence.gate * embedding(evidence.ids, evidence.change)
    )
    base.get_submodule("lm_head").register_forward_hook(
        lambda _, args, out: out + linear(evidence.gate * args[0], evidence.change)
    )
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    if vocabulary:
        trained.append(evidence.change)
    return base, train(base, trained, data, learning_rate=5e-3)


ARMS: dict[str, Callable[[nn.Module, Sequences], tuple[nn.Module, int]]] = {
    "full": lambda base, data: full(base, data, replay=0.0),
    "full, replay of a quarter": lambda base, data: full(base, data, replay=0.25),
    "lora": lambda base, data: lora(base, data, vocabulary=False),
    "lora, vocabulary": lambda base, data: lora(base, data, vocabulary=True),
    "gated lora": lambda base, data: gated(base, data, vocabulary=False),
    "gated lora, vocabulary": lambda base, data: gated(base, data, vocabulary=True),
    "gated lora, vocabulary, prior -1": lambda base, data: gated(
        base, data, vocabulary=True, prior=-1.0
    ),
}


def main(checkpoint: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = sequences(checkpoint)
    base = load_model(checkpoint)
    before = {domain: loss(base, held) for domain, (_, held) in data.items()}
    fields = ("arm", "seed", "trained", "prose", "code", "prose_percent", "code_percent")
    table = csv.DictWriter(sys.stdout, fields)
    table.writeheader()
    for seed in SEEDS:
        for arm, run in ARMS.items():
            torch.manual_seed(seed)
            model, trained = run(load_model(checkpoint), data)
            after = {domain: loss(model, held) for domain, (_, held) in data.items()}
            row = {"arm": arm, "seed": seed, "trained": trained}
            row |= {domain: f"{value:.3f}" for domain, value in after.items()}
            row |= {f"{d}_percent": f"{100 * (after[d] / before[d] - 1):.2f}" for d in after}
            table.writerow(row)
            sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
