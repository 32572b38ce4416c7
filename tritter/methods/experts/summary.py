"""Records of a run's LoRA experts for the lineage and summary.json."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tritter.checkpoints import ExpansionRecord
from tritter.core.families import Model
from tritter.core.models import live_shape
from tritter.data.packing import kept_tokens
from tritter.evaluation.inference import eval_mode
from tritter.evaluation.losses import batch_that_fits, vocab_size_of
from tritter.methods.experts.callback import EXPERTS
from tritter.methods.experts.gates import usage as mean_gates
from tritter.methods.experts.mixture import mixture_on
from tritter.methods.experts.stored import ExpertFolder

_BATCH = 8


def expert_records(
    after: Model, reports: Mapping[str, Any], *, options: Mapping[str, Any], seed: int
) -> list[ExpansionRecord]:
    """Return the lineage record of the experts added in a training run, if there are any.

    Args:
        after: the base at its end.
        reports: of the run's callbacks.
        options: the options of `experts`, with the name.
        seed: of the run.
    """
    events = reports.get(EXPERTS, {}).get("events", [])
    born = [event["expert"] for event in events if event["kind"] == "spawned"]
    if not born:
        return []
    record = ExpansionRecord(
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        expansion_type=EXPERTS,
        method=options["name"],
        options={**options, "spawned": born},
        seed=seed,
        source_config=after.config,
        target_config=after.config,
        layer_sources=tuple(range(after.sizes.num_hidden_layers)),
        map_digest=sha256(" ".join(born).encode()).hexdigest(),
        claims_exact=True,  # a new expert has zero output
        step0_error=0.0,
    )
    return [record]


def expert_usage(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return the experts of a model, and the mean gate of each on the data of each domain.

    Args:
        model: the model, with a mixture.
        sequences: domain → int64 [N, T].
        progress: called with the number of sequences that are read, and the total.
    """
    mixture = mixture_on(model)
    assert mixture is not None
    total, done = sum(map(len, sequences.values())), 0
    usage: dict[str, dict[str, float]] = {}
    with eval_mode(model) as device:
        for domain, ids in sequences.items():
            gates, number = torch.zeros(len(mixture.names), dtype=torch.float64), 0
            for rows in ids.split(batch_that_fits(_BATCH, ids.shape[1], vocab_size_of(model))):
                kept = kept_tokens(model, rows.to(device))
                model(input_ids=rows.to(device), use_cache=False)
                num_kept = rows.numel() if kept is None else int(kept.sum())
                gates += mean_gates(mixture.gates(kept)).double().cpu() * num_kept
                number += num_kept
                done += len(rows)
                if progress is not None:
                    progress(done, total)
            usage[domain] = dict(zip(mixture.names, (gates / number).tolist(), strict=True))
    adapters = ExpertFolder.of(mixture).adapters
    num_adapted = sum(
        d.numel() + u.numel() for each in adapters.values() for d, u in each.factors.values()
    )
    num_routing = sum(p.numel() for router in mixture.routers() for p in router.parameters())
    named = model.named_parameters()
    num_base = sum(prod(live_shape(p)) for n, p in named if ".lora_" not in n) - num_routing
    trainable = num_adapted + num_routing
    return {
        "number": len(mixture.adapters),
        "names": list(mixture.names),
        "usage": usage,
        "ranks": {name: each.shape.rank for name, each in adapters.items()},
        "parameters": {
            "base": num_base,
            "trainable": trainable,
            "share": trainable / (num_base + trainable),
        },
        "routing": {
            "router": mixture.router,
            "top_k": mixture.routing.top_k,
            "temperature": mixture.routing.temperature,
        },
    }


def experts_summary(
    fits: Sequence[Mapping[str, Any]], *, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `experts` of summary.json: one record for all training runs of a branch.

    Args:
        fits: see `Method.summary`; runs without changes have no report.
        options: the options of `experts`, with the name.
    """
    record = {
        "kind": options["name"],
        "options": options,
        **fits[-1]["usage"],
        "phases": [fit["usage"]["usage"] for fit in fits],
    }
    reports = [fit["reports"][EXPERTS] for fit in fits if fit["reports"].get(EXPERTS)]
    if len(reports) < len(fits):
        return record
    before = list(accumulate((fit["steps"] for fit in fits), initial=0))
    events = [
        {**event, "task": number, "step": event["step"] + before[number]}
        for number, report in enumerate(reports)
        for event in report["events"]
    ]
    spawned = [event for event in events if event["kind"] == "spawned"]
    record |= {"spawned": spawned, "events": events}
    for key in ("batches", "domains", "states"):
        record[key] = reports[-1].get(key, {})  # earlier versions lack the last two
    for name, values in (("usage_over_time", "gates"), ("ranks_over_time", "ranks")):
        parts = [report[name] for report in reports]
        steps = [step + before[n] for n, part in enumerate(parts) for step in part["steps"]]
        experts = dict.fromkeys(expert for part in parts for expert in part[values])
        rows = {  # null if the expert did not exist
            expert: [
                value
                for part in parts
                for value in part[values].get(expert, [None] * len(part["steps"]))
            ]
            for expert in experts
        }
        record[name] = {"steps": steps, values: rows}
    return record
