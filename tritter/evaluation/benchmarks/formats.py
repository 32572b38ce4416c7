"""Definitions of benchmarks: published formats, prompts and scoring of answers.

Prompts equal those of lm-evaluation-harness 0.4.13 for all benchmarks that it has.
"""

import ast
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from itertools import accumulate
from typing import Any, ClassVar, Literal

from tritter.data.benchmark_names import HUB_NAMES
from tritter.evaluation.code.sandbox import Sandbox

_Kind = Literal["choice", "context", "word", "answer", "code"]
Row = Mapping[str, Any]
_METRICS: dict[_Kind, tuple[str, ...]] = {
    "choice": ("acc", "acc_norm"),
    "context": ("acc",),
    "word": ("acc",),
    "answer": ("exact_match",),
    "code": ("pass@1",),
}
_LETTERS = "ABCDEFGHIJ"
_AI2_FIELDS = {"question": str, "choices": dict, "answerKey": str}
_TRUTHFUL_EXAMPLES = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""
# Language → connectors between a premise and its cause, and between a premise and its effect
_CONNECTORS = {
    "et": ("sest", "seetõttu"),
    "ht": ("poukisa", "donk sa"),
    "it": ("perché", "quindi"),
    "id": ("karena", "maka"),
    "qu": ("imataq", "chaymi"),
    "sw": ("kwa sababu", "kwa hiyo"),
    "zh": ("因为", "所以"),
    "ta": ("காரணமாக", "எனவே"),
    "th": ("เพราะ", "ดังนั้น"),
    "tr": ("çünkü", "bu yüzden"),
    "vi": ("bởi vì", "vì vậy"),
}
_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
# Language → prefixes of the question and of the answer
_WORDS = {
    "bn": ("প্রশ্ন: ", "Answer:"),
    "de": ("Frage: ", "Antwort:"),
    "en": ("Question: ", "Answer:"),
    "es": ("Pregunta: ", "Respuesta:"),
    "fr": ("Question : ", "Réponse :"),
    "ja": ("問題： ", "Answer:"),  # noqa: RUF001
    "ru": ("Задача: ", "Answer:"),
    "sw": ("Swali: ", "Answer:"),
    "te": ("ప్రశ్న: ", "Answer:"),
    "th": ("โจทย์: ", "Answer:"),
    "zh": ("问题： ", "Answer:"),  # noqa: RUF001
}
_MGSM_UNTIL = tuple(sorted({words[0].strip() for words in _WORDS.values()}))
_HUMANEVAL_UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_MBPP_UNTIL = ("[DONE]",)
# The official splits of MBPP, 1 to 10 and 11 to 510; lm-eval's examples are 2, 3 and 4
_PROMPT_IDS, _TEST_IDS = range(2, 11), range(11, 511)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question of a benchmark.

    Args:
        prompt: the prompt; for kind `context`, the continuation to predict after each choice.
        choices: possible continuations (`choice`) or contexts (`context`).
        right: index of the correct choice.
        answer: the correct answer (`word`, `answer`).
        worked: the answer that a few-shot example shows; empty if it is `answer`.
        description: text before all examples; the system message of a conversation.
        tests: program that fails unless the answer is correct (`code`).
        part: subject, language or subtask.
        name: identifier in the file, if there is one.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    right: int = 0
    answer: str = ""
    worked: str = ""
    description: str = ""
    tests: str = ""
    part: str = ""
    name: str = ""

    def passes(self, answer: str, sandbox: Sandbox) -> bool:
        """Return True if the program of an answer passes the tests."""
        failure, _ = sandbox.run(f"{self.answer}{answer}\n", self.tests)
        return not failure


_Conversion = Callable[[Row, str], Question | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShot:
    """How lm-eval selects the few-shot examples of a benchmark, among those of a question's part.

    Args:
        number: number of examples by default.
        files: patterns of the files with examples; empty: the files of the questions.
        is_first: the first examples; otherwise they are drawn for each question.
        drops_own: one more is drawn, in case the question itself is drawn.
        delimiter: text between a question and its answer.
    """

    SEED: ClassVar[int] = 1234  # lm-eval's default

    number: int = 0
    files: tuple[str, ...] = ()
    is_first: bool = False
    drops_own: bool = False
    delimiter: str = " "


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Args:
        name: name of the benchmark.
        kind: kind of its questions.
        metric: primary metric, which the gate checks.
        files: patterns of relative paths; the first pattern with a match selects the files.
        fields: name → type of the required fields of its records, in the hub's format.
        question: converts a record and the name of its file to a question; None skips the
            record. Its exceptions mean that the record is invalid.
        example: converts a record to a few-shot example; None does so as `question`.
        hub_filter: the lm-eval filter whose scores count; empty if there is only one.
        few_shot: few-shot examples; None for a benchmark with a fixed prompt.
        until: stop strings of generated answers.
        max_new_tokens: limit of tokens per answer.
        is_right: scores a generated answer.
    """

    name: str
    kind: _Kind
    metric: str
    files: tuple[str, ...]
    fields: Mapping[str, type | tuple[type, ...]]
    question: _Conversion
    example: _Conversion | None = None
    hub_filter: str = ""
    few_shot: FewShot | None = None
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    is_right: Callable[[Question, str], bool] = field(default=lambda question, text: False)

    @property
    def hub(self) -> str:
        """Name of the lm-eval task or data set; empty if there is none."""
        return HUB_NAMES[self.name]

    def answer_tokens(self, length: int) -> int:
        """Return the limit of generated tokens: at most half of the model's context `length`."""
        return min(self.max_new_tokens, length // 2) if self.kind in ("answer", "code") else 0

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics, the primary one first."""
        return (self.metric, *(name for name in _METRICS[self.kind] if name != self.metric))


def _arc(row: Row, file: str) -> Question:
    return _ai2_question(row, _question_prompt(row["question"]))


def _openbookqa(row: Row, file: str) -> Question:
    return _ai2_question(row, row["question_stem"])


def _commonsenseqa(row: Row, file: str) -> Question:
    """The model predicts the label of a choice instead of its text."""
    prompt = _lettered_prompt(f"Question: {row['question'].strip()}", row["choices"]["text"])
    return _ai2_question(row, prompt, predicted="label")


def _ai2_question(row: Row, prompt: str, *, predicted: str = "text") -> Question:
    """Return a question in AI2's format: labelled choices and the label of the correct one."""
    labels, choices = (_texts(row["choices"][name]) for name in ("label", predicted))
    return Question(prompt=prompt, choices=choices, right=labels.index(row["answerKey"].strip()))


def _question_prompt(question: str) -> str:
    """Return `Question: … Answer:`."""
    return f"Question: {question.strip()}\nAnswer:"


def _lettered_prompt(question: str, choices: Sequence[str]) -> str:
    """Return a question with lettered choices."""
    lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, "Answer:"])


def _hellaswag(row: Row, file: str) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = tuple(_wikihow(ending) for ending in _texts(row["endings"]))
    return Question(prompt=_wikihow(context), choices=endings, right=int(row["label"]))


def _wikihow(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: Row, file: str) -> Question:
    start, blank, end = row["sentence"].partition("_")
    if not blank:
        raise ValueError("sentence has no _ to put an option in")
    options = (row["option1"], row["option2"])
    contexts = tuple(start + option for option in options)
    return Question(prompt=end.strip(), choices=contexts, right={"1": 0, "2": 1}[row["answer"]])


def _piqa(row: Row, file: str) -> Question:
    return Question(
        prompt=_question_prompt(row["goal"]), choices=(row["sol1"], row["sol2"]), right=row["label"]
    )


def _boolq(row: Row, file: str) -> Question:
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    right = row["label"] if "label" in row else row["answer"]  # super_glue, google/boolq
    return Question(prompt=prompt, choices=("no", "yes"), right=int(right))


def _mmlu(row: Row, file: str) -> Question:
    subject = str(row.get("subject", ""))
    about = "The following are multiple choice questions (with answers)"
    head = f"{about} about {subject.replace('_', ' ')}.\n\n" if subject else ""
    choices = _texts(row["choices"])
    return Question(
        prompt=_lettered_prompt(row["question"].strip(), choices),
        choices=tuple(_LETTERS[: len(choices)]),
        right=row["answer"],
        description=head,
        part=subject,
    )


def _truthfulqa(row: Row, file: str) -> Question:
    """Shuffle the choices: the correct one is always first, and ties select the first choice."""
    targets = row["mc1_targets"]  # of the hub, or of the authors: answer → 0 or 1
    choices, labels = targets.get("choices", list(targets)), targets.get("labels", targets.values())
    pairs = list(zip(_texts(choices), labels, strict=True))
    random.Random(row["question"]).shuffle(pairs)
    labels = [label for _, label in pairs]
    if labels.count(1) != 1:
        raise ValueError("mc1_targets must have exactly one correct answer")
    return Question(
        prompt=f"{_TRUTHFUL_EXAMPLES}\n\nQ: {row['question']}\nA:",
        choices=tuple(text for text, _ in pairs),
        right=labels.index(1),
    )


def _xcopa(row: Row, file: str) -> Question:
    language = next((part for part in re.split(r"\W", file) if part in _CONNECTORS), None)
    if language is None:
        raise ValueError(f"the file's name contains none of {', '.join(_CONNECTORS)}")
    cause, effect = _CONNECTORS[language]
    connector = {"cause": cause, "effect": effect}[row["question"]]
    choices = (row["choice1"], row["choice2"])
    return Question(
        prompt=f"{row['premise'].strip()[:-1]} {connector}",
        choices=tuple(choice[0].lower() + choice[1:] for choice in choices),
        right=row["label"],
        part=language,
    )


def _lambada(row: Row, file: str) -> Question:
    start, _, last = row["text"].rpartition(" ")
    return Question(prompt=start, answer=last)


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise TypeError(f"{values!r} must be a list of strings")
    return tuple(values)


def _is_number_right(question: Question, text: str) -> bool:
    """Return True if the last number of an answer is correct."""
    number = _number(_last_number(text))
    return number is not None and number == _number(question.answer)


def _is_written_right(question: Question, text: str) -> bool:
    """Compare the last number as text, as lm-eval's gsm8k does: 18.00 is not 18."""
    return _bare(_last_number(text)) == _bare(question.answer)


def _is_spelled_right(question: Question, text: str) -> bool:
    """Compare the last number without punctuation, as lm-eval's mgsm does: -1.8 is 18."""
    removed = str.maketrans("", "", string.punctuation)
    return _last_number(text).translate(removed) == question.answer.translate(removed)


def _last_number(text: str) -> str:
    found = [one or other for one, other in _NUMBER.findall(text)]
    return found[-1] if found else ""


def _is_formula_right(question: Question, text: str) -> bool:
    """Compare a formula as lm-eval's hendrycks_math does; a boxed formula takes precedence."""
    # lm-eval's normalisation of formulas; importing it also imports `datasets`
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string

    boxed = last_boxed_only_string(text)
    if boxed is not None:
        found = boxed.removeprefix("\\boxed ").removeprefix("\\boxed{").removesuffix("}")
    else:
        parts = text.split("$")
        found = "$".join(parts[1:-1]) if len(parts) > 2 else text
    return bool(is_equiv(found, question.answer))


def _is_conclusion_right(question: Question, text: str) -> bool:
    """Compare the text after `the answer is`, without the last character of the sentence."""
    found = re.search(r"(?<=the answer is )(.*)(?=.)", text)
    return found is not None and found[0].strip() == question.answer


def _gsm8k(row: Row, file: str) -> Question:
    _, mark, answer = row["answer"].rpartition("####")
    if not mark or _number(answer) is None:
        raise ValueError("answer has no number after ####")
    return Question(
        prompt=f"Question: {row['question']}\nAnswer:", answer=answer.strip(), worked=row["answer"]
    )


def _svamp(row: Row, file: str) -> Question:
    body = row["Body"].strip()
    body += "" if body.endswith((".", "?", "!")) else "."
    prompt = f"Question: {body} {row['Question'].strip()}\nAnswer:"
    answer = _number(str(row["Answer"]))
    if answer is None:
        raise ValueError("Answer is not a number")
    return Question(prompt=prompt, answer=str(answer))


def _mgsm(row: Row, file: str) -> Question:
    language = row.get("lang") or next((p for p in re.split(r"[\W_]", file) if p in _WORDS), None)
    if language not in _WORDS:
        raise ValueError(f"lang must be one of {', '.join(_WORDS)}")
    before, after = _WORDS[language]
    answer = row.get("answer_number", row.get("answer"))
    if _number(str(answer)) is None:
        raise ValueError("answer is not a number")
    question = str(row["question"]).removeprefix(before)
    return Question(prompt=f"{before}{question}\n{after}", answer=str(answer), part=str(language))


def _math(row: Row, file: str) -> Question:
    answer = row.get("answer")
    if not answer:  # the content of the solution's last \boxed, with balanced braces
        _, mark, boxed = row["solution"].rpartition("\\boxed{")
        if not mark:
            raise ValueError("solution has no \\boxed answer")
        depths = accumulate(({"{": 1, "}": -1}.get(each, 0) for each in boxed), initial=1)
        end = next((position for position, depth in enumerate(depths) if depth == 0), None)
        if end is None:
            raise ValueError("solution has an unclosed brace")
        answer = boxed[: end - 1]
    part = str(row.get("subject") or row.get("type") or "")
    return Question(prompt=f"Problem: {row['problem']}\nAnswer:", answer=answer, part=part)


def _bbh(row: Row, file: str) -> Question:
    prompt = f"Q: {row['input']}\nA: Let's think step by step.\n"
    return Question(prompt=prompt, answer=row["target"], part=file.partition(".")[0])


def _bare(number: str) -> str:
    return number.strip().replace(",", "").replace("$", "").removesuffix(".")


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(_bare(text).rstrip("."))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _humaneval(row: Row, file: str) -> Question:
    if not row["entry_point"].isidentifier():
        raise ValueError("entry_point is not a valid name")
    try:  # tests may call other definitions of the prompt
        body = ast.parse(row["prompt"]).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        body = []
    others = [each for each in body if getattr(each, "name", "") != row["entry_point"]]
    helpers = "\n".join(map(ast.unparse, others))
    return Question(
        prompt=row["prompt"],
        answer=row["prompt"],
        tests=f"{helpers}\n{row['test']}\ncheck({row['entry_point']})",
        name=row["task_id"],
    )


def _mbpp(row: Row, file: str) -> Question | None:
    if row["task_id"] not in _TEST_IDS:
        return None
    tests = [test for test in row["test_list"] if isinstance(test, str) and test.strip()]
    if not tests:
        raise ValueError("test_list has no test")
    setup = row.get("test_setup_code") or ""
    return Question(
        prompt=_mbpp_prompt(row), tests="\n".join([setup, *tests]), name=f"MBPP/{row['task_id']}"
    )


def _mbpp_example(row: Row, file: str) -> Question | None:
    if row["task_id"] not in _PROMPT_IDS:
        return None
    return Question(prompt=_mbpp_prompt(row), worked=f"{row['code']}\n[DONE]")


def _mbpp_prompt(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code "
        f"should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _test_files(name: str) -> tuple[str, ...]:
    """Return patterns for a benchmark's test split, otherwise its validation split."""
    return (rf"{name}.*test", rf"{name}.*(val|dev)", rf"{name}(?!.*(train|prompt))")


_ALL = (
    Benchmark(
        name="hellaswag",
        kind="choice",
        metric="acc_norm",
        files=(r"hellaswag.*val", *_test_files("hellaswag")),  # the test split has no answers
        few_shot=FewShot(files=(r"hellaswag.*train",), drops_own=True),
        fields={
            "activity_label": str,
            "ctx_a": str,
            "ctx_b": str,
            "endings": list,
            "label": (int, str),
        },
        question=_hellaswag,
    ),
    Benchmark(
        name="arc_challenge",
        kind="choice",
        metric="acc_norm",
        files=_test_files("arc.?challenge"),
        few_shot=FewShot(files=(r"arc.?challenge.*train",)),
        fields=_AI2_FIELDS,
        question=_arc,
    ),
    Benchmark(
        name="arc_easy",
        kind="choice",
        metric="acc_norm",
        files=_test_files("arc.?easy"),
        few_shot=FewShot(files=(r"arc.?easy.*train",)),
        fields=_AI2_FIELDS,
        question=_arc,
    ),
    Benchmark(
        name="mmlu",
        kind="choice",
        metric="acc",
        files=_test_files("mmlu"),
        few_shot=FewShot(files=(r"mmlu.*dev",), is_first=True),
        fields={"question": str, "choices": list, "answer": int},
        question=_mmlu,
    ),
    Benchmark(
        name="truthfulqa",
        kind="choice",
        metric="acc",
        files=(r"truthful.?qa.*mc", r"truthful.?qa.*(jsonl|json|parquet)"),
        fields={"question": str, "mc1_targets": dict},
        question=_truthfulqa,
    ),
    Benchmark(
        name="winogrande",
        kind="context",
        metric="acc",
        files=(r"winogrande.*val", *_test_files("winogrande")),
        few_shot=FewShot(files=(r"winogrande.*train",), drops_own=True),
        fields={"sentence": str, "option1": str, "option2": str, "answer": str},
        question=_winogrande,
    ),
    Benchmark(
        name="piqa",
        kind="choice",
        metric="acc_norm",
        files=(r"piqa.*val", *_test_files("piqa")),
        few_shot=FewShot(files=(r"piqa.*train",), drops_own=True),
        fields={"goal": str, "sol1": str, "sol2": str, "label": int},
        question=_piqa,
    ),
    Benchmark(
        name="boolq",
        kind="choice",
        metric="acc",
        files=(r"boolq.*val", *_test_files("boolq")),
        few_shot=FewShot(files=(r"boolq.*train",), drops_own=True),
        fields={"passage": str, "question": str},
        question=_boolq,
    ),
    Benchmark(
        name="openbookqa",
        kind="choice",
        metric="acc_norm",
        files=_test_files("openbook.?qa"),
        few_shot=FewShot(files=(r"openbook.?qa.*train",)),
        fields={"question_stem": str, "choices": dict, "answerKey": str},
        question=_openbookqa,
    ),
    Benchmark(
        name="commonsenseqa",
        kind="choice",
        metric="acc",
        files=(r"commonsense.?qa.*val", *_test_files("commonsense.?qa")),
        few_shot=FewShot(files=(r"commonsense.?qa.*train",), drops_own=True),
        fields=_AI2_FIELDS,
        question=_commonsenseqa,
    ),
    Benchmark(
        name="xcopa",
        kind="choice",
        metric="acc",
        files=_test_files("xcopa"),
        few_shot=FewShot(files=(r"xcopa.*(val|dev)",)),
        fields={"premise": str, "choice1": str, "choice2": str, "question": str, "label": int},
        question=_xcopa,
    ),
    Benchmark(
        name="lambada",
        kind="word",
        metric="acc",
        files=_test_files("lambada"),
        few_shot=FewShot(),
        fields={"text": str},
        question=_lambada,
    ),
    Benchmark(
        name="gsm8k",
        kind="answer",
        metric="exact_match",
        files=_test_files("gsm8k"),
        fields={"question": str, "answer": str},
        question=_gsm8k,
        hub_filter="flexible-extract",
        few_shot=FewShot(number=5, files=(r"gsm8k.*train", r"train.*gsm8k")),
        until=("Question:", "</s>", "<|im_end|>"),
        is_right=_is_written_right,
    ),
    Benchmark(
        name="svamp",
        kind="answer",
        metric="exact_match",
        files=_test_files("svamp"),
        fields={"Body": str, "Question": str, "Answer": (int, float, str)},
        question=_svamp,
        until=("Question:", "\n\n"),
        is_right=_is_number_right,
    ),
    Benchmark(
        name="mgsm",
        kind="answer",
        metric="exact_match",
        files=_test_files("mgsm"),
        few_shot=FewShot(files=(r"mgsm.*train",), delimiter=""),
        fields={"question": str, "answer": (int, str, type(None))},
        question=_mgsm,
        hub_filter="flexible-extract",
        until=(*_MGSM_UNTIL, "</s>", "<|im_end|>"),
        is_right=_is_spelled_right,
    ),
    Benchmark(
        name="math",
        kind="answer",
        metric="exact_match",
        files=(r"math.?500", r"(hendrycks|minerva|competition).?math.*test", r"(^|/)math.*test"),
        few_shot=FewShot(files=(r"math.*train",)),
        fields={"problem": str, "solution": str},
        question=_math,
        until=("Problem:",),
        is_right=_is_formula_right,
    ),
    Benchmark(
        name="bbh",
        kind="answer",
        metric="exact_match",
        files=(r"(bbh|big.?bench.?hard)[/_-]",),
        fields={"input": str, "target": str},
        question=_bbh,
        hub_filter="get-answer",
        few_shot=FewShot(number=3, files=(r"prompts?/.*\.txt$",), is_first=True, delimiter=""),
        until=("</s>", "Q", "\n\n"),
        max_new_tokens=1024,
        is_right=_is_conclusion_right,
    ),
    Benchmark(
        name="humaneval",
        kind="code",
        metric="pass@1",
        files=(r"human.?eval",),
        fields={"task_id": str, "prompt": str, "entry_point": str, "test": str},
        question=_humaneval,
        until=_HUMANEVAL_UNTIL,
        max_new_tokens=1024,
    ),
    Benchmark(
        name="mbpp",
        kind="code",
        metric="pass@1",
        files=_test_files("mbpp"),
        fields={"task_id": int, "text": str, "code": str, "test_list": list},
        question=_mbpp,
        example=_mbpp_example,
        few_shot=FewShot(number=3, is_first=True, delimiter=""),
        until=_MBPP_UNTIL,
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
