"""Timings: methods side by side in one run, each beside the usual form of the same result."""
