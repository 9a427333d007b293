"""How a model rotates queries and keys by position."""
