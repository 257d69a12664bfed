"""The server, whatever it is sent; where Gradio is there."""

import http.client
import json
import os
import random
import socket
import time

import pytest
from serving import served

pytest.importorskip("gradio", reason="the page needs Gradio")
pytestmark = pytest.mark.slow  # a server to be started: a quarter of a minute

NUM_REQUESTS = int(os.environ.get("DMM_REQUESTS", "200"))
PATHS = (
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/file=/etc/passwd", "/gradio_api/info",
    "/gradio_api/proxy=http://127.0.0.1:1/", "/%2e%2e/%2e%2e/etc/passwd", "/static/../../../etc/passwd", "/docs",
    "/gradio_api/stream/a/b", "/gradio_api/component_server", "/nothing", "/gradio_api/heartbeat", "/theme.css",
)  # fmt: skip
JUNK = (
    None, True, -1, 1e308, "a", "../../etc/passwd", 0.5, 3000.0, [], {"path": "/etc/passwd"}, [None, "b"],
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"path": "/etc/passwd", "url": "file:///etc/passwd"},
)  # fmt: skip


def ask(port, method, path, body=None, kind="application/json"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, b"" if "heartbeat" in path else answer.read()
    finally:
        connection.close()


def random_request(source, functions, i):
    kind = source.randrange(4)
    if kind == 0:
        return "GET", source.choice(PATHS)
    if kind == 1:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../%d.png"\r\n\r\n' % i
        body = head + source.randbytes(source.randrange(2000)) + b"\r\n--x--\r\n"
        return "POST", "/gradio_api/upload", body[: source.choice([50, None])], "multipart/form-data; boundary=x"
    if kind == 2:
        method, path = source.choice(["PUT", "POST", "DELETE"]), source.choice(["/", "/login", "/gradio_api/cancel"])
        return method, path, source.randbytes(source.randrange(500))
    one = source.choice(functions)
    data = [source.choice(JUNK) for _ in one["inputs"]][: source.choice([3, None])]
    path = source.choice(["/gradio_api/queue/join", "/gradio_api/run/predict"])
    return "POST", path, json.dumps({"fn_index": one["id"], "data": data, "session_hash": f"s{i % 20}"})


def resident(process):
    with open(f"/proc/{process.pid}/status") as status:  # noqa: PTH123
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


def test_whatever_is_sent_nothing_is_told_and_nothing_is_left(merged, tmp_path):
    source = random.Random(0)
    with served(merged, scratch=tmp_path) as (server, port):
        functions = json.loads(ask(port, "GET", "/config")[1])["dependencies"]
        before = None
        for i in range(NUM_REQUESTS):
            _, body = ask(port, *random_request(source, functions, i))
            for secret in (b"Traceback", b"root:x:", b"site-packages", str(merged).encode()):
                assert secret not in body
            if i == NUM_REQUESTS // 4:
                before = resident(server)
        assert resident(server) < before + 64
        assert ask(port, "GET", "/")[0] == 200

        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {10**9}\r\n"
            connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())
            assert b" 413 " in connection.recv(200).splitlines()[0]
        started = time.monotonic()
        server.terminate()
        assert server.wait(60) == 0
        assert time.monotonic() - started < 30
    assert not list(tmp_path.glob("dmm-serve-*"))


def test_others_are_asked_who_they_are(merged, tmp_path):
    with served(merged, "--auth", "anna:secret", scratch=tmp_path) as (_, port):
        assert ask(port, "GET", "/config")[0] == 401
        assert ask(port, "POST", "/gradio_api/upload", b"--x--", "multipart/form-data; boundary=x")[0] == 401
        form = "application/x-www-form-urlencoded"
        assert ask(port, "POST", "/login", "username=anna&password=wrong", form)[0] == 400
        assert ask(port, "POST", "/login", "username=anna&password=secret", form)[0] == 200
