"""When does it pay? Seconds on small networks, and a simulation of other machines: ``python -m benchmarks.latency``.

Measured: one sample at a time (what a robot waits for), sequential and parallel in turns within one process, medians,
with everything that the user waits for. Against two sequential samplers: ``solve_sequential``, and a bare loop without
any checks, the least that a sampler can do.

Simulated: the rows of every round of real runs are replayed on a machine on which a batch costs what is assumed of it:
as much as one row up to k rows, in proportion to its rows beyond. Clearly not a measurement.
"""
