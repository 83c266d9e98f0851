"""A small server that speaks Google Cloud Storage's JSON API, for tests.

  with FakeBucket() as bucket:
    os.environ |= bucket.environment
    …                                   # gs://bucket/… is bucket.objects
    bucket.fail("POST", "/0/host/", 503)

Enough of the API for gcsfs, google-cloud-storage and TensorStore: whole,
multipart, resumable and ranged transfers, listing, copying, deleting,
generations as preconditions, CRC-32C.
"""

import base64
import http.server
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field

import google_crc32c

NAME = "bucket"
PAGE = 50  # objects of a listing; small, so that listings have pages


@dataclass
class Fault:
  """What happens to requests that match.

  Args:
    method: as "POST"; "" = any. path: regular expression, in the unquoted path
      and query. how: an HTTP status, "hang", or "truncate".
    times: how often, then never again. skip: matching requests before.
  """

  method: str
  path: str
  how: int | str
  times: float = float("inf")
  skip: int = 0
  seen: int = 0


@dataclass
class Stored:
  data: bytes
  generation: int
  updated: str = field(
    default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z")
  )


class FakeBucket:
  """gs://bucket while the block runs; `objects` maps names to what is stored.

  `requests` holds (method, path) of all that was asked.
  """

  def __init__(self):
    self.objects: dict[str, Stored] = {}
    self.faults: list[Fault] = []
    self.requests: list[tuple[str, str]] = []
    self.lock = threading.RLock()
    self.uploads: dict[str, tuple[str, dict, bytearray]] = {}
    self._generation = 1

  def __enter__(self) -> "FakeBucket":
    handler = type("Handler", (_Handler,), {"bucket": self})
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    self._server.daemon_threads = True
    threading.Thread(
      target=self._server.serve_forever, args=(0.01,), daemon=True
    ).start()
    return self

  def __exit__(self, *exception) -> None:
    self._server.shutdown()
    self._server.server_close()

  @property
  def environment(self) -> dict[str, str]:
    """What makes the libraries of a process come here, without credentials."""
    url = f"http://127.0.0.1:{self._server.server_address[1]}"
    return {
      "STORAGE_EMULATOR_HOST": url,
      "TENSORSTORE_GCS_HTTP_URL": url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      "FSSPEC_GCS_TOKEN": "anon",
    }

  def fail(self, method: str, path: str, how, **more) -> Fault:
    fault = Fault(method, path, how, **more)
    self.faults.append(fault)
    return fault

  def put(self, name: str, data: bytes) -> Stored:
    with self.lock:
      self._generation += 1
      self.objects[name] = Stored(bytes(data), self._generation)
      return self.objects[name]

  def names(self, prefix: str = "") -> list[str]:
    with self.lock:
      return sorted(name for name in self.objects if name.startswith(prefix))

  def fault_of(self, method: str, path: str) -> Fault | None:
    with self.lock:
      self.requests.append((method, path))
      for fault in self.faults:
        if fault.method in ("", method) and re.search(fault.path, path):
          fault.seen += 1
          if fault.skip < fault.seen <= fault.skip + fault.times:
            return fault
    return None


def _crc32c(data: bytes) -> str:
  return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  wbufsize, disable_nagle_algorithm = -1, True  # or each answer takes 40 ms
  bucket: FakeBucket

  def log_message(self, *args):
    pass

  def handle(self):
    try:
      super().handle()
    except (ConnectionError, TimeoutError):
      pass  # the client died or lost patience

  # ----- answers

  def _answer(self, status: int, body: bytes = b"", **headers) -> None:
    self.send_response(status)
    headers.setdefault("Content_Type", "application/json")
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def _json(self, value, status: int = 200) -> None:
    self._answer(status, json.dumps(value).encode())

  def _error(self, status: int, said: str | None = None) -> None:
    usual = {403: "permission denied", 404: "No such object"}
    said = said or usual.get(status, f"answer {status}")
    self._json({"error": {"code": status, "message": said}}, status)

  def _metadata(self, name: str, stored: Stored) -> dict:
    return {
      "kind": "storage#object",
      "id": f"{NAME}/{name}/{stored.generation}",
      "name": name,
      "bucket": NAME,
      "generation": str(stored.generation),
      "metageneration": "1",
      "size": str(len(stored.data)),
      "crc32c": _crc32c(stored.data),
      "updated": stored.updated,
      "timeCreated": stored.updated,
      "contentType": "application/octet-stream",
      "etag": str(stored.generation),
      "mediaLink": f"/download/storage/v1/b/{NAME}/o/"
      + urllib.parse.quote(name, safe=""),
    }

  # ----- requests

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
      body = b""
      while size := int(self.rfile.readline().split(b";")[0], 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      return body
    return self.rfile.read(int(self.headers.get("Content-Length") or 0))

  def _serve(self) -> None:
    body = self._body()
    asked = urllib.parse.unquote(self.path)
    if "uploadType=multipart" in asked:  # the name is in the body
      asked += f"&name={json.loads(self._parts(body)[0])['name']}"
    fault = self.bucket.fault_of(self.command, asked)
    self._truncates = fault is not None and fault.how == "truncate"
    if fault is not None and fault.how == "hang":
      time.sleep(3600)
    if fault is not None and isinstance(fault.how, int):
      self._error(fault.how)
      return
    with self.bucket.lock:
      self._route(self.command, self.path, body)

  do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _serve

  def _route(self, method: str, target: str, body: bytes) -> None:
    url = urllib.parse.urlsplit(target)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    parts = url.path.removeprefix("/upload").removeprefix("/download")
    parts = parts.removeprefix("/storage/v1/b").strip("/").split("/")
    parts = [urllib.parse.unquote(part) for part in parts]
    if parts[0] != NAME:
      self._error(404, "The specified bucket does not exist.")
    elif len(parts) == 1:
      self._json({"kind": "storage#bucket", "id": NAME, "name": NAME})
    elif url.path.startswith("/upload"):
      self._upload(method, query, body)
    elif len(parts) == 2:
      self._list(query)
    elif len(parts) > 3:  # b/o/NAME/rewriteTo/b/BUCKET/o/NAME, or copyTo
      self._copy(parts[2], parts[3], parts[-1])
    else:
      self._object(method, parts[2], query)

  def _met(self, name: str, query: dict) -> bool:
    """Whether the preconditions hold; answers where they do not."""
    stored = self.bucket.objects.get(name)
    there = 0 if stored is None else stored.generation
    wanted, unwanted = (
      query.get(f"ifGeneration{how}Match") for how in ("", "Not")
    )
    if wanted is not None and int(wanted) != there:
      self._error(412)
    elif unwanted is not None and int(unwanted) == there:
      self._answer(304)
    else:
      return True
    return False

  def _object(self, method: str, name: str, query: dict) -> None:
    stored = self.bucket.objects.get(name)
    if stored is None:
      self._error(404)
    elif not self._met(name, query):
      pass
    elif method == "DELETE":
      del self.bucket.objects[name]
      self._answer(204)
    elif query.get("alt") == "media":
      self._send(stored)
    else:
      self._json(self._metadata(name, stored))

  def _send(self, stored: Stored) -> None:
    data, status, headers = stored.data, 200, {}
    if found := re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
      first, last = found.groups()
      if first:
        begin, end = int(first), int(last or len(data) - 1)
      else:
        begin, end = len(data) - int(last), len(data) - 1
      if begin >= len(data):
        self._error(416)
        return
      end = min(end, len(data) - 1)
      headers["Content_Range"] = f"bytes {begin}-{end}/{len(data)}"
      data, status = data[begin : end + 1], 206
    headers |= {
      "x_goog_generation": stored.generation,
      "x_goog_hash": f"crc32c={_crc32c(stored.data)}",
      "Content_Type": "application/octet-stream",
      "ETag": stored.generation,
    }
    if self._truncates:
      self.send_response(status)
      for key, value in headers.items():
        self.send_header(key.replace("_", "-"), str(value))
      self.send_header("Content-Length", str(len(data)))
      self.end_headers()
      self.wfile.write(data[: len(data) // 2])
      self.close_connection = True
      return
    self._answer(status, data, **headers)

  def _list(self, query: dict) -> None:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    after = query.get("pageToken", "")
    size = min(PAGE, int(query.get("maxResults") or PAGE))
    items, prefixes, token, last = [], [], None, ""
    for name in self.bucket.names(prefix):
      if name < query.get("startOffset", ""):
        continue
      if "endOffset" in query and name >= query["endOffset"]:
        continue
      folder = None
      if delimiter and delimiter in name[len(prefix) :]:
        cut = name.index(delimiter, len(prefix)) + len(delimiter)
        folder = name[:cut]
      shown = folder or name
      if shown <= after or shown in prefixes:
        continue
      if len(items) + len(prefixes) == size:
        token = last
        break
      last = shown
      if folder:
        prefixes.append(folder)
      else:
        items.append(self._metadata(name, self.bucket.objects[name]))
    page = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
    self._json(page | ({"nextPageToken": token} if token else {}))

  def _copy(self, name: str, how: str, target: str) -> None:
    stored = self.bucket.objects.get(name)
    if stored is None:
      self._error(404)
      return
    made = self._metadata(target, self.bucket.put(target, stored.data))
    size = str(len(stored.data))
    done = {"done": True, "totalBytesRewritten": size, "objectSize": size}
    self._json({**done, "resource": made} if how == "rewriteTo" else made)

  def _finish(self, name: str, query: dict, data: bytes) -> None:
    if self._met(name, query):
      self._json(self._metadata(name, self.bucket.put(name, data)))

  def _parts(self, body: bytes) -> tuple[bytes, bytes]:
    """What a multipart upload says of the object, and its bytes."""
    boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
    parts = body.split(b"--" + boundary[1].encode())[1:3]
    return tuple(
      re.split(rb"\r?\n\r?\n", re.sub(rb"\r?\n\Z", b"", part), maxsplit=1)[1]
      for part in parts
    )

  def _upload(self, method: str, query: dict, body: bytes) -> None:
    kind = query.get("uploadType")
    if "upload_id" in query:
      self._resumed(query["upload_id"], method, body)
    elif kind == "media":
      self._finish(query["name"], query, body)
    elif kind == "multipart":
      said, data = self._parts(body)
      self._finish(json.loads(said)["name"], query, data)
    else:
      name = query.get("name") or json.loads(body)["name"]
      upload = str(len(self.bucket.uploads))
      self.bucket.uploads[upload] = (name, query, bytearray())
      self._answer(
        200,
        b"{}",
        Location=f"http://{self.headers['Host']}/upload/storage/v1/b/{NAME}/o"
        f"?uploadType=resumable&upload_id={upload}",
      )

  def _resumed(self, upload: str, method: str, body: bytes) -> None:
    name, query, data = self.bucket.uploads[upload]
    if method == "DELETE":
      self._answer(499)
      return
    data += body
    total = self.headers.get("Content-Range", "").rpartition("/")[2]
    if total in ("", "*") or len(data) < int(total):
      self._answer(308, Range=f"bytes=0-{max(len(data) - 1, 0)}")
    else:
      self._finish(name, query, bytes(data))
