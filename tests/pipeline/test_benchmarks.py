"""Benchmarks in a run: scored for the baseline and the trained model, gated like retention."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from tests.evaluation.programs import HUMANEVAL_ROWS
from tests.evaluation.published import PUBLISHED
from tests.evaluation.test_benchmark_files import written
from tests.oracle import chat
from tritter.config.launch.composition import load_config
from tritter.config.run_folder import fingerprint
from tritter.core.models import load_model, load_tokenizer
from tritter.data.tokens import TextBounds
from tritter.errors import RequestError
from tritter.evaluation.benchmarks.harness import EvalOptions
from tritter.evaluation.tasks import Reader
from tritter.pipeline import Outcome
from tritter.pipeline.scoring import BenchmarkTask, _tokenizer


@pytest.fixture
def files(tmp_path: Path) -> Path:
    written(tmp_path / "files/arc_easy_test.jsonl", PUBLISHED["arc_easy"] * 10)
    written(tmp_path / "files/humaneval.jsonl", HUMANEVAL_ROWS)
    return tmp_path / "files"


@pytest.mark.full
def test_a_run_asks_them_before_and_after(
    run_tiny: Callable[..., Outcome], tmp_path: Path, files: Path
) -> None:
    pytest.importorskip("lm_eval")
    words = ("evaluation.tasks=[arc_easy]", f"evaluation.tasks_path={files}")
    outcome = run_tiny(tmp_path / "run", *words, "evaluation.task_limit=20", "gate=default")
    summary = json.loads(outcome.summary_path.read_text())
    for stage in ("baseline", "final"):
        record = summary[stage]["arc_easy"]
        assert record["n"] == 20 and 0 <= record["accuracy"] <= 1
    (check,) = [one for one in summary["gate"] if one["subject"] == "arc_easy/accuracy"]
    assert check["check"] == "retention" and check["n"] == 20
    # The same scores as those of the command
    config = load_config([*words, "evaluation.task_limit=20"])
    (task,) = BenchmarkTask.chosen(config.evaluation, positions=512)
    assert task.questions is not None
    folder = tmp_path / "run/checkpoint"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    found = EvalOptions(limit=20).score(model, tokenizer, task.questions)
    assert found.primary.mean() == summary["final"]["arc_easy"]["accuracy"]


def test_what_a_task_is_made_of_is_its_digest(files: Path) -> None:
    pytest.importorskip("lm_eval")

    def digest(*words: str) -> str:
        config = load_config(
            ["evaluation.tasks=[arc_easy]", f"evaluation.tasks_path={files}", *words]
        )
        (task,) = BenchmarkTask.chosen(config.evaluation, positions=512)
        assert isinstance(task, BenchmarkTask) and task.domain is None
        return task.digest

    whole, limited = digest(), digest("evaluation.task_limit=3")
    assert whole == digest() != limited
    rows = [{**row, "answerKey": "A"} for row in PUBLISHED["arc_easy"] * 10]
    written(files / "arc_easy_test.jsonl", rows)
    assert digest() != whole


def test_the_template_and_the_examples_are_part_of_it(files: Path) -> None:
    pytest.importorskip("lm_eval")
    written(files / "arc_easy_train.jsonl", PUBLISHED["arc_easy"])
    basic = ["evaluation.tasks=[arc_easy]", f"evaluation.tasks_path={files}"]

    def task(template: str, *words: str) -> BenchmarkTask:
        options = load_config([*basic, *words]).evaluation
        (found,) = BenchmarkTask.chosen(options, positions=512, stock=chat.tokenizer(template))
        return found

    is_chat = "evaluation.chat_template=true"
    tasks = [
        task(chat.CHATML),
        task(chat.CHATML, is_chat),
        task(chat.INSTRUCT, is_chat),
        task(chat.CHATML, is_chat, "evaluation.num_fewshot=2"),
    ]
    assert len({each.digest for each in tasks}) == 4
    assert task(chat.INSTRUCT).digest == tasks[0].digest  # the template is not used
    assert tasks[0].label == "arc_easy (acc_norm, 0-shot)"
    assert tasks[3].label == "arc_easy (acc_norm, 2-shot, chat template)"
    reader = Reader(chat.tokenizer().backend_tokenizer, TextBounds(0), batch_size=4)
    assert sum(tasks[3].lengths(reader)) > sum(tasks[1].lengths(reader)) > 0
    with pytest.raises(RequestError, match=r"evaluation\.chat_template.*no chat template"):
        BenchmarkTask.chosen(load_config([*basic, is_chat]).evaluation, positions=512)


def test_lm_eval_reads_with_the_special_tokens_of_the_checkpoint() -> None:
    stock = chat.tokenizer(chat.INSTRUCT)
    stock.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", stock.bos_token_id)]
    )
    reader = Reader(stock.backend_tokenizer, TextBounds(stock.eos_token_id), batch_size=4)
    found = _tokenizer(reader, stock)
    assert found.special_tokens_map == stock.special_tokens_map
    assert found.chat_template == stock.chat_template
    for text in ("the class", "<s>[INST] the class [/INST]"):
        assert found.encode(text) == stock.encode(text)
        assert found.encode(text)[0] == stock.bos_token_id


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluation.num_fewshot=2"], "evaluation.num_fewshot = 2: requires evaluation.tasks"),
        (["evaluation.tasks=[arc_eazy]"], "evaluation.tasks = arc_eazy: allowed are"),
        (["evaluation.tasks=[code]"], "allow it with evaluation.allow_code=[humaneval,mbpp]"),
        (["evaluation.allow_code=[piqa]"], "evaluation.allow_code = piqa: allowed are"),
        (["evaluation.tasks_path=nowhere"], "/nowhere: there is no such folder"),
        (
            ["evaluation.tasks_path='~nobody1/x'"],
            "evaluation.tasks_path = '~nobody1/x': there is no",
        ),
        (["evaluation.code_sandbox=docker"], "evaluation.code_sandbox = docker"),
        (["evaluation.task_limit=0"], "evaluation.task_limit = 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_run(words: list[str], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        load_config(words)
    assert message in str(refused.value)


def test_an_external_sandbox_needs_its_command(files: Path) -> None:
    words = ["evaluation.tasks=[humaneval]", "evaluation.allow_code=[humaneval]"]
    words += [f"evaluation.tasks_path={files}", "evaluation.code_sandbox=external"]
    with pytest.raises(RequestError, match=r"evaluation\.code_sandbox_command"):
        load_config(words)
    pytest.importorskip("lm_eval")
    config = load_config([*words, "evaluation.code_sandbox_command=cat"])
    with pytest.raises(RequestError, match="cat"):
        BenchmarkTask.chosen(config.evaluation, positions=512)


def test_a_relative_folder_is_that_of_the_place_where_the_run_began(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files.parent)
    words = ["evaluation.tasks=[arc_easy]", "evaluation.tasks_path=files/../files"]
    config = load_config(words)
    assert config.evaluation.tasks_path == str(files)
    monkeypatch.chdir("/")
    assert fingerprint(config) == fingerprint(
        load_config([words[0], f"evaluation.tasks_path={files}"])
    )


def test_without_benchmarks_a_run_is_the_run_that_it_was() -> None:
    plain = fingerprint(load_config([]))["evaluation"]
    assert not {"tasks", "task_limit", "allow_code"} & set(plain)
    assert "tasks" in fingerprint(load_config(["evaluation.tasks=[piqa]"]))["evaluation"]
