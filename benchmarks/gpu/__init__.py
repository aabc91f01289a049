"""On a GPU: is it right, what does a round cost beside the network, what does a batch cost, and whole runs.

``python -m benchmarks.gpu --out FOLDER`` runs the parts one after another, each in a process of its own, so that
neither a hang nor a broken CUDA context stops the next. Every result is a line of ``results.jsonl`` as soon as it is
known; a table is printed at the end. ``--tiny`` tries everything on a CPU in small. The baselines are the plain loop,
and the plain loop with the network captured as a CUDA graph.
"""
