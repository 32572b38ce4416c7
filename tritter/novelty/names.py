"""Tritter's own detectors, by the words that choose them."""

from collections.abc import Mapping
from typing import Any

from tritter.errors import Problem, RequestError, nearest, raise_problems
from tritter.novelty.cosine import CosineNovelty
from tritter.novelty.detectors import Detector, LossNovelty, MahalanobisNovelty
from tritter.options import checked, read_options

DETECTORS: Mapping[str, type[Detector]] = {
    "loss": LossNovelty,
    "mahalanobis": MahalanobisNovelty,
    "cosine": CosineNovelty,
}


def detector_of(
    asked: "str | Mapping[str, Any] | Detector", *, key: str = "novelty.detector"
) -> Detector:
    """Return a detector: by its name, by `name` and options of it, or one that was made.

    Args:
        key: of it in messages.

    Raises:
        RequestError: there is no such detector, or an option is wrong.
    """
    if isinstance(asked, Detector):
        raise_problems(checked(asked, prefix=key))
        return asked
    given = {"name": asked} if isinstance(asked, str) else dict(asked)
    name = str(given.pop("name", ""))
    if name not in DETECTORS:
        raise RequestError(
            Problem(
                key,
                name,
                reason=f"the detectors are {', '.join(DETECTORS)}",
                nearest=nearest(name, DETECTORS),
            )
        )
    problems: list[Problem] = []
    made = read_options(DETECTORS[name], given, prefix=key, problems=problems)
    raise_problems(problems)
    assert made is not None, "options without a problem make a record"
    return made
