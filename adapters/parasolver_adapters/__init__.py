"""Connects frameworks to the solver; each module imports its framework only when it is used."""

from parasolver_adapters.extras import watch

watch()
