"""Open the models whose FFNs become experts, and compute router rows from their training data."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import combinations, islice
from threading import Lock
from typing import TYPE_CHECKING, cast

import torch

from tritter.checkpoints import Source
from tritter.checkpoints.history import Link
from tritter.checkpoints.location import require_plain
from tritter.checkpoints.record import LearnedDomain
from tritter.core.expansions import BoundMoe, ExpansionSpec, Moe
from tritter.core.expansions.moe_children import router_rows
from tritter.core.families import forward_flops
from tritter.core.families.config_file import read_model_file
from tritter.data.chat import ids_of
from tritter.data.tokens import PretrainedTokenizer, TokenisedDocuments
from tritter.errors import Problem, RequestError, TritterError, refused
from tritter.storage.hashing import file_digest, merkle_hash
from tritter.storage.hub import locate
from tritter.storage.reading import TOKENIZER_NAME, named_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform.change import PlannedExpansion

_FROM = "expansion.moe.experts_from"
# Keys of config.json that do not change the function
_FREE = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"}
_ROUTER_TOKENS, _ROUTER_LENGTH, _BATCH = 8192, 256, 8  # of each child's data


@dataclass(frozen=True, slots=True, eq=False)
class _OpenChild:
    """An open checkpoint that was trained from the source.

    Args:
        name: as the user named it.
        source: the checkpoint.
        model_hash: hash of its tensors.
        domains: the training data that distinguishes it.
    """

    name: str
    source: Source
    model_hash: str
    domains: Mapping[str, LearnedDomain]

    def read(self, name: str) -> Tensor:
        return self.source.read(name)


def bound_children(spec: ExpansionSpec, source: Source) -> BoundMoe:
    """Return `moe` bound to the models of `experts_from`."""
    assert isinstance(spec, Moe) and spec.experts_from is not None
    children = tuple(_open(name, source) for name in spec.experts_from)
    hashes = tuple(child.model_hash for child in children)
    for first, second in combinations(children, 2):
        if first.model_hash == second.model_hash:
            reason = f"{first.name} and {second.name} are the same model; list it once"
            raise RequestError(Problem(_FROM, list(spec.experts_from), reason=reason))
    if spec.expert_hashes not in (None, hashes):
        reason = f"the models in {_FROM} have other hashes: {', '.join(hashes)}"
        raise refused("expansion.moe.expert_hashes", list(spec.expert_hashes), reason)
    shared = spec.shared_models(children)
    same = shared or tuple(each for each in children if each.model_hash == _hash_of(source))
    recorded = {name: _absolute(name) for name in spec.experts_from}
    options = replace(
        spec,
        expert_hashes=hashes,
        experts_from=tuple(recorded.values()),
        attention_from=recorded.get(spec.attention_from or "", spec.attention_from),
    )
    made = BoundMoe(
        options=options,
        experts=children,
        shared=shared,
        kept=same[0] if len(same) == 1 else None,
        routers=None,
        remarks=(),
    )
    if spec.router == "random":
        return replace(made, remarks=("router: random rows",))
    problem = _data_problem(children) or _same_data(children)
    if problem is None:
        names = "; ".join(f"{child.name}: {', '.join(child.domains)}" for child in children)
        remark = f"router rows from training documents of each model ({names})"
        return replace(made, routers=_Rows(source, made), remarks=(remark,))
    if spec.router == "data":
        raise RequestError(Problem("expansion.moe.router", "data", reason=f"{problem}; use random"))
    return replace(made, remarks=(f"router: random rows, because {problem}",))


def _absolute(name: str) -> str:
    """Return the path of a folder for the record, since a recipe may be used from another one."""
    folder = named_path(name, key=_FROM)
    return str(folder.absolute()) if folder.exists() else name


def _open(name: str, source: Source) -> _OpenChild:
    """Open a model and check that it was trained from the source."""
    folder = locate(name, key=_FROM)
    try:
        require_plain(folder, doing="an expansion", key=_FROM)
        child = Source.open(folder, read_model_file(folder))
        reason = _difference(child, source) or _lineage_problem(child, source)
    except TritterError as error:
        raise RequestError(f"{_FROM}: {error}") from error
    if reason:
        raise RequestError(Problem(_FROM, name, reason=reason))
    lineage, before = child.own_lineage if child.lineage else None, source.lineage
    known = {} if before is None else before.domains
    learned = {} if lineage is None else lineage.domains
    own = {n: domain for n, domain in learned.items() if known.get(n) != domain}
    return _OpenChild(name, child, _hash_of(child), own or learned)


def _hash_of(source: Source) -> str:
    lineage = source.lineage
    return merkle_hash(source.read_digests()) if lineage is None else lineage.model_hash


def _difference(child: Source, source: Source) -> str:
    """Return a difference that rules out a common model of both; empty without one."""
    if child.model.model_type != source.model.model_type:
        return f"it is a {child.model.model_type}, the source a {source.model.model_type}"

    if child.model.shapes != source.model.shapes:
        return "its tensors have other shapes than those of the source"
    before, after = (read_model_file(each.folder).config for each in (source, child))
    for key in sorted(before.keys() & after.keys() - _FREE):
        if before[key] != after[key]:
            return f"its config.json has {key} = {after[key]}, the source {before[key]}"
    files = [each.folder / TOKENIZER_NAME for each in (source, child)]
    tokenizers = [file_digest(file) if file.is_file() else None for file in files]
    if tokenizers[0] != tokenizers[1]:
        return f"its {TOKENIZER_NAME} is not that of the source, so its tokens differ"
    return ""


def _lineage_problem(child: Source, source: Source) -> str:
    """Return the reason that a lineage does not show training from the source; empty if it does."""
    wanted = _hash_of(source)
    if child.lineage is None:
        if _hash_of(child) == wanted:
            return ""
        return (
            "it has no tritter.json that shows that it was trained from the source; train it "
            "with train.py model=hf model.path=SOURCE"
        )
    hashes: set[str | None] = set()
    history = () if source.lineage is None else source.lineage.expansion_history
    chain = Link.chain(child.folder)
    for link in chain:
        hashes.add(link.model_hash)
        if link.lineage is not None:
            hashes |= {link.lineage.parent_hash, link.lineage.base_model_hash}
    if wanted not in hashes and chain[0].folder is None and chain[0].model_hash:
        return (
            f"its ancestor {chain[0].model_hash[:12]} was not found, so its lineage can't show "
            "that it was trained from the source; put that folder next to it"
        )
    if wanted not in hashes:
        return "its lineage does not contain the source: it was trained from another model"
    if len(child.lineage.expansion_history) != len(history):
        return "it was expanded after it left the source; only trained models can be mixed"
    return ""


# Router rows from data


def _data_problem(children: Sequence[_OpenChild]) -> str | None:
    """Return the reason that the training data of a child can't be read, or None."""
    problem_of = cache(LearnedDomain.problem)  # it reads all data; only now, since files can change
    for child in children:
        lineage = child.source.lineage
        if lineage is None or not child.domains or lineage.split is None:
            return f"the lineage of {child.name} records no training data"
        for name, domain in child.domains.items():
            if reason := problem_of(domain, lineage.split):
                return f"the data {name} of {child.name} can't be used: {reason}"
    return None


def _same_data(children: Sequence[_OpenChild]) -> str | None:
    """Return the names of two children that no data can distinguish, or None."""
    data = [{domain.sha256 for domain in child.domains.values()} for child in children]
    for first, second in combinations(range(len(children)), 2):
        if data[first] == data[second]:
            return f"{children[first].name} and {children[second].name} learned the same data"
    return None


def _texts(child: _OpenChild, name: str) -> Iterator[str]:
    """Yield the training documents of one domain; documents held out for validation are none."""
    domain, lineage = child.domains[name], child.source.own_lineage
    assert lineage.split is not None
    documents = domain.documents(lineage.split, key="data")
    return lineage.split.training_texts({name: documents}, [name])


def _child_sequences(child: _OpenChild, *, length: int, vocab_size: int) -> Tensor:
    """Return training tokens of a child's own domains, equally many of each, int64 [N, length].

    Documents are cut, so that many of them are read.
    """
    tokenizer = PretrainedTokenizer.read(child.source.folder, vocab_size=vocab_size)
    bounds = tokenizer.bounds
    wanted, tokens = _ROUTER_TOKENS // len(child.domains), list[int]()
    for name in child.domains:
        found: list[int] = []
        for text in islice(_texts(child, name), _ROUTER_TOKENS):
            ids = TokenisedDocuments.of_texts([text], tokenizer.tokenizer).tokens[:length].tolist()
            found += [*bounds.marked_start, *ids, bounds.end]
            if len(found) >= wanted:
                break
        tokens += found[:wanted]
    tokens = tokens[: max(1, len(tokens) // length) * length]
    return ids_of(bounds.begun(torch.tensor(tokens).view(-1, min(length, len(tokens)))))


@dataclass
class _Rows:
    """The router rows of all layers, computed once, when the first is read.

    The hidden states are those of the dense model in between, whose FFNs are the mean of the
    experts: it is closer to the mixture than any child, and the same for all data.

    Args:
        source: the parent.
        spec: the expansion.
        lengths: sequence length → number of sequences that were read.
    """

    source: Source
    spec: BoundMoe
    lengths: Counter[int] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)
    _found: tuple[Tensor, ...] = ()

    @cached_property
    def digest(self) -> str:
        """What determines the rows: the models, and the data of each."""
        parts = [_hash_of(self.source), str(_ROUTER_TOKENS), str(_ROUTER_LENGTH)]
        shared, children = (
            cast(tuple[_OpenChild, ...], each) for each in (self.spec.shared, self.spec.experts)
        )
        parts += [str(self.spec.options.layers), *(each.model_hash for each in shared)]
        for child in children:
            parts += [child.model_hash, *(each.sha256 for each in child.domains.values())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def rows(self, layer: int) -> Tensor:
        with self._lock:  # writer threads ask for several layers at once
            if not self._found:
                self._found = self._computed()
            return self._found[layer]

    @torch.no_grad()
    def _computed(self) -> tuple[Tensor, ...]:
        children = cast(tuple[_OpenChild, ...], self.spec.experts)
        if problem := _data_problem(children):  # it may have changed since the plan
            raise RequestError(Problem("expansion.moe.router", reason=problem))
        model, shapes = self._dense_model(), self.source.model
        length = min(_ROUTER_LENGTH, shapes.position_limit or _ROUTER_LENGTH)
        size = shapes.sizes.vocab_size
        means: list[list[Tensor]] = []
        within: list[Tensor] = []
        for child in children:
            tokens = _child_sequences(child, length=length, vocab_size=size)
            self.lengths[tokens.shape[1]] += len(tokens)
            means.append([])
            for layer, (mean, covariance) in enumerate(_ffn_moments(model, self._gates(), tokens)):
                means[-1].append(mean)
                if layer == len(within):
                    within.append(torch.zeros_like(covariance))
                within[layer] += covariance / len(children)  # all children would not fit
        of_layers = zip(zip(*means, strict=True), within, strict=True)
        return tuple(router_rows(torch.stack(each), total).float() for each, total in of_layers)

    def _gates(self) -> list[str]:
        """Return the module of each layer that reads the input of the FFN."""
        stored = self.source.model.layout("live")
        gates = [each.name for each in stored if each.parts[0].tensor.kind == "ffn.gate"]
        return [name.removesuffix(".weight") for name in gates]

    def _dense_model(self) -> nn.Module:
        from tritter.core.models import load_model

        model = load_model(self.source.folder)
        maps = self.spec.dense_map(self.source.model).tensors
        parameters = dict(model.named_parameters())
        for stored in self.source.model.layout("live"):
            if stored.name in parameters:
                parameters[stored.name].copy_(
                    stored.pack(lambda n: maps[n].rounded_weight(self.source.read, torch.float32))
                )
        return model.eval()


def _ffn_moments(
    model: nn.Module, modules: Sequence[str], tokens: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mean [H] and covariance [H, H], float64, of the inputs of each module.

    Args:
        model: the model.
        modules: names of modules that read all tokens.
        tokens: int64 [N, T].
    """
    totals: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}

    def add(name: str, _module: object, inputs: tuple[Tensor, ...]) -> None:
        wide = inputs[0].flatten(0, -2).double()
        total, product = wide.sum(dim=0), wide.T @ wide
        totals[name] = totals[name] + total if name in totals else total
        products[name] = products[name] + product if name in products else product

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in modules
    ]
    for batch in tokens.split(_BATCH):
        model(batch)
    for hook in hooks:
        hook.remove()
    for name in modules:
        mean = totals[name] / tokens.numel()
        yield mean, products[name] / tokens.numel() - mean.outer(mean)


def _router_data(plan: PlannedExpansion) -> Iterator[_Rows]:
    """Return the sources of router rows that a plan computes from data."""
    for step in plan.steps:
        rows = getattr(step.spec, "routers", None)
        if isinstance(rows, _Rows):
            yield rows


def router_bytes(plan: PlannedExpansion) -> int:
    """Return the memory that router rows from data take: model, logits and covariances."""
    sizes = plan.source.sizes
    logits = _BATCH * _ROUTER_LENGTH * sizes.vocab_size
    of_model = 4 * (plan.source.num_parameters + logits)  # float32
    layers = sizes.num_hidden_layers + 1  # one more for the next sum
    covariances = 2 * 8 * layers * sizes.hidden_size**2  # of one child, and the sum of all
    return sum(of_model + covariances for _ in _router_data(plan))


def router_flops(plan: PlannedExpansion) -> float:
    """Return the FLOPs of the router rows that were computed from data."""
    return sum(forward_flops(plan.source).of_all(each.lengths) for each in _router_data(plan))
