"""The begin of `tritter expand`: words are read first, then weights, while the rest is imported."""

from collections.abc import Collection, Mapping
from typing import Any

from tritter.cli.expand_request import ExpandRequest
from tritter.loading import loading


def begin_expand(words: Mapping[str, Any], given: Mapping[str, Any], typed: Collection[str]) -> int:
    """Carry out what the words of the command ask for; see `place_of` and `run_expand`.

    Args:
        given: option of the methods → what was typed.
        typed: which of the words were typed; the others are defaults.

    Raises:
        RequestError: there is no such method or option, which transformers is not asked about;
            or the source, a size or the destination cannot be had.
    """
    request = ExpandRequest.of(words, given, typed=typed)
    specs = request.specs()
    is_read = not words["dry_run"] and not request.domain.is_given
    with request.begun_digests(is_read=is_read) as digests:
        with loading("transformers"):
            from tritter.cli.expand import run_expand
            from tritter.cli.expand_place import place_of

        dry_run, overwrite = words["dry_run"], words["overwrite"]
        place = place_of(request, specs, digests, dry_run=dry_run, overwrite=overwrite)
        return run_expand(
            request, place, dry_run=dry_run, overwrite=overwrite, as_json=words["as_json"]
        )
