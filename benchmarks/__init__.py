"""Every comparison that the project quotes, in one run: ``python -m benchmarks --help``."""
