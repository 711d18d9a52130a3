"""`trl-gopd quantize`: a folder that loads anywhere, or one message and nothing written."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_gopd.cli.quantize import main
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.evaluation import storage


ARGUMENTS = ["--group-size", "16", "--num-samples", "4", "--seq-length", "32", "--set", "tune_epochs=1"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return str(path)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def refuse(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    return capsys.readouterr().err


class TestQuantize:
    @pytest.mark.parametrize("preset", ["default", "paper", "release"])
    def test_writes_a_folder_that_loads(self, models, tmp_path, text, preset, capsys):
        out = tmp_path / "out"
        reports = ["--json", tmp_path / "r.json", "--figure", tmp_path / "r.png"]
        run(models / "student", "-o", out, "--bits", 3, "--dataset", text, "--preset", preset, *ARGUMENTS, *reports)
        assert "bits a weight" in capsys.readouterr().out
        model = AutoModelForCausalLM.from_pretrained(out)
        linears = [module for module in model.model.layers.modules() if isinstance(module, D2QuantLinear)]
        assert len(linears) == 14
        assert isinstance(model.lm_head, D2QuantLinear) is (preset == "default")
        assert {(module.bits, module.group_size) for module in linears} == {(3, 16)}
        assert {module.grid for module in linears} == {"affine"} | ({"bitplane"} if preset == "release" else set())
        report = json.loads((tmp_path / "r.json").read_text())
        assert len(report["linears"]) == 14
        assert report["config"]["tune_epochs"] == 1
        assert (tmp_path / "r.png").exists()
        with torch.no_grad():
            assert model(torch.arange(8)[None]).logits.isfinite().all()

    @pytest.mark.parametrize(("given", "bits"), [("4", 4), ("none", None)])
    def test_bits_of_the_embedding(self, models, tmp_path, text, given, bits, capsys):
        run(models / "student", "-o", tmp_path / "out", "--dataset", text, "--embedding-bits", given, *ARGUMENTS)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert getattr(model.get_input_embeddings(), "bits", None) == getattr(model.lm_head, "bits", None) == bits
        size = storage(model, tmp_path / "out")
        told = capsys.readouterr().out
        assert (
            f"{size.block_bits_per_weight:.3f} bits a weight in decoder blocks, {size.bits_per_weight:.3f} in all"
            in told
        )

    def test_bits_of_the_embedding_that_are_refused(self, models, tmp_path, text, capsys):
        arguments = [models / "student", "-o", tmp_path / "out", "--dataset", text, "--embedding-bits"]
        assert "`embedding_bits` must be one of None, 2, 3, 4, 8, got 5" in refuse(capsys, *arguments, "5")
        assert "argument --embedding-bits: invalid" in refuse(capsys, *arguments, "few")

    @pytest.mark.parametrize("offload", ["cpu", "disk"])
    def test_blocks_are_brought_to_the_device(self, models, tmp_path, text, offload, monkeypatch):
        seen = []

        def quantize(model, tokenizer, config):
            seen.append((model.device.type, config.device, config.offload))
            return quantize_model(model, tokenizer, config)

        monkeypatch.setattr("trl_gopd.d2quant.quantize.quantize_model", quantize)
        monkeypatch.setattr("trl_gopd.cli.quantize.torch_device", lambda parser, name: name or "cpu:0")
        run(models / "student", "-o", tmp_path / "out", "--dataset", text, "--offload", offload, *ARGUMENTS)
        assert seen == [("cpu", "cpu:0", offload)]

    def test_plan_is_printed_and_nothing_is_quantized(self, models, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: 1 / 0)
        report = tmp_path / "plan.json"
        run(
            models / "student",
            "--plan",
            "--offload",
            "disk",
            "--device",
            "cuda:3",
            "--tflops",
            "0.5",
            *ARGUMENTS,
            "--json",
            report,
        )
        told = capsys.readouterr().out
        assert "on cuda:3" in told and "mlp.down_proj: rounding" in told
        assert "s at 0.5 TFLOP/s, within a factor of two." in told
        made = json.loads(report.read_text())
        assert made["device"] == "cuda:3" and made["seconds"] > 0
        assert made["phases"][0]["disk"]["hidden states"] == 3 * 4 * 32 * 32 * 4
        assert list(tmp_path.iterdir()) == [report]

    def test_plan_measures_the_speed(self, models, capsys, monkeypatch):
        monkeypatch.setattr("trl_gopd.evaluation.resources.flops_per_second", lambda device, dtype: 2e12)
        run(models / "student", "--plan", "--device", "cpu", "--dtype", "bfloat16", *ARGUMENTS)
        assert "s at 2 TFLOP/s" in capsys.readouterr().out

    def test_folder_is_needed_without_a_plan(self, models, capsys):
        assert "-o DIR: name a new folder to save to, or pass --plan" in refuse(capsys, models / "student")

    @pytest.mark.parametrize("speed", ["0", "-1", "nan", "fast"])
    def test_speed_that_is_not(self, models, speed, capsys):
        told = refuse(capsys, models / "student", "--plan", f"--tflops={speed}")
        assert f"must be a finite number above 0, got '{speed}'; try 0.1" in told

    @pytest.mark.parametrize("name", ["/no/model", "./no_model", "a/b/c"])
    def test_model_that_is_not_there(self, tmp_path, name, capsys):
        told = refuse(capsys, name, "-o", tmp_path / "out")
        assert f"MODEL {name}: the folder does not exist; name one that `save_pretrained` wrote, or a model of" in told

    def test_folder_without_a_model(self, tmp_path, capsys):
        assert "the folder has no config.json" in refuse(capsys, tmp_path, "-o", tmp_path / "out")

    def test_output_that_is_there(self, models, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        assert "not empty; remove it or name another" in refuse(capsys, models / "student", "-o", tmp_path)
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--dataset", "nowhere.txt"], "There is no text file 'nowhere.txt'. `dataset` may be None"),
            (["--num-samples", "10000"], "`dataset` must have 10000 windows of 512 tokens"),
            (["--group-size", "48"], "`group_size` must be at most the width of every quantized linear, got 48"),
            (["--set", 'modules_to_not_convert=["o_prj"]'], "'o_prj'. The nearest name is 'o_proj'"),
            (
                ["--preset", "paper", "--group-size", "128"],
                "`group_size` must be at most the width of every quantized linear, got 128",
            ),
            (["--preset", "paper", "--group-size", "16"], "WikiText-2 (Salesforce/wikitext) could not be loaded"),
        ],
    )
    def test_refusal_is_one_line(self, models, tmp_path, arguments, complaint, capsys):
        told = refuse(capsys, models / "student", "-o", tmp_path / "out", "--group-size", 16, *arguments)
        assert complaint in told.splitlines()[-1]
        assert told.splitlines()[-1].startswith("trl-gopd quantize: error: ")
        assert list(tmp_path.iterdir()) == []

    def test_damaged_model_is_one_line(self, models, tmp_path, capsys):
        folder = shutil.copytree(models / "student", tmp_path / "model")
        (folder / "config.json").write_text('{"model_type": "nothing"}')
        told = refuse(capsys, folder, "-o", tmp_path / "out").splitlines()
        assert told[-1].startswith("trl-gopd quantize: error: ") and "nothing" in told[-1]

    @pytest.mark.parametrize("option", ["-o", "--json", "--figure"])
    def test_folder_that_is_not(self, models, tmp_path, option, capsys):
        paths = {"-o": tmp_path / "out"} | {option: tmp_path / "no" / "file.png"}
        arguments = [argument for pair in paths.items() for argument in pair]
        assert "does not exist; make it" in refuse(capsys, models / "student", *arguments)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--bits", "5"], "`bits` must be one of 2, 3, 4, 8, got 5"),
            (["--group-size", "0"], "`group_size` must be at least 1, got 0"),
            (["--set", "alpah=1"], "alpah"),
            (["--set", "alpha"], "must be NAME=VALUE, got 'alpha'"),
        ],
    )
    def test_setting_that_is_not(self, models, tmp_path, arguments, complaint, capsys):
        assert complaint in refuse(capsys, models / "student", "-o", tmp_path / "out", *arguments)
        assert list(tmp_path.iterdir()) == []
