"""Is what a frozen base sees new? Detectors, a library of known skills, decisions with intervals.

All statistics are taken in the space of the frozen base, which no training moves: a skill looks the
same before and after its expert has learned it.
"""

from tritter.novelty.detectors import NoveltyDetector, NoveltyOptions
from tritter.novelty.library import SkillLibrary
from tritter.novelty.observation import Observation, observe

__all__ = ["NoveltyDetector", "NoveltyOptions", "Observation", "SkillLibrary", "observe"]
