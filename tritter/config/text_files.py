"""Which text `data.old` and `data.new` mean, domain by domain."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from tritter.config.schema import DataConfig, NamedTextConfig, TextDataConfig, TextSources
from tritter.data.built_in import built_in_path, is_built_in
from tritter.data.datasets import PREFIX, check_place, parse_name
from tritter.data.records import DEFAULT_FIELD
from tritter.data.skills import SKILLS, skill_path
from tritter.data.sources import TextRequest, find_texts
from tritter.errors import Problem, RequestError, key_name, nearest
from tritter.options import Text, options

Place = Callable[[str, str], str]  # key and word as typed → what is kept of it


def text_place(key: str, path: str) -> str:
    """Return the absolute path of text files, or a built-in text.

    Raises:
        RequestError: a path means no text.
    """
    place = _absolute(key, path)
    find_texts(key, [place])
    return place


def skill_place(key: str, word: str) -> str:
    """Return what `text_place` does, or the skill that a word alone names.

    Raises:
        RequestError: it means neither a skill nor a text.
    """
    name = word.partition(":")[0]
    if name in SKILLS:
        return text_place(key, skill_path(word))
    if word.isidentifier() and not Path(word).exists():
        reason = f"there is no such skill, file or folder; the skills are {', '.join(SKILLS)}"
        raise RequestError(Problem(key, word, reason=reason, nearest=nearest(name, SKILLS)))
    return text_place(key, word)


def dataset_place(key: str, word: str, *, column: str | None, max_rows: int | None) -> str:
    """Return the whole name of a data set, or a built-in text.

    Args:
        column: of one that names none.
        max_rows: of one that names no rows.

    Raises:
        RequestError: it names none, or nothing lies there.
    """
    if is_built_in(word):
        return built_in_path(key, word)
    source = parse_name(key, word)
    check_place(key, word, source)
    is_whole = source.rows == (0, None)
    rows = (0, max_rows) if is_whole else source.rows
    return str(replace(source, rows=rows, column=source.column or column))


def place_of(kind: type[DataConfig], raw: Mapping[str, object]) -> Place:
    """Return how an option of `data` reads its words, given its keys as they stand in a config."""
    if issubclass(kind, TextDataConfig):
        return text_place
    if issubclass(kind, SkillsDataConfig):
        return skill_place
    column, rows = raw.get("text_column"), raw.get("max_rows")
    return partial(
        dataset_place,
        column=column if isinstance(column, str) and column else None,
        max_rows=rows if type(rows) is int and rows > 0 else None,
    )


def read_sources(
    key: str,
    value: object,
    *,
    default_name: str | None,
    problems: list[Problem],
    place_of_word: Place = text_place,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> TextSources:
    """Return domain → absolute paths of a value as it stands in a config.

    Args:
        key: what the value is called in messages.
        value: a path, a list of paths, or a mapping of domain names to either; null means none.
        default_name: of the domain when none is named; None: each word is a domain of its own,
            named after what it is.
        problems: gets a line for each path that means no text, and for a value of another form.
        place_of_word: says what a word means.
        known: domain → paths of what there is besides; the same paths are the same domain.
    """
    if value is None:
        return {}
    if default_name is None and not isinstance(value, Mapping):
        return _each_named(key, value, problems, place_of_word, known)
    named = value if isinstance(value, Mapping) else {default_name: value}
    sources: TextSources = {}
    for name, paths in named.items():
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            reason = "a domain is named with letters, digits, - and _"
            problems.append(Problem(key, name, reason=reason))
            continue
        place = f"{key}.{name}" if isinstance(value, Mapping) else key
        try:
            words = _paths(place, paths)
        except RequestError as error:
            problems += error.problems
            continue
        sources[name] = []
        for word in words:
            try:
                sources[name].append(place_of_word(place, word))
            except RequestError as error:
                problems += error.problems
    return sources


def _each_named(
    key: str,
    value: object,
    problems: list[Problem],
    place_of_word: Place,
    known: Mapping[str, Sequence[str]],
) -> TextSources:
    """Return each word as a domain: one that is known, or named after what the word means."""
    try:
        words = _paths(key, value)
    except RequestError as error:
        problems += error.problems
        return {}
    taken, sources = dict(known), TextSources()
    for word in words:
        try:
            paths = [place_of_word(key, word)]
        except RequestError as error:
            problems += error.problems
            continue
        name = _name_of(paths, taken)
        sources[name] = taken[name] = paths
    return sources


def _name_of(paths: Sequence[str], known: Mapping[str, Sequence[str]]) -> str:
    """Return the name of the domain that has some paths, or one that no other has."""
    same = (name for name, others in known.items() if others == paths)
    return next(same, None) or unused_name(named_after(paths), known)


def read_tasks(
    value: object,
    old: TextSources,
    problems: list[Problem],
    place_of_word: Place = text_place,
    *,
    default_name: str | None = "text",
) -> list[TextSources]:
    """Return each task's domain → absolute paths, of `data.tasks` as it stands in a config.

    A task that is no mapping is one domain. It is called as the old domain or the earlier task
    whose paths it has, else after its first path.

    Args:
        old: old domain → paths.
        problems: gets a line for all that is wrong.
        default_name: None: as in `read_sources`.
    """
    key = "data.tasks"
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        reason = "allowed is a list of texts, each a path, a list of paths or {NAME: PATHS}"
        problems.append(Problem(key, value, reason=reason))
        return []
    known, tasks = dict(old), []
    for number, one in enumerate(value, start=1):
        place = f"{key}[{number}]"
        if one in (None, {}, []):
            problems.append(Problem(place, one, reason="a task needs text: name a path"))
            continue
        task = read_sources(
            place,
            one,
            default_name=default_name,
            problems=problems,
            place_of_word=place_of_word,
            known=known,
        )
        if default_name is not None and not isinstance(one, Mapping):
            paths = task.get(default_name, [])
            task = {_name_of(paths, known): paths}
        for name, paths in task.items():
            if known.setdefault(name, paths) != paths:
                reason = f"{name} is the name of other text already; choose another"
                problems.append(Problem(f"{place}.{name}", paths, reason=reason))
        tasks.append(task)
    return tasks


def named_after(paths: Sequence[str]) -> str:
    """Return what a domain is called that nobody named: after its first path."""
    first = next(iter(paths), "")
    place = Path(parse_name("", first).name if first.startswith(PREFIX) else first)
    word = first.split(":")[1] if is_built_in(first) else place.name
    if set(word) & set("*?["):
        word = place.parent.name
    name = re.sub(r"\W", "_", word.partition(".")[0])
    return name if name.isidentifier() else f"task_{name}"


def unused_name(name: str, taken: Mapping[str, object]) -> str:
    """Return a name that is not taken: NAME, else NAME_2, NAME_3 and so on."""
    numbers = (f"{name}_{number}" for number in range(2, len(taken) + 3))
    return next(each for each in (name, *numbers) if each not in taken)


def text_requests(data: DataConfig) -> tuple[TextRequest, ...]:
    """Return what a configuration asks for, domain by domain; built-in text needs no look."""
    if not isinstance(data, NamedTextConfig):
        return ()
    return tuple(
        TextRequest(key_name(domain_key(data, name)), tuple(paths), text_field(data))
        for sources in (data.old_sources, data.new_sources)  # a task's are among them
        for name, paths in sources.items()
    )


def text_field(data: DataConfig) -> str:
    """Return the field of records that holds their text."""
    if isinstance(data, TextDataConfig | SkillsDataConfig):
        return data.text_field
    return DEFAULT_FIELD


def domain_key(data: DataConfig, name: str) -> str:
    """Return the key that named the text of a domain, as a person wrote it."""
    is_old = name in data.old_sources
    if not is_old and isinstance(data, NamedTextConfig) and data.tasks:
        return f"data.tasks.{name}"
    side = "old" if is_old else "new"
    sources: TextSources = data.old_sources if is_old else data.new_sources
    return f"data.{side}" if list(sources) == [side] else f"data.{side}.{name}"


def _paths(key: str, value: object) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, Sequence) or not all(isinstance(p, str) and p for p in paths):
        reason = "allowed is a path, a list of paths, or a mapping of domain names to paths"
        raise RequestError(Problem(key, value, reason=reason))
    if not paths:
        raise RequestError(Problem(key, value, reason="the list is empty; name a path"))
    return list(paths)


def _absolute(key: str, path: str) -> str:
    if path.startswith(PREFIX):
        reason = "data sets are read with data=hf"
        raise RequestError(Problem(key, path, reason=reason))
    if is_built_in(path):
        return built_in_path(key, path)
    try:
        place = Path(path).expanduser()
        # The last name stays as it was typed: a link's own says what kind of file it is
        is_name = place.name not in ("", "..")
        return str(place.parent.resolve() / place.name if is_name else place.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError(Problem(key, path, reason=f"that is no path ({error})")) from error


@options
class SkillsDataConfig(NamedTextConfig):
    """Generated skills, beside any other text; each word that is named is a domain of its own.

    Args:
        old: None: what the checkpoint learned; of a new base `base_domains`.
        new: `new_domain` where neither it nor `tasks` is named.
        text_field: of records.
    """

    base_domains: ClassVar[tuple[str, ...]] = ("stdlib:prose",)
    new_domain: ClassVar[str] = "arithmetic"
    source: Literal["skills"]
    text_field: Text
