"""A local server for the part of Google Cloud Storage's JSON API that gcsfs, tensorstore and Google's client use.

Objects are in memory. Every bucket can be read and written except "forbidden", which answers 403. `serve` starts the
server; the environment variables `Store.variables` make the libraries use it.
"""

import base64
import dataclasses
import datetime
import http.server
import json
import re
import threading
import urllib.parse
import zlib


@dataclasses.dataclass
class Blob:
    """An object; each new content is a new generation."""

    data: bytes
    generation: int


class Store(http.server.ThreadingHTTPServer):
    """The server; `blobs` maps (bucket, name) to objects, `url` is its address."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[tuple[str, str], Blob] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.lock, self.generation = threading.Lock(), 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.variables = {
            "STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "GOOGLE_CLOUD_PROJECT": "test", "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }  # fmt: skip

    def handle_error(self, request, client_address):
        """Ignores clients that close the connection early."""

    def names(self, bucket: str) -> list[str]:
        with self.lock:
            return sorted(name for owner, name in self.blobs if owner == bucket)

    def put(self, bucket: str, name: str, data: bytes) -> dict:
        with self.lock:
            self.generation += 1
            self.blobs[bucket, name] = Blob(bytes(data), self.generation)
            return describe(bucket, name, self.blobs[bucket, name])


def serve() -> Store:
    """Starts a store in threads of this process."""
    store = Store()
    threading.Thread(target=store.serve_forever, daemon=True).start()
    return store


def describe(bucket: str, name: str, blob: Blob) -> dict:
    crc = base64.b64encode(zlib.crc32(blob.data).to_bytes(4, "big")).decode()  # the real service uses CRC32C
    # The store has a clock of its own, which advances by one second with each object.
    updated = (datetime.datetime(2020, 1, 1) + datetime.timedelta(seconds=blob.generation)).isoformat() + ".000Z"
    return {
        "kind": "storage#object", "bucket": bucket, "name": name, "id": f"{bucket}/{name}/{blob.generation}",
        "size": str(len(blob.data)), "generation": str(blob.generation), "metageneration": "1", "etag": crc,
        "timeCreated": updated, "updated": updated,
    }  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # answers in one piece
    server: Store

    def log_message(self, *_):
        pass

    def handle_one(self):
        parsed = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(parsed.query))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = re.sub(r"^/(upload/|download/)?storage/v1", "", parsed.path)
        parts = re.fullmatch(r"/b/([^/]+)(?:/o(?:/(.*))?)?", path)
        if not parts:
            return self.answer(400 if path.startswith("/batch") else 404, {})
        bucket, name = parts[1], parts[2]
        if bucket == "forbidden":
            reason = f"the account does not have storage.objects.create access to {self.path}"
            return self.answer(403, {"error": {"code": 403, "message": reason}})
        if name is None:
            return self.folder(bucket, "/o" in path)
        return self.object(bucket, name)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_one

    def folder(self, bucket: str, objects: bool):
        if self.command == "POST":
            return self.upload(bucket)
        if self.command == "PUT":
            return self.resume()
        return self.list(bucket) if objects else self.answer(200, {"kind": "storage#bucket", "name": bucket})

    def object(self, bucket: str, quoted: str):
        if self.command == "POST":
            return self.move(bucket, quoted)
        name = urllib.parse.unquote(quoted)
        with self.server.lock:
            blob = self.server.blobs.get((bucket, name))
            if blob and not self.expected(blob.generation):
                return self.answer(412, {"error": {"code": 412, "message": "another generation"}})
            if blob and self.command == "DELETE":
                del self.server.blobs[bucket, name]
                return self.answer(204)
        if blob is None:
            return self.answer(404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})
        if self.query.get("alt") != "media":
            return self.answer(200, describe(bucket, name, blob))
        if self.query.get("ifGenerationNotMatch") == str(blob.generation):
            return self.answer(304)
        return self.content(blob)

    def content(self, blob: Blob):
        headers = {"x-goog-generation": str(blob.generation), "ETag": str(blob.generation)}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not span:
            return self.answer(200, blob.data, headers)
        size = len(blob.data)
        first = int(span[1]) if span[1] else max(0, size - int(span[2]))
        last = min(int(span[2]), size - 1) if span[1] and span[2] else size - 1
        if first >= size:
            return self.answer(416, {})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self.answer(206, blob.data[first : last + 1], headers)

    def expected(self, generation: int) -> bool:
        return self.query.get("ifGenerationMatch", str(generation)) == str(generation)

    def upload(self, bucket: str):
        if session := self.query.get("upload_id"):
            return self.resume(session)
        if self.query["uploadType"] == "resumable":
            name = self.query.get("name") or json.loads(self.body)["name"]
            with self.server.lock:
                self.server.generation += 1
                session = str(self.server.generation)
                self.server.uploads[session] = (bucket, name, bytearray())
            location = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={session}"
            return self.answer(200, {}, {"Location": location})
        name, data = self.query.get("name"), self.body
        if self.query["uploadType"] == "multipart":
            metadata, data = parts_of(self.body, self.headers["Content-Type"])
            name = json.loads(metadata)["name"]
        with self.server.lock:
            blob = self.server.blobs.get((bucket, name))
        if "ifGenerationMatch" in self.query and not self.expected(blob.generation if blob else 0):
            return self.answer(412, {"error": {"code": 412, "message": "another generation"}})
        return self.answer(200, self.server.put(bucket, name, data))

    def resume(self, session: str | None = None):
        bucket, name, data = self.server.uploads[session or self.query["upload_id"]]
        data += self.body
        whole = re.search(r"/(\d+)$", self.headers.get("Content-Range", ""))
        if whole and len(data) >= int(whole[1]):
            return self.answer(200, self.server.put(bucket, name, data))
        return self.answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})

    def move(self, bucket: str, quoted: str):
        source, verb, target = re.fullmatch(r"(.+)/(rewriteTo/b|copyTo/b|moveTo)/(.+)", quoted).groups()
        to_bucket, _, name = target.rpartition("/o/") if "/o/" in target else (bucket, "", target.removeprefix("o/"))
        with self.server.lock:
            blob = self.server.blobs.get((bucket, urllib.parse.unquote(source)))
        if blob is None:
            return self.answer(404, {"error": {"code": 404, "message": "No such object"}})
        copy = self.server.put(to_bucket, urllib.parse.unquote(name), blob.data)
        if verb == "moveTo":
            with self.server.lock:
                del self.server.blobs[bucket, urllib.parse.unquote(source)]
        return self.answer(200, {"done": True, "resource": copy} if verb.startswith("rewriteTo") else copy)

    def list(self, bucket: str):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset")
        items, prefixes = [], set()
        for name in self.server.names(bucket):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(describe(bucket, name, self.server.blobs[bucket, name]))
        return self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def answer(self, status: int, content: dict | bytes = b"", headers: dict[str, str] | None = None):
        data = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        kind = "application/json" if isinstance(content, dict) else "application/octet-stream"
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)


def parts_of(body: bytes, kind: str) -> list[bytes]:
    """Returns the contents of a multipart body; clients end lines with one or two characters."""
    boundary = b"--" + re.search(r"boundary=['\"]?([^'\";]+)", kind)[1].encode()
    line = b"\r\n" if boundary + b"\r\n" in body else b"\n"
    parts = body.rpartition(line + boundary + b"--")[0].split(boundary + line)[1:]
    return [part.split(line * 2, 1)[1] for part in [*(part.removesuffix(line) for part in parts[:-1]), parts[-1]]]
