"""Files of benchmarks: found by name, read in all published formats, refused with all problems."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.evaluation.programs import MBPP_ROWS
from tests.hostile.values import parquet_bomb
from tritter.data.benchmark_names import HUB_NAMES, PROGRESSIVE_BENCHMARKS, benchmark_names
from tritter.errors import RequestError
from tritter.evaluation.benchmarks import files
from tritter.evaluation.benchmarks.files import Questions, TasksFolder
from tritter.evaluation.benchmarks.formats import BENCHMARKS, Question
from tritter.evaluation.benchmarks.harness import _null_scores

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
CHOICE = {
    "question": "What?",
    "choices": {"text": ["a", "b"], "label": ["A", "B"]},
    "answerKey": "B",
}
PIQA = {"goal": "What?", "sol1": "a", "sol2": "b", "label": 1}


def written(path: Path, rows: list[Any]) -> Path:
    """Write records as JSON lines, compressed if the name ends with .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def loaded(folder: Path, *names: str) -> list[Questions]:
    chosen = [BENCHMARKS[name] for name in benchmark_names(names, key="--tasks")]
    return TasksFolder(folder, key="--tasks-path").load(chosen)


def questions(folder: Path, name: str) -> dict[str, Question]:
    return loaded(folder, name)[0].questions


def test_questions_of_records(tmp_path: Path) -> None:
    written(tmp_path / "piqa_val.jsonl", [PIQA])
    written(
        tmp_path / "boolq_val.jsonl.gz",
        [{"passage": "It rains.", "question": "does it", "label": 1}],
    )
    written(
        tmp_path / "svamp.jsonl", [{"Body": "Two cats", "Question": "How many?", "Answer": 2.0}]
    )
    written(tmp_path / "lambada_test.jsonl", [{"text": "A model grows"}])
    written(tmp_path / "mgsm_test.jsonl", [{"lang": "fr", "question": "Un et un ?", "answer": "2"}])
    written(
        tmp_path / "truthful_qa_mc.jsonl", [{"question": "Who?", "mc1_targets": {"I": 1, "you": 0}}]
    )
    written(
        tmp_path / "math500.jsonl", [{"problem": "Half?", "solution": "$\\boxed{\\frac{1}{2}}$"}]
    )
    written(tmp_path / "bbh/snarks.jsonl", [{"input": "Which?", "target": "(A)"}])
    names = (
        "piqa",
        "boolq",
        "svamp",
        "lambada",
        "mgsm",
        "truthfulqa",
        "hendrycks_math",
        "bbh",
    )
    found = {
        each.benchmark.name: next(iter(each.questions.values()))
        for each in loaded(tmp_path, *names)
    }
    assert found["piqa"] == Question(prompt="Question: What?\nAnswer:", choices=("a", "b"), right=1)
    assert found["boolq"].prompt == "It rains.\nQuestion: does it?\nAnswer:"
    assert found["svamp"].prompt == "Question: Two cats. How many?\nAnswer:"
    assert (found["lambada"].prompt, found["lambada"].answer) == ("A model", "grows")
    assert found["mgsm"].prompt == "Question : Un et un ?\nRéponse :"
    assert found["truthfulqa"].choices[found["truthfulqa"].right] == "I"
    assert found["math"].answer == "\\frac{1}{2}"


def test_the_examples_of_mbpp_are_those_of_lm_eval(tmp_path: Path) -> None:
    """Its list is fixed; importing it would download a metric."""
    rows = [{**MBPP_ROWS[0], "task_id": number, "text": f"{number}."} for number in range(1, 12)]
    written(tmp_path / "mbpp.jsonl", rows)
    (mbpp,) = loaded(tmp_path, "mbpp")
    shown = [re.findall(r"task: (\d+)\.", each.prompt) for each in mbpp.examples["MBPP/11"]]
    assert shown == [["2"], ["3"], ["4"]]


@pytest.mark.parametrize(
    ("text", "is_right"),
    [("It is $18.", True), ("1,0 or 18", True), ("$18.00", False), ("18.5", False), ("", False)],
)
def test_numbers_are_compared_as_lm_eval_does(text: str, is_right: bool) -> None:
    compare = BENCHMARKS["gsm8k"].is_right
    assert compare is not None and compare(Question(prompt="", answer="18"), text) == is_right
    compare = BENCHMARKS["svamp"].is_right
    assert compare is not None and compare(Question(prompt="", answer="18.0"), "It is 18...")


def test_each_question_has_its_examples(tmp_path: Path) -> None:
    train = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(9)]
    written(tmp_path / "gsm8k/train.jsonl.gz", train)
    test = [{"question": f"{n}?", "answer": f"so\n#### {n}"} for n in range(20)]
    written(tmp_path / "gsm8k/test.jsonl", test)
    written(tmp_path / "bbh/snarks.jsonl", [{"input": "Which?", "target": "(A)"}])
    prompts = tmp_path / "bbh/cot-prompts/snarks.txt"
    prompts.parent.mkdir()
    worked = "Q: One?\nA: Let's think step by step.\nSo the answer is (B)."
    prompts.write_text(f"canary\n-----\nFind it.\n\n{worked}\n\n{worked}")
    written(tmp_path / "mbpp.jsonl", MBPP_ROWS)
    gsm8k, bbh, mbpp = loaded(tmp_path, "gsm8k", "bbh", "mbpp")
    draws = Random(1234)
    for shown in gsm8k.examples.values():  # as lm-eval: other ones for each question
        expected = draws.sample(train, 5)
        assert [each.worked for each in shown] == [row["answer"] for row in expected]
    assert gsm8k.limited(2).examples["11"] == gsm8k.examples["11"]
    (shown,) = bbh.examples.values()
    assert [f"{each.prompt}{each.worked}" for each in shown] == [worked] * 2
    assert bbh.questions["snarks/1"].description == "Find it.\n\n"
    assert list(mbpp.questions) == ["MBPP/12"]  # the others are prompts, or of the training split
    (one,) = mbpp.examples["MBPP/12"]
    assert "[BEGIN]" in one.prompt and one.worked.endswith("\n[DONE]")
    (few,) = TasksFolder(tmp_path, key="").load([BENCHMARKS["gsm8k"]], num_fewshot=2)
    assert few.num_fewshot == 2


def test_examples_that_are_missing_are_named(tmp_path: Path) -> None:
    written(tmp_path / "gsm8k_test.jsonl", [{"question": "6?", "answer": "#### 6"}])
    written(tmp_path / "arc_easy_test.jsonl", [CHOICE])
    written(tmp_path / "arc_easy_train.jsonl", [CHOICE] * 2)
    written(tmp_path / "truthful_qa_mc.jsonl", [{"question": "?", "mc1_targets": {"I": 1, "u": 0}}])
    folder = TasksFolder(tmp_path, key="--tasks-path")
    (found,) = folder.load([BENCHMARKS["gsm8k"]])
    assert found.num_fewshot == 0 and "lm-eval has 5" in found.notes[0]
    names = ["gsm8k", "arc_easy", "truthfulqa"]
    with pytest.raises(RequestError) as refused:
        folder.load([BENCHMARKS[name] for name in names], num_fewshot=3)
    one, other = refused.value.problems
    assert one.key == other.key == "--num-fewshot" and "gsm8k...train" in str(one.reason)
    assert "3 examples need 3 records, and there are 2" in str(other.reason)
    fixed, arc = folder.load([BENCHMARKS["truthfulqa"], BENCHMARKS["arc_easy"]], num_fewshot=2)
    assert (fixed.num_fewshot, arc.num_fewshot) == (0, 2) and "fixed prompt" in fixed.notes[0]


def test_too_few_examples_of_a_data_set_are_named() -> None:
    with pytest.raises(RequestError) as refused:
        Questions.of_rows(BENCHMARKS["arc_easy"], [CHOICE] * 2, origin="arc_easy", num_fewshot=3)
    (problem,) = refused.value.problems
    assert (problem.key, problem.value) == ("num_fewshot", 3) and "arc_easy" in str(problem.reason)


def test_the_test_split_is_preferred_and_training_files_are_left(tmp_path: Path) -> None:
    for name in ("arc_easy_train.jsonl", "arc_easy_val.jsonl", "arc_easy_test.jsonl"):
        written(tmp_path / "deep/er" / name, [{**CHOICE, "question": name}])
    (found,) = loaded(tmp_path, "arc_easy")
    assert found.files == ("deep/er/arc_easy_test.jsonl",)
    (tmp_path / found.files[0]).unlink()
    assert loaded(tmp_path, "arc_easy")[0].files == ("deep/er/arc_easy_val.jsonl",)
    (tmp_path / "deep/er/arc_easy_val.jsonl").unlink()
    with pytest.raises(RequestError, match="no file of arc_easy"):
        loaded(tmp_path, "arc_easy")


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    written(tmp_path / "piqa_val.jsonl", [PIQA, {**PIQA, "label": 2}, {**PIQA, "label": "1"}])
    written(tmp_path / "arc_easy_test.jsonl", [{"question": "?", "choice": [], "gold": 0}])
    (tmp_path / "boolq_val.jsonl").write_text("{}\n{")
    (tmp_path / "lambada_test.jsonl.gz").write_bytes(b"none")
    written(tmp_path / "gsm8k_test.jsonl", [{"question": "?", "answer": "no mark"}])
    written(tmp_path / "mgsm_en.jsonl", [])
    svamp = {"Body": "Two cats.", "Question": "How many?"}
    written(tmp_path / "svamp.jsonl", [{**svamp, "Answer": each} for each in ("abc", "sNaN", 2)])
    written(tmp_path / "mbpp.jsonl", [{"task_id": 2, "text": "Add."}])
    written(tmp_path / "openbookqa_test.jsonl", [{"question_stem": "half \ud800", **CHOICE}])
    options = {"option1": "he", "option2": "she", "answer": "1"}
    written(tmp_path / "winogrande_val.jsonl", [{"sentence": "It rains.", **options}])
    (tmp_path / "mmlu_test.jsonl").mkdir()
    with pytest.raises(RequestError) as refused:
        loaded(
            tmp_path,
            *("piqa", "arc_easy", "boolq", "lambada", "gsm8k", "svamp", "mmlu"),
            *("mgsm", "mbpp", "winogrande", "openbookqa"),
        )
    for expected in (
        "piqa_val.jsonl, record 2: the index of the correct choice is 2, but there are 2",
        "piqa_val.jsonl, record 3: label = '1' must be of type int",
        "the fields 'question', 'choice', 'gold'; required: question, choices, answerKey",
        "Did you mean choice?",
        "boolq_val.jsonl, line 2 is not valid JSON",
        "lambada_test.jsonl.gz cannot be read",
        "answer has no number after ####",
        "mgsm_en.jsonl has no records",
        "svamp.jsonl, record 1: Answer is not a number",
        "svamp.jsonl, record 2: Answer is not a number",
        "mbpp.jsonl is not a file of mbpp: its records have the fields 'task_id', 'text'",
        "winogrande_val.jsonl, record 1: sentence has no _ to put an option in",
        "openbookqa_test.jsonl, record 1: it contains an unpaired surrogate",
        "it has no file of mmlu",
    ):
        assert expected in str(refused.value), expected


def test_records_to_show_that_are_something_else_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "gsm8k_train.jsonl", [{"prompt": "1?"}])
    written(tmp_path / "gsm8k_test.jsonl", [{"question": "6?", "answer": "#### 6"}])
    with pytest.raises(RequestError, match=r"no few-shot examples of gsm8k.*required: question"):
        loaded(tmp_path, "gsm8k")


def test_names_of_groups_benchmarks_and_lm_eval() -> None:
    assert list(benchmark_names(["reasoning", "arc_challenge"], key="--tasks")) == [
        "bbh",
        "arc_challenge",
    ]
    assert list(benchmark_names(["math"], key="--tasks")) == PROGRESSIVE_BENCHMARKS["math"]
    assert list(benchmark_names(["hendrycks_math", "truthfulqa_mc1"], key="--tasks")) == [
        "math",
        "truthfulqa",
    ]
    with pytest.raises(RequestError, match=r"--tasks = arc_eazy.*Did you mean arc_easy") as refused:
        benchmark_names(["arc_eazy", "cod"], key="--tasks")
    assert "--tasks = cod: " in str(refused.value)


def test_a_limit_takes_of_all_parts(tmp_path: Path) -> None:
    rows = [
        {"question": "?", "choices": list("abcd"), "answer": n % 4, "subject": str(n // 10)}
        for n in range(100)
    ]
    written(tmp_path / "mmlu_test.jsonl", rows)
    (found,) = loaded(tmp_path, "mmlu")
    kept = found.limited(10)
    assert [question.part for question in kept.questions.values()] == [str(n) for n in range(10)]
    assert kept.total == 100 and found.limited(None) is found.limited(100) is found


@pytest.mark.full
@pytest.mark.parametrize(
    ("limit", "more", "why"),
    [
        (None, {}, "is larger than 256 MiB when decompressed"),
        (3, {}, "record 1: the question has more than 1048576 characters"),
        (3, {"other": [""]}, "the question has more than 1048576 characters"),
    ],
)
def test_a_parquet_bomb_is_refused_in_little_memory(
    tmp_path: Path, limit: int | None, more: dict[str, object], why: str
) -> None:
    row = {"question": "", "answer": True, "passage": "", **more}
    (tmp_path / "boolq.parquet").write_bytes(parquet_bomb(row))  # 40 GB
    program = (
        "import re, sys\nfrom pathlib import Path\n"
        "from tritter.errors import RequestError\n"
        "from tritter.evaluation.benchmarks.files import TasksFolder\n"
        "from tritter.evaluation.benchmarks.formats import BENCHMARKS\n"
        "folder = TasksFolder(Path(sys.argv[1]), key='--tasks-path')\n"
        f"try: folder.load([BENCHMARKS['boolq']], limit={limit})\n"
        "except RequestError as error: print(error)\n"
        # Not ru_maxrss, which begins with that of the process that forked
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())\n"
        "print(int(peak[1]) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "boolq.parquet" in done.stdout and why in done.stdout, done
    assert int(done.stdout.split()[-1]) < 1000  # MB; torch has a third of them


def test_a_limit_ends_the_reading_of_a_large_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MAX_FILE_BYTES", 10 * 2**20)
    row = {"question": "", "answer": True, "passage": ""}
    (tmp_path / "boolq.parquet").write_bytes(parquet_bomb(row, size=2**14))
    folder = TasksFolder(tmp_path, key="--tasks-path")
    (found,) = folder.load([BENCHMARKS["boolq"]], limit=3)
    assert len(found.limited(3).questions) == 3 and found.total < 1000
    with pytest.raises(RequestError, match=r"parquet is larger than 10 MiB when decompressed"):
        folder.load([BENCHMARKS["boolq"]])
    monkeypatch.setattr(files, "_SPREAD_ROWS", 20)
    assert folder.load([BENCHMARKS["boolq"]], limit=3)[0].total == 20
    (tmp_path / "boolq.parquet").write_bytes(parquet_bomb(row, size=2**21, rows=1))
    with pytest.raises(RequestError, match=r"record 1: the question has more than 1048576 char"):
        folder.load([BENCHMARKS["boolq"]])


def test_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"passage": "p", "question": "q", "answer": true}\n')
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/boolq.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(RequestError, match=r"--tasks-path: .*boolq.jsonl leaves the folder"):
        TasksFolder(tmp_path / "tasks", key="--tasks-path").load([BENCHMARKS["boolq"]])


class Refusing:
    def run(self, program: str, tests: str = "") -> tuple[str, str]:
        return "" if "return" in program else "it failed", ""

    def check(self) -> None: ...


def test_null_models(tmp_path: Path) -> None:
    rows = [{"passage": "", "question": "?", "label": int(n > 0)} for n in range(4)]
    written(tmp_path / "boolq_val.jsonl", rows)
    written(tmp_path / "bbh/one.jsonl", [{"input": "?", "target": t} for t in "aaab"])
    written(tmp_path / "bbh/two.jsonl", [{"input": "?", "target": t} for t in "ccde"])
    written(tmp_path / "mbpp.jsonl", MBPP_ROWS)
    boolq, bbh, mbpp = loaded(tmp_path, "boolq", "bbh", "mbpp")
    nulls = _null_scores(boolq, sandbox=None)
    assert (nulls.uniform, nulls.constant, nulls.empty, nulls.chance) == (0.5, 0.75, None, 0.75)
    nulls = _null_scores(bbh.limited(2), of=bbh, sandbox=None)
    assert (nulls.uniform, nulls.constant, nulls.empty) == (None, 5 / 8, 0.0)
    assert nulls.chance == 5 / 8
    assert _null_scores(mbpp, sandbox=Refusing()).empty == 0.0


@pytest.mark.skipif(not SHARED.is_dir(), reason="requires the published files next to the project")
def test_the_files_beside_the_project_are_taken_as_they_are() -> None:
    totals = {each.benchmark.name: each.total for each in loaded(SHARED, *BENCHMARKS)}
    assert totals["gsm8k"] == 660 and totals["mmlu"] == 2850 and totals["math"] == 500
    assert totals["bbh"] == 3256 and totals["xcopa"] == 5500 and totals["mbpp"] == 250
    assert list(totals) == list(BENCHMARKS) == list(HUB_NAMES)
