"""The main job with experts: dense to sparse, then experts for a new domain."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import oracle
from tests.core.stock_routers.models import shared_names
from tests.oracle.moe import is_settled
from tests.pipeline.conftest import SMALL
from tests.pipeline.plug import WORK
from tests.pipeline.tiny import is_within
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.core.models import load_model
from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.errors import RequestError
from tritter.methods.moe_routing.distill import DistillationModule
from tritter.methods.moe_routing.options import AdaptationOptions
from tritter.pipeline import Outcome, run_pipeline
from tritter.pipeline.moe import NewExperts
from tritter.pipeline.run_data import RunData
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.result import BestWeights

Run = Callable[..., Outcome]
QUICK = ("training.max_steps=6", "adaptation.router_max_steps=5", "trainer.save_every_n_steps=2")


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def sparse(run_job: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that converted a dense base model to MoE."""
    folder = tmp_path_factory.mktemp("sparse") / "run"
    run_job(
        folder, "expansion=moe", "expansion.moe.num_experts=4", "gate='off'",
        "moe_routing.bias_update_rate=0.001",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def add(sparse: Path, cache: Path) -> Run:
    """Return overrides that add two experts for code to that model."""

    def run(folder: Path, *overrides: str) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        small = [word for word in SMALL if not word.startswith("model.")]
        words = [
            *small, *QUICK, f"cache_dir={cache}", "gate='off'", "model=hf",
            f"model.path={sparse / 'checkpoint'}", "expansion=moe_add",
            "expansion.moe_add.num_experts=2", "pipeline.keep_stages=true", *overrides,
        ]  # fmt: skip
        return run_pipeline(load_config(words), run_folder=folder)

    return run


@pytest.fixture(scope="module")
def cloned(add: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that added these experts."""
    folder = tmp_path_factory.mktemp("cloned") / "run"
    add(folder)
    return folder


@pytest.mark.full
def test_a_dense_base_becomes_sparse(sparse: Path) -> None:
    summary = summary_of(sparse)
    experts = summary["moe"]
    assert (experts["number"], experts["experts_per_token"]) == (4, 2)
    for loads in experts["usage"].values():
        assert len(loads) == 3 and all(sum(load) == pytest.approx(1) for load in loads)
    assert set(experts["usage"]) == {"prose", "code"}
    for domain, losses in experts["selection_bias"].items():
        assert losses["without"] == summary["attempts"][0]["final"][domain]["loss"]
        assert losses["with"] == pytest.approx(losses["without"], abs=0.5)
        assert losses["with"] != losses["without"]
    header = (sparse / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"routing/auxiliary_loss", "routing/z_loss", "routing/entropy", "routing/max_load",
            "routing/dropped_fraction"} <= set(header)  # fmt: skip
    lineage = Lineage.read(sparse / "checkpoint")
    assert lineage is not None
    assert lineage.training_config["moe_routing"]["bias_update_rate"] == 0.001
    assert "adaptation" not in lineage.training_config


OPTIONS = {
    "best, held, balanced by a bias": (
        "expansion.moe_add.init=best", "moe_routing.hold_old=0.1",
        "moe_routing.bias_update_rate=0.001",
        "adaptation.router_update=retrain", "'forgetting=[ewc,l2sp,replay]'",
        "forgetting.ewc.num_sequences=4",
    ),
    "random, opened without a router stage": (
        "expansion.moe_add.init=random", "adaptation.router_update=frozen",
        "adaptation.router_max_steps=100",
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("case", ["cloned", *OPTIONS])
def test_new_experts_are_trained_and_the_base_stays(
    add: Run, cloned: Path, tmp_path: Path, case: str
) -> None:
    place = cloned if case == "cloned" else tmp_path / "run"
    if case != "cloned":
        add(place, *(word.strip("'") for word in OPTIONS[case]))
    attempt, summary = place / "attempt_1", summary_of(place)
    assert is_within(summary)["preservation"]
    before, trained = load_model(attempt / "expanded"), load_model(attempt / "trained")
    names = shared_names(before)
    moved = {n for n, p in before.named_parameters() if differs(p, trained.get_parameter(n))}
    routers = {n for n, _ in before.named_parameters() if n.endswith("mlp.gate.weight")}
    assert moved == {*names, *(() if "without" in case else routers)}
    for name in names:
        assert torch.equal(before.get_parameter(name)[:4], trained.get_parameter(name)[:4])
    assert AddedExperts.read(attempt / "expanded") is not None
    assert AddedExperts.read(attempt / "trained") is None
    assert is_settled(attempt / "trained")
    ids = oracle.tokens(trained.config.vocab_size)
    stock = oracle.stock(place / "checkpoint")
    assert torch.equal(oracle.logits(stock, ids), oracle.logits(trained, ids))
    lineage = Lineage.read(place / "checkpoint")
    assert lineage is not None and lineage.stock_loadable == "yes"
    record, steps = lineage.expansion_history[-1], 6 if "without" in case else 11
    assert record.method == "moe_add" and record.continued_training_steps == steps
    assert lineage.training_config["new"]["code"]["sha256"]
    assert (record.options["clone_from"] is not None) is ("best" in case)
    assert summary["moe"]["new"] == [4, 5] and summary["moe"]["is_open"]


def differs(first: Tensor, second: Tensor) -> bool:
    return not torch.equal(first, second)


@pytest.mark.full
def test_new_experts_learn_from_a_teacher_and_the_base_is_unfrozen(
    add: Run, sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(
        tmp_path / "run", "expansion.moe_add.init=distill",
        f"expansion.moe_add.teacher={sparse / 'baseline'}", "adaptation.distill_steps=4",
        "adaptation.unfreeze_after=3", "adaptation.anneal_steps=100",
    )  # fmt: skip
    attempt = tmp_path / "run/attempt_1"
    expanded, distilled, trained = (
        load_model(attempt / name) for name in ("expanded", "distilled", "trained")
    )
    ids = oracle.tokens(expanded.config.vocab_size)
    assert torch.equal(oracle.logits(expanded, ids), oracle.logits(distilled, ids))
    name = shared_names(expanded)[0]
    whole, taught = (model.get_parameter(name) for model in (expanded, distilled))
    assert torch.equal(whole[:4], taught[:4]) and differs(whole[4:], taught[4:])
    assert differs(whole[:4], trained.get_parameter(name)[:4])
    added = AddedExperts.read(tmp_path / "run/checkpoint")
    assert added is not None and added.step == 11
    assert added.offset == pytest.approx(-20 * (1 - 11 / 100))
    lineage = Lineage.read(tmp_path / "run/checkpoint")
    assert lineage is not None and lineage.stock_loadable == "after adaptation"
    assert not summary_of(tmp_path / "run")["moe"]["is_open"]
    assert "not fully open, so stock classes compute another" in capsys.readouterr().out


class Stopped(Exception):
    pass


@pytest.mark.full
@pytest.mark.parametrize("before", ["adapt", "fit", "evaluate"])
def test_a_run_stopped_between_stages_goes_on_to_the_same_weights(
    add: Run, cloned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(*WORK[before], stop)
        add(tmp_path / "parts")
    add(tmp_path / "parts")
    whole, parts = (Lineage.read(p / "checkpoint") for p in (cloned, tmp_path / "parts"))
    assert whole is not None and parts is not None and whole.model_hash == parts.model_hash


@pytest.mark.full
def test_a_run_killed_while_a_teacher_teaches_goes_on_amid_the_stage(
    add: Run, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "expansion.moe_add.init=distill", f"expansion.moe_add.teacher={sparse / 'baseline'}",
        "adaptation.distill_steps=5",
    )  # fmt: skip
    taught, steps = DistillationModule.task_loss, []

    def until(step: int | None) -> Callable[..., tuple[Tensor, Tensor]]:
        def task_loss(
            module: DistillationModule, batch: dict[str, Tensor]
        ) -> tuple[Tensor, Tensor]:
            steps.append(module.global_step)
            if module.global_step == step:
                raise Stopped
            return taught(module, batch)

        return task_loss

    def stop(*arguments: Any, **options: Any) -> None:
        raise Stopped

    monkeypatch.setattr(*WORK["adapt"], stop)  # what comes after it is no matter here
    for folder, kill_at in (("whole", None), ("parts", 3), ("parts", None)):
        monkeypatch.setattr(DistillationModule, "task_loss", until(kill_at))
        with pytest.raises(Stopped):
            add(tmp_path / folder, *words)
    assert steps == [0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4]
    whole, parts = (
        Lineage.read(tmp_path / name / "attempt_1/distilled") for name in ("whole", "parts")
    )
    assert whole is not None and parts is not None and whole.model_hash == parts.model_hash
    attempt = tmp_path / "parts/attempt_1"
    assert (attempt / "distill/metrics.csv").is_file() and not (attempt / "distill/saved").exists()


@pytest.mark.full
def test_the_best_weights_are_judged_with_their_own_offsets(
    add: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[dict[str, Tensor]] = []
    load = BestWeights.on_fit_end

    def watched(best: BestWeights, trainer: Any, module: Any) -> None:
        load(best, trainer, module)
        routing = RouterControl.attached(module.model)
        assert routing is not None
        judged.append(routing.state_dict()["offset"])

    monkeypatch.setattr(BestWeights, "on_fit_end", watched)
    monitor = "callbacks.model_checkpoint.monitor=eval/prose/loss"
    saving = "callbacks.model_checkpoint.every_n_train_steps=2"
    add(tmp_path / "run", "callbacks=model_checkpoint", monitor, saving, "pipeline.publish=best",
        "evaluation.every_n_steps=2", "adaptation.anneal_steps=11", "trainer.save_every_n_steps=6",
        "training.learning_rate=0.05")  # fmt: skip
    # Open after the last step, not after that of the best weights
    assert not is_settled(tmp_path / "run/checkpoint")
    assert not summary_of(tmp_path / "run")["moe"]["is_open"]
    (attempt,) = summary_of(tmp_path / "run")["attempts"]
    saved, last = (
        SafetensorsCheckpointIO().load_checkpoint(tmp_path / f"run/attempt_1/checkpoints/{name}")
        for name in (f"step_{attempt['best_step']:06d}.ckpt", "last.ckpt")
    )
    assert saved["global_step"] == attempt["best_step"] < last["global_step"] == attempt["steps"]
    offsets, end = (
        each["callbacks"]["RoutingCallback"]["routing"]["offset"] for each in (saved, last)
    )
    assert all(offsets[layer].equal(judged[-1][layer]) for layer in offsets)
    assert not any(offsets[layer].equal(end[layer]) for layer in offsets)


@pytest.mark.full
def test_half_open_experts_are_opened_by_the_next_run(
    add: Run, cache: Path, tmp_path: Path
) -> None:
    add(tmp_path / "first", "adaptation.anneal_steps=14")
    place = tmp_path / "first/checkpoint"
    assert not is_settled(place)
    words = [
        *(word for word in SMALL if not word.startswith("model.")), *QUICK, f"cache_dir={cache}",
        "gate='off'", "model=hf", f"model.path={place}", "expansion=none",
    ]  # fmt: skip
    folder = tmp_path / "second"
    folder.mkdir()
    run_pipeline(load_config(words), run_folder=folder)
    assert not (folder / "attempt_1/adapted").exists()  # the routers had their turn
    assert is_settled(folder / "checkpoint")
    before, after = load_model(place), load_model(folder / "checkpoint")
    moved = {n for n, p in before.named_parameters() if differs(p, after.get_parameter(n))}
    assert moved == set(shared_names(before))


@pytest.mark.slow
def test_new_experts_carry_the_domain_and_the_old_one_stays(cache: Path, tmp_path: Path) -> None:
    """A model trained on prose gets experts for code, which receive code more than prose."""
    small = [
        *(w for w in SMALL if "max_steps" not in w and "sequence_length" not in w),
        "data.sequence_length=64", f"cache_dir={cache}",
    ]  # fmt: skip
    for name in ("base", "grown"):
        (tmp_path / name).mkdir()
    base = load_config(
        [
            *small, "pretraining.max_steps=400", "training.max_steps=150", "expansion=moe",
            "expansion.moe.num_experts=4", "data=text", "data.old={prose:stdlib:prose}",
            "data.new={again:stdlib:prose}", "forgetting=none", "gate='off'",
        ]
    )  # fmt: skip
    run_pipeline(base, run_folder=tmp_path / "base")
    small = [word for word in small if not word.startswith("model.")]
    grown = load_config(
        [
            *small, "model=hf", f"model.path={tmp_path / 'base/checkpoint'}", "expansion=moe_add",
            "expansion.moe_add.num_experts=2", "training.max_steps=150", "moe_routing.hold_old=0.1",
        ]
    )  # fmt: skip
    run_pipeline(grown, run_folder=tmp_path / "grown")
    summary = summary_of(tmp_path / "grown")
    share = {d: new_share(summary["moe"], d) for d in ("prose", "code")}
    assert share["code"] > share["prose"] + 0.05
    assert summary["status"] == "kept"
    verdicts = {(c["check"], c["subject"]): c["verdict"] for c in summary["gate"]}
    assert verdicts["retention", "prose"] == verdicts["new_capability", "code"] == "passed"


def new_share(experts: dict[str, Any], domain: str) -> float:
    layers = experts["usage"][domain]
    return sum(sum(load[expert] for expert in experts["new"]) for load in layers) / len(layers)


def of_sequences(*sizes: int, **trainer: int) -> Any:
    """Return a run with domains of so many sequences, in which each sequence has its number."""
    packed = [torch.full((size, 1), name, dtype=torch.int32) for name, size in enumerate(sizes)]
    domains = {str(name): each for name, each in enumerate(packed)}
    data = SimpleNamespace(
        batch_size=4,
        training_sequences=lambda names: {name: domains[name] for name in names},
        num_sequences=lambda name: len(domains[name]),
        new_domains_of=lambda branch: list(domains),
    )
    config = SimpleNamespace(
        adaptation=AdaptationOptions(router_epochs=2),
        trainer=SimpleNamespace(**{"accumulate_grad_batches": 1, **trainer}),
    )
    source = SimpleNamespace(added=AddedExperts(experts=(4,)))
    return SimpleNamespace(data=data, config=config, source=lambda location: source)


def test_sequences_that_choose_experts_are_spread_over_all_domains() -> None:
    chosen = RunData.spaced_sequences(of_sequences(7, 4).data, ["0", "1"], 8).flatten().tolist()
    assert chosen == [0] * 6 + [1] * 2
    assert len(RunData.spaced_sequences(of_sequences(3).data, ["0"], 8)) == 3


@pytest.mark.parametrize(("gathered", "steps"), [(1, 6), (3, 2)])
def test_router_epochs_are_passes_whatever_a_step_accumulates(gathered: int, steps: int) -> None:
    branch: Any = SimpleNamespace(expanded="")
    run = of_sequences(12, accumulate_grad_batches=gathered)
    assert NewExperts(run, branch).router_steps == steps


REFUSED = {
    "moe_routing.z_loss=0.1": "moe_routing.z_loss = 0.1: the model is dense",
    "adaptation.encouragement=1": "adaptation.encouragement = 1.0: no experts are being appended",
    "expansion=moe moe_routing.hold_old=1": "hold_old = 1.0: the starting model is",
    "expansion=[moe,moe_add] expansion.moe_add.init=best": "init = best: the experts that moe",
    "expansion=[moe,moe_add] expansion.moe_add.init=distill": "teacher = null",
    "expansion=[moe,moe_add] expansion.moe_add.teacher=x": "init=distill requires a teacher",
    "expansion=[moe,moe_add] expansion.moe_add.init=distill expansion.moe_add.teacher=x":
        "teacher = x: no such folder",
    "expansion=[moe,llama_pro,moe_add] expansion.moe_add.init=best":
        "put moe_add before llama_pro",
    "expansion=[moe,moe_add,width]": "freeze_base = true: weights added by width",
    "expansion=[moe,moe_add] adaptation.unfreeze_after=30": "unfreeze_after = 30: must be below",
    "expansion=[moe,moe_add] adaptation.unfreeze_after=3 adaptation.freeze_base=false":
        "has no effect with",
    "expansion=[moe,moe_add] adaptation.router_update=frozen adaptation.encouragement=1":
        "skips the router stage",
}  # fmt: skip


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("words", REFUSED)
def test_what_would_have_no_effect_is_refused(words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        load_config([*SMALL, *words.split()])
    assert REFUSED[words] in str(refusal.value)


@pytest.fixture(scope="module")
def sigmoid(run_job: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that converted a dense base model to one with sigmoid routers."""
    folder = tmp_path_factory.mktemp("sigmoid") / "run"
    run_job(
        folder, "expansion=moe", "expansion.moe.target=glm4_moe", "expansion.moe.num_experts=4",
        "gate='off'", "moe_routing.bias_update_rate=0.01", "training.max_steps=6",
    )  # fmt: skip
    return folder


@pytest.mark.full
def test_the_bias_of_sigmoid_routers_is_trained_and_published(sigmoid: Path) -> None:
    summary = summary_of(sigmoid)
    assert summary["moe"]["number"] == 4
    assert "selection_bias" not in summary["moe"]  # there is no loss without it
    stock = oracle.stock(sigmoid / "checkpoint")
    assert stock.config.model_type == "glm4_moe"
    for layer in stock.model.layers:
        bias = layer.mlp.gate.e_score_correction_bias
        assert bias.abs().max() > 0
        assert bias.abs().max() <= 0.06 + 1e-6  # 6 steps of 0.01
        assert layer.mlp.experts.down_proj.abs().max() > 0
    ours = load_model(sigmoid / "checkpoint")
    ids = oracle.tokens(stock.config.vocab_size)
    assert torch.equal(oracle.logits(stock, ids), oracle.logits(ours, ids))


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_a_16_bit_result_has_the_trained_bias(
    run_tiny: Run, tmp_path: Path, precision: str
) -> None:
    """Stock classes keep the bias in float32; rounded, it would select other experts."""
    run_tiny(
        tmp_path, "expansion=moe", "expansion.moe.target=glm4_moe", "expansion.moe.num_experts=4",
        "forgetting=none", "moe_routing.bias_update_rate=0.01", "pipeline.dtype=bfloat16",
        f"trainer.precision={precision}",
    )  # fmt: skip
    tensors = load_file(tmp_path / "checkpoint/model.safetensors")
    biases = [value for name, value in tensors.items() if name.endswith("correction_bias")]
    assert biases and all(value.dtype == torch.float32 for value in biases)
    for value in biases:
        torch.testing.assert_close(value, 0.01 * (value / 0.01).round(), rtol=1e-6, atol=1e-8)
        assert value.any()
    assert sum(value.dtype == torch.bfloat16 for value in tensors.values()) > len(biases)


@pytest.mark.full
def test_a_sigmoid_model_is_trained_on(sigmoid: Path, cache: Path, tmp_path: Path) -> None:
    words = [
        *(word for word in SMALL if not word.startswith("model.")), f"cache_dir={cache}",
        "gate='off'", "model=hf", f"model.path={sigmoid / 'checkpoint'}", "training.max_steps=6",
    ]  # fmt: skip
    (tmp_path / "run").mkdir()
    more = [*words, "moe_routing.bias_update_rate=0.01", "expansion=none"]
    run_pipeline(load_config(more), run_folder=tmp_path / "run")
    before, after = (
        oracle.stock(folder / "checkpoint").model.layers[0].mlp.gate.e_score_correction_bias
        for folder in (sigmoid, tmp_path / "run")
    )
    assert not torch.equal(before, after)
    with pytest.raises(RequestError, match="glm4_moe has no table"):
        run_pipeline(load_config([*words, "expansion=moe_add"]), run_folder=tmp_path / "append")


@pytest.mark.full
def test_a_killed_run_ends_with_the_same_bias(
    run_job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and the selection bias of sigmoid routers are those of a run that was not killed."""
    words = (
        "expansion=moe", "expansion.moe.target=glm4_moe", "expansion.moe.num_experts=4",
        "gate='off'", "moe_routing.bias_update_rate=0.01", "training.max_steps=6",
        "trainer.save_every_n_steps=2",
    )  # fmt: skip
    update = RouterControl.set_selection_bias
    states = []
    for folder, kill_at in (("whole", None), ("parts", 10), ("parts", None)):
        calls = iter(range(1_000))

        def killing(self: RouterControl, layer: int, values: Tensor, kill_at: int | None = kill_at,
                    calls: Any = calls) -> None:  # fmt: skip
            if next(calls) == kill_at:
                raise Stopped
            update(self, layer, values)

        monkeypatch.setattr(RouterControl, "set_selection_bias", killing)
        if kill_at is not None:
            with pytest.raises(Stopped):
                run_job(tmp_path / folder, *words)
            assert not (tmp_path / folder / "checkpoint").exists()
            continue
        run_job(tmp_path / folder, *words)
        states.append(load_model(tmp_path / folder / "checkpoint").state_dict())
    assert any(name.endswith("e_score_correction_bias") for name in states[0])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
