"""Two archives -> a comparison."""
