"""The recipe language: YAML and Python to one validated Recipe, with the places of its errors. No torch."""
