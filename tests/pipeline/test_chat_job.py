"""Conversations through whole jobs: template, loss on answers, packing, scores, next runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests import oracle
from tests.evaluation.published import PUBLISHED
from tests.evaluation.test_benchmark_files import written
from tests.oracle import chat as fixtures
from tritter.checkpoints import Lineage
from tritter.checkpoints.state import KeptSequences
from tritter.cli.main import main
from tritter.cli.train import _recorded_settings
from tritter.config.launch.composition import load_config
from tritter.data.chat import ANSWER, START, ids_of
from tritter.data.documents import Document
from tritter.data.records import Conversation
from tritter.errors import RequestError
from tritter.pipeline import Outcome, run_pipeline

Run = Callable[..., Outcome]
WHOLE = "data.sequence_length=256"  # each conversation is one window
ASKED = "<|im_start|>assistant\n"
RENDERED = "200 conversations are rendered with the chat template; the loss is on answers."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, with and without a template, conversations and plain texts."""
    folder = tmp_path_factory.mktemp("chat")
    fixtures.checkpoint(folder / "base")
    fixtures.checkpoint(folder / "bare", None)
    turns = [fixtures.messages(number, turns=1 + number % 2) for number in range(200)]
    talks = [{"messages": each, "id": number} for number, each in enumerate(turns)]
    pairs = [{"instruction": m[0]["content"], "output": m[1]["content"]} for m in turns[::2]]
    texts = [{"text": " ".join(m["content"] for m in each)} for each in turns]
    openings = [{"prompt": "", "completion": m[1]["content"]} for m in turns]
    named = {"talks": talks, "pairs": pairs, "texts": texts, "openings": openings}
    for name, records in named.items():
        content = "\n".join(json.dumps(record) for record in records)
        (folder / f"{name}.jsonl").write_text(content)
    (folder / "own.jinja").write_text(fixtures.INSTRUCT)
    return folder


@pytest.fixture(scope="module")
def run(place: Path, cache: Path) -> Run:
    def run_job(folder: Path, *overrides: str) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        words = (
            *("model=hf", f"model.path={place / 'base'}", "data=text"),
            *(f"data.old={place / 'texts.jsonl'}", f"data.new={place / 'talks.jsonl'}"),
            *("data.sequence_length=64", "data.batch_size=8", "training.max_steps=4"),
            *("evaluation.every_n_steps=2", "evaluation.sample_tokens=4", "expansion=none"),
            *("forgetting=replay", "gate=off", "logger=csv", "trainer.progress=off"),
            *(f"cache_dir={cache}", *overrides),
        )
        return run_pipeline(load_config(words), run_folder=folder)

    return run_job


@pytest.fixture(scope="module")
def done(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "run"
    run(folder, "forgetting=[ewc,replay]", "forgetting.replay.keep=3", "expansion=dus", WHOLE)
    return folder


def stock_scores(folder: Path, records: list[dict[str, list[dict[str, str]]]]) -> tuple[float, int]:
    """Return nats and bytes of all answers, with transformers alone."""
    model, own = oracle.stock(folder), AutoTokenizer.from_pretrained(folder)
    nats, num_bytes = 0.0, 0
    for record in records:
        turns = record["messages"]
        ids = own.apply_chat_template(turns)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for at in range(1, len(turns), 2):
            prompt = own.apply_chat_template(turns[:at], add_generation_prompt=True)["input_ids"]
            until = own.apply_chat_template(turns[: at + 1])["input_ids"]
            nats -= sum(float(log_p[p - 1, ids[p]]) for p in range(len(prompt), len(until)))
            num_bytes += len(turns[at]["content"].encode())
    return nats, num_bytes


@pytest.mark.full
def test_scores_are_those_of_answers_under_the_template(done: Path, place: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert RENDERED in summary["notes"]
    scores = json.loads((done / "scores/attempt_1-trained.json").read_text())["new"]
    # Identifiers contain the beginning of the document
    lines = map(json.loads, (place / "talks.jsonl").read_text().splitlines())
    by_start = {Document.of(Conversation.of_record(each)).identifier: each for each in lines}
    by_name = {" ".join(start.split()): each for start, each in by_start.items()}
    held_out = [by_name[name[17:]] for name in scores["identifiers"]]
    assert 20 < len(held_out) < 70
    nats, num_bytes = stock_scores(done / "checkpoint", held_out)
    assert sum(scores["values"]) == pytest.approx(nats, rel=1e-5)
    assert sum(scores["weights"]["bytes"]) == num_bytes


@pytest.mark.full
def test_the_model_rehearses_conversations_too(run: Run, place: Path, tmp_path: Path) -> None:
    """The old domain is only scored, so how its conversations are packed is not reported."""
    old = f"data.old={place / 'talks.jsonl'}"
    run(
        tmp_path, old, f"data.new={place / 'pairs.jsonl'}", "data.sequence_length=32",
        "forgetting=[distill,self_replay]", "forgetting.self_replay.num_sequences=16",
        "forgetting.self_replay.min_distinct=0", "pipeline.keep_stages=true",
    )  # fmt: skip
    written = load_file(tmp_path / "importance/written.safetensors")["written"]
    own = AutoTokenizer.from_pretrained(place / "base")
    opening = own.encode("<|im_start|>user\n")
    begins = written[(written >= START).any(dim=1)]
    assert 0 < len(begins) < 16
    assert all(ids_of(row[: len(opening)]).tolist() == opening for row in begins)
    notes = json.loads((tmp_path / "summary.json").read_text())["notes"]
    assert any("self_replay: " in note and ", half of them conversations" in note for note in notes)
    assert any(note.startswith("new: ") and "are cut" in note for note in notes)
    assert not any(note.startswith("old: ") and "are cut" in note for note in notes)


@pytest.mark.full
def test_conversations_are_packed_as_documents(done: Path) -> None:
    lineage = Lineage.read(done / "checkpoint")
    assert lineage is not None
    assert lineage.training_config["data"] == {"sequence_length": 256, "packing": "documents"}
    (task,) = json.loads((done / "summary.json").read_text())["tasks"]
    assert 0 < task["packing"]["padding_fraction"] < 0.2
    kept = KeptSequences.read(done / "checkpoint")
    assert int(kept.sequences["new"].max()) >= ANSWER > int(kept.sequences["old"].max())


@pytest.mark.full
def test_prompts_of_samples_are_conversations(done: Path) -> None:
    samples = json.loads((done / "summary.json").read_text())["samples"]
    (prompt,) = (each["prompt"] for each in samples if each["domain"] == "new")
    assert prompt.startswith("<|im_start|>user\n") and prompt.endswith(f"<|im_end|>\n{ASKED}")


@pytest.mark.full
def test_the_gate_states_what_it_scored(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    scores = json.loads((done / "scores/attempt_1-trained.json").read_text())["new"]
    number, tokens = len(scores["identifiers"]), sum(scores["weights"]["tokens"])
    (check,) = (each for each in summary["gate"] if each["subject"] == "new")
    assert check["scored"].startswith(f"answers only, {tokens:,} tokens (")
    assert check["scored"].endswith(f"of {number} of {number} conversations")
    assert any(check["scored"] in note for note in summary["notes"])
    assert all("scored" not in each for each in summary["gate"] if each["subject"] == "old")


def test_data_without_answers_is_refused_before_a_folder_exists(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"messages": fixtures.messages(n)[:1]} for n in range(60)]
    few = [*asked, *({"messages": fixtures.messages(n)} for n in (60,))]
    words = ["train", "model=hf", f"model.path={place / 'base'}", "data=text"]
    for name, records, where in (("none", asked, "train or validation"), ("few", few, "")):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, records)))
        own = [f"data.old={place / 'texts.jsonl'}", f"data.new={data}"]
        assert main([*words, *own, f"hydra.run.dir={tmp_path / name}"]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "data.new = " in error
        assert f"its conversations for {where}" in error
        assert "have no answers" in error
        assert not (tmp_path / name).exists()


@pytest.mark.full
def test_long_prompts_are_scored_and_cuts_are_counted(
    run: Run, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers of held-out conversations begin after `evaluation.max_tokens_per_document`."""
    draw = [" ".join(f"w{n}x{at}" for at in range(n % 90)) for n in range(240)]
    records = [
        {"prompt": f"{text} {n}?", "completion": f"number {n}"} for n, text in enumerate(draw)
    ]
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    run(tmp_path / "run", f"data.new={data}", "evaluation.max_tokens_per_document=64")
    printed = " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    counts, (score,) = (
        summary["data"]["new"],
        (s for n, s in summary["final"].items() if n == "new"),
    )
    assert score["n"] == counts["validation"]
    notes = [note for note in summary["notes"] if note.startswith("new: ")]
    assert any("and are cut" in note for note in notes)
    assert any("Longer than 64 tokens" in note for note in notes)
    assert all(" ".join(note.split()) in printed for note in notes)
    assert "scored new: answers only" in printed
    with pytest.raises(RequestError, match=r"data\.sequence_length = 9: none of .* needs 1"):
        run(tmp_path / "tiny", f"data.new={data}", "data.sequence_length=9")


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.packing=stream"], r"data\.packing = stream: attention would cross conversations"),
        (["data.new={place}/texts.jsonl", "data.loss_on=answers"],
         r"data\.loss_on = answers: the data has no conversations"),
        (["data.new={place}/texts.jsonl", "data.chat_template=tokenizer"],
         r"data\.chat_template = tokenizer: the data has no conversations"),
        (["model.path={place}/bare", "data.chat_template=tokenizer"],
         r"data\.chat_template = tokenizer: the checkpoint's tokenizer has no chat template"),
        (["data.chat_template=tokeniser"],
         r"data\.chat_template = tokeniser: there is no such file.*Did you mean tokenizer\?"),
        (["data.new={place}/bots.jsonl"], r"data\.new = .*bots.*have no answers: messages of the"),
        (["data.loss_on=answer"], r"data\.loss_on = answer: .*Did you mean answers\?"),
        (["data.chat_template={place}/broken.jinja"], r"template fails for .*TemplateSyntaxError"),
    ],
)  # fmt: skip
def test_refusals_come_before_training(
    run: Run, place: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (place / "broken.jinja").write_text("{% for message in messages %}")
    bots = [{"messages": [{"role": "bot", "content": f"number {n}"}]} for n in range(60)]
    (place / "bots.jsonl").write_text("\n".join(map(json.dumps, bots)))
    with pytest.raises(RequestError, match=message):
        run(tmp_path / "run", *(word.format(place=place) for word in words))
    assert not (tmp_path / "run/baseline").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [
        ("forgetting=distill", "forgetting.distill.rows=both", "forgetting.distill.mask_gold=true"),
        ("forgetting=[self_replay,si]",),
        ("forgetting=none", "experts=dylora", "experts.router=both"),
        ("expansion=moe",),
        ("growth=gradmax", "forgetting=ewc", "growth.warmup_steps=0", "growth.check_every=1"),
        ("data.new={place}/pairs.jsonl", "data.old={place}/talks.jsonl"),
        ("data.loss_on=all",),
        ("data.chat_template=none",),
        ("data.chat_template=none", "data.new={place}/openings.jsonl"),
        ("model.path={place}/bare",),
    ],
)
def test_every_method_trains_on_conversations(
    run: Run, place: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    outcome = run(tmp_path / "run", *(word.format(place=place) for word in words))
    assert outcome.status == "ungated"
    (task,) = json.loads((tmp_path / "run/summary.json").read_text())["tasks"]
    assert task["packing"]["padding_fraction"] < 0.2


@pytest.mark.full
def test_plain_text_for_all_tokens_is_the_stream_of_before(
    run: Run, place: Path, tmp_path: Path
) -> None:
    """Without marks, conversations train like texts with the same words: bit for bit."""
    texts = [
        "\n\n".join(f"{m['role']}: {m['content']}" for m in json.loads(line)["messages"])
        for line in (place / "talks.jsonl").read_text().splitlines()
    ]
    same = tmp_path / "same.jsonl"
    same.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    run(tmp_path / "plain", "data.chat_template=none", "data.loss_on=all")
    run(tmp_path / "texts", f"data.new={same}")
    hashes = [
        lineage.model_hash
        for name in ("plain", "texts")
        if (lineage := Lineage.read(tmp_path / name / "checkpoint")) is not None
    ]
    assert len(set(hashes)) == 1


@pytest.mark.full
def test_later_runs_and_commands_read_conversations_alike(
    run: Run, place: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = f"model.path={done / 'checkpoint'}"
    # From the lineage, and from the sequences in the checkpoint
    run(tmp_path / "more", start, "data.old=null", f"data.new={place / 'pairs.jsonl'}")
    run(tmp_path / "kept", start, WHOLE, "data.old={}", f"data.new={place / 'texts.jsonl'}")
    assert "rendered with the chat template" in capsys.readouterr().out
    # A template file becomes that of the checkpoint
    run(tmp_path / "own", f"data.chat_template={place / 'own.jinja'}")
    published = tmp_path / "own/checkpoint"
    assert (published / "chat_template.jinja").read_text() == fixtures.INSTRUCT
    assert AutoTokenizer.from_pretrained(published).chat_template == fixtures.INSTRUCT
    assert "data.chat_template" not in _recorded_settings(published, is_text=True)
    scores = json.loads((done / "scores/attempt_1-trained.json").read_text())["new"]
    capsys.readouterr()
    assert main(["evaluate", str(done / "checkpoint"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["losses"]["new"]["loss"] == pytest.approx(
        sum(scores["values"]) / sum(scores["weights"]["tokens"]), rel=1e-6
    )
    assert RENDERED in found["notes"]
    # Options that change the tokens are those of the next run
    run(tmp_path / "all", "data.loss_on=all", "data.chat_template=none")
    start = f"model.path={tmp_path / 'all/checkpoint'}"
    for name, words, way in (
        ("next", (), "read as plain text (data.chat_template=none); the loss is on all tokens."),
        ("other", ("data.chat_template=tokenizer", "data.loss_on=answers"), RENDERED[22:]),
    ):
        texts = f"data.new={place / 'texts.jsonl'}"
        run(tmp_path / name, start, "data.old=null", texts, *words)
        notes = json.loads((tmp_path / name / "summary.json").read_text())["notes"]
        assert any(note.endswith(way) for note in notes)
    for name in ("own", "all"):
        assert main(["validate", str(place / "base"), str(tmp_path / name / "checkpoint")]) in (
            0,
            3,
        )


@pytest.mark.full
def test_the_recipe_for_a_consumer_gpu_trains_on_conversations(place: Path, tmp_path: Path) -> None:
    config = load_config(
        [
            *("experiment=consumer_gpu", f"model.path={place / 'base'}", "trainer=cpu"),
            *(f"data.old={place / 'texts.jsonl'}", f"data.new={place / 'pairs.jsonl'}"),
            *("optimizer=adamw", "data.sequence_length=64", "training.max_steps=30", "gate=off"),
            *("growth.warmup_steps=0", "growth.check_every=1", "trainer.accumulate_grad_batches=1"),
            *("logger=csv", f"cache_dir={tmp_path / 'cache'}"),
        ]
    )
    run_pipeline(config, run_folder=tmp_path)
    notes = json.loads((tmp_path / "summary.json").read_text())["notes"]
    assert any("conversations are rendered with the chat template" in note for note in notes)


@pytest.mark.full
def test_benchmarks_of_a_run_use_its_template(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    written(tmp_path / "files/arc_easy_test.jsonl", PUBLISHED["arc_easy"] * 3)
    written(tmp_path / "files/arc_easy_train.jsonl", PUBLISHED["arc_easy"])
    words = ("evaluation.tasks=[arc_easy]", f"evaluation.tasks_path={tmp_path}/files")
    chosen = ("evaluation.chat_template=true", "evaluation.num_fewshot=1")
    summary = json.loads(run(tmp_path / "run", *words, *chosen).summary_path.read_text())
    record = summary["final"]["arc_easy"]
    assert (record["metric"], record["num_fewshot"], record["chat_template"]) == (
        "acc_norm",
        1,
        True,
    )
    folder = tmp_path / "run/checkpoint"
    command = f"evaluate {folder} --tasks arc_easy --tasks-path {tmp_path}/files --chat-template"
    command += f" --num-fewshot 1 --output {tmp_path}/found.json"
    assert main(command.split()) == 0
    found = json.loads((tmp_path / "found.json").read_text())["benchmarks"]["arc_easy"]
    assert found["score"] == record["accuracy"] and found["chat_template"]


@pytest.mark.full
def test_samples_are_conversations_with_whole_answers(run: Run, tmp_path: Path) -> None:
    words = ("evaluation.prompts=['the class']", "evaluation.sample_tokens=6")
    summary = json.loads(run(tmp_path / "run", *words).summary_path.read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/checkpoint")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the class"}], add_generation_prompt=True, tokenize=False
    )
    own, talk = summary["samples"][-1], summary["samples"][1]
    assert own["prompt"] == rendered == "<|im_start|>user\nthe class<|im_end|>\n" + ASKED
    assert talk["domain"] == "new" and talk["prompt"].startswith("<|im_start|>user\n")
    assert talk["prompt"].endswith(ASKED)
    rows = (tmp_path / "run/attempt_1/samples.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["prompt"] == rendered
    model = oracle.stock(tmp_path / "run/checkpoint")
    ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(made, skip_special_tokens=True)
    is_cut = int(made[-1]) != tokenizer.eos_token_id
    assert own["after"] == text + (" [cut after 6 tokens]" if is_cut else "")
    assert json.loads(rows[-1])["continuation"] == own["after"]


@pytest.mark.full
def test_prompts_are_messages_in_a_run_on_plain_texts_too(
    run: Run, place: Path, tmp_path: Path
) -> None:
    words = (f"data.new={place / 'texts.jsonl'}", "data.old={}", "forgetting=none")
    words += (
        "evaluation.prompts=['the class']",
        "expansion=vocab",
        "expansion.vocab.tokens=[clas]",
    )
    summary = json.loads(run(tmp_path / "run", *words).summary_path.read_text())
    domain, own = summary["samples"]
    assert own["prompt"].endswith(ASKED) and "<|im_start|>" not in domain["prompt"]
