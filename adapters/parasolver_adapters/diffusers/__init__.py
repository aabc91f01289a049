"""diffusers: a scheduler's own step as a step rule. Importing this package imports PyTorch and diffusers."""

from parasolver_adapters.diffusers.schedulers import (
    SchedulerRule,
    UnsupportedSchedulerError,
    step_rule_from_scheduler,
)

__all__ = ["SchedulerRule", "UnsupportedSchedulerError", "step_rule_from_scheduler"]
