"""`tritter expand`: read the request, expand the checkpoint and print the result."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
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
    from tritter.checkpoints import Lineage, Source
    from tritter.cli.recipe import Recipe
    from tritter.core.expansions import ExpansionSpec
    from tritter.data.options import TextSources
    from tritter.evaluation.measure import Measurement
    from tritter.pipeline.domain import DomainExpansion, DomainTask
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
    with _names(file).in_use():
        request = _request(context, file)
        of_domain = (domain, domain_data, old_data, steps, learning_rate)
        is_vocab = any(spec.name == "vocab" for spec in request.steps)
        is_trained = not is_vocab and any(value is not None for value in of_domain)
        # Data before the checkpoint, which may be on the hub
        for_tokens = _token_sources(request.steps, *of_domain) if is_vocab else {}
        for_experts = _expert_sources(request.steps, *of_domain[:3]) if is_trained else None
        _check_domain(request, for_experts, is_measured=measure)
        source = _open_source(checkpoint)
        request = _sized(request, file, source)
        destination = _destination(request, source, checkpoint)
        if for_tokens:
            request = _with_tokens(request, source, for_tokens)
        job = _Job(request, source, destination)
        obstacle = job.obstacle(overwrite=overwrite)
        if obstacle and not dry_run:
            raise RequestError(obstacle)
        with closing(source.digests) as digests:
            if not (dry_run or is_trained):
                digests.begin(source.tensors.raw(), files=source.tensors.paths)
            with loading("torch"):
                import tritter.transform  # noqa: F401 # while digests are computed
            with note_if_written(destination):
                measures = measure is not False
                if dry_run:
                    result = _dry_run(job, obstacle, measures=measures)
                elif for_experts is not None:
                    from tritter.pipeline.domain import DomainTask

                    (new, old), count = for_experts, steps or _DEFAULT_STEPS
                    rate = _DEFAULT_LEARNING_RATE if learning_rate is None else learning_rate
                    task = DomainTask(
                        new=new, old=old, steps=count, learning_rate=rate, seed=request.seed or 0
                    )
                    result = _expand_and_train(job, task, overwrite=overwrite, is_quiet=as_json)
                else:
                    result = _expand(job, measures=measures, overwrite=overwrite, is_quiet=as_json)
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


def _request(context: typer.Context, file: Recipe | None) -> Recipe:
    """Return the request: the recipe with options, or options alone."""
    from tritter.cli.recipe import Recipe

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
    values = {name: typed[name] for name in Recipe.SETTINGS} | stated
    if values["dtype"] is not None:
        values["dtype"] = choice("--dtype", values["dtype"], WEIGHT_DTYPES)
    if file is not None:
        return replace(file, **values)
    if not typed["method"]:
        raise RequestError(_NO_METHOD)
    specs = ExpansionMethods.current().specs(typed["method"], context.obj)
    return Recipe(steps=specs, **values)


@dataclass(frozen=True, slots=True)
class _Job:
    """A request with the checkpoint that it expands and the folder of the result."""

    request: Recipe
    source: Source
    destination: Path

    def obstacle(self, *, overwrite: bool) -> str:
        """Return the reason why the result can't be written; empty if it can."""
        from tritter.checkpoints.location import check_output

        try:
            check_output(self.destination, sources=[self.source.folder], overwrite=overwrite)
        except RequestError as error:
            return str(error)
        return ""


def _open_source(checkpoint: str) -> Source:
    """Return the checkpoint to expand."""
    from tritter.checkpoints import Source
    from tritter.checkpoints.location import require_plain
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
    return source


def _sized(request: Recipe, file: Recipe | None, source: Source) -> Recipe:
    """Return the request with sizes that reach its number of parameters, and check its steps."""
    from tritter.core.expansions.specification import target_model
    from tritter.core.expansions.targets import reach_parameters

    if request.target_params is not None:
        steps = reach_parameters(source.model, request.steps, request.target_params)
        request = replace(request, steps=steps)
    target = source.model
    for number, spec in enumerate(request.steps):
        with _names(file, number).in_use():
            target = target_model(target, [spec])
    return request


def _destination(request: Recipe, source: Source, checkpoint: str) -> Path:
    """Return the folder of the result, by default next to the source."""
    near = Path(checkpoint.rstrip("/").rpartition("/")[2])  # a hub model: the current folder
    if Path(checkpoint).is_dir():
        folder = source.folder
        near = folder if folder.name not in ("", "..") else folder.resolve()
    ending = "-".join(with_dashes(spec.name) for spec in request.steps)
    return Path(request.output or near.with_name(f"{near.name}-{ending}"))


def _with_tokens(request: Recipe, source: Source, texts: TextSources) -> Recipe:
    """Return the request with new tokens, from documents that no lineage holds out."""
    from tritter.checkpoints.run_text import RunText
    from tritter.core.expansions import Vocab, vocab_place
    from tritter.data.sources import TextRequest
    from tritter.data.split import SplitRule
    from tritter.transform.vocabulary import learned

    steps, place = list(request.steps), vocab_place(request.steps) or 0
    spec = steps[place]
    assert isinstance(spec, Vocab)
    default = SplitRule(seed=request.seed or 0, validation_fraction=RunText.DEFAULT_FRACTION)
    rule = (source.lineage and source.lineage.split) or default
    with status("learning tokens"):
        size = rule.piece_characters
        read = {
            name: TextRequest(each, key="--domain-data", piece_characters=size).noted_documents()
            for name, each in texts.items()
        }
        steps[place] = learned(spec, source, rule.training_texts(read, read))
    return replace(request, steps=tuple(steps))


# Data for new experts and new tokens


def _expert_sources(
    specs: Sequence[ExpansionSpec],
    domain: str | None,
    data: Sequence[str] | None,
    old_data: Sequence[str] | None,
) -> tuple[TextSources, TextSources]:
    """Return domain → paths of new and of old data for new experts."""
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
    return new, old


def _check_domain(
    request: Recipe,
    texts: tuple[TextSources, TextSources] | None,
    *,
    is_measured: bool | None,
) -> None:
    """Check a request to train experts on new and old data. Writes nothing."""
    from tritter.data.sources import TextRequest, check_contents

    if texts is None:
        if any(getattr(spec, "teacher", None) for spec in request.steps):
            raise RequestError(
                "--expert-init = distill: new experts learn from a teacher and need training "
                "data, --domain-data PATH."
            )
        return
    unsupported = (
        ("dtype", request.dtype, None),
        ("measure", is_measured, None),
        ("max-shard-size", request.max_shard_size, _SHARD_BYTES),
    )
    for name, value, default in unsupported:
        if value not in (None, default):
            raise RequestError(
                f"--{name} = {value}: not allowed with --domain-data, which trains and writes the "
                "model in float32; `tritter export` converts it."
            )
    check_contents(
        TextRequest(tuple(paths), key=key)
        for key, sources in zip(("--domain-data", "--old-data"), texts, strict=True)
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


@dataclass(frozen=True, slots=True)
class _Result:
    """The result of an expansion or of its dry run.

    Args:
        job: the request, its checkpoint and the folder of the result.
        plan: the planned expansion.
        lineage: lineage of the written checkpoint; None after a dry run.
        measured: step-0 error, if measured.
        room: disk and memory requirements, from a dry run.
        training: result of training experts on a domain.
        obstacles: from a dry run, the reasons why the request would be rejected.
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
        plan, lineage = self.plan, self.lineage
        first, last = plan.source, plan.target
        plain = {
            "source": str(self.job.source.folder),
            "destination": str(self.job.destination),
            "written": lineage is not None,
            "shapes": {"before": shapes_of(first), "after": shapes_of(last)},
            "parameters": {"before": first.num_parameters, "after": last.num_parameters},
            "parameters_on_disk": {
                "before": first.on_disk.num_parameters,
                "after": last.on_disk.num_parameters,
            },
            "dtype": self.job.request.dtype,
            "seed": self.job.request.seed,
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
            "step0_error": lineage.expansion_history[-1].step0_error if lineage else None,
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
                "free_bytes": free_bytes(self.job.destination),
            }
            plain |= {"disk": disk, "memory_bytes": self.room.memory}
        return plain

    def print(self) -> None:
        """Print a readable summary."""
        from tritter.checkpoints.record import layers_text

        console, dtype, destination = CommandConsole(), self.job.request.dtype, self.job.destination
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
        if dtype is not None:
            lines.append(("dtype", with_dashes(dtype)))
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


def _dry_run(job: _Job, obstacle: str, *, measures: bool) -> _Result:
    """Return the result of a dry run. Writes nothing."""
    from tritter.transform import DiskNeeds, plan_by_tables

    request, source = job.request, job.source
    plan = plan_by_tables(source, request.steps, seed=request.seed or 0)
    room = DiskNeeds.of(source, plan, dtype=request.torch_dtype, is_checked=measures)
    obstacles = [obstacle]
    try:
        room.check_space(job.destination)
    except RequestError as error:
        obstacles.append(str(error))
    found = tuple(filter(None, obstacles))
    return _Result(job, plan, room=room, obstacles=found)


def _expand(job: _Job, *, measures: bool, overwrite: bool, is_quiet: bool) -> _Result:
    """Expand the checkpoint and measure the result before it replaces the destination."""
    from tritter.transform import expand, plan_by_tables

    measured: list[Measurement] = []
    request, source = job.request, job.source
    plan = plan_by_tables(source, request.steps, seed=request.seed or 0)
    with progress_bars(is_shown=not is_quiet) as new_bar:

        def measure_result(made: Expanded) -> Lineage:
            from tritter.evaluation.measure import Measurement
            from tritter.report.table import mean_shift_text

            with refuse_damage():
                found = Measurement.of(source, made, progress=new_bar("MB checked"))
            assert found.jump is not None
            text = found.text + mean_shift_text(found.jump)
            if (mass := found.jump.new_token_mass) is not None:
                text += f"; new tokens get {mass:.1%} of the probability"
            measured.append(replace(found, text=text))
            return found.lineage

        made = expand(
            source,
            job.destination,
            plan,
            dtype=request.torch_dtype,
            max_shard_bytes=request.max_shard_size or _SHARD_BYTES,
            overwrite=overwrite,
            progress=new_bar("tensors"),
            before_publish=measure_result if measures else None,
            confirms=measures,
        )
    found = next(iter(measured), None)
    return _Result(job, plan, lineage=made.lineage, measured=found)


def _expand_and_train(job: _Job, task: DomainTask, *, overwrite: bool, is_quiet: bool) -> _Result:
    """Add the experts and train them. After an error no output remains."""
    from tritter.evaluation.measure import Measurement

    made = task.expand(
        job.source.folder,
        job.destination,
        job.request.steps,
        console=Console(quiet=True) if is_quiet else CommandConsole(),
        overwrite=overwrite,
    )
    error = made.lineage.expansion_history[-1].step0_error
    text_of_error = "not finite" if error is None else f"logit shift {error:.1e} σ on its data"
    measured = Measurement(made.lineage, text_of_error)
    return _Result(job, made.plan, lineage=made.lineage, measured=measured, training=made)


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
    is_recipe = result.job.request.path is not None
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
