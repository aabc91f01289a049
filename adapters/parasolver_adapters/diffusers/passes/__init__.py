"""What one call of a pipeline goes through: a pass that records its loop, checks, and the real one."""
