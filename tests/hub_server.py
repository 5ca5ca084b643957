"""A Hub on loopback: as much of its HTTP interface as the client needs to fetch and push models."""

import base64
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants


@dataclasses.dataclass
class Repository:
    """Files by path at each commit; branches and tags by name.

    Attributes:
      refuse: (status, X-Error-Code) of every answer about files, e.g. `GATED`; None to serve them.
    """

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    refuse: tuple[int, str] | None = None

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Adds a commit, to which `refs` (by default main) point from now on."""
        listing = [(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(files.items())]
        sha = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.commits[sha] = files
        self.refs |= dict.fromkeys(refs or ("main",), sha)
        return sha


GATED = (403, "GatedRepo")


@dataclasses.dataclass
class Hub:
    """The server.

    Attributes:
      repositories: by `org/name`.
      sent: (repository, path) of every file whose content was asked for, in order.
      down: answers 503 to everything while it is set.
    """

    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    sent: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    down: bool = False
    url: str = ""
    created: dict[str, bool] = dataclasses.field(default_factory=dict)  # repository -> private

    def put(self, name: str, folder: Path, *refs: str) -> str:
        """A commit of all files of a folder."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        return self.repositories.setdefault(name, Repository()).commit(files, *refs)

    def fetched(self) -> set[str]:
        """Names of the files that were sent so far; forgets them."""
        names = {path for _, path in self.sent}
        self.sent.clear()
        return names

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content for a path of the interface."""
        if self.down:
            return 503, {}, b""
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/" if api else "/").split("/")
        if len(parts) == 2:  # whether there is such a repository
            parts += ["revision", "main"]
        name, kind, rest = "/".join(parts[:2]), parts[2], parts[3:]
        repository = self.repositories.get(name)
        if repository is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision, rest = unquote(rest[0]), rest[1:]
        sha = repository.refs.get(revision, revision)
        files = repository.commits.get(sha)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if not api and repository.refuse is not None:
            status, code = repository.refuse
            return status, {"X-Error-Code": code} if code else {}, b""
        if kind == "revision":
            listed = [{"rfilename": each} for each in files]
            about = {"_id": "0", "id": name, "modelId": name, "sha": sha, "siblings": listed}
            return 200, {}, json.dumps(about).encode()
        if kind == "tree":
            return 200, {}, json.dumps([_entry(*item) for item in files.items()]).encode()
        file = unquote("/".join(rest))
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, b""
        data = files[file]
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        return 200, {"X-Repo-Commit": sha, "ETag": tag}, data

    def take(self, path: str, body: bytes, token: str) -> tuple[int, dict]:
        """Status and answer to what is posted: a new repository, or a commit to one."""
        if self.down or not token:
            return (503 if self.down else 401), {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            known = name in self.repositories
            self.repositories.setdefault(name, Repository())
            self.created.setdefault(name, asked.get("visibility") == "private")
            return (409 if known else 200), {"url": f"{self.url}/{name}"}
        name, kind = "/".join(path.split("/")[3:5]), path.split("/")[5]
        if kind == "preupload":
            named = [each["path"] for each in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": each} | modes for each in named]}
        lines = map(json.loads, body.splitlines())
        sent = [line["value"] for line in lines if line["key"] == "file"]
        files = {each["path"]: base64.b64decode(each["content"]) for each in sent}
        sha = self.repositories[name].commit(files)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha}


def _entry(path: str, data: bytes) -> dict[str, object]:
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = urlsplit(self.path).path
            status, headers, data = hub.answer(path)
            if "/resolve/" in path and status == 200 and self.command == "GET":
                owner, name, _, _, *rest = path.removeprefix("/").split("/")
                hub.sent.append((f"{owner}/{name}", unquote("/".join(rest))))
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "")
            status, answer = hub.take(urlsplit(self.path).path, body, token)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_client_at(hub: Hub, cache: Path, monkeypatch) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE do to a client that is not imported yet."""
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
