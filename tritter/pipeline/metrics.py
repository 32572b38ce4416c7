"""Metrics of a run beside its summary: one CSV, and W&B where it is asked for."""

import csv
import io
from pathlib import Path
from uuid import uuid4

from lightning.pytorch.loggers import WandbLogger

from tritter.config.fingerprint import fingerprint
from tritter.pipeline.context import RunContext, score_records
from tritter.storage.atomic import write_text_atomic
from tritter.training import read_metrics


def evaluation_metrics(context: RunContext, arm_name: str) -> dict[str, float]:
    """Return `eval/<domain>/loss` of a trained arm."""
    scores = score_records(context.read_scores(f"{arm_name}-trained"))
    return {f"eval/{domain}/loss": float(record["loss"] or 0) for domain, record in scores.items()}


def write_metrics(context: RunContext, arm_name: str) -> Path:
    """Write the run's metrics.csv: what the training logged, then the scores at its end."""
    rows = read_metrics(context.folder / arm_name)
    steps = context.ledger.get(f"{arm_name}.fit")
    assert steps is not None
    last: dict[str, object] = {"step": steps.found["steps"]}
    rows.append({k: str(v) for k, v in (last | evaluation_metrics(context, arm_name)).items()})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = context.folder / "metrics.csv"
    write_text_atomic(path, text.getvalue())
    return path


def wandb_logger(context: RunContext) -> WandbLogger | None:
    """Return a W&B logger with group and tags, offline unless asked otherwise; None when off."""
    settings = context.config.logger
    if settings.wandb == "off":
        return None
    import wandb

    config = context.config
    names = [spec.name for spec in config.expansion] or ["none"]
    methods = [options.name for options in config.forgetting] or ["none"]
    # Made here and not by Lightning, which passes an option that wandb warns of on every run.
    run = wandb.init(
        project=settings.project,
        name=f"{'+'.join(names)} {'+'.join(methods)} seed {config.seed}",
        # The jobs of a sweep lie in one folder, whose name lets W&B compare them
        group=settings.group or context.folder.parent.name,
        tags=[
            *settings.tags,
            *(f"expansion:{name}" for name in names),
            *(f"forgetting:{name}" for name in methods),
        ],
        dir=context.folder,
        id=_run_id(context.folder / "wandb_id"),
        resume="allow",
        mode="offline" if settings.wandb == "offline" else "online",
        config=fingerprint(config),
        settings=wandb.Settings(silent=True),
    )
    return WandbLogger(experiment=run, log_model=False)


def _run_id(path: Path) -> str:
    """Return the id of the run in W&B, the same when it is resumed."""
    if not path.exists():
        write_text_atomic(path, uuid4().hex[:8])
    return path.read_text(encoding="utf-8")
