"""What else could I take? Caches, fewer steps, less guidance against the solver: ``python -m benchmarks.alternatives``.

One sample at a time, as for somebody who waits for a picture: the small diffusion transformer on Fashion-MNIST, DDIM
with 50 steps and classifier-free guidance. Every alternative is held against that sequential sample (relative RMS
distance), and against the real pictures (Frechet distance, and whether a classifier sees the class that was asked for),
so that "different, but as good" is visible.

Time is that of the network, counted and not measured: each call with its rows and the share of the network that ran.
What that takes follows from what a batch costs (:class:`benchmarks.latency.devices.Device`), on one device or several.
Every sample is kept in a file of its own, from which an interrupted benchmark goes on; further processes can work on
others (``--first``).
"""
