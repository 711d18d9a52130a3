"""
A client that trusts no server: what is not there in time, too long, or wrong ends in one error; what is lost or
refused for the moment is asked for again; keys and certificates are used, and never shown.
"""

import asyncio
import json
import logging
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from email.utils import formatdate

import pytest

from tests.gopd import stub_server as stub
from tests.gopd.stub_server import late_server, stub_server
from trl_gopd.gopd.frozen import http
from trl_gopd.gopd.frozen.address import Address
from trl_gopd.gopd.frozen.http import ClientOptions, Exchange, JsonClient, WrongAnswer


# The client's own work: a connection to this machine and a few bytes. Only what hangs takes as long as ten times that.
SLACK = 5.0


@pytest.fixture
def server():
    with stub_server() as server:
        yield server


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(http, "FIRST_DELAY", 0.02)
    for name in ("GOPD_SERVED_API_KEY", "MY_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def request(max_bytes=10_000, read=lambda answer: answer, prompts=1):
    payload = {"model": "served", "prompt": [[1, 2, 3]] * prompts, "prompt_logprobs": 1}
    return Exchange("/v1/completions", payload, max_bytes, read, "Ask for help.")


def client(url, **options):
    return JsonClient(Address.parse(url), ClientOptions(**{"timeout": 5.0, "patience": 0.0, **options}))


def ask(server, *, max_bytes=10_000, **options):
    return client(server.url, **options).ask([request(max_bytes)])[0]


class TestAnswers:
    def test_in_the_order_of_the_requests(self, server):
        counts = [3, 1, 4, 1, 5, 9, 2, 6]
        answers = client(server.url).ask([request(prompts=count) for count in counts])
        assert [len(answer["choices"]) for answer in answers] == counts

    def test_no_more_than_a_few_at_a_time(self, server):
        busy, most, lock = set(), [], threading.Lock()

        def slow(handler, body):
            with lock:
                busy.add(handler)
                most.append(len(busy))
            time.sleep(0.05)
            with lock:
                busy.discard(handler)
            stub.fine(handler, body)

        server.always = slow
        client(server.url).ask([request()] * 12)
        assert 1 < max(most) <= http.CONCURRENT_REQUESTS

    def test_within_an_event_loop(self, server):
        """As in a notebook."""

        async def caller():
            return ask(server)

        assert asyncio.run(caller())["choices"]

    def test_what_is_read_of_them(self, server):
        exchanges = [request(read=lambda answer: len(answer["choices"]), prompts=2)]
        assert client(server.url).ask(exchanges) == [2]

    def test_wrong_ones(self, server):
        def read(answer):
            raise WrongAnswer("answered nonsense")

        with pytest.raises(RuntimeError, match=f"^{server.url} answered nonsense. Ask for help.$") as info:
            client(server.url).ask([request(read=read)])
        assert info.value.__cause__ is None

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[" * 5000, b'{"a":' * 1900, b"\xff\xfe", b"<html>", b"9" * 5000, b"\xef\xbb\xbf{}"]
    )
    def test_what_is_no_json(self, server, body):
        server.always = lambda handler, _: stub.fine(handler, body)
        with pytest.raises(RuntimeError, match="answered /v1/completions with what is no JSON .* Ask for help"):
            ask(server)

    def test_first_error_ends_all(self, server):
        server.script.extend([stub.status(404), stub.drip(1.0), stub.drip(1.0)])
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="HTTP 404: out of memory Ask for help"):
            client(server.url).ask([request()] * 3)
        assert time.monotonic() - start < SLACK


class TestDeadline:
    @pytest.mark.parametrize(
        "behave",
        [
            stub.drip(0.1),
            stub.raw(b"HTTP/1.1 200 OK\r\n", *[b"x"] * 99, pause=0.1),
            stub.raw(*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 99, pause=0.1),
            lambda handler, body: handler.server.released.wait(9),
        ],
        ids=["body", "headers", "informational", "silence"],
    )
    def test_is_that_of_the_whole_answer(self, server, behave):
        server.always = behave
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"{server.url}/v1/completions did not answer in 0.5 seconds.*timeout"):
            ask(server, timeout=0.5, patience=60.0)
        assert 0.5 <= time.monotonic() - start < SLACK

    def test_does_not_count_waiting_for_other_requests(self, server):
        server.always = lambda handler, body: (time.sleep(0.3), stub.fine(handler, body))
        assert len(client(server.url, timeout=1.0).ask([request()] * 20)) == 20  # five rounds of 0.3 seconds

    def test_interruption_does_not_wait_for_it(self, server):
        server.always = stub.drip(1.0)

        def interrupt(number, frame):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        start = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                ask(server, timeout=60.0)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - start < SLACK


class TestSize:
    def test_endless(self, server):
        server.always = stub.endless
        with pytest.raises(RuntimeError, match="answered with more than 10,000 bytes, the most that .* Ask for help"):
            ask(server)

    def test_is_exact(self, server):
        size = len(json.dumps(stub.proper(request().payload)).encode())
        assert ask(server, max_bytes=size)["choices"]
        with pytest.raises(RuntimeError, match=f"more than {size - 1:,} bytes"):
            ask(server, max_bytes=size - 1)

    def test_of_headers(self, server):
        server.always = stub.raw(b"HTTP/1.1 200 OK\r\nX: ", *[b"x" * 65536] * 99)
        with pytest.raises(ConnectionError, match="cannot be reached"):
            ask(server)

    def test_compressed(self, server):
        server.always = lambda handler, body: stub.head(handler, 200, {"Content-Encoding": "gzip"})
        with pytest.raises(RuntimeError, match="in the encoding 'gzip', which was not asked for"):
            ask(server)
        assert server.requests[0][1]["Accept-Encoding"] == "identity"

    def test_of_an_error(self, server):
        server.always = stub.status(400, text=b"x" * 10_000_000)
        with pytest.raises(RuntimeError, match="HTTP 400: x{500} Ask") as info:
            ask(server)
        assert len(str(info.value)) < 1000


class TestRepeating:
    @pytest.mark.parametrize(
        "behave",
        [stub.status(code) for code in (429, 500, 502, 503, 504)]
        + [stub.drop, stub.cut(0.5), stub.raw(b"HTTP/1.1 200 OK\r\nConte"), stub.raw(b"\x16\x03\x01 not HTTP")],
        ids=["429", "500", "502", "503", "504", "dropped", "half a body", "half a head", "another protocol"],
    )
    def test_what_may_be_otherwise_later(self, server, behave, caplog):
        server.script.extend([behave] * 3)
        with caplog.at_level(logging.WARNING, "trl_gopd"):
            assert ask(server, patience=30.0)["choices"]
        assert len(server.requests) == 4
        assert sum("trying again in" in text for text in caplog.messages) == 3

    @pytest.mark.parametrize("code", [400, 401, 403, 404, 405, 413, 422, 501, 204, 206])
    def test_what_stays_as_it_is(self, server, code):
        server.always = stub.status(code, text=b"" if code == 204 else b"no")
        with pytest.raises(RuntimeError, match=f"/v1/completions answered HTTP {code}: "):
            ask(server, patience=30.0)
        assert len(server.requests) == 1

    def test_ends(self, server):
        server.always = stub.status(503)
        with pytest.raises(RuntimeError, match=r"answered HTTP 503: out of memory after \d+ attempts in .*_patience"):
            ask(server, patience=0.3)
        assert 2 < len(server.requests) < 30

    def test_not_at_all(self, server):
        server.always = stub.status(503)
        with pytest.raises(RuntimeError, match="after 1 attempts in 0 seconds"):
            ask(server, patience=0.0)

    def test_pauses_grow_and_differ(self, server, monkeypatch):
        pauses = []

        async def sleep(seconds, result=None):
            pauses.append(seconds)

        monkeypatch.setattr(http, "FIRST_DELAY", 1.0)
        monkeypatch.setattr(http.asyncio, "sleep", sleep)
        server.script.extend([stub.status(503)] * 8)
        assert ask(server, patience=1000.0)["choices"]
        bounds = [1, 2, 4, 8, 16, 30, 30, 30]
        assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
        assert len(set(pauses)) == 8

    @pytest.mark.parametrize("given", ["1", "date"])
    def test_as_late_as_the_server_asks_for(self, server, given):
        # a date has no fractions of a second
        after = formatdate(time.time() + 2, usegmt=True) if given == "date" else given
        server.script.append(stub.status(429, {"Retry-After": after}))
        start = time.monotonic()
        assert ask(server, patience=30.0)["choices"]
        assert 0.9 <= time.monotonic() - start < SLACK

    def test_not_if_that_is_too_late(self, server):
        server.always = stub.status(429, {"Retry-After": "3600"})
        with pytest.raises(RuntimeError, match="HTTP 429: .* asks to wait for 3600 more"):
            ask(server, patience=30.0)

    @pytest.mark.parametrize("after", ["soon", "-5", "1e9", "nan", "9" * 400, "Mon, 99 Foo 2026", ""])
    def test_what_is_no_time(self, server, after):
        server.script.append(stub.status(429, {"Retry-After": after}))
        assert ask(server, patience=5.0)["choices"]

    def test_server_that_comes_back(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with late_server(port, 0.5):
            assert client(f"http://127.0.0.1:{port}", patience=30.0).ask([request()])[0]["choices"]

    def test_greets_a_server_that_was_lost(self, server):
        asked = []
        here = client(server.url, patience=30.0)
        here.greeting = Exchange("/v1/models", None, 10_000, asked.append)
        server.script.extend([stub.status(503), stub.drop])
        assert here.ask([request()])[0]["choices"]
        assert asked == [{"data": server.cards}]  # after the second failure
        assert [path for path, _, _ in server.requests][-2:] == ["/v1/models", "/v1/completions"]

    def test_leaves_random_numbers_alone(self, server):
        import random

        random.seed(0)
        want = random.random()
        random.seed(0)
        server.script.append(stub.status(503))
        ask(server, patience=5.0)
        assert random.random() == want


class TestRedirects:
    @pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
    def test_none_is_followed(self, server, code):
        with stub_server() as other:
            target = f"{other.url.replace('//', '//user:pa55word@')}/t0ken?key=s3cret"
            server.always = stub.status(code, {"Location": target})
            shown = (
                rf"HTTP {code}, a redirect to http://<redacted>@127.0.0.1:{other.server_port}/<redacted>, which is not"
            )
            with pytest.raises(RuntimeError, match=shown) as info:
                ask(server, patience=30.0)
            assert not other.requests and not any(word in str(info.value) for word in ("pa55word", "t0ken", "s3cret"))

    @pytest.mark.parametrize("target", ["/elsewhere/t0ken", "", "javascript:1", "//[broken"])
    def test_nor_shown_in_full(self, server, target):
        server.always = stub.status(302, {"Location": target})
        with pytest.raises(RuntimeError, match="a redirect to .*, which is not followed") as info:
            ask(server)
        assert "t0ken" not in str(info.value)


class TestKeys:
    @pytest.mark.parametrize("variable", ["GOPD_SERVED_API_KEY", "MY_KEY"])
    def test_come_from_the_environment(self, server, monkeypatch, variable):
        monkeypatch.setenv(variable, " sk-0123 \n")
        ask(server, api_key_variable=variable)
        assert server.requests[0][1]["Authorization"] == "Bearer sk-0123"

    def test_none(self, server):
        ask(server)
        assert "Authorization" not in server.requests[0][1]

    def test_user_of_the_address_goes_first(self, server, monkeypatch):
        monkeypatch.setenv("GOPD_SERVED_API_KEY", "sk-0123")
        client(server.url.replace("//", "//me:p%40ss@")).ask([request()])
        assert server.requests[0][1]["Authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss
        assert server.requests[0][1]["Host"] == server.url.removeprefix("http://")

    @pytest.mark.parametrize("key", ["sk-01\n23", "schlüssel", "sk-\x7f"])
    def test_that_cannot_be_sent(self, server, monkeypatch, key):
        monkeypatch.setenv("GOPD_SERVED_API_KEY", key)
        with pytest.raises(ValueError, match="`GOPD_SERVED_API_KEY` must hold a key of printable") as info:
            client(server.url)
        assert key not in str(info.value)

    @pytest.mark.parametrize(
        ("url", "warns"), [("http://10.0.0.1", 1), ("https://10.0.0.1", 0), ("http://localhost", 0)]
    )
    def test_in_the_clear_are_warned_of(self, monkeypatch, caplog, url, warns):
        monkeypatch.setenv("GOPD_SERVED_API_KEY", "sk-0123")
        client(url)
        assert sum("is sent without encryption" in text for text in caplog.messages) == warns

    def test_path_and_query_are_sent(self, server):
        client(server.url + "/t0ken/v1/?key=s3cret").ask([request()])
        assert server.requests[0][0] == "/t0ken/v1/completions?key=s3cret"

    @pytest.mark.parametrize(
        "behave",
        [
            lambda handler, body: stub.status(400, text=said(handler))(handler, body),
            lambda handler, body: stub.status(503, text=said(handler))(handler, body),
            lambda handler, body: stub.fine(handler, said(handler)),
            lambda handler, body: stub.raw(b"HTTP/9.9 " + said(handler) + b"\r\n\r\n")(handler, body),
            lambda handler, body: stub.head(handler, 302, {"Location": handler.path}),
            lambda handler, body: stub.head(handler, 200, {"Content-Encoding": said(handler).decode()}),
            stub.drop,
            stub.endless,
            stub.drip(0.2),
        ],
        ids=["error", "failure", "no JSON", "no HTTP", "redirect", "encoding", "dropped", "endless", "slow"],
    )
    def test_are_never_shown(self, server, monkeypatch, caplog, behave):
        """Not even if the server repeats them."""
        monkeypatch.setenv("GOPD_SERVED_API_KEY", "sk-k3y")
        server.always = behave
        for user in ("", "me:pa55word@"):
            url = server.url.replace("//", f"//{user}") + "/t0ken/v1?key=s3cret"
            with caplog.at_level(logging.DEBUG), pytest.raises((RuntimeError, OSError)) as info:
                client(url, timeout=0.5, patience=0.1).ask([request()])
            texts = [*caplog.messages, str(info.value), str(info.value.__cause__)]
            # What an upstream library logs for debugging shows what a server sent, as a message of ours never does.
            texts = [text for text in texts if not text.startswith(("receive_response", "response_closed"))]
            for word in ("sk-k3y", "pa55word", "t0ken", "s3cret", "bWU6cGE1NXdvcmQ="):  # the last is of me:pa55word
                assert not any(word in text for text in texts), word


def said(handler) -> bytes:
    """What a server was told, as an answer."""
    authorization = handler.headers["Authorization"]
    password = "pa55word" if authorization.startswith("Basic") else ""
    return f"{authorization} {handler.path} {password}".encode()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and a server's and a client's certificate that it has signed."""
    if shutil.which("openssl") is None:
        pytest.skip("Certificates are made by the program openssl, which is not there.")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    openssl("req", "-x509", *new, "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *new, "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.crt")
        both = (folder / f"{name}.crt").read_text() + (folder / f"{name}.key").read_text()
        (folder / f"{name}.pem").write_text(both)
    openssl("ec", "-in", "client.key", "-aes128", "-passout", "pass:word", "-out", "locked.key")
    (folder / "locked.pem").write_text((folder / "client.crt").read_text() + (folder / "locked.key").read_text())
    return folder


class TestTls:
    @pytest.fixture
    def served(self, server, certificates):
        def start(asks_for_client=False):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates / "server.pem")
            if asks_for_client:
                context.load_verify_locations(certificates / "ca.pem")
                context.verify_mode = ssl.CERT_REQUIRED
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            return server.url.replace("http:", "https:")

        return start

    def test_unknown_authority_is_refused(self, served):
        with pytest.raises(ConnectionError, match="cannot be spoken to over TLS: .*verify failed.*_ca_bundle"):
            client(served(), patience=30.0).ask([request()])

    def test_authority_by_name(self, served, certificates):
        assert client(served(), ca_bundle=str(certificates / "ca.pem")).ask([request()])[0]["choices"]

    def test_nothing_is_checked_if_told_so(self, served):
        assert client(served(), verify=False).ask([request()])[0]["choices"]

    def test_wrong_host_is_refused(self, served, certificates):
        url = served().replace("127.0.0.1", "localhost")
        with pytest.raises(ConnectionError, match="cannot be spoken to over TLS"):
            client(url, ca_bundle=str(certificates / "ca.pem")).ask([request()])

    def test_client_shows_its_certificate(self, served, certificates):
        url, authority = served(asks_for_client=True), str(certificates / "ca.pem")
        own = str(certificates / "client.pem")
        assert client(url, ca_bundle=authority, client_certificate=own).ask([request()])[0]["choices"]
        with pytest.raises(ConnectionError):
            client(url, ca_bundle=authority).ask([request()])

    @pytest.mark.parametrize("name", ["missing.pem", "names", "client.crt", "locked.pem"])
    def test_certificate_that_cannot_be_used(self, certificates, name):
        with pytest.raises(ValueError, match=f"`served_teacher_client_certificate` must be a PEM file .*{name}"):
            client("https://a", client_certificate=str(certificates / name))

    @pytest.mark.parametrize("name", ["missing.pem", "names"])
    def test_authority_that_cannot_be_used(self, certificates, name):
        with pytest.raises(ValueError, match=f"`served_teacher_ca_bundle` must be a file or folder .*{name}"):
            client("https://a", ca_bundle=str(certificates / name))


@pytest.mark.parametrize("proxy", ["pa55word:x", "ftp://me:pa55word@host", "http://pa55word:x"])
def test_proxy_that_is_none(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(
        ValueError, match="`http_proxy` must be the address of a proxy.* add teacher.invalid to"
    ) as info:
        client("http://teacher.invalid:8000")
    assert "pa55word" not in str(info.value)


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_proxy_of_the_environment(server, monkeypatch, scheme):
    monkeypatch.setenv("http_proxy", scheme + server.url.removeprefix("http://"))
    monkeypatch.setenv("no_proxy", "")
    assert client("http://teacher.invalid:8000").ask([request()])[0]["choices"]
    assert server.requests[0][0] == "http://teacher.invalid:8000/v1/completions"
    monkeypatch.setenv("no_proxy", "teacher.invalid")
    with pytest.raises(ConnectionError):
        client("http://teacher.invalid:8000").ask([request()])
