"""
The benchmark of the estimators' noise: its two measures against all tokens of a small vocabulary, its sums, and the
documented figures.
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gopd_variance
from benchmarks.gopd_variance import ESTIMATORS, LAMBDAS, Setting, States


DOCS = Path(__file__).parents[2] / "docs"
VOCAB_SIZE = 70  # more than the largest k
# Sums over 70 ids of squares below 400, in float32.
TOLERANCE = 70 * 400 * torch.finfo(torch.float32).eps


@pytest.fixture
def states():
    gen = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 5, generator=gen), torch.randn(VOCAB_SIZE, 5, generator=gen)
    own = hidden @ head.t()
    teacher, reference = (own + torch.randn(6, VOCAB_SIZE, generator=gen) for _ in range(2))
    return States(hidden, head, teacher, reference, completions=torch.tensor([0, 0, 1, 1, 2, 2]))


def distances(states, estimator, gopd_lambda):
    """Squared distance `(N, V)` of the gradient at every token to the exact one, whose squared norm comes second."""
    rows = torch.arange(6).repeat_interleave(VOCAB_SIZE)
    labels = torch.arange(VOCAB_SIZE).repeat(6)
    mean = gopd_variance.gradient("full", states, torch.arange(6), labels[:6], gopd_lambda)
    grads = gopd_variance.gradient(estimator, states, rows, labels, gopd_lambda).view(6, VOCAB_SIZE, 5)
    return (grads - mean.unsqueeze(1)).square().sum(-1).double(), mean.square().sum(-1).double()


@pytest.mark.parametrize("gopd_lambda", LAMBDAS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestMeasures:
    def test_enumerated_is_the_expectation_over_all_tokens(self, states, estimator, gopd_lambda):
        exact = gopd_variance.enumerated(states, gopd_lambda, chunk_size=4)
        probs = (states.hidden @ states.head.t()).softmax(-1).double()
        squares, signal = distances(states, estimator, gopd_lambda)
        name = f"{estimator}, {'rest' if ESTIMATORS[estimator] else 'none'}"
        torch.testing.assert_close(exact[name], (probs * squares).sum(-1), rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(exact["full"], signal, rtol=0, atol=TOLERANCE)
        top = probs.topk(ESTIMATORS[estimator]).values.sum(-1)
        torch.testing.assert_close(exact[f"{estimator}, coverage"], top, rtol=0, atol=TOLERANCE)

    def test_redrawn_is_the_mean_over_the_tokens_drawn(self, states, estimator, gopd_lambda):
        """Tokens come several times, likely ones are all in S, and pairs fill chunks unevenly."""
        redraws = torch.arange(2 * VOCAB_SIZE).remainder(VOCAB_SIZE).expand(6, -1)
        got = gopd_variance.redrawn(states, redraws, estimator, gopd_lambda, chunk_size=11)
        expected = distances(states, estimator, gopd_lambda)[0].mean(-1)
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


class TestSummarize:
    def test_ratio_of_sums(self):
        assert gopd_variance.ratio([2.0, 4.0], [1.0, 2.0]) == {"value": 2.0, "standard_error": 0.0}

    def test_standard_error_is_that_of_a_mean_if_signals_are_equal(self):
        values = torch.tensor([1.0, 4.0, 2.0, 7.0])
        got = gopd_variance.ratio(values.tolist(), [1.0] * 4)
        assert got["value"] == 3.5
        assert got["standard_error"] == pytest.approx(float(values.std() / 2), rel=1e-6)

    def test_table_has_a_line_for_each(self, states):
        summary = gopd_variance.summarize(gopd_variance.measure(states, Setting(redraws=2)))
        assert list(summary) == ["1", "1.25"]
        for rows in summary.values():
            lines = gopd_variance.table(rows).splitlines()
            assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in (*ESTIMATORS, "full")]
            assert len({line.count("|") for line in lines}) == 1


class TestCommand:
    def test_options(self):
        setting, file = gopd_variance.parse_args(["--redraws", "3", "--completion-length", "5", "--json", "x"])
        assert setting == Setting(completion_length=5, redraws=3, threads=1)
        assert file.name == "x"

    @pytest.mark.parametrize("argv", [["--redraws", "0"], ["--threads", "one"]])
    def test_what_cannot_run_is_refused(self, argv, capsys):
        with pytest.raises(SystemExit):
            gopd_variance.parse_args(argv)
        assert argv[0] in capsys.readouterr().err

    def test_json_says_how_it_was_measured(self, states, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(gopd_variance, "build_states", lambda setting: states)
        file = tmp_path / "variance.json"
        gopd_variance.main(["--redraws", "2", "--json", str(file)])
        report = json.loads(file.read_text())
        assert report["command"] == f"python -m benchmarks.gopd_variance --redraws 2 --json {file}"
        assert {"commit", "dirty", "versions", "machine", "dtype", "seed", "setting", "results"} < set(report)
        assert gopd_variance.table(report["summary"]["1.25"]) in capsys.readouterr().out


@pytest.mark.slow
def test_states_are_those_of_three_contexts():
    states = gopd_variance.build_states(Setting(completion_length=3))
    assert states.hidden.shape == (24, 576) and states.teacher.shape == (24, 49152)
    own = states.hidden @ states.head.t()
    for logits in (states.teacher, states.reference):
        assert not torch.allclose(own, logits)
    assert states.per_completion(torch.ones(24)) == [3.0] * 8


class TestDocumentation:
    @pytest.fixture
    def report(self):
        return json.loads((DOCS / "results/gopd_variance.json").read_text())

    @pytest.mark.parametrize("gopd_lambda", ["1", "1.25"])
    def test_tables_are_the_committed_results(self, report, gopd_lambda):
        assert gopd_variance.summarize(report["results"]) == report["summary"]
        assert gopd_variance.table(report["summary"][gopd_lambda]) in (DOCS / "gopd.md").read_text()
        assert not report["dirty"]

    def test_claims_of_the_text_hold(self, report):
        lumped_is_better = []
        for rows in report["summary"].values():
            value = {name: row.get("rest", row["none"])["value"] for name, row in rows.items()}
            assert list(value.values()) == sorted(value.values(), reverse=True)
            assert value["sampled"] / value["stratified 16"] == pytest.approx(6, abs=0.5)
            assert value["sampled"] / value["stratified 64"] == pytest.approx(16, abs=0.5)
            for name, row in rows.items():
                assert row["redrawn"]["value"] < value[name]
                assert value[name] - row["redrawn"]["value"] < 3 * row["redrawn"]["standard_error"]
                if "rest" in row:
                    none = row["none"]["value"]
                    assert row["mean over S"]["value"] > max(value[name], none)
                    assert abs(none / value[name] - 1) <= 0.1
                    lumped_is_better.append(value[name] < none)
        assert lumped_is_better.count(False) == 1
