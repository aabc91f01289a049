"""The error of pipelines that cannot be sampled in parallel."""


class PipelineNotParallelError(RuntimeError):
    """The pipeline cannot be sampled in parallel as it is called; the message says why."""
