"""Invalid requests: exit code 2, one message with key and remedy, nothing written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.config.conftest import FakePipeline, Result
from tests.forked import run_program
from tritter.conf_folder import config_folder
from tritter.config import folders
from tritter.config.launch import composition
from tritter.config.launch.entry import run_once
from tritter.errors import RequestError
from tritter.launched import Launch

ROOT = config_folder().parent

_TASKS = (
    f"data=text data.old={ROOT}/docs/concepts data.tasks=[{ROOT}/docs/how-to,{ROOT}/docs/reference]"
)

# words of the command line → what the message has to contain
REFUSALS: dict[str, tuple[str, ...]] = {
    "training.max_stps=3": ("training.max_stps = 3", "Did you mean training.max_steps?"),
    "trainer.max_stepz=3": ("trainer.max_stepz = 3", "Did you mean training.max_steps?"),
    "expantion=dus": ("expantion = dus", "Did you mean expansion?"),
    "forgeting=ewc": ("Did you mean forgetting?",),
    "experimnt=ablation": ("Did you mean experiment?",),
    "modl=tiny": ("Did you mean model?",),
    "expantion.dus.target_layers=3": ("Did you mean expansion.dus.target_layers?",),
    "expansion.hidden_size=96": ("below its method", "Did you mean expansion.width.hidden_size?"),
    "expansion=dus expansion.target_layers=4": ("Did you mean expansion.dus.target_layers?",),
    "expansion=stack expansion.target_layers=4": ("Did you mean expansion.stack.target_layers?",),
    "forgetting.fraction=.1": ("Did you mean forgetting.replay.fraction?",),
    "forgetting.lambda=3": ("Did you mean forgetting.si.si_lambda?",),
    "forgetting=l2sp forgetting.lambda=3": ("Did you mean forgetting.l2sp.l2sp_lambda?",),
    "expansion.wdith.hidden_size=96": ("Did you mean width?",),
    "training.lr=1": ("Did you mean training.learning_rate?",),
    "lr=1": ("Did you mean training.learning_rate=1?",),
    "steps=3": ("Did you mean training.max_steps=3?",),
    "run.directory=out": ("hydra.run.dir=out",),
    "optimizer.wd=1": ("Did you mean optimizer.weight_decay?",),
    "data.bs=4": ("Did you mean data.batch_size?",),
    "learning_rate=3": ("learning_rate = 3", "Did you mean training.learning_rate=3?"),
    "optimizr.weight_decay=1": ("Did you mean optimizer.weight_decay?",),
    "+training.foo=3": ("training.foo = 3", "no such key", "max_steps"),
    "growth=fom": ("growth = fom", "Did you mean foam?"),
    "growth=[foam,gradmax]": ("select one", "-m growth=foam,gradmax"),
    "growth.check_every=3": ("growth.check_every = 3", "growth=none has no keys"),
    "growth=foam growth.trigger=percentil": ("growth.trigger = percentil", "mean percentile?"),
    "growth=foam growth.initialiser=gradmx": ("gradmax, split", "Did you mean gradmax?"),
    "growth=foam growth.trigger={_target_:os.system}": (
        "growth.trigger._target_",
        "not a subclass",
    ),
    "growth=foam growth.maturation_ag=3": ("Did you mean growth.maturation_age?",),
    "growth=foam growth.gradient_percentile=100": ("above 0 and below 100",),
    "growth=gradmax growth.trigger={name:schedule,at:[250]}": (
        "growth.trigger.at = [250]",
        "must be below training.max_steps",
    ),
    "growth=foam growth.trigger=plateau training.max_steps=100": ("growth.plateau_steps",),
    "growth=foam growth.trigger=scaling_law training.max_steps=40": (
        "training.max_steps",
        "scaling_law needs more than 40 steps",
    ),
    "expansion=llama_pro expansion.llama_pro.new_blocks_only=true experts=single_lora": (
        "expansion.llama_pro.new_blocks_only",
        "experts freeze the whole base",
    ),
    "growth=foam growth.trigger={name:plateau,at:[3]}": ("growth.trigger.at", "has threshold"),
    "growth=foam growth.trigger=budget": ("growth.max_new_parameters",),
    "growth=foam growth.initialiser.orthogonalise=activations": ("{name: NAME, KEY: VALUE}",),
    "growth=foam growth.trigger={_target_:tritter.methods.growth.triggers.Budget}": (
        "requires growth.max_new_parameters",
    ),
    "growth=foam growth.trigger={name:schedule,at:[]}": ("growth.trigger.at",),
    "growth=foam training.max_steps=1": ("nothing could grow",),
    "growth=foam growth.history_checks=1": ("too few", "growth.history_checks"),
    "growth=foam forgetting=freeze forgetting.freeze.layers=[ffn,attention]": ("the FFNs",),
    "growth=foam forgetting=freeze forgetting.freeze.new_only=true": ("partly frozen",),
    "experts=dylor": ("experts = dylor", "Did you mean dylora?"),
    "experts=[dylora,single_lora]": ("select one", "-m experts=dylora,single_lora"),
    "experts.rank=4": ("experts.rank = 4", "experts=none has no keys"),
    "experts=dylora experts.rnk=4": ("Did you mean experts.rank?",),
    "experts=single_lora experts.base_bits=5": ("experts.base_bits = 5", "8", "4"),
    "experts=single_lora experts.top_k=2": ("experts.top_k", "no such key"),
    "experts=dylora experts.rank=64": ("experts.max_rank = 32", "experts.rank = 64"),
    "experts=dylora experts.router=evidense": ("experts.router", "Did you mean evidence?"),
    "experts=dylora experts.detector=los": ("experts.detector = los", "Did you mean loss?"),
    "experts=dylora forgetting=[ewc,replay]": ("frozen", "choose none, replay or self_replay"),
    "experts=dylora growth=foam": ("experts freeze the base",),
    "experts=dylora optimizer=sgd": ("SGD has a different state", "AdamW8bit"),
    "experts=dylora pipeline.target_params=1M": ("pipeline.target_params",),
    "experts=dylora callbacks=ema": ("averaging misses experts",),
    "growth=foam optimizer=sgd": ("SGD has a different state", "AdamW8bit"),
    "growth=foam optimizer.amsgrad=true": ("without amsgrad",),
    "growth=foam expansion=moe": ("mixtral has experts", "growth=none"),
    "growth=foam pipeline.target_params=1M": ("pipeline.target_params",),
    "growth=foam forgetting=freeze forgetting.freeze.layers=ffn": ("the FFNs, in which neurons",),
    "growth=foam expansion=none forgetting=freeze forgetting.freeze.layers=0-2": ("the FFNs, in",),
    "growth=foam expansion=none growth.max_new_parameters=191": ("a neuron has 192 parameters",),
    "training.max_steps=many": ("training.max_steps = many", "a whole number at least 1"),
    "training.max_steps=2.5": ("training.max_steps = 2.5",),
    "training.max_steps=true": ("training.max_steps = true",),
    "training.max_steps=0": ("training.max_steps = 0",),
    "training.max_steps=": ("training.max_steps = (empty)",),
    "training.max_steps.foo=3": ("training.max_steps",),
    "training.learning_rate=nan": ("training.learning_rate = nan", "above 0"),
    "training.learning_rate=inf": ("training.learning_rate = inf",),
    "training.schedule=cosin": ("constant, cosine, wsd", "Did you mean cosine?"),
    "training.schedule=wsd training.decay_ratio=1": ("training.decay_ratio", "0.95"),
    "evaluation.task_limit=5": ("evaluation.task_limit = 5: requires evaluation.tasks.",),
    "evaluation.allow_code=[mbpp]": ("evaluation.allow_code", "requires evaluation.tasks."),
    "gate.strict=1": ("gate.strict = 1", "true or false"),
    "gate=strict gate.enabled=false": ("gate.strict", "gate=strict or gate=off"),
    "forgetting.replay.fraction=1": ("forgetting.replay.fraction = 1", "below 1"),
    "forgetting.replay.fraction=0": ("forgetting.replay.fraction = 0.0", "remove replay"),
    "forgetting=self_replay forgetting.self_replay.fraction=0": ("remove self_replay",),
    "forgetting=[replay,self_replay] forgetting.replay.fraction=0.75": (
        "forgetting.replay.fraction + forgetting.self_replay.fraction = 1.0",
        "the sum must be below 1",
    ),
    "trainer.precision=bf16-mixd": ("trainer.precision = bf16-mixd", "Did you mean bf16-mixed?"),
    "trainer.precision=16-mixed": ("trainer.precision = 16-mixed", "bf16-mixed"),
    "trainer.devices=2": ("trainer.devices = 2", "trainer=ddp"),
    "trainer=ddp trainer.devices=1": ("trainer.devices = 1", "requires at least 2"),
    "trainer=ddp trainer.accelerator=auto": ("trainer.accelerator = auto", "cpu and gpu"),
    "trainer=ddp trainer.devices=3 data.batch_size=16": (
        "data.batch_size = 16",
        "nearest: 15 or 18",
    ),
    "-m trainer=ddp": ("trainer.strategy = ddp", "omit -m"),
    "-m trainer=cpu,ddp": ("job 1 (trainer=ddp)", "omit -m"),
    "trainer=fsdp trainer.devices=1": ("trainer=fsdp requires at least 2",),
    "trainer=fsdp forgetting=[ewc,replay]": ("whole weights", "choose one of none, replay"),
    "trainer=fsdp growth=foam": ("growth = NeuronGrowth", "expansion=width", "trainer=ddp"),
    "trainer=fsdp growth=foam forgetting=ewc forgetting.ewc.ewc_lambda=-1": (
        "forgetting.ewc.ewc_lambda = -1",
        "growth = NeuronGrowth",
    ),
    "trainer=fsdp experts=dylora": ("experts = DynamicExperts", "trainer=ddp"),
    "trainer=fsdp expansion=moe": ("mixtral has experts", "trainer=ddp"),
    "trainer=fsdp optimizer=adafactor": ("optimizer = Adafactor", "AdamW, Adam, NAdam, SGD"),
    "trainer=fsdp callbacks=ema": (
        "callbacks.ema._target_",
        "weight averaging requires whole weights",
    ),
    "trainer=fsdp trainer.precision=bf16-true": ("allowed are 32-true and bf16-mixed",),
    "trainer=fsdp trainer.compile=true": ("trainer.compile = true: gathering a layer",),
    "-m trainer=fsdp": ("trainer.strategy = fsdp", "omit -m"),
    "training.compile=true": ("Did you mean trainer.compile?",),
    "training.activation_checkpointing=true": ("mean trainer.activation_checkpointing?",),
    "trainer.gradient_checkpointing=true": ("mean trainer.activation_checkpointing?",),
    "trainer.compile=1": ("trainer.compile = 1", "true or false"),
    "trainer.compile=true experts=dylora": ("trainer.compile = true", "in each batch"),
    "trainer.compile=true expansion=moe": ("trainer.compile = true: mixtral has experts",),
    "trainer=mps": ("trainer.accelerator = mps: torch finds no Apple GPU", "trainer=cpu"),
    "trainer=mps growth=foam": ("trainer.accelerator = mps", "float64", "trainer=cpu"),
    "trainer=mps experts=dylora": ("trainer.accelerator = mps", "float64", "trainer=cpu"),
    "trainer=gpu trainer.precision=16-mixed optimizer.fused=true": (
        "optimizer.fused = true: fused steps take scaled gradients",
    ),
    "trainer=mps trainer.precision=64-true": ("trainer.precision = 64-true", "32-true"),
    "trainer=mps trainer.strategy=ddp trainer.devices=2": ("one Apple GPU", "trainer=mps"),
    "model=tinny": ("model = tinny", "small, tiny", "Did you mean tiny?"),
    "+model=tiny": ("+model = tiny", "Did you mean model=tiny?"),
    "model={hidden_size:3}": ("model = {hidden_size:3}", "tiny"),
    "model.hidden_size=100 model.num_attention_heads=8": ("hidden_size = 100", "96 or 104"),
    "model.num_attention_heads=4 model.num_key_value_heads=3": ("nearest: 3 or 6",),
    "model.hidden_size=12": ("model.hidden_size = 12", "nearest: 8 or 16"),
    "data.sequence_length=1024": ("data.sequence_length = 1024", "max_position_embeddings = 512"),
    "data.source=stdlb": ("data.source = stdlb", "stdlib"),
    "expansion=dsu": (
        "expansion = dsu",
        "dus, interpolate",
        "none, stack, vocab, width",
        "Did you mean dus?",
    ),
    "expansion=[width,dsu]": ("expansion = dsu", "Did you mean dus?"),
    "expansion=[dus,dus]": ("expansion = [dus,dus]", "[dus]"),
    "forgetting=[none,replay]": ("forgetting = [none,replay]", "none can't be combined"),
    "forgetting=gem": (
        "forgetting = gem",
        "distill, ewc, freeze, l2sp, none, online_ewc, replay, self_replay, si",
    ),
    "forgetting=distill forgetting.distill.rows=old": (
        "forgetting.distill.rows = old",
        "forgetting=[replay,distill]",
    ),
    "forgetting=distill forgetting.distill.teacher=nowhere": (
        "forgetting.distill.teacher = nowhere",
        "no such folder",
    ),
    "forgetting=freeze forgetting.freeze.layers=0-9": (
        "forgetting.freeze.layers = 0-9: the trained model has 3 layers; allowed are 0 to",
    ),
    "forgetting=freeze forgetting.freeze.layers=[0,atention]": (
        "forgetting.freeze.layers = [0,atention]",
        "Did you mean 'attention'?",
    ),
    "forgetting=freeze forgetting.freeze.layers=experts": ("the model has no experts",),
    "forgetting=freeze forgetting.freeze.layers=[0-2,head,norm]": ("nothing would be trained",),
    "forgetting=freeze forgetting.freeze.new_only=true expansion=dus": (
        "forgetting.freeze.new_only = true: dus adds no new weights",
    ),
    "forgetting=freeze forgetting.freeze.new_only=true expansion=none": ("nothing is new",),
    "forgetting=freeze forgetting.freeze.new_only=true control=true": (
        "the control is not expanded",
    ),
    "forgetting=freeze forgetting.freeze.old_experts=true": ("the model is dense",),
    f"{_TASKS} expansion=llama_pro expansion.llama_pro.new_blocks_only=true": (
        "expansion.llama_pro.new_blocks_only = true: later tasks would train the whole model",
    ),
    f"{_TASKS} expansion=[moe,moe_add]": (
        "adaptation.freeze_base = true: later tasks would train the whole model",
    ),
    f"{_TASKS} expansion=vocab forgetting=freeze forgetting.freeze.old_rows=true": (
        "forgetting.freeze.old_rows = true: later tasks would freeze new weights too",
    ),
    "trainer.limit_val_batches=1": ("limit_val_batches", "always on the same data"),
    "experts=dylora data.packing=documents trainer.accumulate_grad_batches=2": (
        "trainer.accumulate_grad_batches = 2: rehearsed rows",
    ),
    "forgetting=[ewc,online_ewc]": (
        "forgetting = [ewc,online_ewc]: several of them prepare fisher; leave one out",
    ),
    "forgetting=freeze forgetting.freeze.until=250": (
        "forgetting.freeze.until = 250: the training run has training.max_steps = 250",
    ),
    "forgetting=freeze forgetting.freeze.thaw=top_down": ("set forgetting.freeze.until to a step",),
    "forgetting=freeze forgetting.freeze.until=0": ("forgetting.freeze.until = 0",),
    "forgetting=freeze callbacks=ema": ("forgetting=freeze freezes weights",),
    "forgetting.l2sp.l2sp_lambda=3": ("not selected", "forgetting=[replay,l2sp]"),
    "expansion.llama_pro=3": ("expansion.llama_pro = 3", "expansion=[width,llama_pro]"),
    "expansion=width expansion.width.int=fresh": ("Did you mean expansion.width.init?",),
    "expansion.width.hidden_size=48": ("expansion.width.hidden_size = 48", "at least 64"),
    "expansion.width.hidden_size=90": ("expansion.width.hidden_size = 90", "nearest: 88 or 92"),
    "expansion.width.num_attention_heads=6 expansion.width.num_key_value_heads=2 "
    "expansion.width.head_strategy=gqa": (
        "expansion.width.num_attention_heads = 6: llama accepts only head counts that divide its",
        "hidden size of 64; nearest: 8.",
    ),
    "expansion=stack expansion.stack.target_layers=7": (
        "expansion.stack.target_layers = 7",
        "nearest: 6 or 9",
        "expansion.stack.partial",
    ),
    "expansion=interpolate expansion.interpolate.target_layers=3": (
        "expansion.interpolate.target_layers = 3",
        "at least 4",
    ),
    "expansion=dus expansion.dus.target_layers=5": (
        "expansion.dus.target_layers = 5",
        "nearest: 4",
    ),
    "seed=-1": ("seed = -1", "at least 0"),
    "seed=[1": ("seed = [1", "can't be read"),
    "seed=${nowhere}": ("nowhere", "seed"),
    "seed=1,2": ("seed = 1,2", "add -m"),
    "forgetting=l2sp,replay": ("add -m", "forgetting=[l2sp,replay]"),
    "foo": ("'foo'", "KEY=VALUE"),
    "--lr=3": ("--lr=3", "--help"),
    "~model": ("model = null", "choose an option"),
    "~nothing": ("nothing",),
    "experiment=nothing": ("experiment = nothing", "ablation"),
    "hydra/launcher=nothing": ("hydra/launcher = nothing", "basic"),
    "-m hydra/launcher=joblb seed=0,3": ("hydra/launcher = joblb", "Did you mean joblib?"),
    "hydra.run.dri=x": ("hydra.run.dri = x", "Did you mean hydra.run.dir?"),
    "resume=latest": ("resume = latest", "no run in"),
    "resume=elsewhere": ("resume = elsewhere", "latest"),
    "resume=latest hydra.run.dir=x": ("resume = latest", "hydra.run.dir"),
    "-m seed=0,1 training.max_stps=3": ("error: training.max_stps = 3", "training.max_steps?"),
    "-m model=tiny,tinny": ("job 1 (model=tinny)", "Did you mean tiny?"),
    "-m expansion.width.hidden_size=128,90": ("job 1", "88 or 92"),
    "-m training.learning_rate=interval(0,1)": ("interval(0,1)", "range(START,STOP)"),
    "-m seed=shuffle(0,3)": ("seed = shuffle(0,3): ", "values in a fixed order"),
    "-m seed=shuffle(range(0,3))": ("seed = shuffle(range(0,3)): ", "a fixed order: A,B"),
    "-m resume=latest seed=0,1": ("resume = latest", "hydra.sweep.dir"),
    "-m hydra.sweep.subdir=x seed=0,1": ("hydra.sweep.subdir = x",),
    "-m hydra.verbose=true,false": ("hydra.verbose = true,false", "one value"),
    "~forgetting=replay": ("~forgetting = replay", "forgetting=[A,B]"),
    "+experiment=nothing": ("experiment = nothing", "ablation"),
    "~hydra/launcher": ("hydra/launcher = null", "name of an option"),
    "hydra.hydra_logging.root.level=LOUD": ("Hydra can't start", "configure root logger"),
    "hydra.searchpath=[/nowhere]": ("hydra.searchpath = /nowhere", "there is no such folder"),
    "+hydra.searchpath=[file:///nowhere]": ("hydra.searchpath = /nowhere", "no such folder"),
    "hydra.searchpath=[pkg://nowhere.conf]": ("= pkg://nowhere.conf", "no installed package"),
    "hydra.searchpath=[pkg://]": ("= pkg://", "no installed package"),
    "hydra.searchpath=/tmp": ("hydra.searchpath = /tmp", "hydra.searchpath=[DIR]"),
    "-m hydra.searchpath=a,b seed=0,3": ("hydra.searchpath = a,b", "a list of folders"),
    "hydra.run.dir='${now:}'": ("hydra.run.dir: ", "resolving interpolation"),
    "hydra.run.dir=": ("hydra.run.dir = (empty)", "a folder"),
    "-m hydra.mode=RUN seed=0,3": ("hydra.mode = RUN", "-m"),
    "-m hydra.sweep.subdir=../x${hydra.job.num} seed=0,3": ("hydra.sweep.subdir = ../x0",),
    "-m hydra.sweep.subdir=/tmp/x${hydra.job.num} seed=0,3": ("hydra.sweep.subdir = /tmp/x0",),
    "-m hydra.sweep.subdir=. seed=0": ("hydra.sweep.subdir = .",),
    "experiment=ablation": ("hydra.sweeper.params", "expansion, forgetting", "add -m"),
    "-m --cfg job seed=0,1": ("--cfg and --multirun: these flags",),
    "data.source={a:{b:1}}": ("data.source = ", "allowed: hf, skills, stdlib, text"),
}


@pytest.mark.quick_cases(10)
@pytest.mark.parametrize("command", REFUSALS)
def test_refused(run: Callable[..., Result], pipeline: FakePipeline, command: str) -> None:
    result = run(*command.split(" "))
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    assert result.out == ""
    for part in REFUSALS[command]:
        assert part in result.err
    assert result.written == []
    assert pipeline.configs == []


def test_the_same_words_without_the_mistake_run(run: Callable[..., Result]) -> None:
    result = run(
        "training.max_steps=3", "training.learning_rate=1", "expansion.width.hidden_size=96"
    )
    assert result.code == 0


def test_all_mistakes_are_told_at_once(run: Callable[..., Result]) -> None:
    result = run("training.max_stps=3", "gate.strict=1", "expansion.width.init=frsh")
    assert "3 things are wrong" in result.err


def test_every_job_of_a_sweep_is_told_of(run: Callable[..., Result]) -> None:
    result = run("-m", "training.learning_rate=-1,2e-4,-3", "training.max_stps=3")
    assert "3 things are wrong" in result.err
    assert "\n  training.max_stps = 3" in result.err  # of all jobs, once
    assert "\n  job 0 (training.learning_rate=-1 training.max_stps=3): training" in result.err
    assert "\n  job 2 (training.learning_rate=-3 training.max_stps=3): training" in result.err


def test_targets_fields_and_rules_are_told_in_this_order(run: Callable[..., Result]) -> None:
    rules = ["trainer.devices=2", "data.sequence_length=1024"]
    fields = ["training.max_steps=0", "gate.strict=1"]
    targets = ["optimizer.name=nadan", "callbacks.x._target_=nowhere.Y", "expansion=dsu"]
    targets += ["+forgetting.replay._target_=os.system", "pretraining=quik"]
    for words in ([], ["-m", "seed=0,1"]):
        result = run(*words, *rules, *fields, *targets)
        assert result.code == 2 and "9 things are wrong" in result.err
        lines = [line.strip().partition(" = ")[0] for line in result.err.splitlines()[1:-1]]
        assert lines[0:2] == ["expansion", "pretraining"]
        assert set(lines[2:5]) == {
            "callbacks.x._target_",
            "forgetting.replay._target_",
            "optimizer.name",
        }
        assert set(lines[5:7]) == {"training.max_steps", "gate.strict"}
        assert lines[7:] == ["trainer.devices", "data.sequence_length"]


@pytest.mark.full
def test_what_is_wrong_with_some_jobs_is_told_once_with_their_numbers(
    run: Callable[..., Result],
) -> None:
    words = ["model=tiny,tinny", "training.max_steps=0,3", "trainer=cpu,ddp", "seed=-1"]
    lines = run("-m", *words).err.splitlines()[1:-1]
    assert [line.strip().partition(" = ")[0] for line in lines] == [
        "jobs 4, 5, 6, 7: model",
        "jobs 0, 1, 4, 5: training.max_steps",
        "seed",
        "jobs 1, 3, 5, 7: trainer.strategy",
    ]


def test_keys_below_an_option_that_there_is_not_are_not_judged(run: Callable[..., Result]) -> None:
    result = run("data=txt", "data.old=nowhere", "training.max_stps=3")
    assert "2 things are wrong" in result.err
    assert "Did you mean text?" in result.err and "training.max_steps?" in result.err


def test_a_wrong_section_hides_no_rule_that_does_not_read_it(run: Callable[..., Result]) -> None:
    words = ["trainer.precision=bf16-mixd", "trainer.devices=2", "data.sequence_length=1024"]
    result = run(*words, "gate.enabled=false", "gate.strict=true")
    assert "3 things are wrong" in result.err  # trainer.devices is not judged
    for key in ("trainer.precision", "data.sequence_length", "gate.strict"):
        assert f"\n  {key} = " in result.err


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ with experiments that a test may change."""
    import shutil

    folder = tmp_path.parent / f"{tmp_path.name}-conf"
    shutil.copytree(config_folder(), folder)
    monkeypatch.setattr(folders, "config_folder", lambda: folder)
    monkeypatch.setattr(composition, "config_folder", lambda: folder)
    return folder / "experiment"


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (
            "hydra: {callbacks: {x: {_target_: os.system}}}",
            ("hydra.callbacks.x._target_ = os.system", "experiment/x.yaml"),
        ),
        (
            "a: {x: {_target_: os.system}}\nhydra: {callbacks: '${a}'}",
            ("hydra.callbacks = ${a}", "experiment/x.yaml"),
        ),
        ("hydra: {launcher: {_target_: os.system}}", ("hydra.launcher._target_ = os.system",)),
        ("training: {max_stps: 3}", ("training.max_stps = 3", "experiment/x.yaml", "max_steps")),
        ("training: {max_steps: many}", ("training.max_steps = many", "experiment/x.yaml")),
        ("trianing: {max_steps: 3}", ("trianing.max_steps", "training.max_steps")),
        ("forgetting: {l2sp: {l2sp_lambda: 3}}", ("not selected", "experiment/x.yaml")),
        ("forgetting: {replay: {fractoin: 0.1}}", ("forgetting.replay.fraction?",)),
        ("defaults:\n  - override /expansion: dsu", ("expansion = dsu", "dus", "experiment/x")),
        ("training: {max_steps: 3", ("line", "YAML")),
        ("logger: {wandb: {mode: on}}", ("logger.wandb.mode", "off, offline, online")),
    ],
)
def test_mistakes_in_an_experiment_file(
    run: Callable[..., Result], experiments: Path, body: str, parts: tuple[str, ...]
) -> None:
    (experiments / "x.yaml").write_text(f"# @package _global_\n# A trial\n{body}\n")
    for words in (["experiment=x"], ["-m", "experiment=x", "seed=0,1"]):
        result = run(*words)
        assert result.code == 2
        for part in parts:
            assert part in result.err
        assert result.written == []


def test_an_experiment_without_mistakes_composes(experiments: Path) -> None:
    text = "# @package _global_\ntraining: {max_steps: 3}\nlogger: {wandb: {mode: off}}\n"
    (experiments / "x.yaml").write_text(text)
    config = composition.load_config(["experiment=x"])
    assert (config.training.max_steps, config.wandb) == (3, None)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words", [["training.max_stps=3"], ["-m", "seed=0,1", "expansion=dsu"], ["resume=latest"]]
)
def test_the_program_itself_refuses(tmp_path: Path, words: list[str]) -> None:
    done = run_program(ROOT / "train.py", words, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    done = _program(["--help"], tmp_path)
    assert done.returncode == 0
    assert done.stdout.count("python train.py") >= 3
    for word in ("llama_pro", "replay", "outputs/runs", "Exit codes"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    code = "import sys, train; train.main(train.pipeline, arguments=['-h']); print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = set(imported.stdout.splitlines()[-1].split())
    assert not {"torch", "hydra", "lightning", "transformers"} & modules


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        ["growht=x"],
        ["trainer.max_stepz=3"],
        ["optimizer.beta=[0.9,0.99]"],
        ["model=hf", "model.path=nowhere"],
        ["expansion=width", "expansion.width.hidden_size=1"],
        ["forgetting=[ewc,replay,si]", "growth=foam", "growht=x"],
        ["--cfg", "job"],
    ],
    ids=" ".join,
)
def test_refusals_import_no_training_library(words: list[str]) -> None:
    code = f"import sys, train; train.main(train.pipeline, arguments={words})\n"
    code += "print('\\n', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = set(done.stdout.splitlines()[-1].split())
    assert not {"torch", "numpy", "lightning", "transformers", "datasets", "wandb"} & modules


def _program(words: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_a_gpu_that_is_not_there_is_refused(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for words in (["trainer=gpu"], ["-m", "trainer=cpu,gpu"]):
        result = run(*words)
        assert result.code == 2
        assert "trainer.accelerator" in result.err and "auto" in result.err
        assert result.written == []


def test_compiling_without_a_compiler_is_refused_before_anything_is_written(
    run: Callable[..., Result], pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = run("trainer.compile=true")
    assert (result.code, result.written, pipeline.configs) == (2, [], [])
    assert "trainer.compile = true: torch.compile requires a C++ compiler" in result.err
    assert "no-such-compiler" in result.err and "trainer.compile=false" in result.err
    assert run("trainer.compile=false").code == 0


@pytest.mark.parametrize(
    "words, reason",
    [
        (("trainer=cpu",), "trainer.strategy = auto: torchrun started 2 processes on each machine"),
        (("trainer=ddp", "trainer.devices=3"), "trainer.devices = 3: torchrun started 2 processes"),
        (("trainer=ddp", "data.batch_size=6"), "a multiple of the number of processes = 4"),
    ],
)
def test_the_settings_must_agree_with_the_launcher(
    words: tuple[str, ...], reason: str, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launch("torchrun", rank=0, count=4, local_rank=0, local_count=2)
    found = SimpleNamespace(of=lambda: launch)
    monkeypatch.setattr("tritter.training.options.Launch", found)
    result = run(*words)
    assert (result.code, result.written) == (2, [])
    assert reason in " ".join(result.err.split())


def test_a_program_under_torchrun_starts_no_run_in_every_process(
    pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launch("torchrun", rank=1, count=2, local_rank=1, local_count=2)
    monkeypatch.setattr(Launch, "of", lambda: launch)
    with pytest.raises(RequestError, match="use train"):
        run_once([], pipeline)
