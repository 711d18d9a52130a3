"""
Scene three: the second operation leaves the first as it was, weights merge by the formula, an expert sees its own
domain alone, and the result is the arithmetic it says it is, on a run of a few steps.
"""

import json
import math

import pytest
import torch

from trl_gopd.cli import main
from trl_gopd.demo import arithmetic, merge
from trl_gopd.demo.arithmetic import ADDITION, DIFFERENCE


EPS = torch.finfo(torch.float32).eps
BOTH = [ADDITION, DIFFERENCE]
# What scene one is trained on must not move: its figures are published.
GOLDEN = ["33+84=711<eos>", "57+48=501<eos>", "23+26=94<eos>"]
# The base learns how long an answer is, so that the experts hit on a few by chance, and are rewarded.
SETTINGS = merge.Settings(base=(16, 1), base_steps=30, expert_steps=2, student_steps=2, batch_size=16, n=64)


def row(seed, model, domain, accuracy, **kwargs):
    fields = {"lambda": None, "alpha": None, "estimator": None, "n": 100, "kl_to_teacher": 0.5, "length": 3.0}
    return {"seed": seed, "model": model, "domain": domain, "accuracy": accuracy, **fields, **kwargs}


class TestOperations:
    def test_second_sign_comes_after_the_first_vocabulary(self):
        one, two = arithmetic.build_tokenizer().get_vocab(), arithmetic.build_tokenizer(BOTH).get_vocab()
        assert one == {token: index for index, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}
        assert two == {**one, "-": len(one)}

    @pytest.mark.parametrize("operation", BOTH)
    def test_possible_answers_are_those_that_occur(self, operation):
        numbers = torch.tensor(list(arithmetic.OPERANDS))
        answers = operation.answers(torch.cartesian_prod(numbers, numbers))
        assert sorted(set(answers.tolist())) == list(operation.possible)
        assert len(str(max(operation.possible))) < arithmetic.MAX_COMPLETION_LENGTH  # and the end

    def test_prompt_and_answer(self):
        rows = arithmetic.prompts(torch.tensor([[38, 75], [75, 38]]), DIFFERENCE)
        assert rows["prompt"] == ["38-75=", "75-38="] and rows["answer"] == ["73", "73"]

    @pytest.mark.parametrize("operation", BOTH)
    def test_noise_is_the_share_of_wrong_answers(self, operation, generator):
        pairs = arithmetic.operands("train").repeat(5, 1)
        answers = arithmetic.noisy_answers(pairs, noise=0.3, generator=generator, operation=operation)
        share = (answers != operation.answers(pairs)).float().mean().item()
        assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(pairs))
        assert set(answers.tolist()) == set(operation.possible)

    def test_addition_draws_what_it_draws_alone(self):
        one, two = arithmetic.build_tokenizer(), arithmetic.build_tokenizer(BOTH)
        alone = arithmetic.answered(one, rows=30, noise=0.5, seed=1)
        both = arithmetic.answered(two, rows=60, noise=0.5, seed=1, operations=BOTH)
        assert both[:30] == alone[:30] and len(both) == 60
        assert [two.decode(ids)[2] for ids in both["input_ids"]] == ["+"] * 30 + ["-"] * 30
        assert [one.decode(ids) for ids in alone["input_ids"][:3]] == GOLDEN


class TestWeights:
    @pytest.fixture
    def weights(self, generator):
        return [{"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator)} for _ in "123"]

    def test_one_is_the_mean_and_zero_the_base(self, weights):
        base, *experts = weights
        mean, start = (merge.merge_weights(base, experts, alpha=alpha) for alpha in (1.0, 0.0))
        for name in base:
            assert torch.equal(mean[name], (experts[0][name] + experts[1][name]) / 2)
            assert torch.equal(start[name], base[name])

    def test_more_extrapolates_from_the_base(self, weights):
        base, *experts = weights
        merged = merge.merge_weights(base, experts, alpha=1.5)
        for name in base:
            first, second, start = (w[name].double() for w in (*experts, base))
            exact = start + 1.5 * ((first + second) / 2 - start)
            largest = max(w.abs().max().item() for w in (first, second, start))
            # sum, difference, product and sum, each of at most 2.5 times the largest weight
            assert (merged[name] - exact).abs().max() <= 4 * EPS * 2.5 * largest

    def test_inputs_stay_as_they_are(self, weights):
        before = [{name: weight.clone() for name, weight in each.items()} for each in weights]
        merged = merge.merge_weights(weights[0], weights[1:], alpha=1.0)
        for weight in merged.values():
            weight.zero_()
        assert all(torch.equal(b[name], w[name]) for b, w in zip(before, weights, strict=True) for name in b)

    def test_refuses_what_has_another_base(self, weights):
        base, *experts = weights
        with pytest.raises(ValueError, match="must hold at least one state dictionary, got none"):
            merge.merge_weights(base, [], alpha=1.0)
        wider = {**base, "a": torch.zeros(3, 6)}
        with pytest.raises(ValueError, match=r"`experts\[1\]`.*\[3, 6\].*'a'.*\[3, 5\].*trained from one base"):
            merge.merge_weights(base, [experts[0], wider], alpha=1.0)
        with pytest.raises(ValueError, match=r"`experts\[0\]`.*None for 'b'"):
            merge.merge_weights(base, [{"a": base["a"]}], alpha=1.0)


class TestRouting:
    def test_rows_bear_the_name_of_their_domain(self):
        rows = merge.train_rows()
        signs = [(prompt[2], domain) for prompt, domain in zip(rows["prompt"], rows["teacher_id"], strict=True)]
        assert set(signs) == {("+", "addition"), ("-", "difference")}
        assert signs.count(("+", "addition")) == signs.count(("-", "difference"))

    def test_no_training_pair_of_a_domain_is_held_out_in_another(self):
        train = {(prompt[:2], prompt[3:5]) for prompt in merge.train_rows()["prompt"]}
        test = {(str(a), str(b)) for a, b in arithmetic.operands("test").tolist()}
        assert not train & test and len(train | test) == 90 * 90

    def test_an_expert_scores_its_own_domain_alone(self, run, tmp_path, monkeypatch):
        folder, _ = run
        seen = {domain: set() for domain in merge.DOMAINS}

        class Watched(arithmetic.GOPDTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                for domain, scorer in self.teachers.items():
                    scorer.score = self.watched(scorer.score, seen[domain])

            def watched(self, score, signs):
                def watching(sequences):
                    # the sign is the third of the prompt's six tokens; prompts are of one length
                    signs.update(self.processing_class.convert_ids_to_tokens(sequences.input_ids[:, 2].tolist()))
                    return score(sequences)

                return watching

        monkeypatch.setattr(arithmetic, "GOPDTrainer", Watched)
        rows = merge._distil(folder, 0, SETTINGS, gopd_lambda=1.0, estimator="sampled")
        assert seen == {"addition": {"+"}, "difference": {"-"}}
        assert [r["domain"] for r in rows] == list(merge.DOMAINS)


class TestSummary:
    def test_each_domain_against_its_own_expert(self):
        addition = [
            *(row(0, "addition_expert", "addition", 0.7), row(1, "addition_expert", "addition", 0.8)),
            *(row(0, "student", "addition", 0.8), row(1, "student", "addition", 0.86)),
        ]
        difference = [
            *(row(0, "difference_expert", "difference", 0.9), row(1, "difference_expert", "difference", 0.9)),
            *(row(0, "addition_expert", "difference", 0.5), row(1, "addition_expert", "difference", 0.7)),
        ]
        own, student, own_too, foreign = merge.summarize([*addition, *difference])
        assert own["gain_over_teacher"] is None and own_too["gain_over_teacher"] is None
        assert student["gain_over_teacher"] == pytest.approx(0.08)
        assert student["gain_standard_error"] == pytest.approx(0.02)  # of the differences .10 and .06
        assert foreign["gain_over_teacher"] == pytest.approx(-0.3)
        assert foreign["gain_standard_error"] == pytest.approx(0.1)  # of -.4 and -.2
        assert foreign["n"] == 200

    def test_lambda_and_alpha_are_kinds(self):
        rows = [row(0, "addition_expert", "addition", 0.5)]
        rows += [row(0, "weights", "addition", 0.5, alpha=alpha) for alpha in (1.0, 1.5)]
        rows += [row(0, "student", "addition", 0.5, **{"lambda": gopd_lambda}) for gopd_lambda in (1.0, 1.5)]
        assert len(merge.summarize(rows)) == 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of the models and result, from a run of two steps a stage in which little is learned."""
    path = tmp_path_factory.mktemp("merge")
    result = merge.run(
        seeds=1, output_dir=path, lambdas=(1.0, 1.25), estimators=("full",), settings=SETTINGS, workers=1
    )
    return path / "merge_models" / "seed0", result


class TestRun:
    def test_contract_of_the_json(self, run):
        result = json.loads(json.dumps(run[1]))
        assert set(result) == {"command", "versions", "settings", "seconds", "rows", "summary"}
        keys = {"seed", "domain", "model", "lambda", "alpha", "estimator", "accuracy", "n", "kl_to_teacher", "length"}
        assert all(set(r) == keys for r in result["rows"])
        kinds = [
            *[(model, None, None, None) for model in ("base", "addition_expert", "difference_expert")],
            *[("weights", None, alpha, None) for alpha in (1.0, 1.25, 1.5)],
            *[("student", gopd_lambda, None, "full") for gopd_lambda in (1.0, 1.25)],
        ]
        given = [(tuple(r[name] for name in merge.KIND), r["domain"]) for r in result["rows"]]
        assert given == [(kind, domain) for kind in kinds for domain in merge.DOMAINS]
        assert len(result["summary"]) == len(given) and result["settings"]["expert_steps"] == 2

    def test_divergence_is_from_the_domains_own_expert(self, run):
        kl = {(r["model"], r["domain"]): r["kl_to_teacher"] for r in run[1]["rows"]}
        for domain, other in (merge.DOMAINS, merge.DOMAINS[::-1]):
            assert kl[f"{domain}_expert", domain] == 0 < kl[f"{other}_expert", domain]

    def test_what_was_judged_is_the_mean_of_the_experts(self, run):
        names = ("weights-1.0", *(f"{domain}_expert" for domain in merge.DOMAINS))
        mean, first, second = (arithmetic.load(run[0] / name).state_dict() for name in names)
        assert all(torch.equal(mean[name], (first[name] + second[name]) / 2) for name in mean)
        assert any(not torch.equal(first[name], second[name]) for name in mean)

    def test_command_writes_json_and_figure(self, run, tmp_path, monkeypatch, capsys):
        asked = {}
        monkeypatch.setattr(merge, "run", lambda **kwargs: asked.update(kwargs) or run[1])
        arguments = ["--seeds", "3", "--lambdas", "1", "--workers", "4", "--output-dir", str(tmp_path)]
        assert main(["demo", "merge", *arguments]) == 0
        options = {"seeds": 3, "lambdas": [1.0], "estimators": merge.ESTIMATORS, "workers": 4}
        assert asked == {**options, "output_dir": tmp_path}
        assert {path.name for path in tmp_path.iterdir()} == {"merge.json", "merge.png"}
        assert json.loads((tmp_path / "merge.json").read_text()) == json.loads(json.dumps(run[1]))
        printed = capsys.readouterr().out
        assert all(text in printed for text in ("addition expert", "α = 1.5", "λ = 1.25", "against its expert"))
