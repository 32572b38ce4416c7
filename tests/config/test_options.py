"""Every shipped option file composes, and its keys equal the frozen list."""

import dataclasses
import re
from itertools import product
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tritter.conf_folder import config_folder
from tritter.config.components import BASES, CHOSEN_GROUPS, METHOD_GROUPS, known_keys
from tritter.config.folders import LADDERS
from tritter.config.launch.composition import Loader
from tritter.config.launch.help import description, help_text
from tritter.config.launch.plan import _RUNS
from tritter.config.schema import SECTIONS
from tritter.core.expansions import EXPANSIONS
from tritter.methods.forgetting.replay import Replay, ReplayOptions
from tritter.methods.moe_routing.options import AdaptationOptions, RoutingOptions
from tritter.options import leaves

OPTION_FILES = sorted(config_folder().glob("*/*.yaml"))
NAMES = [f"{path.parent.name}={path.stem}" for path in OPTION_FILES]


# Options that are nothing without what only a person knows.
NEEDED = {
    "expansion=layers": ["expansion.layers.sources=[0,1]"],
    "data=hf": ["data.old=stdlib:prose", "data.new=stdlib:code"],
    "data=text": ["data.old=stdlib:prose", "data.new=stdlib:code"],
    "model=hf": ["model.path=owner/name"],
    "experiment=consumer_gpu": ["data.old=stdlib:prose", "data.new=stdlib:code"],
    "experiment=continued": [
        *("model.path=owner/name", "data.old=stdlib:prose", "data.new=stdlib:code")
    ],
}
# Options that require an earlier one for any base model: a dense model has no experts.
FIRST = {"expansion=moe_add": "moe"}


MAX_LISTED_KEYS = 104  # of the default job; it may only fall
_WITH_ROUTERS = {
    "expansion=moe": ("moe_routing",),
    "expansion=moe_add": ("moe_routing", "adaptation"),
    "expansion=[dus,moe,moe_add]": ("moe_routing", "adaptation"),
    "expansion=dus moe_routing.z_loss=0": ("moe_routing",),
}


def words_for(name: str) -> list[str]:
    group, option = name.split("=")
    if group == LADDERS:
        return [f"gate.ladder={option}"]
    first = FIRST.get(name)
    return [f"{group}=[{first},{option}]" if first else name, *NEEDED.get(name, [])]


# Options that need a package which is not installed with Tritter.
PACKAGES = {
    "logger=mlflow": "mlflow",
    "logger=tensorboard": "tensorboard",
}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", NAMES)
def test_every_option_composes(composing: Loader, name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    composing.compose(words_for(name))


@pytest.mark.quick_cases(27)
@pytest.mark.parametrize("path", OPTION_FILES, ids=NAMES)
def test_every_option_says_what_it_is(path: Path) -> None:
    assert len(description(path)) > 3
    whole = help_text(is_full=True)
    assert f"    {path.stem} " in whole or f"    {path.stem}\n" in whole
    folded = next(line for line in _unwrapped(help_text()) if line.startswith(path.parent.name))
    names = re.findall(r"[\w-]+", folded)
    assert path.stem in names[1:]


def _unwrapped(page: str) -> list[str]:
    return [line.strip() for line in re.sub(r"\n {6,}", " ", page).splitlines()]


def test_every_group_and_method_has_options() -> None:
    groups = {path.parent.name for path in OPTION_FILES}
    classes = {"optimizer", *METHOD_GROUPS, *CHOSEN_GROUPS, *BASES}
    assert groups == {*SECTIONS, *classes, "experiment", LADDERS}


def test_keys_are_the_frozen_interface() -> None:
    frozen = (Path(__file__).parent / "keys.txt").read_text().splitlines()
    assert list(known_keys()) == frozen, "a change of the interface: is it meant?"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("group", METHOD_GROUPS)
def test_option_files_state_the_defaults_of_the_records(composing: Loader, group: str) -> None:
    for path in (path for path in OPTION_FILES if path.parent.name == group):
        if path.stem != "none":
            *_, one = getattr(composing.compose(words_for(f"{group}={path.stem}")), group)
            record = one if group == "expansion" else one.options
            table = {"sources": (0, 1)} if path.stem == "layers" else {}  # it has no default
            assert (one.name, record) == (path.stem, type(record)(**table))


def test_sections_of_one_option_state_the_defaults_of_the_records(composing: Loader) -> None:
    config = composing.compose(["moe_routing=default", "adaptation=default"])
    assert (config.moe_routing, config.adaptation) == (RoutingOptions(), AdaptationOptions())


def test_only_models_with_experts_list_the_keys_of_routers(composing: Loader) -> None:
    listed = {words: composing.composed(words.split()) for words in ("", *_WITH_ROUTERS)}
    default = OmegaConf.masked_copy(listed[""], [str(key) for key in listed[""] if key != "hydra"])
    assert len(leaves(OmegaConf.to_container(default))) <= MAX_LISTED_KEYS
    for words, sections in {"": (), **_WITH_ROUTERS}.items():
        present = [key for key in ("moe_routing", "adaptation") if key in listed[words]]
        assert present == list(sections), words


def test_the_default_job(composing: Loader) -> None:
    config = composing.compose([])
    assert config.expansion == (EXPANSIONS["width"](),)
    assert [(one.kind, one.options) for one in config.forgetting] == [(Replay, ReplayOptions())]
    assert (config.seed, config.control, config.resume) == (0, False, None)
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (64, 3)
    assert (config.pretraining.max_steps, config.training.max_steps) == (600, 250)


def test_hydras_folders_are_those_that_resume_looks_in(composing: Loader) -> None:
    hydra = composing.composed([]).hydra
    assert Path(hydra.run.dir).parent == _RUNS
    assert hydra.job.chdir is False


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("expansion", "forgetting"),
    list(product(["none", "[]", "dus", "[width,llama_pro]"], ["none", "[l2sp,replay]", "replay"])),
)
def test_lists_compose_in_their_order(composing: Loader, expansion: str, forgetting: str) -> None:
    config = composing.compose([f"expansion={expansion}", f"forgetting={forgetting}"])
    for text, methods in ((expansion, config.expansion), (forgetting, config.forgetting)):
        expected = [word for word in text.strip("[]").split(",") if word not in ("", "none")]
        assert [method.name for method in methods] == expected


def test_order_is_as_written(composing: Loader) -> None:
    for names in (["dus", "width"], ["width", "dus"]):
        config = composing.compose([f"expansion=[{','.join(names)}]"])
        assert [method.name for method in config.expansion] == names


def test_records_are_frozen(composing: Loader) -> None:
    config = composing.compose([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


def test_cache_folder(composing: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path))
    assert composing.compose([]).cache_dir == tmp_path
    assert composing.compose(["cache_dir=/x"]).cache_dir == Path("/x")
    monkeypatch.delenv("TRITTER_CACHE")
    assert composing.compose([]).cache_dir == Path.home() / ".cache/tritter"
