"""Addresses of servers: what is asked at them, and what of them is shown."""

import copy
import io
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gopd.gopd.config import GOPDConfig
from trl_gopd.gopd.frozen.address import Address, is_url, redacted


SECRET = "https://us3r:pa55word@host:8000/t0ken/v1?key=s3cret#name"
WORDS = ("us3r", "pa55word", "t0ken", "s3cret")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("http://a", True), ("https://a/b", True), ("HTTPS://a", True), ("a/b", False), (None, False), (3, False)],
)
def test_is_url(given, expected):
    assert is_url(given) is expected


class TestAddress:
    @pytest.mark.parametrize(
        ("url", "asked", "shown"),
        [
            ("http://a", "http://a/v1/models", "http://a"),
            ("http://a:8000/", "http://a:8000/v1/models", "http://a:8000"),
            ("http://a/v1/", "http://a/v1/models", "http://a"),
            ("http://[::1]:80/v1#x", "http://[::1]:80/v1/models", "http://[::1]:80#x"),
            ("https://a/b/v1", "https://a/b/v1/models", "https://a/<redacted>"),
            ("http://a?k=v#m/n", "http://a/v1/models?k=v", "http://a/<redacted>#m/n"),
            ("http://u:p@a", "http://a/v1/models", "http://<redacted>@a"),
            (SECRET, "https://host:8000/t0ken/v1/models?key=s3cret", "https://<redacted>@host:8000/<redacted>#name"),
        ],
    )
    def test_what_is_asked_and_shown(self, url, asked, shown):
        address = Address.parse(url)
        assert (address.url("/v1/models"), str(address)) == (asked, shown)
        assert not any(word in repr(address) for word in WORDS)

    @pytest.mark.parametrize(
        "url",
        [
            "http://",
            "http://:80",
            "http://s3cret:port",
            "http://s3cret:99999",
            "http://u:s3c/ret@host",
            "http://u:s3c#ret@host",
            "http://u:s3c?ret@host",
            "http://[s3cret",
            "http://s3 cret",
            "http://a/b s3cret@c",
        ],
    )
    def test_what_is_none_is_not_shown(self, url):
        with pytest.raises(ValueError, match="form http://host:port#model. Quote special characters") as info:
            Address.parse(url)
        assert "s3c" not in str(info.value) and info.value.__cause__ is None
        assert "s3c" not in redacted(url) or url == "http://s3 cret"

    def test_quoted_characters(self):
        address = Address.parse("http://us%40er:p%2Fss%23@host#a%40b")
        assert (address.user, address.model) == ("us@er:p/ss#", "a@b")
        assert {"p/ss#", "us@er:p/ss#"} <= address.secrets()

    def test_what_was_saved_is_no_address(self):
        with pytest.raises(ValueError, match="secrets were left out .* Give the whole address once more"):
            Address.parse(redacted(SECRET))

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.text(max_size=40))
    def test_anything_is_an_address_or_refused(self, text):
        url = f"http://{text}"
        try:
            address = Address.parse(url)
        except ValueError as error:
            assert redacted(url) == "http://<redacted>" and error.__cause__ is None
        else:
            assert redacted(url) == str(address)
            address.url("/v1"), address.secrets()


class TestRedacted:
    @pytest.mark.parametrize("value", [None, 3, "org/model", "/path/to/model", {"math": "org/model", "code": None}])
    def test_leaves_alone_what_is_no_address(self, value):
        assert redacted(value) == value

    def test_by_teacher(self):
        assert redacted({"a": SECRET, "b": "x"}) == {"a": str(Address.parse(SECRET)), "b": "x"}


class TestConfig:
    @pytest.fixture
    def config(self, tmp_path):
        def build(**kwargs):
            return GOPDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **kwargs)

        return build

    @pytest.mark.parametrize(
        "option", ["teacher_model_name_or_path", "teacher_models", "ref_model_name_or_path", "ref_models"]
    )
    def test_no_text_and_no_file_has_secrets(self, config, option):
        value = json.dumps({"a": SECRET}) if option.endswith("s") else SECRET
        args = config(**{option: value})
        file = io.BytesIO()
        torch.save(args, file)
        texts = [
            repr(args),
            str(args),
            f"{args}",
            args.to_json_string(),
            str(args.to_dict()),
            str(args.to_sanitized_dict()),
            str(pickle.dumps(args)),
            str(file.getvalue()),
        ]
        for text in texts:
            assert not any(word in text for word in WORDS)
            assert "https://<redacted>@host:8000/<redacted>#name" in text
        for kept in (args, copy.copy(args), copy.deepcopy(args)):
            assert "pa55word" in str(getattr(kept, option))

    def test_a_saved_one_is_otherwise_complete(self, config):
        args = config(teacher_model_name_or_path="http://host:8000#name", ref_model_name_or_path="org/model", seed=3)
        back = pickle.loads(pickle.dumps(args))
        assert back.to_dict() == args.to_dict() and repr(back) == repr(args)
        assert back.teacher_model_name_or_path == "http://host:8000#name"
