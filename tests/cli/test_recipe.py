"""Recipes of `tritter expand`: read strictly, and a circle: recipe → checkpoint → recipe."""

import time
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Run, snapshot
from tritter.checkpoints import Lineage
from tritter.cli import recipe
from tritter.config import components
from tritter.core.expansions import specification

GROW = """\
# wider, then deeper
steps:
- width: {hidden_size: 48, init: net2net, noise: 1e-3}
- llama_pro: {positions: [0, 2]}
- width:
    intermediate_size: 100
- interpolate
seed: 3
dtype: bfloat16
max_shard_size: 60kB
output: grown
"""


def written(place: Path, text: str) -> str:
    (place / "grow.yaml").write_text(text, encoding="utf-8")
    return "expand --checkpoint base --recipe grow.yaml"


@pytest.mark.full
def test_a_recipe_is_what_the_same_commands_are(run: Run, place: Path) -> None:
    text = "steps: [width: {hidden_size: 48}, llama_pro: {target_layers: 5}]\nseed: 3\n"
    made = run(f"{written(place, text)} --json").json
    assert Path(made["destination"]).name == "base-width-llama-pro"
    words = "--method width,llama-pro --hidden-size 48 --target-layers 5 --output same --json"
    typed = run(f"expand --checkpoint base {words} --seed 3").json
    other = run(f"expand --checkpoint base {words} --overwrite").json
    assert made["model_hash"] == typed["model_hash"] != other["model_hash"]


def test_a_recipe_leads_to_a_checkpoint_that_leads_to_the_recipe(run: Run, place: Path) -> None:
    first = run(f"{written(place, GROW)} --json").json
    assert first["destination"] == "grown"
    assert [step["method"] for step in first["steps"]] == [
        *("width", "llama_pro", "width", "interpolate")
    ]
    assert len(list((place / "grown").glob("model-*.safetensors"))) > 2
    printed = run("history grown --recipe").out
    again = yaml.safe_load(printed)
    assert again["steps"][1] == {"llama_pro": {"positions": [0, 2], "new_blocks_only": False}}
    assert (again["seed"], again["dtype"]) == (3, "bfloat16")
    second = run(f"{written(place, printed)} --output once-more --json").json
    assert second["model_hash"] == first["model_hash"]
    hashes = (Lineage.of(place / name).tensor_digests for name in ("grown", "once-more"))
    assert next(hashes) == next(hashes)
    # A seed of its own, and what was drawn is another
    other = printed.replace("seed: 3", "seed: 4")
    third = run(f"{written(place, other)} --output other --json").json
    assert third["model_hash"] != first["model_hash"]


@pytest.mark.full
def test_only_the_last_command_of_a_chain_is_printed(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --output wide --method width --seed 5").code == 0
    assert run("expand --checkpoint wide --output deep --method dus,stack").code == 0
    recipe = yaml.safe_load(run("history deep --recipe").out)
    assert [next(iter(step)) for step in recipe["steps"]] == ["dus", "stack"]
    assert recipe["seed"] == 0 and "dtype" not in recipe
    (place / "wide").rename(place / "base" / "wide")
    result = run("history deep --recipe")
    assert result.code == 2 and "its parent is missing" in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("history base --recipe", "plain folder"),
        ("history base --recipe --json", "--recipe can't be combined with --json"),
    ],
)
def test_what_has_no_recipe_says_so(run: Run, place: Path, words: str, said: str) -> None:
    result = run(words)
    assert result.code == 2 and said in result.err


def test_all_that_is_wrong_is_told_with_its_step(run: Run, place: Path) -> None:
    text = """\
steps:
- widht: {hidden_size: 48}
- width: {hidden_siz: 48, noise: -1,
    init: net2nt}
- llama-pro
- dus: 3
- [a]
- width: {_target_: os.system}
sed: 3
dtype: int8
"""
    before = snapshot(place)
    result = run(written(place, text))
    assert result.code == 2
    for said in (
        "10 things",
        "sed = 3 (in grow.yaml): unknown key; must be one of steps, seed",
        "Did you mean seed?",
        "dtype = int8 (in grow.yaml): must be one of float32",
        "widht = {hidden_size:48} (in grow.yaml, step 1): unknown method",
        "Did you mean width?",
        "width.hidden_siz = 48 (in grow.yaml, step 2)",
        "Did you mean width.hidden_size?",
        "width.noise = -1 (in grow.yaml, step 2)",
        "width.init = net2nt (in grow.yaml, step 2)",
        "llama-pro = null (in grow.yaml, step 3): recipes use underscores. Did you mean llama_pro?",
        "dus = 3 (in grow.yaml, step 4)",
        "steps = [a] (in grow.yaml, step 5)",
        "width._target_ = os.system (in grow.yaml, step 6)",
    ):
        assert said in result.err
    assert {**before, "grow.yaml": text.encode()} == snapshot(place)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("- llama_pro", "llama_pro (in grow.yaml, step 20): of the result, num_hidden_layers = "),
        ("- width", "width (in grow.yaml, step "),
        ("- llama_pro: {target_layers: 3}", "llama_pro.target_layers = 3 (in grow.yaml, step 1): "),
        ("- llama_pro: {target_layer: 3}", "3000 things are wrong with the request:"),
    ],
)
def test_thousands_of_steps_are_refused_at_the_first_that_is_too_large(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, step: str, said: str
) -> None:
    """Option files are found once for all of them, and no step after it is planned."""
    scans, planned, find, plan = [], [], recipe.option_files, specification.target_model
    for module in (recipe, components):
        spy = lambda: scans.append("") or find()  # noqa: E731
        monkeypatch.setattr(module, "option_files", spy)
    spy_of_plan = lambda source, specs: planned.append("") or plan(source, specs)  # noqa: E731
    monkeypatch.setattr(specification, "target_model", spy_of_plan)
    command, before = written(place, "steps:\n" + f"{step}\n" * 3000), snapshot(place)
    start = time.process_time()
    result = run(f"{command} --output out")
    assert result.code == 2 and said in result.err
    assert len(scans) < 10 and len(planned) < 25 and time.process_time() - start < 10
    assert snapshot(place) == before


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [width: {hidden_size: 25}]", "width.hidden_size = 25 (in grow.yaml, step 1): "),
        (
            "steps:\n- width: {hidden_size: 48}\n- width: {hidden_size: 49}",
            "width.hidden_size = 49 (in grow.yaml, step 2): ",
        ),
        ("steps: [llama_pro]\ntarget_params: 7B", "7,000,000,000 (in grow.yaml): "),
        (
            "steps: [dus, stack]\ntarget_params: 7B",
            "target_params (in grow.yaml): it needs",
        ),
        ("steps: []", "a recipe needs steps"),
        ("width: {hidden_size: 48}", "a recipe needs steps"),
        ("- width", "a recipe needs steps"),
        ("", "a recipe needs steps"),
        ("steps: dus", "steps = dus (in grow.yaml): must be a list"),
        ("steps: [dus]\nsteps: [width]", "found duplicate key steps"),
        ("steps: [width: {noise: 0, noise: 1}]", "found duplicate key noise"),
        ("steps: *a", "undefined alias"),
        ("steps: [{1: {2: 3}}]", "1 = {2:3} (in grow.yaml, step 1): unknown method"),
        ("2: [dus]\nsteps: [dus]", "2 = [dus] (in grow.yaml): unknown key"),
        ("steps: [!!python/object/apply:os.system [ls]]", "the tag"),
        ("steps: [width: {noise: !!python/name:os.system x}]", "the tag"),
        ("steps: !!python/object/apply:os.system [dus]", "the tag"),
        ("steps:\n- !!python/object:os.x {dus: {}}", "the tag"),
        (
            "steps:\n" + "- width: {hidden_size: 49}\n" * 7,
            "width.hidden_size = 49 (in grow.yaml, step 1): ",
        ),
        (
            "steps: [width: {hidden_size: !!int 12a}]",
            "invalid literal for int() with base 10: '12a'",
        ),
        ("steps: [width: {noise: .nan}]", "width.noise"),
        ("steps: [width: {hidden_size: '48'}]", "width.hidden_size = 48"),
        ("steps: [dus\nseed: 3", "is not a recipe: while parsing"),
        ("steps: " + "[" * 2000, "grow.yaml is not a recipe: maximum recursion depth"),
        (f"steps: [dus, dus]\nseed: {2**64 - 1}", "seed = 18446744073709551615 (in grow.yaml"),
        ("steps: [dus]\nseed: -1", "seed = -1 (in grow.yaml)"),
        ("steps: [dus]\nmax_shard_size: big", "max_shard_size = big (in grow.yaml)"),
        ("steps: [dus]\noutput: ''", "output = (empty) (in grow.yaml)"),
        ('steps: [dus]\noutput: "a\\0b"', "NUL"),
        ("steps: [dus]\n" + "#" * 2**20, "larger than 1 MiB"),
    ],
)
def test_a_wrong_recipe_is_refused_and_nothing_is_written(
    run: Run, place: Path, text: str, said: str
) -> None:
    result = run(written(place, text))
    assert result.code == 2
    assert said in result.err
    assert sorted(path.name for path in place.iterdir()) == ["base", "grow.yaml"]


def test_words_that_say_something_else_are_refused(run: Run, place: Path) -> None:
    line = written(place, "steps: [dus]\nseed: 3\noutput: grown")
    result = run(f"{line} --seed 4 --method width --noise 0.1 --output grown --dry-run")
    assert result.code == 2
    assert "3 things" in result.err  # the output is the same
    assert "--seed = 4: grow.yaml sets seed = 3; remove one of the two." in result.err
    assert "--method = width: --recipe grow.yaml already sets the steps." in result.err
    assert run(f"{line} --seed 3 --dry-run").code == 0
    assert run(f"{line} --dtype float16 --dry-run --json").json["dtype"] == "float16"
    told = " ".join(run(f"{line} --dry-run").out.split())
    assert "no: dus (exact with identity_init: true). Expect" in told


def test_a_recipe_that_is_not_there(run: Run, place: Path) -> None:
    result = run("expand --checkpoint base --recipe nowhere.yaml")
    assert result.code == 2 and "nowhere.yaml cannot be read" in result.err
    assert "--recipe grow.yaml" in run("expand --checkpoint base").err


def test_an_error_names_a_step_only_if_no_other_has_its_method(tmp_path: Path) -> None:
    file = tmp_path / "grow.yaml"
    file.write_text("steps: [width, dus, width]\nseed: 1")
    names = recipe.Recipe.read(file).names
    assert names().origin("expansion.dus.target_layers") == f"{file}, step 2"
    assert names().origin("expansion.width.hidden_size") == str(file)
    assert names(2).origin("expansion.width.hidden_size") == f"{file}, step 3"
    assert names().origin("seed") == str(file) and names().origin("dtype") is None
