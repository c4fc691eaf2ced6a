"""The page's server: read-only, on the loopback interface.

Other pages in the same browser must not read a record. A page of another origin can send requests here, but the browser
keeps the answers from it; one whose name an attacker points at this machine (DNS rebinding) sends that name as Host,
and is refused. The page itself may load nothing from elsewhere: its policy is among the headers.
"""

import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from urllib.parse import urlsplit

from noetherperf.view import page
from noetherperf.view.answers import Answers

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")  # by any port: a tunnel may have another at its other end

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"{page.POLICY}; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageServer(ThreadingHTTPServer):
    """Serves the page of some records. `serve_forever` serves; the port is taken when the server is made.

    Args:
        answers: About the records.
        port: On the loopback interface; 0: a free one.

    Attributes:
        url: Where the page is.

    Raises:
        OSError: The port is in use, or may not be used.
    """

    daemon_threads = True

    def __init__(self, answers: Answers, port: int = 0) -> None:
        self.answers, self.files = answers, page.files()
        super().__init__((LOOPBACK, port), _Handler)
        self.url = f"http://{LOOPBACK}:{self.server_address[1]}/"
        self._reader = threading.Thread(target=answers.read_ahead, daemon=True)
        self._reading = threading.Lock()

    def server_bind(self) -> None:
        """As the base class, which also asks for this machine's name: that may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that closes a connection is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def read_ahead(self) -> None:
        """Begin to read what clicks will ask for, if that has not begun."""
        with self._reading:
            if self._reader.ident is None:
                self._reader.start()


class _Handler(BaseHTTPRequestHandler):
    """A connection for each request, so that none is left when the server ends."""

    server: PageServer

    def do_GET(self) -> None:
        try:
            url = urlsplit(self.path)
        except ValueError:  # "//["
            self._send(HTTPStatus.BAD_REQUEST, "text/plain", b"this is no address")
            return
        if not self._is_ours():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"this page is for the machine that it runs on")
        elif url.path in self.server.files:
            self._send(HTTPStatus.OK, *self.server.files[url.path])
        elif url.path.startswith("/data/"):
            question = url.path.removeprefix("/data/") + (f"?{url.query}" if url.query else "")
            try:
                answer = self.server.answers.answer(question)
            except LookupError as error:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", str(error).encode())
            else:
                self._send(HTTPStatus.OK, "application/json", json.dumps(answer, allow_nan=False).encode())
                if question.startswith("layers"):  # the first picture is on its way
                    self.server.read_ahead()
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here")

    def _is_ours(self) -> bool:
        """Whether a request names this machine, and comes from its own page or from a user's address bar."""
        host = self.headers.get("Host", "")
        name, _, port = host.partition(":")
        return name in NAMES and (port or "80").isdecimal() and self.headers.get("Origin") in (None, f"http://{host}")

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            **HEADERS,
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, the base class's name
        """Nothing: a line for every request would hide the page's address."""
