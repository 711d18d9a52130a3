"""
Servers of frozen models that are dead, slow, lying, overloaded or restarted: scores are those that the server has, or
one error names it. No secret of its address is in any message.
"""

import json
import logging
import math
import random
import socket
import time
from contextlib import contextmanager

import torch
from hypothesis import strategies as st

from tests.faults.harness import Ending, Trial, fuzzed, scenario
from tests.gopd import stub_server as stub
from tests.gopd.stub_server import late_server, logp, proper, stub_server
from trl_gopd.gopd.batch import Sequences
from trl_gopd.gopd.frozen import http
from trl_gopd.gopd.frozen.address import Address, redacted
from trl_gopd.gopd.frozen.answers import Asked, read_cards
from trl_gopd.gopd.frozen.http import ClientOptions, WrongAnswer
from trl_gopd.gopd.frozen.served import ServedScorer


SECRETS = ("us3r", "pa55word", "t0ken", "s3cret")
AT = "/t0ken?key=s3cret"
http.FIRST_DELAY = 0.01  # seconds; the length of pauses is no part of these scenarios
logging.getLogger("trl_gopd").addHandler(logging.NullHandler())


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def silent_about_secrets(errors: list[BaseException]):
    """Checks that no secret was logged in the body, or is in an error that it has appended."""
    said, root = Said(), logging.getLogger("trl_gopd")
    root.addHandler(said)
    try:
        yield
    finally:
        root.removeHandler(said)
    texts = [*said.messages, *(str(error) for error in errors), *(repr(error.__cause__) for error in errors)]
    assert not [text for text in texts if any(secret in text for secret in SECRETS)]


def url_of(server) -> str:
    return server.url.replace("//", "//us3r:pa55word@") + AT


def scorer(server, *, timeout=10.0, patience=0.0, top_k=1) -> ServedScorer:
    """A teacher on the stub. Where nothing is meant to be late, a loaded machine has ten seconds to answer."""
    return ServedScorer(
        url_of(server),
        temperature=1.0,
        role="teacher_model",
        batch_size=2,
        options=ClientOptions(timeout=timeout, patience=patience),
        top_k=top_k,
        num_ids=64,
    )


def rows(chance: random.Random) -> Sequences:
    """Five rows of random lengths, padded."""
    prompts, completions = ([chance.randint(1, 6) for _ in range(5)] for _ in range(2))
    width, length = max(prompts), max(completions)
    ids = torch.tensor([[chance.randrange(64) for _ in range(width + length)] for _ in range(5)])
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        mask[row, width - prompt : width + completion] = 1
    return Sequences.of(ids, mask, length)


def wanted(sequences: Sequences) -> torch.Tensor:
    """What the stub gives these rows."""
    result = torch.zeros(sequences.scored.shape)
    width = sequences.input_ids.size(1) - sequences.num_tokens
    for row, column in sequences.scored.nonzero().tolist():
        position = int(sequences.attention_mask[row, : width + column].sum())
        result[row, column] = logp(position, int(sequences.input_ids[row, width + column]))
    return result


def asked_again(trial: Trial, *behaviours, always=False, timeout=1.0, patience=5.0, error=(), match="") -> Ending:
    """Scores rows with a server that misbehaves: for so many requests, or for ever, which has to end in an error."""
    sequences, errors = rows(trial.random), []
    with stub_server() as server, silent_about_secrets(errors):
        teacher = scorer(server, timeout=timeout, patience=patience)
        if always:
            server.always = behaviours[0]
        else:
            server.script.extend(trial.random.sample(behaviours, len(behaviours)))
        start = time.monotonic()
        try:
            got = teacher.score(sequences)
        except error as raised:
            errors.append(raised)
            assert server.url.removeprefix("http://") in str(raised) and match in str(raised), raised
            assert time.monotonic() - start < timeout + patience + 2
            return Ending.REFUSED
        assert error == () and torch.equal(got, wanted(sequences))
        return Ending.RECOVERED


def lying(trial: Trial, spoil, match: str, *, top_k: int = 1) -> Ending:
    """Scores rows with a server of which one answer is not what was asked for."""

    def behave(handler, body: bytes) -> None:
        answer = json.loads(body)
        made = spoil(answer, trial.random)
        stub.fine(handler, made if isinstance(made, bytes) else json.dumps(answer if made is None else made).encode())

    sequences, errors = rows(trial.random), []
    with stub_server() as server, silent_about_secrets(errors):
        teacher = scorer(server, top_k=top_k)
        server.script.extend([stub.fine] * trial.random.randrange(3) + [behave])
        try:
            teacher.score(sequences) if top_k == 1 else teacher.score_top(sequences)
        except RuntimeError as raised:
            errors.append(raised)
            assert type(raised) is RuntimeError and match in str(raised), raised
            assert server.url.removeprefix("http://") in str(raised)
            return Ending.REFUSED
    raise AssertionError("A wrong answer was believed.")


def some_position(answer: dict, chance: random.Random) -> dict:
    """Entries by id of the last token of a text."""
    return chance.choice(answer["choices"])["prompt_logprobs"][-1]


# Servers that are away, slow or overloaded


@scenario("a server that nobody runs", area="servers", tries=20, short=2)
def dead(trial: Trial) -> Ending:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        try:
            ServedScorer(
                url,
                temperature=1.0,
                role="teacher_model",
                batch_size=2,
                options=ClientOptions(patience=trial.random.uniform(0, 0.3)),
            )
        except ConnectionError as error:
            assert url in str(error) and "cannot be reached" in str(error)
            return Ending.REFUSED
    raise AssertionError("Nobody was there.")


@scenario("a server that sends its answer byte by byte", area="servers", tries=20, short=1)
def slow(trial: Trial) -> Ending:
    pause = trial.random.uniform(0.05, 0.4)
    kinds = [stub.drip(pause), stub.raw(b"HTTP/1.1 200 OK\r\n", *[b"x"] * 999, pause=pause)]
    return asked_again(trial, trial.random.choice(kinds), always=True, error=TimeoutError, match="in 1.0 seconds")


@scenario("a server that takes the call and says nothing", area="servers", tries=20, short=1)
def silent(trial: Trial) -> Ending:
    def behave(handler, body: bytes) -> None:
        handler.wfile.write(body[: trial.random.choice([0, 1])])
        handler.server.released.wait(10)

    return asked_again(trial, behave, always=True, error=TimeoutError, match="did not answer")


@scenario("an answer that does not end", area="servers", tries=20, short=2)
def endless(trial: Trial) -> Ending:
    def declared(handler, body: bytes) -> None:
        stub.head(handler, 200, {"Content-Length": 10**15})
        handler.wfile.write(b" " * 10**7)

    behave = trial.random.choice([stub.endless, declared])
    return asked_again(trial, behave, always=True, timeout=10.0, error=RuntimeError, match="the most that an answer")


@scenario("headers of many megabytes", area="servers", tries=20, short=2)
def huge_headers(trial: Trial) -> Ending:
    line = b"X-%d: " % trial.random.randrange(10**6) + b"x" * trial.random.choice([100, 70_000, 10**6]) + b"\r\n"
    behave = stub.raw(b"HTTP/1.1 200 OK\r\n", *[line] * (20 * 10**6 // len(line)))
    return asked_again(trial, behave, always=True, patience=0.1, timeout=10.0, error=ConnectionError)


@scenario("HTTP 429, 500, 502, 503, 504 and dropped connections, then all is well", area="servers", tries=100, short=4)
def overloaded(trial: Trial) -> Ending:
    after = trial.random.choice([{}, {"Retry-After": "0"}, {"Retry-After": "soon"}, {"Retry-After": "-1"}])
    codes = trial.random.choices((429, 500, 502, 503, 504), k=3)
    behaviours = [stub.status(code, after) for code in codes]
    behaviours += trial.random.choices([stub.drop, stub.cut(trial.random.random()), stub.raw(b"HTTP/1.1 2")], k=2)
    return asked_again(trial, *behaviours)


@scenario("HTTP 429, 500, 502, 503 or 504 for ever", area="servers", tries=40, short=2)
def failing(trial: Trial) -> Ending:
    code = trial.random.choice((429, 500, 502, 503, 504))
    after = trial.random.choice([{}, {"Retry-After": "9999"}])
    return asked_again(
        trial,
        stub.status(code, after),
        always=True,
        patience=trial.random.uniform(0, 0.3),
        error=RuntimeError,
        match=f"HTTP {code}",
    )


@scenario("an answer that is cut off by the end of the connection", area="servers", tries=50, short=2)
def cut_off(trial: Trial) -> Ending:
    return asked_again(trial, *(stub.cut(trial.random.random()) for _ in range(trial.random.randint(1, 4))))


@scenario("a server that cuts every answer off", area="servers", tries=30, short=1)
def always_cut_off(trial: Trial) -> Ending:
    behave = stub.cut(trial.random.random())
    return asked_again(trial, behave, always=True, patience=0.2, error=ConnectionError, match="cannot be reached")


@scenario("a redirect to another host, or anywhere", area="servers", tries=30, short=2)
def redirected(trial: Trial) -> Ending:
    with stub_server() as other:
        code = trial.random.choice((301, 302, 303, 307, 308))
        target = trial.random.choice([other.url + AT, "/v1/s3cret", "//" + other.url[7:], "", "http://[", "\xff"])
        behave = stub.status(code, {"Location": target})
        ending = asked_again(trial, behave, always=True, error=RuntimeError, match="which is not followed")
        assert not other.requests
        return ending


@scenario("a server that refuses with the secrets in its answer", area="servers", tries=30, short=2)
def talkative(trial: Trial) -> Ending:
    code = trial.random.choice((400, 401, 403, 404, 429, 503))

    def behave(handler, body: bytes) -> None:
        text = f"{handler.path} pa55word us3r:pa55word {handler.headers['Authorization']}".encode()
        stub.status(code, text=text)(handler, body)

    return asked_again(trial, behave, always=True, patience=0.05, error=RuntimeError, match=f"HTTP {code}")


@scenario("a server that is ended and started again while it is asked", area="servers", tries=40, short=2)
def restarted(trial: Trial) -> Ending:
    sequences = rows(trial.random)
    with stub_server() as first:
        teacher = scorer(first, patience=20.0)
        port = first.server_port
        if trial.random.random() < 0.5:
            assert torch.equal(teacher.score(sequences), wanted(sequences))
    with late_server(port, trial.random.uniform(0, 0.5)):
        assert torch.equal(teacher.score(sequences), wanted(sequences))
    return Ending.RECOVERED


@scenario("a server that comes back with another model", area="servers", tries=30, short=1)
def exchanged(trial: Trial) -> Ending:
    card = {"id": "served", "root": "org/teacher", "max_model_len": 256}
    change = trial.random.choice([{"id": "other"}, {"root": "org/other"}, {"max_model_len": 17}, {"root": None}])
    errors: list[BaseException] = []
    with stub_server() as server, silent_about_secrets(errors):
        teacher = scorer(server, patience=20.0)
        server.script.append(stub.drop)
        server.cards = [card | change]
        try:
            teacher.score(rows(trial.random))
        except RuntimeError as raised:
            errors.append(raised)
            assert "has come back with the models" in str(raised)
            return Ending.REFUSED
    raise AssertionError("Another model was taken for the teacher.")


# Servers that lie


@scenario("an answer with too few or too many texts or tokens", area="servers", tries=60, short=2)
def miscounted(trial: Trial) -> Ending:
    def spoil(answer, chance):
        parts = chance.choice([answer["choices"], chance.choice(answer["choices"])["prompt_logprobs"]])
        parts.pop() if chance.random() < 0.5 else parts.append(parts[-1])

    return lying(trial, spoil, "answered")


@scenario(
    "an answer with NaN, infinity, +5 or no number among the log-probabilities", area="servers", tries=60, short=3
)
def no_numbers(trial: Trial) -> Ending:
    values = [math.nan, math.inf, -math.inf, 5.0, 0.01, -9999.0, None, True, "-1", [], {}, 10**400, -(10**400)]

    def spoil(answer, chance):
        entry = chance.choice(list(some_position(answer, chance).values()))
        entry["logprob"] = chance.choice(values)

    return lying(trial, spoil, "it must be finite and at most 0")


@scenario("an answer without the text's own ids", area="servers", tries=60, short=2)
def other_ids(trial: Trial) -> Ending:
    def spoil(answer, chance):
        entries = some_position(answer, chance)
        own = next(iter(entries))
        entry = entries.pop(own)
        if chance.random() < 0.8:
            entries[chance.choice(["0" + own, "-1", "", "x", "99", f"{own}.0", str(10**30)])] = entry

    return lying(trial, spoil, "answered row")


@scenario("an answer with fewer of the likeliest ids than asked for", area="servers", tries=60, short=2)
def few_ids(trial: Trial) -> Ending:
    def spoil(answer, chance):
        entries = some_position(answer, chance)
        others = list(entries)[1:]
        for key in chance.sample(others, 3):
            del entries[key]

    return lying(trial, spoil, "answered with", top_k=5)


@scenario("an answer of another model", area="servers", tries=20, short=1)
def other_model(trial: Trial) -> Ending:
    return lying(trial, lambda answer, chance: answer | {"model": "other"}, "instead of 'served'")


@scenario("an answer with an index twice, or none", area="servers", tries=40, short=1)
def indices(trial: Trial) -> Ending:
    def spoil(answer, chance):
        answer["choices"][-1]["index"] = chance.choice([len(answer["choices"]), -1, None, "0", 0.0, False, [], {}])
        if len(answer["choices"]) > 1 and chance.random() < 0.5:
            answer["choices"][-1]["index"] = 0

    return lying(trial, spoil, "indices")


@scenario("an answer that is no JSON, or deeply nested", area="servers", tries=60, short=2)
def no_json(trial: Trial) -> Ending:
    def spoil(answer, chance):
        whole = json.dumps(answer).encode()
        depth = chance.choice([500, 5_000, 30_000])
        return chance.choice(
            [
                whole[: chance.randrange(len(whole))],
                whole + b"}",
                b"[" * depth,
                b"[" * depth + b"]" * depth,
                b'{"choices":' * min(depth, 5_000),
                b'{"choices": [' + b"9" * 60_000 + b"]}",
                bytes(chance.randrange(256) for _ in range(300)),
            ]
        )

    return lying(trial, spoil, "answered /v1/completions with")


# Fuzzing


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
steps = st.lists(st.integers(0, 9), max_size=6)
changes = st.tuples(steps, values, st.booleans())
ASKED = Asked("served", [[5, 6, 7], [1, 2, 3, 4]], [1, 2], [0, 1], temperature=1.0, top=2, num_ids=10)


def changed(value, path: list[int], new, removes: bool):
    """A JSON value with the place that a path of numbers leads to replaced or removed."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    copy = value.copy()
    if len(path) == 1 and removes:
        del copy[key]
    else:
        copy[key] = changed(value[key], path[1:], new, removes)
    return copy


@fuzzed("answers with one place changed at random", changes, area="servers", tries=2500, short=60)
def answers(given, trial: Trial) -> Ending:
    path, new, removes = given
    right = proper(ASKED.payload)
    answer = changed(right, path, new, removes)
    try:
        got = ASKED.read(json.loads(json.dumps(answer)))
    except WrongAnswer as error:
        assert len(str(error)) < 1000
        return Ending.REFUSED
    # What is read can only be what a server may say: the wanted positions, with numbers that are log-probabilities.
    assert [len(row) for row in got] == [1, 2]
    assert all(7 in row[0] for row in got[:1]) and 3 in got[1][0] and 4 in got[1][1]
    assert all(-9999 < value < 1e-3 and 0 <= key < 10 for row in got for by in row for key, value in by.items())
    return Ending.INTACT


@fuzzed("answers of any JSON", values, area="servers", tries=1000, short=30)
def any_json(value, trial: Trial) -> Ending:
    text = json.dumps({"choices": value} if trial.number % 2 else value)
    for read in (ASKED.read, read_cards):
        try:
            read(json.loads(text))
        except WrongAnswer as error:
            assert len(str(error)) < 1000
    return Ending.REFUSED


@fuzzed(
    "lists of models with one place changed",
    st.tuples(steps, values, st.booleans()),
    area="servers",
    tries=500,
    short=20,
)
def cards(given, trial: Trial) -> Ending:
    right = {"data": [{"id": "served", "root": "org/teacher", "max_model_len": 256}, {"id": "other"}]}
    try:
        found = read_cards(json.loads(json.dumps(changed(right, *given))))
    except WrongAnswer:
        return Ending.REFUSED
    assert all(
        name and card.source and (card.max_length is None or card.max_length > 1) for name, card in found.items()
    )
    return Ending.INTACT


pieces = st.binary(max_size=60) | st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.0 503 no\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Encoding: gzip\r\n",
        b"Location: http://[\r\n",
        b"Retry-After: 9\r\n",
        b"\r\n",
        b'5\r\n{"a":\r\n',
        b"fffffffffff\r\n",
        b"0\r\n\r\n",
        b'{"choices": []}',
    ]
)


@fuzzed("what is sent instead of HTTP", st.lists(pieces, max_size=8), area="servers", tries=500, short=15)
def no_http(given, trial: Trial) -> Ending:
    sequences, errors = rows(trial.random), []
    with stub_server() as server, silent_about_secrets(errors):
        teacher = scorer(server)
        server.always = stub.raw(*given)
        try:
            teacher.score(sequences)
        except (RuntimeError, ConnectionError, TimeoutError) as raised:
            errors.append(raised)
            assert server.url.removeprefix("http://") in str(raised), raised
            return Ending.REFUSED
    raise AssertionError("There was no answer.")


texts = st.text(max_size=40) | st.from_regex(r"[a-z@:/?#\[\]%&=0-9]*", fullmatch=True)


@fuzzed("addresses of servers", texts, area="servers", tries=1000, short=40)
def addresses(text, trial: Trial) -> Ending:
    url = f"https://us3r:pa55word@host/t0ken?key=s3cret{text}" if trial.number % 2 else f"http://{text}"
    shown = redacted(url)
    if trial.number % 2:
        name = text.partition("#")[2]
        assert not any(secret in shown for secret in SECRETS if secret not in name)
    try:
        address = Address.parse(url)
    except ValueError as error:
        assert "pa55word" not in str(error)
        return Ending.REFUSED
    assert str(address) == shown
    return Ending.INTACT
