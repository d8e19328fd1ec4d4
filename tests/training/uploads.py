"""A local server that the real client of the Hugging Face Hub uploads to.

It speaks the part of the Hub's API that `create_repo`, `model_info` and `upload_folder` use,
without Xet (HF_HUB_DISABLE_XET).
"""

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

TOKEN = "hf_of_the_tests"


@dataclass
class Hub:
    """The repositories of the server, and how it fails."""

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)  # name → path → content
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)  # repository, message
    stored: dict[str, bytes] = field(default_factory=dict)  # large files, by digest
    refused: int = 0  # commits that are still to be refused
    attempts: int = 0  # commits that were asked for
    open: threading.Event = field(default_factory=threading.Event)  # else commits wait

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON for a request."""
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            tags = ModelCard(json.loads(body)["content"]).data.get("tags") or []
            wrong = [{"message": "no metadata"}] * ("fast-llm" not in tags)
            return 200, {"errors": wrong, "warnings": []}
        if found := re.fullmatch(r"/(lfs|verify)/(\w+)", path):
            if method == "PUT":
                self.stored[found[2]] = body
            return 200, {}
        if found := re.fullmatch(r"/(.+/.+)\.git/info/lfs/objects/batch", path):
            return 200, {"objects": [self._batch(one) for one in json.loads(body)["objects"]]}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/main)?", path)
        if found is None or found[1] not in self.repos:
            return 404, {"error": "Repository not found"}
        name, what = found[1], found[2]
        if what is None:
            return 200, {"id": name, "private": self.private[name], "sha": "0" * 40}
        if what == "tree":
            files = self.repos[name].items()
            return 200, [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                for path, data in files
            ]
        if what == "preupload":
            return 200, {"files": [_mode(one["path"]) for one in json.loads(body)["files"]]}
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _create(self, values: dict[str, Any]) -> tuple[int, Any]:
        name = f"{values['organization']}/{values['name']}"
        answer = {"url": f"{self.address}/{name}"}
        if name in self.repos:
            return 409, answer | {"error": "You already created this model repo"}
        private = values.get("private", values.get("visibility") == "private")
        self.repos[name], self.private[name] = {}, bool(private)
        return 200, answer

    def _batch(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.stored:
            return one
        places = {"upload": "lfs", "verify": "verify"}
        actions = {n: {"href": f"{self.address}/{p}/{one['oid']}"} for n, p in places.items()}
        return one | {"actions": actions}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        self.attempts += 1
        self.open.wait(30)
        if self.refused:
            self.refused -= 1
            return 403, {"error": "Forbidden: no right to write here"}
        for line in lines:
            value, kind = line["value"], line["key"]
            if kind == "file":
                self.repos[name][value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                self.repos[name][value["path"]] = self.stored[value["oid"]]
            elif kind == "deletedFile":
                del self.repos[name][value["path"]]
        self.commits.append((name, lines[0]["value"]["summary"]))
        number = len(self.commits)
        url = f"{self.address}/{name}/commit/{number}"
        return 200, {"commitUrl": url, "commitOid": str(number), "success": True}


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Serve while the context is open."""
    hub = Hub()
    hub.open.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def do_PUT(self) -> None:
            self._answer("PUT")

        def _answer(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path)
            allowed = path.startswith(("/lfs/", "/verify/"))
            allowed |= self.headers.get("Authorization") == f"Bearer {TOKEN}"
            denied = 401, {"error": "Invalid username or password."}
            status, found = hub.answer(method, path, body) if allowed else denied
            content = json.dumps(found).encode()
            with contextlib.suppress(OSError):  # the client was killed
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.open.set()
        server.shutdown()
        thread.join()
        server.server_close()
