"""What a server may answer is read as it is meant; anything else is one named error that says where it is."""

import json
import math

import pytest

from tests.gopd.stub_server import logp, proper
from trl_gopd.gopd.frozen.answers import Asked, answering_model, read_cards
from trl_gopd.gopd.frozen.http import WrongAnswer
from trl_gopd.gopd.frozen.protocols import ROUNDING


SEQUENCES = [[5, 6, 7], [1, 2, 3, 4]]


def asked(**kwargs):
    options = {"sequences": SEQUENCES, "counts": [1, 2], "rows": [4, 9], "temperature": 1.0, "top": 2, "num_ids": 10}
    return Asked("served", **{**options, **kwargs})


def at(answer, *path):
    for step in path:
        answer = answer[step]
    return answer


class TestAsked:
    @pytest.mark.parametrize("turned", [False, True])
    def test_positions_of_each_text(self, turned):
        answer = proper(asked().payload)
        if turned:
            answer["choices"].reverse()  # they are told apart by their index
        want = [
            [{7: logp(2, 7), 0: logp(2, 0), 1: logp(2, 1)}],
            [{i: logp(2, i) for i in (3, 0, 1)}, {i: logp(3, i) for i in (4, 0, 1)}],
        ]
        assert asked().read(answer) == want

    @pytest.mark.parametrize("value", [0, 0.0, -1, ROUNDING, -9998.5])
    def test_every_log_probability(self, value):
        answer = proper(asked().payload)
        answer["choices"][1]["prompt_logprobs"][3]["4"]["logprob"] = value
        assert asked().read(answer)[1][1][4] == value

    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            False,
            "-1.0",
            [-1.0],
            {},
            math.nan,
            math.inf,
            -math.inf,
            -9999.0,
            5,
            2 * ROUNDING,
            10**400,
            -(10**400),
        ],
    )
    def test_no_log_probability(self, value):
        answer = proper(asked().payload)
        answer["choices"][1]["prompt_logprobs"][3]["4"]["logprob"] = value
        message = "row 9, position 1 of the completion, with the log-probability .* for id 4; it must be finite and at"
        with pytest.raises(WrongAnswer, match=message):
            asked().read(answer)

    @pytest.mark.parametrize(
        "key", ["", "-1", "+3", "03", " 3", "3 ", "3_0", "٣", "³", "x", "1e3", "3.0", "10", "9" * 5000]
    )
    def test_no_id(self, key):
        answer = proper(asked().payload)
        entries = answer["choices"][1]["prompt_logprobs"][3]
        entries[key] = entries.pop("1")
        with pytest.raises(WrongAnswer, match="row 9, position 1 .* among the ids, which must be numbers below 10"):
            asked().read(answer)
        assert len(str(pytest.raises(WrongAnswer, asked().read, answer).value)) < 500

    @pytest.mark.parametrize("known", [None, 5])
    def test_ids_that_the_student_lacks(self, known):
        answer = proper(asked().payload)
        entries = answer["choices"][1]["prompt_logprobs"][3]
        entries["7"] = entries.pop("1")
        if known is None:
            assert asked(num_ids=None).read(answer)[1][1][7] == logp(3, 1)
        else:
            with pytest.raises(WrongAnswer, match="'7' among the ids, which must be numbers below 5"):
                asked(num_ids=5, sequences=[[1, 2, 3], [1, 2, 3, 4]]).read(answer)

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ((), [], r"without a list of `choices`: \[\]"),
            ((), None, "without a list of `choices`: None"),
            ((), 7, "without a list of `choices`: 7"),
            (("choices",), None, "without a list of `choices`: .*'choices': None"),
            (("choices",), {}, "without a list of `choices`"),
            (("choices",), [1, 2], "without a list of `choices`"),
            (("choices",), [], "answered 2 sequences with 0"),
            (("choices", 0), None, "without a list of `choices`"),
            (("choices", 0, "index"), 1, r"with the indices \[1, 1\]; each must be there once"),
            (("choices", 0, "index"), None, r"with the indices \[None, 1\]"),
            (("choices", 0, "index"), False, r"with the indices \[False, 1\]"),
            (("choices", 0, "index"), [], r"with the indices \[\[\], 1\]"),
            (("choices", 0, "index"), 2, r"with the indices \[2, 1\]"),
            (("choices", 0, "prompt_logprobs"), None, "the 3 tokens of row 4 with 0, .* from position 0 on"),
            (("choices", 0, "prompt_logprobs"), {}, "answered row 4 with {}; it must be a list with an entry a token"),
            (("choices", 0, "prompt_logprobs"), "abc", "answered row 4 with 'abc'; it must be a list"),
            (("choices", 0, "prompt_logprobs"), [None] * 2, "the 3 tokens of row 4 with 2, .* from position 0 on"),
            (("choices", 0, "prompt_logprobs"), [None] * 4, "the 3 tokens of row 4 with 4"),
            (("choices", 0, "prompt_logprobs", 2), None, "row 4, position 0 .* log-probability None for id 7"),
            (("choices", 0, "prompt_logprobs", 2), {}, "row 4, position 0 .* log-probability None for id 7"),
            (
                ("choices", 0, "prompt_logprobs", 2),
                [],
                "row 4, position 0 .* with .*; it must be an object of at most 3",
            ),
            (("choices", 0, "prompt_logprobs", 2), "7", "it must be an object of at most 3 ids"),
            (("choices", 0, "prompt_logprobs", 2, "7"), None, "row 4, position 0 .* log-probability None for id 7"),
            (("choices", 0, "prompt_logprobs", 2, "7"), -1.0, "log-probability None for id 7"),
            (("choices", 0, "prompt_logprobs", 2, "7"), {"logprobs": -1.0}, "log-probability None for id 7"),
            (("choices", 0, "prompt_logprobs", 2, "8"), {"logprob": -1.0}, "it must be an object of at most 3 ids"),
        ],
    )
    def test_malformed(self, path, value, message):
        answer = proper(asked().payload)
        if path:
            at(answer, *path[:-1])[path[-1]] = value
        else:
            answer = value
        with pytest.raises(WrongAnswer, match=message):
            asked().read(answer)

    def test_what_comes_before_the_completion_is_not_looked_at(self):
        answer = proper(asked().payload)
        answer["choices"][0]["prompt_logprobs"][1] = "anything"
        assert asked().read(answer) == asked().read(proper(asked().payload))

    def test_deeply_nested_values_are_shown_in_part(self):
        answer = []
        for _ in range(100_000):
            answer = [answer]
        with pytest.raises(WrongAnswer) as info:
            asked().read({"choices": answer})
        assert len(str(info.value)) < 500

    def test_broad_values_are_shown_in_part(self):
        value = {f"{i}": {f"{j}": ["x" * 50] * 9 for j in range(9)} for i in range(9)}
        with pytest.raises(WrongAnswer) as info:
            asked().read(value)
        assert len(str(info.value)) < 300

    def test_room_for_every_answer(self):
        """Long texts of tokens, and what else vLLM sends along."""
        answer = proper(asked().payload)
        text = "=" * 128
        for choice in answer["choices"]:
            choice |= {"prompt_token_ids": None, "finish_reason": "length", "stop_reason": None, "logprobs": None}
            for entries in choice["prompt_logprobs"][1:]:
                for entry in entries.values():
                    entry |= {"rank": 151_936, "decoded_token": text, "logprob": -12.345678901234567}
        assert len(json.dumps(answer)) < asked().max_bytes < 2**17


class TestCards:
    def test_names_sources_and_lengths(self):
        data = [{"id": "a", "root": "org/a", "max_model_len": 8, "more": 1}, {"id": "b"}, {"id": "c", "root": None}]
        cards = read_cards({"data": data})
        assert {name: (card.source, card.max_length) for name, card in cards.items()} == {
            "a": ("org/a", 8),
            "b": ("b", None),
            "c": ("c", None),
        }

    @pytest.mark.parametrize("answer", [None, [], {}, {"data": None}, {"data": {}}, {"data": ["a"]}, {"data": [[]]}])
    def test_no_list(self, answer):
        with pytest.raises(WrongAnswer, match="without a list of `data`"):
            read_cards(answer)

    @pytest.mark.parametrize(
        "card",
        [
            {},
            {"id": None},
            {"id": 3},
            {"id": ""},
            {"id": ["a"]},
            {"id": "a", "root": 3},
            {"id": "a", "max_model_len": "8"},
            {"id": "a", "max_model_len": 8.5},
            {"id": "a", "max_model_len": True},
            {"id": "a", "max_model_len": 0},
            {"id": "a", "max_model_len": -3},
        ],
    )
    def test_malformed(self, card):
        with pytest.raises(WrongAnswer, match="a model must have a name as `id`"):
            read_cards({"data": [card]})


@pytest.mark.parametrize(
    ("answer", "name"), [({"model": "a"}, "a"), ({"model": 3}, None), ({}, None), ([], None), (None, None)]
)
def test_answering_model(answer, name):
    assert answering_model(answer) == name
