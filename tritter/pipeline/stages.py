"""The stages of a run; each reads earlier results from disk, so that a run can resume."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from tritter.checkpoints import Source, lineage_of, record_step0_error
from tritter.checkpoints.record import layers_text
from tritter.core.families import forward_flops, training_flops
from tritter.core.models import load_model
from tritter.core.stock_routers import Routing
from tritter.data.cache import entry_lock
from tritter.data.chat import ids_of
from tritter.data.datamodule import ValidationSubset
from tritter.data.packing import document_mask_of, lengths_of
from tritter.errors import RequestError, TritterError
from tritter.evaluation.jump import logit_jump
from tritter.evaluation.statistics import MAX_SCORE_BYTES, PairedScores, score_file
from tritter.methods.experts.mixture import mixture_on
from tritter.methods.experts.summary import expert_usage
from tritter.methods.experts.whole import load_whole
from tritter.methods.forgetting import build_methods
from tritter.methods.moe_routing.distill import DistillationModule, only_new_experts
from tritter.methods.moe_routing.stages import best_experts, redraw_rows
from tritter.methods.moe_routing.summary import moe_usage
from tritter.pipeline import experts, importance, moe, windows
from tritter.pipeline.base import copy_source, last_rate, obtain_base, schedule_of
from tritter.pipeline.branch import Branch
from tritter.pipeline.disk import may_release_start, write_expanded
from tritter.pipeline.ledger import (
    BaselineFound,
    ChoiceFound,
    EvaluationFound,
    ExpansionFound,
    StageResult,
    TrainingFound,
    content_key,
)
from tritter.pipeline.notes import best_weights
from tritter.pipeline.run import Run
from tritter.pipeline.samples import generate_samples, sample_log
from tritter.pipeline.scoring import scores_text
from tritter.pipeline.trained import (
    TrainedWriter,
    accept,
    branch_writer,
    child_writer,
    measuring_flops,
    round_weights,
    with_routing,
)
from tritter.storage.atomic import atomic_folder, copy_tree, write_text_atomic
from tritter.storage.hashing import tensor_digest
from tritter.storage.hub import locate
from tritter.storage.reading import read_object
from tritter.training import (
    BaseModule,
    FitResult,
    ForgettingMethod,
    Method,
    Schedule,
    Setting,
    Task,
    Trainee,
    WriteResult,
    discard_saved,
    fit,
    metrics_files,
)
from tritter.training.callbacks import evaluation_flops
from tritter.training.trainer import validation_metrics
from tritter.transform.children import router_flops

_JUMP_SEQUENCES, _JUMP_TOKENS = 8, 128  # of each domain
_ROUTER_WARMUP = 0.05
_EARLIER = ("adapt", "distill")  # stages that train a branch before its main training run


def baseline(run: Run) -> StageResult:
    """Write the initial model to the run folder and score it."""
    folder = run.folder / "baseline"
    seconds = {}
    if run.data.initial_checkpoint is not None:
        location = run.data.initial_checkpoint.folder
        run.say("baseline", f"checkpoint {location}; no pretraining")
        with run.waiting("copying and hashing the checkpoint"):
            lineage = copy_source(run, folder)
    else:
        base = obtain_base(run)
        seconds["pretraining"] = base.seconds
        with atomic_folder(folder, overwrite=True) as temporary:
            copy_tree(base.folder, temporary)
        lineage = lineage_of(folder)
    source = run.register("baseline", lineage)
    _score_baseline(run, source)
    reading = experts.reading_flops_of(run, source)
    flops = {"baseline": run.data.scoring.flops(reading)}
    if (pretraining_flops := lineage.training_config.get("flops")) is not None:
        flops = {"pretraining": float(pretraining_flops), **flops}
    return StageResult(
        BaselineFound(
            parameters=source.model.num_parameters,
            model_hash=lineage.model_hash,
            corpus=run.data.corpus.digest,
        ),
        flops=flops,
        seconds=seconds,
        leaves=("baseline", score_file("baseline")),
    )


def expansion(run: Run, branch: Branch) -> StageResult:
    """Expand the branch's initial model, measure the logit shift and score the result."""
    source, location = run.source(branch.start), f"{branch.name}/expanded"
    if not branch.specs:
        return StageResult(ExpansionFound(parameters=source.model.num_parameters))
    plan = run.planned(branch)
    made = write_expanded(run, branch, run.folder / location)
    grown = run.register(location, made.lineage)
    notes = [f"{step.spec.name}: {note}" for step in plan.steps for note in step.notes]
    for step in plan.steps:
        layers = step.parameter_map.layer_sources
        if layers != tuple(range(len(layers))):
            notes.append(f"{step.spec.name}: layers from {layers_text(layers)}")
    run.say(
        "expand",
        f"{' then '.join(spec.name for spec in branch.specs)}: {plan.source.num_parameters:,} → "
        f"{plan.target.num_parameters:,} parameters",
    )
    for note in notes:
        run.say("", note)
    if plan.vocabulary is not None:
        run.say("", "losses per token are now of other tokens; compare losses per byte")
    texts = run.data.training_sequences(run.data.domains).values()
    pieces = [each[:_JUMP_SEQUENCES, :_JUMP_TOKENS] for each in texts]
    tokens = ids_of(torch.cat(pieces)).long()  # [B, T]
    new_tokens = None if plan.vocabulary is None else plan.vocabulary.new_ids
    with run.waiting("logit shift"):
        before, after = (load_model(each.folder, model=each.model) for each in (source, grown))
        jump = logit_jump(before, after, tokens, new_tokens=new_tokens, has_yardstick=True)
    error, num_steps = jump.to_dict()["relative_to_std"], len(branch.specs)
    lineage = record_step0_error(grown.folder, made.lineage, error, grown.config, num_new=num_steps)
    run.sources[location] = replace(grown, lineage=lineage)
    run.reading(location).score(after, f"{branch.name}-expanded")
    evaluated, flops = dict[str, float](), dict[str, float]()
    if (text := run.data.validation_subset) is not None:
        evaluated = validation_metrics(before, text, run.config.trainer)
        flops["validation"] = evaluation_flops(experts.reading_flops(before), text)
    flops["expand"] = run.data.scoring.flops(forward_flops(grown.model))
    # The source is read in bfloat16 too
    read = (source, source, grown)
    passes = [forward_flops(each.model).of(tokens.shape[1]) for each in read]
    flops["expand"] += len(tokens) * sum(passes) + router_flops(made.plan)
    files = list[str]()
    if windows.is_longer(run, branch):
        readings = experts.reading_flops(before), forward_flops(grown.model)
        files, spent = windows.score_start(run, branch, before, after, readings)
        flops["expand"] += spent
    return StageResult(
        ExpansionFound(
            parameters=plan.target.num_parameters,
            notes=tuple(notes),
            jump=jump.to_dict(),
            before=evaluated,
        ),
        flops=flops,
        leaves=(location, score_file(f"{branch.name}-expanded"), *files),
    )


def adaptation(run: Run, branch: Branch) -> StageResult:
    """Train only the routers, so that they send new domains to the appended experts."""
    start, folder = run.source(moe.before_routers(branch)), run.folder / branch.name / "router"
    options, steps = run.config.adaptation, moe.router_steps(run, branch)
    added = moe.pending_experts(run, branch)
    assert added is not None
    model = run.data.masked(load_model(start.folder, model=start.model))
    if options.router_update == "retrain":
        redraw_rows(model, added.experts, seed=run.seed("router", *branch.purpose))
    location = f"{branch.name}/adapted"
    write = replace(
        child_writer(run, branch, start, location, stage="router adaptation", added=added),
        anneal_steps=moe.anneal_steps(run, branch, added),
    )
    run.say("adapt", f"{steps} router steps on {', '.join(run.data.new_domains_of(branch))}")
    with moe.router_trainee(run, branch, model) as trainee:
        module = BaseModule.of(
            trainee,
            schedule=Schedule(
                learning_rate=options.router_learning_rate,
                max_steps=steps,
                warmup_ratio=_ROUTER_WARMUP,
            ),
            optimizer=replace(run.config.optimizer, weight_decay=0.0),
            methods=build_methods(run.config.forgetting),
        )
        task = importance.task(run, branch, follow=trainee.follow)
        result = _fit(
            run,
            branch,
            module,
            trainee=trainee,
            task=task,
            folder=folder,
            label="router",
            write_result=write,
        )
    return _accept(run, location, result, folder=folder, label=branch.label("adapt"))


def rate_test(run: Run, branch: Branch, schedule: Schedule, observer: Callback) -> None:
    """Train a branch with another schedule and without a result."""
    start = run.source(moe.start_folder(run, branch))
    _train(run, branch, start, schedule=schedule, observer=observer)


def training(run: Run, branch: Branch, *, loggers: Sequence[Logger]) -> StageResult:
    """Continue training on the new domains with the selected forgetting mitigation."""
    start, text = run.source(moe.start_folder(run, branch)), run.data.validation_subset
    folder = run.folder / branch.name
    result, write = _train(run, branch, start, loggers=loggers)
    location = f"{branch.name}/trained"
    accept(run, location)
    run.ledger.watch_disk()
    flops = result.flops + measuring_flops(run, write, location)
    if result.stopped_because is not None:
        run.say("", f"training stopped: {result.stopped_because}")
    for note in result.notes:
        run.say("data", note)
    if result.ended_early is not None:
        run.say("", f"training ended early, at step {result.steps}: {result.ended_early}")
    if result.best_step is not None:
        run.say("", best_weights(run.config, folder, result))
    if write.routing_state is not None:
        run.say("", "scores with the selection bias, which is not saved:")
        biased = with_routing(run.source(location), write.routing_state)
        run.score(biased, f"{branch.name}-biased")
        flops += run.data.scoring.flops(forward_flops(start.model))
        shutil.rmtree(write.routing_state)
    discard_saved(folder)
    found = TrainingFound.of(result)
    for stage in (f"{branch.name}.{each}" for each in _EARLIER):
        if run.ledger.get(stage) is not None:
            earlier = run.ledger.found(stage, TrainingFound)
            found = replace(
                found,
                refused_steps=found.refused_steps + earlier.refused_steps,
                stopped_because=earlier.stopped_because or found.stopped_because,
            )
    spent, eval_mode = {branch.label("fit"): flops}, branch.label("validation")
    if result.evaluation_flops:  # the control has a single entry
        spent[eval_mode] = spent.get(eval_mode, 0.0) + result.evaluation_flops
    metrics = [path.relative_to(run.folder).as_posix() for path in metrics_files(folder)]
    return StageResult(
        found,
        flops=spent,
        seconds={eval_mode: result.evaluation_seconds} if text else {},
        leaves=(location, *metrics),
    )


def _train(
    run: Run,
    branch: Branch,
    start: Source,
    *,
    loggers: Sequence[Logger] = (),
    schedule: Schedule | None = None,
    observer: Callback | None = None,
) -> tuple[FitResult, TrainedWriter]:
    """Train a branch; return the result and what wrote it.

    Args:
        schedule: of a test: nothing is validated or written, and callbacks of the user do not run.
        observer: callback of a test.
    """
    is_test = schedule is not None
    frees_start = may_release_start(run, branch)
    options = experts.training_of(run, branch)
    settings = replace(options, max_steps=options.max_steps * branch.num_trainings)
    trainee = Trainee(run.data.masked(experts.load_start(run, branch, start)))
    model = trainee.model
    if any(spec.new_blocks_only for spec in branch.specs):
        mapped = run.planned(branch).change.masks()
        for name, parameter in model.named_parameters():
            parameter.requires_grad &= not bool(mapped[name].any())
    num_steps = settings.max_steps if schedule is None else schedule.max_steps
    _announce(run, branch, max_steps=num_steps)
    with moe.training_of_routers(run, branch, trainee):
        is_routed = bool(trainee.side_losses)
        task = importance.task(run, branch, follow=trainee.follow)
        others, methods = _attach(run, branch, start, trainee, task, max_steps=settings.max_steps)
        _freeze(model, methods, task, max_steps=settings.max_steps)
        module = BaseModule.of(
            trainee,
            schedule=schedule or schedule_of(settings, start_rate=last_rate(run, branch)),
            optimizer=run.config.optimizer,
            methods=methods,
        )
        folder, text = run.folder / branch.name, run.data.validation_subset
        if observer is not None:
            trainee.observers += (observer,)
        elif text is not None:
            trainee.observers += tuple(sample_log(run, model, folder))
        write = branch_writer(
            run, branch, is_routed=is_routed, frees_start=frees_start, methods=(*others, *methods)
        )
        result = _fit(
            run,
            branch,
            module,
            trainee=trainee,
            task=task,
            folder=folder,
            label="range test" if is_test else "training",
            loggers=loggers,
            write_result=None if is_test else write,
            evaluation=None if is_test else text,
        )
    return result, write


def _attach(
    run: Run, branch: Branch, start: Source, trainee: Trainee, task: Task, *, max_steps: int
) -> tuple[tuple[Method, ...], tuple[ForgettingMethod, ...]]:
    """Build and attach what acts in a branch's training: growth or experts, and forgetting methods.

    The control only has the latter, which come last: they unfreeze only weights that they froze.
    """
    one = None if branch.is_control else run.config.growth or run.config.experts
    others = () if one is None else (one.kind(**one.arguments),)
    methods = build_methods(run.config.forgetting)
    data, gathered = run.data, run.config.trainer.accumulate_grad_batches
    setting = Setting(
        start=start,
        task=branch.task,
        domains=data.new_domains_of(branch),
        base_sequences=lambda: data.training_sequences(data.old_domains),
        bounds=data.bounds,
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        tokens_per_step=data.batch_size * data.sequence_length * gathered,
        max_steps=max_steps,
        new_units=task.new_units if branch.specs else {},
        seed=lambda *labels: run.seed(*labels, *branch.purpose),
        log=run.say,
    )
    for method in (*others, *methods):
        method.attach(trainee, setting)
    return others, methods


def _announce(run: Run, branch: Branch, *, max_steps: int) -> None:
    names = [one.name for one in run.config.forgetting]
    if experts.method_of(run, branch) is not None:
        rate = experts.training_of(run, branch).learning_rate
        names.insert(0, f"frozen base (learning rate {rate:.2g})")
    mitigation = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "none"
    domains, tasks = ", ".join(run.data.new_domains_of(branch)), len(run.data.text.tasks)
    which = f" (task {branch.task + 1} of {tasks})" if tasks > 1 else ""
    text = f"{max_steps} steps on {domains}{which}; forgetting mitigation: {mitigation}"
    run.say("train", text)


def _freeze(
    model: nn.Module, methods: Sequence[ForgettingMethod], task: Task, *, max_steps: int
) -> None:
    """Freeze the weights that each method freezes."""
    for method in methods:
        method.freeze(model, task, max_steps=max_steps)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        names = " and ".join(method.name for method in methods)
        raise RequestError(
            f"forgetting = {names}: the whole model is frozen, so there is nothing to train; "
            "the expansion only copies layers and adds no new weights."
        )


def _fit(
    run: Run,
    branch: Branch,
    module: BaseModule,
    *,
    folder: Path,
    label: str,
    write_result: WriteResult | None,
    trainee: Trainee | None = None,
    task: Task | None = None,
    evaluation: ValidationSubset | None = None,
    loggers: Sequence[Logger] = (),
) -> FitResult:
    """Train a branch's module on the new domains."""
    max_steps, trainee = module.schedule.max_steps, trainee or Trainee(module.model)
    return fit(
        module,
        run.data.batches(
            run.data.new_domains_of(branch),
            purpose="-".join((label, *branch.purpose)),
            max_steps=max_steps,
        ),
        settings=run.config.trainer,
        folder=folder,
        label=label,
        console=run.console,
        task=task,
        loggers=loggers,
        observers=trainee.observers,
        controls=trainee.controls,
        surgery_callbacks=trainee.surgery_callbacks,
        user_callbacks=run.config.callbacks if label == "training" else (),
        write_result=write_result,
        evaluation=evaluation,
        publishes_best=label == "training" and run.config.pipeline.publish == "best",
    )


def _accept(run: Run, location: str, result: FitResult, *, folder: Path, label: str) -> StageResult:
    """Accept the result of a training stage that precedes the main training run."""
    accept(run, location)
    run.ledger.watch_disk()
    discard_saved(folder)
    return StageResult(TrainingFound.of(result), flops={label: result.flops}, leaves=(location,))


def evaluation(run: Run, branch: Branch) -> StageResult:
    """Score the trained model and generate samples from both models."""
    source = run.source(f"{branch.name}/trained")
    trained = run.data.masked(experts.load_start(run, branch, source))
    if not branch.is_final:
        round_weights(trained, run.published_dtype)
    subject = "control" if branch.is_control else "trained model"
    run.say("evaluate", f"{subject} on {', '.join(run.data.domains)}")
    run.score(trained, f"{branch.name}-trained")
    reading = experts.reading_flops(trained)
    samples, flops, files = [], run.data.scoring.flops(reading), list[str]()
    if run.data.short is not None:
        files, spent = windows.score_trained(run, branch, trained, reading)
        flops += spent
    is_last = branch.task == len(run.data.text.tasks) - 1
    if is_last and not branch.is_control and run.config.evaluation.sample_tokens != 0:
        start = "baseline" if branch.task else branch.start
        before = experts.load_start(run, branch, run.source(start))
        with run.progress_bars() as new_bar:
            samples = generate_samples(
                run.reading(start),
                before,
                run,
                trained,
                progress=new_bar("writing samples"),
            )
        flops += sum(sample.flops for sample in samples)
    read, used, lora_used = list[Tensor](), None, None
    if Routing.of(trained) is not None:
        of_routers = moe.usage_sequences(run)
        used = moe_usage(trained.to(run.device), of_routers)
        read += of_routers.values()
    if mixture_on(trained) is not None:
        of_experts = experts.usage_sequences(run)
        lora_used = expert_usage(trained.to(run.device), of_experts)
        read += of_experts.values()
    trained.to("cpu")
    flops += sum(reading.of_all(lengths_of(run.data.document_mask, each)) for each in read)
    return StageResult(
        EvaluationFound(
            samples=tuple(sample.texts for sample in samples), moe=used, experts=lora_used
        ),
        flops={branch.label("evaluate"): flops},
        leaves=(score_file(f"{branch.name}-trained"), *files),
    )


FORMAT_VERSION = 1
NAME = "baseline"
_EXPERT_FILES = ("experts/", "state/experts.")

logger = logging.getLogger(__name__)


def _score_baseline(run: Run, source: Source) -> None:
    """Score the run's initial model, or load its scores from the cache."""
    made_from = _made_from(run, source)
    location = run.config.cache_dir / "scores" / f"{content_key(made_from)}.json"
    target = run.folder / score_file(NAME)
    if (scores := _intact_scores(location)) is None:
        with entry_lock(location):
            if (scores := _intact_scores(location)) is None:  # a parallel job may have written it
                load = load_model if run.config.experts is None else load_whole
                run.score(load(source.folder, model=source.model), NAME)
                scores = json.loads(target.read_text(encoding="utf-8"))
                content = {
                    "format_version": FORMAT_VERSION,
                    "made_from": made_from,
                    "sha256": content_key(scores),
                    "scores": scores,
                }
                write_text_atomic(location, json.dumps(content))
                return
    write_text_atomic(target, json.dumps(scores))
    known = {name: PairedScores.from_dict(record) for name, record in scores.items()}
    run.say("", f"{scores_text(known)} (cached)")


def _made_from(run: Run, source: Source) -> dict[str, Any]:
    """Return everything that determines the scores bit by bit."""
    is_gpu, text = run.device.type == "cuda", {}
    for name in run.data.domains:  # the tokenised documents in their order
        validation = run.data.scored[name]
        parts = {
            "tokens": validation.tokens,
            "offsets": validation.offsets,
            "bytes": validation.num_bytes,
        }
        digests = {part: tensor_digest(part, tensor) for part, tensor in parts.items()}
        if validation.has_marks:  # of the layout of their windows
            digests["windows"] = "2"
        text[name] = content_key({**digests, "identifiers": list(validation.identifiers)})
    made_from = {
        "format": "scores",
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "model": source.own_lineage.model_hash,
        "config": dict(source.config),
        "text": text,
        "tasks": {task.name: task.digest for task in run.data.tasks},
        "end_of_text": run.data.bounds.end,
        **({"start_of_text": list(start)} if (start := run.data.bounds.start) else {}),
        "sequence_length": run.data.sequence_length,
        "batch_size": run.config.evaluation.batch_size,
        "device": torch.cuda.get_device_name(run.device) if is_gpu else "cpu",
        "threads": None if is_gpu else torch.get_num_threads(),
    }
    files = source.own_lineage.file_digests
    of_experts = {n: d for n, d in files.items() if n.startswith(_EXPERT_FILES)}
    if of_experts and run.config.experts is not None:
        made_from["experts"] = of_experts
    return made_from


def _intact_scores(location: Path) -> dict[str, Any] | None:
    """Return the cached scores; None if they are missing or damaged."""
    if not location.exists():
        return None
    try:
        content = read_object(location, limit_bytes=MAX_SCORE_BYTES)
    except TritterError as error:
        logger.warning("scoring again, because the cached file is damaged: %s: %s", location, error)
        return None
    scores = content.get("scores")
    if not isinstance(scores, dict) or content.get("sha256") != content_key(scores):
        logger.warning("scoring again, because the checksum of %s differs", location)
        return None
    return scores


def choice(run: Run, branch: Branch) -> StageResult:
    """Select the expert of each layer that the new domains' data affects most."""
    start = run.source(branch.start)
    sequences = moe.spaced_sequences(run, run.data.new_domains_of(branch), moe.UTILITY_SEQUENCES)
    with run.waiting("affected experts"):
        model = run.data.masked(load_model(start.folder, model=start.model)).to(run.device)
        chosen = best_experts(model, sequences)
    run.say("choose", f"experts to clone, layer by layer: {' '.join(map(str, chosen))}")
    flops = training_flops(start.model, is_trained=lambda tensor: tensor.is_per_expert)
    return StageResult(
        ChoiceFound(clone_from=tuple(chosen)),
        flops={"choose": flops.of_all(lengths_of(document_mask_of(model), sequences))},
    )


def distillation(run: Run, branch: Branch) -> StageResult:
    """Distill the new experts from the teacher on the new domains, before routers use them."""
    options, teacher = run.config.adaptation, moe.teacher_of(branch)
    start = run.source(moe.expanded_folder(branch))
    added = moe.pending_experts(run, branch)
    assert teacher is not None and added is not None
    model = run.data.masked(load_model(start.folder, model=start.model))
    folder, steps = run.folder / branch.name / "distill", options.distill_steps
    location, stage = f"{branch.name}/distilled", "distillation of new experts"
    write = child_writer(run, branch, start, location, stage=stage, added=added)
    run.say("distill", f"{steps} steps of the new experts; teacher: {teacher}")
    with only_new_experts(model, added.experts):
        module = DistillationModule(
            model,
            run.data.masked(load_model(locate(teacher, key="expansion.moe_add.teacher"))),
            new_experts=added.experts,
            temperature=options.distill_temperature,
            auxiliary_loss=run.config.moe_routing.auxiliary_loss,
            schedule=Schedule.constant(run.config.training.learning_rate, max_steps=steps),
            optimizer=run.config.optimizer,
        )
        result = _fit(run, branch, module, folder=folder, label="distill", write_result=write)
    return _accept(run, location, result, folder=folder, label=branch.label("distill"))
