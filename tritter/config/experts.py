"""`experts`: one class with its keys, and what of a run does not go together with it."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tritter.checkpoint.expert_files import ExpertFiles, refuse_experts
from tritter.config.chosen import adam_problems, chosen_class
from tritter.config.experts_config import ExpertsConfig
from tritter.config.reading import Reader
from tritter.config.schema import RunConfig
from tritter.errors import Problem, RequestError, TritterError
from tritter.families import Config, family_of
from tritter.targets import TARGET

_KIND = "tritter.experts.method.Experts"
_METHODS = ("replay",)  # of forgetting, which look at no parameter


def experts_class(raw: Mapping[str, Any]) -> type | None:
    """Return the class that `experts` names; None where the whole model is trained.

    Raises:
        RequestError: it is none, or keys are set of what was not chosen.
    """
    return chosen_class("experts", raw, base=_KIND, nothing="there are no adapters")


def read_experts(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> ExpertsConfig | None:
    """Return the experts of a run, or None when there are none, or there were problems."""
    kind = classes.get("experts")
    if kind is None:
        return None
    values = {key: value for key, value in raw.items() if key != TARGET}
    options = reader.read(kind.Options, values, prefix="experts")
    return None if options is None else ExpertsConfig(kind=kind, options=options)


def experts_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what of a run does not go together with experts."""
    if config.experts is None:
        return
    bits = config.experts.options.base_bits
    if bits is not None and find_spec("bitsandbytes") is None:
        reason = "it needs bitsandbytes, which is not installed: pip install 'tritter[8bit]'"
        yield Problem("experts.base_bits", bits, reason=reason)
    if config.pipeline.target_params is not None:
        reason = "a run that grows to a size trains all of it; leave it out, or experts=none"
        yield Problem("pipeline.target_params", config.pipeline.target_params, reason=reason)
    if config.growth is not None:
        reason = "neurons grow in a base that is trained, and under experts it is frozen"
        yield Problem("growth", config.growth.kind.__name__, reason=reason)
    names = [one.name for one in config.forgetting if one.name not in _METHODS]
    if names:
        reason = (
            "they hold weights of the base, which is frozen; with experts allowed are none and "
            f"{', '.join(_METHODS)}"
        )
        yield Problem("forgetting", names, reason=reason)
    yield from adam_problems(config, doing="experts come and go with Adam's two moments")
    if config.optimizer.carry:
        reason = "moments of the base are carried, which is frozen; those of experts begin anew"
        yield Problem("optimizer.carry", True, reason=reason)
    if config.experts.is_dynamic:
        yield from _dynamic_problems(config)


def experts_start_problems(
    config: RunConfig, source: Config, folder: Path | None
) -> Iterator[Problem]:
    """Yield why experts can't be put on, or gone on with, in what a run starts from.

    Args:
        source: its config.json.
        folder: the checkpoint, if it is at hand.

    Raises:
        RequestError: it has experts, and the run would train the whole model; or they, or its
            lineage, are damaged.
    """
    try:
        files = None if folder is None or not folder.is_dir() else ExpertFiles.read(folder)
    except TritterError as error:
        raise RequestError(Problem("model.path", folder, reason=str(error).rstrip("."))) from error
    asked = config.experts
    if asked is None:
        if files is not None:
            assert folder is not None
            refuse_experts(folder, doing="a training with experts=none", key="model.path")
        return
    family, wanted = family_of(source), asked.options.base_bits
    if wanted is not None and any(tensor.is_transposed for tensor in family.tensors):
        reason = f"the matrices of {family.model_type} lie transposed, and none would be quantised"
        yield Problem("experts.base_bits", wanted, reason=reason, nearest="null")
    if files is None:
        if asked.is_dynamic and asked.options.boundaries == "detected" and not config.text.old:
            reason = (
                "what is new is told by what the base knows, of which text is looked at, and "
                "never trained on; name some, or say experts.boundaries=told"
            )
            yield Problem("data.old", {}, reason=reason)
        return
    names, first = files.head.names, "expert_0" if asked.is_dynamic else "lora"
    if names[0] != first:
        reason = f"the checkpoint has the experts {', '.join(names)}, none of which is its {first}"
        yield Problem("experts", asked.name, reason=reason)
    bits = files.head.base_bits
    if asked.options.base_bits != bits:
        held = "as it stands in the folder" if bits is None else f"in {bits} bits"
        reason = f"the experts of the checkpoint were trained on a base {held}"
        value = asked.options.base_bits
        nearest = "null" if bits is None else str(bits)
        yield Problem("experts.base_bits", value, reason=reason, nearest=nearest)
    router = getattr(asked.options, "router", "evidence")
    if router != files.head.router:
        reason = f"the experts of the checkpoint are mixed by {files.head.router}"
        yield Problem("experts.router", router, reason=reason, nearest=files.head.router)


def _dynamic_problems(config: RunConfig) -> Iterator[Problem]:
    assert config.experts is not None
    asked = config.experts.options
    if asked.max_rank < asked.rank:
        reason = f"below experts.rank = {asked.rank}, that experts begin with"
        yield Problem("experts.max_rank", asked.max_rank, reason=reason)
    if asked.router == "evidence" and asked.shared_router:
        reason = "experts.router=evidence has no learned router; allowed with learned and both"
        yield Problem("experts.shared_router", True, reason=reason)
    config.experts.kind.check(asked)
    batch, least = config.data.batch_size, 2
    if asked.boundaries == "detected" and batch < least:
        reason = f"novelty is told by the spread of a batch; allowed is at least {least}"
        yield Problem("data.batch_size", batch, reason=reason)
    steps = config.training.max_steps
    accumulated = int(config.trainer_arguments.get("accumulate_grad_batches", 1))
    if asked.boundaries == "detected" and asked.min_samples > steps * accumulated * batch:
        reason = (
            f"a training of {steps} steps sees {steps * accumulated * batch:,} sequences, too few "
            "for any decision"
        )
        yield Problem("experts.min_samples", asked.min_samples, reason=reason)
    if asked.when_full == "merge" and asked.boundaries == "told":
        reason = "similarity is that of what novelty looks at; with boundaries=told use evict"
        yield Problem("experts.when_full", "merge", reason=reason)
