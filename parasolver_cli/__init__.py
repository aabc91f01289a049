"""The ``parasolver`` command: a demonstration with the embedded model, and a list of what can be chosen."""
