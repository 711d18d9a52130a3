"""
The preflight: its numbers are those of both models on the sampled states; its rule; what it refuses.

- Each number equals the one computed from dense logits, row by row, without padding.
- Teacher = reference or teacher = student: nothing can be learned about λ or by training, and the report says so.
- Models given as instances, and the global random state, are left as they were.
"""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import trl_gopd
from tests.preflight_check.harness import PROMPTS, QUICK, numbers, run, vowels
from tests.tiny import LORA, build_model, build_tokenizer
from trl_gopd.demo.smollm2 import smollm2_path
from trl_gopd.preflight_check import ExtrapolatedLogitsProcessor, preflight
from trl_gopd.preflight_check.measure import DETERMINISTIC, OFF_TEACHER
from trl_gopd.preflight_check.sampling import Sampler


EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def teacher(models):
    return AutoModelForCausalLM.from_pretrained(models / "teacher")


@pytest.fixture
def reference(models):
    return AutoModelForCausalLM.from_pretrained(models / "base")


def assert_close(ours, theirs, tolerance):
    """Equal up to `tolerance`, whatever is nested how."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for each, other in zip(ours, theirs, strict=True):
            assert_close(each, other, tolerance)
    elif isinstance(ours, float):
        assert math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance)
    else:
        assert ours == theirs


class TestNumbers:
    def test_are_those_of_dense_logits_row_by_row(self, models, teacher, reference, tokenizer, monkeypatch):
        """Padding, batches and chunks have no part in them."""
        seen = []
        sample = Sampler.sample
        monkeypatch.setattr(
            Sampler, "sample", lambda run, *args: seen.append((run.prompt_ids, sample(run, *args))) or seen[-1][1]
        )
        report = run(models, chunk_size=5, temperature=0.8)
        ((prompt_ids, completions),) = seen
        rows = []
        for prompt, completion in zip(prompt_ids, completions, strict=True):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                log_t, log_r = (
                    (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.8).double().log_softmax(-1)
                    for model in (teacher, reference)
                )
            rows.append((log_t, log_r, torch.tensor(completion)))
        log_t, log_r, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
        assert (report.tokens, report.completions) == (len(labels), 6)
        assert report.length == len(labels) / 6
        assert report.truncated == sum(ids[-1] != tokenizer.eos_token_id for ids in completions) / 6
        top = log_t.exp().max(-1).values
        assert report.deterministic == float((top > DETERMINISTIC).double().mean())
        ratios = (log_t - log_r).gather(1, labels.unsqueeze(1)).squeeze(1)
        # two models of two layers, a few hundred roundings each, of logits below 50
        tolerance = 800 * EPS * 50
        assert math.isclose(report.log_ratios.mean, ratios.mean(), abs_tol=tolerance)
        assert math.isclose(report.log_ratios.quantiles["0.05"], ratios.quantile(0.05), abs_tol=tolerance)
        assert report.log_ratios.beyond["2"] == float((ratios.abs() > 2).double().mean())
        for effect in report.effects:
            log_q = (log_t + (effect.gopd_lambda - 1) * (log_t - log_r)).log_softmax(-1)
            q = log_q.exp()
            flips = (q.argmax(-1) != log_t.argmax(-1)).double()
            assert effect.flips == float(flips.mean())
            assert effect.deterministic_flips == (
                float(flips[top > DETERMINISTIC].mean()) if (top > DETERMINISTIC).any() else None
            )
            for name, value in (
                ("kl_to_teacher", (q * (log_q - log_t)).sum(-1)),
                ("entropy", -(q * log_q).sum(-1)),
                ("eos_probability", q[:, tokenizer.eos_token_id]),
                ("off_teacher_mass", (q * (log_t.exp() < OFF_TEACHER)).sum(-1)),
            ):
                assert math.isclose(getattr(effect, name), value.mean(), abs_tol=tolerance), name

    @pytest.mark.parametrize("options", [{"chunk_size": 1}, {"chunk_size": 7}, {"chunk_size": 10**6}])
    def test_chunks_do_not_matter(self, models, options):
        assert_close(numbers(run(models)), numbers(run(models, **options)), 1000 * EPS)

    def test_same_seed_same_report(self, models):
        reports = []
        for seed, elsewhere in ((0, 1), (0, 2), (1, 2)):
            torch.manual_seed(elsewhere)
            state = torch.random.get_rng_state()
            reports.append(numbers(run(models, seed=seed, reward_funcs=vowels)))
            assert torch.equal(torch.random.get_rng_state(), state)
        assert reports[0] == reports[1] != reports[2]

    def test_teacher_equal_to_reference(self, models):
        report = run(models, ref_model=models / "teacher")
        rounding = 259 * EPS * 4  # of one sum over the vocabulary, divided by |λ − 1| ≥ 1/4
        assert all(not effect.flips and abs(effect.renyi) <= rounding for effect in report.effects)
        assert report.log_ratios.mean == 0 and report.log_ratios.beyond["1"] == 0
        assert report.recommended_lambda == 1
        (reason,) = report.reasons
        assert (
            reason.startswith("Nothing can be learned about λ from these models") and "(KL(T ‖ R) = 0 nats" in reason
        )

    @pytest.mark.parametrize("options", [{}, {"reward_funcs": vowels}, {"sample_from": "student"}])
    def test_teacher_equal_to_student_and_reference(self, models, options):
        report = run(models, model=models / "teacher", ref_model=None, **options)
        assert report.recommended_lambda == 1
        (reason,) = report.reasons
        assert reason.startswith("There is nothing to learn: student, teacher and reference agree")

    def test_fresh_adapter_on_the_teacher_is_the_teacher(self, models, teacher):
        peft = pytest.importorskip("peft")
        student = peft.get_peft_model(teacher, peft.LoraConfig(**LORA))
        report = run(models, model=student, ref_model=None)
        assert report.reasons[0].startswith("There is nothing to learn")

    def test_lambda_one_is_the_teacher(self, models):
        (effect,) = (effect for effect in run(models, lambdas=[2.0]).effects if effect.gopd_lambda == 1)
        assert (effect.flips, effect.log_z, effect.kl_to_teacher) == (0, 0, 0) and effect.renyi > 0

    def test_states_are_of_whom_one_asks(self, models):
        """Tokens that the sampler itself drew are likelier under it than under the other: log T/R changes its sign."""
        by_teacher, by_student = (run(models, sample_from=who, num_samples=20) for who in ("teacher", "student"))
        assert by_teacher.log_ratios.mean > 0 > by_student.log_ratios.mean

    def test_student_and_reference_stand_in_for_each_other(self, models):
        options = {"sample_from": "student", "processing_class": build_tokenizer()}
        one = run(models, **options)
        other = run(models, ref_model=None, model=models / "base", **options)
        assert numbers(one) == numbers(other)
        third = run(models, model=models / "student", **options)
        assert numbers(third) != numbers(one)

    def test_ends_apart(self, models, tokenizer):
        """A teacher that likes to end, beside a reference that does not: one in four tokens is an end."""

        def ends(likes: bool):
            model = build_model(tokenizer, seed=1)
            head = torch.nn.Linear(32, len(tokenizer))
            with torch.no_grad():
                head.weight.zero_()
                head.bias.zero_()
                head.bias[tokenizer.eos_token_id] = math.log(258 / 3) if likes else math.log(258 / 9)
            model.set_output_embeddings(head)
            return model

        report = preflight(
            teacher_model=ends(True), ref_model=ends(False), prompts=PROMPTS, processing_class=tokenizer, **QUICK
        )
        # P(end) is 1/4 and 1/10
        assert report.eos_log_ratios.count == round(6 * (1 - report.truncated)) > 0
        assert math.isclose(report.eos_log_ratios.mean, math.log(2.5), abs_tol=100 * EPS)
        for effect in report.effects:
            odds = 0.25**effect.gopd_lambda * 0.1 ** (1 - effect.gopd_lambda)
            rest = 0.75**effect.gopd_lambda * 0.9 ** (1 - effect.gopd_lambda)
            assert math.isclose(effect.eos_probability, odds / (odds + rest), abs_tol=100 * EPS)
        assert report.recommended_lambda == 2.0
        assert any("ends the completion" in reason and "become shorter" in reason for reason in report.reasons)

    def test_nothing_ended(self, models):
        report = run(models, max_completion_length=1)
        assert report.eos_log_ratios is None and report.truncated == 1

    def test_vocabularies_padded_differently(self, models, tokenizer):
        """Further ids of either model change nothing: what they share is what counts."""
        narrow = build_model(tokenizer, seed=2, hidden_size=48), build_model(tokenizer, seed=3)

        def padded(model, size):
            wide = copy.deepcopy(model)
            wide.resize_token_embeddings(size, mean_resizing=False)
            with torch.no_grad():
                wide.get_output_embeddings().weight[len(tokenizer) :] = 9.0
            return wide

        reports = [
            preflight(
                teacher_model=teacher,
                ref_model=reference,
                model=narrow[1],  # whose draws are the same each time
                sample_from="student",
                prompts=PROMPTS,
                processing_class=tokenizer,
                **QUICK,
            )
            for teacher, reference in (
                narrow,
                (padded(narrow[0], 270), narrow[1]),
                (narrow[0], padded(narrow[1], 265)),
            )
        ]
        for report in reports[1:]:
            assert_close(numbers(report), numbers(reports[0]), 1000 * EPS)

    def test_ids_that_a_model_lacks_are_never_sampled(self, models, tokenizer, monkeypatch):
        wide = build_model(tokenizer, seed=2, vocab_size=300)
        with torch.no_grad():
            wide.get_output_embeddings().weight[len(tokenizer) :] *= 100
        seen = []
        sample = Sampler.sample
        monkeypatch.setattr(Sampler, "sample", lambda *args: seen.extend(sample(*args)) or seen[-6:])
        run(models, ref_model=wide, sample_from="student", processing_class=tokenizer, reward_funcs=vowels)
        assert len(seen) == 6 * 5 and max(map(max, seen)) < len(tokenizer)

    def test_fresh_adapter_is_its_base(self, models):
        peft = pytest.importorskip("peft")
        base = AutoModelForCausalLM.from_pretrained(models / "base")
        adapted = peft.get_peft_model(base, peft.LoraConfig(**LORA))
        before = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        report = run(models, model=adapted, ref_model=None, reward_funcs=vowels)
        assert numbers(report) == numbers(run(models, reward_funcs=vowels))
        assert [name for name, parameter in adapted.named_parameters() if parameter.requires_grad] == before

    def test_own_generation_settings_of_a_model_do_not_bias(self, teacher, models):
        plain = run(models, teacher_model=teacher)
        own = GenerationConfig(top_k=1, repetition_penalty=5.0, eos_token_id=teacher.generation_config.eos_token_id)
        teacher.generation_config = own
        assert numbers(run(models, teacher_model=teacher)) == numbers(plain)
        assert teacher.generation_config is own

    def test_instances_are_left_as_they_were(self, teacher, reference, models):
        teacher.train()
        reference.model.layers[0].train()
        next(reference.parameters()).requires_grad_(False)
        state = {name: value.clone() for name, value in reference.state_dict().items()}
        run(models, teacher_model=teacher, ref_model=reference)
        assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())
        assert reference.model.layers[0].training and not reference.model.layers[1].training
        assert [parameter.requires_grad for parameter in reference.parameters()].count(False) == 1
        assert all(torch.equal(value, state[name]) for name, value in reference.state_dict().items())

    def test_instances_are_left_as_they_were_after_an_error(self, teacher, models):
        def fails(**kwargs):
            raise ZeroDivisionError

        teacher.train()
        with pytest.raises(
            RuntimeError, match="'fails' raised ZeroDivisionError: .* as GRPO calls it, .* completions .strings"
        ):
            run(models, teacher_model=teacher, reward_funcs=fails)
        assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())

    def test_is_public(self):
        assert trl_gopd.preflight is preflight


class TestContext:
    """The longest prompt and a completion of the maximum length have to fit into each model that is run."""

    CONTEXT = 30
    PROMPTS = ["a" * 10, "b" * 18]  # one token for each letter

    @pytest.fixture
    def short(self, tokenizer):
        model = build_model(tokenizer, seed=5)
        model.config.max_position_embeddings = self.CONTEXT
        return model

    @pytest.mark.parametrize("role", ["teacher_model", "ref_model", "model"])
    def test_one_token_too_many(self, models, tokenizer, short, role, monkeypatch):
        monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("sampled"))
        options = {role: short, "sample_from": "student" if role == "model" else "teacher"}
        message = f"prompt has 18 tokens and a completion may have 13, but `{role}` has a context of 30 tokens. Lower"
        with pytest.raises(ValueError, match=message):
            run(models, prompts=self.PROMPTS, max_completion_length=13, processing_class=tokenizer, **options)

    @pytest.mark.parametrize("role", ["teacher_model", "ref_model", "model"])
    def test_as_many_as_fit(self, models, tokenizer, short, role):
        options = {role: short, "sample_from": "student" if role == "model" else "teacher"}
        report = run(models, prompts=self.PROMPTS, max_completion_length=12, processing_class=tokenizer, **options)
        assert report.completions == 6

    def test_student_that_is_not_run_is_not_asked(self, models, tokenizer, short):
        assert run(models, prompts=["a" * 40], model=short, processing_class=tokenizer).completions == 6


class TestTeacherIsStudent:
    """With a reference that differs from both."""

    def says_so(self, models, **options):
        report = run(models, num_samples=2, max_completion_length=2, **options)
        assert sum("The student is the teacher" in reason for reason in report.reasons[1:]) == 0
        return report.reasons[0].startswith("The student is the teacher, so training with λ = 1 would not change it.")

    def test_by_name(self, models, tmp_path):
        (tmp_path / "link").symlink_to(models / "teacher")
        assert self.says_so(models, model=models / "teacher")
        assert self.says_so(models, model=tmp_path / "link")
        assert not self.says_so(models, model=models / "student")

    def test_by_the_same_instance(self, models, teacher):
        assert self.says_so(models, model=teacher, teacher_model=teacher)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_by_the_weights_of_an_instance(self, models, teacher, dtype):
        """In a wider dtype they are the same numbers."""
        assert self.says_so(models, model=teacher.to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_instance_that_was_changed_is_another_model(self, models, teacher, dtype):
        """Although it was loaded from the folder of the teacher. One element of the last parameter is enough."""
        with torch.no_grad():
            list(teacher.to(dtype).parameters())[-1].view(-1)[-1] += 2**-30 if dtype == torch.float64 else 2**-7
        assert not self.says_so(models, model=teacher)

    def test_by_the_weights_in_another_folder(self, models, teacher, tokenizer, tmp_path):
        """They are known where the student is loaded, in order to sample."""
        teacher.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert self.says_so(models, model=tmp_path, sample_from="student")

    def test_a_student_that_was_not_given_is_not_judged(self, models):
        report = run(models, ref_model=models / "teacher")
        assert not any("student" in reason for reason in report.reasons)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def nothing_is_sampled(self, monkeypatch):
        monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("sampled"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lambdas": [1.0, -0.5]}, "`lambdas` must be finite and >= 0, got -0.5. Use a grid"),
            ({"lambdas": [math.nan]}, "got nan"),
            ({"lambdas": [math.inf]}, "got inf"),
            ({"num_samples": 1}, "`num_samples` must be a whole number of at least 2, got 1"),
            ({"max_completion_length": 0}, "`max_completion_length` must be a whole number of at least 1, got 0"),
            ({"batch_size": 0}, "`batch_size`"),
            ({"chunk_size": 0}, "`chunk_size`"),
            ({"seed": -1}, "`seed`"),
            ({"temperature": 0.0}, "`temperature` must be positive and finite, got 0.0. Use 1.0"),
            ({"temperature": math.nan}, "got nan"),
            ({"max_off_teacher_mass": 2.0}, "`max_off_teacher_mass` must lie between 0 and 1, got 2.0"),
            ({"max_deterministic_flips": math.nan}, "`max_deterministic_flips`"),
            ({"sample_from": "both"}, "must be 'teacher' or 'student', got 'both'"),
            ({"ref_model": None}, "`model` and `ref_model` are both None"),
            ({"prompts": ["a", ""]}, "The prompt '' has no tokens. Remove the row"),
            (
                {"prompts": ["a" * 250]},
                "has 250 tokens and a completion may have 12, but `teacher_model` has a context of 256",
            ),
            ({"teacher_model": "/nowhere"}, "`teacher_model` '/nowhere' cannot be loaded"),
            ({"ref_model": "/nowhere"}, "tokenizer cannot be loaded .* Pass it as `processing_class`"),
        ],
    )
    def test_value(self, models, options, message):
        with pytest.raises(ValueError, match=message):
            run(models, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"teacher_model": torch.nn.Linear(2, 2)}, "`teacher_model` must be a name or path.* got Linear"),
            ({"reward_funcs": "accuracy"}, "must be plain functions .* got 'accuracy'"),
            ({"reward_funcs": [torch.nn.Linear(2, 2)]}, "Wrap a reward model or a coroutine"),
            ({"prompts": [[{"role": "user"}]]}, "must be a string or a list of messages"),
            ({"prompts": [3]}, "must be a string or a list of messages with `role` and `content`, got 3"),
        ],
    )
    def test_type(self, models, options, message):
        with pytest.raises(TypeError, match=message):
            run(models, **options)

    def test_coroutine(self, models):
        async def reward(**_):
            return []

        with pytest.raises(TypeError, match="Wrap a reward model or a coroutine"):
            run(models, reward_funcs=reward)

    def test_messages_without_chat_template(self, models):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match="need a tokenizer with a chat template"):
            run(models, prompts=[[{"role": "user", "content": "a"}]], processing_class=tokenizer)

    def test_other_tokenizer(self, models, tmp_path):
        other = build_tokenizer(extra_tokens=("<|other|>",))
        build_model(other, seed=4).save_pretrained(tmp_path)
        other.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="`teacher_model` .* has another tokenizer than the student"):
            run(models, teacher_model=tmp_path)

    def test_model_without_tokenizer(self, tokenizer, models):
        with pytest.raises(ValueError, match="was not loaded from a path.* Pass it as `processing_class`"):
            run(models, ref_model=build_model(tokenizer, seed=1))


def test_numbers_of_a_broken_model_are_refused(models, teacher, monkeypatch):
    with torch.no_grad():
        teacher.get_output_embeddings().weight[-1] = math.nan
    # Sampling goes on, as it would with a NaN at later positions only.
    monkeypatch.setattr(ExtrapolatedLogitsProcessor, "__call__", lambda self, ids, scores: torch.zeros_like(scores))
    with pytest.raises(ValueError, match="are not finite: a model returns NaN"):
        run(models, teacher_model=teacher)


@pytest.mark.slow
def test_smollm2(tmp_path):
    """
    SmolLM2 after a few steps towards one-word answers, beside SmolLM2: decoding goes further that way as λ grows.
    """
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    teacher = AutoModelForCausalLM.from_pretrained(path)
    pairs = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Egypt", "Cairo")]
    asked = "What is the capital of {}?"
    rows = []
    for country, capital in pairs:
        messages = [{"role": "user", "content": asked.format(country)}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        rows.append((prompt, tokenizer(capital + "<|im_end|>")["input_ids"]))
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.02)
    for _ in range(3):
        for prompt, answer in rows:
            labels = torch.tensor([[-100] * len(prompt) + answer])
            teacher(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    teacher.eval()

    def brevity(completion_ids, **kwargs):
        return [-float(len(ids)) for ids in completion_ids]

    report = preflight(
        teacher_model=teacher,
        ref_model=path,
        prompts=[[{"role": "user", "content": asked.format(each)}] for each in ("Spain", "Peru", "China", "Kenya")],
        lambdas=(0.0, 1.0, 1.25, 2.0),
        num_samples=12,
        batch_size=12,
        max_completion_length=16,
        reward_funcs=brevity,
    )
    divergence = [effect.renyi for effect in report.effects]
    assert 0 < divergence[1] < divergence[2] < divergence[3]
    assert report.effects[0].log_z < 1e-4 and report.log_ratios.mean > 0 and report.eos_log_ratios.mean > 0
    ends = [effect.eos_probability for effect in report.effects]
    assert ends == sorted(ends)
    by_lambda = {each.gopd_lambda: each for each in report.decoded}
    gap = by_lambda[2.0].reward - by_lambda[0.0].reward
    error = math.hypot(by_lambda[2.0].standard_error, by_lambda[0.0].standard_error)
    assert gap > 4 * error
    # λ = 2 is the best for the reward, and overturns what the teacher is sure of.
    assert report.effects[-1].deterministic_flips > report.effects[-2].deterministic_flips
    assert report.recommended_lambda == 2.0 and any("Caution" in reason for reason in report.reasons)
