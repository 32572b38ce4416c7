"""`optimizer.carry`: training that continues with earlier moments, and rejected requests."""

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from tests import oracle
from tests.core.stock_routers.models import tiny_moe
from tests.pipeline.test_costs import QUICK, SMALL_MODEL
from tests.pipeline.test_own_checkpoint import texts
from tritter.checkpoints import read_lineage
from tritter.checkpoints.history import read_chain, verify
from tritter.checkpoints.state import LazyTensors, read_state
from tritter.config.launch.composition import load_config
from tritter.core.models import load_model, read_config
from tritter.core.parameter_map.carry import MOMENTS
from tritter.errors import RequestError
from tritter.pipeline import run_pipeline
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import Ledger
from tritter.training.moments import moments_of

Run = Callable[..., dict[str, Any]]
CONSTANT = (
    "training.schedule=constant", "training.warmup_ratio=0", "trainer.gradient_clip_val=null",
    "forgetting=none",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("carry")
    for name, seed in (("old", 0), ("new", 1)):
        (place / name).mkdir()
        for number, text in enumerate(texts(seed)):
            (place / f"{name}/{number}.txt").write_text(text)
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """Return a function that runs a job on this data in a subfolder, with cached base models."""

    def _run(folder: str, *words: str, given: str = "") -> dict[str, Any]:
        (place / folder).mkdir()
        return json.loads(
            run_pipeline(_config(place, *words, given=given), run_folder=place / folder)
            .summary_path.read_text()
        )  # fmt: skip

    return _run


def _config(place: Path, *words: str, given: str = "") -> Any:
    start = ("model=hf", f"model.path={place / given}") if given else SMALL_MODEL
    paths = (f"data.old={place}/old", f"data.new={place}/new", f"cache_dir={place}/cache")
    return load_config(
        [*QUICK, "evaluation.batch_size=32", "evaluation.sample_tokens=0", *start, *paths, *words]
    )


@pytest.fixture(scope="module")
def carried(run: Run, place: Path) -> Path:
    """A finished run whose training started from the moments of its base model."""
    run("carried", "expansion=none", "optimizer.carry=true", *CONSTANT)
    return place / "carried"


def _expected(place: Path, folder: Path, *words: str) -> dict[str, torch.Tensor]:
    """Return the result of a bare AdamW loop from a run's start, moments and batches."""
    config = _config(place, *words)
    context = RunContext(
        config=config, folder=folder, console=Console(quiet=True), ledger=Ledger(folder)
    )
    model, state = load_model(folder / "baseline"), read_state(folder / "baseline")
    assert state is not None
    groups = [[p for p in model.parameters() if (p.ndim >= 2) is kind] for kind in (True, False)]
    adam = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}],
        lr=config.training.learning_rate, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    held = {kind: dict(LazyTensors(state.kinds[kind])) for kind in MOMENTS}
    for name, parameter in model.named_parameters():
        adam.state[parameter] = {kind: held[kind][name] for kind in MOMENTS}
        adam.state[parameter]["step"] = torch.tensor(float(state.step))
    steps = config.training.max_steps
    batches = context.batches(context.new_domains, purpose="training", max_steps=steps)
    model.train()
    for batch in islice(batches, steps):
        ids = batch["input_ids"].long()
        adam.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        adam.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def _distance(folder: Path, expected: dict[str, torch.Tensor]) -> float:
    trained = dict(load_model(folder).named_parameters())
    return max(float((trained[name] - value).abs().max()) for name, value in expected.items())


@pytest.mark.full
def test_the_training_goes_on_where_the_base_stopped(carried: Path, place: Path, run: Run) -> None:
    words = ("expansion=none", "optimizer.carry=true", *CONSTANT)
    expected = _expected(place, carried, *words)
    assert _distance(carried / "checkpoint", expected) < 2e-6
    left = read_state(carried / "checkpoint")
    assert left is not None and set(left.kinds) == set(MOMENTS)
    assert left.step == 4 + 4 and not left.other_steps
    run("without", "expansion=none", *CONSTANT)
    assert read_state(place / "without/checkpoint") is None
    assert _distance(place / "without/checkpoint", expected) > 1e-3
    folders = [path.name for path in (carried / "attempt_1").iterdir()]
    assert not {"moments", "saved"} & set(folders)
    assert [verify(link) for link in read_chain(carried / "checkpoint")] == [(), ()]


@pytest.mark.full
def test_and_the_next_one_where_that_stopped(carried: Path, place: Path, run: Run) -> None:
    words = ("expansion=none", "optimizer.carry=true", *CONSTANT)
    run("next", *words, given="carried/checkpoint")
    expected = _expected(place, place / "next", *words)
    assert _distance(place / "next/checkpoint", expected) < 2e-6
    left = read_state(place / "next/checkpoint")
    assert left is not None and left.step == 12


@pytest.mark.full
def test_a_base_that_leaves_moments_is_an_entry_of_its_own(carried: Path, place: Path) -> None:
    bases = [path for path in (place / "cache/bases").iterdir() if path.is_dir()]
    kept = {"optimizer.carry": [], "plain": []}
    for base in bases:
        state, lineage = read_state(base), read_lineage(base)
        assert lineage is not None
        made_from = lineage.training_config["made_from"]["optimizer"]
        kept["optimizer.carry" if made_from["carry"] else "plain"].append(state)
    (with_moments,) = kept["optimizer.carry"]
    assert set(with_moments.kinds) == set(MOMENTS) and with_moments.step == 4
    assert kept["plain"] and not any(kept["plain"])


@pytest.mark.full
def test_growth_control_and_rounds_carry_through_their_maps(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("grown", "expansion=[width,llama_pro]", "optimizer.carry=true", "control=true")
    reported = capsys.readouterr().out
    # Of 5 layers two are new: 9 parameters each; the embedding and the last norm are old
    assert "Adam moments carried over for 29 of 47 parameters; 18 start at zero" in reported
    assert "Adam moments carried over for 29 of 29 parameters" in reported  # the control
    left = read_state(place / "grown/checkpoint")
    assert left is not None
    assert sorted(set(left.other_steps.values()) | {left.step}) == [4, 8]
    run("rounds", "pipeline.target_params=240k", "expansion=width", "optimizer.carry=true")
    last = read_state(place / "rounds/checkpoint")
    assert last is not None and last.step >= 8


@pytest.mark.full
def test_a_given_state_is_kept_beside_the_start_whether_it_is_used_or_not(
    run: Run, place: Path, carried: Path
) -> None:
    """After a rollback, the published checkpoint is a copy of the initial one."""
    words = ("expansion=none", "training.max_steps=1", "pipeline.keep_stages=true")
    run("kept", *words, given="carried/checkpoint")
    state, given = read_state(place / "kept/baseline"), read_state(carried / "checkpoint")
    assert state is not None and given is not None
    assert state.step == given.step and state.kinds.keys() == given.kinds.keys()
    for kind in MOMENTS:
        tensors = dict(LazyTensors(given.kinds[kind]))
        assert all(torch.equal(state.kinds[kind].get(n), value) for n, value in tensors.items())
    assert read_state(place / "kept/attempt_1/trained") is None


@pytest.mark.full
def test_routers_begin_anew_after_a_stage_of_their_own(run: Run, place: Path) -> None:
    run("sparse", "expansion=moe", "expansion.moe.num_experts=4", "optimizer.carry=true")
    added = (
        "expansion=moe_add", "expansion.moe_add.num_experts=2", "adaptation.router_max_steps=3",
        "optimizer.carry=true", "adaptation.freeze_base=false", "pipeline.keep_stages=true",
    )  # fmt: skip
    run("added", *added, given="sparse/checkpoint")
    adapted = read_state(place / "added/attempt_1/adapted")
    expanded = read_state(place / "added/attempt_1/expanded")
    assert adapted is not None and expanded is not None
    dropped = set(expanded.kinds["exp_avg"].files) - set(adapted.kinds["exp_avg"].files)
    assert len(dropped) == 3 and all("gate" in name for name in dropped)
    model = load_model(place / "added/attempt_1/adapted")
    found = moments_of(adapted, model)
    assert not any(name.endswith("mlp.gate.weight") for name in found)
    left = read_state(place / "added/checkpoint")
    assert left is not None
    assert sorted(set(left.other_steps.values()) | {left.step}) == [4, 12]


REFUSED = {
    "new blocks": (("expansion=llama_pro", "expansion.llama_pro.new_blocks_only=true"), "new"),
    "new experts": (("expansion=[moe,moe_add]",), "adaptation.freeze_base"),
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("case", REFUSED)
def test_nothing_to_carry_is_refused_before_anything_is_written(case: str, place: Path) -> None:
    words, message = REFUSED[case]
    with pytest.raises(RequestError, match=r"optimizer.carry = true: .*" + message):
        _config(place, "optimizer.carry=true", *words)


@pytest.mark.full
def test_a_checkpoint_without_moments_is_refused(place: Path, run: Run, tmp_path: Path) -> None:
    run("plain", "expansion=none", "training.max_steps=1")
    with pytest.raises(RequestError, match=r"plain/checkpoint has no state/ with Adam moments"):
        _config(place, "optimizer.carry=true", given="plain/checkpoint")
    broken = tmp_path / "broken"
    oracle.saved(tiny_moe("mixtral"), broken)
    (broken / "tokenizer.json").write_text("{}")
    for text in ("{", "[]", '{"kinds": 3}', '{"kinds": [["exp_avg"], {}]}', '{"kinds": []}'):
        (broken / "state").mkdir(exist_ok=True)
        (broken / "state/state.json").write_text(text)
        with pytest.raises(RequestError, match=r"optimizer.carry = true"):
            _config(place, "optimizer.carry=true", f"model.path={broken}", given="plain/checkpoint")


def test_moments_of_nothing_that_is_trained_are_refused_when_it_is_known(
    place: Path, run: Run, carried: Path
) -> None:
    """A checkpoint with moments only for parameters that are not trained."""
    other = place / "other"
    shutil.copytree(carried / "checkpoint", other)
    (
        other / "tritter.json"
    ).unlink()  # its lineage would show that the moments belong to another model
    for kind in MOMENTS:
        folder = other / "state" / kind
        save_file({"elsewhere": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(RequestError, match="the trained parameters in"):
        run("refused", "expansion=none", "optimizer.carry=true", given="other")
    assert read_config(place / "refused/baseline")
