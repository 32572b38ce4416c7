"""Text that is named and lies in no file: the Python installation's own, and generated skills."""

from collections.abc import Iterable, Sequence
from functools import cache

from tritter.data.documents import Document, documents_of
from tritter.data.questions import Question
from tritter.data.skills import PREFIX, SkillText, skills_origin
from tritter.data.stdlib import StdlibText, gather, stdlib_origin
from tritter.errors import Problem, RequestError, nearest

BUILT_IN_TEXTS = ("stdlib:prose", "stdlib:code")


def is_built_in(path: str) -> bool:
    """Say whether a word names text that lies in no file, or is meant to."""
    return path.startswith(("stdlib:", PREFIX))


def built_in_path(key: str, path: str) -> str:
    """Return how a built-in text is recorded: of a skill with the number of its examples.

    Args:
        key: for messages.

    Raises:
        RequestError: there is no such text.
    """
    if path.startswith(PREFIX):
        return str(SkillText.named(key, path))
    if path in BUILT_IN_TEXTS:
        return path
    reason = f"the built-in texts are {', '.join(BUILT_IN_TEXTS)} and {PREFIX}NAME"
    raise RequestError(Problem(key, path, reason=reason, nearest=nearest(path, BUILT_IN_TEXTS)))


@cache
def built_in_documents(path: str) -> Sequence[Document]:
    """Return the documents of a built-in text, those of the library as it names them.

    Raises:
        RequestError: there is no such text.
    """
    if built_in_path("data", path).startswith(PREFIX):
        return documents_of(SkillText.named("data", path).texts())
    return _library().prose if path == "stdlib:prose" else _library().code


def built_in_origin(paths: Iterable[str]) -> str:
    """Return the words under which built-in texts are recorded; empty where there are none."""
    made = {path.startswith(PREFIX) for path in paths if is_built_in(path)}
    origins = {False: stdlib_origin(), True: skills_origin()}
    return " and ".join(origins[is_skill] for is_skill in sorted(made))


def questions_of(paths: Iterable[str], number: int) -> tuple[Question, ...]:
    """Return questions of the skills among some paths, so many together or all that there are.

    None of them occurs in any text of a skill.
    """
    named = (SkillText.named("data", path).skill for path in paths if path.startswith(PREFIX))
    skills = list({skill.name: skill for skill in named}.values())
    parts = [number // len(skills) + (at < number % len(skills)) for at in range(len(skills))]
    asked = (skill.questions(part) for skill, part in zip(skills, parts, strict=True))
    return tuple(question for questions in asked for question in questions)


@cache
def _library() -> StdlibText:
    return gather()
