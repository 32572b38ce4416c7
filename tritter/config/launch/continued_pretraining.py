"""Typed options of continued pretraining, which return the configuration of a run."""

from dataclasses import dataclass

from tritter.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class ContinuedPretrainingConfig:
    """Options for training an expanded model with a lower learning rate than its base model.

    The defaults suit models with billions of parameters; the default job uses other values.

    Args:
        learning_rate: peak learning rate.
        warmup_ratio: fraction of the steps with learning-rate warmup.
        max_steps: number of optimizer steps.
        use_ewc: use elastic weight consolidation; otherwise no forgetting mitigation.
        ewc_lambda: weight λ of the EWC penalty.
    """

    learning_rate: float = 1e-5
    warmup_ratio: float = 0.05
    max_steps: int = 10_000
    use_ewc: bool = True
    ewc_lambda: float = 1000.0

    def overrides(self) -> list[str]:
        """Return these options as overrides of a command line."""
        overrides = [
            f"training.learning_rate={self.learning_rate}",
            f"training.warmup_ratio={self.warmup_ratio}",
            f"training.max_steps={self.max_steps}",
        ]
        if not self.use_ewc:
            return [*overrides, "forgetting=none"]
        return [*overrides, "forgetting=ewc", f"forgetting.ewc.ewc_lambda={self.ewc_lambda}"]

    def run_config(self, *overrides: str) -> RunConfig:
        """Return the configuration of a run with these options.

        Args:
            overrides: further overrides, such as `expansion=dus`; they take precedence.
        """
        from tritter.config.launch.composition import load_config  # imports Hydra, which is slow

        return load_config([*self.overrides(), *overrides])
