"""The window that chooses itself, and the costs that it needs."""
