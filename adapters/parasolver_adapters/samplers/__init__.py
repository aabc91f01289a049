"""Samplers that are functions, ``fn(model, x, sigmas, ...)``: of k-diffusion, of image tools, of EDM, of your own.

Example::

    from k_diffusion.sampling import sample_heun
    from parasolver_adapters.samplers import parallel

    x = parallel(sample_heun, window=16)(model, x, sigmas, extra_args=extra_args)
"""

from parasolver_adapters.samplers.calls import UnsupportedSamplerError
from parasolver_adapters.samplers.flows import sample_flow
from parasolver_adapters.samplers.parallel import ParallelSampler, parallel
from parasolver_adapters.samplers.rules import SamplerRule, step_rule_from_sampler

__all__ = [
    "ParallelSampler",
    "SamplerRule",
    "UnsupportedSamplerError",
    "parallel",
    "sample_flow",
    "step_rule_from_sampler",
]
