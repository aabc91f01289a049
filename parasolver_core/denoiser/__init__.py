"""The user's network: what it must be, how it is called, and how it is looked at."""
