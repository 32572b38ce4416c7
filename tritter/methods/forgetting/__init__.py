"""Continual-learning methods that mitigate forgetting, and the plain functions that they apply."""

from tritter.methods.forgetting.distill import Distill
from tritter.methods.forgetting.ewc import EWC, OnlineEWC
from tritter.methods.forgetting.freeze import Freeze
from tritter.methods.forgetting.l2sp import L2SP
from tritter.methods.forgetting.replay import Replay, SelfReplay
from tritter.methods.forgetting.si import SI
from tritter.training.forgetting_method import build_methods, needs_of

__all__ = [
    "EWC",
    "L2SP",
    "SI",
    "Distill",
    "Freeze",
    "OnlineEWC",
    "Replay",
    "SelfReplay",
    "build_methods",
    "needs_of",
]
