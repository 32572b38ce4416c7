"""Benchmarks in lm-evaluation-harness: its own tasks have the same scores on the same records."""

import dataclasses
import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests import oracle
from tests.evaluation.programs import HUMANEVAL_ROWS
from tests.evaluation.published import PUBLISHED, Rows
from tests.real import real_checkpoint
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.errors import RequestError, TritterError
from tritter.evaluation.benchmarks import harness
from tritter.evaluation.benchmarks.files import Questions
from tritter.evaluation.benchmarks.formats import BENCHMARKS, Benchmark, Question
from tritter.evaluation.benchmarks.harness import (
    BenchmarkScores,
    EvalOptions,
    _task_config,
)

lm_eval = pytest.importorskip("lm_eval")
SHARED = Path(__file__).resolve().parents[3] / "shared/data"
STOCK = Path(lm_eval.__file__).parent / "tasks"
# Ours → lm-eval's task and its folder
TASKS = {
    "hellaswag": ("hellaswag", "hellaswag"),
    "arc_easy": ("arc_easy", "arc"),
    "openbookqa": ("openbookqa", "openbookqa"),
    "commonsenseqa": ("commonsense_qa", "commonsense_qa"),
    "piqa": ("piqa", "piqa"),
    "boolq": ("boolq", "super_glue/boolq"),
    "winogrande": ("winogrande", "winogrande"),
    "mmlu": ("mmlu_anatomy", "mmlu/default"),
    "xcopa": ("xcopa_it", "xcopa"),
    "lambada": ("lambada_openai", "lambada"),
    "gsm8k": ("gsm8k", "gsm8k"),
    "mgsm": ("mgsm_direct_de", "mgsm/direct"),
    "math": ("hendrycks_math500", "hendrycks_math"),
    "bbh": ("bbh_cot_fewshot_snarks", "bbh/cot_fewshot"),
}
# Possible answers of a model, correct or wrong, for each question in order
SAID = {
    "gsm8k": [" 1 + 1 makes $2.", " #### 1,200", " I am 12 or 25"],
    "mgsm": [" 2 und fertig", " 24 oder 25"],
    "math": [" $\\dfrac{1}{2}$ it is", " $3$"],
    "bbh": ["It grows. So the answer is (A).", "So the answer is (A)."],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return oracle.tiny_llama(vocab_size=300, max_position_embeddings=512)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    text = (
        "Question: the model grows a layer where data asks for one.\nAnswer: it keeps what it knew"
    )
    trained = train_tokenizer([Document("d", text * 9)], vocab_size=300)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def asked(name: str, rows: Rows | None = None) -> Questions:
    """Return the questions of records, as from a file with that name."""
    rows = rows or _published(name)
    origin = {"xcopa": "test.it.jsonl", "mgsm": "mgsm_de.jsonl"}.get(name, name)
    return Questions.of_rows(BENCHMARKS[name], rows, origin=origin)


def _published(name: str) -> Rows:
    return PUBLISHED[name if name in PUBLISHED else TASKS[name][0]]


def stock_task(name: str, rows: Rows | None = None) -> Any:
    """Return lm-eval's own task on the same records, without few-shot examples."""
    import datasets
    from lm_eval.tasks import TaskManager

    task, folder = TASKS[name]
    held = datasets.Dataset.from_list(rows or _published(name))
    splits = dict.fromkeys(("train", "validation", "test", "dev"), held)
    manager = TaskManager(include_path=str(STOCK / folder), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
        loaded = manager.load([task])["tasks"][task]
    loaded.set_config(key="num_fewshot", value=0)
    return loaded


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", [name for name in TASKS if name not in SAID])
def test_choices_score_as_lm_evals_own_task_scores_them(
    model: Any, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    agrees_with_lm_eval(model, tokenizer, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hellaswag", "arc_easy", "piqa", "lambada"])
def test_a_real_model_scores_as_lm_evals_own_task_scores_it(name: str) -> None:
    files = (SHARED / TASKS[name][1]).glob(f"{name}_*")
    path = next((each for each in files if "train" not in each.name), None)
    if path is None:
        pytest.skip(f"it needs files of {name} in {SHARED}")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 60)]
    folder = real_checkpoint("smollm2")
    chosen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    agrees_with_lm_eval(chosen, AutoTokenizer.from_pretrained(folder), name, rows)


def agrees_with_lm_eval(model: Any, tokenizer: Any, name: str, rows: Rows | None = None) -> None:
    """Compare the scores of each question of a benchmark with those of lm-eval's own task."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    ours = EvalOptions(batch_size=3).score(model, tokenizer, asked(name, rows))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=512)
    task = stock_task(name, rows)
    task_dict = {"tasks": {"stock": task}, "groups": {}}
    theirs = evaluate(lm=lm, task_dict=task_dict, bootstrap_iters=0)
    assert theirs is not None
    (results,) = theirs["results"].values()
    (samples,) = theirs["samples"].values()
    metrics = [metric for metric in ours.scores if f"{metric},none" in results]
    assert ours.metric in metrics
    for metric in metrics:
        assert ours.scores[metric].mean() == results[f"{metric},none"]
        assert ours.scores[metric].values.tolist() == [float(each[metric]) for each in samples]


def test_a_large_vocabulary_is_read_in_smaller_batches(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    whole = EvalOptions().score(model, tokenizer, asked("arc_easy"))
    hook = model.register_forward_hook(lambda *seen: sizes.append(seen[-1].logits[..., 0].numel()))
    monkeypatch.setattr("tritter.evaluation.losses._MAX_LOGITS", 300 * 60)
    parts = EvalOptions().score(model, tokenizer, asked("arc_easy"))
    hook.remove()
    assert max(sizes) <= 60 and len(sizes) > 2
    assert parts.scores["acc"].values.equal(whole.scores["acc"].values)


def test_a_tied_model_is_scored_with_its_experts(tokenizer: PreTrainedTokenizerFast) -> None:
    from tritter.checkpoints.expert_files import AdapterShape
    from tritter.methods.experts.mixture import ExpertMixture

    tied = oracle.tiny_llama(vocab_size=300, max_position_embeddings=512, tie_word_embeddings=True)
    alone = EvalOptions().score(tied, tokenizer, asked("arc_easy"))
    mixture = ExpertMixture(tied, router="evidence")
    mixture.add("new", AdapterShape(2, 4.0, ("embed_tokens", "lm_head")), seed=0)
    found = EvalOptions().score(mixture.model, tokenizer, asked("arc_easy"))
    assert found.primary.values.equal(alone.primary.values)  # a new expert changes nothing
    assert "tie_weights" not in vars(mixture.model)


def test_likelihoods_of_bfloat16_models_are_summed_in_float32(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    half = oracle.tiny_llama(vocab_size=300, max_position_embeddings=512).bfloat16()
    found: list[tuple[float, bool]] = []
    scored = HFLM.loglikelihood

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        found.extend(scored(self, *args, **options))
        return found

    monkeypatch.setattr(HFLM, "loglikelihood", noted)
    EvalOptions().score(half, tokenizer, asked("piqa"))
    values = torch.tensor([value for value, _ in found])
    assert len(values) == 8 and not values.bfloat16().float().equal(values)


def spoken(texts: list[str]) -> Any:
    """Return a language model that answers with these texts in order and records the prompts."""
    from lm_eval.api.model import LM

    class Spoken(LM):
        def __init__(self) -> None:
            super().__init__()
            self.prompts: list[str] = []

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            self.prompts = [request.args[0] for request in requests]
            return texts

        def loglikelihood(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Spoken()


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", SAID)
def test_answers_are_read_as_lm_evals_own_task_reads_them(name: str) -> None:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    questions = asked(name)
    config = _task_config(questions, length=512, sandbox=None)
    scores, prompts = [], []
    for task in (ConfigurableTask(config=config), stock_task(name)):
        lm = spoken(SAID[name])
        found = evaluate(lm=lm, task_dict={"tasks": {"it": task}, "groups": {}}, bootstrap_iters=0)
        assert found is not None
        (results,) = found["results"].values()
        wanted = [f"exact_match,{BENCHMARKS[name].hub_filter}", "exact_match,none"]
        scores.append(next(results[key] for key in wanted if key in results))
        prompts.append(lm.prompts)
    assert scores[0] == scores[1]
    assert 0 < scores[0] < 1
    if name == "bbh":  # whose file of examples begins with what the subtask is about
        prompts[1] = [prompt[prompt.index("Q: ") :] for prompt in prompts[1]]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("said", ["It is -18", "10-18", "1.8", "18.00", "$18.", "18 or 1,8", "8"])
def test_numbers_of_mgsm_are_those_of_lm_eval(said: str) -> None:
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    config = stock_task("mgsm").config
    (extract,) = (each for each in config.filter_list if each["name"] == "flexible-extract")
    options = {k: v for k, v in extract["filter"][0].items() if k != "function"}
    predictions = RegexFilter(**options).apply([[said]], [{}])[0]
    (metric,) = config.metric_list
    rules = {k: v for k, v in metric.items() if k.startswith("ignore")}
    theirs = exact_match_fn(predictions=predictions, references=["18"], **rules)["exact_match"]
    compare = BENCHMARKS["mgsm"].is_right
    assert compare is not None
    assert compare(Question(prompt="", answer="18"), said) == bool(theirs)


def test_a_benchmark_of_the_hub_is_lm_evals_own(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    class Manager:
        def load(self, names: list[str]) -> dict[str, Any]:
            assert names == ["arc_easy"]
            return {"tasks": {"arc_easy": stock_task("arc_easy")}, "groups": {}}

    benchmark = BENCHMARKS["arc_easy"]
    theirs = EvalOptions().score_from_hub(model, tokenizer, benchmark, manager=Manager())
    ours = EvalOptions().score(model, tokenizer, asked("arc_easy"))
    assert theirs.primary.values.tolist() == ours.primary.values.tolist()
    assert theirs.nulls.uniform == ours.nulls.uniform == pytest.approx((1 + 1 / 2) / 4)
    few = EvalOptions(limit=2).score_from_hub(model, tokenizer, benchmark, manager=Manager())
    assert len(few.primary) == 2 and few.notes


def test_without_a_hub_it_says_what_to_do(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    class Offline:
        def load(self, names: list[str]) -> dict[str, Any]:
            raise ConnectionError("Couldn't reach the Hub")

    with pytest.raises(RequestError, match=r"can't load piqa .*--tasks-path DIR"):
        EvalOptions().score_from_hub(model, tokenizer, BENCHMARKS["piqa"], manager=Offline())
    of_a_run = EvalOptions(keys=("evaluation.tasks", "evaluation.tasks_path"))
    with pytest.raises(
        RequestError, match=r"evaluation.tasks = piqa.* files, evaluation.tasks_path"
    ):
        of_a_run.score_from_hub(model, tokenizer, BENCHMARKS["piqa"], manager=Offline())
    with pytest.raises(RequestError, match="has no such task"):
        EvalOptions().score_from_hub(model, tokenizer, BENCHMARKS["svamp"])


class Knowing:
    """Runs nothing; programs that contain the word pass."""

    def __init__(self, word: str) -> None:
        self.word, self.programs = word, []  # type: ignore[var-annotated]

    def run(self, program: str, tests: str = "") -> tuple[str, str]:
        self.programs.append(program + tests)
        return "" if self.word in program + tests else "it failed", ""

    def check(self) -> None: ...


def test_programs_go_to_the_sandbox_and_nowhere_else(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{**row, "prompt": "def f():\n", "test": f"{row['test']}"} for row in HUMANEVAL_ROWS]
    sandbox = Knowing("twice")
    questions = asked("humaneval", rows)
    scores = EvalOptions(sandbox=sandbox).score(model, tokenizer, questions)
    assert scores.primary.values.tolist() == [0.0, 1.0]
    assert scores.nulls.empty == 0.5 and len(sandbox.programs) == 4
    assert sandbox.programs[0].endswith("check(largest)")


def test_what_is_cut_and_limited_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    model = oracle.tiny_llama(vocab_size=300, max_position_embeddings=24)
    rows = [*PUBLISHED["arc_easy"]]
    choices = {"text": ["a", "grows " * 30], "label": ["A", "B"]}
    rows.append({"question": "?", "choices": choices, "answerKey": "A"})
    scores = EvalOptions(limit=5).score(model, tokenizer, asked("arc_easy", rows))
    notes = " ".join(scores.notes)
    assert "Skipped 1 of 5 questions" in notes and "prompts on the left" in notes
    assert len(scores.primary) == 4
    scores = EvalOptions(limit=2).score(model, tokenizer, asked("gsm8k"))
    assert "2 of 3 questions" in " ".join(scores.notes)
    assert "Answers are limited to 12 instead of 256 tokens" in " ".join(scores.notes)


def broken(value: float) -> Callable[[], Any]:
    def build() -> Any:
        model = oracle.tiny_llama(vocab_size=300)
        with torch.no_grad():
            model.lm_head.weight.fill_(value)
        return model

    return build


def test_a_model_that_cannot_tell_choices_apart_scores_no_more_than_chance(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """lm-eval selects the first of equal choices, and TruthfulQA's correct choice is first."""
    rows = [
        {"question": f"{n}?", "mc1_targets": {"same": 1, "Same": 0, "samE": 0, "saMe": 0}}
        for n in range(400)
    ]
    questions = asked("truthfulqa", rows)
    right = [question.right for question in questions.questions.values()]
    assert 70 < right.count(0) < 130
    with pytest.raises(TritterError, match="not finite"):
        EvalOptions().score(broken(float("nan"))(), tokenizer, questions)


def test_modes_gradients_and_random_numbers_are_left_as_they_were(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.train()
    state = torch.random.get_rng_state()
    EvalOptions().score(model, tokenizer, asked("piqa"))
    EvalOptions(limit=1).score(model, tokenizer, asked("gsm8k"))
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.sum().backward()
    model.zero_grad()
    model.eval()


def test_without_lm_eval_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.models.huggingface", None)
    with pytest.raises(RequestError, match=r"pip install 'tritter\[evaluation\]'"):
        EvalOptions().score(model, tokenizer, asked("piqa"))


def test_scores_pair_up_question_by_question(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    scores = EvalOptions().score(model, tokenizer, asked("piqa"))
    assert isinstance(scores, BenchmarkScores) and isinstance(BENCHMARKS["piqa"], Benchmark)
    assert scores.primary.identifiers == tuple(f"piqa:{n}" for n in range(1, 5))
    assert scores.primary.unit == "accuracy" and scores.primary.chance == 0.5
    assert dataclasses.is_dataclass(harness.EvalOptions)
