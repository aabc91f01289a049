"""Parallel sampling inside a modular pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam

from parasolver_adapters.diffusers.options import Choices, ParallelRun
from parasolver_adapters.diffusers.pipelines import Session


class ParallelDenoiseStep(ModularPipelineBlocks):
    """A block that runs another one, which holds the denoising loop, in parallel.

    It takes that block's place: inputs, outputs and components are the same, and one more output, ``parallel_run``, the
    :class:`~parasolver_adapters.diffusers.ParallelRun` of the call.

    Args:
        step: the block, such as ``blocks.sub_blocks["denoise"]``; also one that holds more than the loop.
        **options: ``window``, ``tolerance`` and the others of
            :func:`~parasolver_adapters.diffusers.parallel_sampling`.

    Raises:
        TypeError, ValueError: an argument is not as described here.

    Example::

        blocks = StableDiffusionXLAutoBlocks()
        blocks.sub_blocks["denoise"] = ParallelDenoiseStep(blocks.sub_blocks["denoise"], window=16)
        pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        pipe.load_components()
        result = pipe(prompt="a lighthouse", output=["images", "parallel_run"])
    """

    def __init__(self, step: ModularPipelineBlocks, **options: Any) -> None:
        if not isinstance(step, ModularPipelineBlocks):
            raise TypeError(f"step: expected a block of a modular pipeline, got {type(step).__name__}")
        super().__init__()
        self.step: Any = step
        self._choices = Choices.checked(**options)

    @property
    def model_name(self) -> str | None:  # type: ignore[override]
        return self.step.model_name

    @property
    def description(self) -> str:
        return f"Runs {type(self.step).__name__} in parallel over time steps. {self.step.description}"

    @property
    def expected_components(self) -> list[Any]:
        return self.step.expected_components

    @property
    def expected_configs(self) -> list[Any]:
        return self.step.expected_configs

    @property
    def inputs(self) -> list[Any]:
        return self.step.inputs

    @property
    def required_inputs(self) -> list[Any]:
        return self.step.required_inputs

    @property
    def intermediate_outputs(self) -> list[Any]:
        run = OutputParam("parallel_run", type_hint=ParallelRun, description="What the parallel sampling cost")
        return [*self.step.intermediate_outputs, run]

    def set_progress_bar_config(self, **config: Any) -> None:
        """Of all loops inside."""
        for loop in _loops(self.step):
            loop.set_progress_bar_config(**config)

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Run the block; its first pass, which is only watched, works on a copy of the state."""

        def call(**values: Any) -> PipelineState:
            mapping = {key: list(names) for key, names in state.kwargs_mapping.items()}
            return self.step(components, PipelineState(values, mapping))[1]

        run = ParallelRun()
        after = Session(components, call, self._choices, run, list(_loops(self.step))).sample(state.values)
        state.values, state.kwargs_mapping = after.values, after.kwargs_mapping
        state.set("parallel_run", run)
        return components, state


def _loops(block: Any) -> Iterator[Any]:
    """The blocks inside that show a progress bar."""
    if hasattr(block, "progress_bar"):
        yield block
    for inner in block.sub_blocks.values():
        yield from _loops(inner)
