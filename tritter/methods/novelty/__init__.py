"""Is what a frozen base sees new? Detectors, a library of known skills, decisions with intervals.

All statistics are taken in the space of the frozen base, which no training moves: a skill looks the
same before and after its expert has learned it.
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
