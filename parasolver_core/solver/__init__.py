"""The loop of rounds: callbacks, interrupts, errors, deadlines and reports."""
