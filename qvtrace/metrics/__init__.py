"""Arrays -> numbers."""
