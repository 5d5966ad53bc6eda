"""A model that runs -> an archive."""
