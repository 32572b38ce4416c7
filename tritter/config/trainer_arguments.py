"""`trainer`: arguments of Lightning's Trainer besides those that every option states."""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from tritter.config.schema import TrainerConfig
from tritter.config.suggestions import NO_EPOCHS, hint_for
from tritter.errors import Problem, nearest
from tritter.targets import building_problem, imported

TRAINER = "lightning.pytorch.Trainer"
PROFILERS = ("simple", "advanced", "pytorch")
# What changes no weights, so that a run may go on with another value
WITHOUT_EFFECT = ("profiler", "enable_model_summary", "detect_anomaly", "enable_autolog_hparams")

_ENDS = "a run ends by its steps alone, else a resumed one would end elsewhere; say "
_ENDS += "training.max_steps and pretraining.max_steps"
_STOPS = "a training that is asked to stop, or by a callback to end, ends with its step"
_DATA = "Tritter deals out the batches itself, and saves its place in them"
_EVALUATION = "a training is evaluated by Tritter itself, on text that is always the same"
_FOLDER = "everything lies in the run folder; say hydra.run.dir"
_SAVED = "what a run goes on from is always saved; say trainer.save_every_n_steps, and "
_SAVED += "callbacks=model_checkpoint for further files"
REFUSED = {
    "max_epochs": NO_EPOCHS,
    "min_epochs": NO_EPOCHS,
    "max_time": _ENDS,
    "max_steps": _ENDS,
    "min_steps": _STOPS,
    "fast_dev_run": f"it saves nothing and switches callbacks off; {_ENDS}",
    "overfit_batches": f"{_DATA}; name less text, data.new",
    "limit_train_batches": f"{_DATA}; {_ENDS}",
    "plugins": "a checkpoint is written by Tritter's own, without pickle",
    "num_nodes": "the processes of a run are on one machine; say trainer.devices",
    "callbacks": "they are a group of their own; say callbacks=NAME",
    "logger": "they are a group of their own; say logger=NAME",
    "enable_checkpointing": _SAVED,
    "default_root_dir": _FOLDER,
    "enable_progress_bar": "Tritter has a bar of its own; say trainer.progress",
    "use_distributed_sampler": _DATA,
    "reload_dataloaders_every_n_epochs": _DATA,
    "num_sanity_val_steps": _EVALUATION,
    "inference_mode": "what a model keeps from an evaluation may meet a gradient afterwards",
    "val_check_interval": _EVALUATION,
    "check_val_every_n_epoch": _EVALUATION,
    "barebones": "it leaves out callbacks, metrics and what a run goes on from",
    "model_registry": "a run sends no model anywhere",
}

_OWN = tuple(field.name for field in fields(TrainerConfig))


def split_trainer(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys that every option of `trainer` states, and the further ones."""
    own = {name: value for name, value in raw.items() if name in _OWN}
    return own, {name: value for name, value in raw.items() if name not in own}


@lru_cache
def trainer_parameters() -> tuple[str, ...]:
    """Return the arguments of Lightning's Trainer, read from its source: importing it is slow."""
    spec = find_spec("lightning")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "pytorch/trainer/trainer.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kind = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Trainer")
    made = next(n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    names = [each.arg for each in (*made.args.args, *made.args.kwonlyargs)]
    return tuple(name for name in names if name != "self")


def argument_problems(arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with further arguments, all of them."""
    known = {*trainer_parameters()} - {*REFUSED}
    for name, value in arguments.items():
        if name in REFUSED:
            yield Problem(f"trainer.{name}", value, reason=REFUSED[name])
        elif name not in known:
            allowed = sorted({*_OWN, *known})
            reason = f"there is no such key; trainer has {', '.join(allowed)}"
            near = nearest(name, allowed)
            meant = None if near is None else f"trainer.{near}"
            if (hint := hint_for(f"trainer.{name}", value)) is not None:
                reason, meant = hint.reason or reason, hint.advice or None
            yield Problem(f"trainer.{name}", value, reason=reason, nearest=meant)
        else:
            yield from _by_value(name, value)


def _by_value(name: str, value: object) -> Iterator[Problem]:
    key = f"trainer.{name}"
    if name == "profiler" and value is not None and value not in PROFILERS:
        reason = f"allowed is one of {', '.join(PROFILERS)}, or null"
        yield Problem(key, value, reason=reason, nearest=nearest(str(value), PROFILERS))
        return
    if name == "accumulate_grad_batches" and not (type(value) is int and value >= 1):
        yield Problem(key, value, reason="allowed is a whole number at least 1")
        return
    trainer = imported(TRAINER)
    hint = get_type_hints(trainer.__init__)[name]
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        needs_object = ("is_instance_of", "needs_python_object")
        said = [e["msg"] for e in error.errors() if e["type"] not in needs_object]
        if said:
            reason = "; ".join(
                dict.fromkeys(text.removeprefix("Input should be ") for text in said)
            )
            yield Problem(key, value, reason=f"allowed is {reason}")
            return
    except PydanticUserError:
        pass  # a type that is left to the constructor
    if name in ("deterministic", "benchmark"):
        return  # they would be set for the whole process
    dry = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    dry |= {"enable_progress_bar": False, "enable_model_summary": False, name: value}
    made = building_problem(trainer, dry, key="trainer")
    if isinstance(made, Problem):
        yield Problem(key, value, reason=made.reason)
