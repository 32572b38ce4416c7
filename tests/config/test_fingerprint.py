import json

import pytest

from tritter.config.launch.composition import Loader
from tritter.config.run_folder import changes_between, fingerprint

WITHOUT_EFFECT = [
    "resume=x",
    "cache_dir=/x",
    "logger=csv",
    "logger.wandb.project=x",
    "trainer.profiler=simple",
    "trainer.progress=off",
    "trainer=ddp",
    "trainer.activation_checkpointing=true",
]
WITH_EFFECT = {
    "seed=1": ["seed"],
    "control=true": ["control"],
    "model.hidden_size=32": ["model.hidden_size"],
    "training=quick": ["training.max_steps", "evaluation.every_n_steps"],
    "trainer.precision=bf16-mixed": ["trainer.precision"],
    "trainer.compile=true": ["trainer.compile"],
    "evaluation.batch_size=3": ["evaluation.batch_size"],
    "gate.strict=true": ["gate.strict"],
    "expansion.width.shares=equal": ["expansion.width.shares"],
    "forgetting=[]": [
        "forgetting.methods",
        "forgetting.replay.fraction",
        "forgetting.replay.weights",
        "forgetting.replay.weighting",
        "forgetting.replay.keep",
    ],
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("override", WITHOUT_EFFECT)
def test_keys_that_do_not_count(composing: Loader, override: str) -> None:
    base, other = (composing.compose(words) for words in ([], [override]))
    assert base != other
    assert fingerprint(base) == fingerprint(other)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("override", WITH_EFFECT)
def test_keys_that_count(composing: Loader, override: str) -> None:
    base, other = (fingerprint(composing.compose(words)) for words in ([], [override]))
    assert list(changes_between(base, other)) == WITH_EFFECT[override]


def test_order_of_methods_counts(composing: Loader) -> None:
    one, two = (
        fingerprint(composing.compose([f"expansion=[{names}]"]))
        for names in ("dus,width", "width,dus")
    )
    assert list(changes_between(one, two)) == ["expansion.methods"]


def test_a_key_that_an_earlier_version_lacked_is_no_change_while_it_is_null() -> None:
    """Its unfinished runs are resumed; once the key is set, or was, it is another run."""
    earlier, now = {"data": {"source": "text"}}, {"data": {"source": "text", "new": None}}
    assert not changes_between(earlier, now)
    assert list(changes_between(earlier, {"data": {"source": "text", "new": 1}})) == ["data.new"]
    assert list(changes_between(now, {"data": {"source": "text", "new": 1}})) == ["data.new"]
    assert list(changes_between(now, earlier)) == ["data.new"]


def test_it_survives_json(composing: Loader) -> None:
    words = ["expansion=llama_pro", "expansion.llama_pro.positions=[0,2]", "logger.wandb.tags=[a]"]
    print_of_run = fingerprint(composing.compose(words))
    assert json.loads(json.dumps(print_of_run)) == print_of_run
