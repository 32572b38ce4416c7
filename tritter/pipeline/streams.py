"""Data that is read while the model trains must not change between the start and a resume."""

import json

from tritter.data.datasets import stream_identity
from tritter.errors import Problem, RequestError
from tritter.pipeline.context import RunContext
from tritter.storage.atomic import write_text_atomic
from tritter.storage.reading import read_object

STREAMS = "streams.json"  # domain → file → its contents when the run began


def check(context: RunContext) -> None:
    """Record the streamed files of a run that begins; compare them with the record if it resumes.

    Raises:
        RequestError: a file has changed, wherever in it.
    """
    path = context.folder / STREAMS
    current = {
        name: stream_identity(*sources, key=name) for name, sources in context.streams.items()
    }
    if not current:
        return
    if not path.exists():
        write_text_atomic(path, json.dumps(current, indent=1) + "\n")
        return
    keys = {domain.name: domain.key for domain in context.text.domains}
    for name, recorded in read_object(path).items():
        contents = current.get(name, {})
        changed = sorted(
            file for file in recorded | contents if recorded.get(file) != contents.get(file)
        )
        if changed:
            file = changed[0]
            before, now = recorded.get(file, "not there"), contents.get(file, "not there")
            reason = (
                f"the streamed data has changed since the run in {context.folder} began "
                f"(then {before}; now {now}); restore it, or start another run"
            )
            raise RequestError(Problem(keys.get(name, name), file, reason=reason))
