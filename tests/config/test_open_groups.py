"""`trainer`, `callbacks`, `logger`, `optimizer`: arguments of their classes, and rejected ones."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from tritter.config.launch.composition import Loader
from tritter.config.schema import RunConfig
from tritter.errors import RequestError
from tritter.planning.run_memory import RunMemory
from tritter.training.optimizer import OptimizerSettings
from tritter.training.options import _REFUSED, _trainer_parameters

CONF = Path(__file__).parents[2] / "conf"
_loaders: list[Loader] = []  # one for all: making it takes longer than composing


@pytest.fixture(scope="module", autouse=True)
def composing() -> Iterator[None]:
    with Loader.opened() as made:
        _loaders.append(made)
        yield
    _loaders.clear()


def load(*words: str) -> RunConfig:
    return _loaders[0].compose(["logger=csv", *words])


def refusal(*words: str) -> str:
    with pytest.raises(RequestError) as caught:
        load(*words)
    return str(caught.value)


def test_the_arguments_that_are_read_from_source_are_those_of_the_signature() -> None:
    assert _trainer_parameters() == tuple(inspect.signature(Trainer).parameters)
    assert set(_REFUSED) <= set(_trainer_parameters())


def test_further_arguments_of_the_trainer_come_with_the_run() -> None:
    words = ("trainer.accumulate_grad_batches=4", "trainer.profiler=simple")
    config = load(*words, "trainer.limit_test_batches=0.5")
    assert config.trainer.arguments == {
        "accumulate_grad_batches": 4,
        "profiler": "simple",
        "limit_test_batches": 0.5,
    }


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", _REFUSED)
def test_what_resume_can_not_bear_is_refused_with_the_reason(name: str) -> None:
    assert _REFUSED[name] in refusal(f"trainer.{name}=1")


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.acumulate_grad_batches=2", "Did you mean trainer.accumulate_grad_batches?"),
        ("trainer.accumulate_grad_batches=0", "integers of at least 1"),
        ("trainer.limit_test_batches=1.5", "1.5"),
        ("trainer.deterministic=maybe", "trainer.deterministic = maybe"),
        ("trainer.profiler=simpel", "Did you mean simple?"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas = [0.9,1.5]: Invalid beta parameter"),
        ("optimizer.beta=[0.9,0.5]", "Did you mean optimizer.betas?"),
        ("optimizer.name=nadan", "Did you mean NAdam?"),
        ("optimizer.lr=1", "use training.learning_rate"),
        ("optimizer._target_=torch.optim.NAdam", "set optimizer.name=null"),
        ("logger.wandb=off", "use logger.wandb.mode"),
        ("callbacks.early_stopping.patience=3", "select it with callbacks=[early_stopping]"),
        ("callbacks.x._target_=nowhere.Y", "there is no module nowhere"),
        ("callbacks.x._target_=torch.optim.Adamm", "torch.optim has no Adamm"),
        ("callbacks.x._target_=torch.optim.Adam", "not a subclass of lightning.pytorch"),
        ("callbacks.t._target_=lightning.pytorch.callbacks.Timer", "set training.max_steps"),
    ],
)
def test_what_is_wrong_is_told(word: str, message: str) -> None:
    assert message in refusal(word)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("early_stopping", "early_stopping.mode=mn"), "`mode` can be min, max, got mn"),
        (
            ("early_stopping", "early_stopping.patiense=3"),
            "Did you mean callbacks.early_stopping.patience?",
        ),
        (("ema", "ema.decy=0.5"), "Did you mean callbacks.ema.decay?"),
        (("model_checkpoint", "model_checkpoint.dirpath=/tmp/x"), "relative to the folder"),
        (("lr_monitor,lr_monitor", "lr_monitor.log_momentum=true"), "duplicate entry"),
    ],
)
def test_callbacks_are_judged_by_their_classes(words: tuple[str, str], message: str) -> None:
    names, key = words
    assert message in refusal(f"callbacks=[{names}]", f"callbacks.{key}")


def test_two_that_save_their_state_under_one_name_are_refused() -> None:
    target = "lightning.pytorch.callbacks.EarlyStopping"
    body = f"callbacks.other={{_target_: {target}, monitor: train/loss}}"
    assert "collide with that of callbacks.early_stopping" in refusal(
        "callbacks=[early_stopping]", body
    )


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("names", "word", "message"),
    [
        ("early_stopping", "early_stopping.monitor=train/los", "Did you mean train/loss?"),
        ("early_stopping", "early_stopping.monitor=eval/cod/loss", "Did you mean eval/code/loss?"),
        ("early_stopping", "early_stopping.monitor=forgetting/l2sp/loss", "forgetting/ewc/loss"),
        ("early_stopping", "early_stopping.monitor=forgetting/replay/loss", "forgetting/ewc/loss"),
        ("early_stopping", "early_stopping.monitor=routing/entropy", "is not logged"),
        ("model_checkpoint", "model_checkpoint.monitor=routing/new_expert_mass", "not logged"),
        ("early_stopping", "early_stopping.monitor=step", "is not logged"),
        ("model_checkpoint", "model_checkpoint.monitor=eval/los", "is not logged"),
    ],
)
def test_a_metric_that_never_comes_is_not_waited_for(names: str, word: str, message: str) -> None:
    words = (f"callbacks=[{names}]", "forgetting=[ewc,replay]")
    assert message in refusal(*words, f"callbacks.{word}")
    stranger = "callbacks.own={_target_: tests.training.test_module_callbacks.StopAt, batch: 1}"
    load(*words, f"callbacks.{word}", stranger)  # which may log it


def test_a_domain_of_any_task_can_be_watched() -> None:
    words = ("data=skills", "data.tasks=[sorting,identity]", "callbacks=early_stopping")
    key = "callbacks.early_stopping.monitor"
    for domain in ("prose", "sorting", "identity"):
        load(*words, f"{key}=eval/{domain}/loss")
    assert "Did you mean eval/identity/loss?" in refusal(*words, f"{key}=eval/identiy/loss")
    message = refusal(*words, f"{key}=eval/arithmetic/loss")
    assert "eval/prose/loss, eval/sorting/loss, eval/identity/loss" in message


def test_what_is_not_there_at_the_beginning_is_not_insisted_on() -> None:
    """Lightning raises if a strict callback runs before the first step has logged metrics."""
    words = ("callbacks=early_stopping", "callbacks.early_stopping.strict=true")
    assert "there is no train/loss yet" in refusal(*words)
    load(*words, "callbacks.early_stopping.monitor=eval/code/loss")


def test_frozen_weights_are_not_averaged() -> None:
    words = ("expansion=llama_pro", "expansion.llama_pro.new_blocks_only=true")
    assert "freezes weights" in refusal("callbacks=ema", *words)
    load("callbacks=ema", "expansion=llama_pro")
    appended = ("callbacks=ema", "expansion=[moe,moe_add]")
    assert "adaptation.freeze_base = true freezes weights" in refusal(*appended)
    load(*appended, "adaptation.freeze_base=false")


def test_who_stops_early_has_to_be_asked() -> None:
    message = refusal("callbacks=early_stopping", "evaluation.every_n_steps=0")
    assert "evaluation.every_n_steps = 0" in message


def test_callbacks_keep_their_order_and_null_switches_one_off() -> None:
    config = load("callbacks=[lr_monitor,ema]")
    assert [one.name for one in config.callbacks] == ["lr_monitor", "ema"]
    config = load("callbacks=[lr_monitor,ema]", "callbacks.ema=null")
    assert [one.name for one in config.callbacks] == ["lr_monitor"]
    target = "lightning.pytorch.callbacks.LearningRateMonitor"
    config = load(f"+callbacks.mine._target_={target}")
    assert [one.name for one in config.callbacks] == ["mine"]
    assert load().callbacks == ()


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("path", sorted((CONF / "callbacks").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_callback_is_right(path: Path) -> None:
    load(f"callbacks={path.stem}")


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("path", sorted((CONF / "optimizer").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_optimizer_is_right(path: Path) -> None:
    config = load(f"optimizer={path.stem}")
    assert config.optimizer.target.rpartition(".")[2].casefold() == path.stem.replace("_", "")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ["dylora", "single_lora"])
def test_a_quantised_base(kind: str) -> None:
    asked = load(f"experts={kind}", "forgetting=none", "experts.base_bits=4").experts
    assert asked is not None and asked.options.base_bits == 4


def test_an_optimizer_by_name_and_by_target() -> None:
    by_name = load("optimizer.name=NAdam").optimizer
    words = ("optimizer.name=null", "optimizer._target_=torch.optim.NAdam")
    assert load(*words).optimizer == by_name
    assert by_name.target == "torch.optim.nadam.NAdam"


def test_memory_counts_what_an_optimizer_keeps() -> None:
    kept = {"adamw": 2, "sgd": 1, "adafactor": 0, "lion8bit": 1, "adamw8bit": 2}
    states = {}
    for name, count in kept.items():
        config = load(f"optimizer={name}")
        assert config.optimizer.kept_per_parameter() == count
        source = config.known_model()
        assert source is not None
        need = next(RunMemory(config, source).needs())
        states[name], parameters = need.states, need.parameters
    difference = states["adamw"] - states["sgd"]
    assert 0 <= difference - 4 * parameters < 1000  # a step count for each tensor
    moments = {name: states[name] - 8 * parameters for name in ("lion8bit", "adamw8bit")}
    assert moments["adamw8bit"] == 2 * moments["lion8bit"]


class Flat(torch.optim.SGD):
    """Keeps a flat moment, and the shape."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for parameter in (each for group in self.param_groups for each in group["params"]):
            self.state[parameter] = {"of": parameter.shape, "m": parameter.detach().flatten()}


def test_memory_counts_flat_states() -> None:
    settings = OptimizerSettings(target=f"{__name__}.Flat", arguments={})
    assert settings.kept_per_parameter() == 1


@pytest.mark.full
def test_nothing_is_imported_from_lightning_where_nothing_asks_for_it() -> None:
    """Only additional callbacks and loggers are built for trial."""
    import subprocess
    import sys

    code = (
        "import sys; from tritter.config.launch.composition import load_config; "
        "load_config(['logger=csv']); print('lightning' in sys.modules)"
    )
    message = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert message.stdout.strip() == "False"


def test_what_is_tried_sets_nothing_for_the_process() -> None:
    load("trainer.deterministic=true")
    assert not torch.are_deterministic_algorithms_enabled()
