"""A local server that answers the real clients of the Hugging Face Hub from folders.

`serve(folder)` answers for folder/models/<organisation>/<name> and
folder/datasets/<organisation>/<name>; give its address to a new process as HF_ENDPOINT.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(
    r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
)
_FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)")


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve while the context is open. Yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def _answer(self, body: bytes = b"") -> None:
            path = unquote(urlsplit(self.path).path)
            if found := _FILE.fullmatch(path):
                file = folder / ("datasets" if found[1] else "models") / found[2] / found[3]
                self._send(file.read_bytes() if file.is_file() else None)
            elif (found := _API.fullmatch(path)) and (folder / found[1] / found[2]).is_dir():
                self._send(
                    json.dumps(_describe(folder / found[1] / found[2], found, body)).encode()
                )
            else:
                self._send(None)

        def _send(self, content: bytes | None) -> None:
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header(
                    "X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound"
                )
            content = content or b""
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _describe(root: Path, asked: re.Match[str], body: bytes) -> Any:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    entries: list[dict[str, Any]] = [
        {
            "type": "file",
            "path": str(path.relative_to(root)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]
    folders = sorted(
        {
            str(parent.relative_to(root))
            for path in files
            for parent in path.parents
            if parent > root
        }
    )
    entries += [{"type": "directory", "path": name, "oid": REVISION, "size": 0} for name in folders]
    if asked[3] == "tree":
        under = asked[5].rstrip("/") + "/" if asked[5] else ""
        return [entry for entry in entries if entry["path"].startswith(under)]
    if asked[3] == "paths-info":
        wanted = json.loads(body)["paths"]
        return [entry for entry in entries if entry["path"] in wanted]
    siblings = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
    return {
        "id": asked[2],
        "sha": REVISION,
        "private": False,
        "gated": False,
        "siblings": siblings,
        "tags": [],
    }
