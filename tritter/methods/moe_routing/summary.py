"""Records of the use of a MoE model's experts for summary.json."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tritter.core.stock_routers import Routing
from tritter.data.packing import kept_tokens
from tritter.evaluation.inference import eval_mode
from tritter.methods.moe_routing.objective import expert_counts


def moe_usage(model: nn.Module, sequences: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the use of a MoE model's experts on the data of each domain.

    `usage` is [layer][expert] by domain: each expert's share of the assignments in a layer, without
    padding.
    """
    routing = Routing.of(model)
    assert routing is not None
    shares = {}
    with eval_mode(model) as device, routing.recording():
        for domain, of_domain in sequences.items():
            counts = torch.zeros(len(routing.layers), routing.num_experts)
            for batch in of_domain.split(8):
                input_ids = batch.long().to(device)
                model(input_ids=input_ids, use_cache=False)
                kept = kept_tokens(model, input_ids)
                for row, record in zip(counts, routing.recorded(), strict=True):
                    chosen = record.selected if kept is None else record.selected[kept.flatten()]
                    row += expert_counts(chosen, routing.num_experts).cpu()
            shares[domain] = (counts / counts.sum(dim=1, keepdim=True)).tolist()
    return {
        "number": routing.num_experts,
        "experts_per_token": routing.top_k,
        "layers": list(routing.layers),
        "usage": shares,
    }
