"""Methods against forgetting: a plain function each, and the method that applies it."""

from tritter.forgetting.distill import Distill
from tritter.forgetting.ewc import EWC, OnlineEWC
from tritter.forgetting.freeze import Freeze
from tritter.forgetting.l2sp import L2SP
from tritter.forgetting.replay import Replay, SelfReplay
from tritter.forgetting.si import SI
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
