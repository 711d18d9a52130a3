"""
Teachers and references behind a server: training with them is training with the same models here, and whatever else
than log-probabilities a server answers ends in one error.
"""

import json
import logging
import socket
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from accelerate import Accelerator

from tests.gopd.harness import assert_gradient, load, log_probs, logged, read
from tests.gopd.stub_server import drop, edited, late_server, stub_server
from tests.tiny import build_tokenizer
from trl_gopd.gopd.frozen import http, served
from trl_gopd.gopd.frozen.http import ClientOptions
from trl_gopd.gopd.frozen.local import LocalScorer
from trl_gopd.gopd.frozen.served import ServedScorer
from trl_gopd.gopd.schedules import LambdaSchedule
from trl_gopd.gopd.state import read_state, write_state


CLOSE = 1e-5  # float32 log-probabilities of magnitude below 16, summed in another order by a padded forward


class Server(ThreadingHTTPServer):
    """Answers as vLLM does, with the log-probabilities of a model. What is set on it goes wrong."""

    daemon_threads = True

    def __init__(self, model, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.names, self.root, self.max_model_len = model, ["served", "adapter"], root, 256
        self.tempers = False  # vLLM's do not
        self.edit = lambda choices: choices
        self.status, self.hangs, self.drops, self.most = 200, False, 0, None
        self.requests, self.released = [], threading.Event()
        self.prefix, self.heard = "", set()  # of paths, and headers that say who asks

    @property
    def error(self):
        return "out of memory" if self.most is None else f"prompt_logprobs must be at most {self.most}"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def choice(self, index, ids, payload):
        logits = self.model(torch.tensor([ids])).logits[0].float()
        logps = (logits / (payload["temperature"] if self.tempers else 1)).log_softmax(-1)
        positions = [None]
        for row, token in zip(logps, ids[1:], strict=False):
            shown = {token, *row.topk(payload["prompt_logprobs"]).indices.tolist()}
            positions.append({str(i): {"logprob": row[i].item(), "rank": 1, "decoded_token": "?"} for i in shown})
        return {"index": index, "text": "", "prompt_logprobs": positions}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": n, "root": self.server.root, "max_model_len": 256} for n in self.server.names]})

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(payload)
        self.server.heard.add(self.headers["Authorization"])
        path = self.path.partition("?")[0]
        assert path == self.server.prefix + "/v1/completions" and payload["max_tokens"] == 1
        if self.server.hangs:
            self.server.released.wait(10)
        if self.server.drops:
            self.server.drops -= 1
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.server.most and payload["prompt_logprobs"] > self.server.most:
            self.server.status = 400
        choices = [self.server.choice(i, ids, payload) for i, ids in enumerate(payload["prompt"])]
        self.answer({"choices": self.server.edit(choices[::-1])})  # told apart by their index

    def answer(self, body):
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(body if self.server.status == 200 else {"error": self.server.error}).encode())

    def log_message(self, *args):
        pass


@contextmanager
def running(model, root):
    server = Server(model, root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(models):
    with running(load(models / "teacher"), str(models / "teacher")) as server:
        yield server


@pytest.fixture
def another(models):
    with running(load(models / "base"), str(models / "base")) as server:
        yield server


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(http, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(served, "START_SECONDS", 0.03)


def scorer(server, **kwargs):
    client = {name: kwargs.pop(name) for name in ClientOptions.__annotations__ if name in kwargs}
    options = {"temperature": 1.0, "role": "teacher_model", "batch_size": 2, **kwargs}
    options["options"] = ClientOptions(**{"timeout": 30.0, "patience": 0.1, **client})
    return ServedScorer(server if isinstance(server, str) else server.url, **options)


@pytest.fixture
def batch(generator):
    """Five rows of prompts, padded left, and completions, padded right: the second one has no completion."""
    prompts, completions = torch.tensor([3, 5, 1, 4, 5]), torch.tensor([4, 0, 1, 7, 2])
    ids = torch.randint(16, 259, (5, 12), generator=generator)
    columns = torch.arange(12)
    seen = (columns >= 5 - prompts.unsqueeze(1)) & (columns < 5 + completions.unsqueeze(1))
    return ids, seen.long(), ids[:, 5:]


def same_training(make, first, second, **kwargs):
    one, two = (make(**given, **kwargs) for given in (first, second))
    one.train()
    two.train()
    assert one.losses and one.losses == pytest.approx(two.losses, rel=CLOSE, abs=CLOSE)
    for name, grad in one.grads.items():
        torch.testing.assert_close(two.grads[name], grad, rtol=1e-4, atol=CLOSE)
    return two


class TestTraining:
    def test_served_teacher_is_the_local_one(self, make, models, server):
        trainer = same_training(make, {"teacher_model": str(models / "teacher")}, {"teacher_model": server.url})
        assert isinstance(trainer.teachers[None], ServedScorer)
        assert all(request["prompt_logprobs"] == 1 for request in server.requests[1:])

    def test_served_reference_is_the_local_one(self, make, models, another):
        trainer = same_training(make, {"ref_model": str(models / "base")}, {"ref_model": another.url})
        assert isinstance(trainer.references[None], ServedScorer) and len(another.requests) > 1

    def test_one_of_several(self, make, models, server, prompts):
        rows = prompts.add_column("teacher_id", ["math", "code"] * 8)
        here = {"math": str(models / "teacher"), "code": str(models / "base")}
        same_training(
            make,
            {"teacher_model": here},
            {"teacher_model": {**here, "math": server.url}},
            train_dataset=rows,
        )
        asked = sum(len(request["prompt"]) for request in server.requests) - 1  # without the probe
        assert 0 < asked < 4

    def test_one_server_for_teacher_and_reference_is_asked_once_for_both(self, make, server):
        trainer = make(teacher_model=server.url, ref_model=server.url)
        assert trainer.teachers[None] is trainer.references[None]

    def test_temperature_that_the_server_honours(self, make, models, server):
        server.tempers = True
        same_training(make, {"teacher_model": str(models / "teacher")}, {"teacher_model": server.url}, temperature=0.7)
        assert {request["temperature"] for request in server.requests[2:]} == {0.7}  # after a probe at each

    def test_temperature_that_the_server_ignores(self, make, server):
        with pytest.raises(ValueError, match=r"`teacher_model` at .* ignores the temperature.*Use `temperature=1`"):
            make(teacher_model=server.url, temperature=0.7)

    @pytest.mark.parametrize("gopd_lambda", [1.0, 1.5])
    def test_all_ids_of_a_server_give_the_full_gradient(self, make, models, server, tokenizer, gopd_lambda):
        trainer = same_training(
            make,
            {"teacher_model": str(models / "teacher"), "gopd_estimator": "full"},
            {"teacher_model": server.url, "gopd_estimator": "stratified", "gopd_top_k": len(tokenizer)},
            gopd_lambda=gopd_lambda,
            ref_model=str(models / "base"),
        )
        assert logged(trainer, "gopd/top_k_coverage") == [pytest.approx(1)]
        assert not logged(trainer, "gopd/top_k_overlap")

    def test_its_likeliest_ids_and_the_sampled_one(self, make, models, server):
        """The coefficients of ∇ log π_v are π_v (A_v − b) inside S, and A_y − b for a sampled token outside."""
        trainer = make(teacher_model=server.url, gopd_estimator="stratified", gopd_top_k=3, gopd_lambda=1.0)
        trainer.train()
        inputs, student = trainer.seen, load(models / "student")
        log_s = log_probs(student, inputs)
        with torch.no_grad():
            log_t, own = log_probs(load(models / "teacher"), inputs), log_s.detach()
            stratum = torch.zeros_like(own, dtype=torch.bool).scatter(-1, log_t.topk(3).indices, True)
            rest_t, rest_s = (x.masked_fill(stratum, -torch.inf).logsumexp(-1, keepdim=True) for x in (log_t, own))
            sampled = torch.zeros_like(own).scatter(-1, inputs["completion_ids"].unsqueeze(-1), 1.0)
            weights = torch.where(stratum, own.exp(), sampled) * (log_t - own - (rest_t - rest_s))
        assert_gradient(trainer, student, -(weights * log_s).sum(-1))

    def test_several_servers(self, make, models, server, another, prompts):
        rows = prompts.add_column("teacher_id", ["math", "code"] * 8)
        here = {"math": str(models / "teacher"), "code": str(models / "base")}
        trainer = same_training(
            make,
            {"teacher_model": here, "gopd_estimator": "full"},
            {
                "teacher_model": {"math": server.url, "code": another.url},
                "gopd_estimator": "stratified",
                "gopd_top_k": server.model.config.vocab_size,
            },
            train_dataset=rows,
            gopd_lambda=1.0,
            log_completions=True,
        )
        assert {"gopd/math/reverse_kl", "gopd/code/reverse_kl"} <= trainer.state.log_history[0].keys()

    def test_a_server_with_fewer_ids_is_refused_at_the_start(self, make, server):
        server.most = 20
        with pytest.raises(RuntimeError, match="HTTP 400: .*at most 20.*`--max-logprobs`, 20 by default, has to be"):
            make(teacher_model=server.url, gopd_estimator="stratified")

    @pytest.mark.parametrize(
        ("estimator", "role"), [("full", "teacher_model"), ("full", "ref_model"), ("stratified", "ref_model")]
    )
    def test_what_no_server_can_tell_is_refused(self, make, estimator, role):
        with pytest.raises(ValueError, match=rf"'{estimator}'.* ids that http://nowhere cannot be asked for"):
            make(gopd_estimator=estimator, **{role: "http://nowhere"})

    def test_one_server_for_both_is_no_way_around(self, make, server):
        with pytest.raises(ValueError, match="cannot be asked for"):
            make(gopd_estimator="stratified", teacher_model=server.url, ref_model=server.url)

    def test_served_and_local_teachers_are_refused(self, make, models, prompts):
        with pytest.raises(ValueError, match="got teachers of both kinds. Serve all of them"):
            make(
                gopd_estimator="stratified",
                teacher_model={"math": "http://nowhere", "code": str(models / "base")},
                train_dataset=prompts.add_column("teacher_id", ["math", "code"] * 8),
            )

    @pytest.mark.parametrize("given", [{"revision": "v2"}, {"init_kwargs": {"dtype": "bfloat16"}}])
    def test_options_of_loading_are_refused(self, make, server, given):
        (name, value), *_ = given.items()
        with pytest.raises(ValueError, match=rf"teacher_model_{name}=.*{server.url}.*Drop them"):
            make(teacher_model=server.url, **{f"teacher_model_{name}": value})

    def test_another_tokenizer_is_refused(self, make, server, tmp_path):
        build_tokenizer(("<extra>",)).save_pretrained(tmp_path / "other")
        server.root = str(tmp_path / "other")
        with pytest.raises(ValueError, match="`teacher_model` .* has another tokenizer than the student: id 3"):
            make(teacher_model=server.url)

    def test_a_tokenizer_that_is_only_on_the_server_is_logged(self, make, server, caplog):
        server.root = "/on/the/server/alone"
        with caplog.at_level(logging.WARNING, "trl_gopd"):
            make(teacher_model=server.url)
        assert sum("tokenizer of `teacher_model` could not be compared" in text for text in caplog.messages) == 1

    def test_a_run_goes_on_at_another_address(self, tmp_path, server):
        models = {"teachers": {"": scorer(server).identity()}, "references": {}}
        write_state(tmp_path, models, LambdaSchedule())
        models["teachers"][""] |= {"url": "http://elsewhere:8000"}
        read_state(tmp_path, models, LambdaSchedule())
        models["teachers"][""] |= {"name": "another model"}
        with pytest.raises(ValueError, match="another model"):
            read_state(tmp_path, models, LambdaSchedule())


class TestScore:
    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_equals_the_model(self, server, batch, batch_size):
        ids, seen, completion_ids = batch
        got = scorer(server, batch_size=batch_size).score(read(*batch))
        local = LocalScorer(
            server.model,
            accelerator=Accelerator(cpu=True),
            temperature=1.0,
            role="teacher_model",
            batch_size=5,
            chunk_size=256,
        )
        want = local.score(read(*batch))
        is_scored = seen[:, 5:].bool()
        assert got.dtype == torch.float32 and got.shape == completion_ids.shape
        torch.testing.assert_close(got[is_scored], want[is_scored], rtol=0, atol=CLOSE)
        assert torch.equal(got[~is_scored], torch.zeros_like(got[~is_scored]))
        sizes = [len(request["prompt"]) for request in server.requests[1:]]
        assert sum(sizes) == 4 and max(sizes) <= batch_size  # the row without a completion is not sent

    def test_padding_is_never_sent(self, server, batch):
        ids, seen, completion_ids = batch
        teacher = scorer(server)
        want = teacher.score(read(*batch))
        hidden = ids.masked_fill(seen == 0, 100_000)
        assert torch.equal(teacher.score(read(hidden, seen, hidden[:, 5:])), want)

    @pytest.mark.parametrize("top_k", [1, 3, 40])
    def test_likeliest_ids_do_not_depend_on_the_sampled_one(self, server, batch, top_k):
        ids, seen, completion_ids = batch
        logps, top_ids, top_logps = scorer(server, top_k=top_k).score_top(read(*batch))
        torch.testing.assert_close(logps, scorer(server).score(read(*batch)), rtol=0, atol=CLOSE)
        assert top_ids.shape == top_logps.shape == (5, 7, top_k)
        is_scored = seen[:, 5:].bool()
        assert top_ids[~is_scored].eq(0).all() and top_logps[~is_scored].eq(0).all()
        for row, position in is_scored.nonzero().tolist():
            text = ids[row][seen[row].bool()][: int(seen[row, : 5 + position].sum())]
            want = server.model(text.unsqueeze(0)).logits[0, -1].float().log_softmax(-1).topk(top_k)
            order = top_logps[row, position].argsort(descending=True)
            assert top_ids[row, position][order].tolist() == want.indices.tolist()
            torch.testing.assert_close(top_logps[row, position][order], want.values, rtol=0, atol=CLOSE)

    def test_too_few_ids(self, server, batch):
        ids, seen, completion_ids = batch
        teacher, sent = scorer(server, top_k=3, batch_size=1), ids[0][seen[0].bool()]

        def two_ids(choices):
            answer = choices[0]["prompt_logprobs"]
            for position, token in enumerate(sent[1:].tolist(), start=1):
                other = next(key for key in answer[position] if key != str(token))
                answer[position] = {key: answer[position][key] for key in (str(token), other)}
            return choices

        server.edit = two_ids
        with pytest.raises(RuntimeError, match="answered with 1 ids instead of 3"):
            teacher.score_top(read(ids[:1], seen[:1], completion_ids[:1]))

    def test_nothing_to_score(self, server, batch):
        ids, seen, completion_ids = batch
        teacher = scorer(server)
        assert all(
            part.eq(0).all() for part in teacher.score_top(read(ids, seen * (torch.arange(12) < 5), completion_ids))
        )
        assert teacher.score(read(ids, seen * (torch.arange(12) < 5), completion_ids)).eq(0).all()
        assert teacher.score(read(ids[:0], seen[:0], completion_ids[:0])).shape == (0, 7)
        assert teacher.score(read(ids, seen, completion_ids[:, :0])).shape == (5, 0)
        assert len(server.requests) == 1

    def test_context_leaves_room_for_the_token_that_is_generated(self, server):
        assert scorer(server).context == 255


class TestModelName:
    @pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
    def test_the_first_model_by_default(self, server, ending):
        assert scorer(server.url + ending).model == "served"

    def test_another_model_by_name(self, server, batch):
        scorer(server.url + "#adapter").score(read(*batch))
        assert {request["model"] for request in server.requests} == {"adapter"}

    def test_a_model_that_is_not_there(self, server):
        with pytest.raises(ValueError, match=r"has the models \['served', 'adapter'\]. Put the name of one"):
            scorer(server.url + "#missing")


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.1, 0.95, 1.05, 4.0])
    def test_is_proved_or_refused(self, server, temperature):
        with pytest.raises(ValueError, match="ignores the temperature"):
            scorer(server, temperature=temperature)
        server.tempers = True
        scorer(server, temperature=temperature)

    def test_noise_is_no_proof(self, server, generator):
        """Numbers that differ because the server rounds differently each time are not tempered."""

        def noisy(choices):
            for choice in choices:
                for entries in choice["prompt_logprobs"][1:]:
                    for entry in entries.values():
                        entry["logprob"] = min(
                            entry["logprob"] + 0.02 * torch.randn((), generator=generator).item(), 0
                        )
            return choices

        server.edit = noisy
        with pytest.raises(ValueError, match="ignores the temperature"):
            scorer(server, temperature=0.9)
        server.tempers = True
        scorer(server, temperature=0.9)


def put(value):
    """Sets the log-probability of the row that ends with id 20 at its last position but one."""

    def edit(choices):
        for choice in choices:
            entries = choice["prompt_logprobs"][-1]
            if "20" in entries:
                for entry in choice["prompt_logprobs"][-2].values():
                    entry["logprob"] = value
        return choices

    return edit


def without_token(choices):
    for choice in choices:
        choice["prompt_logprobs"] = choice["prompt_logprobs"][:-1]
    return choices


def without_id(choices):
    for choice in choices:
        choice["prompt_logprobs"][-1] = {"258": {"logprob": -1.0}}
    return choices


def without_numbers(choices):
    for choice in choices:
        del choice["prompt_logprobs"]
    return choices


class TestFailures:
    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (float("nan"), "nan"),
            (None, "None"),
            (float("-inf"), "-inf"),
            (-9999.0, "-9999.0"),
            (float("inf"), "inf"),
            (0.5, "0.5"),
        ],
    )
    def test_what_is_no_log_probability(self, server, batch, value, shown):
        ids, seen, completion_ids = batch
        ids[ids == 20] = 21
        ids[3, 11] = 20  # seven tokens in the completion, in the third row that is sent
        teacher = scorer(server)
        server.edit = put(value)
        with pytest.raises(RuntimeError, match=rf"{server.url} answered row 3, position 5 .*{shown}.*at most 0"):
            teacher.score(read(ids, seen, completion_ids))

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (without_token, r"the 7 tokens of row 0 with 6, .* from position 3 on"),
            (without_numbers, r"the 7 tokens of row 0 with 0, .* from position 0 on"),
            (without_id, r"row 0, position 3 of the completion, with the log-probability None for id \d+"),
            (lambda choices: choices[1:], r"answered 2 sequences with 1"),
        ],
    )
    def test_too_little(self, server, batch, edit, message):
        ids, seen, completion_ids = batch
        teacher = scorer(server)
        server.edit = edit
        with pytest.raises(RuntimeError, match=f"{server.url} .*{message}.*has to be vLLM's"):
            teacher.score(read(ids[[0, 2]], seen[[0, 2]], completion_ids[[0, 2]]))

    def test_a_server_that_is_none_of_vllm(self, server):
        server.names = []
        with pytest.raises(ValueError, match=r"has the models \[\]"):
            scorer(server)
        server.edit = lambda choices: None
        server.names = ["served"]
        with pytest.raises(RuntimeError, match="without a list of `choices`: .*None.* has to be vLLM's"):
            scorer(server)

    def test_timeout(self, server, batch):
        teacher = scorer(server, timeout=0.3)
        server.hangs = True
        with pytest.raises(TimeoutError, match=rf"{server.url}.* in 0.3 seconds.*raise `served_teacher_timeout`"):
            teacher.score(read(*batch))

    def test_a_lost_connection_is_tried_again(self, server, batch, caplog):
        teacher = scorer(server, batch_size=5)
        want = teacher.score(read(*batch))
        server.drops = 2
        assert torch.equal(teacher.score(read(*batch)), want)
        assert sum("trying again" in text for text in caplog.messages) == 2
        server.drops = 1000
        with pytest.raises(ConnectionError, match=r"cannot be reached \(.*after \d+ attempts.*Check that the server"):
            teacher.score(read(*batch))

    def test_nobody_listens(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
            with pytest.raises(ConnectionError, match=f"{url} cannot be reached .*Check that the server runs"):
                scorer(url)


class TestRestarts:
    """A server that goes away and comes back while a run asks it."""

    @pytest.fixture
    def stub(self):
        with stub_server() as stub:
            yield stub

    def test_is_waited_for(self, batch):
        with stub_server() as first:
            teacher = scorer(first, patience=30.0)
            want = teacher.score(read(*batch))
            port = first.server_port
        with late_server(port, 0.3) as later:
            assert torch.equal(teacher.score(read(*batch)), want)
        assert later[0].requests[0][0] == "/v1/models"

    @pytest.mark.parametrize(
        "cards",
        [
            [],
            [{"id": "other", "root": "org/teacher", "max_model_len": 256}],
            [{"id": "served", "root": "org/other", "max_model_len": 256}],
            [{"id": "served", "root": "org/teacher", "max_model_len": 8}],
        ],
    )
    def test_with_another_model_is_refused(self, stub, batch, cards):
        teacher = scorer(stub, patience=30.0)
        stub.script.append(drop)
        stub.cards = cards
        with pytest.raises(
            RuntimeError, match=f"^{stub.url} was away and has come back with the models .*'served' as it"
        ):
            teacher.score(read(*batch))

    def test_an_answer_of_another_model_is_refused(self, stub, batch):
        teacher = scorer(stub)
        stub.always = edited(lambda answer: answer | {"model": "other"})
        with pytest.raises(RuntimeError, match="answered with the model 'other' instead of 'served'"):
            teacher.score(read(*batch))

    def test_another_name_of_the_model_is_not(self, stub, batch):
        stub.cards = [{"id": "served", "root": "org/teacher"}, {"id": "alias", "root": "org/teacher"}]
        teacher = scorer(stub.url + "#alias")
        stub.always = edited(lambda answer: answer | {"model": "served"})
        assert teacher.score(read(*batch)).isfinite().all()

    def test_training_goes_on(self, make, server):
        """The run after it is the one without."""
        server.root = "nowhere"
        plain = make(teacher_model=server.url, max_steps=2)
        plain.train()
        trainer = make(teacher_model=server.url, max_steps=2)
        server.drops = 2
        trainer.train()
        assert server.drops == 0 and trainer.losses == plain.losses


class TestSecrets:
    WORDS = ("us3r", "pa55word", "t0ken", "s3cret", "sk-k3y", "dXMzcjpwYTU1d29yZA==")  # the last is of us3r:pa55word

    @pytest.mark.parametrize("is_option", [True, False])
    def test_no_file_and_no_log_has_any(self, make, server, tmp_path, monkeypatch, caplog, capfd, is_option):
        monkeypatch.setenv("GOPD_SERVED_API_KEY", "sk-k3y")
        with_user = server.url.replace("//", "//us3r:pa55word@") + "/t0ken?key=s3cret"
        with_key = server.url + "/t0ken/v1/?key=s3cret"
        given = {"teacher_model_name_or_path": with_user, "ref_model_name_or_path": with_key} if is_option else {}
        models = {"teacher_model": None} if is_option else {"teacher_model": with_user, "ref_model": with_key}
        server.prefix = "/t0ken"
        server.drops = 1
        saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "log_completions": True}
        options = {"logprob_cache_dir": str(tmp_path / "cache"), "served_teacher_patience": 30.0, **given, **models}
        with caplog.at_level(logging.DEBUG):
            trainer = make(**saving, **options)
            trainer.train()
            trainer.save_model()
            trainer.create_model_card()
            print(trainer.args)
        assert server.heard == {"Basic dXMzcjpwYTU1d29yZA==", "Bearer sk-k3y"}
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        names = {path.name for path in files}
        wanted = {"training_args.bin", "gopd_state.json", "README.md", "teacher.sqlite3", "reference.sqlite3"}
        assert wanted <= names and "trainer_state.json" in names
        printed = capfd.readouterr()
        texts = {str(path): read_all(path) for path in files}
        texts |= {"logs": "\n".join(caplog.messages).encode(), "printed": (printed.out + printed.err).encode()}
        assert all(word.encode() not in text for word in self.WORDS for text in texts.values()), [
            (word, name) for name, text in texts.items() for word in self.WORDS if word.encode() in text
        ]
        assert any(server.url.removeprefix("http://").encode() in text for text in texts.values())

    def test_a_run_is_resumed_with_another_secret(self, make, server):
        server.prefix = "/t0ken"
        options = {"save_strategy": "steps", "save_steps": 1}
        make(teacher_model=server.url + "/t0ken", max_steps=1, **options).train()
        again = make(teacher_model=server.url + "/t0ken?key=an0ther", max_steps=2, **options)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 2

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("http://us3r:pa55word@", "The address of `teacher_model` cannot be used: it is no address of the form"),
            ("http://us3r:pa55word@host:t0ken", "it is no address of the form"),
            ("http://us3r:pa55/word@host", "it is no address of the form"),
            ("http://<redacted>@host", "its secrets were left out when a configuration was saved. Give the whole"),
        ],
    )
    def test_an_address_that_is_none(self, make, url, message):
        with pytest.raises(ValueError, match=message) as info:
            make(teacher_model=url)
        assert not any(word in str(info.value) for word in ("pa55", "word", "t0ken"))

    @pytest.mark.parametrize(
        "options",
        [
            {"gopd_estimator": "full"},
            {"gopd_estimator": "stratified"},
            {"ref_model_revision": "v2"},
        ],
    )
    def test_refused_options_do_not_show_it(self, make, server, options):
        url = server.url.replace("//", "//us3r:pa55word@") + "/t0ken?key=s3cret"
        with pytest.raises(ValueError, match=r"http://<redacted>@127.0.0.1:\d+/<redacted>") as info:
            make(ref_model=url, **options)
        assert not any(word in str(info.value) for word in self.WORDS)

    def test_what_is_not_finite_does_not_show_it(self):
        from trl_gopd.gopd.nonfinite import _label

        assert _label("teacher_model", None, "http://us3r:pa55word@host/t0ken") == (
            "`teacher_model` (http://<redacted>@host/<redacted>)"
        )


def read_all(path):
    """The content of a file, of archives that of their files."""
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content += b"".join(archive.read(name) for name in archive.namelist())
    return content


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_timeout_is_checked(make, seconds):
    with pytest.raises(ValueError, match=f"`served_teacher_timeout` must be positive and finite, got {seconds}. Use"):
        make(served_teacher_timeout=seconds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"served_teacher_patience": -1.0}, "`served_teacher_patience` must be finite and >= 0, got -1.0. Use 600"),
        ({"served_teacher_patience": float("nan")}, "got nan. Use 600"),
        (
            {"served_teacher_verify": False, "served_teacher_ca_bundle": "ca.pem"},
            "`served_teacher_ca_bundle='ca.pem'` has no meaning with `served_teacher_verify=False`",
        ),
    ],
)
def test_options_are_checked(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_key_in_the_place_of_its_variable_is_not_shown(make):
    with pytest.raises(ValueError, match="must be the name of an environment variable") as info:
        make(served_teacher_api_key_variable="sk-secret-value")
    assert "sk-secret-value" not in str(info.value)
