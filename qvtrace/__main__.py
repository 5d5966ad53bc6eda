"""`python -m qvtrace`."""

from qvtrace.cli import main

if __name__ == "__main__":
    main()
