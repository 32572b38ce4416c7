"""Validation during training: the same text each time, and the weights of a training without."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback

from tests import oracle
from tests.oracle.families import tiny
from tests.training.killed import KillAt, Killed
from tests.training.test_ddp import ONE, STEPS, TWO, train, weights
from tritter.data.datamodule import ValidationSubset
from tritter.data.packing import IGNORED
from tritter.data.tokens import TextBounds, TokenisedDocuments
from tritter.evaluation.losses import document_losses
from tritter.targets import Component, import_object
from tritter.training import TrainerSettings, module, read_metrics
from tritter.training.fitting import start_method, validation_metrics

pytestmark = pytest.mark.skipif(
    start_method("cpu") != "fork", reason="the tests' callbacks come by fork"
)
EVERY = 6  # of 20 steps
NAMES = ("eval/old/loss", "eval/new/loss")
OTHERS = tuple(f"eval/{d}/{name}" for d in ("old", "new") for name in ("perplexity", "accuracy"))


def documents(seed: int) -> TokenisedDocuments:
    """Return 9 documents of 10 to 26 tokens."""
    lengths = torch.arange(9) * 2 + 10
    tokens = oracle.tokens(batch=1, length=int(lengths.sum()), seed=seed).flatten().int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return TokenisedDocuments(tokens, offsets, lengths, tuple(map(str, range(9))))


DOMAINS = {"old": documents(1), "new": documents(2)}


def text(max_tokens: int = 10**6, *, batch_size: int = 4, seed: int = 0) -> ValidationSubset:
    return ValidationSubset(
        DOMAINS,
        every_n_steps=EVERY,
        max_tokens=max_tokens,
        sequence_length=16,
        bounds=TextBounds(0),
        batch_size=batch_size,
        seed=seed,
    )


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    rows = read_metrics(folder)
    return {n: [(int(r["step"]), float(r[n])) for r in rows if r.get(n)] for n in NAMES + OTHERS}


@pytest.mark.full
@pytest.mark.parametrize("settings", [ONE, TWO], ids=["one", "two"])
def test_the_weights_are_those_of_a_training_without(tmp_path: Path, settings) -> None:  # type: ignore[no-untyped-def]
    without, _ = train(tmp_path / "without", settings, dropout=0.2)
    evaluated, result = train(tmp_path / "with", settings, dropout=0.2, evaluation=text())
    assert weights(evaluated) == weights(without)
    steps = [step for step, _ in curves(tmp_path / "with")["eval/old/loss"]]
    assert steps == [0, 6, 12, 18, STEPS]
    assert result.evaluation_flops > 0


@pytest.mark.full
@pytest.mark.parametrize("kill_at", [3, 7, 13])
def test_a_killed_training_has_the_same_curves_and_weights(tmp_path: Path, kill_at: int) -> None:
    whole, expected = train(tmp_path / "whole", ONE, dropout=0.2, evaluation=text())
    settings = replace(ONE, save_every_n_steps=6 if kill_at == 7 else 5)
    with pytest.raises(Killed):
        train(tmp_path / "parts", settings, KillAt(kill_at), dropout=0.2, evaluation=text())
    parts, result = train(tmp_path / "parts", settings, dropout=0.2, evaluation=text())
    assert weights(parts) == weights(whole)
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)


@pytest.mark.full
def test_the_last_evaluation_is_what_scoring_the_same_text_says(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "one", ONE, evaluation=text())
    train(tmp_path / "two", TWO, evaluation=text(batch_size=3))
    for domain, each in DOMAINS.items():
        scores = document_losses(
            model, each, sequence_length=16, bounds=TextBounds(0), batch_size=2
        )
        loss = float(scores.values.sum() / scores.weights["tokens"].sum())
        name = f"eval/{domain}/loss"
        one, two = (dict(curves(tmp_path / folder)[name]) for folder in ("one", "two"))
        assert one[STEPS] == pytest.approx(loss, rel=1e-6)
        # Before the first step the weights are the same, after it they differ in rounding
        assert two[0] == pytest.approx(one[0], rel=1e-6)
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.full
def test_accuracy_and_perplexity_beside_a_loop_of_its_own(tmp_path: Path) -> None:
    """Every one of two processes adds up its part; another batch size makes no difference."""
    model, _ = train(tmp_path / "one", ONE, evaluation=text())
    train(tmp_path / "two", TWO, evaluation=text(batch_size=3))
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    for domain in DOMAINS:
        right = count = 0
        for batch in text(batch_size=1):
            if batch["domain"] == domain:
                said = model(batch["input_ids"]).logits[0].argmax(-1)
                asked = batch["targets"][0] != IGNORED
                right += int((said == batch["targets"][0])[asked].sum())
                count += int(asked.sum())
        loss, perplexity, accuracy = (
            one[f"eval/{domain}/{name}"][-1][1] for name in ("loss", "perplexity", "accuracy")
        )
        assert accuracy == pytest.approx(right / count, rel=1e-6)
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert two[f"eval/{domain}/accuracy"][0] == one[f"eval/{domain}/accuracy"][0]
        assert domain == "old" or right > 0


@pytest.mark.full
@pytest.mark.parametrize("settings", [ONE, TWO], ids=["one", "two"])
def test_what_is_said_before_is_what_the_first_step_says(tmp_path: Path, settings) -> None:  # type: ignore[no-untyped-def]
    """In bits with one process; of two each adds up its part."""
    settings = replace(settings, precision="bf16-mixed", arguments={"profiler": "simple"})
    train(tmp_path, settings, evaluation=text())
    torch.manual_seed(7)  # as `train` does
    model = oracle.tiny_llama(initializer_range=0.05, attention_dropout=0.0)
    before, random = weights(model), torch.get_rng_state()
    losses = validation_metrics(model, text(), settings)
    assert weights(model) == before and torch.equal(torch.get_rng_state(), random)
    assert {*losses} == {*NAMES, *OTHERS} and not list(Path.cwd().glob("*profile*"))
    first = {name: curve[0] for name, curve in curves(tmp_path).items()}
    assert first == {n: (0, pytest.approx(losses[n], rel=1e-6)) for n in losses}


def test_in_bfloat16_a_model_computes_what_the_stock_one_does(tmp_path: Path) -> None:
    """The frequencies of rotary positions, which no file has, stay in float32."""
    model = oracle.tiny_llama()
    model.save_pretrained(tmp_path)
    validation_metrics(model, text(), replace(ONE, precision="bf16-true"))
    stock, ids = oracle.stock(tmp_path, torch.bfloat16), oracle.tokens(length=64)
    assert torch.equal(oracle.logits(stock, ids), oracle.logits(model.eval(), ids))


def test_experts_are_validated_in_float64() -> None:
    """They run one after the other: the usual kernel takes no float64."""
    model = tiny("mixtral", hidden_size=32, head_dim=8, intermediate_size=48)
    model.set_experts_implementation("grouped_mm")  # as by default
    expected = validation_metrics(model, text(), ONE)
    found = validation_metrics(model, text(), replace(ONE, precision="64-true"))
    assert model.dtype == torch.float64
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_validation_loads_no_checkpoint_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under SLURM, Lightning looks for one in the working directory."""
    (tmp_path / "hpc_ckpt_1.ckpt").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert "eval/new/loss" in validation_metrics(oracle.tiny_llama(), text(), ONE)


class Watch(Callback):
    """What other people's callbacks meet."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, bool]] = []

    def on_validation_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        loss = float(trainer.callback_metrics["eval/new/loss"])
        self.seen.append((trainer.global_step, loss, pl_module.training))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        assert pl_module.training and all(module.training for module in pl_module.modules())


@pytest.mark.full
def test_callbacks_meet_lightnings_own_loop(tmp_path: Path) -> None:
    watch = Watch()
    train(tmp_path, ONE, watch, evaluation=text())
    logged = curves(tmp_path)["eval/new/loss"]
    assert [step for step, _, _ in watch.seen] == [step for step, _ in logged]
    losses = [loss for _, loss, _ in watch.seen]
    assert losses == pytest.approx([loss for _, loss in logged])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kill_at", [None, 8])
@pytest.mark.parametrize("settings", [ONE, TWO], ids=["one", "two"])
def test_early_stopping_goes_by_what_is_evaluated(
    tmp_path: Path, settings: TrainerSettings, kill_at: int | None
) -> None:
    """The loss on random text rises; its patience is counted on through a resume."""
    target = "lightning.pytorch.callbacks.EarlyStopping"
    body = {"_target_": target, "monitor": "eval/new/loss", "patience": 2}
    stopping = [Component(name="stopping", kind=import_object(target), options=body)]
    settings = replace(settings, save_every_n_steps=EVERY)
    if kill_at is not None:
        with pytest.raises(Exception, match="killed"):
            train(tmp_path / "run", settings, KillAt(kill_at), evaluation=text(), theirs=stopping)
    _, result = train(tmp_path / "run", settings, evaluation=text(), theirs=stopping)
    assert result.steps == 12 and "EarlyStopping" in str(result.ended_early)
    assert [step for step, _ in curves(tmp_path / "run")["eval/new/loss"]] == [0, 6, 12]


def test_the_part_is_drawn_by_its_seed_and_no_larger_than_asked() -> None:
    small, same, other = text(60), text(60), text(60, seed=1)
    assert small.lengths == same.lengths and all(
        torch.equal(a["targets"], b["targets"])
        for a, b in zip(small.batches, same.batches, strict=True)
    )
    tokens = [
        sum(int((b["targets"] != -100).sum()) for b in small.batches if b["domain"] == domain)
        for domain in DOMAINS
    ]
    assert max(tokens) <= 60 and min(tokens) > 30 and sum(tokens) == sum(small.lengths)
    assert [b["targets"].tolist() for b in small.batches] != [
        b["targets"].tolist() for b in other.batches
    ]
    assert text(1).lengths  # one window is always taken


@pytest.mark.full
def test_the_row_of_a_step_has_rate_and_gradient_norm(tmp_path: Path) -> None:
    train(tmp_path, ONE)
    rows = [row for row in read_metrics(tmp_path) if row.get("train/loss")]
    rates = [float(row["train/learning_rate"]) for row in rows]
    assert len(rates) == STEPS // 2 and max(rates) == pytest.approx(1e-3) and min(rates) > 0
    assert all(float(row["train/gradient_norm"]) > 0 for row in rows)


def test_a_loss_that_is_not_a_number_stays_one() -> None:
    total = module._sum()
    for value in (1.0, math.nan, 2.0):
        total.update(torch.tensor(value))
    assert math.isnan(float(total.compute()))
