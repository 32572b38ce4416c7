"""Novelty of batches for a frozen base: detectors, a library of known skills, decisions.

All statistics are computed in the feature space of the frozen base, which training never changes: a
skill has the same features before and after its expert has learned it.
"""

from typing import TYPE_CHECKING

from tritter.loading import lazy_names

if TYPE_CHECKING:
    from tritter.methods.novelty.detectors import NoveltyDetector
    from tritter.methods.novelty.library import SkillLibrary
    from tritter.methods.novelty.observation import Observation, observe
    from tritter.methods.novelty.options import NoveltyOptions

_HERE = "tritter.methods.novelty"
__getattr__ = lazy_names(
    _HERE,
    {
        "NoveltyDetector": f"{_HERE}.detectors",
        "NoveltyOptions": f"{_HERE}.options",
        "Observation": f"{_HERE}.observation",
        "SkillLibrary": f"{_HERE}.library",
        "observe": f"{_HERE}.observation",
    },
)
__all__ = ["NoveltyDetector", "NoveltyOptions", "Observation", "SkillLibrary", "observe"]
