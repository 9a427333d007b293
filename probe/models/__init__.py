"""Model families: one file each, one list, loading and the self-check."""
