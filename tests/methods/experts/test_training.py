"""Dynamic experts in training: detection, recognition, growth, resume, two processes."""

import multiprocessing
import signal
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn

from tests import oracle
from tests.methods.experts.mixtures import mixture_of
from tests.training.killed import KillAt, Killed
from tests.training.test_fit import SCHEDULE, SETTINGS
from tests.training.test_surgery import assert_same
from tritter.config.folders import body_of, option_files
from tritter.core.models import model_of
from tritter.data.batches import BatchStream, SequenceStream
from tritter.data.chat import CONTEXT, ids_of
from tritter.data.packing import IGNORED, DocumentMask, MarkedText, labels_of
from tritter.data.tokens import TextBounds
from tritter.methods.experts import callback, gates
from tritter.methods.experts import module as module_of_experts
from tritter.methods.experts.callback import ExpertCallback, _limit_beginnings, expert_usage
from tritter.methods.experts.method import DynamicExperts
from tritter.methods.experts.module import ExpertModule
from tritter.methods.experts.options import DynamicOptions
from tritter.methods.experts.registry import ExpertRegistry
from tritter.methods.novelty import observe
from tritter.methods.novelty.observation import Observation
from tritter.targets import values_of
from tritter.terminal import Console
from tritter.training import FitResult, OptimizerSettings, Schedule, TrainerSettings, fit
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.fitting import start_method

FIRST = DynamicOptions.first
BATCH, LENGTH = 8, 12
ONE = replace(SETTINGS, save_every_n_steps=3)
TWO = replace(ONE, devices=2, strategy="ddp")
RANGES = {"old": (1, 30), "a": (40, 44), "b": (60, 64), "c": (80, 84)}  # of token ids
STREAM = "aaaaaaaabbbbbbbbaaaaoobb"
SLOW = pytest.mark.slow
needs_fork = pytest.mark.skipif(
    start_method("cpu") != "fork", reason="the tests' callbacks come by fork"
)


def dynamic_options(**changes: Any) -> DynamicOptions:
    """Return the options of the file, with rarer samples and shorter schedules."""
    body = {
        k: v for k, v in body_of(option_files()["experts"]["dylora"]).items() if k != "_target_"
    }
    short = {
        "rank": 2, "alpha": 4.0, "targets": ("q_proj", "down_proj", "embed_tokens", "lm_head"),
        "min_samples": 12, "cooldown": 0, "maturity_steps": 3, "anneal_steps": 2,
        "temperature": 0.5, "learning_rate": 1e-2,
        "detector": {"name": "loss", "threshold": 3.0},
    }  # fmt: skip
    known = {field.name for field in fields(DynamicOptions)}
    assert body.keys() == known
    return DynamicOptions(**{**body, **short, **changes})


def test_the_default_learning_rate_falls_with_the_hidden_size() -> None:
    bases = [model_of(oracle.tiny_llama(hidden_size=size)) for size in (32, 64, 640)]
    default, own = (
        DynamicExperts(**values_of(dynamic_options(learning_rate=each))) for each in (None, 0.1)
    )
    rates = [default.peak_rate(1.0, base) for base in bases]
    assert rates == [5e-3, 5e-3, 5e-4]
    assert own.peak_rate(1.0, bases[-1]) == 0.1


@pytest.mark.parametrize(
    ("falls", "noise", "rank", "expected", "share"),
    [
        (0.0, 0.1, 4, "widen", 40),  # a wider expert can still learn
        (0.0, 0.1, 8, "", 90),
        (0.0, 0.001, 8, "freeze", 100),
        (0.5, 0.1, 4, "", 100),
        (0.5, 0.1, 8, "", 100),
    ],
)
def test_noise_widens_an_expert_but_hardly_ever_freezes_it(
    falls: float, noise: float, rank: int, expected: str, share: int
) -> None:
    options = dynamic_options(stall_steps=8, stall_gain=0.01, max_rank=8)
    noises = noise * torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    found = list[str]()
    for row in noises.tolist():
        registry = DynamicExperts(**values_of(options)).registry(max_steps=100)
        registry.sync_with([FIRST, "expert_1"])
        registry.active = "expert_1"
        for step, each in enumerate(row):
            assert registry.stalled(rank) == ""
            registry.record_step(2.0 + each - falls * (step >= 8), {})
        resumed = DynamicExperts(**values_of(options)).registry(max_steps=100)
        resumed.load_state_dict(registry.state_dict())
        resumed.active = registry.active
        former = registry.state_dict()  # of an earlier version
        former["members"]["expert_1"] |= {"before": 2.0, "error": 0.1}
        del former["members"]["expert_1"]["domain"]
        DynamicExperts(**values_of(options)).registry(max_steps=100).load_state_dict(former)
        found.append(registry.stalled(rank))
        assert resumed.stalled(rank) == found[-1]
    assert found.count(expected) >= share


def test_a_resumed_run_knows_the_batches_of_a_young_skill() -> None:
    """Its skill is measured again later, with them."""
    registry, resumed = (
        DynamicExperts(**values_of(dynamic_options())).registry(max_steps=100) for _ in range(2)
    )
    seen = Observation(losses=torch.ones(2), features=torch.ones(2, 3))
    registry._young = {"skill": [seen]}
    resumed.load_state_dict(registry.state_dict())
    assert torch.equal(resumed._young["skill"][0].features, seen.features)


def text(kind: str, count: int, *, seed: int) -> Tensor:
    """Return sequences [N, T] of one skill: a subset of the vocabulary with its own frequencies."""
    low, high = RANGES[kind]
    generator = torch.Generator().manual_seed(seed)
    return low + (torch.rand(count, LENGTH, generator=generator) ** 2 * (high - low)).long()


class InOrder(SequenceStream):
    """A stream in the order of its sequences."""

    def _move_to(self, *, epoch: int, position: int) -> None:
        super()._move_to(epoch=epoch, position=position)
        self._order = torch.arange(len(self._sequences))


def batches(stream: str, *, accumulated: int = 1, mixed: str = "") -> BatchStream:
    """Return one batch per letter; the later ones of a step are `mixed`."""
    names = {"o": "old", **dict(zip("abc", "abc", strict=True))}
    steps = (kind + (mixed or kind) * (accumulated - 1) for kind in stream)
    rows = [
        text(names[kind], BATCH, seed=100 + number) for number, kind in enumerate("".join(steps))
    ]
    data = InOrder(torch.cat(rows), seed=0)
    return BatchStream(data, batch_size=BATCH, num_batches=len(stream) * accumulated)


def _know(registry: ExpertRegistry, model: nn.Module, given: int) -> None:
    """Register earlier experts as known."""
    assert registry.detector is not None
    for name, kind in (("old", "old"), *((f"expert_{n + 1}", "ab"[n]) for n in range(given))):
        seen = [observe(model, text(kind, BATCH, seed=n)) for n in range(30)]
        registry.detector.add(name, seen, is_base=kind == "old")
        registry.expert_of[name] = FIRST if kind == "old" else name


def train(
    folder: Path,
    options: DynamicOptions | None = None,
    *watching: Callback,
    stream: str = STREAM,
    settings: TrainerSettings = ONE,
    skill: str | None = None,
    given: int = 0,
    mixed: str = "",
    base: nn.Module | None = None,
) -> tuple[ExpertModule, FitResult]:
    """Train experts on a base; resume if there is a checkpoint."""
    torch.manual_seed(999 if (folder / "saved").exists() else 11)
    method = DynamicExperts(**values_of(options or dynamic_options()))
    model = base or oracle.tiny_llama(tie_word_embeddings=True, attention_dropout=0.1)
    rate = method.peak_rate(1.0, model_of(model))
    mixture = method.begin(model, bounds=TextBounds(0), seed=1)
    for number in range(given):  # of an earlier run
        mixture.add(f"expert_{number + 1}", method.shape(model), seed=number)
    steps = len(stream)
    registry = method.registry(max_steps=steps)
    if given:
        assert registry.detector is not None
        _know(registry, model, given)
    old = [text("old", BATCH, seed=n) for n in range(30)]
    callback = ExpertCallback(
        registry,
        shape=method.shape(model),
        known={"old": old if skill is None else ()},
        known_tokens=torch.cat(old).flatten(),
        skill=skill,
        domains=["new"],
        seed=3,
    )
    module = ExpertModule(
        mixture,
        losses=method.losses,
        schedule=Schedule(learning_rate=rate, max_steps=steps),
        optimizer=OptimizerSettings(),
    )
    accumulated = settings.accumulate_grad_batches
    result = fit(
        module,
        batches(stream, accumulated=accumulated, mixed=mixed),
        settings=settings,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        controls=watching,
        surgery_callbacks=[callback],
    )
    return module, result


def kinds(result: FitResult) -> list[tuple[str, str]]:
    events = result.reports["experts"]["events"]
    return [(event["kind"], event["expert"]) for event in events]


def saved(folder: Path) -> Mapping[str, Any]:
    return SafetensorsCheckpointIO().load_checkpoint(folder / "saved")


def assert_same_end(first: Path, second: Path) -> None:
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    ends = []
    for folder in (first, second):
        end = saved(folder)
        experts = end["callbacks"]["ExpertCallback"]
        ends.append({k: end[k] for k in kept} | {"experts": experts})
    assert_same(*ends, "")


@pytest.mark.full
def test_what_is_new_gets_an_expert_and_is_known_again(tmp_path: Path) -> None:
    module, result = train(tmp_path)
    report = result.reports["experts"]
    spawned = [event for event in report["events"] if event["kind"] == "spawned"]
    assert [(event["expert"], event["step"]) for event in spawned] == [
        ("expert_1", 2),
        ("expert_2", 10),
    ]
    assert spawned[1]["similarity"].keys() == {"old", "expert_1"}
    assert spawned[0]["threshold"] == pytest.approx(3 * (BATCH / 16) ** 0.5)
    assert spawned[0]["score"] > 3
    assert report["batches"]["idle"] == 4, "two batches of each new skill, while that is decided"
    assert report["states"] == {"expert_1": "mature", "expert_2": "mature"}
    assert [each for each in kinds(result) if each[0] == "mature"] == [
        ("mature", "expert_1"),
        ("mature", "expert_2"),
    ]
    model, mixture = module.model.eval(), module.mixture
    assert sum(mixture.extra["usage"].values()) == pytest.approx(1), "as gates do"
    assert mixture.routing.top_k == 2 and mixture.routing.temperature == 0.5
    for kind, expert in (("old", FIRST), ("a", "expert_1"), ("b", "expert_2")):
        model(input_ids=text(kind, 4, seed=7), use_cache=False)
        (gates,) = mixture.gates()
        assert gates.weights[:, 6:, mixture.names.index(expert)].min() > 0.9
    base = oracle.tiny_llama(tie_word_embeddings=True)
    state = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    for name, value in base.named_parameters():
        assert torch.equal(state[name], value), "the base is frozen"


@pytest.mark.full
def test_what_the_base_predicts_better_than_old_text_gets_an_expert_too(tmp_path: Path) -> None:
    """Gemma predicts code, word problems and tool calls better than WikiText."""
    base = oracle.tiny_llama(tie_word_embeddings=True)
    optimizer = torch.optim.Adam(base.parameters(), lr=1e-2)
    for seed in range(60):
        rows = text("a", BATCH, seed=1000 + seed)
        base(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = {k: float(observe(base, text(k, 32, seed=1)).losses.mean()) for k in ("old", "a")}
    assert losses["a"] < losses["old"] - 1
    _, result = train(tmp_path, stream="aaaaoa", base=base)
    spawned = [event for event in result.reports["experts"]["events"] if event["kind"] == "spawned"]
    assert [(event["expert"], event["step"]) for event in spawned] == [("expert_1", 2)]


@pytest.mark.full
@pytest.mark.parametrize(("steps", "batches"), [(8, 2), (14, 8), (34, 15)])
def test_a_new_skill_is_measured_again_as_its_batches_come(
    tmp_path: Path, steps: int, batches: int
) -> None:
    """Its burst has few: their deviation says little of what is usual for the skill."""
    module, _ = train(tmp_path, stream="a" * steps)
    library = module.mixture.extra["roster"]["detector"]["library"]
    (found,) = (skill for skill in library["skills"] if skill["name"] == "expert_1")
    assert found["loss"]["batches"] == batches


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_batches_are_observed_in_the_precision_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen: list[bool] = []

    def spy(*given: Any, **named: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return observe(*given, **named)

    monkeypatch.setattr(callback, "observe", spy)
    train(tmp_path, stream="aa", settings=replace(ONE, precision=precision))
    assert set(seen) == {precision == "bf16-mixed"}


class Moves(Callback):
    """Record the parameters that moved in each step."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        self._before = {n: p.detach().clone() for n, p in pl_module.model.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        held = dict(pl_module.model.named_parameters())
        self.moved.append(
            {
                next((part for part in name.split(".") if part.startswith("expert_")), "base")
                for name, value in self._before.items()
                if not torch.equal(held[name], value)
            }
        )


@pytest.mark.full
def test_a_step_moves_the_expert_of_its_text_alone(tmp_path: Path) -> None:
    watching = Moves()
    train(tmp_path, None, watching)
    found = ["".join(sorted(each)) for each in watching.moved]
    one, two = "expert_1", "expert_2"
    # The first two batches of each new skill train nothing; the first expert learns old data
    expected = ["", "", *[one] * 6, "", "", *[two] * 6, *[one] * 4, FIRST, FIRST, *[two] * 2]
    assert found == expected


def test_the_beginnings_of_a_batch_are_one_share_among_all_experts() -> None:
    mixture = mixture_of(router="evidence", has_base=True)  # four experts
    module = ExpertModule(
        mixture, schedule=Schedule(learning_rate=0.1, max_steps=1), optimizer=OptimizerSettings()
    )
    ids = torch.tensor([[0, 5, 6, 0, 7, 8, 0, 9, 5, 0, 7, 0]] * 8)
    is_old = torch.arange(8) >= 5
    batch = {"input_ids": ids.clone(), "is_replay": is_old}
    _limit_beginnings(module, batch)
    assert torch.equal(batch["input_ids"], ids), "a stream shows what came before"
    DocumentMask(TextBounds(0)).attach(mixture.model)
    _limit_beginnings(module, batch)
    is_predicted = labels_of(mixture.model, batch["input_ids"]) != IGNORED
    is_first = torch.zeros_like(ids, dtype=torch.bool)
    is_first[:, [1, 4, 7, 10]] = True
    assert is_predicted[~is_first].all() and is_predicted[is_old].all()
    assert torch.equal(ids_of(batch["input_ids"]), ids)
    own = (is_predicted & is_first)[~is_old]
    assert own.sum() == 4, "1/4 of 16 beginnings: 12 are old"
    assert (own.sum(1) <= 1).all(), "spread over the rows"
    lone = {"input_ids": ids.clone(), "is_replay": torch.zeros(8, dtype=torch.bool)}
    _limit_beginnings(module, lone)
    assert torch.equal(lone["input_ids"], ids)


def test_the_beginnings_of_all_processes_are_limited_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixture = mixture_of(router="evidence", has_base=True)  # four experts
    DocumentMask(TextBounds(0)).attach(mixture.model)
    module = ExpertModule(mixture, schedule=SCHEDULE, optimizer=OptimizerSettings())
    ids = torch.tensor([[0, 5, 6, 0, 7, 8, 0, 9, 5, 0, 7, 0]] * 8)
    whole = {"input_ids": ids, "is_replay": torch.arange(8) >= 5}
    alone = dict(whole)
    _limit_beginnings(module, alone)
    is_first = torch.isin(torch.arange(12), torch.tensor([1, 4, 7, 10])).expand(8, 12)
    for index in range(2):
        gathered = [is_first, whole["is_replay"]]
        monkeypatch.setattr(callback, "_gather_rows", lambda own, rows=gathered: rows.pop(0))
        monkeypatch.setattr(callback, "num_ranks", lambda: 2)
        monkeypatch.setattr(callback, "this_rank", lambda index=index: index)
        batch = {name: rows[index::2] for name, rows in whole.items()}
        _limit_beginnings(module, batch)
        assert torch.equal(batch["input_ids"], alone["input_ids"][index::2])


def test_less_than_one_rehearsed_row_per_batch_is_due_every_few_steps(tmp_path: Path) -> None:
    module, result = train(tmp_path, dynamic_options(rehearsal=0.1), stream="aaaabbbbbbbb")
    assert [kind for kind, _ in kinds(result)].count("spawned") == 2
    exemplars = module.mixture.extra["exemplars"]
    assert exemplars["turn"] > 0 and 0 <= exemplars["owed"] < 1


@pytest.mark.full
def test_full_with_whatever_makes_room(tmp_path: Path) -> None:
    _, stopped = train(tmp_path / "stop", dynamic_options(max_experts=2))
    assert ("refused", "expert_1") in kinds(stopped), "the nearest learns it"
    module, evicted = train(tmp_path / "evict", dynamic_options(max_experts=2, when_full="evict"))
    assert kinds(evicted).count(("evicted", "expert_1")) == 1
    assert module.mixture.names[0] == FIRST and len(module.mixture.names) == 2
    _, limited = train(tmp_path / "limit", dynamic_options(max_trainable_parameters=1))
    assert all(kind == "refused" for kind, _ in kinds(limited))


@pytest.mark.full
def test_the_most_similar_become_one(tmp_path: Path) -> None:
    options = dynamic_options(max_experts=3, when_full="merge")
    module, result = train(tmp_path, options, stream="aaaabbbbccccaa")
    (event,) = [e for e in result.reports["experts"]["events"] if e["kind"] == "merged"]
    assert (event["expert"], event["gone"], event["step"]) == ("expert_1", "expert_2", 10)
    mixture = module.mixture
    assert mixture.names == [FIRST, "expert_1", "expert_3"]
    for kind, expert in (("a", "expert_1"), ("b", "expert_1"), ("c", "expert_3")):
        module.model.eval()(input_ids=text(kind, 4, seed=7), use_cache=False)
        (gates,) = mixture.gates()
        assert gates.weights[:, 6:, mixture.names.index(expert)].min() > 0.9
    spawned = [each for each in kinds(result) if each[0] == "spawned"]
    assert len(spawned) == 3, "text of the merged ones is known"


@pytest.mark.full
@pytest.mark.parametrize(
    "killed_at", [pytest.param(4, marks=SLOW), 10, pytest.param(17, marks=SLOW)]
)
def test_resumed_it_ends_alike(tmp_path: Path, killed_at: int) -> None:
    options = dynamic_options(stall_steps=2, stall_gain=10.0, max_rank=4, distill=0.1)
    _, expected = train(tmp_path / "whole", options)
    with pytest.raises(Killed):
        train(tmp_path / "parts", options, KillAt(killed_at))
    _, result = train(tmp_path / "parts", options)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)
    happened = {kind for kind, _ in kinds(expected)}
    assert happened == {"spawned", "mature", "widened", "frozen"}


@pytest.mark.full
def test_in_bfloat16_they_come_and_resume_too(tmp_path: Path) -> None:
    halves = replace(ONE, precision="bf16-true")
    module, result = train(tmp_path / "whole", settings=halves)
    assert ("spawned", "expert_1") in kinds(result)
    assert {p.dtype for p in module.model.parameters()} == {torch.bfloat16}
    with pytest.raises(Killed):
        train(tmp_path / "parts", None, KillAt(4), settings=halves)
    train(tmp_path / "parts", settings=halves)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.full
@pytest.mark.parametrize("router", [pytest.param("learned", marks=SLOW), "both"])
def test_learned_routers_resume_too(tmp_path: Path, router: str) -> None:
    options = dynamic_options(router=router, targets=("q_proj",), entropy=0.01)
    module, _ = train(tmp_path / "whole", options)
    with pytest.raises(Killed):
        train(tmp_path / "parts", options, KillAt(13))
    train(tmp_path / "parts", options)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert all(float(each.weight.abs().max()) > 0 for each in module.mixture.routers())


def test_boundaries_that_are_told(tmp_path: Path) -> None:
    _, result = train(tmp_path, dynamic_options(boundaries="told"), skill="sums", stream="aaaa")
    assert kinds(result) == [("spawned", "expert_1"), ("mature", "expert_1")]
    assert result.reports["experts"]["events"][0]["step"] == 1


class Digests(Callback):
    """Save the weights and moments of each rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        (optimizer,) = trainer.optimizers
        held = dict(pl_module.state_dict())
        states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
        torch.save([held, states], self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.full
@needs_fork
def test_two_processes_agree_and_resume(tmp_path: Path) -> None:
    options = dynamic_options(stall_steps=2, stall_gain=10.0, max_rank=4)
    _, expected = train(tmp_path / "whole", options, Digests(tmp_path), settings=TWO)
    first, second = (torch.load(tmp_path / f"rank{n}.pt") for n in (0, 1))
    assert_same(first, second, "")
    with pytest.raises(Exception, match="Killed"):
        train(tmp_path / "parts", options, KillAt(10), settings=TWO)
    train(tmp_path / "parts", options, settings=TWO)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert {("spawned", "expert_1"), ("spawned", "expert_2")} <= set(kinds(expected))
    assert {kind for kind, _ in kinds(expected)} == {"spawned", "mature", "widened", "frozen"}


@pytest.mark.full
@needs_fork
@pytest.mark.parametrize("devices", [2, BATCH])
def test_several_processes_rehearse_as_one(tmp_path: Path, devices: int) -> None:
    """A process may have a single row of each batch; one batch decides and measures a skill."""
    ends, options = list[Mapping[str, Any]](), dynamic_options(in_a_row=1, min_samples=BATCH)
    for name, settings in (("one", ONE), ("all", replace(TWO, devices=devices))):
        base = oracle.tiny_llama(tie_word_embeddings=True)
        train(tmp_path / name, options, stream="aaaabbbbbbaaaa", settings=settings, base=base)
        ends.append(saved(tmp_path / name))
    one, all_ = (end["callbacks"]["ExpertCallback"]["exemplars"] for end in ends)
    assert_same(one, all_, "")
    assert one["turn"] > 0 and len(one["held"]) == 2
    for key, value in ends[0]["state_dict"].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(ends[1]["state_dict"][key], value, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("killed_at", [3, pytest.param(6, marks=SLOW)])
def test_an_expert_of_before_is_widened_in_its_place(tmp_path: Path, killed_at: int) -> None:
    """Optimizers match state by position, so the order of adapters must be restored as well."""
    options = dynamic_options(stall_steps=2, stall_gain=10.0, max_rank=4)
    given = 2
    train(tmp_path / "whole", options, stream="aaaaaaaa", given=given)
    with pytest.raises(Killed):
        train(tmp_path / "parts", options, KillAt(killed_at), stream="aaaaaaaa", given=given)
    _, result = train(tmp_path / "parts", options, stream="aaaaaaaa", given=given)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert ("widened", "expert_1") in kinds(result)


@pytest.mark.full
def test_one_of_several_batches_of_a_step_may_be_new(tmp_path: Path) -> None:
    settings = replace(ONE, arguments={"accumulate_grad_batches": 2})
    options = dynamic_options(in_a_row=1, min_samples=8)
    _, result = train(tmp_path, options, stream="oaaaaa", settings=settings, mixed="a")
    assert ("spawned", "expert_1") in kinds(result)
    assert result.reports["experts"]["batches"]["idle"] >= 2


@pytest.mark.full
def test_a_refused_step_is_no_stall(tmp_path: Path) -> None:
    options = dynamic_options(stall_steps=2, stall_gain=-100.0, max_rank=4)
    _, result = train(tmp_path, options, NotFinite(6), stream="aaaaaaaaaaaa")
    assert result.refused_steps == 1
    assert not [kind for kind, _ in kinds(result) if kind in ("widened", "frozen")]


@pytest.mark.full
def test_a_teacher_leaves_usage_as_it_was(tmp_path: Path) -> None:
    _, result = train(
        tmp_path, dynamic_options(distill=0.5, maturity_steps=20), stream="aaaaaaaaaaaa"
    )
    gates = result.reports["experts"]["usage_over_time"]["gates"]["expert_1"]
    assert min(gate for gate in gates[-2:] if gate is not None) > 0.5


def test_who_teaches_a_young_expert_drops_out_nothing() -> None:
    mixture = mixture_of(oracle.tiny_llama(attention_dropout=0.5))
    module = ExpertModule(mixture, schedule=SCHEDULE, optimizer=OptimizerSettings()).eval()
    ids = oracle.tokens(batch=2, length=8)
    found = []
    for is_training in (False, True):
        _, logits = module.eval().task_loss({"input_ids": ids})
        module.train(is_training)
        module._logits = logits
        found.append(float(module._distance("e1", {"input_ids": ids})))
        assert module.model.training == is_training
    assert found[0] == found[1] > 0


def test_losses_of_two_processes_average_to_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although they have different numbers of tokens."""
    mixture = mixture_of(router="learned")
    DocumentMask(TextBounds(0)).attach(mixture.model)
    module = ExpertModule(
        mixture,
        losses=dict.fromkeys(("balance", "entropy", "z", "distill"), 1.0),
        schedule=SCHEDULE,
        optimizer=OptimizerSettings(),
    ).eval()
    module.young = "e1"
    ids = oracle.tokens(batch=4, length=12).clamp(min=1)
    ids[1, 4:] = ids[3, 6:] = 0  # padding of the second process
    logged: dict[str, float] = {}

    def log(name: str, value: Tensor) -> None:
        logged[name] = float(value.detach())

    monkeypatch.setattr(module, "log_step_mean", log)
    monkeypatch.setattr(
        module_of_experts.BaseModule,
        "training_step",
        lambda self, batch, _: self.task_loss(batch)[0],
    )

    def losses(rows: Tensor) -> dict[str, float]:
        module.training_step({"input_ids": rows}, 0)
        return dict(logged)

    sums: list[list[Tensor]] = []  # of each process, in the order of its calls

    def reduce(value: Tensor) -> None:
        calls.append(value.clone())
        if len(sums) == 2:
            value.copy_(sums[0][len(calls) - 1] + sums[1][len(calls) - 1])

    expected, halves = losses(ids), (ids[0::2], ids[1::2])
    for each in (module_of_experts, gates):
        monkeypatch.setattr(each, "num_ranks", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    for rows in halves:
        calls: list[Tensor] = []
        losses(rows)
        sums.append(calls)
    found = []
    for rows in halves:
        calls = []
        found.append(losses(rows))
    assert expected.keys() == {f"experts/{name}_loss" for name in module.losses}
    means = {name: (found[0][name] + found[1][name]) / 2 for name in expected}
    assert means == pytest.approx(expected, rel=1e-4)


def test_distance_is_that_of_the_predictions_of_answers() -> None:
    mixture = mixture_of()
    MarkedText(TextBounds(0)).attach(mixture.model)
    module = ExpertModule(mixture, schedule=SCHEDULE, optimizer=OptimizerSettings()).eval()
    ids, answer = oracle.tokens(batch=2, length=9), slice(4, 7)
    marked = ids | CONTEXT
    marked[:, answer] = ids[:, answer]
    module.task_loss({"input_ids": marked})
    found = float(module._distance("e1", {"input_ids": marked}))
    with torch.no_grad():
        own = mixture.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        with mixture.without("e1"):
            theirs = mixture.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    distances = (theirs.exp() * (theirs - own)).sum(-1)  # [B, T]
    assert found == pytest.approx(float(distances[:, 3:6].mean()), rel=1e-4)


def test_padding_has_no_gates() -> None:
    mixture = mixture_of(router="evidence")
    document_mask = DocumentMask(TextBounds(0))
    document_mask.attach(mixture.model)
    ids = oracle.tokens(batch=10, length=12).clamp_min(1)
    for row, length in enumerate(range(2, 12)):
        ids[row, length:] = 0
    kept = ~document_mask.padding(ids)
    module = ExpertModule(mixture, schedule=SCHEDULE, optimizer=OptimizerSettings()).eval()
    module.task_loss({"input_ids": ids})
    (gates,), (whole,) = module.gates, mixture.gates()
    wanted = whole.weights[kept].double().mean(0)
    assert len(gates.weights) == int(kept.sum()) < kept.numel()
    found = expert_usage(mixture.model, {"code": ids})["usage"]["code"]  # in two batches
    assert list(found.values()) == pytest.approx(wanted.tolist(), abs=1e-6)
    assert (whole.weights.double().mean((0, 1)) - wanted).abs().max() > 0.01


def test_usage_is_read_in_batches_whose_logits_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight sequences of 2,048 tokens have 17 GB of logits over Gemma's vocabulary."""
    monkeypatch.setattr("tritter.evaluation.losses._MAX_LOGITS", 1)
    model, shown = mixture_of(router="evidence").model, list[tuple[int, int]]()
    texts = {"code": oracle.tokens(batch=2, length=4), "prose": oracle.tokens(batch=1, length=4)}
    expert_usage(model, texts, progress=lambda *counts: shown.append(counts))
    assert shown == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.full
def test_who_learns_another_skill_is_trained_again(tmp_path: Path) -> None:
    options = dynamic_options(max_experts=2, stall_steps=2, stall_gain=10.0, max_rank=2)
    watching = Moves()
    _, result = train(tmp_path, options, watching, stream="a" * 8 + "b" * 5)
    assert [each for each in kinds(result) if each[0] != "mature"] == [
        ("spawned", "expert_1"),
        ("frozen", "expert_1"),
        ("refused", "expert_1"),
    ]
    assert result.reports["experts"]["states"] == {"expert_1": "mature"}, "not frozen any more"
    assert watching.moved[-1] == {"expert_1"}


class NotFinite(Callback):
    """Make the loss of one step infinite by a weight that is restored afterwards."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_before_backward(self, trainer, pl_module, loss) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.at:
            trainer.callback_metrics["train/loss"].fill_(float("nan"))
            loss.data.fill_(float("nan"))


@pytest.mark.full
@needs_fork
def test_killed_by_a_signal(tmp_path: Path) -> None:
    train(tmp_path / "whole", stream="aaaabbbb")
    process = multiprocessing.get_context("fork").Process(
        target=train,
        args=(tmp_path / "parts", None, KillAt(6, signal_to_rank=0)),
        kwargs={"stream": "aaaabbbb"},
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train(tmp_path / "parts", stream="aaaabbbb")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.full
def test_of_batches_gathered_for_a_step_none_is_lost(tmp_path: Path) -> None:
    settings = replace(ONE, arguments={"accumulate_grad_batches": 2})
    _, expected = train(tmp_path / "whole", stream="aaaabbbb", settings=settings)
    with pytest.raises(Killed):
        train(tmp_path / "parts", None, KillAt(5), stream="aaaabbbb", settings=settings)
    train(tmp_path / "parts", stream="aaaabbbb", settings=settings)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert [kind for kind, _ in kinds(expected)].count("spawned") == 2
