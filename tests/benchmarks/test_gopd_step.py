"""
The benchmark of one step: its command line, what every contestant reports, and the sums over the reports. No time is
asserted.
"""

import json
from pathlib import Path

import pytest

from benchmarks import gopd_step
from benchmarks.gopd_step import BASELINE, CONTESTANTS, TARGETS, Setting


MICRO = Setting("tiny", batch_size=2, completion_length=3, threads=1, warmup=1, repeats=2)


def result(walls, generation=0.5, imports_gib=0.5):
    steps = [{"wall": wall, "cpu": wall / 2, "generation": generation} for wall in walls]
    return {"steps": steps, "memory": {"imports_gib": imports_gib, "trained_gib": 2.0}}


class TestParseArgs:
    def test_defaults_are_all_contestants_of_the_tiny_models(self):
        assert gopd_step.parse_args([]) == (list(CONTESTANTS), gopd_step.SETTINGS["tiny"], BASELINE, None)

    def test_options_replace_those_of_the_size(self):
        argv = ["--size", "smollm2", "--only", "gopd 1 full", BASELINE, "--repeats", "7", "--warmup", "0"]
        contestants, setting, baseline, file = gopd_step.parse_args(
            [*argv, "--bf16", "--baseline", "gopd 1 full", "--json", "x"]
        )
        assert contestants == [BASELINE, "gopd 1 full"]
        assert setting == Setting(
            "smollm2", batch_size=4, completion_length=64, threads=2, warmup=0, repeats=7, bf16=True
        )
        assert (baseline, file.name) == ("gopd 1 full", "x")

    @pytest.mark.parametrize("argv", [["--repeats", "0"], ["--size", "large"], ["--only", "gopd 2"]])
    def test_what_cannot_run_is_refused(self, argv, capsys):
        with pytest.raises(SystemExit):
            gopd_step.parse_args(argv)
        assert argv[0] in capsys.readouterr().err

    def test_targets_are_of_contestants(self):
        assert set(TARGETS) < set(CONTESTANTS)


class TestRunContestant:
    @pytest.mark.parametrize("contestant", CONTESTANTS)
    def test_reports_construction_every_step_and_memory(self, contestant):
        turns, reports = [], []
        gopd_step.run_contestant(contestant, MICRO, wait=lambda: turns.append(len(reports)), report=reports.append)
        built, *steps, memory = reports
        assert turns == [1, 2, 3]  # asked before each step, after the one before was reported
        assert built["device"]
        assert memory["imports_gib"] <= memory["built_gib"] <= memory["trained_gib"]
        for step in steps:
            assert step["completion_tokens"] == MICRO.batch_size * MICRO.completion_length
            assert step["prompt_tokens"] == MICRO.batch_size * 32
            assert 0 < step["generation"] < step["wall"]


class TestSummarize:
    def test_ratios_are_taken_within_a_round(self):
        results = {BASELINE: result([1.0, 2.0, 4.0]), "gopd 1 full": result([2.0, 6.0, 4.0])}
        row = gopd_step.summarize(results)["gopd 1 full"]
        assert row["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
        assert row["step_s"] == {"median": 4.0, "min": 2.0, "max": 6.0}
        assert row["rest_s"] == {"median": 3.5, "min": 1.5, "max": 5.5}
        assert row["memory_gib"] == 1.5
        assert row["target"] == 1.05

    def test_without_the_baseline_there_is_no_ratio(self):
        row = gopd_step.summarize({"trl grpo": result([1.0])})["trl grpo"]
        assert "ratio" not in row and "target" not in row

    def test_table_has_a_line_for_each(self):
        summary = gopd_step.summarize({BASELINE: result([1.0, 2.0, 4.0]), "gopd 1 full": result([2.0, 6.0, 4.0])})
        lines = gopd_step.table(summary).splitlines()
        assert len(lines) == 4
        assert len({line.count("|") for line in lines}) == 1
        assert "2.00 (1.00–3.00) | 2.00 (1.00–3.00) | 1.05 | 1.50" in lines[3]


class TestMain:
    @pytest.fixture(autouse=True)
    def in_process(self, monkeypatch):
        """Measures without processes, since their imports take longer than everything else."""

        def measure(contestants, setting):
            results = {}
            for name in contestants:
                reports = []
                gopd_step.run_contestant(name, setting, wait=lambda: None, report=reports.append)
                results[name] = {
                    "device": reports[0]["device"],
                    "steps": reports[1 + setting.warmup : -1],
                    "memory": reports[-1],
                }
            return results

        monkeypatch.setattr(gopd_step, "measure", measure)

    ARGV = ("--warmup", "1", "--repeats", "2", "--batch-size", "2", "--completion-length", "3")

    def test_json_says_how_it_was_measured(self, tmp_path, capsys):
        file = tmp_path / "step.json"
        argv = ["--only", BASELINE, "gopd 1 sampled", *self.ARGV, "--json", str(file)]
        gopd_step.main(argv)
        report = json.loads(file.read_text())
        keys = {"command", "commit", "dirty", "versions", "machine", "dtype", "seed", "setting", "results", "summary"}
        assert set(report) == keys
        assert "--only 'trl distillation' 'gopd 1 sampled'" in report["command"]
        assert report["setting"] == {**vars(MICRO)}
        assert {"python", "trl", "transformers", "torch"} < set(report["versions"])
        assert [len(r["steps"]) for r in report["results"].values()] == [2, 2]
        assert {"wall", "cpu", "generation"} < set(report["results"][BASELINE]["steps"][0])
        assert "| gopd 1 sampled |" in capsys.readouterr().out

    def test_completions_of_other_lengths_are_an_error(self, monkeypatch):
        measure = gopd_step.measure

        def cut(contestants, setting):
            results = measure(contestants, setting)
            results[BASELINE]["steps"][0]["completion_tokens"] -= 1
            return results

        monkeypatch.setattr(gopd_step, "measure", cut)
        with pytest.raises(RuntimeError, match="same number of tokens"):
            gopd_step.main(["--only", BASELINE, *self.ARGV])


@pytest.mark.slow
class TestMeasure:
    def test_contestants_take_turns_in_processes(self):
        results = gopd_step.measure([BASELINE, "gopd 1 sampled"], MICRO)
        assert list(results) == [BASELINE, "gopd 1 sampled"]
        for contestant in results.values():
            assert len(contestant["steps"]) == MICRO.repeats
            assert contestant["memory"]["trained_gib"] > contestant["memory"]["imports_gib"]

    def test_a_contestant_that_fails_is_named(self):
        with pytest.raises(RuntimeError, match="`gopd 1 no-such-estimator` stopped"):
            gopd_step.measure(["gopd 1 no-such-estimator"], MICRO)


DOCS = Path(__file__).parents[2] / "docs"
BF16 = ["gopd 1 sampled", "gopd 1 full"]


@pytest.mark.parametrize(
    ("name", "contestants"), [("tiny", list(CONTESTANTS)), ("smollm2", list(CONTESTANTS)), ("smollm2_bf16", BF16)]
)
def test_documented_tables_are_the_committed_results(name, contestants):
    report = json.loads((DOCS / "results" / f"gopd_step_{name}.json").read_text())
    assert gopd_step.summarize(report["results"], contestants[0]) == report["summary"]
    assert gopd_step.table(report["summary"]) in (DOCS / "benchmarks.md").read_text()
    assert report["setting"]["size"] == name.removesuffix("_bf16") and not report["dirty"]
    assert report["setting"]["bf16"] == name.endswith("_bf16")
    assert list(report["results"]) == contestants


def test_documented_steps_meet_their_targets():
    summary = json.loads((DOCS / "results/gopd_step_smollm2.json").read_text())["summary"]
    for contestant, target in TARGETS.items():
        assert summary[contestant]["ratio"]["median"] <= target, contestant
    summary = json.loads((DOCS / "results/gopd_step_smollm2_bf16.json").read_text())["summary"]
    assert summary["gopd 1 full"]["ratio"]["median"] <= 1.1
