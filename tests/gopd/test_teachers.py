"""
Several teachers, and teachers that are adapters of the student: which model scores which row, that it is the only one
to do so, and that the result is that of as many separate models.
"""

import json

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model

from tests.gopd.harness import IDS, load, log_probs
from tests.tiny import LORA, build_model
from trl_gopd.gopd.frozen.adapter import AdapterScorer
from trl_gopd.gopd.frozen.local import LocalScorer


LAMBDAS = [1.0, 1.5, 0.5, 1.25, 1.0, 2.0, 1.25, 0.0] * 2


@pytest.fixture
def adapters(models, tmp_path):
    """Folders of two trained adapters on the student."""
    folders = {}
    for seed, name in enumerate(("math", "code")):
        torch.manual_seed(seed)
        model = get_peft_model(load(models / "student"), LoraConfig(**{**LORA, "r": 2 + seed}))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.3)
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
    return folders


def naive_loss(student, models, inputs, estimator, weights=None):
    """Mean over rows of token means, each row with its own `(teacher, reference)` of `models`."""
    mask, ids = inputs["completion_mask"].float(), inputs["completion_ids"].unsqueeze(-1)
    log_s = log_probs(student, inputs)
    rows = []
    for row, (owner, scale) in enumerate(
        zip(inputs["gopd_teacher_index"].tolist(), inputs["gopd_lambda"], strict=True)
    ):
        single = {key: value[row : row + 1] for key, value in inputs.items() if torch.is_tensor(value) and value.dim()}
        with torch.no_grad():
            log_t, log_r = (log_probs(model, single) for model in models[owner])
        row_s = log_s[row : row + 1]
        if estimator == "full":
            log_q = (scale * log_t + (1 - scale) * log_r).log_softmax(-1)
            token = (row_s.exp() * (row_s - log_q)).sum(-1)
        else:
            s, t, r = (x.gather(-1, ids[row : row + 1]).squeeze(-1) for x in (row_s, log_t, log_r))
            token = -(scale * t - (scale - 1) * r - s).detach() * s
        rows.append((token * mask[row]).sum() / mask[row].sum() * (1 if weights is None else weights[owner]))
    return torch.stack(rows).mean()


def assert_gradient(trainer, student, models, estimator, weights=None):
    named = {n: p for n, p in student.named_parameters() if p.requires_grad}
    loss = naive_loss(student, models, trainer.seen, estimator, weights)
    want = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    gap = torch.stack([(trainer.grads[n] - want[n]).norm() for n in want]).norm()
    assert norm > 0 and gap / norm < 1e-5, gap / norm


@pytest.mark.parametrize("estimator", ["sampled", "full"])
class TestSeveral:
    def test_gradient(self, several, models, estimator):
        trainer = several(gopd_estimator=estimator, per_device_train_batch_size=8)
        trainer.train()
        assert 0 < trainer.seen["gopd_teacher_index"].sum() < 8
        student = load(models / "student")
        pairs = [(load(models / name), load(models / "student")) for name in ("teacher", "base")]
        assert_gradient(trainer, student, pairs, estimator)

    def test_reference_lambda_and_weight_by_teacher(self, several, models, estimator):
        trainer = several(
            gopd_estimator=estimator,
            per_device_train_batch_size=8,
            ref_model={"math": str(models / "base"), "code": None},
            gopd_lambda_by_teacher={"code": 1.75},
            gopd_weight_by_teacher={"math": 0.25},
        )
        trainer.train()
        want = torch.tensor([1.25, 1.75])[trainer.seen["gopd_teacher_index"]]
        assert torch.equal(trainer.seen["gopd_lambda"], want)
        pairs = [(load(models / t), load(models / r)) for t, r in (("teacher", "base"), ("base", "student"))]
        assert_gradient(trainer, load(models / "student"), pairs, estimator, weights=(0.25, 1.0))

    def test_lambda_by_row(self, several, models, routed, estimator):
        trainer = several(
            gopd_estimator=estimator,
            per_device_train_batch_size=8,
            train_dataset=routed.add_column("lambda", LAMBDAS),
            gopd_lambda=1.0,
        )
        trainer.train()
        assert len(set(trainer.seen["gopd_lambda"].tolist())) > 2
        pairs = [(load(models / name), load(models / "student")) for name in ("teacher", "base")]
        assert_gradient(trainer, load(models / "student"), pairs, estimator)
        assert 0 <= trainer.state.log_history[0]["gopd/lambda"] <= 2

    def test_each_row_goes_through_its_own_teacher_alone(self, several, estimator, monkeypatch):
        rows = []
        states = LocalScorer._states

        def spy(self, group):
            rows.append((self, len(group)))
            return states(self, group)

        monkeypatch.setattr(LocalScorer, "_states", spy)
        trainer = several(gopd_estimator=estimator, gopd_lambda=1.0, per_device_train_batch_size=8)
        trainer.train()
        owners = trainer.seen["gopd_teacher_index"].tolist()
        counts = {scorer: sum(n for s, n in rows if s is scorer) for scorer in trainer.teachers.values()}
        assert list(counts.values()) == [owners.count(0), owners.count(1)]

    def test_an_absent_teacher_is_not_called(self, several, prompts, estimator, monkeypatch):
        trainer = several(gopd_estimator=estimator, train_dataset=prompts.add_column("teacher_id", ["math"] * 16))
        monkeypatch.setattr(trainer.teachers["code"], "_states", lambda *args: pytest.fail("it was called"))
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["gopd/math/token_share"] == 1 and "gopd/code/reverse_kl" not in log

    def test_micro_batches_change_nothing(self, several, estimator):
        whole = several(gopd_estimator=estimator, per_device_train_batch_size=8)
        parts = several(gopd_estimator=estimator, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        whole.train()
        parts.train()
        for name, gradient in whole.grads.items():
            torch.testing.assert_close(parts.grads[name], gradient, rtol=1e-4, atol=1e-6)

    def test_other_vocabulary_widths(self, several, models, tokenizer, estimator):
        wide = build_model(tokenizer, seed=7, vocab_size=len(tokenizer) + 29)
        trainer = several(
            gopd_estimator=estimator,
            per_device_train_batch_size=8,
            teacher_model={"math": wide, "code": str(models / "base")},
        )
        trainer.train()
        pairs = [(build_model(tokenizer, seed=7, vocab_size=len(tokenizer) + 29), load(models / "student"))]
        pairs.append((load(models / "base"), load(models / "student")))
        if estimator == "sampled":  # the full one restricts all models to the ids that they share
            assert_gradient(trainer, load(models / "student"), pairs, estimator)
        assert all(torch.isfinite(gradient).all() for gradient in trainer.grads.values())


class TestSharing:
    def test_one_model_in_several_roles_is_loaded_once(self, several, models):
        trainer = several(ref_model={"math": str(models / "base"), "code": str(models / "base")})
        assert trainer.references["math"] is trainer.references["code"] is trainer.teachers["code"]

    def test_metrics_of_each_teacher_average_to_the_whole(self, several):
        trainer = several(per_device_train_batch_size=8, gopd_extrapolation_clip=1.0)
        trainer.train()
        log = trainer.state.log_history[0]
        shares = [log[f"gopd/{key}/token_share"] for key in ("math", "code")]
        assert sum(shares) == pytest.approx(1)
        for name in ("reverse_kl", "teacher_logp", "advantage_mean", "implicit_reward", "clip_share"):
            parts = [log[f"gopd/{key}/{name}"] for key in ("math", "code")]
            assert sum(s * p for s, p in zip(shares, parts, strict=True)) == pytest.approx(log[f"gopd/{name}"]), name

    def test_offloaded_models_give_the_same_and_stay(self, several):
        plain = several(max_steps=2)
        plain.train()
        parked = several(max_steps=2, offload_frozen_models=True)
        addresses = [p.data_ptr() for p in parked.teachers["math"].inner.parameters()]
        parked.train()
        assert parked.losses == plain.losses
        assert [p.data_ptr() for p in parked.teachers["math"].inner.parameters()] == addresses

    def test_by_configuration(self, several, models):
        names = {"math": str(models / "teacher"), "code": str(models / "base")}
        trainer = several(teacher_model=None, teacher_models=json.dumps(names))
        assert list(trainer.teachers) == ["math", "code"]

    def test_iterable(self, several, routed):
        trainer = several(train_dataset=IterableDataset.from_generator(lambda: iter(routed)))
        trainer.train()
        assert trainer.seen["gopd_teacher_logps"].isfinite().all()


@pytest.mark.parametrize("estimator", ["sampled", "full"])
class TestAdapters:
    def dense(self, models, folder):
        return PeftModel.from_pretrained(load(models / "student"), folder).merge_and_unload()

    def test_equal_separate_models(self, several, adapters, models, estimator):
        options = {"gopd_estimator": estimator, "per_device_train_batch_size": 8, "max_steps": 2}
        shared = several(teacher_model=adapters, peft_config=LoraConfig(**LORA), **options)
        assert all(isinstance(scorer, AdapterScorer) for scorer in shared.teachers.values())
        start = {name: parameter.clone() for name, parameter in shared.model.named_parameters()}
        shared.train()
        separate_models = {name: self.dense(models, folder) for name, folder in adapters.items()}
        separate = several(teacher_model=separate_models, peft_config=LoraConfig(**LORA), **options)
        for name, parameter in separate.model.named_parameters():
            parameter.data.copy_(start[name])
        separate.train()
        torch.testing.assert_close(torch.tensor(shared.losses), torch.tensor(separate.losses), rtol=0, atol=1e-5)
        for name, gradient in separate.grads.items():
            torch.testing.assert_close(shared.grads[name], gradient, rtol=1e-4, atol=1e-5)
        if estimator == "sampled":
            mask = shared.seen["completion_mask"].bool()
            for name in ("gopd_teacher_logps", "gopd_reference_logps"):
                got, want = shared.seen[name][mask], separate.seen[name][mask]
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    def test_they_are_not_trained_or_saved_and_the_run_resumes(self, several, adapters, tmp_path, estimator):
        options = {
            "teacher_model": adapters,
            "peft_config": LoraConfig(**LORA),
            "gopd_estimator": estimator,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        trainer = several(max_steps=2, **options)
        start = {n: p.clone() for n, p in trainer.model.named_parameters() if ".teacher_model_" in n}
        trainer.train()
        assert start and all(torch.equal(trainer.model.get_parameter(n), p) for n, p in start.items())
        trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert trained and all(".default." in name for name in trained)
        checkpoint = tmp_path / "out" / "checkpoint-1"
        assert not list(checkpoint.glob("*/adapter_config.json"))
        resumed = several(max_steps=2, **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.losses == trainer.losses[1:]


class TestAdapterChoice:
    def test_dense_student_loads_it_with_its_base(self, make, adapters):
        trainer = make(teacher_model=str(adapters["math"]))
        assert isinstance(trainer.teachers[None], LocalScorer)
        trainer.train()

    def test_adapter_on_another_base_is_a_model_of_its_own(self, make, models, adapters):
        path = adapters["math"] / "adapter_config.json"
        path.write_text(path.read_text().replace(str(models / "student"), str(models / "base")))
        trainer = make(teacher_model=str(adapters["math"]), peft_config=LoraConfig(**LORA))
        assert isinstance(trainer.teachers[None], LocalScorer)

    def test_reference_by_adapter(self, make, adapters):
        trainer = make(ref_model=str(adapters["code"]), peft_config=LoraConfig(**LORA))
        assert trainer.references[None].adapter == "ref_model"
        trainer.train()

    def test_names_that_collide(self, several, prompts, adapters):
        ids = ["v1.0" if index % 2 else "v1_0" for index in range(16)]
        with pytest.raises(ValueError, match="already has one of that name.*Rename"):
            several(
                teacher_model={"v1.0": str(adapters["math"]), "v1_0": str(adapters["code"])},
                train_dataset=prompts.add_column("teacher_id", ids),
                peft_config=LoraConfig(**LORA),
            )

    def test_base_of_the_student_is_not_loaded_again(self, make, models):
        trainer = make(teacher_model=str(models / "student"), gopd_lambda=1.0, peft_config=LoraConfig(**LORA))
        assert isinstance(trainer.teachers[None], AdapterScorer) and trainer.teachers[None].adapter is None
        trainer.train()
        assert trainer.losses == [pytest.approx(0, abs=1e-6)]  # a fresh adapter changes nothing

    def test_a_base_in_memory_may_have_other_weights_than_its_name(self, make, models, adapters):
        student = get_peft_model(load(models / "student"), LoraConfig(**LORA))
        trainer = make(model=student, teacher_model=str(adapters["math"]), ref_model=str(models / "student"))
        assert isinstance(trainer.teachers[None], LocalScorer) and isinstance(trainer.references[None], LocalScorer)


class TestManifest:
    def checkpoint(self, several, tmp_path, **options):
        several(max_steps=2, save_strategy="steps", save_steps=1, **options).train()
        return tmp_path / "out" / "checkpoint-1"

    def test_same_models_resume(self, several, tmp_path):
        checkpoint = self.checkpoint(several, tmp_path)
        manifest = json.loads((checkpoint / "gopd_state.json").read_text())
        assert list(manifest["teachers"]) == ["math", "code"] and manifest["references"]["math"]["weights"]
        several(max_steps=2).train(resume_from_checkpoint=True)

    def test_another_teacher_is_refused(self, several, models, tmp_path):
        checkpoint = self.checkpoint(several, tmp_path)
        other = several(teacher_model={"math": str(models / "base"), "code": str(models / "base")})
        with pytest.raises(ValueError, match=r"as 'math'.*Pass the same model"):
            other.train(resume_from_checkpoint=str(checkpoint))

    def test_other_ids_are_refused(self, several, models, routed, tmp_path):
        checkpoint = self.checkpoint(several, tmp_path)
        other = several(teacher_model=str(models / "teacher"))
        with pytest.raises(ValueError, match=r"the teachers \['math', 'code'\]"):
            other.train(resume_from_checkpoint=str(checkpoint))


class TestBadInput:
    def test_unknown_id(self, several, prompts):
        ids = [*IDS[:5], "law", *IDS[6:]]
        with pytest.raises(ValueError, match=r"`teacher_id` is 'law' in row 5 of `train_dataset`.*\['math', 'code'\]"):
            several(train_dataset=prompts.add_column("teacher_id", ids))

    def test_missing_id(self, several, prompts):
        with pytest.raises(ValueError, match="is None in row 3 of `eval_dataset`"):
            several(eval_dataset=prompts.add_column("teacher_id", [*IDS[:3], None, *IDS[4:]]))

    def test_missing_column(self, several, prompts):
        with pytest.raises(ValueError, match="needs a column `teacher_id`"):
            several(train_dataset=prompts)

    def test_one_of_several_evaluation_sets(self, several, prompts, routed):
        with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` needs a column"):
            several(eval_dataset={"a": routed, "b": prompts})

    def test_unknown_id_in_a_stream(self, several):
        rows = [{"prompt": "?", "teacher_id": "law"}] * 4
        stream = IterableDataset.from_generator(lambda: iter(rows))
        with pytest.raises(ValueError, match="`teacher_id` is 'law' in the row with the prompt"):
            several(train_dataset=stream).train()

    @pytest.mark.parametrize("value", ["1.5", -1.0, float("nan"), float("inf"), None])
    def test_lambda_that_is_none(self, make, prompts, value):
        values = [value] * 16
        with pytest.raises(ValueError, match="`lambda` must be a finite number >= 0, got .* in row 0"):
            make(train_dataset=prompts.add_column("lambda", values))

    def test_keys_of_the_references(self, several, models):
        with pytest.raises(ValueError, match="Give the same keys to both"):
            several(ref_model={"math": str(models / "base")})

    def test_references_by_id_for_one_teacher(self, make, models):
        with pytest.raises(ValueError, match="Give the same keys to both"):
            make(ref_model={"math": str(models / "base")})

    @pytest.mark.parametrize("name", ["gopd_lambda_by_teacher", "gopd_weight_by_teacher"])
    def test_option_for_an_unknown_teacher(self, several, name):
        with pytest.raises(ValueError, match=rf"`{name}` names \['law'\]"):
            several(**{name: {"law": 1.0}})
        with pytest.raises(ValueError, match=f"`{name}` must hold finite numbers"):
            several(**{name: {"math": -1.0}})

    @pytest.mark.parametrize("given", [{}, {1: "a"}, {"a/b": "c"}])
    def test_keys_of_the_teachers(self, several, given):
        with pytest.raises(TypeError, match="must map teacher ids"):
            several(teacher_model=given)

    def test_another_tokenizer_is_named_by_its_id(self, several, models, tmp_path):
        from tests.tiny import build_tokenizer

        other = build_tokenizer(("<|extra|>",))
        build_model(other, seed=1).save_pretrained(tmp_path / "other")
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=r"`teacher_model\['code'\]`.*another tokenizer"):
            several(teacher_model={"math": str(models / "teacher"), "code": str(tmp_path / "other")})

    @pytest.mark.parametrize(
        "options,message",
        [
            ({"gopd_score_batch_tokens": 0}, "`gopd_score_batch_tokens` must be at least 1, got 0. Use None"),
            ({"shard_frozen_models": True}, "`shard_frozen_models` shards .* launched without it .* ZeRO-2, or use"),
            (
                {"shard_frozen_models": True, "offload_frozen_models": True},
                "exclude each other: sharded models stay .* `offload_param`",
            ),
        ],
    )
    def test_how_models_are_forwarded(self, several, options, message):
        with pytest.raises(ValueError, match=message):
            several(**options)

    def test_offload_with_full(self, several):
        with pytest.raises(ValueError, match="heads of the frozen models in the loss"):
            several(offload_frozen_models=True, gopd_estimator="full")

    def test_lambda_without_a_reference(self, make):
        rows = [{"prompt": "?", "lambda": 2.0}] * 4
        stream = IterableDataset.from_generator(lambda: iter(rows))
        with pytest.raises(ValueError, match="no reference was loaded"):
            make(train_dataset=stream, gopd_lambda=1.0).train()


def test_single_teacher_ignores_the_column(make, routed):
    trainer = make(train_dataset=routed)
    trainer.train()
    assert trainer.seen["gopd_teacher_index"].sum() == 0
