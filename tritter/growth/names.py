"""Tritter's own triggers and initialisers, by the words that choose them."""

from collections.abc import Mapping

from tritter.growth.initialisers import GradMax, Initialiser, Random, SourceNoise, Split
from tritter.growth.meeting import Meeting
from tritter.growth.triggers import (
    Budget,
    Percentile,
    Plateau,
    Scheduled,
    Trigger,
    WithinLayer,
)

TRIGGERS: Mapping[str, type[Trigger]] = {
    "percentile": Percentile,
    "plateau": Plateau,
    "schedule": Scheduled,
    "budget": Budget,
    "meeting": Meeting,
    "within_layer": WithinLayer,
}
INITIALISERS: Mapping[str, type[Initialiser]] = {
    "gradmax": GradMax,
    "split": Split,
    "source_noise": SourceNoise,
    "random": Random,
}
