"""Server-sent events, in and out: whatever the chunking, the same events."""

__all__ = ["KEEP_ALIVE", "Decoder", "TooLong", "encode"]

KEEP_ALIVE = b": keep-alive\n\n"


class TooLong(ValueError):
    """An event beyond the limit."""


def encode(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


class Decoder:
    """Bytes in any pieces to `data` payloads; LF, CRLF, comments, several data lines an event."""

    def __init__(self, limit: int = 16 * 2**20) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._limit = limit

    def feed(self, piece: bytes) -> list[bytes]:
        """Payloads that this piece completes.

        Raises:
            TooLong: an event outgrows the limit.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n") if self._rest else piece.split(b"\n")
        if len(self._rest) + sum(map(len, self._data)) > self._limit:
            raise TooLong(f"an event of more than {self._limit} bytes")
        out = []
        for line in lines:
            line = line.rstrip(b"\r")
            if not line:
                if self._data:
                    out.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return out
