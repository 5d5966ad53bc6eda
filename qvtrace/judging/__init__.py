"""A comparison -> a decision: gates, regressions, noise floors."""
