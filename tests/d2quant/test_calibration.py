"""
Laws of calibration windows: each is a piece of the joined text, without padding, behind the beginning-of-sequence
token if the tokenizer begins text with one; they are drawn without replacement, by the seed alone; every form of the
same data gives the same windows. The embedded text has two parts that share no paragraph. Bad data is refused by value
and remedy.
"""

import doctest
import importlib
import sys

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import build_bos_tokenizer, build_tokenizer
from trl_gopd.d2quant import calibration
from trl_gopd.d2quant.calibration import (
    calibration_windows,
    check_ids,
    embedded_text,
    logger,
    read_text,
    token_windows,
)


TEXTS = [f"Sentence number {i} says that {i} is not {i + 1}." for i in range(8)]
JOINED = "\n\n".join(TEXTS)  # 8 texts of some 40 ids, one a byte
MESSAGES = [[{"role": "user", "content": text}] for text in TEXTS]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(JOINED, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def bos_tokenizer():
    return build_bos_tokenizer()


class TestWindows:
    def test_cover_the_text_in_order_without_its_rest(self, tokenizer, ids):
        windows = token_windows(JOINED, tokenizer, 37)
        assert windows.dtype == torch.int64 and windows.shape == (len(ids) // 37, 37)
        assert windows.flatten().tolist() == ids[: windows.numel()]

    def test_special_tokens_are_not_added(self):
        class Eager:
            def __call__(self, text, add_special_tokens=True, verbose=True):
                return {"input_ids": [9] * add_special_tokens + [1, 2, 3]}

        assert token_windows("abc", Eager(), 3).tolist() == [[1, 2, 3]]

    def test_begin_as_the_tokenizer_begins_text(self, bos_tokenizer, ids):
        assert bos_tokenizer("ab")["input_ids"][0] == bos_tokenizer.bos_token_id
        windows = token_windows(JOINED, bos_tokenizer, 37)
        assert windows.shape == (len(ids) // 36, 37)
        assert (windows[:, 0] == bos_tokenizer.bos_token_id).all()
        assert windows[:, 1:].flatten().tolist() == ids[: windows[:, 1:].numel()]

    def test_bos_that_the_tokenizer_has_and_does_not_add(self, ids):
        tokenizer = build_tokenizer()
        tokenizer.bos_token = "<|im_start|>"
        assert token_windows(JOINED, tokenizer, 37).flatten().tolist() == ids[: len(ids) // 37 * 37]
        assert (token_windows(JOINED, tokenizer, 37, add_bos_token=True)[:, 0] == tokenizer.bos_token_id).all()

    def test_bos_can_be_left_out(self, bos_tokenizer, tokenizer):
        windows = token_windows(JOINED, bos_tokenizer, 37, add_bos_token=False)
        assert torch.equal(windows, token_windows(JOINED, tokenizer, 37))

    def test_bos_of_the_text_is_not_doubled(self, bos_tokenizer):
        """Chat templates render it, before each conversation."""
        bos = bos_tokenizer.bos_token_id
        windows = token_windows("<|im_start|>abc<|im_start|>defgh", bos_tokenizer, 4)
        letters = dict(zip("abcdefgh", bos_tokenizer("abcdefgh", add_special_tokens=False)["input_ids"], strict=True))
        assert windows.tolist() == [[bos, *map(letters.get, part)] for part in ("abc", "def")]

    def test_no_bos_to_add(self, tokenizer):
        with pytest.raises(
            ValueError, match="`add_bos_token` must be False for .* `bos_token`, got True. Leave it out"
        ):
            token_windows(JOINED, tokenizer, 37, add_bos_token=True)

    @pytest.mark.parametrize("add_bos_token", [None, True, False])
    def test_drawn_windows_begin_alike(self, bos_tokenizer, add_bos_token):
        drawn = calibration_windows(
            TEXTS, bos_tokenizer, num_samples=5, seq_length=37, seed=1, add_bos_token=add_bos_token
        )
        windows = token_windows(JOINED, bos_tokenizer, 37, add_bos_token=add_bos_token)
        assert torch.equal(drawn, windows[torch.randperm(len(windows), generator=seeded(1))[:5]])
        assert (drawn[:, 0] == bos_tokenizer.bos_token_id).all() == (add_bos_token is not False)

    def test_token_ids_are_used_as_they_are(self, bos_tokenizer):
        rows = torch.arange(5, 17).view(2, 6)
        drawn = calibration_windows(rows, bos_tokenizer, num_samples=2, seq_length=6, seed=0, add_bos_token=True)
        assert sorted(drawn.tolist()) == rows.tolist()

    def test_long_text_is_not_warned_about(self, monkeypatch):
        tokenizer = build_tokenizer()
        tokenizer.model_max_length = 16
        warned = []
        module = importlib.import_module("transformers.tokenization_utils_base")
        monkeypatch.setattr(module.logger, "warning", lambda *arguments: warned.append(arguments))
        token_windows(JOINED, tokenizer, 8)
        assert not warned
        tokenizer(JOINED)  # the check can fail
        assert warned

    def test_tokenizer_is_loaded_from_a_folder(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        assert torch.equal(token_windows(JOINED, tmp_path, 37), token_windows(JOINED, tokenizer, 37))


class TestDraw:
    @settings(deadline=None, derandomize=True, max_examples=25)
    @given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**31), st.data())
    def test_windows_are_rows_without_replacement(self, rows, length, seed, data):
        samples = data.draw(st.integers(1, rows))
        tokens = torch.arange(rows * length).view(rows, length)
        drawn = calibration_windows(tokens, None, num_samples=samples, seq_length=length, seed=seed)
        chosen = drawn[:, 0] // length
        assert torch.equal(drawn, tokens[chosen]) and len(chosen.unique()) == samples

    def test_is_the_permutation_of_the_seed(self):
        tokens = torch.arange(20).view(10, 2)
        for seed in (0, 7):
            order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
            drawn = calibration_windows(tokens, None, num_samples=4, seq_length=2, seed=seed)
            assert torch.equal(drawn, tokens[order[:4]])

    def test_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        calibration_windows(torch.arange(20).view(10, 2), None, num_samples=4, seq_length=2, seed=3)
        assert torch.equal(before, torch.get_rng_state())


class TestForms:
    """Every form of the same data gives the same windows."""

    @pytest.mark.parametrize("form", ["list", "rows", "dataset", "iterator", "path", "str path"])
    def test_text(self, form, tokenizer, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text(JOINED, encoding="utf-8")
        dataset = {
            "list": TEXTS,
            "rows": [{"text": text, "title": 1} for text in TEXTS],
            "dataset": Dataset.from_dict({"text": TEXTS}),
            "iterator": iter(TEXTS),
            "path": path,
            "str path": str(path),
        }[form]
        drawn = calibration_windows(dataset, tokenizer, num_samples=5, seq_length=37, seed=1)
        windows = token_windows(JOINED, tokenizer, 37)
        assert torch.equal(drawn, windows[torch.randperm(len(windows), generator=seeded(1))[:5]])

    @pytest.mark.parametrize("form", ["tensor", "int32", "lists", "tensors", "rows", "dataset", "torch dataset"])
    def test_tokens(self, form, generator):
        tokens = torch.randint(259, (6, 11), generator=generator)
        dataset = {
            "tensor": tokens,
            "int32": tokens.int(),
            "lists": tokens.tolist(),
            "tensors": list(tokens),
            "rows": [{"input_ids": row} for row in tokens.tolist()],
            "dataset": Dataset.from_dict({"input_ids": tokens.tolist()}),
            "torch dataset": Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch"),
        }[form]
        drawn = calibration_windows(dataset, None, num_samples=6, seq_length=7, seed=2, vocab_size=259)
        assert drawn.dtype == torch.int64
        assert torch.equal(drawn, tokens[torch.randperm(6, generator=seeded(2)), :7])

    def test_messages_go_through_the_chat_template(self, tokenizer):
        rows = [{"messages": messages} for messages in MESSAGES]
        text = "".join(tokenizer.apply_chat_template(MESSAGES, tokenize=False))
        drawn = calibration_windows(rows, tokenizer, num_samples=2, seq_length=37, seed=0)
        windows = token_windows(text, tokenizer, 37)
        assert torch.equal(drawn, windows[torch.randperm(len(windows), generator=seeded(0))[:2]])

    def test_hidden_tokens_are_left_out(self):
        rows = [{"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}]
        assert calibration_windows(rows, None, num_samples=1, seq_length=3, seed=0).tolist() == [[5, 6, 7]]

    def test_short_rows_are_left_out_and_counted(self, monkeypatch):
        said = []
        monkeypatch.setattr(logger, "warning", said.append)
        drawn = calibration_windows([[1, 2], [3, 4, 5], [6]], None, num_samples=1, seq_length=3, seed=0)
        assert drawn.tolist() == [[3, 4, 5]]
        assert "2 calibration rows have under 3 tokens" in said[0]

    def test_default_is_the_calibration_part_and_said(self, tokenizer, monkeypatch):
        said = []
        monkeypatch.setattr(logger, "warning_once", said.append)
        drawn = calibration_windows(None, tokenizer, num_samples=3, seq_length=64, seed=0, vocab_size=259)
        windows = token_windows(embedded_text("calibration"), tokenizer, 64)
        assert torch.equal(drawn, windows[torch.randperm(len(windows), generator=seeded(0))[:3]])
        assert "using the embedded text" in said[0]

    def test_wikitext2_is_the_training_split(self, tokenizer, monkeypatch):
        asked = []

        def load_dataset(*arguments, split):
            asked.append((*arguments, split))
            return Dataset.from_dict({"text": TEXTS})

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        drawn = calibration_windows("wikitext2", tokenizer, num_samples=5, seq_length=37, seed=1)
        assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train")]
        assert torch.equal(drawn, calibration_windows(TEXTS, tokenizer, num_samples=5, seq_length=37, seed=1))


class TestEmbeddedText:
    def test_parts_share_no_paragraph(self):
        parts = [
            {" ".join(paragraph.split()) for paragraph in embedded_text(split).split("\n\n")}
            for split in ("calibration", "evaluation")
        ]
        assert all(len(part) > 100 for part in parts)
        assert not parts[0] & parts[1]

    def test_parts_are_as_long_as_stated(self):
        # within a quarter, whatever the version of Python
        assert len(embedded_text("calibration")) == pytest.approx(290_000, rel=0.25)
        assert len(embedded_text("evaluation")) == pytest.approx(80_000, rel=0.25)

    def test_is_the_same_each_time(self):
        assert embedded_text("evaluation") == embedded_text("evaluation")

    def test_unknown_part(self):
        with pytest.raises(ValueError, match="'calibration' or 'evaluation', got 'test'. Name one"):
            embedded_text("test")

    def test_python_without_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(ImportError, match="lacks `pydoc_data`.*Give a text file"):
            embedded_text("calibration")


class TestErrors:
    @pytest.mark.parametrize(
        ("dataset", "error", "message"),
        [
            ([], ValueError, "is empty, it has no rows. `dataset` may be None"),
            ([""], ValueError, "fill a window of 8 tokens .`seq_length`., got 0. Give more text"),
            (["short"], ValueError, "fill a window of 8 tokens .`seq_length`., got 5. Give more text, or lower"),
            (
                ["a text of 24 characters."],
                ValueError,
                "must have 4 windows of 8 tokens .*got 3. Give more data, or lower",
            ),
            ([[1, 2]], ValueError, "must have 4 windows of 8 tokens .*got 0. Give more data, or lower"),
            ("nowhere.txt", FileNotFoundError, "no text file 'nowhere.txt'. `dataset` may be None"),
            ("word " * 2000, FileNotFoundError, "no text file 'word .*…'. `dataset` may be None"),
            (3, TypeError, "not be of type int. `dataset` may be None"),
            ({"train": TEXTS}, TypeError, r"got one of \['train'\]. Pass one of these"),
            ([{"prompt": "a"}], ValueError, r"no known column, got \['prompt'\]. `dataset` may be None"),
            (["a", None], TypeError, "Row 1 must be a string like the first, got None. Remove or convert"),
            ([{"text": None}], TypeError, "Row 0 must be a string like the first, got None. Remove or convert"),
            ([1, 2, 3], TypeError, r"one-dimensional and of integers, got shape \(\).*int64. `dataset` may be"),
            (torch.zeros(4, 8), TypeError, "of integers, got shape .*float32. `dataset` may be"),
            ([["a", "b"]], TypeError, r"list of integers, got \['a', 'b'\]. `dataset` may be"),
        ],
    )
    def test_data(self, dataset, error, message, tokenizer):
        with pytest.raises(error, match=message):
            calibration_windows(dataset, tokenizer, num_samples=4, seq_length=8, seed=0)

    @pytest.mark.parametrize("name", ["num_samples", "seq_length"])
    def test_sizes(self, name, tokenizer):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0. GPTQ uses 128 windows of 2048"):
            calibration_windows(TEXTS, tokenizer, **{"num_samples": 1, "seq_length": 1, "seed": 0, name: 0})

    def test_text_without_tokenizer(self):
        with pytest.raises(TypeError, match="needs a `tokenizer`, got None. Pass the model's tokenizer"):
            calibration_windows(TEXTS, None, num_samples=1, seq_length=8, seed=0)

    def test_messages_without_template(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match="chat template, got one without. Pass `text`"):
            calibration_windows([{"messages": MESSAGES[0]}], tokenizer, num_samples=1, seq_length=8, seed=0)

    @pytest.mark.parametrize(
        ("row", "vocab_size", "message"),
        [
            ([1, 37], 37, "from 0 to 36, the vocabulary of the model, got 37. Tokenize with the model's own"),
            ([-1, 5], 37, "got -1. Tokenize with the model's own"),
            ([-100, 5], None, "from 0, got -100. Tokenize with the model's own"),
        ],
    )
    def test_ids_outside_the_vocabulary(self, row, vocab_size, message):
        with pytest.raises(ValueError, match=message):
            calibration_windows([row], None, num_samples=1, seq_length=2, seed=0, vocab_size=vocab_size)

    def test_largest_id_is_inside(self):
        check_ids(torch.tensor([[0, 36]]), 37)

    def test_file_that_is_not_text(self, tmp_path):
        path = tmp_path / "data.parquet"
        path.write_bytes(b"PAR1\xff\xfe")
        with pytest.raises(ValueError, match="data.parquet' is not text in UTF-8. Load it with"):
            read_text(path)

    def test_wikitext2_without_a_hub(self, tokenizer, monkeypatch):
        def load_dataset(*arguments, **options):
            raise ConnectionError("Couldn't reach the Hub")

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        with pytest.raises(ConnectionError, match="Couldn't reach the Hub. Connect to the hub, or pass a text file"):
            calibration_windows("wikitext2", tokenizer, num_samples=1, seq_length=8, seed=0)


def test_example():
    result = doctest.testmod(calibration)
    assert result.attempted == 4 and result.failed == 0
