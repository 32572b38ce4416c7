"""The LoRA experts of a checkpoint as `tritter inspect` shows them."""

from typing import Any

from rich.text import Text

from tritter.checkpoint.expert_files import ExpertFiles
from tritter.cli.output import new_table, print_lines, signs_of
from tritter.report.wording import count_text
from tritter.terminal import Console


def experts_json(files: ExpertFiles) -> dict[str, Any]:
    """Return everything that the files say without a tensor being opened.

    Raises:
        TritterError: an expert's config can't be read.
    """
    head = files.head
    adapters = {
        each.name: {
            "rank": each.rank,
            "alpha": each.alpha,
            "targets": list(each.targets),
            "parameters": each.num_parameters,
        }
        for each in files.summaries()
    }
    return {
        "names": list(head.names),
        "router": head.router,
        "is_shared": head.is_shared,
        "top_k": head.top_k,
        "temperature": head.temperature,
        "capacity_factor": head.capacity_factor,
        "adapters": adapters,
        "usage": {domain: dict(gates) for domain, gates in head.usage.items()},
        "mean_gates": files.mean_gates(),
    }


def print_experts(console: Console, files: ExpertFiles) -> None:
    """Print the experts as a table, and how they are mixed."""
    head = files.head
    table = new_table(
        "expert", "rank", "alpha", "parameters", "on",
        numbers=("rank", "alpha", "parameters"), wrapped=("on",),
    )  # fmt: skip
    shapes = {each.name: each for each in files.summaries()}
    signs = signs_of(console)
    for name in head.names:
        cells = ("-", "-", "-", "the base itself")
        if (shape := shapes.get(name)) is not None:
            count, targets = count_text(shape.num_parameters), " ".join(shape.targets)
            cells = (str(shape.rank), f"{shape.alpha:g}", count, targets)
        table.add_row(name, *(Text(signs.printable(cell)) for cell in cells))
    console.print()
    console.print(table)
    console.print()
    mixed = "all" if head.top_k is None else f"the best {head.top_k}"
    whose = "one for all layers" if head.is_shared else "one in each layer"
    router = {"learned": whose, "evidence": "token counts", "both": f"{whose}, and token counts"}
    lines = [
        ("router", router[head.router]),
        ("mixed", f"{mixed}, temperature {head.temperature:g}"),
    ]
    for number, (domain, gates) in enumerate(head.usage.items()):
        shown = ", ".join(f"{name} {gates.get(name, 0.0):.2f}" for name in head.names)
        lines.append(("" if number else "mean gates", f"{domain}: {shown}"))
    print_lines(console, lines)
