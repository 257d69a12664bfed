"""Serving a page: to whom, what may be sent, and nothing left behind."""

import os
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from PIL import Image

from dmm.app import markup
from dmm.app.uploads import MAX_BYTES, MAX_PIXELS, LimitedBody
from dmm.errors import UserError

MAX_WAITING = 16
"""Requests; more are told to come again."""


def serve(
    build: Callable[[], tuple[Any, Callable[[], None]]],
    *,
    host: str,
    port: int,
    auth: tuple[str, str] | None,
    told: Callable[[str], None],
) -> None:
    """Serve a page until the process is interrupted.

    Args:
        build: makes Gradio's ``Blocks``, and what ends all work that it has begun; Gradio is imported by then.
        auth: name and password, where they are asked for.
        told: is called with the page's address once it is there.
    Raises: UserError: Gradio is not installed, or the port is taken.
    """
    # what people send is kept in a folder that goes with the server; nothing else of Gradio's is written
    with tempfile.TemporaryDirectory(prefix="dmm-serve-") as scratch:
        os.environ |= {"GRADIO_TEMP_DIR": scratch, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            import gradio as gr
            from starlette.middleware import Middleware
        except ImportError as error:
            raise UserError(f"The page needs Gradio ({error}): pip install 'dmm[app]'.") from error
        # Pillow refuses what is more than twice as large, before it is unpacked
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
        blocks, end = build()
        blocks.queue(max_size=MAX_WAITING, api_open=False)
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                auth=auth,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,
                max_file_size=MAX_BYTES,
                footer_links=[],
                ssr_mode=False,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=markup.STYLE,
                app_kwargs={"middleware": [Middleware(LimitedBody)], "docs_url": None, "redoc_url": None},
            )
        except OSError as error:
            raise UserError(f"Port {port} of {host} cannot be served: {error}. Choose another --port.") from error
        told(str(address))
        try:
            threading.Event().wait()
        except KeyboardInterrupt:  # how a server is ended
            pass
        finally:
            end()
            blocks.close(verbose=False)
