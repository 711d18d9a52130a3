"""Scene two on a tiny model: what is measured is what was saved, and all of it reaches the table, figure and JSON."""

import pytest
from transformers import AutoModelForCausalLM

from trl_gopd.cli import main
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.demo import quantize


SETTINGS = {"group_size": 16, "num_samples": 4, "seq_length": 32, "tune_epochs": 0}


@pytest.fixture
def tiny(models, monkeypatch):
    monkeypatch.setattr(quantize, "smollm2_path", lambda: models / "student")
    monkeypatch.setattr(quantize, "SEQ_LENGTH", 64)
    monkeypatch.setattr(quantize, "WINDOWS", 2)


def test_rows_are_the_saved_models(tiny, tmp_path, capsys):
    (tmp_path / "smollm2-2bit").mkdir()
    (tmp_path / "smollm2-2bit" / "old").write_text("of an earlier run")
    result = quantize.run(tmp_path, (4, 2), **SETTINGS)
    original, four, two = result["rows"]
    assert (original["bits"], original["bits_per_weight"], original["kl"]) == (None, None, 0)
    assert 0 < four["kl"] < two["kl"]
    assert two["file_mb"] < four["file_mb"] < original["file_mb"]
    for bits in (4, 2):
        model = AutoModelForCausalLM.from_pretrained(quantize.folder_of(tmp_path, bits))
        widths = {module.bits for module in model.modules() if isinstance(module, D2QuantLinear)}
        assert widths == {bits, 8}  # the head has 8
    assert not (tmp_path / "smollm2-2bit" / "old").exists()
    quantize.print_table(result)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("original", "4 bits", "2 bits", *quantize.QUESTIONS))


def test_command_writes_json_and_figure_and_chats(tiny, tmp_path, monkeypatch, capsys):
    run = quantize.run
    monkeypatch.setattr(quantize, "run", lambda output_dir, bits: run(output_dir, bits, **SETTINGS))
    asked = iter(["Hello?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    assert main(["demo", "quantize", "--bits", "3", "--output-dir", str(tmp_path), "--chat"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"smollm2-3bit", "quantize.json", "quantize.png"}
    assert next(asked, "none left") == "none left"
