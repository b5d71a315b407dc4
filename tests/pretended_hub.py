"""A hub on this computer: it serves folders over HTTP as huggingface_hub asks for them, and keeps what is uploaded."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

COMMIT = "0123456789" * 4


def handler_of(models: dict[str, Path], refused: dict[str, tuple[int, str]], requests: list[str]):
    """Request handler for `models` (ORG/NAME → folder).

    `refused` names are answered with a status and an error code; of gated ones everybody sees the list of files.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0].strip("/").removeprefix("api/models/")
            name, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
            requests.append(self.path)
            status, code = refused.get(name, (200, ""))
            if status != 200 and (code != "GatedRepo" or rest[:1] == ["resolve"]):
                return self.reply(status, b"{}", X_Error_Code=code, X_Error_Message="refused")
            if name not in models:
                return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
            if rest[:1] == ["resolve"]:
                content = (models[name] / "/".join(rest[2:])).read_bytes()
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                return self.reply(200, content, ETag=etag, X_Repo_Commit=COMMIT)
            files = sorted(path for path in models[name].rglob("*") if path.is_file())
            listed = [(str(path.relative_to(models[name])), path.stat().st_size) for path in files]
            if rest[:1] == ["tree"]:
                tree = [{"type": "file", "path": path, "size": size, "oid": "0" * 40} for path, size in listed]
                return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path, _ in listed]}
            if rest[:1] == ["revision"] and rest[1:] not in (["main"], [COMMIT]):
                return self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
            return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")

        do_HEAD = do_GET

    return Handler


@contextmanager
def serve(models: dict[str, Path], refused: dict[str, tuple[int, str]] | None = None):
    """Yields (endpoint, list of requested paths) while the hub runs."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(models, refused or {}, requests))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Uploads:
    """Takes the place of the hub's client and keeps what is uploaded."""

    def __init__(self):
        self.created: list[tuple] = []
        self.commits: list[dict] = []

    def create_repo(self, repo_id, private=None, token=None, exist_ok=False):
        self.created.append((repo_id, private, token))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, **options):
        self.created.append(("branch", options["branch"]))

    def create_commit(self, repo_id, operations, **options):
        files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        self.commits.append({"repo_id": repo_id, "files": files, **options})
        return SimpleNamespace(commit_url="url")


@pytest.fixture
def uploads(monkeypatch) -> Uploads:
    hub_client = Uploads()
    import huggingface_hub
    import transformers

    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub_client)
    card = huggingface_hub.ModelCard("---\nlibrary_name: transformers\n---\n")
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **options: card)
    return hub_client
