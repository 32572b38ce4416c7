"""The public Python API: `expand`, `load`, `run`, `grow`, `add_experts`, `gate` and `protect`.

Importing this module imports neither torch nor transformers. Each function imports what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, cast, overload

from tritter.errors import (
    Names,
    Problem,
    RequestError,
    brief,
    nearest,
    raise_problems,
    refused,
    use_names,
)
from tritter.loading import loading

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tritter.config.schema import RunConfig
    from tritter.core.expansions import ExpansionSpec
    from tritter.data.tokens import PretrainedTokenizer
    from tritter.evaluation.gate import GateResult
    from tritter.evaluation.statistics import PairedScores
    from tritter.methods.forgetting.penalty import OldData, Penalty
    from tritter.methods.forgetting.quadratic import QuadraticPenalty
    from tritter.methods.growth.growable import GrowableCausalLM
    from tritter.methods.growth.triggers import Trigger
    from tritter.pipeline.pipeline import Outcome
    from tritter.report.summary import Summary
    from tritter.transform import Expanded, PlannedExpansion

    StrPath: TypeAlias = str | PathLike[str]
    Model: TypeAlias = StrPath | PreTrainedModel
    Tokenizer: TypeAlias = StrPath | PreTrainedTokenizerBase
    Method: TypeAlias = str | ExpansionSpec
    Sources: TypeAlias = StrPath | Sequence[StrPath] | Mapping[str, StrPath | Sequence[StrPath]]
    Documents: TypeAlias = Mapping[str, Sequence[str]]

P = ParamSpec("P")
R = TypeVar("R")


def suggest_names(function: Callable[P, R]) -> Callable[P, R]:
    """Reject unknown keywords of a function with the nearest known one."""
    names = [
        name
        for name, each in signature(function).parameters.items()
        if each.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    ]

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        reason = f"unknown keyword of {function.__name__}; allowed are {', '.join(names)}"
        raise_problems(
            [
                Problem(key, brief(value), reason=reason, nearest=nearest(key, names))
                for key, value in kwargs.items()
                if key not in names
            ]
        )
        return function(*args, **kwargs)

    return called


# Expansion


@overload
def expand(
    source: Model,
    method: Method | Sequence[Method],
    *,
    output: None = None,
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel: ...


@overload
def expand(
    source: Model,
    method: Method | Sequence[Method],
    *,
    output: StrPath,
    seed: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> Path: ...


@overload
def expand(
    source: StrPath,
    method: StrPath,
    specs: Sequence[ExpansionSpec] | PlannedExpansion,
    **options: Any,
) -> Expanded: ...


def expand(
    source: Model,
    method: Any,
    specs: Any = None,
    *,
    output: StrPath | None = None,
    seed: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> PreTrainedModel | Path | Expanded:
    """Expand a model or a checkpoint; the source stays unchanged.

    `expand(source, destination, [Width(), LlamaPro()])`, with three positional arguments, is
    `tritter.transform.expand`: folder to folder, with all of its options.

    Args:
        source: a checkpoint folder, a hub id, or a live Hugging Face model.
        method: a name such as `"width"`, typed options such as `Width(hidden_size=96)`, or a list
            of either, applied in order. Names of installed extensions work too.
        specs: expansions of the form with three positional arguments.
        output: folder to write. Default: nothing is written.
        seed: random seed of new weights and choices.
        overwrite: replace a checkpoint at `output`.
        options: options of the method, if `method` is one name.

    Returns:
        The grown model, or the path of the folder if `output` is set.

    Raises:
        RequestError: the method, an option or the model family is unknown, the target is
            impossible, the model is a PeftModel, or `output` may not be written.
    """
    if specs is not None:
        return _expand_folder(source, method, specs, seed, overwrite, options)
    names = [method] if not isinstance(method, list | tuple) else list(method)
    with use_names(_option_names("expansion", names)):
        chosen = _expansions(names, options)
        if isinstance(source, str | PathLike):
            return _expand_checkpoint(source, chosen, output, seed=seed, overwrite=overwrite)
        with loading("transformers"):
            from tritter.transform.live import ModelExpander
        model, expander = _unwrap(source), ModelExpander(chosen, seed=seed)
        if output is None:
            return cast("PreTrainedModel", expander.expand(model))
        from tritter.storage.reading import named_path

        folder = named_path(output, key="output")
        expander.write(model, folder, overwrite=overwrite)
        return folder


def _expand_folder(
    source: Any,
    destination: Any,
    specs: Any,
    seed: int,
    overwrite: bool,
    options: Mapping[str, Any],
) -> Expanded:
    with loading("torch"):
        from tritter.transform import expand as expand_folder

    return expand_folder(
        source, destination, specs, seed=seed, overwrite=overwrite, **dict(options)
    )


def _expand_checkpoint(
    source: StrPath,
    specs: Sequence[ExpansionSpec],
    output: StrPath | None,
    *,
    seed: int,
    overwrite: bool,
) -> PreTrainedModel | Path:
    from tritter.checkpoints.expert_files import refuse_experts
    from tritter.storage.hub import locate

    folder = locate(fspath(source), key="source")
    if output is not None:
        return _expand_folder(folder, output, specs, seed, overwrite, {}).folder
    with loading("transformers"):
        from tritter.transform.live import ModelExpander
    refuse_experts(folder, doing="an expansion", key="source")
    return cast("PreTrainedModel", ModelExpander(specs, seed=seed).expand(load(folder)))


def _option_names(group: str, methods: Sequence[object]) -> Names:
    """Return key names for messages: `hidden_size` for one method, else `width.hidden_size`."""
    start = f"{group}."
    if len(methods) == 1:
        start += f"{_method_name(methods[0])}."

    def name(key: str) -> str:
        return "method" if key in (group, start.rstrip(".")) else key.removeprefix(start)

    return Names(name)


def _method_name(method: object) -> str:
    """Return a method's name with underscores."""
    name = method if isinstance(method, str) else getattr(method, "name", type(method).__name__)
    return str(name).replace("-", "_")


def _expansions(methods: Sequence[object], options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return typed options of expansions from names, dicts or option objects."""
    from tritter.core.expansions import check_specs

    if options and (len(methods) != 1 or not isinstance(methods[0], str)):
        key, value = next(iter(options.items()))
        reason = "keyword options require a single method name; pass typed options, such as [Width("
        raise refused(key, value, f"{reason}hidden_size=96), LlamaPro()]")
    problems: list[Problem] = []
    chosen = [
        _component("expansion", each, options, problems) if isinstance(each, str) else each
        for each in methods
    ]
    raise_problems(problems)
    return check_specs([getattr(each, "options", each) for each in chosen])


def _component(group: str, method: str, options: Mapping[str, Any], problems: list[Problem]) -> Any:
    """Return a method and its options by name, with the defaults of its option file.

    Option files of installed packages are included.
    """
    from tritter.config.components import method_class, method_names
    from tritter.config.folders import body_of, option_files
    from tritter.options import read_component

    name, names = _method_name(method), method_names(group)
    if name not in names:
        reason = f"unknown method; must be one of {', '.join(names)}"
        raise RequestError(Problem(group, method, reason=reason, nearest=nearest(name, names)))
    body: Any = body_of(option_files()[group][name])[name]
    kind = method_class(group, name, {name: body})
    # What a run derives from its length is null there
    body = {key: value for key, value in body.items() if value is not None}
    return read_component(f"{group}.{name}", kind, {**body, **options}, problems=problems)


# Models


def _unwrap(model: object) -> nn.Module:
    """Return a live model without Tritter's wrapper."""
    from torch import nn

    from tritter.core.models import model_of
    from tritter.methods.experts.mixture import mixture_on
    from tritter.methods.growth.growable import GrowableCausalLM

    if not isinstance(model, nn.Module):
        reason = "pass a folder, a hub id or a Hugging Face model"
        raise refused("source", brief(model), reason)
    inner = model.model if isinstance(model, GrowableCausalLM) else model
    model_of(inner)
    if mixture_on(inner) is not None:
        raise RequestError("the model has LoRA experts, which can't be expanded; merge them first.")
    return inner


@suggest_names
def load(path: StrPath, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a Tritter or Hugging Face checkpoint as a model in eval mode.

    FFNs that are padded on disk get their true width. LoRA experts and their router are part of
    the forward pass, and appended experts keep their router offset. Code in the folder is never
    executed.

    Args:
        path: a checkpoint folder or a hub id.
        dtype: dtype of the weights. Default: the checkpoint's.

    Raises:
        RequestError: the checkpoint does not exist, or its model family is unknown.
        TritterError: the checkpoint is damaged.
    """
    from tritter.storage.hub import locate

    folder = locate(fspath(path), key="path")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        reason = "it is a PEFT adapter: load its base, then PeftModel.from_pretrained(base, path)"
        raise refused("path", folder, reason)
    with loading("transformers"):
        import torch

        from tritter.core.models import read_model
        from tritter.methods.experts.whole import load_whole
        from tritter.storage.tensors import TensorFolder

    if dtype is None:
        read_model(folder)  # first, since its errors about the folder are more specific
        dtype = getattr(torch, TensorFolder.open(folder).main_dtype)
    return cast("PreTrainedModel", load_whole(folder, dtype=dtype))


def grow(
    model: StrPath | nn.Module, trigger: str | Trigger = "plateau", **options: Any
) -> GrowableCausalLM:
    """Prepare a model whose FFNs gain neurons in your own training loop.

    The loop calls `update_loss(loss)` and `check_and_grow()` after each optimizer step.

    Args:
        model: a checkpoint folder, a hub id, or a live model, which is grown in place.
        trigger: `percentile`, `plateau`, `schedule`, `within_layer`, the name of an installed
            extension, or a `Trigger`.
        options: `enable_growth`, `freeze_attention`, `dtype`, `seed`, and those of
            `tritter.methods.growth.triggers.GrowthOptions`.

    Raises:
        RequestError: a keyword or value is invalid, the FFNs of this model family can't grow, or
            the model is a PeftModel.
    """
    from tritter.config.components import resolve_registered_parts

    with loading("transformers"):
        from tritter.methods.growth.growable import GrowableCausalLM

    return GrowableCausalLM(
        model, **resolve_registered_parts("growth", {"trigger": trigger, **options})
    )


def add_experts(model: Model, rank: int = 8, **options: Any) -> PreTrainedModel:
    """Add LoRA experts and their router to a model and freeze its base.

    The output is unchanged until the experts are trained. Calling it again adds more experts.
    `model.expert_mixture` lists, mixes and removes them.

    Args:
        model: a checkpoint folder, a hub id, or a live model, which is changed in place.
        rank: rank of each expert.
        options: `num_experts` (2), `alpha` (twice the rank), `targets` (every linear layer of the
            decoder layers), `router` (`learned`, `evidence` or `both`), `top_k` (all),
            `temperature`, `capacity_factor`, `seed`.

    Returns:
        The model. Its parameters with `requires_grad` are those of the experts and routers.

    Raises:
        RequestError: a keyword or value is invalid, the model has no such target, or is a
            PeftModel.
    """
    from tritter.methods.experts.options import AddedOptions
    from tritter.options import read_options

    problems: list[Problem] = []
    key, values = "add_experts", {"rank": rank, **options}
    with use_names(Names(lambda name: name.removeprefix(f"{key}."))):
        requested = read_options(AddedOptions, values, prefix=key, problems=problems)
        raise_problems(problems)
    assert requested is not None, "there would be a problem"
    with loading("transformers"):
        from tritter.core.models import model_of
        from tritter.methods.experts.adapters import AdapterShape, adaptable
        from tritter.methods.experts.gates import Routing
        from tritter.methods.experts.mixture import ExpertMixture, mixture_on
    live = load(model) if isinstance(model, str | PathLike) else model
    model_of(live)
    mixture = mixture_on(live)
    if mixture is not None and requested.router not in (None, mixture.router):
        reason = f"the model's experts already use the router {mixture.router}"
        raise refused("router", requested.router, reason)
    targets = requested.targets or tuple(sorted(adaptable(live, whole=False)))
    if mixture is None:
        missing = sorted(set(targets) - adaptable(live))
        if missing:  # before the base is frozen
            reason = f"the model has no such layer; it has {', '.join(sorted(adaptable(live)))}"
            near = nearest(missing[0], adaptable(live))
            raise refused("targets", missing, reason, near=near)
        mixture = ExpertMixture(live, router=requested.router or "learned")
    shape = AdapterShape(requested.rank, requested.alpha or 2.0 * requested.rank, targets)
    names = (f"expert_{number}" for number in range(len(mixture.names) + requested.num_experts))
    free = [name for name in names if name not in mixture.names]
    for number, name in enumerate(free[: requested.num_experts]):
        mixture.add(name, shape, seed=requested.seed + number)
    mixture.routing = Routing(
        top_k=requested.top_k,
        temperature=requested.temperature,
        capacity_factor=requested.capacity_factor,
    )
    return live


# Runs


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Args:
        folder: the run folder.
    """

    folder: Path

    @property
    def status(self) -> str:
        """`kept`, `rolled_back`, `undecided` or `ungated`."""
        from tritter.config.run_folder import read_status

        return read_status(self.folder).status

    @property
    def summary(self) -> Summary:
        """The content of summary.json."""
        from tritter.report.summary import Summary
        from tritter.storage.reading import SUMMARY_FILE

        return Summary.read(self.folder / SUMMARY_FILE)

    @property
    def metrics(self) -> DataFrame:
        """The content of metrics.csv, one row per logged step."""
        import pandas

        return pandas.read_csv(self.folder / "metrics.csv")

    def model(self, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load the kept model; after a rollback, the baseline."""
        return load(self.folder / self.summary.checkpoint, dtype=dtype)


@suggest_names
def run(
    *overrides: str, data: Mapping[str, Sources] | None = None, output: StrPath | None = None
) -> RunResult:
    """Run the pipeline of `python train.py` in this process.

    Ctrl-C saves the state. The run continues with the same call and the same `output`, or with
    `run("resume=latest")`. The working directory and `sys.argv` do not change.

    Args:
        overrides: command-line overrides such as `"expansion=width"`; also `--config-dir=DIR`.
        data: `old`, `new` and `tasks`: a path, a list of paths, or domain → paths. Implies
            `data=text`, or `data=hf` for `hf:NAME`.
        output: the run folder. Default: a new folder in `outputs/runs`.

    Raises:
        RequestError: the request is invalid and nothing was written. The message lists all
            problems.
        TritterError: the run failed.
        KeyboardInterrupt: Ctrl-C. The message names the call that continues the run.
    """
    import signal

    from tritter.config.launch.entry import run_once
    from tritter.config.overrides import quote
    from tritter.stopping import Stopped, stopping

    all_overrides = [*_data_overrides(data or {}, overrides), *overrides]
    if output is not None:
        all_overrides.append(f"hydra.run.dir={quote(fspath(output))}")
    try:
        with stopping():
            return RunResult(run_once(all_overrides, _pipeline))
    except Stopped as stop:
        if stop.signal_number != signal.SIGINT:
            raise SystemExit(stop.exit_code) from stop
        where = f" {stop.location}" if stop.location else ""
        again = "".join(f"; continue with tritter.run('resume={folder}')" for folder in stop.advice)
        raise KeyboardInterrupt(f"stopped{where}{again}") from stop


def _pipeline(config: RunConfig, *, run_folder: Path) -> Outcome:
    with loading("lightning"):
        from tritter.pipeline import run_pipeline

    return run_pipeline(config, run_folder=run_folder)


def _data_overrides(data: Mapping[str, Sources], overrides: Sequence[str]) -> list[str]:
    """Return the overrides for `data`."""
    from tritter.config.overrides import nested_value, override_key
    from tritter.data.datasets import dataset_names

    allowed, typed = ("old", "new", "tasks"), {override_key(each) for each in overrides}
    problems, found, paths = [], list[str](), list[str]()
    for key, value in data.items():
        if key not in allowed:
            reason = f"there is no such key; there are {', '.join(allowed)}"
            problems.append(Problem(f"data[{key!r}]", reason=reason, nearest=nearest(key, allowed)))
        elif f"data.{key}" in typed:
            reason = "an override and the keyword data both set it; remove one"
            problems.append(Problem(f"data.{key}", reason=reason))
        inner = list(value.values()) if isinstance(value, Mapping) else [value]
        for each in inner:
            paths += map(str, each if isinstance(each, list | tuple) else [each])
        found.append(f"data.{key}={nested_value(value)}")
    raise_problems(problems)
    if found and "data" not in typed:
        found.insert(0, f"data={'hf' if dataset_names(paths) else 'text'}")
    return found


# The gate


@suggest_names
def gate(
    before: Model,
    after: Model,
    documents: Documents,
    *,
    retention: float = 0.05,
    confidence: float = 0.95,
    new_documents: Documents | None = None,
    tokenizer: Tokenizer | None = None,
    sequence_length: int | None = None,
    batch_size: int = 16,
) -> GateResult:
    """Compare two models on documents, like the gate of a run.

    A domain passes if the upper bound of the relative increase of its loss per byte is at most
    `retention`, and fails if the lower bound is above it. With fewer than 30 documents it is
    `undecided`.

    Args:
        before: the model before training: a folder, a hub id or a live model.
        after: the model to evaluate, in the same forms.
        documents: domain → documents that must not be forgotten.
        retention: maximum relative increase of the loss.
        confidence: confidence of each one-sided bound.
        new_documents: domain → documents on which the loss must decrease.
        tokenizer: a Hugging Face tokenizer, or a folder with one. Required for live models.
            Default: that of the checkpoint folder.
        sequence_length: window length in tokens; longer documents are split. Default: 1024, or
            the positions that both models support.
        batch_size: windows per forward pass.

    Raises:
        RequestError: a value is not allowed, or documents or a tokenizer are missing.
    """
    _check_gate(retention, confidence, documents, new_documents or {})
    with loading("transformers"):
        from tritter.evaluation.gate import GateResult, new_capability_check, retention_check

    everything = {**documents, **(new_documents or {})}
    known = tokenizer or next((m for m in (after, before) if isinstance(m, str | PathLike)), None)
    if known is None:
        reason = "live models need one: pass a Hugging Face tokenizer or a folder with one"
        raise RequestError(Problem("tokenizer", reason=reason))
    length = sequence_length or min(map(_window_length, (before, after)))
    scores = [
        _scores(model, everything, tokenizer or known, length, batch_size)
        for model in (before, after)
    ]
    old, new = scores
    bounds = {"bound": retention, "confidence": confidence}
    checks = [retention_check(name, old[name], new[name], **bounds) for name in documents]
    checks += [
        new_capability_check(name, old[name], new[name], confidence=confidence)
        for name in new_documents or {}
    ]
    return GateResult.of(checks)


def _check_gate(retention: object, confidence: object, kept: Documents, new: Documents) -> None:
    problems = []
    for key, value, low, high in (
        ("retention", retention, 0, 1e6),
        ("confidence", confidence, 0.5, 1),
    ):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= cast(float, value) < high:
            reason = f"must be a number from {low} to below {high:g}"
            problems.append(Problem(key, value, reason=reason))
    if not kept and not new:
        problems.append(Problem("documents", reason="name a domain and its documents"))
    if both := sorted(kept.keys() & new.keys()):
        reason = "a domain is either kept or new"
        problems.append(Problem("new_documents", both, reason=reason))
    for key, domains in (("documents", kept), ("new_documents", new)):
        for name, texts in domains.items():
            is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
            if not is_list or not any(texts) or not all(isinstance(each, str) for each in texts):
                reason = "must be a list of documents, each a text"
                problems.append(Problem(f"{key}[{name!r}]", brief(texts), reason=reason))
    raise_problems(problems)


def _window_length(model: Model) -> int:
    from tritter.checkpoints.record import window_length
    from tritter.core.models import model_of, read_model
    from tritter.storage.hub import locate

    if isinstance(model, str | PathLike):
        found = read_model(locate(fspath(model), key="model"))
    else:
        found = model_of(model)
    return window_length(None, found.position_limit)


def _scores(
    model: Model, documents: Documents, tokenizer: Tokenizer, sequence_length: int, batch_size: int
) -> dict[str, PairedScores]:
    """Score a model on all documents. A model from a folder is released afterwards."""
    from tritter.core.models import model_of, refuse_peft
    from tritter.data.tokens import tokenise_texts
    from tritter.evaluation.losses import document_losses

    refuse_peft(model)
    live: Any = load(model) if isinstance(model, str | PathLike) else model
    wrapped = _tokenizer(tokenizer, live)
    limit = model_of(live).position_limit or sequence_length
    return {
        name: document_losses(
            live,
            tokenise_texts(texts, wrapped.tokenizer),
            sequence_length=min(sequence_length, limit),
            bounds=wrapped.bounds,
            batch_size=batch_size,
        )
        for name, texts in documents.items()
    }


def _tokenizer(tokenizer: Tokenizer, model: nn.Module) -> PretrainedTokenizer:
    from tritter.data.tokens import ends_of, read_tokenizer, wrap_tokenizer
    from tritter.storage.hub import locate

    config = cast(Any, model.config)
    ends = ends_of(config, generation=getattr(model, "generation_config", None))
    if not isinstance(tokenizer, str | PathLike):
        return wrap_tokenizer(tokenizer, ends=ends)
    folder = locate(fspath(tokenizer), key="tokenizer")
    vocab_size = config.get_text_config(decoder=True).vocab_size
    return read_tokenizer(folder, vocab_size=vocab_size, ends=ends)


# Forgetting mitigation


# Options that only Tritter's own training loop supports
_RUN_ONLY_OPTIONS = ("at", "carry", "refresh_steps", "xi")
_IN_A_RUN = "use tritter.run('forgetting={}', ...) or tritter.integrations.hf.with_forgetting"
_NO_PENALTY = {
    "replay": "it changes the batches; mix old documents into your DataLoader, or",
    "self_replay": "it changes the batches; mix text generated by the model into them, or",
    "distill": "it needs the logits of each batch and a teacher; choose l2sp or ewc, or",
    "freeze": "it chooses what the optimizer trains; set requires_grad yourself, or",
    "online_ewc": "it carries its Fisher information from task to task; choose ewc, or",
}


def protect(
    model: nn.Module,
    method: str | QuadraticPenalty = "ewc",
    old_data: OldData | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    sequence_length: int | None = None,
    **options: Any,
) -> Penalty:
    """Return a loss term that keeps a model close to its current weights.

    Use `loss = task_loss + penalty()` in your own training loop. The importance of each weight is
    estimated once, by this call, on old data.

    Args:
        model: the model with the weights to protect.
        method: `ewc` (arXiv 1612.00796), `si` (arXiv 1703.04200, estimated on old data), `l2sp`
            (arXiv 1802.01483, needs no old data), or one with options, `EWC(ewc_lambda=1e3)`.
        old_data: documents (texts), or batches: a DataLoader or a list of integers [N, T] or of
            mappings with `input_ids`. Padding is skipped according to `attention_mask`. Only the
            first `num_sequences` sequences are used.
        tokenizer: a Hugging Face tokenizer or a folder with one, required for documents.
        sequence_length: sequence length for packing documents. Default: as in `gate`.
        options: options of the method, such as `ewc_lambda`.

    Raises:
        RequestError: the method or an option is unknown, old data or the tokenizer is missing, the
            model is a PeftModel, or the method needs more than a penalty. The message names the
            alternative.
    """
    from tritter.data.packing import marks_read
    from tritter.data.tokens import TextBounds
    from tritter.methods.forgetting.penalty import Penalty, old_sequences

    with use_names(_option_names("forgetting", [method])):
        chosen = _penalty_method(method, options)
        with loading("transformers"):
            from tritter.core.models import refuse_peft
        refuse_peft(model)
        needs = type(chosen).needs(chosen.options)
        batches: Iterable[Tensor] = ()
        own: PretrainedTokenizer | None = None
        if needs.old_text:
            if tokenizer is not None:
                own = _tokenizer(tokenizer, model)
            count = getattr(chosen.options, "num_sequences", 256)
            length = sequence_length or _window_length(model)
            batches = old_sequences(old_data, tokenizer=own, sequence_length=length, count=count)
            if not batches:
                reason = f"{chosen.name} needs data of the old domains, and there is none"
                raise RequestError(Problem("old_data", reason=reason, advice="or choose l2sp"))
        with marks_read(model, own.bounds if own else TextBounds(0)):
            importance = chosen.importance_on(model, batches)
        chosen.anchor_weights(model, importance)
    return Penalty(model, chosen)


def _penalty_method(method: object, options: Mapping[str, Any]) -> QuadraticPenalty:
    """Return a method that consists only of a penalty, with its options."""
    from tritter.methods.forgetting.quadratic import QuadraticPenalty

    name = _method_name(method)
    if isinstance(method, str):
        problems: list[Problem] = []
        found = _component("forgetting", method, {}, problems)
        kind = found.kind
    else:
        found, kind = method, type(method)
    if name in _NO_PENALTY or not (isinstance(kind, type) and issubclass(kind, QuadraticPenalty)):
        why = _NO_PENALTY.get(name, "it is more than a penalty;")
        reason = f"{name} can't be a loss term alone: {why} {_IN_A_RUN.format(name)}"
        raise refused("method", method if isinstance(method, str) else brief(method), reason)
    fields = [key for key in _field_names(kind.Options) if key not in _RUN_ONLY_OPTIONS]
    start = f"forgetting.{name}"
    if not isinstance(method, str):
        if options:
            key, value = next(iter(options.items()))
            raise refused(f"{start}.{key}", value, f"set it in {kind.__name__}({key}=...)")
        from tritter.options import checked

        requested, default = cast(Any, method).options, kind.Options()
        reason = "only a run supports it; remove it"
        problems = [
            Problem(f"{start}.{key}", getattr(requested, key), reason=reason)
            for key in _field_names(kind.Options)
            if key in _RUN_ONLY_OPTIONS and getattr(requested, key) != getattr(default, key)
        ]
        raise_problems([*problems, *checked(requested, prefix=start)])
        return cast("QuadraticPenalty", method)
    reason = f"protect takes {', '.join(fields)} with {name}"
    unknown = [
        Problem(f"{start}.{key}", value, reason=reason, nearest=nearest(key, fields))
        for key, value in options.items()
        if key not in fields
    ]
    own = {key: value for key, value in options.items() if key in fields}
    found = _component("forgetting", method, own, unknown)
    raise_problems(unknown)
    return cast("QuadraticPenalty", found.kind(**found.arguments))


def _field_names(record: Any) -> list[str]:
    return list(record.__dataclass_fields__)
