"""Options that begin or recur only after the last step of a run are refused."""

from pathlib import Path

import pytest

from tritter.config.launch.composition import load_config
from tritter.errors import RequestError

FOREIGN = """
import lightning


class Late(lightning.Callback):
    def __init__(self, every_n_steps: int, start_step: int = 0, size: int = 1000) -> None:
        pass
"""


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["callbacks=ema", "callbacks.ema.update_starting_at_step=20"], "update_starting_at_step"),
        (["callbacks=ema", "callbacks.ema.update_every_n_steps=21"], "update_every_n_steps"),
        (["callbacks=model_checkpoint"], "every_n_train_steps"),
        (["callbacks=early_stopping", "callbacks.early_stopping.patience=10"], "patience"),
        (["forgetting=ewc", "forgetting.ewc.refresh_steps=21"], "refresh_steps"),
    ],
)
def test_what_never_acts_is_refused(words: list[str], key: str) -> None:
    with pytest.raises(RequestError) as refused:
        load_config(["training.max_steps=20", *words])
    (problem,) = refused.value.problems
    assert problem.key.endswith(f".{key}")
    load_config(["training.max_steps=400", "evaluation.every_n_steps=20", *words])


def test_callbacks_from_elsewhere_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_callback.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["+callbacks.late._target_=late_callback.Late", "training.max_steps=20"]
    load_config([*words, "+callbacks.late.every_n_steps=20", "+callbacks.late.start_step=19"])
    with pytest.raises(RequestError) as refused:
        load_config([*words, "+callbacks.late.every_n_steps=21", "+callbacks.late.start_step=20"])
    keys = [problem.key for problem in refused.value.problems]
    assert keys == ["callbacks.late.every_n_steps", "callbacks.late.start_step"]


def test_defaults_of_methods_suit_any_run() -> None:
    load_config(["training.max_steps=3", "forgetting=[ewc,replay]"])  # refresh_steps is 10
