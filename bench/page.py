"""Documents with figures: every section between two marks is written by the command that it names."""

from pathlib import Path

from bench.checkout import ROOT

DOCUMENT = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"


def marks(section: str, command: str) -> tuple[str, str]:
    """The lines that begin and end a section."""
    return f"<!-- {section}: begin; written by {command} -->", f"<!-- {section}: end -->"


def insert(document: str, section: str, command: str, text: str) -> str:
    """The document with the text as its section.

    Raises:
        ValueError: It has no marks of the section, or more than one pair.
    """
    begin, end = marks(section, command)
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"the document must have one line {begin} and after it one line {end}")
    before, _, rest = document.partition(begin)
    return f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}"


def write(section: str, command: str, text: str, document: Path = DOCUMENT) -> None:
    """Put a section into a document."""
    document.write_text(insert(document.read_text(), section, command, text))
