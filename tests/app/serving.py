"""``dmm serve`` in a process of its own."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager


@contextmanager
def served(*arguments, scratch=None):
    """The server's process and port, once it answers; it is terminated after the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dmm", "serve", *map(str, arguments), "--port", str(port)]
    environment = {**os.environ, **({} if scratch is None else {"TMPDIR": str(scratch)})}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            assert server.stdout.readline() == f"Open http://127.0.0.1:{port}/\n"
            yield server, port
        finally:
            server.terminate()
            server.wait(60)
