"""The steps of a loop as programs, and their network calls as one batch."""
