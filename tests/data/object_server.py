"""A local server that speaks S3 (moto's), which counts requests and can fail them."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

Fault = Callable[[str, str, int], int | None]
"""Method, path and number of a request to the status that it fails with, or None."""


class ObjectServer:
    """The server, in threads of this process."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
        self.app: Any = DomainDispatcherApplication(create_backend_app)
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        self.sent = 0  # bytes of answers
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        """WSGI."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        status = self.fault(method, path, len(self.requests)) if self.fault else None
        if status is not None:
            code = {403: "AccessDenied", 503: "SlowDown"}.get(status, "InternalError")
            text = f"<Error><Code>{code}</Code><Message>{code} of the test</Message></Error>"
            found: Iterable[bytes] = Response(text, status)(environ, start)
            return found
        answer = list(self.app(environ, start))
        self.sent += sum(map(len, answer))
        return answer

    def forget(self) -> None:
        """Begin counting anew, without faults."""
        self.fault, self.requests, self.sent = None, [], 0

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
