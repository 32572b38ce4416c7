"""The specification's record of a continued pretraining, which yields the config of a run."""

from dataclasses import dataclass

from tritter.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class ContinuedPretrainingConfig:
    """Train an expanded model on, with less of a rate than its base had (specification, 3.3).

    The defaults are the specification's, made for models of billions of parameters; the default
    job's are others.

    Args:
        learning_rate: the peak.
        warmup_ratio: share of the steps over which the rate rises.
        max_steps: of the optimizer.
        use_ewc: hold the old weights by elastic weight consolidation; else nothing is held.
        ewc_lambda: λ of it.
    """

    learning_rate: float = 1e-5
    warmup_ratio: float = 0.05
    max_steps: int = 10_000
    use_ewc: bool = True
    ewc_lambda: float = 1000.0

    def overrides(self) -> list[str]:
        """Return it as overrides of a command line."""
        words = [
            f"training.learning_rate={self.learning_rate}",
            f"training.warmup_ratio={self.warmup_ratio}",
            f"training.max_steps={self.max_steps}",
        ]
        if not self.use_ewc:
            return [*words, "forgetting=none"]
        return [*words, "forgetting=ewc", f"forgetting.ewc.ewc_lambda={self.ewc_lambda}"]

    def run_config(self, *overrides: str) -> RunConfig:
        """Return the config of a run that trains so.

        Args:
            overrides: of all else, such as `expansion=dus`; they win.

        Raises:
            RequestError: lists all that is wrong with it.
        """
        from tritter.config.launch.composition import (
            load_config,  # hydra, which the record needs not
        )

        return load_config([*self.overrides(), *overrides])
