"""What is sent is small, or refused before it is read."""

import asyncio

import pytest
from PIL import Image

from dmm.app.uploads import MAX_PIXELS, LimitedBody, check_picture, read_sent_parameters
from dmm.errors import UserError


def answer_to(parts, headers=()):
    """What an application that reads all of a body answers through :class:`LimitedBody`, and how much it read."""
    read, sent, waiting = [], [], list(parts)

    async def app(scope, receive, send):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            read.append(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200})

    async def receive():
        part = waiting.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    asyncio.run(LimitedBody(app, max_bytes=10)({"type": "http", "headers": list(headers)}, receive, send))
    return sent[0]["status"], b"".join(read)


def test_a_body_that_fits_goes_through():
    assert answer_to([b"12345", b"67890"], [(b"content-length", b"10")]) == (200, b"1234567890")


def test_a_body_that_says_it_is_too_long_is_refused_unread():
    assert answer_to([b"1"], [(b"content-length", b"1000000000")]) == (413, b"")
    assert answer_to([b"1"], [(b"content-length", b"-5")]) == (413, b"")


def test_a_body_that_turns_out_too_long_is_read_no_further():
    assert answer_to([b"12345", b"67890", b"x", b"y"]) == (413, b"1234567890")


def test_pictures_are_judged_by_their_headers(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no picture"):
        check_picture(path)
    Image.new("1", (MAX_PIXELS // 4096 + 1, 4097)).save(path)
    with pytest.raises(UserError, match=r"4097 x 4097 pixels; at most 16,777,216"):
        check_picture(path)
    Image.new("1", (8, 8)).save(path)
    check_picture(path)
    with pytest.raises(UserError, match="no text chunk") as error:
        read_sent_parameters(path)
    assert str(tmp_path) not in str(error.value)
