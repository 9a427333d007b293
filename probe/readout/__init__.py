"""Readouts: one streaming reduction of attention per file."""
