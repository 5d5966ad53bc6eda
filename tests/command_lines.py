"""Commands in this process."""

from typer.testing import CliRunner, Result

from qvtrace.cli import app


def invoke(*words: object) -> Result:
    """What came of a command, whatever that is."""
    return CliRunner().invoke(app, [*map(str, words)], prog_name="qvtrace")


def run(*words: object) -> Result:
    """What came of a command that is to succeed."""
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr
    return result
