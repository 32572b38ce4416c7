"""What a run will cost, before its first stage: parameters, memory, and seconds of each stage."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tritter.core.families import Model, forward_flops, training_flops
from tritter.core.models import load_model, new_model
from tritter.data.chat import ids_of
from tritter.data.packing import inputs_for
from tritter.errors import TritterError
from tritter.evaluation.inference import eval_mode
from tritter.methods.forgetting import SelfReplay, needs_of
from tritter.pipeline import samples
from tritter.pipeline.run import Run
from tritter.pipeline.stages.evaluate import Evaluate
from tritter.pipeline.stages.expand import Expand
from tritter.planning.run_memory import RunMemory, batch_size_at, grown_model
from tritter.planning.strategy import planned_rounds

_LONG = 30.0  # seconds; shorter runs have no estimate
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_IN_FIT = ("pretraining (unless cached)", "routers", "training", "validation")  # by the Trainer
_LABELS = {"importance": "importance of each parameter"}


def announce(run: Run) -> None:
    """Print what the run will cost, before its first stage."""
    first, *others = _cost_lines(run)
    run.say("cost", first)
    for line in others:
        run.say("", line)
    with run.waiting("timing a batch"):
        line = _time_line(run)
    if line:
        run.say("", line)


def _cost_lines(run: Run) -> Iterator[str]:
    """Yield a line each on parameters, memory and the tokens that are read."""
    config, source = run.config, run.data.model
    grown = grown_model(config, source)
    before, after = source.num_parameters, grown.num_parameters
    yield f"{before:,} parameters" + (f" → {after:,}" if after != before else "")
    yield RunMemory(config, source).line()
    steps, gathered = config.training.max_steps, config.trainer.accumulate_grad_batches
    length = _window(run, grown)
    of_step = f"{gathered * batch_size_at(length, config):,} x {length:,} tokens"
    text = run.data.validation_subset
    if text is not None:
        of_step += f"; validation every {text.every_n_steps:,} steps: {sum(text.lengths):,} tokens"
    yield f"{steps:,} steps of {of_step}"


def _time_line(run: Run) -> str:
    """Time one batch and return the estimated seconds of each stage.

    Empty if they are few, or differ for each process or with a quantised base.
    """
    config, source = run.config, run.data.model
    experts: Any = config.experts and config.experts.options
    if config.trainer.strategy != "auto" or getattr(experts, "base_bits", None):
        return ""
    if (start := run.data.initial_checkpoint) is not None:
        try:
            start.check()
        except TritterError:  # the first stage reports it
            return ""
    live = new_model(source, seed=0) if start is None else load_model(start.folder, model=source)
    model = run.data.masked(live).to(run.device)
    (rows, *_) = run.data.training_sequences(run.data.new_domains).values()
    batch, length = rows[: config.data.batch_size], config.data.sequence_length
    work = len(batch) * forward_flops(source).of(length)
    rate = trained = work / _seconds(model, batch)
    if (dtype := _MIXED.get(config.trainer.precision)) is not None:  # some CPUs are far slower
        with torch.autocast(run.device.type, dtype):
            trained = work / _seconds(model, batch)
    seconds = dict[str, float]()
    for name, flops in _flops(run, source).items():
        if flops:
            seconds[name] = flops / (trained if name in _IN_FIT else rate)
    for one, needs in zip(config.forgetting, needs_of(config.forgetting), strict=True):
        if needs.writes:
            num_passes, num_texts = SelfReplay.passes(one.options, length)
            tokens = rows[:1, :1].expand(num_texts, 1)
            seconds[f"text of {one.name}"] = num_passes * _seconds(model, tokens)
    if num_passes := samples.num_passes(run):
        seconds["samples"] = num_passes * _seconds(model, rows[:1, :1])
    if (total := sum(seconds.values())) < _LONG:
        return ""
    parts = list[str]()
    for name, each in seconds.items():
        parts.append(f"{_LABELS.get(name, name)} {_time_text(each)}")
    first = " for the first attempt" if len(config.attempts) > 1 else ""
    return f"about {_time_text(total)}{first}, by one timed batch: {', '.join(parts)}"


def _window(run: Run, model: Model) -> int:
    """Return the length on which a model is trained: that of its context, if it was extended."""
    key, length = "max_position_embeddings", run.config.data.sequence_length
    is_longer = model.config.get(key) != run.data.model.config.get(key)
    return model.position_limit or length if is_longer else length


def _flops(run: Run, source: Model) -> Mapping[str, float]:
    """Return stage → its FLOPs, for one attempt or all rounds; of router steps, the most."""
    config, text, length = run.config, run.data.validation_subset, run.config.data.sequence_length
    steps, gathered = config.training.max_steps, config.trainer.accumulate_grad_batches
    pretraining = config.pretraining.max_steps if run.data.initial_checkpoint is None else 0
    methods = tuple(zip(config.forgetting, needs_of(config.forgetting), strict=True))
    # Without any text, a method keeps the importances of the checkpoint
    most = (
        sum(map(run.data.num_sequences, run.data.old_domains))
        or sum(map(len, run.data.text.kept_sequences.sequences.values()))
        or min((one.options.num_sequences for one, each in methods if each.writes), default=0)
    )
    num_sampled = num_refreshed = 0.0
    for one, needs in methods:
        of_estimate = min(most, getattr(one.options, "num_sequences", 0))
        num_sampled += of_estimate if needs.prepares else 0
        num_refreshed += one.kind.refreshes(one.options, steps) * of_estimate
    of_row = training_flops(source).of(length)
    flops = defaultdict[str, float](float)
    flops["pretraining (unless cached)"] = pretraining * config.data.batch_size * gathered * of_row
    flops["baseline (unless cached)"] = run.data.scoring.flops(forward_flops(source))
    options, new_rows = config.adaptation, sum(map(run.data.num_sequences, run.data.text.tasks[0]))
    has_routers = any(getattr(spec, "is_append", False) for spec in config.expansion)
    experts: Any = config.experts and config.experts.options
    detects = getattr(experts, "boundaries", "") == "detected"  # by a whole pass or half of one
    passes = 2.0 + (detects and (1.0 if experts.detector.reads_losses else 0.5))
    models = [grown_model(config, source)] * len(run.data.text.tasks)
    if config.pipeline.target_params is not None:
        models = [shape.model for shape in planned_rounds(config, source)]
    count = 1 if config.pipeline.target_params else len(models)  # one control for all rounds
    pairs = [*pairwise((source, *models)), *[(source, source)] * count * config.control]
    for number, (before, after) in enumerate(pairs):
        times = 1 if number < len(models) else len(models) // count
        estimates = number != len(models)  # the control starts with those of the first attempt
        reading, window = forward_flops(after), _window(run, after)
        rows = gathered * batch_size_at(window, config)
        flops["importance"] += estimates * num_sampled * training_flops(before).of(length)
        if after is not before:
            flops["expand"] += Expand.flops(run, before, after, window)
        if after is not before and has_routers:
            num_steps = options.router_steps(new_rows * length // window, rows)
            flops["routers"] += num_steps * rows * 2 * reading.of(window)  # no gradients of weights
        learning = training_flops(after).of(window)
        if has_lora := experts is not None and number < len(models):
            learning = passes * reading.of(window)
        flops["training"] += (steps * times * rows + num_refreshed) * learning
        if text is not None:
            validations = 1 - -steps * times // text.every_n_steps
            flops["validation"] += validations * sum(map(reading.of, text.lengths))
        flops["evaluate"] += Evaluate.flops(run, after, window, has_lora=has_lora)
    return flops


def _seconds(model: nn.Module, rows: Tensor) -> float:
    """Return the seconds of a forward pass, after one to warm up."""
    with eval_mode(model) as device:
        inputs = inputs_for(model, ids_of(rows).long().to(device))
        model(input_ids=inputs[:, :8], use_cache=False)
        since = time.perf_counter()
        model(input_ids=inputs, use_cache=False).logits[0, -1, 0].item()  # waits for a GPU
        return time.perf_counter() - since


def _time_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
