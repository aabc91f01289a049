"""On a GPU: is it right, what does a round cost beside the network, what does a batch cost, and whole runs.

``python -m benchmarks.gpu --out FOLDER`` runs the parts one after another, the most valuable first, each in a process
of its own and within its time. Every result is a line of ``results.jsonl`` as soon as it is known; a table is printed
at the end. ``--tiny`` tries everything on a CPU in small. The baselines are the plain loop, and the plain loop with its
step captured as a CUDA graph. ``python -m benchmarks.gpu.table FOLDER`` makes the page's table and what
``parasolver plan --device`` reads.

A machine without a network needs the wheels of diffusers and array-api-compat beside the repository, and nothing else
that images with PyTorch do not have::

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site:adapters PYTHONUNBUFFERED=1 python3 -m benchmarks.gpu
"""
