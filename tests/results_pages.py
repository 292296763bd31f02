"""What the tests of the results pages read: the folder, and tables of claims.md."""

from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"
CLAIMS = (RESULTS / "claims.md").read_text()


def row(start):
    """The cells of the claims' table row that begins with this text."""
    (line,) = (line for line in CLAIMS.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]
