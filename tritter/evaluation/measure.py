"""Measure the step-0 error of an expansion in stock models, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritter.checkpoints import Lineage, Source, write_lineage
from tritter.core.expansions import ExpansionSpec
from tritter.core.families import Model
from tritter.core.models import read_model
from tritter.errors import TritterError
from tritter.evaluation.gate import Check, rounded_jump
from tritter.evaluation.jump import Jump, first_difference
from tritter.storage.tensors import TensorFolder
from tritter.targets import dotted
from tritter.transform import Expanded

# Each weight is read once for all tokens. With experts, more tokens are needed to reach them all
_SEQUENCES, _SEQUENCES_OF_EXPERTS, _LENGTH = 2, 8, 32
_MB = 10**6


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measured step-0 error.

    Args:
        lineage: lineage of the result, with the error: max |Δ logits| / std(logits) on random
            tokens; None if not finite.
        text: readable description.
        jump: all figures of the difference, if there are more.
        fault: what is wrong if a function-preserving method differs by more than rounding, else
            empty. For a 16-bit result the bound is that of 16-bit rounding.
    """

    lineage: Lineage
    text: str
    jump: Jump | None = None
    fault: str = ""

    @classmethod
    def of(
        cls,
        source: Source,
        result: Expanded,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Measurement":
        """Compare source and result on random tokens and write the error into the record.

        Args:
            source: the source checkpoint.
            result: the result in a temporary folder.
            progress: called with the megabytes read and their total.

        Raises:
            TritterError: transformers can't build or run one of the models.
        """

        def show(done: int, total: int) -> None:
            if progress is not None:
                progress(done // _MB, total // _MB)

        model, rounded = read_model(result.folder), _rounded_dtypes(source, result)
        try:
            added = result.plan.vocabulary
            new_tokens = None if added is None else added.new_ids
            tokens = random_tokens(source.model, unlike=new_tokens or ())
            jump, states = Jump.of_folders(
                source.folder,
                result.folder,
                tokens,
                new_tokens=new_tokens,
                has_yardstick=bool(rounded),
                progress=show,
            )
        except TritterError:
            raise
        # Stock classes trust their config, so a bad value may raise any exception
        except Exception as raised:
            raise TritterError(
                f"{source.folder} cannot be measured: its model fails on tokens ({raised!r}); "
                "--no-measure, or three positional arguments in Python, expand it without "
                "measuring."
            ) from raised
        error = jump.to_dict()["relative_to_std"]
        lineage = result.lineage.with_step0_error(error, num_new=len(result.steps))
        lineage = write_lineage(result.folder, lineage, model.config)
        bound = rounded_jump(has_experts=model.family.has_experts) if rounded else Check.EXACT_JUMP
        note = f", including rounding to {' and '.join(rounded)}" if rounded else ""
        text = f"logit shift at most {jump.relative_to_std:.1e} σ on random tokens{note}"
        fault = ""
        if result.plan.is_exact and not jump.relative_to_std < bound:
            place = first_difference(states, result.plan.parameter_map.layer_sources)
            fault = "the method is function-preserving, but the result differs from the source at "
            fault += f"{place}; {wrong_part([step.spec for step in result.steps])}"
        return cls(lineage, text, jump, fault)


def wrong_part(specs: Sequence[ExpansionSpec]) -> str:
    """Return the reason for a changed function after expansions that claim to preserve it."""
    own = [spec.name for spec in specs if not dotted(type(spec)).startswith("tritter.")]
    if not own:
        return "please report this with the output of `tritter inspect`"
    return f"`is_exact` or the parameter map of {' and '.join(own)} is wrong"


def _rounded_dtypes(source: Source, result: Expanded) -> list[str]:
    """Return the 16-bit types to which weights of the result were rounded; copies are not."""
    before, after = source.tensors.dtypes, TensorFolder.open(result.folder).dtypes
    maps = list(result.plan.parameter_map.tensors.values())
    if result.plan.is_exact:  # noise has no effect then: a norm with zero weight follows it
        maps = [replace(each, noise=0.0) for each in maps]
    is_copied = len(before | after) == 1 and all(m.is_verbatim or m.is_zeroed for m in maps)
    return [] if is_copied else [n for n in ("bfloat16", "float16") if n in after]


def random_tokens(model: Model, *, unlike: Sequence[int] = ()) -> Tensor:
    """Return fixed random tokens for comparing models, int64 [B, T], none of them in `unlike`."""
    vocab_size = model.sizes.vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (_SEQUENCES_OF_EXPERTS if model.family.has_experts else _SEQUENCES, _LENGTH)
    ids = torch.arange(vocab_size)
    ids = ids[~torch.isin(ids, torch.tensor(unlike, dtype=torch.int64))]
    return ids[torch.randint(0, len(ids), shape, generator=generator)]
