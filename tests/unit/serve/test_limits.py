"""What is let in: bodies, images, addresses. Bad input gets the right status, and nothing is fetched from inside."""

import asyncio
import base64
import io
import itertools
import json
import struct
import zlib

import httpx2
import pytest
from gateways import asking, rig
from PIL import Image

from mmroute.bench.upstream import Script
from mmroute.serve.limits import Fetcher, check_data_image, forbidden
from mmroute.serve.schema import ApiError, parse
from mmroute.serve.settings import Limits

KEEP = Script(rating="90\n")


def png(width=8, height=8):
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return data.getvalue()


def huge_png(width, height):
    """A header of so many pixels, and none of them."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def address(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def with_images(*urls):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": u}} for u in urls]}]


BAD = {
    "not JSON": (b"{", 400, "not JSON"),
    "a list": (b"[]", 400, "JSON object"),
    "deep": (b'{"model":"auto","messages":' + b"[" * 70 + b"]" * 70 + b"}", 400, "nested"),
    "very deep": (b"[" * 100_000, 400, ""),
    "no messages": ({"model": "auto"}, 400, "messages"),
    "too many messages": ({"model": "auto", "messages": [{"role": "user", "content": "x"}] * 600}, 400, "512"),
    "a message without a role": ({"model": "auto", "messages": [{"content": "x"}]}, 400, "role"),
    "content of a wrong kind": ({"model": "auto", "messages": [{"role": "user", "content": 3}]}, 400, "content"),
    "a part without a type": ({"model": "auto", "messages": [{"role": "user", "content": [{}]}]}, 400, "type"),
    "no model": ({"messages": asking("x")["messages"]}, 400, "model"),
    "an unknown model": ({**asking("x"), "model": "gpt-9"}, 404, "served: auto, draft, target, small, large"),
    "a wrong stream": ({**asking("x"), "stream": "yes"}, 400, "stream"),
    "no number": (b'{"model":"auto","messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400, "NaN"),
    "half a character": (b'{"model":"auto","messages":[{"role":"user","content":"\\ud83d"}]}', 400, "half a character"),
    "an infinite temperature": (
        b'{"model":"auto","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        400,
        "temperature is a number",
    ),
    "a wrong budget": ({**asking("x"), "mmroute": {"budget": 1.5}}, 400, "budget"),
    "a wrong option": ({**asking("x"), "mmroute": {"buget": 0.5}}, 400, "buget"),
    "a wrong force": ({**asking("x"), "mmroute": {"force": "both"}}, 400, "force"),
    "100 images": (
        {"model": "auto", "messages": with_images(*["data:image/png;base64,AA=="] * 100)},
        400,
        "100 images",
    ),
    "an image that is none": ({"model": "auto", "messages": with_images(address(b"hello"))}, 400, "cannot be read"),
    "an image of another kind": (
        {"model": "auto", "messages": with_images(address(b"BM" + b"\0" * 60))},
        400,
        "cannot be read",
    ),
    "an image that is no base64": (
        {"model": "auto", "messages": with_images("data:image/png;base64,$$")},
        400,
        "base64",
    ),
    "too many pixels": ({"model": "auto", "messages": with_images(address(huge_png(9000, 9000)))}, 413, "pixels"),
    "a bomb": ({"model": "auto", "messages": with_images(address(huge_png(90_000, 90_000)))}, 413, "pixels"),
    "too large an image": ({"model": "auto", "messages": with_images(address(b"\0" * 11 * 2**20))}, 413, "larger"),
    "a file": ({"model": "auto", "messages": with_images("file:///etc/passwd")}, 400, "http"),
    "loopback": ({"model": "auto", "messages": with_images("http://127.0.0.1/x.png")}, 400, "not a public"),
    "a decimal address": ({"model": "auto", "messages": with_images("http://2130706433/x.png")}, 400, "not a public"),
    "an octal address": ({"model": "auto", "messages": with_images("http://0177.0.0.1/x.png")}, 400, "not a public"),
    "a mapped address": ({"model": "auto", "messages": with_images("http://[::ffff:10.0.0.1]/x")}, 400, "not a public"),
    "metadata": ({"model": "auto", "messages": with_images("http://169.254.169.254/latest")}, 400, "not a public"),
    "a user name": ({"model": "auto", "messages": with_images("http://a@8.8.8.8/x")}, 400, "user name"),
}


def test_bad_input_gets_its_status_and_an_openai_envelope_and_reaches_no_model():
    async def run():
        async with rig(KEEP) as r:
            for name, (body, status, words) in BAD.items():
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                for path in ("/v1/chat/completions", "/v1/route"):
                    reply = await r.http.post(path, content=raw)
                    assert reply.status_code == status, (name, reply.text)
                    error = reply.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"}
                    assert words in error["message"], (name, error)
            for method, path, status in (("GET", "/v1/chat/completions", 405), ("POST", "/nowhere", 404)):
                reply = await r.http.request(method, path)
                assert (reply.status_code, set(reply.json())) == (status, {"error"})
            assert r.draft.counts.started == r.target.counts.started == 0
            good = await r.http.post("/v1/chat/completions", json=asking("?"))
            assert good.status_code == 200

    asyncio.run(run())


ODD = ("x", 5, -1, 1.5, True, [1], [None], {}, {"a": 1}, [{}], None)
READ = (
    *("n", "stop", "chat_template_kwargs", "stream_options", "stream", "tools", "functions", "response_format"),
    *("logprobs", "top_logprobs", "tool_choice", "logit_bias", "presence_penalty", "echo", "max_tokens"),
    *("max_completion_tokens", "min_tokens", "seed", "temperature", "top_p", "mmroute"),
)


def test_an_option_of_an_odd_kind_is_passed_on_or_refused_and_never_the_gateways_failure():
    async def run():
        async with rig(KEEP, circuit={"failures": 10**6, "window_calls": 10**6}) as r:
            for name, odd in itertools.product(READ, ODD):
                reply = await r.http.post("/v1/route", json=asking("?", **{name: odd}))
                said = reply.json().get("error") or {}
                assert said.get("code") != "internal", (name, odd)
                assert reply.status_code == 200 or set(said) == {"message", "type", "param", "code"}, (name, odd)
            assert (await r.http.post("/v1/chat/completions", json=asking("?", max_tokens=2.0))).status_code == 200

    asyncio.run(run())


def test_a_body_of_200_megabytes_is_refused_with_or_without_its_length():
    async def endless():
        for _ in range(200):
            yield b" " * 2**20

    async def run():
        async with rig(KEEP, timeouts={}) as r:
            for content in (endless(), b" " * (21 * 2**20)):
                reply = await r.http.post("/v1/chat/completions", content=content, timeout=60)
                assert reply.status_code == 413
                assert reply.json()["error"]["code"] == "body_too_large"

    asyncio.run(run())


@pytest.mark.parametrize(
    "inside",
    ["0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.1.1", "224.0.0.1",
     "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
     "64:ff9b::7f00:1", "2002:7f00:1::"],
)  # fmt: skip
def test_addresses_inside_are_forbidden(inside):
    assert forbidden(inside)


@pytest.mark.parametrize("outside", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111"])
def test_addresses_outside_are_not(outside):
    assert not forbidden(outside)


class Net:
    """A made internet: names, and what their hosts answer; remembers who was connected to."""

    def __init__(self, names, pages):
        self.names, self.pages, self.connected = names, pages, []

    async def resolve(self, host, port):
        found = self.names.get(host)
        if found is None:
            raise OSError("unknown")
        return [found.pop(0) if len(found) > 1 else found[0]]

    async def handle(self, request):
        self.connected.append(request.url.host)
        status, headers, body = self.pages[request.headers["host"] + request.url.path]

        async def pieces():
            yield body

        return httpx2.Response(status, headers=headers, content=pieces())

    def fetcher(self, domains=(), limits=None):
        transport = httpx2.MockTransport(self.handle)
        return Fetcher(limits or Limits(), domains, self.resolve, transport)


def test_an_image_is_fetched_once_from_the_address_that_was_checked():
    net = Net({"pics.example": ["8.8.8.8", "127.0.0.1"]}, {"pics.example/a.png": (200, {}, png())})
    url = asyncio.run(net.fetcher().fetch("http://pics.example/a.png"))
    assert url == address(png())
    assert net.connected == ["8.8.8.8"]  # the name was bound anew meanwhile, to no avail
    assert net.names == {"pics.example": ["127.0.0.1"]}


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        ({"a.example/x": (302, {"location": "http://inside.example/"}, b"")}, "not a public"),
        ({"a.example/x": (302, {"location": "file:///etc/passwd"}, b"")}, "http"),
        ({"a.example/x": (302, {"location": "/x"}, b"")}, "redirects more than"),
        ({"a.example/x": (200, {}, b"<html>")}, "cannot be read"),
        ({"a.example/x": (200, {}, b"\0" * 2000)}, "larger"),
        ({"a.example/x": (404, {}, b"")}, "404"),
    ],
)
def test_what_is_fetched_must_be_an_image_from_outside(pages, words):
    net = Net({"a.example": ["8.8.8.8"], "inside.example": ["10.0.0.7"]}, pages)
    with pytest.raises(ApiError, match=words):
        asyncio.run(net.fetcher(limits=Limits(image_bytes=1000)).fetch("http://a.example/x"))
    assert set(net.connected) == {"8.8.8.8"}


def test_media_domains_are_an_allow_list():
    net = Net({"a.example": ["8.8.8.8"], "notexample": ["8.8.8.8"]}, {"a.example/x": (200, {}, png())})
    assert asyncio.run(net.fetcher(("example",)).fetch("http://a.example/x"))
    with pytest.raises(ApiError, match="not allowed"):
        asyncio.run(net.fetcher(("example",)).fetch("http://notexample/x"))


def test_an_address_is_forwarded_fetched_or_refused_as_set():
    net = Net({"a.example": ["8.8.8.8"]}, {"a.example/x.png": (200, {}, png())})

    async def run():
        body = {"model": "auto", "messages": with_images("http://a.example/x.png")}
        body["messages"].append({"role": "user", "content": "?"})
        for how, sent in (("auto", "http://a.example/x.png"), ("fetch", address(png()))):
            async with rig(KEEP, fetcher=net.fetcher(), image_urls=how) as r:
                assert (await r.http.post("/v1/chat/completions", json=body)).status_code == 200
                assert r.draft.bodies[0]["messages"][0]["content"][0]["image_url"]["url"] == sent
        async with rig(KEEP, image_urls="refuse") as r:
            assert (await r.http.post("/v1/chat/completions", json=body)).status_code == 400

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_the_four_formats_are_taken(kind):
    data = io.BytesIO()
    Image.new("RGB", (5, 7)).save(data, kind)
    check_data_image(address(data.getvalue(), kind.lower()), Limits())


def test_the_pixel_limit_is_exact():
    check_data_image(address(png(10, 10)), Limits(image_pixels=100))
    with pytest.raises(ApiError, match="10 x 10"):
        check_data_image(address(png(10, 10)), Limits(image_pixels=99))


def test_parsing_keeps_what_it_does_not_know():
    body = {**asking("x"), "seed": 1, "weird": {"a": [1]}, "mmroute": {"budget": 0.2}}
    asked = parse(json.dumps(body).encode(), Limits(), ["small"])
    del body["mmroute"]
    assert asked.body == body
    assert asked.over.budget == 0.2
