"""Where the tokens of each domain go, from `moe` of summary.json."""

from tritter.report.summary import MoeRecord
from tritter.report.table import Table
from tritter.report.wording import number_text

MAX_COLUMNS = 12


def expert_table(experts: MoeRecord) -> Table:
    """Return a row per domain: each expert's part of its assignments, as a mean over the layers.

    Of many experts the most used ones stand for all; appended ones are added up as well.
    """
    usage = {
        domain: [sum(column) / len(layers) for column in zip(*layers, strict=True)]
        for domain, layers in experts.usage.items()
    }
    new, number = experts.new, experts.number
    shown = list(range(number))
    if number > MAX_COLUMNS:
        total = [sum(shares) for shares in zip(*usage.values(), strict=True)]
        shown = sorted(sorted(shown, key=lambda expert: -total[expert])[:MAX_COLUMNS])
    header = ["domain", *(f"{each}{'*' if each in new else ''}" for each in shown)]
    header += ["* new"] * bool(new)
    rows = tuple(
        (
            domain,
            *(_percent(shares[expert]) for expert in shown),
            *([_percent(sum(shares[expert] for expert in new))] if new else []),
        )
        for domain, shares in usage.items()
    )
    title = f"Experts: % of a domain's assignments, {experts.experts_per_token} per token"
    return Table(tuple(header), rows, tuple(range(1, len(header))), title=title)


def bias_text(experts: MoeRecord) -> str | None:
    """Say what the selection bias, which is not saved, does to the loss; None where there is none.

    The bias is that of `moe_routing.bias_update_rate`.
    """
    effect = experts.selection_bias
    if not effect:
        return None
    parts = []
    for domain, losses in effect.items():
        texts = (f"{number_text(losses.get(each), '.3f')} {each}" for each in ("with", "without"))
        parts.append(f"{domain} {', '.join(texts)}")
    return f"loss under the selection bias, which is not saved: {'; '.join(parts)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
