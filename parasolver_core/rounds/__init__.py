"""What one round does: compare outputs with belief, decide, move the states."""
