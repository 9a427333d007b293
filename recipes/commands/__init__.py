"""The commands of `mmdit`, a module for each group."""
