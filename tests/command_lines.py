"""Commands in this process."""

from typer.testing import CliRunner, Result

from qvtrace.cli import app


def run(*arguments: str) -> Result:
    """What came of a command that is to succeed."""
    result = CliRunner().invoke(app, list(arguments), prog_name="qvtrace")
    assert result.exit_code == 0, result.stderr
    return result
