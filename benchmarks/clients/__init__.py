"""How far is a client's sample from its own sequential one, in how many rounds? ``python -m benchmarks.clients``.

A client is code that somebody already has: its loop, its network, its random numbers. It is run as it is and through
the few lines that its users write, from the same random numbers, at a tolerance of 1e-2 and of 0. ``--write`` puts the
table into ``docs/clients.md``; each module has the clients of a kind.
"""
