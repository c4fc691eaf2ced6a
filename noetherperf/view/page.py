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

from noetherperf.record.files import replace_file
from noetherperf.record.reader import open_record
from noetherperf.view.answers import Answers
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


def export(paths: Sequence[Path], file: Path) -> None:
    """Write the page of some records as one file, which a browser shows without a server and without a network.

    It has fewer rows than the live page where there are many units, so that it stays small.

    Args:
        paths: The records' directories.
        file: Replaced if it exists; missing folders are made.

    Raises:
        FileNotFoundError, ValueError: As `open_record`; or the file would be inside a record.
        OSError: The file cannot be written.
    """
    for path in paths:
        if path.resolve() in (file.resolve(), *file.resolve().parents):
            raise ValueError(f"file: {str(file)!r} is inside the record {str(path)!r}; choose a place beside it")
    n_groups = sum(open_record(path).dataset.sizes["group"] for path in paths)
    answers = Answers(paths, live=False, most_rows=max(32, FILE_VALUES // (max(1, n_groups) * len(QUANTITIES))))
    held = {question: answers.answer(question) for question in answers.questions()}
    data = base64.b64encode(gzip.compress(json.dumps(held, allow_nan=False).encode(), mtime=0)).decode()
    scripts = [_script(), _plotly()]
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    elements = [f'<script type="application/octet-stream" id="data">{data}</script>']
    elements += [f"<script>{script}</script>" for script in scripts]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, _page(f"{_POLICY}; script-src {digests}", "\n".join(elements)).encode())


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
