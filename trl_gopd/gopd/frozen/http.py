"""
A client for JSON over HTTP that trusts no server: an answer has a deadline as a whole and a largest size, what is lost
or refused for the moment is asked for again, redirects are not followed, and secrets show in no message.
"""

import asyncio
import email.utils
import ipaddress
import json
import logging
import os
import random
import ssl
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from .address import REDACTED, Address, is_url, redacted


logger = logging.getLogger(__name__)

T = TypeVar("T")

CONCURRENT_REQUESTS = 4  # TRL's default: the server has the next rows at hand while it answers
CONNECT_SECONDS = 10.0  # after which a server that does not even take the call counts as unreachable
REPEATED = (429, 500, 502, 503, 504)  # answers that may be others a little later
FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0  # seconds before a request is repeated, doubled each time
SHOWN_BYTES = 500  # of an answer, in messages
DIGITS = 9  # of a number of seconds that a server may ask for


@dataclass(frozen=True)
class ClientOptions:
    """
    How servers are asked.

    Args:
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds within which an answer has to be there as a whole.
        patience (`float`, *optional*, defaults to `600.0`):
            Seconds for which a request is repeated while the server cannot be reached or is not able to answer it.
        api_key_variable (`str`, *optional*, defaults to `"GOPD_SERVED_API_KEY"`):
            Environment variable with the key that is sent to every server whose address has no user.
        ca_bundle (`str`, *optional*):
            File or folder with the certificates of those who may sign that of a server. By default the usual ones.
        client_certificate (`str`, *optional*):
            PEM file with the certificate and the key by which servers know this client.
        verify (`bool`, *optional*, defaults to `True`):
            Whether the certificates of servers are checked.
    """

    timeout: float = 600.0
    patience: float = 600.0
    api_key_variable: str = "GOPD_SERVED_API_KEY"
    ca_bundle: str | None = None
    client_certificate: str | None = None
    verify: bool = True


class WrongAnswer(ValueError):
    """What is wrong with an answer, as the end of a sentence that begins with the server's address."""


@dataclass(frozen=True)
class Exchange(Generic[T]):
    """
    A request, and what is wanted of the answer to it.

    Args:
        path (`str`):
            Below the server's address.
        payload (`dict[str, Any]`, *optional*):
            What is sent as JSON; `None` for a request without content.
        max_bytes (`int`):
            Largest answer that is accepted.
        read (`Callable`):
            Turns the answer, any value of JSON, into what is returned, or raises [`WrongAnswer`].
        advice (`str`, *optional*):
            Added to messages on answers that are errors or wrong.
    """

    path: str
    payload: dict[str, Any] | None
    max_bytes: int
    read: Callable[[Any], T]
    advice: str = ""


class _Unavailable(Exception):
    """The server could not be reached, or could not answer for the moment."""

    def __init__(self, reason: str, *, is_lost: bool, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.is_lost, self.retry_after = is_lost, retry_after


class JsonClient:
    """
    Asks one server.

    Args:
        address ([`Address`]):
            The server.
        options ([`ClientOptions`]):
            How it is asked.

    Attributes:
        greeting ([`Exchange`], *optional*):
            What a server is asked first when it is back after it could not be reached: it may be another one now.

    Raises:
        `ValueError`: If a certificate, the key or the proxy of the environment cannot be used.
    """

    def __init__(self, address: Address, options: ClientOptions) -> None:
        self.address, self.options = address, options
        self.greeting: Exchange[Any] | None = None
        key = "" if address.user is not None else os.environ.get(options.api_key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"The environment variable `{options.api_key_variable}` must hold a key of printable ASCII "
                "characters. Set it again, or unset it."
            )
        self._authorization = f"Bearer {key}" if key else address.authorization
        self._secrets = sorted(address.secrets() | ({key} - {""}), key=len, reverse=True)
        if self._authorization is not None and not (address.is_encrypted or _is_this_machine(address)):
            logger.warning(
                "The key or password for %s is sent without encryption. Use https, or a tunnel.", address.server
            )
        self._tls, self._proxy = _tls_context(options), _proxy(address)
        # Global random numbers belong to training, and ranks that began with one seed must not wait in step.
        self._random = random.Random()

    def ask(self, exchanges: Sequence[Exchange[T]], *, patience: float | None = None) -> list[T]:
        """
        What is read of the answers, in the order of the requests, of which a few are under way at a time.

        Args:
            exchanges (`Sequence[Exchange]`):
                The requests.
            patience (`float`, *optional*):
                Instead of that of the options.

        Raises:
            `ConnectionError`: If the server cannot be reached for that long.
            `TimeoutError`: If an answer is not there in time.
            `RuntimeError`: If an answer is an error, or a wrong one.
        """
        return _run(self._ask_all(exchanges, self.options.patience if patience is None else patience))

    async def _ask_all(self, exchanges: Sequence[Exchange[T]], patience: float) -> list[T]:
        free = asyncio.Semaphore(CONCURRENT_REQUESTS)

        async def ask(exchange: Exchange[T]) -> T:
            async with free:
                return await self._ask(transport, exchange, patience)

        # Without the client around it, which writes whole addresses to the log.
        async with httpx2.AsyncHTTPTransport(verify=self._tls, proxy=self._proxy) as transport:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(ask(exchange)) for exchange in exchanges]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, transport: httpx2.AsyncHTTPTransport, exchange: Exchange[T], patience: float) -> T:
        """Asks until there is an answer, or patience is at its end."""
        attempts, is_lost, first_failure = 0, False, 0.0
        while True:
            attempts += 1
            try:
                if is_lost and self.greeting is not None:
                    await self._attempt(transport, self.greeting)
                return await self._attempt(transport, exchange)
            except _Unavailable as error:
                now = time.monotonic()
                first_failure = first_failure or now
                backoff = min(FIRST_DELAY * 2 ** min(attempts - 1, 16), LONGEST_DELAY)
                delay = max(error.retry_after, backoff * self._random.uniform(0.5, 1))
                if now - first_failure + delay > patience:
                    raise self._given_up(error, exchange, attempts, now - first_failure) from None
                is_lost = is_lost or error.is_lost
                logger.warning("%s %s, trying again in %.1f seconds.", self.address.server, error, delay)
            await asyncio.sleep(delay)

    def _given_up(self, error: _Unavailable, exchange: Exchange[Any], attempts: int, seconds: float) -> Exception:
        asked = f"after {attempts} attempts in {seconds:.0f} seconds"
        if error.retry_after:
            asked += f", and asks to wait for {error.retry_after:.0f} more"
        if error.is_lost:
            return ConnectionError(
                f"{self.address.server} {error} {asked}. Check that the server runs (`vllm serve MODEL`), its host "
                "and port, and that this machine may reach it; `served_teacher_patience` is how long it is waited for."
            )
        return RuntimeError(
            f"{self.address.server} {error} {asked}. Look at the log of the server; `served_teacher_patience` is how "
            f"long it is waited for. {exchange.advice}".rstrip()
        )

    async def _attempt(self, transport: httpx2.AsyncHTTPTransport, exchange: Exchange[T]) -> T:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._authorization is not None:
            headers["Authorization"] = self._authorization
        content = None if exchange.payload is None else json.dumps(exchange.payload).encode()
        if content is not None:
            headers["Content-Type"] = "application/json"
        request = httpx2.Request(
            "GET" if content is None else "POST",
            self.address.url(exchange.path),
            headers=headers,
            content=content,
            extensions={"timeout": {"connect": min(CONNECT_SECONDS, self.options.timeout / 2)}},
        )
        try:
            async with asyncio.timeout(self.options.timeout):  # of everything, however the bytes are spread
                response = await transport.handle_async_request(request)
                try:
                    body = await self._body(response, exchange)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise TimeoutError(
                f"{self.address.server}{exchange.path} did not answer in {self.options.timeout} seconds. Look whether "
                "the server is overloaded, or raise `served_teacher_timeout`."
            ) from None
        except (httpx2.TransportError, OSError) as error:
            # Of the chain of errors only the text is kept, since what a server sent may be in it.
            if _has_tls_error(error):
                raise ConnectionError(
                    f"{self.address.server} cannot be spoken to over TLS: {self._clean(error)}. If its certificate is "
                    "signed by an authority of your own, name that in `served_teacher_ca_bundle`."
                ) from None
            reason = self._clean(str(error) or type(error).__name__)
            raise _Unavailable(f"cannot be reached ({reason})", is_lost=True) from None
        # Elsewhere, since a long answer would keep the others from being received in time.
        return await asyncio.to_thread(self._read, body, exchange)

    async def _body(self, response: httpx2.Response, exchange: Exchange[Any]) -> bytes:
        """The content of an answer without errors."""
        status, where = response.status_code, f"{self.address.server}{exchange.path}"
        if status != 200:
            said = self._clean((await _received(response, SHOWN_BYTES))[:SHOWN_BYTES].decode(errors="replace"))
            if status in REPEATED:
                seconds = _seconds(response.headers.get("Retry-After", ""))
                raise _Unavailable(f"answered HTTP {status}: {said}", is_lost=False, retry_after=seconds)
            if 300 <= status < 400:
                target = response.headers.get("Location", "")
                to = redacted(target) if is_url(target) else "another path"
                raise RuntimeError(
                    f"{where} answered HTTP {status}, a redirect to {to}, which is not followed: completions and keys "
                    "would go there. Give the address that answers."
                )
            raise RuntimeError(f"{where} answered HTTP {status}: {said} {exchange.advice}".rstrip())
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise RuntimeError(f"{where} answered in the encoding {self._clean(encoding)!r}, which was not asked for.")
        body = await _received(response, exchange.max_bytes)
        if len(body) > exchange.max_bytes:
            raise RuntimeError(
                f"{where} answered with more than {exchange.max_bytes:,} bytes, the most that an answer to this "
                f"request can have. {exchange.advice}".rstrip()
            )
        return body

    def _read(self, body: bytes, exchange: Exchange[T]) -> T:
        text = body.decode(errors="replace")
        try:
            try:
                answer = json.loads(text)
            except (ValueError, RecursionError) as error:
                shown = text[:SHOWN_BYTES]
                raise WrongAnswer(f"answered {exchange.path} with what is no JSON ({error}): {shown}") from None
            return exchange.read(answer)
        except WrongAnswer as error:
            message = f"{self.address.server} {self._clean(error)}. {exchange.advice}".rstrip()
            raise RuntimeError(message) from None

    def _clean(self, text: object) -> str:
        """A text without the secrets of this client, which a server may repeat."""
        cleaned = str(text)
        for secret in self._secrets:
            cleaned = cleaned.replace(secret, REDACTED)
        return cleaned


async def _received(response: httpx2.Response, limit: int) -> bytes:
    """The content of an answer, or its beginning, which is longer than `limit`."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > limit:
            break
    return bytes(body)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. It runs in another thread: this one may have an event loop already, as in a notebook."""
    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(work)
        with ThreadPoolExecutor(1) as pool:
            try:
                return pool.submit(loop.run_until_complete, task).result()
            except BaseException:
                loop.call_soon_threadsafe(task.cancel)  # this thread may have been interrupted while it waited
                raise
    finally:
        loop.close()


def _seconds(given: str) -> float:
    """How long a server asks to wait, in its header `Retry-After`: a number of seconds, or a date."""
    if given.isascii() and given.isdecimal() and len(given) <= DIGITS:
        return float(given)
    try:
        return max(email.utils.parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _has_tls_error(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_this_machine(address: Address) -> bool:
    host = urlsplit(address.origin).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _proxy(address: Address) -> httpx2.Proxy | None:
    """The proxy that the environment names for a server."""
    parts = urlsplit(address.origin)
    url = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    if url is None:
        return None
    try:
        return httpx2.Proxy(url if "://" in url else f"http://{url}")
    except (ValueError, httpx2.InvalidURL):
        # which is not shown, since it may contain a password
        raise ValueError(
            f"The environment variable `{parts.scheme}_proxy` must be the address of a proxy, such as "
            f"http://host:3128. Correct or unset it, or add {parts.hostname} to `no_proxy`."
        ) from None


def _tls_context(options: ClientOptions) -> ssl.SSLContext:
    bundle, certificate = options.ca_bundle, options.client_certificate
    if bundle is None:
        context = httpx2.create_ssl_context(verify=options.verify)
    else:
        try:
            is_folder = Path(bundle).is_dir()
            context = ssl.create_default_context(
                cafile=None if is_folder else bundle, capath=bundle if is_folder else None
            )
        except OSError as error:  # `ssl.SSLError` is one, too
            raise ValueError(
                f"`served_teacher_ca_bundle` must be a file or folder of PEM certificates, got {bundle}: {error}."
            ) from error
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, password="")
        except OSError as error:
            raise ValueError(
                "`served_teacher_client_certificate` must be a PEM file with a certificate and its key, which is not "
                f"encrypted, got {certificate}: {error}."
            ) from error
    return context
