"""What new nodes begin with."""
