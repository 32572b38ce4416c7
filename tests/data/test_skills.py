"""Generated skills: correct, deterministic, and with disjoint texts and questions."""

import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tritter.data.built_in import built_in_documents, built_in_origin
from tritter.data.skills import SKILLS, Draw, Question, SkillText
from tritter.data.sources import TextRequest
from tritter.errors import RequestError

NUMBER = 400
ALL = pytest.mark.parametrize("name", SKILLS)


def _arithmetic(prompt: str) -> str:
    return f" {eval('+'.join(re.findall('[0-9]', prompt)))}"


def _letters(prompt: str) -> list[str]:
    return re.findall(r"\b[a-z]\b", prompt.partition(" ")[2])


def _key_value(prompt: str) -> str:
    given, _, asked = prompt.partition(": ")
    return f" {dict(re.findall(r'([a-z]) ([0-9])', given))[asked]}"


def _json_format(prompt: str) -> str:
    words = prompt.removeprefix("JSON of ").removesuffix(":").split(", ")
    kinds = {"name": "Ada Carl Dora Emil Finn Hugo Ida Kim Max Nora Otto Zoe",
             "color": "black blue brown green grey red white yellow"}  # fmt: skip
    named = {word: kind for kind, known in kinds.items() for word in known.split()}
    values = {
        "age" if word.isdigit() else named.get(word, "city"): int(word) if word.isdigit() else word
        for word in words
    }
    return f" {json.dumps(values)}"


def _reasoning(prompt: str) -> str:
    held, *changes = re.findall(r"(?:has|finds|gives) \d+", prompt)
    number = int(held.split()[1])
    for change in changes:
        word, by = change.split()
        number += int(by) if word == "finds" else -int(by)
        assert number >= 0
    return f"{number} {re.findall(r'has [0-9]+ ([a-z]+)', prompt)[0]}."


ORACLES: dict[str, Callable[[str], str]] = {
    "arithmetic": _arithmetic,
    "sorting": lambda prompt: f" {' '.join(sorted(_letters(prompt)))}",
    "reversing": lambda prompt: f" {' '.join(_letters(prompt)[::-1])}",
    "key_value": _key_value,
    "json_format": _json_format,
    "multiple_choice": lambda prompt: f" {max(_letters(prompt))}",
}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", ORACLES)
def test_answers_are_right(name: str) -> None:
    """Compare with answers that Python computes from the prompt."""
    for question in SkillText(name).questions(NUMBER):
        assert ORACLES[name](question.prompt) == question.answer, question


def test_a_trace_leads_where_the_story_ends() -> None:
    for question in SkillText("reasoning").questions(NUMBER):
        steps, _, end = question.answer.rpartition(": ")
        assert end == _reasoning(question.prompt)
        for sides in (step.split(" = ") for step in steps.strip().split(", ")):
            assert eval(sides[0]) == int(sides[1])
        assert steps.endswith(f"= {end.split()[0]}")


@pytest.mark.full
def test_a_call_is_json_between_its_signs_and_says_what_was_asked() -> None:
    names = set()
    for question in SkillText("tool_call").questions(NUMBER):
        body = re.fullmatch(r" <tool_call>(.*)</tool_call>", question.answer)
        assert body is not None
        call = json.loads(body[1])
        assert call.keys() == {"name", "arguments"}
        names.add(call["name"])
        for value in call["arguments"].values():
            words = str(value).lower().removesuffix(".").split()
            assert all(word in question.prompt.lower() for word in words), question
    assert names == {"weather", "timer", "calculate", "translate", "message"}


def test_facts_are_asked_in_wordings_that_no_text_has() -> None:
    """The training texts contain all facts."""
    skill = SkillText("identity", 5000)
    texts, questions = "\n".join(skill.texts()).lower(), skill.questions(NUMBER)
    for question in questions:
        wording = re.sub(r"^(hello|tritter|please|say|dear assistant),? |^(now|so) ", "",
                         question.prompt.lower())  # fmt: skip
        assert wording not in texts and question.answer.lower() in texts
    assert len(questions) >= 90


@pytest.mark.quick_cases(1)
@ALL
def test_no_question_occurs_in_a_text_of_any_skill(name: str) -> None:
    """No text contains the prompt and answer of a question."""
    skill = SkillText(name, 6000)
    every = [text for each in SKILLS for text in SkillText(each, 1500).texts()]
    joined = "\n".join([*every, *skill.texts()])
    assert not [each for each in skill.questions(NUMBER) if each.prompt in joined]


@pytest.mark.quick_cases(4)
@ALL
def test_the_pool_holds_an_eighth(name: str) -> None:
    exercises = (SKILLS[name](Draw("test", index)) for index in range(1500))
    assert 0.08 < sum(map(SkillText(name).is_held_out, exercises)) / 1500 < 0.17


@pytest.mark.quick_cases(1)
@ALL
def test_texts_go_on_from_texts_and_questions_from_questions(name: str) -> None:
    skill = SkillText(name)
    assert list(SkillText(name, 40).texts()) == list(SkillText(name, 90).texts())[:40]
    assert skill.questions(40) == skill.questions(90)[:40]
    identifiers = [each.identifier for each in skill.questions(NUMBER)]
    assert len(set(identifiers)) == len(identifiers)


def test_there_are_two_thousand_choices_of_four() -> None:
    questions = SkillText("multiple_choice").questions(2_000)
    assert len(questions) == 2_000 and {each.chance for each in questions} == {0.25}
    assert all(each.answer in each.choices for each in questions)
    places = [each.choices.index(each.answer) for each in questions]
    assert all(400 < places.count(place) < 600 for place in range(4))


def test_another_process_draws_the_same() -> None:
    """The texts depend neither on Python's hashes nor on its random generators."""
    program = (
        "from tritter.data.skills import SKILLS, SkillText\n"
        "for skill in (SkillText(name, 3) for name in SKILLS):\n"
        "    print(*skill.texts(), *(q.identifier for q in skill.questions(2)), sep='|')"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    ).stdout  # fmt: skip
    here = [
        "|".join([*skill.texts(), *(each.identifier for each in skill.questions(2))])
        for skill in (SkillText(name, 3) for name in SKILLS)
    ]
    assert found.splitlines() == here


def test_documents_and_questions_of_paths() -> None:
    documents = built_in_documents("skills:sorting:50")
    assert {each.text for each in documents} == set(SkillText("sorting", 50).texts())
    asked = SkillText.questions_of(
        ["notes.txt", "skills:sorting:50", "skills:identity", "skills:sorting"], 9
    )
    assert [each.identifier.partition(":")[0] for each in asked] == ["sorting"] * 5 + [
        "identity"
    ] * 4
    assert (
        SkillText.questions_of(["notes.txt"], 9)
        == ()
        == SkillText.questions_of(["skills:sorting"], 0)
    )
    assert built_in_origin(["skills:sorting"]) == "generated skills, version 1, seed 0"
    both = built_in_origin(["skills:sorting", "stdlib:prose"])
    assert both.startswith("python ") and both.endswith(" and generated skills, version 1, seed 0")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("skills:sortign", "the skills are arithmetic, .* Did you mean skills:sorting?"),
        ("skills:sorting:many", r"must be from 1 to 10,000,000 examples"),
        ("skills:sorting:0", "must be from 1 to"),
        ("skills:", "the skills are"),
    ],
)
def test_wrong_names_are_refused(path: str, expected: str) -> None:
    with pytest.raises(RequestError, match=f"data.new = {path}: .*{expected}"):
        SkillText.named("data.new", path)


def test_a_question_has_the_chance_of_its_choices() -> None:
    assert Question("1", "a", " b").chance == 0
    assert Question("1", "a", " b", (" b", " c")).chance == 0.5


@ALL
def test_exercises_as_conversations(name: str) -> None:
    """The user asks, the assistant answers; the words are those of the text."""
    skill, path = SkillText(name, 20), f"skills:{name}:20:chat"
    assert str(SkillText.named("data", path)) == path
    assert SkillText.named("data", f"skills:{name}:chat") == SkillText(name, is_chat=True)
    texts = set(skill.texts())
    for document in TextRequest([path], key="data.new", text_field="text").documents():
        assert document.conversation is not None
        user, assistant = document.conversation.messages
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert f"{user['content']} {assistant['content']}" in texts
    for question, plain in zip(SkillText.questions_of([path], 5), skill.questions(5), strict=True):
        assert question.is_chat and not plain.is_chat
        assert (question.prompt, f" {question.answer}") == (plain.prompt, plain.answer)
        assert tuple(f" {choice}" for choice in question.choices) == plain.choices


@pytest.mark.parametrize("parts", ["0:chat", "chat:5", "5:6", "5:", ":chat", "chat:chat"])
def test_wrong_numbers_are_refused(parts: str) -> None:
    with pytest.raises(RequestError, match="COUNT in skills:NAME:COUNT must be from 1"):
        SkillText.named("data.new", f"skills:sorting:{parts}")


def test_names_are_those_that_lineages_and_commands_contain() -> None:
    names = "arithmetic identity json_format key_value multiple_choice reasoning reversing sorting"
    assert {*SKILLS} == {*names.split(), "tool_call"}
