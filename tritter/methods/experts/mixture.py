"""A mixture of LoRA experts on a live model: adapters, a router in each layer, and the gates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from tritter.checkpoints.expert_files import AdapterShape, RouterKind
from tritter.core.families import Adapters, Flops, LowRank, StoredTensor, forward_flops
from tritter.core.models import backbone_of, cache_in, model_of
from tritter.core.parameter_map import AxisFactor, Fill, TensorMap
from tritter.core.parameter_map.axis_map import NO_SOURCE
from tritter.data.chat import ids_of, is_padding
from tritter.data.packing import DocumentMask
from tritter.errors import RequestError, did_you_mean
from tritter.evaluation.inference import eval_mode
from tritter.methods.experts.adapters import (
    Factors,
    LoraLayers,
    is_of_adapter,
    layer_number,
)
from tritter.methods.experts.gates import Gates, Routing, usage
from tritter.training.parameters import WRAPPED, flops_of_sequence, live_layout
from tritter.transform import Change
from tritter.transform.change import declared

# Evidence: naive Bayes on the counts of tokens so far, as router logits.
#
# These gates have no gradient and need no old data to be retained: a skill is identified by its
# token frequencies. Each token contributes the log-ratio of its probabilities under two skills.
#
# B sequences · T tokens · n experts · V vocabulary

_NO_TOKEN = -1  # marks padding
_STRENGTH = 1000.0  # pseudo-counts of the mean skill that smooth each skill
# Attributes of a key-value cache: the latest tokens that it covers, int64 [B, ≤ window], and the
# number of all
_SEEN, _NUM_SEEN = "seen_by_experts", "num_seen_by_experts"
_LEAST = -8.0  # minimum of a logit relative to the largest, so that no gate vanishes
ROUTER, _EVIDENCE = "expert_router", "expert_evidence"
_BASE_EXPERT = "base"
_MIXTURE = "expert_mixture"


class Evidence(nn.Module):
    """Router logits [B, T, n] of token ids [B, T].

    Up to a constant shared by all experts, a logit is prior + scale · Σ log p(token | expert) over
    the last `window` tokens of the document, the current one included. Documents start after an
    end-of-text token or the start of a text; where it is not among these tokens, the prior is
    `inner_prior`. If an end-of-text token also ends the turns of conversations, these are documents
    as a whole. The scale is small because neighbouring tokens are dependent. p is computed from
    counts, smoothed by the mean of all skills (Dirichlet): unseen tokens are no evidence.

    Args:
        vocab_size: V.
        end_of_text_id: None: a sequence is one document.
        start_ids: further tokens in front of a document.
        window: number of tokens that count.
        scale: of the sum.
        prior: of every expert except the first, in nats.
        inner_prior: the same, where the start of the document is out of sight. None: `prior`.

    Attributes:
        counts: int64 [n, V], number of occurrences of each token in the data of each expert.
    """

    counts: Tensor

    def __init__(
        self,
        vocab_size: int,
        *,
        end_of_text_id: int | None = None,
        start_ids: Sequence[int] = (),
        window: int = 128,
        scale: float = 0.5,
        prior: float = -1.0,
        inner_prior: float | None = None,
    ) -> None:
        super().__init__()
        self.end_of_text_id, self.start_ids = end_of_text_id, tuple(start_ids)
        self.window, self.scale, self.prior = window, scale, prior
        self.inner_prior = inner_prior
        # Integers are not rounded if the model's dtype changes
        self.register_buffer("counts", torch.zeros(0, vocab_size, dtype=torch.int64))
        self._table: tuple[tuple[int, int, torch.device], Tensor, bool] | None = None

    def forward(self, ids: Tensor, is_first: Tensor | None = None) -> Tensor:
        """Return logits [B, T, n] in float64; the maximum of each token is 0.

        Args:
            ids: int64 [B, T]; _NO_TOKEN for padding.
            is_first: bool [B, T], tokens at position 0. None: unknown.
        """
        number, (_, length) = len(self.counts), ids.shape
        is_between = self.is_between(ids, is_first)
        is_start = (ids == _NO_TOKEN) | is_between  # the same for all skills
        log_likelihoods = self._statistics()[1][:, ids.clamp_min(0)].permute(1, 2, 0)  # [B, T, n]
        sums = (log_likelihoods * ~is_start.unsqueeze(-1)).cumsum(1)
        positions = torch.arange(length, device=ids.device)
        begins = is_start if is_first is None else is_start | is_first
        begin = (positions * begins).cummax(dim=1).values  # start of the document
        first = torch.maximum(begin, positions - self.window + 1)  # [B, T], first token that counts
        before = pad(sums, (0, 0, 1, 0)).gather(1, first.unsqueeze(-1).expand(-1, -1, number))
        logits = self.scale * (sums - before)
        prior = torch.full_like(begin, self.prior, dtype=logits.dtype)  # [B, T]
        if self.inner_prior is not None and self.end_of_text_id is not None:
            is_in_sight = is_between.gather(1, begin) & (first == begin)
            prior = torch.where(is_in_sight, prior, self.inner_prior)
        is_other = torch.arange(number, device=ids.device) > 0
        logits = logits + prior.unsqueeze(-1) * is_other
        return (logits - logits.amax(-1, keepdim=True)).clamp_min(_LEAST)

    def is_between(self, ids: Tensor, is_first: Tensor | None = None) -> Tensor:
        """Return whether each token is outside of the text of documents; padding is inside.

        Args:
            ids: int64 [B, T].
            is_first: as in `forward`.
        """
        if self.end_of_text_id is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        is_end = ids == self.end_of_text_id
        if self._ends_turns:
            before = pad(ids[..., :-1], (1, 0), value=_NO_TOKEN)
            is_end &= before == _NO_TOKEN if is_first is None else is_first
        starts = torch.tensor(self.start_ids, dtype=torch.int64, device=ids.device)
        return is_end | torch.isin(ids, starts)

    @property
    def _ends_turns(self) -> bool:
        """Whether the end of text is also part of documents, as in many chat templates."""
        return self._statistics()[2]

    def _statistics(self) -> tuple[tuple[int, int, torch.device], Tensor, bool]:
        """Return the version of the counts, log p(token | expert) [n, V], and `_ends_turns`."""
        if self.counts.is_inference():  # made under torch.inference_mode(), without a version
            with torch.inference_mode(False):
                self.counts = self.counts.clone()
        version = (id(self.counts), self.counts._version, self.counts.device)
        if self._table is None or self._table[0] != version:
            counts = self.counts.double()
            totals, size = counts.sum(1, keepdim=True), counts.shape[1]
            mean = ((counts + 0.5) / (totals + 0.5 * size)).mean(0)
            table = ((counts + _STRENGTH * mean) / (totals + _STRENGTH)).log()
            end = self.end_of_text_id
            self._table = version, table, end is not None and bool(counts[:, end].any())
        return self._table

    def add_row(self) -> None:
        """Add a row for an expert without counts."""
        self.counts = torch.cat([self.counts, self.counts.new_zeros(1, self.counts.shape[1])])
        self._table = None

    def keep_rows(self, kept: Sequence[int]) -> None:
        """Keep the rows of these experts, in this order."""
        self.counts = self.counts[list(kept)].clone()
        self._table = None

    def count(self, number: int, ids: Tensor) -> None:
        """Count tokens, int64 of any shape, for an expert; those between texts are ignored."""
        is_outside = is_padding(ids)  # that of _NO_TOKEN, too
        if (end := self.end_of_text_id) is not None:  # ends of turns are marked
            is_outside |= (ids == end) | ((ids_of(ids) != end) & self.is_between(ids_of(ids)))
        found = ids_of(ids)[~is_outside]
        self.counts[number] += torch.bincount(found, minlength=self.counts.shape[1]).to(self.counts)


def _num_tokens(cache: Any) -> int:
    """Return the number of tokens of a cache; without attention, 1 if it has a state, else 0."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return int(cache.has_previous_state())


def _reordered(cache: Any, reorder: Callable[[Tensor], None], beams: Tensor) -> None:
    """Reorder the tokens of a cache with its beams."""
    reorder(beams)
    seen: Tensor = getattr(cache, _SEEN)
    setattr(cache, _SEEN, seen.index_select(0, beams.to(seen.device)))


class ExpertRouter(nn.Module):
    """Logits of n experts for each token.

    The hidden state is normalised to a root mean square of 1, so that logits have the same scale in
    all layers. It depends only on tokens up to its own, so routing is causal.

    Args:
        hidden_size: H.
        num_experts: n.

    Attributes:
        weight: [n, H]; `bias`: [n]. Zero at first: all experts have equal gates.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [B, T, n] for hidden states [B, T, H], in float32 or wider."""
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype))


class _Mix:
    """The gates of a forward pass, for the linear layers that share them."""

    def __init__(self, router: ExpertRouter | None = None) -> None:
        self.router = router
        self.gates: Gates | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without gates, which may belong to a graph
        return {"router": self.router, "gates": None}


def _keep_gates(mix: _Mix, layer: nn.Module, args: Sequence[Any]) -> None:
    """Let activation checkpointing recompute a layer with the gates of the pass that it repeats.

    Stock layers are recomputed without their hooks, perhaps after further passes.
    """
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    is_ours = isinstance(checkpoint, partial) and checkpoint.func is _checkpointed
    if checkpoint is not None and not is_ours:
        layer._gradient_checkpointing_func = partial(_checkpointed, mix, checkpoint)  # type: ignore[assignment]


def _checkpointed(
    mix: _Mix, checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any
) -> Any:
    own = mix.gates
    is_reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant")
    if is_reentrant and own is not None and own.weights.requires_grad:
        raise RequestError(
            "use_reentrant = True: reentrant checkpointing can't differentiate a router that "
            "learns; set use_reentrant=False."
        )

    def run_again(*inputs: Any) -> Any:
        latest, mix.gates = mix.gates, own
        try:
            return run(*inputs)
        finally:
            mix.gates = latest

    return checkpoint(run_again, *args)


class ExpertMixture:
    """LoRA experts on a model, mixed per token in one forward pass.

    The base is frozen. The mixture is attached by hooks: calling the model runs it, and the output
    has the type of the stock class.

    Args:
        model: a causal language model with decoder layers `…layers.N`, `…h.N` or `…blocks.N`.
        router: source of the gates: `learned`, a linear map of the hidden state in each layer;
            `evidence`, see `Evidence`, for all layers and the vocabulary; or `both`, the sum of
            their logits.
        has_base: the first expert is the base itself, and adds nothing.
        is_shared: one learned router for all layers instead of one per layer.
        evidence: keyword arguments of `Evidence`.

    Attributes:
        lora: the layers with adapters.
        names: the experts, in the order of the gates.
        routing: how logits are converted to gates.
        evidence: token counts; None if the router is `learned`.
        extra: state that a run leaves for the next one, as plain values and tensors.

    Raises:
        RequestError: the model already has adapters or experts, or has no decoder layers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        router: RouterKind = "learned",
        has_base: bool = False,
        is_shared: bool = False,
        evidence: Mapping[str, Any] | None = None,
    ) -> None:
        self.lora = LoraLayers(model)
        if names := ", ".join(self.lora.adapters):
            raise RequestError(f"the model already has adapters: {names}")
        layers = self.lora.decoder_layers()
        if not layers:
            raise RequestError("the model has no decoder layers named layers.N, h.N or blocks.N.")
        self.model = model
        vars(model)[_MIXTURE] = self
        self.names: list[str] = [_BASE_EXPERT] if has_base else []
        self.routing = Routing()
        self.router: RouterKind = router
        self.has_base, self.is_shared = has_base, is_shared
        self.evidence: Evidence | None = None
        self.extra: dict[str, Any] = {}
        self._only_expert: str | None = None
        self._excluded: str | None = None
        self._is_off = False
        self._seen: Tensor | None = None  # token ids [B, ≥ T] of the forward pass
        self._hooked: set[str] = set()
        model.requires_grad_(False)
        self._whole = _Mix()  # for modules outside the layers, or shared by all
        text_config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        if router != "learned":
            # Evidence is computed from the inputs of the backbone
            self.evidence = Evidence(text_config.vocab_size, **(evidence or {}))
            if has_base:
                self.evidence.add_row()
            model.add_module(_EVIDENCE, self.evidence.to(next(model.parameters()).device))
            model.register_forward_pre_hook(_refuse_chosen_logits, with_kwargs=True)
            backbone = backbone_of(model)
            backbone.register_forward_pre_hook(self._read, with_kwargs=True)
            backbone.register_forward_hook(self._cache_tokens, with_kwargs=True)
        self._mixes = dict.fromkeys(layers, self._whole)
        for number, layer in layers.items() if router != "evidence" else ():
            owner = model if is_shared else layer
            if not hasattr(owner, ROUTER):
                made = ExpertRouter(text_config.hidden_size, len(self.names)).to(
                    next(model.parameters()).device
                )
                owner.add_module(ROUTER, made)
            mix = _Mix(owner.get_submodule(ROUTER))  # type: ignore[arg-type]
            self._mixes[number] = mix
            layer.register_forward_pre_hook(partial(self._route, mix), with_kwargs=True)
        for number, layer in layers.items():
            layer.register_forward_pre_hook(partial(_keep_gates, self._mixes[number]))

    def add(self, name: str, shape: AdapterShape, *, seed: int) -> None:
        """Add an expert with zero output (B = 0) and router rows of zeros.

        Raises:
            RequestError: the name is already in use, or a target does not exist in the model.
        """
        self.open(name, shape, seed=seed)
        self.add_router_rows()

    def add_router_rows(self) -> None:
        """Add zero rows to the learned routers, for an expert that was opened."""
        for router in self.routers():
            for key, old in list(router.named_parameters()):
                rows = torch.cat([old.detach(), old.new_zeros(1, *old.shape[1:])])
                setattr(router, key, nn.Parameter(rows, requires_grad=old.requires_grad))

    def remove(self, name: str) -> None:
        """Remove an expert with its router rows.

        Raises:
            RequestError: there is no expert of this name, or no other one.
        """
        self.check_removable(name)
        kept = [number for number, each in enumerate(self.names) if each != name]
        self.close(name)
        for router in self.routers():
            for key, old in list(router.named_parameters()):
                rows = old.detach()[kept].clone()
                setattr(router, key, nn.Parameter(rows, requires_grad=old.requires_grad))

    def open(self, name: str, shape: AdapterShape, *, seed: int) -> None:
        """Add an expert's adapter; the caller adds its router rows."""
        if name in self.names:
            raise RequestError(f"the model already has an adapter {name}.")
        outside = self.lora.adaptable() - self.lora.adaptable(whole=False)
        vocabulary = [target for target in shape.targets if target in outside]
        if vocabulary and self.evidence is None:
            raise RequestError(
                f"experts.targets = {vocabulary[0]}: a learned router needs hidden states, which "
                "the vocabulary does not have; use experts.router=evidence or both."
            )
        self.lora.add(name, shape, seed=seed)
        self.names.append(name)
        if self.evidence is not None:
            self.evidence.add_row()
        for layer_name, layer in self.lora:
            if layer_name not in self._hooked:
                layer_at = layer_number(layer_name)
                mix = self._whole if layer_at is None else self._mixes[layer_at]
                layer.register_forward_hook(partial(self._add, mix))
                self._hooked.add(layer_name)

    def close(self, name: str) -> None:
        """Remove an expert's adapter; the caller removes its router rows."""
        self.lora.remove(name)
        if self.evidence is not None:
            self.evidence.keep_rows([n for n, each in enumerate(self.names) if each != name])
        self.names.remove(name)

    def check_removable(self, name: str) -> None:
        """Raise a RequestError if there is no expert of this name, or no other one."""
        self._check_known(name)
        if len(self.names) == 1:
            raise RequestError(f"{name} is the only expert; a mixture needs at least one.")
        if self.has_base and name == _BASE_EXPERT:
            raise RequestError(f"{name} is the base itself, which can't be removed.")

    def spawn_change(self, name: str) -> Change:
        """Return the change of a model in training that adds the last expert, once it is open.

        All other parameters, their moments and other state are unchanged, bit for bit; as in the
        next two. Its router rows are zero.
        """
        parts = _Parts()
        for key, parameter in self.lora.parameters(name).items():
            values = parameter.detach().clone()
            parts.create(key, tuple(values.shape), Fill(kind="given", values=values))
        parts.follow_routers(self, [*range(len(self.names) - 1), NO_SOURCE])
        return parts.change()

    def evict_change(self, name: str) -> Change:
        """Return the change that removes an expert's weights, with its router rows.

        Close its adapter afterwards.

        Raises:
            RequestError: there is no expert of this name, or no other one.
        """
        self.check_removable(name)
        parts = _Parts()
        for key, parameter in self.lora.parameters(name).items():
            parts.remove(key, tuple(parameter.shape))
        parts.follow_routers(self, [n for n, each in enumerate(self.names) if each != name])
        return parts.change()

    def widen_change(self, name: str, rank: int, *, seed: int) -> Change:
        """Return the change that gives an expert a larger rank; the function is preserved.

        New rows of A are random and new columns of B are zero (reversed in an embedding), as PEFT
        initialises them. α / r is kept; call `lora.set_rank` afterwards.

        Raises:
            RequestError: the rank is not larger than the current one.
        """
        own = self.lora.shape(name).rank
        if rank <= own:
            raise RequestError(
                f"{name} already has rank {own}; the new rank {rank} must be larger."
            )
        source = torch.cat([torch.arange(own), torch.full((rank - own,), NO_SOURCE)])
        axis, parts = _plain_factor(source), _Parts()
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in self.lora.parameters(name).items():
            if ".lora_A." in key:
                # Kaiming uniform initialisation with a = √5, as in PEFT
                bound = sqrt(1 / parameter.shape[1])
                drawn = torch.rand(rank - own, parameter.shape[1], generator=generator)
                fill = Fill(kind="given", values=(2 * drawn - 1) * bound)
                parts.follow(self.model, key, (axis, None), fill)
            elif ".lora_embedding_A." in key:
                parts.follow(self.model, key, (axis, None), Fill())
            elif ".lora_embedding_B." in key:
                drawn = torch.randn(parameter.shape[0], rank - own, generator=generator)
                parts.follow(self.model, key, (None, axis), Fill(kind="given", values=drawn))
            else:
                parts.follow(self.model, key, (None, axis), Fill())
        return parts.change()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The experts with an adapter: all except the base."""
        return tuple(self.names[1:] if self.has_base else self.names)

    def step_flops(self) -> Flops:
        """Return the model FLOPs of a training step on one sequence, for the present parameters.

        Counted as in `tritter.core.families.flops`. With `top_k`, each expert is counted with an
        even share of the tokens. Table look-ups of evidence are free.
        """
        return flops_of_sequence(self.model, adapters=self._counted_adapters())

    def reading_flops(self) -> Flops:
        """Return the model FLOPs of reading one sequence, output head included."""
        return forward_flops(model_of(self.model), adapters=self._counted_adapters())

    def _counted_adapters(self) -> Adapters:
        """Return the adapters and routers, for counting FLOPs."""
        number, top_k = len(self.names), self.routing.top_k
        share = 1 if top_k is None or top_k >= number else top_k / number
        model, matrices, low_rank = self.model, {}, {}
        for stored in live_layout(model):  # name of a layer with adapters → its logical matrices
            layer_name, is_wrapped, _ = stored.name.partition(f"{WRAPPED}.weight")
            if is_wrapped:
                matrices[layer_name] = [part.tensor.name for part in stored.parts]
        head = model.get_output_embeddings()  # type: ignore[operator]
        # A tied head has the weight of the embedding
        matrices |= {name: ["head"] for name, layer in self.lora if layer is head}
        for name, layer in self.lora:
            adapters = [
                LowRank(
                    rank=each.rank,
                    trains_down=each.down.requires_grad,
                    trains_up=each.up.requires_grad,
                    share=share,
                )
                for expert in self.adapters
                if (each := Factors.of(layer, expert)) is not None
            ]
            first, *others = matrices[name]
            low_rank[first] = adapters
            low_rank |= {
                other: [replace(each, has_down=False) for each in adapters] for other in others
            }
        gating = {}
        for n, decoder_layer in self.lora.decoder_layers().items():
            router = getattr(decoder_layer, ROUTER, None) or getattr(model, ROUTER, None)
            if router is not None:
                gating[n] = number, router.weight.requires_grad
        return Adapters(low_rank, gating)

    def base_state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the base, by the names that the stock class reads."""
        return {
            name.replace(f"{WRAPPED}.", "."): value
            for name, value in self.model.state_dict().items()
            if not (is_of_adapter(name) or ROUTER in name or _EVIDENCE in name)
        }

    def routers(self) -> Iterator[ExpertRouter]:
        """Yield the learned routers; a shared one only once."""
        found = dict.fromkeys(mix.router for mix in self._mixes.values())
        yield from (router for router in found if router is not None)

    def router_names(self) -> Iterator[str]:
        """Yield the module names of the learned routers."""
        names = (name for name, _ in self.model.named_modules())
        yield from (name for name in names if name.rpartition(".")[2] == ROUTER)

    def gates(self, kept: Tensor | None = None) -> list[Gates]:
        """Return the gates of the last forward pass per layer; gates shared by layers only once.

        Empty without routers.

        Args:
            kept: bool [B, T], the tokens whose gates to return, as [N, n]; None: all, [B, T, n].
        """
        found = [mix.gates for mix in dict.fromkeys(self._mixes.values())]
        return [gates if kept is None else gates.of(kept) for gates in found if gates is not None]

    def mean_gates(self, texts: Sequence[Tensor]) -> dict[str, float]:
        """Return expert → mean gate over layers and tokens, with equal weight per batch of data.

        Args:
            texts: int64 [B, T] each, at least one.
        """
        found = torch.zeros(len(self.names), dtype=torch.float64)
        with eval_mode(self.model) as device:
            for each in texts:
                for ids in each.to(device).split(1):  # logits take much memory
                    self.model(input_ids=ids, use_cache=False)
                    found += usage(self.gates()).double().cpu() / (len(each) * len(texts))
        return dict(zip(self.names, found.tolist(), strict=True))

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Context manager in which one expert processes every token with a gate of 1."""
        self._check_known(name)
        before, self._only_expert = self._only_expert, name
        try:
            yield
        finally:
            self._only_expert = before

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Context manager that excludes an expert, which must not be the only one."""
        self._check_known(name)
        if len(self.names) == 1:
            raise RequestError(f"{name} is the only expert, so it can't be excluded.")
        before, self._excluded = self._excluded, name
        try:
            yield
        finally:
            self._excluded = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context manager that disables all experts."""
        before, self._is_off = self._is_off, True
        try:
            yield
        finally:
            self._is_off = before

    def _check_known(self, name: str) -> None:
        if name not in self.names:
            raise RequestError(
                f"no expert {name}; the experts are {', '.join(self.names) or 'none'}."
                f"{did_you_mean(name, self.names)}"
            )

    def _read(self, backbone: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Compute evidence from the tokens of a forward pass, and earlier tokens in the cache."""
        self._whole.gates = self._seen = None
        if self._is_off or not self.names:
            return
        marked = args[0] if args else kwargs.get("input_ids")
        if marked is None:
            raise RequestError("experts.router=evidence needs token ids (input_ids).")
        ids = ids_of(marked)
        if self._only_expert is not None:
            self._whole.gates = self._only(ids, self._only_expert)
            return
        seen, mask, cache = ids, kwargs.get("attention_mask"), cache_in(kwargs)
        if mask is not None and mask.ndim == 2:
            seen = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, _NO_TOKEN)
        if cache is not None and (number := _num_tokens(cache)):
            earlier: Tensor | None = getattr(cache, _SEEN, None)
            is_whole = getattr(cache, _NUM_SEEN, None) == number
            if earlier is None or not is_whole or len(earlier) != len(ids):
                raise RequestError(
                    "experts.router=evidence: the key-value cache covers tokens that were not read "
                    "with these experts, or was cropped, as in assisted generation; set "
                    "use_cache=False."
                )
            seen = torch.cat([earlier.to(ids.device), seen], dim=1)
        self._seen = seen
        assert self.evidence is not None
        is_asked = self.evidence._ends_turns and seen.shape == ids.shape  # no earlier tokens
        is_first = self._is_first(marked, kwargs) if is_asked else None
        # Between documents, all new skills have equal logits, and a choice would be arbitrary
        logits = self.evidence(seen, is_first)
        is_dense = self.evidence.is_between(seen, is_first)
        own = slice(-ids.shape[1], None)
        self._whole.gates = self._gates_of(
            logits[:, own], is_training=backbone.training, is_dense=is_dense[:, own]
        )

    def _is_first(self, marked: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return whether each token of a forward pass is the first of a document, if known."""
        options = {**kwargs, "input_ids": marked}
        if (document_mask := DocumentMask.of(self.model)) is not None:
            _, options = document_mask(self.model, (), options) or ((), options)
        positions = options.get("position_ids")
        if positions is None or positions.ndim != 2:
            return None
        return (positions == 0).expand_as(marked)

    def _cache_tokens(
        self, backbone: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Store the tokens that were read in the key-value cache."""
        cache = cache_in(output) if isinstance(output, Mapping) else None
        if self._seen is None or self.evidence is None or cache is None:
            return
        if not hasattr(cache, _SEEN):
            cache.reorder_cache = partial(_reordered, cache, cache.reorder_cache)
        # Later tokens depend only on these
        setattr(cache, _SEEN, self._seen[:, -self.evidence.window :])
        setattr(cache, _NUM_SEEN, _num_tokens(cache))

    def _route(
        self, mix: _Mix, layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        mix.gates = None
        if self._is_off or not self.names:
            return
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self._only_expert is not None:
            mix.gates = self._only(hidden[..., 0], self._only_expert)
            return
        assert mix.router is not None
        logits = mix.router(hidden)
        if self._whole.gates is not None:
            logits = logits + self._whole.gates.logits.to(logits)
        mix.gates = self._gates_of(logits, is_training=layer.training)

    def _gates_of(
        self, logits: Tensor, *, is_training: bool, is_dense: Tensor | None = None
    ) -> Gates:
        if self._excluded is not None:
            indices = torch.arange(len(self.names), device=logits.device)
            logits = logits.masked_fill(indices == self.names.index(self._excluded), -torch.inf)
        return self.routing.gates(logits, is_training=is_training, is_dense=is_dense)

    def _only(self, tokens: Tensor, expert: str) -> Gates:
        """Return the gates if one expert processes every token of [B, T]."""
        weights = torch.zeros(*tokens.shape, len(self.names), device=tokens.device)
        weights[..., self.names.index(expert)] = 1.0
        return Gates(weights, weights.bool(), weights, weights)

    def _add(self, mix: _Mix, layer: Any, args: Sequence[Any], output: Tensor) -> Tensor:
        if mix.gates is None:
            return output
        found = {n: each for n, name in enumerate(self.names) if (each := Factors.of(layer, name))}
        if not found:
            return output
        return output + mix.gates.output(args[0], found).to(output.dtype)


def mixture_on(model: nn.Module) -> ExpertMixture | None:
    """Return the mixture on a live model; None: there is none."""
    return vars(model).get(_MIXTURE)


def _refuse_chosen_logits(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuse chosen positions of the head, whose gates would be unknown."""
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise RequestError("logits_to_keep: with experts, it must be a number of last tokens.")


class _Parts:
    """A change under construction."""

    def __init__(self) -> None:
        self._before: list[StoredTensor] = []
        self._after: list[StoredTensor] = []
        self._maps: dict[str, TensorMap] = {}

    def create(self, name: str, shape: tuple[int, ...], fill: Fill) -> None:
        self._after.append(declared(name, shape))
        self._maps[name] = TensorMap.created(shape, fill)

    def remove(self, name: str, shape: tuple[int, ...]) -> None:
        self._before.append(declared(name, shape))

    def follow(
        self, model: nn.Module, name: str, axes: tuple[AxisFactor | None, ...], fill: Fill
    ) -> None:
        before = tuple(model.get_parameter(name).shape)
        sizes = zip(before, axes, strict=True)
        after = tuple(n if axis is None else len(axis.index) for n, axis in sizes)
        self._before.append(declared(name, before))
        self._after.append(declared(name, after))
        self._maps[name] = TensorMap(source=name, axes=axes, fill=fill)

    def follow_routers(self, mixture: ExpertMixture, source: Sequence[int]) -> None:
        axis = _plain_factor(torch.tensor(source))
        for router in mixture.router_names():
            self.follow(mixture.model, f"{router}.weight", (axis, None), Fill())
            self.follow(mixture.model, f"{router}.bias", (axis,), Fill())

    def change(self) -> Change:
        return Change(
            model=None, before=tuple(self._before), after=tuple(self._after), tensors=self._maps
        )


def _plain_factor(source: Tensor) -> AxisFactor:
    """Return the factor of an axis whose coordinates are kept, dropped or new, without scaling."""
    kept = (source != NO_SOURCE).double()
    return AxisFactor(source, kept, kept)
