"""What growth may be asked by keyword, where a person makes a growable module."""

from collections.abc import Mapping
from typing import Any, TypedDict, TypeVar

from tritter.errors import Problem, RequestError, nearest, raise_problems
from tritter.growth.grower import Grower
from tritter.growth.initialisers import Initialiser
from tritter.growth.names import INITIALISERS, TRIGGERS
from tritter.growth.options import COOLDOWN, MATURATION_AGE, GrowthOptions, Timing
from tritter.growth.triggers import Trigger
from tritter.options import read_options

Part = TypeVar("Part", Trigger, Initialiser)


class GrowthKeywords(TypedDict, total=False):
    """The keywords of all growable modules; what is left out is as the README has it.

    Args:
        gradient_percentile: of the pressures at earlier checks, above which a layer grows: 90.
        max_growth_per_step: neurons of a layer in one event: 10.
        growth_cooldown: steps from the beginning and between events: 200.
        maturation_age: steps until a neuron is mature: 500.
        maturation_factor: on the updates of young neurons: 2.
        enable_replacement: dead neurons are used again before others are added: False.
        dead_quantile: of all Wanda scores, below which a mature neuron is dead: 0.01.
        trigger: percentile | plateau | schedule | within_layer, or a `Trigger`.
        initialiser: gradmax | split | random | source_noise, or an `Initialiser`.
        check_every: calls sooner than so many steps after a check do nothing: 1, each is one.
        warmup_steps: before the first check: 0.
        pressure_decay: of the moving average of each neuron's gradient norm: 0.9.
        history_checks: earlier checks that pressures are compared with: 100.
        plateau_threshold: growth waits until the loss changes by less than this part: None.
        plateau_steps: that the change is taken over: 100.
        max_new_parameters: that growth adds in all: None.
        seed: of what new neurons are drawn from: 0.
    """

    gradient_percentile: float
    max_growth_per_step: int
    growth_cooldown: int
    maturation_age: int
    maturation_factor: float
    enable_replacement: bool
    dead_quantile: float
    trigger: str | Trigger
    initialiser: str | Initialiser
    check_every: int
    warmup_steps: int
    pressure_decay: float
    history_checks: int
    plateau_threshold: float | None
    plateau_steps: int
    max_new_parameters: int | None
    seed: int


_USUAL: Mapping[str, Any] = {
    "gradient_percentile": 90.0,
    "max_growth_per_step": 10,
    "growth_cooldown": COOLDOWN,
    "maturation_age": MATURATION_AGE,
    "maturation_factor": 2.0,
    "enable_replacement": False,
    "dead_quantile": 0.01,
    "trigger": "percentile",
    "initialiser": "gradmax",
    "check_every": 1,
    "warmup_steps": 0,
    "pressure_decay": 0.9,
    "history_checks": 100,
    "plateau_threshold": None,
    "plateau_steps": 100,
    "max_new_parameters": None,
}
# Of a training whose end is known, or asked elsewhere
_ELSEWHERE: Mapping[str, Any] = {"max_extra_flops": None, "at": None, "freeze_attention": False}


def made_grower(asked: GrowthKeywords) -> Grower:
    """Return the engine of what was asked.

    Raises:
        RequestError: names every keyword that is wrong, and the nearest there is.
    """
    given: dict[str, Any] = dict(asked)
    seed = given.pop("seed", 0)
    problems = [
        Problem(key, value, reason="there is no such keyword", nearest=nearest(key, _USUAL))
        for key, value in given.items()
        if key not in _USUAL
    ]
    raise_problems(problems)
    values = {**_USUAL, **given}
    trigger = _part("trigger", values["trigger"], _TRIGGERS, Trigger)
    initialiser = _part("initialiser", values["initialiser"], INITIALISERS, Initialiser)
    values |= {"trigger": type(trigger).__name__, "initialiser": type(initialiser).__name__}
    options = read_options(GrowthOptions, {**values, **_ELSEWHERE}, prefix="", problems=problems)
    raise_problems(problems)
    assert options is not None, "there would be a problem"
    timing = Timing(
        # Whoever calls says when; how long to wait at least, the loop sees to
        check_every=1,
        cooldown=values["growth_cooldown"],
        warmup=values["warmup_steps"],
        maturation_age=values["maturation_age"],
        max_steps=None,
    )
    return Grower(options, trigger, initialiser, timing=timing, seed=seed)


# Those that have to know where a training ends are of runs
_TRIGGERS = {n: kind for n, kind in TRIGGERS.items() if n not in ("budget", "meeting")}


def _part(key: str, said: Any, ours: Mapping[str, type[Part]], base: type[Any]) -> Part:
    if isinstance(said, base):
        found: Part = said
        return found
    if isinstance(said, str) and said in ours:
        return ours[said]()
    reason = f"allowed is one of {', '.join(ours)}, or a {base.__name__}"
    if said == "budget":
        reason = f"it spends evenly until an end that a loop of one's own doesn't say; {reason}"
    raise RequestError(Problem(key, said, reason=reason, nearest=nearest(str(said), ours)))
