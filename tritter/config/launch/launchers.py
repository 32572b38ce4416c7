"""How the jobs of a sweep are started: one after the other, or side by side in processes.

A launcher is a plugin of Hydra's. Of those that are known by name it is known how many jobs they
run at once, and so with how many threads each; what of their settings would harm a run is refused.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tritter.config.schema import RunConfig
from tritter.config.validation import Rule
from tritter.errors import Problem
from tritter.targets import TARGET

_OF_CLASS = {
    "BasicLauncher": "basic",
    "JoblibLauncher": "joblib",
    "LocalLauncher": "submitit_local",
    "SlurmLauncher": "submitit_slurm",
    "RayLauncher": "ray",
    "RayAWSLauncher": "ray_aws",
}
_FIXED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "joblib": {
        "backend": (None, "loky"),
        "prefer": (None, "processes"),
        "require": (None,),
        "timeout": (None,),
    },
    "submitit_local": {"tasks_per_node": (1,), "nodes": (1,)},
    "submitit_slurm": {"tasks_per_node": (1,), "nodes": (1,)},
}
_WHY_FIXED = {
    "joblib": "each job runs in a process of its own, to its end",
    "submitit_local": "a job is one process; several would write to one folder",
    "submitit_slurm": "a job is one process; several would write to one folder",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launching:
    """How a launcher runs jobs.

    Args:
        launcher: its name; that of its class where it is none of those that are known.
        at_once: jobs side by side on this machine, as far as that is known.
        threads: of each job, where jobs share this machine.
    """

    launcher: str = "basic"
    at_once: int = 1
    threads: int | None = None

    @property
    def is_in_processes(self) -> bool:
        """Whether jobs run in other processes than the one that was started."""
        return self.launcher != "basic"

    @property
    def prints_apart(self) -> bool:
        """Whether what its jobs print goes into files of its own, none of it where we print."""
        return self.launcher.startswith("submitit")

    @property
    def ends_with_us(self) -> bool:
        """Whether jobs run in our own child processes, and not in the care of something else."""
        return self.launcher == "joblib"


ONE_BY_ONE = Launching()


def launching(hydra: DictConfig, *, num_jobs: int) -> Launching:
    """Return how a sweep's launcher runs its jobs.

    Args:
        hydra: Hydra's own settings of a job.
        num_jobs: that the sweeper gives it together.
    """
    settings = _settings(hydra)
    name, cores = launcher_of(hydra), num_cores()
    if name == "joblib":
        asked = settings.get("n_jobs") or 1
        at_once = asked if asked > 0 else max(1, cores + 1 + asked)
    elif name == "submitit_local":
        at_once = num_jobs  # it starts all at once
    elif name == "ray":
        ray = settings.get("ray") or {}
        of_all = (ray.get("init") or {}).get("num_cpus") or cores
        of_each = (ray.get("remote") or {}).get("num_cpus") or 1
        at_once = max(1, int(of_all / of_each))
    else:
        return Launching(launcher=name)
    at_once = max(1, min(at_once, num_jobs))
    return Launching(launcher=name, at_once=at_once, threads=max(1, cores // at_once))


def launcher_of(hydra: DictConfig) -> str:
    """Return the name of a launcher; that of its class where it is not known."""
    kind = str(_settings(hydra).get(TARGET)).rpartition(".")[2]
    return _OF_CLASS.get(kind, kind)


def launcher_problems(hydra: DictConfig) -> Iterator[Problem]:
    """Yield settings of a launcher with which jobs would not run, or run into one another."""
    name, settings = launcher_of(hydra), _settings(hydra)
    if name == "ray_aws":
        reason = (
            "its jobs would write their folders on machines that it starts and ends; allowed are "
            "ray, joblib, submitit_local and submitit_slurm"
        )
        yield Problem("hydra/launcher", name, reason=reason)
    for key, allowed in _FIXED.get(name, {}).items():
        if key in settings and settings[key] not in allowed:
            shown = " or ".join("null" if each is None else str(each) for each in allowed)
            reason = f"{_WHY_FIXED[name]}; allowed is {shown}"
            yield Problem(f"hydra.launcher.{key}", settings[key], reason=reason)
    if name == "joblib" and settings.get("n_jobs") == 0:
        reason = "allowed is a number of jobs at a time from 1 on, or -1 for as many as cores"
        yield Problem("hydra.launcher.n_jobs", 0, reason=reason)
    minutes = settings.get("timeout_min")
    if isinstance(minutes, int) and minutes < 1:
        reason = "allowed is a number of minutes from 1 on, after which a job is cut off"
        yield Problem("hydra.launcher.timeout_min", minutes, reason=reason)


def device_rule(hydra: DictConfig) -> Rule:
    """Return the rule that holds a job's devices against those that its launcher gives it."""
    settings = _settings(hydra)
    hides_gpus = launcher_of(hydra) == "submitit_local" and not settings.get("gpus_per_node")

    def problems(config: RunConfig) -> Iterator[Problem]:
        if hides_gpus and config.trainer.accelerator == "gpu":
            reason = (
                "submitit_local hides the GPUs from its jobs unless it is told how many they have; "
                "add hydra.launcher.gpus_per_node=1"
            )
            yield Problem("trainer.accelerator", "gpu", reason=reason)

    return problems


def num_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _settings(hydra: DictConfig) -> Mapping[str, Any]:
    plain = OmegaConf.to_container(hydra.launcher) if OmegaConf.is_config(hydra.launcher) else None
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}
