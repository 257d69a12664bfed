"""Pictures that people send: small enough to be opened, and refused early where they are not."""

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from PIL import Image

from dmm.errors import UserError
from dmm.files.parameters import read_parameters

MAX_BYTES = 20 * 2**20
"""Of a request, whatever is in it."""
MAX_PIXELS = 4096 * 4096

Message = MutableMapping[str, Any]


def check_picture(path: Path) -> None:
    """Refuse a picture that would fill the memory, by its header alone.

    Raises: UserError: it is none, or has too many pixels.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError("What was sent is no picture that can be opened, or far too large a one.") from error
    if width * height > MAX_PIXELS:
        raise UserError(f"The picture has {width} x {height} pixels; at most {MAX_PIXELS:,} are opened. Shrink it.")


def read_sent_parameters(path: Path) -> dict[str, str]:
    """The ``parameters`` of a picture that was sent.

    Raises: UserError: it is none, or has none; the server's own path of it is nobody's business.
    """
    check_picture(path)
    try:
        return read_parameters(path)
    except UserError as error:
        raise UserError("The picture does not tell how it was made: it has no text chunk 'parameters'.") from error


class LimitedBody:
    """An ASGI application that refuses requests of more than :data:`MAX_BYTES`, before they are read where they say so.

    Args:
        app: that the others go to.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], max_bytes: int = MAX_BYTES) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > self._max_bytes:
            await self._refuse(send)
            return
        received, has_answered = 0, False

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:  # of a body that did not say how long it is: as if they had hung up
                return {"type": "http.disconnect"}
            return message

        async def answer(message: Message) -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        try:
            await self._app(scope, limited, answer)
        except Exception:
            if received <= self._max_bytes or has_answered:
                raise
            await self._refuse(send)

    async def _refuse(self, send: Callable[[Message], Awaitable[None]]) -> None:
        body = f"At most {self._max_bytes} bytes are read.".encode()
        headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
