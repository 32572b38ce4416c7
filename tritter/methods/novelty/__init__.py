"""Is what a frozen base sees new? Detectors, a library of known skills, decisions with intervals.

All statistics are taken in the space of the frozen base, which no training moves: a skill looks the
same before and after its expert has learned it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritter.methods.novelty.detectors import NoveltyDetector
    from tritter.methods.novelty.library import SkillLibrary
    from tritter.methods.novelty.observation import Observation, observe
    from tritter.methods.novelty.options import NoveltyOptions

_MODULES = {
    "NoveltyDetector": "detectors",
    "NoveltyOptions": "options",
    "Observation": "observation",
    "SkillLibrary": "library",
    "observe": "observation",
}
__all__ = ["NoveltyDetector", "NoveltyOptions", "Observation", "SkillLibrary", "observe"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tritter.methods.novelty' has no attribute {name!r}")
    return getattr(import_module(f"tritter.methods.novelty.{_MODULES[name]}"), name)
