"""What every number in README and documentation comes from; run one with ``python -m benchmarks.<name>``."""
