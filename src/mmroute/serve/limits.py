"""What images are let in, and which addresses are never fetched from."""

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
import warnings
from collections.abc import Awaitable, Callable
from urllib.parse import urljoin, urlsplit

import httpx2 as httpx
from PIL import Image

from mmroute.serve.schema import ApiError
from mmroute.serve.settings import Limits

__all__ = ["FORMATS", "Fetcher", "check_data_image", "decode_data_image", "forbidden", "resolve"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_REDIRECTS, _FETCH_S = 3, 10
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
Resolver = Callable[[str, int], Awaitable[list[str]]]


def check_data_image(url: str, limits: Limits) -> None:
    """Whether a data address holds an image that is small enough; pixels are counted from the header, never decoded.

    Raises:
        ApiError: 400, or 413 for one that is too large.
    """
    check_image(decode_data_image(url, limits), limits)


def decode_data_image(url: str, limits: Limits) -> bytes:
    """The bytes behind `data:image/...;base64,...`."""
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64") or not head.startswith("data:image/"):
        raise ApiError(400, "a data image reads data:image/png;base64,...", param="image_url", code="invalid_image")
    if len(data) * 3 // 4 > limits.image_bytes + 3:
        raise ApiError(413, f"an image is larger than {limits.image_bytes} bytes", param="image_url")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"an image is not base64: {error}", param="image_url", code="invalid_image") from None


def check_image(data: bytes, limits: Limits) -> str:
    """The media type of an image in a format and of a size that is taken."""
    if len(data) > limits.image_bytes:
        raise ApiError(413, f"an image is larger than {limits.image_bytes} bytes", param="image_url")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        with opened:
            width, height = opened.size
            kind = Image.MIME[opened.format or ""]
    except Image.DecompressionBombError:
        raise ApiError(413, f"an image has more than {limits.image_pixels} pixels", param="image_url") from None
    except (OSError, SyntaxError, ValueError, KeyError):
        raise ApiError(
            400, "an image cannot be read; give a whole PNG, JPEG, WebP or GIF", param="image_url", code="invalid_image"
        ) from None
    if width * height > limits.image_pixels:
        raise ApiError(413, f"an image has {width} x {height} pixels; at most {limits.image_pixels}", param="image_url")
    return kind


def forbidden(address: str) -> bool:
    """Whether an IP address is one that no image comes from: private, loopback, link-local, metadata, reserved ...

    Example:
        >>> [forbidden(a) for a in ("93.184.216.34", "10.0.0.1", "169.254.169.254", "::ffff:127.0.0.1")]
        [False, True, True, True]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None and forbidden(str(inner)):
            return True
    return not ip.is_global or ip.is_multicast or ip.is_reserved


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name; the system's resolver also reads `2130706433` and `0177.0.0.1` as what they mean."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


class Fetcher:
    """Gets an image from the public internet, once, without being led inside.

    A name is resolved once and the connection goes to that very address, so a name that is bound anew between the check
    and the call gains nothing.
    """

    def __init__(
        self,
        limits: Limits,
        domains: tuple[str, ...] = (),
        resolver: Resolver = resolve,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.limits, self.domains, self.resolver = limits, domains, resolver
        # No connection is kept: it was opened for one name, and another name at the same address is another server.
        self._client = httpx.AsyncClient(
            transport=transport, timeout=_FETCH_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        )

    async def allowed(self, url: str) -> str:
        """An address of the host that may be connected to.

        Raises:
            ApiError: 400; which rule was broken, never what was found.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise ApiError(400, "an image address is not a URL", param="image_url") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ApiError(400, "an image is a data: or an http(s) address without a user name", param="image_url")
        host = parts.hostname.rstrip(".")
        if self.domains and not any(host == d or host.endswith("." + d) for d in self.domains):
            raise ApiError(400, f"images from {host} are not allowed here", param="image_url", code="image_forbidden")
        try:
            addresses = await self.resolver(host, port)
        except (OSError, UnicodeError):
            raise ApiError(400, f"the image's host {host} is unknown", param="image_url") from None
        if not addresses or any(forbidden(a) for a in addresses):
            raise ApiError(
                400, f"the image's host {host} is not a public one", param="image_url", code="image_forbidden"
            )
        return addresses[0]

    async def fetch(self, url: str) -> str:
        """The image as a data address.

        Raises:
            ApiError: not allowed, not an image, too large, too slow.
        """
        try:
            async with asyncio.timeout(_FETCH_S):
                data = await self._get(url)
        except (httpx.HTTPError, TimeoutError):
            raise ApiError(
                400, "an image address cannot be read", param="image_url", code="image_unreachable"
            ) from None
        kind = check_image(data, self.limits)
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    async def _get(self, url: str) -> bytes:
        for _ in range(_REDIRECTS + 1):
            address = await self.allowed(url)
            whole = httpx.URL(url)
            request = self._client.build_request(
                "GET",
                whole.copy_with(host=address),
                headers={"host": whole.netloc.decode(), "accept": "image/*", "accept-encoding": "identity"},
                extensions={"sni_hostname": whole.host},
            )
            reply = await self._client.send(request, stream=True)
            try:
                if reply.is_redirect:
                    url = urljoin(url, reply.headers.get("location", ""))
                    continue
                if reply.status_code != 200:
                    raise ApiError(400, f"an image address answered {reply.status_code}", param="image_url")
                data = b""
                async for piece in reply.aiter_raw():
                    data += piece
                    if len(data) > self.limits.image_bytes:
                        raise ApiError(
                            413, f"an image is larger than {self.limits.image_bytes} bytes", param="image_url"
                        )
                return data
            finally:
                await reply.aclose()
        raise ApiError(400, f"an image address redirects more than {_REDIRECTS} times", param="image_url")

    async def aclose(self) -> None:
        await self._client.aclose()
