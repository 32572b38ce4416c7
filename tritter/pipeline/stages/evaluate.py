"""Scores and samples of the trained model of a branch."""

from collections.abc import Mapping
from typing import Any

from tritter.core.families import Model, forward_flops
from tritter.data.packing import lengths_of
from tritter.evaluation.statistics import score_file
from tritter.methods.whole import expert_usage, reading_flops
from tritter.pipeline import windows
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.metrics import score_metrics
from tritter.pipeline.run import Run
from tritter.pipeline.samples import generate_samples
from tritter.pipeline.stage import Stage
from tritter.pipeline.stages.fit import BranchTraining
from tritter.pipeline.trained import round_weights
from tritter.storage.records import record

_USAGE_OF_ROUTERS = 64  # sequences per domain, to measure the usage of experts
_USAGE_SEQUENCES = 16  # per domain, to measure the gates of LoRA experts


@record
class EvaluationFound:
    """Results of an evaluation, without the scores.

    Args:
        samples: for each domain, a prompt and its continuations.
        moe: usage of MoE experts; None for a dense model.
        experts: usage of LoRA experts; None without them.
    """

    samples: tuple[Mapping[str, str], ...]
    moe: Mapping[str, Any] | None = None
    experts: Mapping[str, Any] | None = None


class Evaluate(Stage):
    """Score the trained model and generate samples from both models."""

    name = "evaluate"
    found = EvaluationFound

    def work(self, run: Run, branch: Branch) -> StageResult:
        """Score the trained model, log it, write samples, and measure the usage of experts."""
        training = BranchTraining(run, branch)
        trained = training.load(run.source(branch.trained))
        if not branch.is_final:
            round_weights(trained, run.published_dtype)
        subject = "control" if branch.is_control else "trained model"
        run.say("evaluate", f"{subject} on {', '.join(run.data.domains)}")
        run.score(trained, f"{branch.name}-trained")
        reading = reading_flops(trained)
        samples, files = list[dict[str, str]](), list[str]()
        flops = run.data.scoring.flops(reading)
        if run.data.short is not None:
            files, spent = windows.LongWindows(run, branch).score_trained(trained, reading)
            flops += spent
        is_last = branch.task == len(run.data.text.tasks) - 1
        if is_last and not branch.is_control and run.config.evaluation.sample_tokens != 0:
            start = "baseline" if branch.task else branch.start
            before = training.load(run.source(start))
            with run.progress_bars() as new_bar:
                samples, spent = generate_samples(
                    run.reading(start), before, run, trained, progress=new_bar("writing samples")
                )
            flops += spent
        used, read = training.new_experts.usage(trained, _USAGE_OF_ROUTERS)
        lora_used = None
        if run.source(branch.trained).experts is not None:
            of_experts = {
                domain: run.data.sample_equally([domain], _USAGE_SEQUENCES, "usage").long()
                for domain in run.data.domains
            }
            with run.progress_bars() as new_bar:
                bar = new_bar("measuring gates")
                lora_used = expert_usage(trained.to(run.device), of_experts, progress=bar)
            read += of_experts.values()
        trained.to("cpu")
        for logger in run.loggers:  # before the stage is recorded: a resumed run skips it then
            steps = run.ledger.training(branch.name).steps
            logger.log_metrics(score_metrics(run, branch.name), step=steps)
        flops += sum(reading.of_all(lengths_of(run.data.document_mask, each)) for each in read)
        return StageResult(
            EvaluationFound(samples=tuple(samples), moe=used, experts=lora_used),
            flops={branch.label("evaluate"): flops},
            leaves=(score_file(f"{branch.name}-trained"), *files),
        )

    @staticmethod
    def flops(run: Run, model: Model, window: int, *, has_lora: bool) -> float:
        """Return the expected FLOPs without samples; training reads windows of `window` tokens."""
        data, old, reading = run.data, run.data.model.position_limit, forward_flops(model)
        total = data.scoring.flops(reading)
        if most := _USAGE_OF_ROUTERS * model.family.has_experts + _USAGE_SEQUENCES * has_lora:
            sizes = (data.num_sequences(name) * data.sequence_length for name in data.domains)
            total += sum(min(most, size // window) for size in sizes) * reading.of(window)
        if old is not None and window > data.sequence_length:
            total += windows.flops(data.reading(window), reading, source_length=old, length=window)
        return total
