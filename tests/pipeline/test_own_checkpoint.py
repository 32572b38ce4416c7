"""End-to-end runs on the user's data and checkpoints, on a small scale."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import oracle
from tests.core.families.model_types import example
from tests.oracle.qwen3 import tiny_qwen3
from tests.pipeline.conftest import SMALL
from tests.pipeline.plug import WORK
from tritter.checkpoints import Lineage
from tritter.checkpoints.history import Link
from tritter.config.launch.composition import load_config
from tritter.core.expansions import Width
from tritter.core.families.discovery.twin import Twin
from tritter.core.models import save_tokenizer
from tritter.data import built_in
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.errors import RequestError
from tritter.pipeline import Outcome, run_pipeline
from tritter.transform import expand

FAST = [word for word in SMALL if not word.startswith("model.")]
FAST += ["training.max_steps=4", "pretraining.max_steps=4", "data.vocab_size=300"]
SENTENCE = "the model grows a layer where data asks for one and keeps what it knew — déjà vu"
TEXT_MODEL = [word for word in SMALL if word.startswith("model.")]

Run = Callable[..., dict[str, Any]]


def texts(seed: int, *, count: int = 20) -> list[str]:
    source = random.Random(seed)
    words = [word[:: 1 - 2 * (seed % 2)] for word in SENTENCE.split()]
    return [" ".join(source.choices(words, k=120)) + "\n" for _ in range(count)]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data (`old/*.txt`, `new.jsonl`, `third.jsonl`) and checkpoints (`llama`, `qwen3`)."""
    place = tmp_path_factory.mktemp("library")
    (place / "old").mkdir()
    for number, text in enumerate(texts(0)):
        (place / f"old/{number}.txt").write_text(text)
    for seed, name in ((1, "new"), (2, "third")):
        lines = "".join(json.dumps({"body": text}) + "\n" for text in texts(seed))
        (place / f"{name}.jsonl").write_text(lines)
    # An end of text of its own, and not the first token
    tokenizer = train_tokenizer([Document("d", " ".join(texts(0)))], vocab_size=290)
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.enable_truncation(7)
    for name, model in {"llama": oracle.tiny_llama, "qwen3": tiny_qwen3}.items():
        made = model(vocab_size=300, initializer_range=0.05).to(torch.bfloat16)
        oracle.saved(made, place / name)
        save_tokenizer(tokenizer, place / name, end_of_text="<eos>")
    return place


@pytest.fixture
def run(cache: Path, tmp_path: Path) -> Run:
    def run_words(*words: str, name: str = "run") -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        outcome: Outcome = run_pipeline(
            load_config([*FAST, f"cache_dir={cache}", *words]), run_folder=folder
        )
        return json.loads(outcome.summary_path.read_text())

    return run_words


def text_words(library: Path) -> list[str]:
    paths = [f"data.old={library}/old", f"data.new={library}/new.jsonl"]
    return ["data=text", *paths, "data.text_field=body"]


def lineage_of(folder: Path) -> Lineage:
    lineage = Lineage.read(folder)
    assert lineage is not None
    return lineage


@pytest.mark.full
def test_a_base_is_trained_on_text_of_ones_own(run: Run, library: Path, tmp_path: Path) -> None:
    summary = run(*TEXT_MODEL, *text_words(library))
    assert summary["domains"] == {"old": ["old"], "new": ["new"]}
    for name in ("old", "new"):
        counts = summary["data"][name]
        assert summary["final"][name]["n"] == counts["validation"] > 0
        assert counts["documents"] == counts["train"] + counts["validation"] == 20
    reported = lineage_of(tmp_path / "run/checkpoint").training_config
    assert reported["old"]["old"]["paths"] == [f"{library}/old"]
    assert reported["old"]["old"]["num_documents"] == 20
    base = lineage_of(tmp_path / "run/baseline").training_config
    assert base["old"] == reported["old"] and base["seed"] == 0


@pytest.mark.full
def test_a_base_is_found_again_wherever_its_text_lies(
    run: Run, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(*TEXT_MODEL, *text_words(library), "seed=7")
    shutil.copytree(library, tmp_path / "elsewhere")
    capsys.readouterr()
    second = run(*TEXT_MODEL, *text_words(tmp_path / "elsewhere"), "seed=7", name="again")
    assert "base model from the cache" in capsys.readouterr().out
    assert first["final"] == second["final"]


@pytest.mark.full
def test_named_domains_and_built_in_text(run: Run, library: Path) -> None:
    summary = run(
        *TEXT_MODEL, "data=text", "data.text_field=body", "evaluation.sample_tokens=0",
        f"data.old={{prose:stdlib:prose,notes:[{library}/old]}}",
        f"data.new={{a:{library}/new.jsonl,b:{library}/third.jsonl}}",
    )  # fmt: skip
    assert summary["domains"] == {"old": ["prose", "notes"], "new": ["a", "b"]}
    checks = [(check["check"], check["subject"]) for check in summary["gate"]]
    assert [s for c, s in checks if c == "retention"] == ["prose", "notes"]
    assert [s for c, s in checks if c == "new_capability"] == ["a", "b"]
    assert summary["baseline"]["prose"]["n"] > 50


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", ["expansion=width", "forgetting=[ewc,replay]"]),
        ("qwen3", ["expansion=[llama_pro,width]", "forgetting=replay", "control=true"]),
        ("llama", ["expansion=none", "forgetting=[l2sp,si]", "evaluation.max_documents=2"]),
    ],
)
def test_a_plain_checkpoint(
    run: Run, library: Path, tmp_path: Path, family: str, words: list[str]
) -> None:
    summary = run("model=hf", f"model.path={library / family}", *text_words(library), *words)
    assert "pretraining" not in summary["flops"] | summary["seconds"]
    if summary["expansion"]:
        (preservation,) = (c for c in summary["gate"] if c["check"] == "preservation")
        assert preservation["verdict"] == "passed"
    baseline = tmp_path / "run/baseline"
    source = oracle.stock(library / family, torch.bfloat16).state_dict()
    copied = oracle.stock(baseline, torch.bfloat16).state_dict()
    assert all(torch.equal(copied[name], tensor) for name, tensor in source.items())
    assert (baseline / "tokenizer.json").read_bytes() == (
        library / family / "tokenizer.json"
    ).read_bytes()
    lineage = lineage_of(tmp_path / "run/checkpoint")
    assert lineage.base_model_hash == lineage_of(baseline).model_hash
    assert lineage_of(baseline).training_config["path"] == str(library / family)
    chain = Link.chain(tmp_path / "run/checkpoint")
    assert chain[0].folder is not None and chain[0].folder.resolve() == baseline.resolve()
    assert not [change for link in chain if link.can_be_checked for change in link.differences()]
    trained = json.loads((tmp_path / "run/attempt_1/trained/config.json").read_text())
    assert trained["dtype"] == "bfloat16"
    limit = 2 if "evaluation.max_documents=2" in words else summary["data"]["new"]["validation"]
    assert summary["baseline"]["new"]["n"] == summary["final"]["new"]["n"] == limit
    assert any("new: scores read 2 of" in each for each in summary["notes"]) == (limit == 2)
    why = "training.learning_rate = 1e-05: the default for a checkpoint that records no training"
    assert any(note.startswith(why) for note in summary["notes"])
    assert lineage.training_config["training"]["learning_rate"] == 1e-5


@pytest.mark.full
def test_the_root_has_the_hash_that_expand_gives_it(
    run: Run, library: Path, tmp_path: Path
) -> None:
    run("model=hf", f"model.path={library}/llama", *text_words(library), "expansion=none")
    grown = expand(library / "llama", tmp_path / "grown", [Width()])
    assert lineage_of(tmp_path / "run/baseline").model_hash == grown.lineage.parent_hash


@pytest.mark.full
def test_its_own_tokenizer_and_end_of_text_are_used(
    run: Run, library: Path, tmp_path: Path
) -> None:
    from tritter.pipeline.ledger import Ledger
    from tritter.pipeline.run import Run

    words = ["model=hf", f"model.path={library}/llama", *text_words(library)]
    config = load_config([*FAST, f"cache_dir={tmp_path}", *words])
    context = Run(config, tmp_path, None, Ledger(tmp_path))  # type: ignore[arg-type]
    assert context.data.bounds.end == 290
    documents = context.data.corpus.domains["old"].train
    assert int(documents.offsets.diff().min()) > 7  # no truncation of the tokenizer's last use
    sequences = context.data.training_sequences(["old"])["old"]
    assert int((sequences == 290).sum()) >= len(documents) - 1
    assert (
        context.data.corpus.tokenizer.id_to_token(0) == END_OF_TEXT and not (sequences == 0).any()
    )


@pytest.mark.full
def test_a_checkpoint_of_ours_goes_on_in_its_lineage(
    run: Run, library: Path, tmp_path: Path
) -> None:
    run(*TEXT_MODEL, *text_words(library), "expansion=width", "gate='off'", name="first")
    first = tmp_path / "first/checkpoint"
    summary = run(
        "model=hf", f"model.path={first}", *text_words(library), "expansion=llama_pro",
        "gate='off'",
    )  # fmt: skip
    assert summary["lineage"]["expansions"] == ["width", "llama_pro"]
    assert summary["parameters"]["baseline"] == sum(
        p.numel() for p in oracle.stock(first).parameters()
    )
    chain = Link.chain(tmp_path / "run/checkpoint")
    made = [link.folder.resolve() for link in chain if link.folder]
    assert made[-1] == tmp_path / "run/checkpoint"
    assert tmp_path / "run/baseline" in made and tmp_path / "first/baseline" in made
    assert lineage_of(tmp_path / "run/baseline").model_hash == lineage_of(first).model_hash
    assert not [change for link in chain if link.can_be_checked for change in link.differences()]


@pytest.mark.full
def test_with_the_installations_text(
    run: Run, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a part, because this tokenizer makes the data long."""
    whole = built_in._source_files
    monkeypatch.setattr(built_in, "_source_files", lambda root: whole(root)[::8])
    summary = run("model=hf", f"model.path={library}/llama", "evaluation.sample_tokens=0")
    assert summary["domains"] == {"old": ["prose"], "new": ["code"]}


@pytest.mark.full
def test_without_old_text_nothing_is_said_of_retention(
    run: Run, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(
        "model=hf", f"model.path={library}/llama", "data=text", f"data.new={library}/old",
        "forgetting=none", "expansion=width",
    )  # fmt: skip
    assert summary["domains"]["old"] == []
    assert {check["check"] for check in summary["gate"]} == {
        "training", "gradient_flow", "memory", "preservation", "new_capability",
    }  # fmt: skip
    assert "forgetting is neither measured" in capsys.readouterr().out


def changed_tensor(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))


def no_end_of_text(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": None}))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(other_shape, "has shape"), (no_end_of_text, "eos_token")],
)
def test_a_checkpoint_that_does_not_hold_together_is_a_wrong_request(
    run: Run, library: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(library / "llama", tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(RequestError, match=message):
        run("model=hf", f"model.path={tmp_path}/base", *text_words(library))
    assert not (tmp_path / "run/baseline").exists()


def test_a_checkpoint_of_ours_that_was_changed_is_refused(
    run: Run, library: Path, tmp_path: Path
) -> None:
    expand(library / "llama", tmp_path / "grown", [Width()])
    changed_tensor(tmp_path / "grown")
    with pytest.raises(RequestError, match="was changed since its lineage was written"):
        run("model=hf", f"model.path={tmp_path}/grown", *text_words(library))
    assert not (tmp_path / "run/baseline").exists()


def test_text_that_fills_no_sequence_is_refused_before_anything_is_trained(
    run: Run, library: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.jsonl").write_text("".join(f'{{"body": "{n}"}}\n' for n in range(12)))
    words = ["data=text", f"data.old={library}/old", f"data.new={tmp_path}/few.jsonl"]
    with pytest.raises(RequestError, match=r"sequence_length.*Domain new"):
        run(*TEXT_MODEL, *words, "data.text_field=body")
    assert not (tmp_path / "run/pretraining").exists()


@pytest.mark.full
def test_a_run_goes_on_without_its_source_but_not_with_other_text(
    run: Run, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(library / "llama", tmp_path / "base")
    shutil.copyfile(library / "new.jsonl", tmp_path / "new.jsonl")
    words = ["model=hf", f"model.path={tmp_path}/base", "data=text", f"data.old={library}/old"]
    words += [f"data.new={tmp_path}/new.jsonl", "data.text_field=body"]
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(*WORK["fit"], _interrupted)
        run(*words)
    with (tmp_path / "new.jsonl").open("a") as file:
        file.write('{"body": "more"}\n')
    with pytest.raises(RequestError, match="the data has changed since the run"):
        run(*words)
    shutil.copyfile(library / "new.jsonl", tmp_path / "new.jsonl")
    (tmp_path / "base/model.safetensors").write_bytes(b"changed")
    assert run(*words)["status"] in ("kept", "undecided", "rolled_back")


def _interrupted(*arguments: Any, **options: Any) -> None:
    raise InterruptedError


@pytest.mark.full
def test_without_old_text_the_model_writes_it_once(
    run: Run, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that needs old data uses data generated by the model, also after a resume."""
    from tritter.methods.forgetting import EWC, replay
    from tritter.training import BaseModule, Task

    words = [word for word in text_words(library) if not word.startswith("data.old")]
    words += ["model=hf", f"model.path={library}/llama", "forgetting=[ewc,self_replay]"]
    words += ["expansion=width", "forgetting.self_replay.num_sequences=24"]
    words += ["forgetting.self_replay.sequences_per_text=1"]
    words += ["forgetting.ewc.num_sequences=8", "trainer.save_every_n_steps=2"]
    reported: list[Task] = []
    times: list[int] = []
    begin, write = EWC.begin_task, replay._write_text

    def telling(self: EWC, model: torch.nn.Module, task: Task) -> None:
        reported.append(task)
        begin(self, model, task)

    def counting(*args: Any, **kwargs: Any) -> Any:
        times.append(1)
        return write(*args, **kwargs)

    monkeypatch.setattr(EWC, "begin_task", telling)
    monkeypatch.setattr(replay, "_write_text", counting)
    whole = run(*words)
    with monkeypatch.context() as patch:
        patch.setattr(BaseModule, "training_step", _dies_at(3, BaseModule.training_step))
        with pytest.raises(MemoryError):
            run(*words, name="parts")
    parts = run(*words, name="parts")
    assert len(times) == 2 and parts["lineage"] == whole["lineage"]
    for task in reported:
        assert list(task.old_sequences) == ["written"]
        assert task.written is not None and len(task.written) == 18  # the rest is dropped
        assert torch.equal(task.old_sequences["written"], reported[0].written)  # type: ignore[arg-type]
    assert whole["notes"][-2:] == [
        whole["notes"][-2], "There is no old data: ewc used data generated by the model."
    ]  # fmt: skip
    assert whole["notes"][-2].startswith(
        "self_replay: the model generated 24 sequences of 64 tokens"
    )
    assert whole["flops"]["self_replay"] > 0 < whole["seconds"]["self_replay"]
    assert whole["flops"]["importance"] > whole["flops"]["self_replay"] * 8 / 24


def _dies_at(step: int, training_step: Any) -> Any:
    def stepped(self: Any, *arguments: Any) -> Any:
        if self.global_step == step:
            raise MemoryError
        return training_step(self, *arguments)

    return stepped


@pytest.mark.full
def test_a_teacher_that_is_named_is_learned_from(run: Run, library: Path, tmp_path: Path) -> None:
    """A teacher given by path is equivalent; one with another vocabulary is rejected."""
    words = (*TEXT_MODEL, *text_words(library), "expansion=width", "forgetting=distill")
    run(*words, name="before")
    run(*words, f"forgetting.distill.teacher={tmp_path}/before/baseline", name="named")
    before, named = (
        lineage_of(tmp_path / name / "attempt_1/trained") for name in ("before", "named")
    )
    assert named.model_hash == before.model_hash
    with pytest.raises(RequestError, match=r"distill\.teacher = .*: its tokenizer has a different"):
        run(*words, f"forgetting.distill.teacher={library}/llama", name="refused")
    assert not (tmp_path / "refused/baseline").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("opt", ("expansion=llama_pro", "forgetting=[ewc,replay]")),
        ("mamba", ("expansion=llama_pro", "forgetting=[replay,distill]")),
        ("gpt_oss", ("expansion=dus", "forgetting=replay")),
        ("gpt_oss", ("expansion=width", "forgetting=[ewc,replay]")),
        (
            "starcoder2",
            (
                "expansion=width",
                "expansion.width.init=net2net",
                "expansion.width.noise=0.01",
                "data.packing=documents",
            ),
        ),
        ("opt", ("expansion=none", "forgetting=none", "experts=single_lora")),
        ("olmo3", ("expansion=none", "growth=gradmax", "forgetting=ewc")),
        ("opt", ("expansion=llama_pro", "growth=gradmax", "forgetting=replay")),
    ],
)
def test_a_model_type_without_a_table(
    run: Run, library: Path, tmp_path: Path, model_type: str, words: tuple[str, ...]
) -> None:
    config = Twin.of(example(model_type, num_hidden_layers=4)).config
    config.update({"vocab_size": 300, "eos_token_id": None})
    base = tmp_path / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(library / "qwen3" / name, base)
    start = ("model=hf", f"model.path={base}", *text_words(library), "training.learning_rate=3e-3")
    summary = run(*start, *words)
    assert summary["status"] in ("kept", "ungated", "undecided", "rolled back")
    if {"expansion=llama_pro", "forgetting=[ewc,replay]"} & set(words):
        assert summary["jump"]["relative_to_std"] < 1e-5
    assert summary["final"]["new"]["loss"] < summary["baseline"]["new"]["loss"]
    if "growth" in summary:
        assert summary["growth"]["born"] > 0 and summary["growth"]["function_change"] < 1e-4
    if "experts=single_lora" not in words:
        AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint")
