"""Few-shot examples and chat templates: prompts and scores are those of lm-eval's own tasks."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from tests import oracle
from tests.evaluation.published import PUBLISHED, Rows
from tests.evaluation.test_benchmark_files import written
from tests.evaluation.test_benchmarks import STOCK, TASKS
from tests.oracle import chat
from tests.real import real_checkpoint
from tritter.core.models import load_model, load_tokenizer
from tritter.evaluation.benchmarks.files import Questions, TasksFolder
from tritter.evaluation.benchmarks.formats import BENCHMARKS
from tritter.evaluation.benchmarks.harness import (
    EvalOptions,
    _rendered_requests,
)

lm_eval = pytest.importorskip("lm_eval")
NUM_ROWS = 20  # of each benchmark, with a real checkpoint
SHARED = Path(__file__).resolve().parents[3] / "shared/data"
# Split of lm-eval → our name of the file
FILES = {
    "xcopa": {"test": "xcopa_test.it", "validation": "xcopa_val.it"},
    "mgsm": {"test": "mgsm_test_de", "train": "mgsm_train_de"},
    "mmlu": {"test": "mmlu_test", "dev": "mmlu_dev"},
    "lambada": {"test": "lambada_test"},
    "math": {"test": "hendrycks_math_test", "train": "hendrycks_math_train"},
}
TASK_OF = TASKS | {"math": ("hendrycks_math_algebra", "hendrycks_math")}
# As in Gemma: begins with BOS, has no system message
BOS_FIRST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def varied(rows: Rows, numbers: range) -> Rows:
    """Return other records, which differ in their texts."""
    text = json.dumps(rows)
    each = [
        text.replace("odel", f"odel{n}").replace("hat", f"hat{n}").replace("Was", f"Was{n}")
        for n in numbers
    ]
    return [row for changed in each for row in json.loads(changed)]


def splits_of(name: str) -> dict[str, Rows]:
    rows = PUBLISHED[name if name in PUBLISHED else TASKS[name][0]]
    pool = varied(rows, range(5))
    test = [*varied(rows, range(7, 9)), *pool[:3]]  # questions that are examples too
    return {"train": pool, "validation": pool, "dev": pool, "test": test}


def stock(name: str, splits: dict[str, Rows], *, num_fewshot: int | None) -> Any:
    """Return lm-eval's own task on records, as its command configures it."""
    import datasets
    from lm_eval.tasks import TaskManager

    task, folder = TASK_OF[name]
    held = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    manager = TaskManager(include_path=str(STOCK / folder), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: held)
        loaded = manager.load([task])["tasks"][task]
    if num_fewshot is not None and loaded.get_config("num_fewshot") != 0:
        loaded.set_config(key="num_fewshot", value=num_fewshot)
    loaded.set_fewshot_seed(seed=1234)
    return loaded


def ours(name: str, splits: dict[str, Rows], folder: Path, *, num_fewshot: int | None) -> Questions:
    """Return our questions on the same records, in files."""
    files = FILES.get(name, {"test": f"{name}_test", "train": f"{name}_train"})
    for split, file in files.items():
        written(folder / f"{file}.jsonl", splits[split])
    (found,) = TasksFolder(folder, key="--x").load([BENCHMARKS[name]], num_fewshot=num_fewshot)
    return found


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("template", [None, chat.CHATML, BOS_FIRST])
@pytest.mark.parametrize("name", [name for name in TASKS if name != "bbh"])
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_prompts_are_those_of_lm_evals_own_tasks(
    name: str, num_fewshot: int, template: str | None, tmp_path: Path
) -> None:
    splits = splits_of(name)
    theirs = stock(name, splits, num_fewshot=num_fewshot)
    if not theirs.has_test_docs():
        splits = splits | {"validation": splits["test"]}
        theirs = stock(name, splits, num_fewshot=num_fewshot)
    found = ours(name, splits, tmp_path, num_fewshot=num_fewshot)
    assert found.num_fewshot == num_fewshot
    tokenizer = chat.tokenizer(template)
    expected = requests(theirs, tokenizer, is_chat=template is not None)
    is_chat = template is not None
    assert _rendered_requests(tokenizer, found, length=512, is_chat=is_chat) == expected
    assert len(set(map(tuple, expected))) > 2


def requests(task: Any, tokenizer: Any, *, is_chat: bool) -> list[list[str]]:
    """Return the texts of the requests of lm-eval's own task, per question."""
    from lm_eval.models.huggingface import HFLM

    lm: Any = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    task.build_all_requests(
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
        chat_template=partial(HFLM.apply_chat_template, lm) if is_chat else None,
    )
    texts: dict[int, list[str]] = {}
    for each in task.instances:
        prompt, more = each.args
        text = prompt + (more if isinstance(more, str) else "")
        texts.setdefault(each.doc_id, []).append(text)
    return list(texts.values())


def test_bbh_shows_the_examples_of_its_prompt_files(tmp_path: Path) -> None:
    splits = splits_of("bbh")
    theirs = stock("bbh", splits, num_fewshot=None)
    description, shown = theirs.config.description, theirs.fewshot_cfg.samples
    worked = "\n\n".join(
        f"Q: {each['input']}\nA: Let's think step by step.\n{each['target']}" for each in shown
    )
    prompts = tmp_path / "bbh/cot-prompts/snarks.txt"
    prompts.parent.mkdir(parents=True)
    prompts.write_text(f"canary\n-----\n{description}{worked}\n")
    written(tmp_path / "bbh/snarks.jsonl", splits["test"])
    (found,) = TasksFolder(tmp_path, key="--x").load([BENCHMARKS["bbh"]])
    assert found.num_fewshot == 3
    for template in (None, chat.CHATML):
        tokenizer = chat.tokenizer(template)
        is_chat = template is not None
        expected = requests(theirs, tokenizer, is_chat=is_chat)
        assert _rendered_requests(tokenizer, found, length=4096, is_chat=is_chat) == expected


def scored(model: Any, tokenizer: Any, task: Any, *, is_chat: bool) -> Iterator[dict[str, Any]]:
    """Yield the samples of lm-eval's own evaluation, in order."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    results = evaluate(
        lm=lm,
        task_dict={"tasks": {"it": task}, "groups": {}},
        bootstrap_iters=0,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
    )
    assert results is not None
    (samples,) = results["samples"].values()
    yield from sorted(samples, key=lambda sample: int(sample["doc_id"]))


def assert_agrees(
    name: str, model: Any, tokenizer: Any, found: Questions, task: Any, *, is_chat: bool
) -> None:
    """Assert that our prompts, and our scores of each question, are those of lm-eval."""
    prompts = requests(task, tokenizer, is_chat=is_chat)
    assert _rendered_requests(tokenizer, found, length=4096, is_chat=is_chat) == prompts
    task.set_fewshot_seed(seed=1234)
    options = EvalOptions(batch_size=16, is_chat=is_chat)
    scores = options.score(model, tokenizer, found)
    kept = (BENCHMARKS[name].hub_filter, "none")
    samples = [
        each for each in scored(model, tokenizer, task, is_chat=is_chat) if each["filter"] in kept
    ]
    assert scores.is_chat == is_chat and scores.num_fewshot == task.get_config("num_fewshot")
    for metric, paired in scores.scores.items():
        assert paired.values.tolist() == [float(each[metric]) for each in samples]


@pytest.mark.full
@pytest.mark.parametrize("template", [None, BOS_FIRST])
@pytest.mark.parametrize("name", ["gsm8k", "arc_easy", "hellaswag"])
def test_scores_are_those_of_lm_eval(name: str, template: str | None, tmp_path: Path) -> None:
    tokenizer = chat.tokenizer(template)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    model = oracle.tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    read: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: read.extend((kwargs.get("input_ids", *args[:1])).tolist()),
        with_kwargs=True,
    )
    splits = splits_of(name)
    splits = splits | {"validation": splits["test"]}
    task = stock(name, splits, num_fewshot=2)
    found = ours(name, splits, tmp_path, num_fewshot=2)
    assert_agrees(name, model, tokenizer, found, task, is_chat=template is not None)
    begins = [ids for ids in read if tokenizer.bos_token_id in ids]
    assert begins and all(ids.count(tokenizer.bos_token_id) == 1 for ids in begins)
    if name != "arc_easy":
        return

    class Manager:
        def load(self, names: list[str]) -> dict[str, Any]:
            return {"tasks": {"arc_easy": stock(name, splits, num_fewshot=None)}, "groups": {}}

    options = EvalOptions(is_chat=template is not None, num_fewshot=2)
    hub = options.score_from_hub(model, tokenizer, BENCHMARKS[name], manager=Manager())
    own = options.score(model, tokenizer, found)
    assert hub.primary.values.tolist() == own.primary.values.tolist()
    assert (hub.num_fewshot, hub.is_chat) == (2, template is not None)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="requires the published files next to the project")
@pytest.mark.parametrize(
    ("checkpoint", "name", "num_fewshot", "is_chat"),
    [
        ("smollm2", "gsm8k", 2, True),
        ("smollm2", "arc_easy", 0, False),
        ("smollm2", "arc_easy", 2, True),
        ("smollm2", "hellaswag", 2, True),
        ("gemma3", "gsm8k", 2, False),
        ("gemma3", "arc_easy", 2, False),
        ("gemma3", "hellaswag", 0, False),
    ],
)
def test_a_real_checkpoint_scores_as_in_lm_eval(
    checkpoint: str, name: str, num_fewshot: int, is_chat: bool, tmp_path: Path
) -> None:
    folder = real_checkpoint(checkpoint)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    file = {"gsm8k": "test_even", "arc_easy": "arc_easy_test", "hellaswag": "hellaswag_val_1k"}
    (path,) = SHARED.rglob(f"{file[name]}.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:60]]
    test, pool = rows[:NUM_ROWS], rows[20:]
    splits = {"test": test, "validation": test, "train": pool, "dev": pool}
    task = stock(name, splits, num_fewshot=num_fewshot)
    found = ours(name, splits, tmp_path, num_fewshot=num_fewshot)
    if name == "gsm8k":  # short answers: agreement is what counts here
        task.set_config("generation_kwargs", {"max_gen_toks": 48}, update=True)
        found = replace(found, benchmark=replace(found.benchmark, max_new_tokens=48))
    assert_agrees(name, model, tokenizer, found, task, is_chat=is_chat)
