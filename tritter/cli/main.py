"""The commands, their words and their exit codes; what each does stands in its own file.

Nothing here imports torch: `tritter --help` and refused words answer at once.
"""

import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tritter import __version__
from tritter.cli import (
    domain_options,
    evaluate_options,
    export_options,
    options,
    plan_options,
    validate_options,
)
from tritter.cli.method_options import MethodCommand
from tritter.cli.option import CheckpointCommand
from tritter.config.launch.words import UNFORESEEN, check_words, said
from tritter.config.suggestions import flag_advice
from tritter.errors import RequestError, TritterError
from tritter.loading import loading
from tritter.stopping import Stopped, stopping
from tritter.terminal import close_pipe, say


class Commands(TyperGroup):
    """All commands. Typer asks pydantic, half a second, what a flag is that was not given."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for flag in params:
            if flag.default is None:  # --help, and those of completion
                flag.default = False
        return params


app = typer.Typer(
    name="tritter",
    cls=Commands,
    help="Grow language models: exact expansion of Hugging Face checkpoints, and their lineage.",
    epilog="Exit codes: 0 done, 1 failed, 2 the request is wrong and nothing was written, "
    "3 a check said no, 130 and 143 stopped by Ctrl-C or SIGTERM, 141 the reader of a pipe left. "
    "Options may be spelled with - or _.",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)


class PassedOn(TyperCommand):
    """A command whose words, --help included, belong to another program."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return args

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        from typer._click.shell_completion import CompletionItem

        from tritter.cli.train import train_completions

        return [CompletionItem(found) for found in train_completions(ctx.args, incomplete)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 wrong request, 3 no.

    After Ctrl-C it is 130, after SIGTERM 143.

    Args:
        arguments: the words of the command line; default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        check_words(words)
        with stopping():
            command = typer.main.get_command(app)
            return command.main(words, prog_name="tritter", standalone_mode=False) or 0
    except RequestError as error:
        say(f"error: {error}\nNothing was written.", is_error=True)
        return 2
    except TritterError as error:
        say("\n".join([f"error: {error}", *_notes(error)]), is_error=True)
        return 1
    # What the system refuses on the way (a full disk, a name too long, no memory) is no fault of
    # the program, and needs no traceback
    except UNFORESEEN as error:
        say(f"error: {said(error)}", is_error=True)
        return 1
    except Stopped as stop:
        if stop.signal_number == signal.SIGPIPE:  # nobody reads on, as behind `| head`
            close_pipe()
            return stop.exit_code
        say(f"\nStopped. {' '.join(_notes(stop)) or 'Nothing was written.'}", is_error=True)
        return stop.exit_code
    except typer.TyperException as error:
        say(f"error: {_usage_error(error, words)}", is_error=True)
        return error.exit_code


def _notes(error: BaseException) -> list[str]:
    """Return what a command had to add to an error: that something was written after all."""
    return getattr(error, "__notes__", [])


def _usage_error(error: typer.TyperException, words: Sequence[str]) -> str:
    """Return what is wrong with the words, and where the right ones are listed."""
    possibilities = getattr(error, "possibilities", None)
    context, flag = getattr(error, "ctx", None), getattr(error, "option_name", None)
    place = context.command_path if context is not None else "tritter"
    near = f". Did you mean {possibilities[0]}?" if possibilities else ""
    if flag and (advice := flag_advice(flag, words, command=place.rpartition(" ")[2])):
        near, possibilities = f". {advice}", True
    message = error.message if possibilities else error.format_message()
    return f"{message}{near}\n`{place} --help` lists what there is."


def _is_typed(context: typer.Context, name: str) -> bool:
    """Say whether an option stands on the command line, in place of a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _print_version(is_asked: bool) -> None:
    if is_asked:
        say(f"tritter {__version__}")
        raise typer.Exit


@app.callback()
def everything(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command(cls=MethodCommand)
def expand(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    method: options.Method = None,
    recipe: options.Recipe = None,
    output: options.Output = None,
    config_dir: options.ConfigDir = None,
    target_params: options.TargetParams = None,
    domain: domain_options.Domain = None,
    domain_data: domain_options.DomainData = None,
    old_data: domain_options.OldData = None,
    steps: domain_options.DomainSteps = None,
    learning_rate: domain_options.LearningRate = None,
    moments: options.Moments = "carry",
    seed: options.Seed = 0,
    dtype: options.DType = None,
    max_shard_size: options.MaxShardSize = 5 * 10**9,
    measure: options.Measure = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> int:
    """Make a checkpoint deeper, wider or sparse, and write the result as a new checkpoint.

    tritter expand base --method width --hidden-size 512
    """
    with loading("torch"):
        from tritter.cli.expand_begin import begin_expand

    typed = [n for n in context.params if _is_typed(context, n)]
    return begin_expand(context.params, context.obj, typed)


@app.command()
def history(
    folder: options.Folder,
    verify: options.Verify = False,
    recipe: options.AsRecipe = False,
    as_json: options.AsJson = False,
) -> int:
    """Show the chain of checkpoints that led to one, and check it against its hashes."""
    from tritter.cli.history import print_recipe, run_history

    if recipe:
        return print_recipe(folder, is_also=[*["--verify"] * verify, *["--json"] * as_json])
    return run_history(folder, verify=verify, as_json=as_json)


@app.command()
def report(
    folders: options.Runs,
    output: options.ReportOutput = None,
    figures: options.Figures = None,
    overwrite: options.ReportOverwrite = False,
    as_json: options.AsJson = False,
) -> int:
    """Put finished runs and sweeps side by side on one HTML page."""
    from tritter.cli.report import run_report

    return run_report(folders, output=output, figures=figures, overwrite=overwrite, as_json=as_json)


@app.command()
def compare(
    folders: options.Runs,
    output: options.CompareOutput = None,
    overwrite: options.ReportOverwrite = False,
    as_json: options.AsJson = False,
) -> int:
    """Hold finished runs against the first: settings, losses in pairs, cost."""
    from tritter.cli.compare import run_compare

    return run_compare(folders, output=output, overwrite=overwrite, as_json=as_json)


@app.command(name="inspect")
def inspect_checkpoint(folder: options.Folder, as_json: options.AsJson = False) -> int:
    """Show a checkpoint's shapes and parameters, and the map of its last expansion."""
    with loading("torch"):
        from tritter.cli.inspect import run_inspect

    return run_inspect(folder, as_json=as_json)


@app.command(cls=CheckpointCommand)
def export(
    checkpoint: export_options.ExportSource,
    output: export_options.ExportOutput,
    format: export_options.Format = "hf",
    dtype: export_options.ExportDType = None,
    expert_layout: export_options.ExpertLayout = None,
    max_shard_size: options.MaxShardSize = 5 * 10**9,
    config: export_options.ConfigOf = None,
    prefix: export_options.Prefix = None,
    no_state: export_options.NoState = False,
    drop_new_experts: export_options.DropNewExperts = False,
    merge: export_options.Merge = False,
    rank: export_options.MergedRank = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> int:
    """Write a checkpoint as a plain folder that any Hugging Face reader loads, or as adapters.

    tritter export grown --output grown-hf
    """
    with loading("transformers"):
        from tritter.cli.export import ExportRequest, run_export

    request = ExportRequest(
        checkpoint=checkpoint,
        output=output,
        format=format,
        dtype=dtype,
        expert_layout=expert_layout,
        max_shard_bytes=max_shard_size,
        config=config,
        prefix=prefix,
        is_without_state=no_state,
        is_without_new_experts=drop_new_experts,
        is_merged=merge,
        rank=rank,
    )
    return run_export(request, overwrite=overwrite, as_json=as_json)


@app.command(cls=CheckpointCommand)
def generate(
    checkpoint: options.Checkpoint,
    prompt: options.Prompt,
    max_new_tokens: options.MaxNewTokens = 50,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> int:
    """Continue a text with a checkpoint, through stock transformers."""
    with loading("transformers"):
        from tritter.cli.generate import run_generate

    return run_generate(
        checkpoint,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        as_json=as_json,
    )


@app.command(cls=CheckpointCommand)
def evaluate(
    checkpoint: options.Checkpoint,
    tasks: evaluate_options.Tasks = None,
    tasks_path: evaluate_options.TasksPath = None,
    data: evaluate_options.Data = None,
    limit: evaluate_options.Limit = None,
    batch_size: evaluate_options.BatchSize = 16,
    allow_code: evaluate_options.AllowCode = None,
    code_sandbox: evaluate_options.CodeSandbox = None,
    output: evaluate_options.ResultFile = None,
    overwrite: options.ReportOverwrite = False,
    as_json: options.AsJson = False,
) -> int:
    """Take a checkpoint's losses on text and its scores on benchmarks; it is not changed.

    tritter evaluate base --tasks reasoning --tasks-path benchmarks
    """
    with loading("transformers"):
        from tritter.cli.evaluate import EvaluateRequest, run_evaluate

    request = EvaluateRequest(
        checkpoint=checkpoint,
        tasks=tuple(tasks or ()),
        tasks_path=tasks_path,
        data=tuple(data or ()),
        limit=limit,
        batch_size=batch_size,
        allow_code=tuple(allow_code or ()),
        code_sandbox=code_sandbox,
        output=output,
    )
    return run_evaluate(request, overwrite=overwrite, as_json=as_json)


@app.command(cls=CheckpointCommand)
def validate(
    source: validate_options.Source,
    result: validate_options.Result,
    data: validate_options.Data = None,
    target_data: validate_options.TargetData = None,
    limit: validate_options.Limit = 200,
    as_json: options.AsJson = False,
) -> int:
    """Ask the five questions of an expansion about two checkpoints; exit code 3 when one fails.

    tritter validate base grown
    """
    with loading("transformers"):
        from tritter.cli.validate import run_validate

    return run_validate(
        source, result, data=data, target_data=target_data, limit=limit, as_json=as_json
    )


@app.command(cls=CheckpointCommand)
def plan(
    source: plan_options.Source = None,
    target: plan_options.Target = None,
    gpu_hours: plan_options.GpuHours = None,
    strategy: plan_options.Strategy = "auto",
    device_flops: plan_options.DeviceFlops = 312 * 10**12,
    mfu: plan_options.Mfu = 0.4,
    tokens_per_parameter: plan_options.TokensPerParameter = 20.0,
    precision: plan_options.Precision = "bf16-mixed",
    optimizer: plan_options.Optimizer = "adamw",
    freeze_attention: plan_options.FreezeAttention = False,
    batch_size: plan_options.BatchSize = 1,
    sequence_length: plan_options.SequenceLength = None,
    gradient_checkpointing: plan_options.GradientCheckpointing = False,
    guide: plan_options.Guide = False,
    as_json: options.AsJson = False,
) -> int:
    """Plan the expansions from one size to another: shapes, tokens, GPU-hours, memory.

    tritter plan --source 3B --target 10B --gpu-hours 5000
    """
    from tritter.cli.plan import print_guide, run_plan
    from tritter.cli.plan_request import PlanRequest

    if guide:
        return print_guide(as_json=as_json)
    request = PlanRequest(
        source=source,
        target=target,
        gpu_hours=gpu_hours,
        strategy=strategy,
        device_flops=device_flops,
        mfu=mfu,
        tokens_per_parameter=tokens_per_parameter,
        setup={
            "precision": precision,
            "optimizer": optimizer,
            "is_attention_frozen": freeze_attention,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "is_checkpointed": gradient_checkpointing,
        },
    )
    return run_plan(request, as_json=as_json)


@app.command(cls=PassedOn, add_help_option=False)
def train(context: typer.Context) -> int:
    """Grow and train a model on real text; the same program as train.py."""
    from tritter.cli.train import run_train

    return run_train(context.args)
