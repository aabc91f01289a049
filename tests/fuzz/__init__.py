"""Random problems against the plain loop, each repeatable from its seed."""
