"""A comparison while the candidate runs: what the recorder sees meets a stored reference, and no
second archive is written. The only place where a recording and a comparison come together."""
