"""The page's files, as a server sends them, and as one file that holds everything.

Scripts run only if the page's policy (Content-Security-Policy) knows them: the server's by their address, the file's by
their digest. So a name from a record could not run as a script even if it got into the page as markup.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

from noetherperf.common.progress import progress as told
from noetherperf.record.files import replace_file
from noetherperf.record.reader import Record, open_record
from noetherperf.view.answers import Answers
from noetherperf.view.balances import MOST_LINES
from noetherperf.view.quantities import QUANTITIES

HERE = Path(__file__).parent
#: Plotly writes a style element, and draws heat maps into images that it makes itself.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
POLICY = f"{_POLICY}; script-src 'self'; connect-src 'self'"  # of a server
SCRIPTS = ("numbers.js", "drawing.js", "views.js", "matrices.js", "page.js")  # one script together
FILE_VALUES = 2**20  # float32 numbers in a file, about

Files = dict[str, tuple[str, bytes]]


def files() -> Files:
    """What a server sends, by address: the media type and the content."""
    scripts = '<script src="/page.js" defer></script>\n<script src="/plotly.js" defer></script>'
    return {
        "/": ("text/html", _page(POLICY, scripts).encode()),
        "/plotly.js": ("text/javascript", _plotly().encode()),
        "/page.js": ("text/javascript", _script().encode()),
    }


def export(paths: Sequence[Path], file: Path, *, progress: bool = False) -> None:
    """Write the page of some records as one file, which a browser shows without a server and without a network.

    It has fewer rows than the live page where there are many units, so that it stays small.

    Args:
        paths: The records' directories.
        file: Replaced if it exists; missing folders are made.
        progress: Say on stderr how far it is.

    Raises:
        FileNotFoundError, ValueError: As `open_record`; or the file is a folder, or would be inside a record.
        OSError: The file cannot be written.
    """
    for path in paths:
        if path.resolve() in (file.resolve(), *file.resolve().parents):
            raise ValueError(f"file: {str(file)!r} is inside the record {str(path)!r}; choose a place beside it")
    if file.is_dir():
        raise ValueError(f"file: {str(file)!r} is a folder; name a file in it, such as {str(file / 'page.html')!r}")
    numbers = sum(map(_numbers_a_row, map(open_record, paths)))
    answers = Answers(paths, live=False, most_rows=max(32, FILE_VALUES // max(1, numbers)))
    held, questions = {}, list(answers.questions())
    with told("the page", len(questions), "answers", shown=progress) as report:
        for done, question in enumerate(questions, 1):
            held[question] = answers.answer(question)
            report(done)
    data = base64.b64encode(gzip.compress(json.dumps(held, allow_nan=False).encode(), mtime=0)).decode()
    scripts = [_script(), _plotly()]
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    elements = [f'<script type="application/octet-stream" id="data">{data}</script>']
    elements += [f"<script>{script}</script>" for script in scripts]
    content = _page(f"{_POLICY}; script-src {digests}", "\n".join(elements)).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, content)
    except OSError as error:  # which names the file that would have been renamed
        raise OSError(f"file: {str(file)!r} cannot be written: {error.strerror or error}") from error


def _numbers_a_row(record: Record) -> int:
    """How many numbers of each row a file holds."""
    of_blocks: int = sum(blocks * (n + 2 * min(n, MOST_LINES)) for blocks, n in record.attrs.get("balance_shapes", []))
    return int(record.dataset.sizes["group"]) * len(QUANTITIES) + of_blocks


def _page(policy: str, scripts: str) -> str:
    return Template(_text("page.html")).substitute(policy=policy, style=_text("page.css"), scripts=scripts)


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _script() -> str:
    """The page's own script. It begins before Plotly's has been compiled."""
    return "\n".join(map(_text, SCRIPTS))


def _plotly() -> str:
    """Plotly's script, as its package has it."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script
