"""diffusers: pipelines and schedulers as they are. Importing this package imports PyTorch and diffusers."""

from parasolver_adapters.diffusers.denoisers import TransformerDenoiser, UNetDenoiser
from parasolver_adapters.diffusers.loops import ParallelLoop, parallel_loop
from parasolver_adapters.diffusers.options import ParallelRun
from parasolver_adapters.diffusers.pipelines import parallel_sampling
from parasolver_adapters.diffusers.refusal import PipelineNotParallelError
from parasolver_adapters.diffusers.schedulers.rule import (
    SchedulerRule,
    UnsupportedSchedulerError,
    step_rule_from_scheduler,
)

__all__ = [
    "ParallelLoop",
    "ParallelRun",
    "PipelineNotParallelError",
    "SchedulerRule",
    "TransformerDenoiser",
    "UNetDenoiser",
    "UnsupportedSchedulerError",
    "parallel_loop",
    "parallel_sampling",
    "step_rule_from_scheduler",
]
