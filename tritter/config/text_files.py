"""Which text `data.old` and `data.new` mean, domain by domain."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tritter.checkpoint.learned import told_apart
from tritter.config.schema import DataConfig, NamedTextConfig, TextDataConfig, TextSources
from tritter.data.contents import TextRequest
from tritter.data.dataset_name import PREFIX, check_place, parse_name
from tritter.data.finding import BUILT_IN_TEXTS, find_texts
from tritter.data.records import DEFAULT_FIELD
from tritter.errors import Problem, RequestError, nearest

Place = Callable[[str, str], str]  # key and word as typed → what is kept of it


def text_place(key: str, path: str) -> str:
    """Return the absolute path of text files, or a built-in text.

    Raises:
        RequestError: a path means no text.
    """
    place = _absolute(key, path)
    find_texts(key, [place])
    return place


def dataset_place(key: str, word: str, *, column: str | None, max_rows: int | None) -> str:
    """Return the whole name of a data set, or a built-in text.

    Args:
        column: of one that names none.
        max_rows: of one that names no rows.

    Raises:
        RequestError: it names none, or nothing lies there.
    """
    if word.startswith("stdlib:"):
        return _absolute(key, word)
    source = parse_name(key, word)
    check_place(key, word, source)
    is_whole = source.rows == (0, None)
    rows = (0, max_rows) if is_whole else source.rows
    return str(replace(source, rows=rows, column=source.column or column))


def place_of(kind: type[DataConfig], raw: Mapping[str, object]) -> Place:
    """Return how an option of `data` reads its words, given its keys as they stand in a config."""
    if issubclass(kind, TextDataConfig):
        return text_place
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
    default_name: str,
    problems: list[Problem],
    place_of_word: Place = text_place,
) -> TextSources:
    """Return domain → absolute paths of a value as it stands in a config.

    Args:
        key: what the value is called in messages.
        value: a path, a list of paths, or a mapping of domain names to either; null means none.
        default_name: of the domain when none is named.
        problems: gets a line for each path that means no text, and for a value of another form.
        place_of_word: says what a word means.
    """
    if value is None:
        return {}
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


def read_tasks(
    value: object, old: TextSources, problems: list[Problem], place_of_word: Place = text_place
) -> list[TextSources]:
    """Return each task's domain → absolute paths, of `data.tasks` as it stands in a config.

    A task that is no mapping is one domain. It is called as the old domain or the earlier task
    whose paths it has, else after its first path.

    Args:
        old: old domain → paths.
        problems: gets a line for all that is wrong.
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
            place, one, default_name="text", problems=problems, place_of_word=place_of_word
        )
        if not isinstance(one, Mapping):
            paths = task.get("text", [])
            same = (name for name, others in known.items() if others == paths)
            task = {next(same, None) or told_apart(_named_after(paths), known): paths}
        for name, paths in task.items():
            if known.setdefault(name, paths) != paths:
                reason = f"{name} is the name of other text already; choose another"
                problems.append(Problem(f"{place}.{name}", paths, reason=reason))
        tasks.append(task)
    return tasks


def _named_after(paths: Sequence[str]) -> str:
    """Return what a domain is called that nobody named: after its first path."""
    first = next(iter(paths), "")
    place = Path(parse_name("", first).name if first.startswith(PREFIX) else first)
    word = place.name.removeprefix("stdlib:")
    if set(word) & set("*?["):
        word = place.parent.name
    name = re.sub(r"\W", "_", word.partition(".")[0])
    return name if name.isidentifier() else f"task_{name}"


def text_requests(data: DataConfig) -> tuple[TextRequest, ...]:
    """Return what a configuration asks for, domain by domain; built-in text needs no look."""
    if not isinstance(data, NamedTextConfig):
        return ()
    return tuple(
        TextRequest(domain_key(data, name), tuple(paths), text_field(data))
        for sources in (data.old_sources, data.new_sources)  # a task's are among them
        for name, paths in sources.items()
    )


def text_field(data: DataConfig) -> str:
    """Return the field of records that holds their text."""
    return data.text_field if isinstance(data, TextDataConfig) else DEFAULT_FIELD


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
    if path.startswith("stdlib:"):
        if path not in BUILT_IN_TEXTS:
            reason = f"the built-in texts are {', '.join(BUILT_IN_TEXTS)}"
            near = nearest(path, BUILT_IN_TEXTS)
            raise RequestError(Problem(key, path, reason=reason, nearest=near))
        return path
    try:
        place = Path(path).expanduser()
        # The last name stays as it was typed: a link's own says what kind of file it is
        is_name = place.name not in ("", "..")
        return str(place.parent.resolve() / place.name if is_name else place.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError(Problem(key, path, reason=f"that is no path ({error})")) from error
