"""
Addresses of servers. User, password, path and query of one may be secrets, so only scheme, host, port and the name of
a model are ever shown or saved.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit


REDACTED = "<redacted>"
SHORTEST_SECRET = 4  # characters of a part of a path or query that is looked for in texts; shorter ones are words


def is_url(given: Any) -> bool:
    """Whether what the user gave as a model is the address of a server."""
    return isinstance(given, str) and given.lower().startswith(("http://", "https://"))


def redacted(given: Any) -> Any:
    """What may be shown and saved of what the user gave: an address without its secrets, also within a mapping."""
    if isinstance(given, Mapping):
        return {key: redacted(value) for key, value in given.items()}
    if not is_url(given):
        return given
    try:
        return str(Address.parse(given))
    except ValueError:
        return f"{given.partition(':')[0].lower()}://{REDACTED}"


@dataclass(frozen=True)
class Address:
    """
    The address of a server, of which `str` and `repr` show no secret.

    Args:
        origin (`str`):
            Scheme, host and port, such as `"http://localhost:8000"`.
        model (`str`):
            What stands after `#`: the name of one of several models, or nothing.
        path (`str`), query (`str`):
            What stands between the two, without the `/v1` at the end of a path. They may be empty.
        user (`str`, *optional*):
            User and password, joined by a colon.
    """

    origin: str
    model: str
    path: str = field(repr=False)
    query: str = field(repr=False)
    user: str | None = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> "Address":
        """
        The parts of an address.

        Raises:
            `ValueError`: If it is none. The message does not contain it.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port  # a port that is no number raises
        except ValueError:
            host, parts, port = None, urlsplit(""), None
        # A character of a password that should have been quoted ends the host too early.
        if not host or "@" in parts.path + parts.query + parts.fragment or not host.isprintable() or " " in host:
            raise ValueError(
                "it is no address of the form http://host:port#model. Quote special characters in it, `@` as %40, "
                "`#` as %23 and `/` as %2F."
            )
        if REDACTED in url:
            raise ValueError(
                "its secrets were left out when a configuration was saved. Give the whole address once more."
            )
        origin = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{'' if port is None else f':{port}'}"
        user = unquote(parts.netloc.rpartition("@")[0]) if "@" in parts.netloc else None
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(origin, unquote(parts.fragment), path, parts.query, user)

    def __str__(self) -> str:
        user = "" if self.user is None else f"{REDACTED}@"
        path = f"/{REDACTED}" if self.path or self.query else ""
        name = f"#{self.model}" if self.model else ""
        return self.origin.replace("://", f"://{user}") + path + name

    @property
    def server(self) -> str:
        """The address without the name of a model, as it may be shown."""
        return str(self).partition("#")[0]

    @property
    def authorization(self) -> str | None:
        """Header for user and password, if there are any."""
        return None if self.user is None else f"Basic {base64.b64encode(self.user.encode()).decode()}"

    @property
    def is_encrypted(self) -> bool:
        """Whether others on the way cannot read what is sent."""
        return self.origin.startswith("https:")

    def url(self, path: str) -> str:
        """Where to send a request for `path`, secrets included but for user and password."""
        return self.origin + self.path + path + (f"?{self.query}" if self.query else "")

    def secrets(self) -> set[str]:
        """Texts that may be shown nowhere."""
        parts = [self.path, self.query, *self.path.split("/"), *(value for _, value in parse_qsl(self.query))]
        found = {text for part in parts for text in (part, unquote(part)) if len(text) >= SHORTEST_SECRET}
        if self.user is not None:
            found |= {self.user, self.user.partition(":")[2], (self.authorization or "").removeprefix("Basic ")}
        return found - {""}
