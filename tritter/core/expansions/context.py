"""A longer context: rotary embeddings (RoPE) whose angles fit more positions; weights are kept."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from tritter.core.families import Config, Model
from tritter.errors import Problem, RequestError, brief, refused
from tritter.limits import MAX_POSITIONS
from tritter.options import options

if TYPE_CHECKING:
    from tritter.core.parameter_map import ParameterMap

_KEY = "expansion.context"
_FACTOR = 4
_LOCAL = "sliding_attention"  # layers that never see a distance beyond their window
# Keys of YaRN that follow from the new factor, or that only earlier releases of transformers read
_DERIVED = ("factor", "attention_factor", "type")
# Of rotary parameters; they may be missing, where the class has defaults
_NUMBERS = (
    "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"
)  # fmt: skip


@options
class Context:
    """More positions for a model with rotary embeddings.

    Args:
        target_length: tokens of the new context. Default: 4 times the current
            `max_position_embeddings`.
        method: `yarn` (arXiv 2309.00071) divides the slow rotations by the factor, keeps the fast
            ones and makes attention sharper; `base` multiplies the base θ of all rotations by
            s^(d/(d-2)), for a factor s and d rotary dimensions ("NTK-aware" scaling).
    """

    name: ClassVar[str] = "context"
    expansion_type: ClassVar[str] = "context"
    is_exact: ClassVar[bool] = False  # the angles between near tokens change too
    new_blocks_only: ClassVar[bool] = False
    target_length: Annotated[int, Field(ge=2, le=MAX_POSITIONS)] | None = None
    method: Literal["base", "yarn"] = "yarn"

    def target_config(self, source: Model) -> Config:
        """Return the config with more positions."""
        source = _with_rotations(source)
        family, config, old = source.family, source.config, source.position_limit
        assert old is not None
        layers = range(source.sizes.num_hidden_layers)
        windows = [source.attention_window(layer) or inf for layer in layers]
        new = self.target_length or _FACTOR * old
        if new <= old:
            reason = f"the model already has {family.positions_key} = {old}; must be more"
            raise refused(f"{_KEY}.target_length", new, reason)
        if new > MAX_POSITIONS:  # the default
            reason = f"the default is {_FACTOR} times {old}; must be at most {MAX_POSITIONS}"
            raise refused(f"{_KEY}.target_length", new, reason)
        if max(windows) <= old:
            reason = f"all layers attend to the last {max(windows)} tokens, so no distance is new"
            raise RequestError(Problem(_KEY, reason=f"{reason}; set {family.positions_key}"))
        changed: dict[str, Any] = {family.positions_key: new}
        changed["rope_parameters"] = rotations = dict(_parameters(config))
        for name, each in _scaled(rotations).items():
            scaled = self._scale(config, each, old, new)
            if name:
                rotations[name] = scaled
            else:
                changed["rope_parameters"] = scaled
        if self.method == "yarn" and config.get("head_dim", 0) is None:  # which yarn multiplies
            changed["head_dim"] = source.sizes.head_dim
        return {**config, **changed}

    def _scale(
        self, config: Config, parameters: Mapping[str, Any], old: int, new: int
    ) -> dict[str, Any]:
        """Return rotary parameters for a longer context.

        Args:
            config: config of the source.
            parameters: its rotary parameters.
            old: its context length.
            new: the new context length.
        """
        kind = parameters.get("rope_type", "default")
        if kind != "default" and (kind, self.method) != ("yarn", "yarn"):
            allowed = "only yarn can be scaled again" if kind == "yarn" else "it can't be combined"
            reason = (
                f"the rotary embeddings of the model already have rope_type = {kind}; {allowed}"
            )
            raise refused(f"{_KEY}.method", self.method, reason)
        if self.method == "yarn" and "original_max_position_embeddings" in config:
            reason = f"the class of {config['model_type']} reads yarn as LongRoPE; use base"
            raise refused(f"{_KEY}.method", self.method, reason)
        if self.method == "yarn":
            first = old
            if kind == "yarn":
                first = parameters.get("original_max_position_embeddings") or old
                covered = round(first * (parameters.get("factor") or old / first))
                if new <= covered:
                    reason = f"its yarn already covers {covered} tokens; must be more than that"
                    raise refused(f"{_KEY}.target_length", new, reason)
            return {
                **{key: value for key, value in parameters.items() if key not in _DERIVED},
                "rope_type": "yarn",
                "factor": new / first,
                "original_max_position_embeddings": first,
            }
        dimensions = _rotary_dimensions(config, parameters)
        if dimensions <= 2:
            reason = f"base needs more than 2 rotary dimensions, and the model has {dimensions}"
            raise refused(f"{_KEY}.method", self.method, f"{reason}; use yarn")
        if "rope_theta" not in parameters:
            reason = "rope_parameters in config.json has no rope_theta; set it, or use yarn"
            raise refused(f"{_KEY}.method", self.method, reason)
        growth = (new / old) ** (dimensions / (dimensions - 2))
        return {**parameters, "rope_theta": parameters["rope_theta"] * growth}

    def parameter_map(self, source: Model, target: Model, *, seed: int) -> ParameterMap:
        """Return the identity: rotary embeddings have no weights."""
        from tritter.core.parameter_map import ParameterMap

        return ParameterMap.identity(
            (tensor.name for tensor in source.tensors), num_layers=source.sizes.num_hidden_layers
        )

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        old, new = source.position_limit, target.position_limit
        assert old is not None and new is not None
        notes = [f"{old:,} → {new:,} positions; {_change(target.config, source.config)}"]
        layers = range(target.sizes.num_hidden_layers)
        windows = [target.attention_window(layer) for layer in layers]
        if local := [window for window in windows if window is not None and window < new]:
            notes.append(
                f"{len(local)} of {len(layers)} layers attend to the last {max(local):,} tokens "
                "only; the expansion keeps their windows"
            )
        if source.family.has_table:
            before, after = map(_cache_bytes, (source, target))
            notes.append(
                f"the key/value cache of one full sequence in 16 bits grows from "
                f"{before / 1e6:,.1f} to {after / 1e6:,.1f} MB"
            )
        return tuple(notes)


def _cache_bytes(model: Model) -> int:
    """Return the bytes of the keys and values of one sequence of full length, in 16 bits."""
    sizes, length = model.sizes, model.position_limit or 0
    windows = (model.attention_window(n) for n in range(sizes.num_hidden_layers))
    kept = sum(min(length, window or length) for window in windows)
    return 2 * 2 * kept * sizes.num_key_value_heads * sizes.head_dim


def _rotary_dimensions(config: Config, parameters: Mapping[str, Any]) -> int:
    """Return the rotary dimensions of a head, as transformers computes them."""
    size: Any = config.get("head_dim")
    if size is None and isinstance(config.get("num_attention_heads"), int):
        size = config["hidden_size"] // config["num_attention_heads"]  # type: ignore[operator]
    if not isinstance(size, int):
        reason = "config.json sets no head size from which the base follows; use yarn"
        raise refused(f"{_KEY}.method", "base", reason)
    share: Any = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return int(size * (1.0 if share is None else share))


def _with_rotations(source: Model) -> Model:
    """Return a model with its rotary parameters, by default as its class sets them."""
    config, family = source.config, source.family
    learns_positions = any(tensor.kind == "embed_positions" for tensor in family.tensors)
    if not isinstance(config.get("rope_parameters"), Mapping) and not learns_positions:
        from tritter.core.families.discovery.configs import StockConfig  # imports transformers

        # Keys of earlier releases (rope_theta, rope_scaling) become rope_parameters
        kept = {key: config[key] for key in ("architectures",) if key in config}
        source = source.changed({**StockConfig(config).full, **kept})
        config = source.config
    reason = ""
    if not _parameters(config) or config.get("alibi"):
        reason = f"{family.model_type} has no rotary embeddings that config.json could scale"
    elif source.position_limit is None:
        reason = f"config.json of {family.model_type} does not set {family.positions_key}"
    elif damage := _damage(_scaled(_parameters(config))):
        reason = f"config.json: {damage}"
    elif not _scaled(_parameters(config)):
        reason = "it has rotary embeddings in layers with a window only, which need no longer ones"
    if reason:
        raise RequestError(Problem(_KEY, reason=reason))
    return source


def _parameters(config: Config) -> Mapping[str, Any]:
    found = config.get("rope_parameters")
    return found if isinstance(found, Mapping) else {}


def _scaled(parameters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return kind of layer → its rotary parameters to scale; "" for one kind in all layers."""
    nested = {name: each for name, each in parameters.items() if isinstance(each, Mapping)}
    if not nested:
        return {"": parameters}
    return {name: each for name, each in nested.items() if name != _LOCAL}


def _damage(scaled: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the problem of rotary parameters, or an empty text."""
    for name, parameters in scaled.items():
        place = ".".join(["rope_parameters", *([name] if name else [])])
        for key in _NUMBERS:
            value: Any = parameters.get(key)
            is_needed = key == "rope_theta" and (key in parameters or bool(name))
            if value is None and not is_needed:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < inf:
                return f"{place}.{key} = {brief(value)}; must be a number above 0"
        if not isinstance(kind := parameters.get("rope_type", "default"), str):
            return f"{place}.rope_type = {brief(kind)}; must be a name"
    return ""


def _change(target: Config, source: Config) -> str:
    """Return the change of the rotary parameters as text."""
    after = next(iter(_scaled(_parameters(target)).values()))
    if after["rope_type"] == "yarn":
        first = after["original_max_position_embeddings"]
        return f"YaRN with factor {after['factor']:g} over {first:,} positions"
    before = next(iter(_scaled(_parameters(source)).values()), {}).get("rope_theta")
    return f"θ {f'{before:,.0f} → ' if before else ''}{after['rope_theta']:,.0f}"
