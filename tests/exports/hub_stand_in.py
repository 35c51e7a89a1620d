"""A stand-in for the part of the hub's HTTP interface that uploads use: it keeps the commits that it is sent."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler


class Hub(BaseHTTPRequestHandler):
    """`server.commits` holds for each commit its header and its files; `server.refuses` is a status to answer with."""

    def do_GET(self):
        if self.server.refuses:
            return self._answer({"error": "Repository not found"}, 404)
        return self._answer({"sha": "0" * 40, "id": "me/tiny", "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            return self._answer({"error": "You are not allowed to do this"}, self.server.refuses)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            return self._answer({"url": f"http://{self.headers['Host']}/me/{asked['name']}", "name": "me/tiny"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            files = {
                line["value"]["path"]: hashlib.sha256(base64.b64decode(line["value"]["content"])).hexdigest()
                for line in lines
                if line["key"] == "file"
            }
            self.server.commits.append((header, files))
            url = f"http://{self.headers['Host']}/me/tiny/commit/{'1' * 40}"
            return self._answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        return self._answer({"type": "ok"})

    def log_message(self, *args):
        pass

    def _answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
