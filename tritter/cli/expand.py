"""`tritter expand`: read the request, expand the checkpoint and print the result."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritter.cli.methods import ExpansionMethods
from tritter.cli.options import (
    WRITING,
    AsJson,
    Checkpoint,
    DType,
    MaxShardSize,
    Overwrite,
    Seed,
    choice,
    flag,
    is_typed,
    option,
    parameter_count,
    parse_path,
    with_dashes,
)
from tritter.cli.output import (
    EXIT_NO,
    SHAPES,
    CommandConsole,
    display_path,
    note_if_written,
    print_json,
    progress_bars,
    refuse_damage,
    shapes_of,
    short,
)
from tritter.errors import (
    Names,
    Problem,
    RequestError,
    TritterError,
    raise_problems,
    show,
)
from tritter.limits import MAX_COUNT
from tritter.loading import loading
from tritter.report.table import Table, count_text, number_text, ratio_text
from tritter.storage.hub import locate
from tritter.storage.reading import named_path
from tritter.storage.tensors import WEIGHT_DTYPES
from tritter.terminal import Console, say, status

if TYPE_CHECKING:
    import torch

    from tritter.checkpoints import Lineage, Source
    from tritter.cli.recipe import Recipe, Settings
    from tritter.core.expansions import ExpansionSpec
    from tritter.data.options import TextSources
    from tritter.evaluation.measure import Measurement
    from tritter.pipeline.domain import DomainExpansion
    from tritter.transform import DiskNeeds, Expanded, PlannedExpansion

# Field, its function-preserving value, and the option that sets it.
_EXACT_CHOICES: tuple[tuple[str, Any, str], ...] = (
    ("noise", 0.0, "--noise 0"),
    ("identity_init", True, "--identity-init"),
    ("identity", True, "--identity true"),
    ("reinit_fraction", 0.0, "--reinit-fraction 0"),
    ("norm_topk_prob", True, "--norm-topk-prob"),
    ("init", "fresh", "--width-init fresh"),
    ("head_strategy", "copy", "--head-strategy copy"),
)
# Keys of the expansion, and of the run that trains experts on a domain
_NAMES = {
    "data.new": "--domain-data",
    "data.old": "--old-data",
    "model.path": "--checkpoint",
    "training.max_steps": "--steps",
    "training.learning_rate": "--learning-rate",
    "trainer.check_memory": None,
    "target_params": "--target-params",
    "dtype": "--dtype",
}
_NO_METHOD = "--method is missing: name a method (--method width) or steps (--recipe grow.yaml)."

_Method = Annotated[
    list[str] | None,
    option(
        "--method",
        "METHOD,..",
        "dus, stack, interpolate, llama-pro, layers, width, moe, moe-add, vocab or context; "
        "several are separated by commas and applied in order.",
        completes=lambda: map(with_dashes, ExpansionMethods.current().bodies),
    ),
]
_RecipeFile = Annotated[
    Path | None,
    option(
        "--recipe",
        "FILE",
        "YAML file with a list of steps and their options, instead of --method.",
        parser=parse_path,
    ),
]
_Output = Annotated[
    Path | None, option("--output", "DST", "New folder. Default: SRC-METHOD.", parser=parse_path)
]
_ConfigDir = Annotated[
    list[str] | None, option("--config-dir -cd", "DIR", "Folder of your own option files.")
]
_TargetParams = Annotated[
    int | None,
    option(
        "--target-params",
        "COUNT",
        "Number of parameters, such as 7B or 350M; selects the nearest valid shape.",
        parser=parameter_count,
    ),
]
_Measure = Annotated[
    bool | None,
    flag(
        "--measure/--no-measure",
        "Compare source and result in stock models; record the step-0 error. Default: --measure.",
        panel=WRITING,
    ),
]
_DryRun = Annotated[bool, flag("--dry-run", "Print the result without writing it.", panel=WRITING)]

_SHARD_BYTES = 5 * 10**9  # default of --max-shard-size
_DEFAULT_STEPS = 200
_DEFAULT_LEARNING_RATE = 1e-4
_DEFAULT_DOMAIN = "new"
_DOMAIN = "Data of a new domain (moe-add, vocab)"

_Domain = Annotated[
    str | None,
    option(
        "--domain",
        "NAME",
        "moe-add: name of the domain of --domain-data. Default: new.",
        panel=_DOMAIN,
    ),
]
_DomainData = Annotated[
    list[str] | None,
    option(
        "--domain-data",
        "PATH",
        "Data for new experts (moe-add) or tokens (vocab): file, folder or glob. Repeatable.",
        panel=_DOMAIN,
    ),
]
_OldData = Annotated[
    list[str] | None,
    option(
        "--old-data",
        "PATH",
        "With --domain-data: old data, mixed in at 40 % to avoid forgetting.",
        panel=_DOMAIN,
    ),
]
_DomainSteps = Annotated[
    int | None,
    option(
        "--steps",
        "N",
        "With --domain-data: training steps of the new experts. Default: 200.",
        least=1,
        most=MAX_COUNT,
        panel=_DOMAIN,
    ),
]
_LearningRate = Annotated[
    float | None,
    option(
        "--learning-rate",
        "X",
        "With --domain-data: peak learning rate of the new experts. Default: 1e-4.",
        panel=_DOMAIN,
    ),
]


def expand(
    context: typer.Context,
    checkpoint: Checkpoint,
    method: _Method = None,
    recipe: _RecipeFile = None,
    output: _Output = None,
    config_dir: _ConfigDir = None,
    target_params: _TargetParams = None,
    domain: _Domain = None,
    domain_data: _DomainData = None,
    old_data: _OldData = None,
    steps: _DomainSteps = None,
    learning_rate: _LearningRate = None,
    seed: Seed = 0,
    dtype: DType = None,
    max_shard_size: MaxShardSize = _SHARD_BYTES,
    measure: _Measure = None,
    dry_run: _DryRun = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> int:
    """Make a checkpoint deeper, wider or sparse, and write a new checkpoint.

    tritter expand base --method width --hidden-size 512
    """
    with loading("torch"):
        from tritter.cli.recipe import Recipe

    file = None if recipe is None else Recipe.read(recipe)
    settings = _settings(context, file)
    with _names(file).in_use():
        if file is not None:
            specs = file.steps
        elif method:
            specs = ExpansionMethods.current().specs(method, context.obj)
        else:
            raise RequestError(_NO_METHOD)
        of_domain = (domain, domain_data, old_data, steps, learning_rate)
        is_vocab = any(spec.name == "vocab" for spec in specs)
        is_trained = not is_vocab and any(value is not None for value in of_domain)
        # Data before the checkpoint, which may be on the hub
        for_tokens = _token_sources(specs, *of_domain) if is_vocab else {}
        text = _domain_text(specs, *of_domain) if is_trained else None
        _check_domain(specs, settings, text, is_measured=measure)
        job = _resolve_job(checkpoint, specs, settings, file)
        if for_tokens:
            job = _with_tokens(job, for_tokens)
        if not dry_run and job.obstacle(overwrite=overwrite):
            raise RequestError(job.obstacle(overwrite=overwrite))
        with closing(job.source.digests) as digests:
            if not (dry_run or is_trained):
                digests.begin(job.source.tensors.raw(), files=job.source.tensors.paths)
            with loading("torch"):
                import tritter.transform  # noqa: F401 # while digests are computed
            with note_if_written(job.destination):
                if dry_run:
                    result = _dry_run(job, measures=measure is not False, overwrite=overwrite)
                elif text is not None:
                    result = _expand_and_train(job, text, overwrite=overwrite, is_quiet=as_json)
                else:
                    result = _expand(
                        job, measures=measure is not False, overwrite=overwrite, is_quiet=as_json
                    )
                if as_json:
                    print_json(result.to_dict())
                else:
                    result.print()
    if result.measured is None or not result.measured.fault:
        return 0
    say(f"error: {result.measured.fault}. The result stays.", is_error=True)
    return EXIT_NO


def _names(file: Recipe | None, step: int | None = None) -> Names:
    """Return the names of keys in errors: options, or the keys and steps of a recipe."""
    if file is not None:
        return file.names(step)
    return Names.of({**ExpansionMethods.current().option_names(), **_NAMES})


def _settings(context: typer.Context, file: Recipe | None) -> Settings:
    """Return all other settings, from the command line or from the recipe."""
    from tritter.cli.recipe import Settings

    typed, stated = context.params, {} if file is None else file.stated_settings()
    if "output" in stated:
        stated["output"] = named_path(stated["output"], key="output")
    if file is not None:
        methods = {"method": ",".join(typed["method"] or ()), **context.obj}
        problems = [
            Problem(f"--{with_dashes(name)}", value, f"--recipe {file.path} already sets the steps")
            for name, value in methods.items()
            if value
        ]
        problems += [
            Problem(
                f"--{with_dashes(name)}",
                typed[name],
                f"{file.path} sets {name} = {show(value)}; remove one of the two",
            )
            for name, value in stated.items()
            if is_typed(context, name) and typed[name] != value
        ]
        raise_problems(problems)
    values = {each.name: typed[each.name] for each in fields(Settings)} | stated
    if values["dtype"] is not None:
        values["dtype"] = choice("--dtype", values["dtype"], WEIGHT_DTYPES)
    return Settings(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """An expansion that is valid according to the configs; without a recipe, options set it."""

    source: Source
    destination: Path
    specs: tuple[ExpansionSpec, ...]
    settings: Settings
    recipe: Recipe | None

    def obstacle(self, *, overwrite: bool) -> str:
        """Return the reason why the result can't be written; empty if it can."""
        from tritter.checkpoints.location import check_output

        try:
            check_output(self.destination, sources=[self.source.folder], overwrite=overwrite)
        except RequestError as error:
            return str(error)
        return ""

    @property
    def dtype(self) -> torch.dtype | None:
        import torch

        return None if self.settings.dtype is None else getattr(torch, self.settings.dtype)


def _resolve_job(
    checkpoint: str, specs: tuple[ExpansionSpec, ...], settings: Settings, recipe: Recipe | None
) -> _Job:
    """Locate source and destination and resolve the sizes of expansions. Writes nothing."""
    from tritter.checkpoints import Source
    from tritter.checkpoints.location import require_plain
    from tritter.core.expansions.specification import target_model
    from tritter.core.expansions.targets import reach_parameters
    from tritter.core.families.config_file import read_model_file

    with refuse_damage():
        folder = locate(checkpoint, key="--checkpoint")
        try:
            model = read_model_file(folder)
        except RequestError:
            raise
        except TritterError:  # it lacks keys that the family's table needs
            from tritter.core.models import read_model

            model = read_model(folder)
        source = Source.open(folder, model)
        require_plain(folder, doing="an expansion", key="--checkpoint")
    if settings.target_params is not None:
        specs = reach_parameters(source.model, specs, settings.target_params)
    target = source.model
    for number, spec in enumerate(specs):
        with _names(recipe, number).in_use():
            target = target_model(target, [spec])
    near = Path(checkpoint.rstrip("/").rpartition("/")[2])  # a hub model: the current folder
    if Path(checkpoint).is_dir():
        near = folder if folder.name not in ("", "..") else folder.resolve()
    ending = "-".join(with_dashes(spec.name) for spec in specs)
    return _Job(
        source=source,
        destination=Path(settings.output or near.with_name(f"{near.name}-{ending}")),
        specs=specs,
        settings=settings,
        recipe=recipe,
    )


def _with_tokens(job: _Job, sources: TextSources) -> _Job:
    """Return the job with new tokens, from documents that no lineage holds out for validation."""
    from tritter.checkpoints.run_text import RunText
    from tritter.core.expansions import Vocab, vocab_place
    from tritter.data.sources import TextRequest
    from tritter.data.split import SplitRule
    from tritter.transform.vocabulary import learned

    specs, place = list(job.specs), vocab_place(job.specs) or 0
    spec = specs[place]
    assert isinstance(spec, Vocab)
    default = SplitRule(seed=job.settings.seed or 0, validation_fraction=RunText.DEFAULT_FRACTION)
    rule = (job.source.lineage and job.source.lineage.split) or default
    with status("learning tokens"):
        size = rule.piece_characters
        read = {
            name: TextRequest(each, key="--domain-data", piece_characters=size).noted_documents()
            for name, each in sources.items()
        }
        specs[place] = learned(spec, job.source, rule.training_texts(read, read))
    return replace(job, specs=tuple(specs))


# Data for new experts and new tokens


@dataclass(frozen=True, slots=True)
class _DomainRun:
    """New and old data (domain → absolute paths) and settings of the training run."""

    new: TextSources
    old: TextSources
    steps: int
    learning_rate: float


def _domain_text(
    specs: Sequence[ExpansionSpec],
    domain: str | None,
    data: Sequence[str] | None,
    old_data: Sequence[str] | None,
    steps: int | None,
    learning_rate: float | None,
) -> _DomainRun:
    """Return the data that the options name."""
    from tritter.data.options import read_sources

    if not any(getattr(spec, "is_append", False) for spec in specs):
        methods = ",".join(with_dashes(spec.name) for spec in specs)
        raise RequestError(
            "--domain, --domain-data, --old-data, --steps, --learning-rate: --method "
            f"{methods} appends no experts to train; moe-add does, with --addition append."
        )
    if not data:
        raise RequestError("--domain-data is missing: the training data of the new experts.")
    name = domain or _DEFAULT_DOMAIN
    problems: list[Problem] = []
    new = read_sources("--domain-data", list(data), default_name=name, problems=problems)
    old = read_sources(
        "--old-data", list(old_data or ()) or None, default_name="old", problems=problems
    )
    raise_problems(problems)
    if name in old:
        raise RequestError(f"--domain = {name}: the old data already has this name.")
    rate = _DEFAULT_LEARNING_RATE if learning_rate is None else learning_rate
    return _DomainRun(new, old, steps or _DEFAULT_STEPS, rate)


def _check_domain(
    specs: Sequence[ExpansionSpec],
    settings: Settings,
    text: _DomainRun | None,
    *,
    is_measured: bool | None,
) -> None:
    """Check a request to train experts on a domain. Writes nothing."""
    from tritter.data.sources import TextRequest, check_contents

    if text is None:
        if any(getattr(spec, "teacher", None) for spec in specs):
            raise RequestError(
                "--expert-init = distill: new experts learn from a teacher and need training "
                "data, --domain-data PATH."
            )
        return
    unsupported = (
        ("dtype", settings.dtype, None),
        ("measure", is_measured, None),
        ("max-shard-size", settings.max_shard_size, _SHARD_BYTES),
    )
    for name, value, default in unsupported:
        if value not in (None, default):
            raise RequestError(
                f"--{name} = {value}: not allowed with --domain-data, which trains and writes the "
                "model in float32; `tritter export` converts it."
            )
    check_contents(
        TextRequest(tuple(paths), key=key)
        for key, sources in (("--domain-data", text.new), ("--old-data", text.old))
        for paths in sources.values()
    )


def _token_sources(
    specs: Sequence[ExpansionSpec], domain: str | None, data: Sequence[str] | None, *others: Any
) -> TextSources:
    """Return domain → paths of the data for new tokens; empty if the tokens are given."""
    from tritter.core.expansions import Vocab
    from tritter.data.options import read_sources

    spec = next(each for each in specs if isinstance(each, Vocab))
    if domain or any(others):
        raise RequestError("--domain, --old-data, --steps, --learning-rate: vocab trains nothing.")
    if data and any(getattr(each, "is_append", False) for each in specs):
        raise RequestError("--domain-data: for vocab or for moe-add; use two commands.")
    if data and not spec.is_learned:
        raise RequestError("--domain-data is not needed: the new tokens are given.")
    if not data and spec.is_learned:
        raise RequestError("--domain-data is missing; or set --tokens, or --tokenizer.")
    problems: list[Problem] = []
    sources = read_sources("--domain-data", data or None, default_name="new", problems=problems)
    raise_problems(problems)
    return sources


# Results


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """The result of a job or of its dry run.

    Args:
        job: the job.
        plan: the planned expansion.
        lineage: lineage of the written checkpoint; None after a dry run.
        measured: step-0 error, if measured.
        room: disk and memory requirements, from a dry run.
        training: result of training experts on a domain.
        obstacles: from a dry run, the reasons why the job would be rejected.
    """

    job: _Job
    plan: PlannedExpansion
    lineage: Lineage | None = None
    measured: Measurement | None = None
    room: DiskNeeds | None = None
    training: DomainExpansion | None = None
    obstacles: tuple[str, ...] = ()

    @property
    def serving_notes(self) -> tuple[str, ...]:
        """What quantisers and engines take of the source, but not of the result."""
        from tritter.planning.serving import serving_notes

        return serving_notes(self.plan.target, self.plan.source)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON output."""
        plan, lineage, destination = self.plan, self.lineage, self.job.destination
        first, last = plan.source, plan.target
        plain = {
            "source": str(self.job.source.folder),
            "destination": str(destination),
            "written": lineage is not None,
            "shapes": {"before": shapes_of(first), "after": shapes_of(last)},
            "parameters": {"before": first.num_parameters, "after": last.num_parameters},
            "parameters_on_disk": {
                "before": first.on_disk.num_parameters,
                "after": last.on_disk.num_parameters,
            },
            "dtype": self.job.settings.dtype,
            "seed": self.job.settings.seed,
            "steps": [
                {
                    "method": step.spec.name,
                    "expansion_type": step.spec.expansion_type,
                    "options": step.options,
                    "layer_sources": list(step.parameter_map.layer_sources),
                    "is_exact": step.is_exact,
                    "notes": list(step.notes),
                    "map_digest": step.parameter_map.digest(),
                }
                for step in plan.steps
            ],
            "model_hash": lineage.model_hash if lineage else None,
            "parent_hash": lineage.parent_hash if lineage else None,
            "step0_error": self.measured.error if self.measured else None,
            "serving_notes": list(self.serving_notes),
            "left_out": self.job.source.unread,
        }
        if self.training is not None:
            plain |= {"experts": self.training.experts.plain(), "scores": self.training.scores}
        if self.room is not None:
            from tritter.transform import free_bytes

            disk = {
                "needed_bytes": self.room.disk,
                "weights_bytes": self.room.weights,
                "state_bytes": self.room.state,
                "free_bytes": free_bytes(destination),
            }
            plain |= {"disk": disk, "memory_bytes": self.room.memory}
        return plain

    def print(self) -> None:
        """Print a readable summary."""
        from tritter.checkpoints.record import layers_text

        console, settings, destination = CommandConsole(), self.job.settings, self.job.destination
        _print_shapes(console, self.plan)
        lines: list[tuple[str, str]] = []
        for step in self.plan.steps:
            texts = list(step.notes)
            if step.spec.expansion_type == "depth":
                texts.append(f"layers from {layers_text(step.parameter_map.layer_sources)}")
            texts.append(f"map {short(step.parameter_map.digest())}")
            labels = [with_dashes(step.spec.name), *[""] * (len(texts) - 1)]
            lines += zip(labels, texts, strict=True)
        exactness = _exactness(self)
        if self.training is not None:
            exactness += " at step 0, before training the new experts"
        lines.append(("exact", exactness))
        if self.lineage is not None:
            lines.append(("step 0", self.measured.text if self.measured else "not measured"))
        if settings.dtype is not None:
            lines.append(("dtype", with_dashes(settings.dtype)))
        if self.lineage is not None:
            lines.append(("hash", short(self.lineage.model_hash)))
        lines += [("serving", note) for note in self.serving_notes]
        if unread := self.job.source.unread:
            text = f"{len(unread)} tensors that the model class does not read, such as {unread[0]}"
            lines.append(("left out", text))
        if self.room is not None:
            lines += _disk_lines(self.room, destination)
        console.print()
        console.print_lines(lines)
        console.print()
        quoted = shlex.quote(display_path(destination))
        if self.lineage is not None:
            console.print_command("written", display_path(destination))
            console.print_command("next   ", f"tritter inspect {quoted}")
        else:
            console.print_command("dry run", f"nothing was written; the output is {quoted}")
        for obstacle in self.obstacles:
            console.print_command("refused", obstacle)
        if self.training is not None:
            _print_domain(console, self.training)


def _dry_run(job: _Job, *, measures: bool, overwrite: bool) -> _Result:
    """Return the result of a dry run. Writes nothing."""
    from tritter.transform import DiskNeeds, plan_by_tables

    plan = plan_by_tables(job.source, job.specs, seed=job.settings.seed or 0)
    room = DiskNeeds.of(job.source, plan, dtype=job.dtype, is_checked=measures)
    obstacles = [job.obstacle(overwrite=overwrite)]
    try:
        room.check_space(job.destination)
    except RequestError as error:
        obstacles.append(str(error))
    return _Result(job=job, plan=plan, room=room, obstacles=tuple(filter(None, obstacles)))


def _expand(job: _Job, *, measures: bool, overwrite: bool, is_quiet: bool) -> _Result:
    """Expand the checkpoint and measure the result before it replaces the destination."""
    from tritter.transform import expand, plan_by_tables

    settings = job.settings
    measured: list[Measurement] = []
    plan = plan_by_tables(job.source, job.specs, seed=settings.seed or 0)
    with progress_bars(is_shown=not is_quiet) as new_bar:

        def measure_result(made: Expanded) -> Lineage:
            from tritter.evaluation.measure import Measurement
            from tritter.report.table import mean_shift_text

            with refuse_damage():
                found = Measurement.of(job.source, made, progress=new_bar("MB checked"))
            assert found.jump is not None
            text = found.text + mean_shift_text(found.jump)
            if (mass := found.jump.new_token_mass) is not None:
                text += f"; new tokens get {mass:.1%} of the probability"
            measured.append(replace(found, text=text))
            return found.lineage

        made = expand(
            job.source,
            job.destination,
            plan,
            dtype=job.dtype,
            max_shard_bytes=settings.max_shard_size or _SHARD_BYTES,
            overwrite=overwrite,
            progress=new_bar("tensors"),
            before_publish=measure_result if measures else None,
            confirms=measures,
        )
    return _Result(job=job, plan=plan, lineage=made.lineage, measured=next(iter(measured), None))


def _expand_and_train(job: _Job, text: _DomainRun, *, overwrite: bool, is_quiet: bool) -> _Result:
    """Add the experts and train them. After an error no output remains."""
    from tritter.evaluation.measure import Measurement
    from tritter.pipeline.domain import DomainTask

    task = DomainTask(
        new=text.new,
        old=text.old,
        steps=text.steps,
        learning_rate=text.learning_rate,
        seed=job.settings.seed or 0,
    )
    made = task.expand(
        job.source.folder,
        job.destination,
        job.specs,
        console=Console(quiet=True) if is_quiet else CommandConsole(),
        overwrite=overwrite,
    )
    error = made.lineage.expansion_history[-1].step0_error
    text_of_error = "not finite" if error is None else f"logit shift {error:.1e} σ on its data"
    measured = Measurement(made.lineage, error, text_of_error)
    return _Result(job=job, plan=made.plan, lineage=made.lineage, measured=measured, training=made)


def _disk_lines(room: DiskNeeds, destination: Path) -> list[tuple[str, str]]:
    """Return disk and memory requirements as lines."""
    from tritter.transform import free_bytes, size_text

    free = free_bytes(destination)
    rest = "free space unknown" if free is None else f"{size_text(free)} free"
    parts = [f"weights {size_text(room.weights)}"]
    parts += [f"state {size_text(room.state)}"] * bool(room.state)
    disk = f"{size_text(room.disk)} ({', '.join(parts)}), written once; {rest}"
    memory = f"at most {size_text(room.memory)}, including {size_text(room.process)} for Python"
    memory += f" and {size_text(room.check)} for the step-0 check" * (room.check > room.in_flight)
    return [("disk", disk), ("memory", memory)]


def _print_domain(console: CommandConsole, made: DomainExpansion) -> None:
    """Print the loss of each domain and the routing of its tokens."""
    from tritter.report.tables import moe_table

    before, after = made.scores["before"], made.scores["after"]
    rows = tuple(
        (domain, *(f"{scores[domain]['loss']:.3f}" for scores in (before, after)))
        for domain in before
    )
    console.print()
    console.print_table(Table(("loss", "before", "after"), rows, numbers=(1, 2)))
    console.print()
    console.print(moe_table(made.experts).to_rich(console))


def _print_shapes(console: CommandConsole, plan: PlannedExpansion) -> None:
    before = shapes_of(plan.source)
    after = shapes_of(plan.target)
    rows, styles = list[tuple[str, ...]](), list[str]()
    for name in (name for name in SHAPES if name in after):
        old, new = before.get(name), after[name]
        grown = ratio_text(new / old) if old is not None and old != new else ""
        rows.append((SHAPES[name], number_text(old), str(new), grown))
        styles.append("dim" if old == new else "bold")
    sizes = (plan.source.num_parameters, plan.target.num_parameters)
    rows.append(("parameters", *map(count_text, sizes), ratio_text(sizes[1] / sizes[0])))
    header, rules = ("", "before", "after", ""), (len(rows) - 1,)
    table = Table(header, tuple(rows), numbers=(1, 2), rules=rules, styles=(*styles, "bold"))
    console.print_table(table)


def _exactness(result: _Result) -> str:
    """Return a sentence on function preservation, with the option that would ensure it."""
    lossy: list[str] = []
    is_recipe = result.job.recipe is not None
    for step in (step for step in result.plan.steps if not step.is_exact):
        spec: Any = step.spec
        ways = (
            f" (exact with {f'{key}: {show(value)}' if is_recipe else words})"
            for key, value, words in _EXACT_CHOICES
            if hasattr(spec, key) and replace(step, spec=replace(spec, **{key: value})).is_exact
        )
        lossy.append(with_dashes(spec.name) + next(ways, ""))
    if not lossy:
        return "yes: function-preserving" + (" for old tokens" if result.plan.vocabulary else "")
    return f"no: {', '.join(lossy)}. Expect a higher loss until you continue training."
