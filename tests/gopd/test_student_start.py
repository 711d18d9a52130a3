"""
The default reference of a student with an adapter is the student before training, exactly, whatever kind of adapter
it is: the sampled tokens' log-probabilities under it, and whole distributions, are those of a copy made at the start.

The tolerance is that of `Recording`'s comparisons elsewhere: log-probabilities are sums of some hundred float32 terms
of magnitude below 10, computed with and without padding.
"""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.gopd.harness import load, log_probs, read
from tests.tiny import LORA, build_model
from trl_gopd.gopd.frozen.adapter import AdapterScorer, fits_student, is_fresh_adapter
from trl_gopd.gopd.frozen.local import LocalScorer


ATOL = 1e-5
# Each moves the student by more than this in the steps below, or the reference could not be told from the student.
MOVED = 10 * ATOL
ATTENTION = ["q_proj", "v_proj"]


def lora(**options):
    return LoraConfig(**{**LORA, **options})


# By name, and whether the start is the student without the adapter.
KINDS = {
    "lora": (lora(), True),
    "lora-gaussian": (lora(init_lora_weights="gaussian"), True),
    "lora-random": (lora(init_lora_weights=False), False),
    "lora-orthogonal": (lora(init_lora_weights="orthogonal"), False),
    "pissa": (lora(init_lora_weights="pissa"), False),
    "pissa-niter": (lora(init_lora_weights="pissa_niter_4"), False),
    "olora": (lora(init_lora_weights="olora"), False),
    "rslora": (lora(use_rslora=True), True),
    "dora": (lora(use_dora=True), False),
    "lora-bias": (lora(lora_bias=True), True),
    "bias-all": (lora(bias="all"), False),
    "head": (lora(modules_to_save=["lm_head"]), True),
    "embedding": (lora(modules_to_save=["embed_tokens"]), True),
    "norms": (lora(modules_to_save=["norm", "input_layernorm"]), True),
    "lora-on-embedding": (lora(target_modules=["embed_tokens", "q_proj"]), True),
    "tokens": (lora(trainable_token_indices=list(range(3, 200))), False),
    "adalora": (peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=ATTENTION), False),
    "ia3": (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), False),
    "tokens-alone": (
        peft.TrainableTokensConfig(token_indices=[*range(3, 200)], target_modules=["embed_tokens"]),
        False,
    ),
    "vera": (peft.VeraConfig(r=4, d_initial=1.0, target_modules=["q_proj"]), False),
    "loha": (peft.LoHaConfig(r=4, target_modules=ATTENTION), False),
    "lokr": (peft.LoKrConfig(r=4, target_modules=ATTENTION), False),
    "oft": (peft.OFTConfig(oft_block_size=4, r=0, target_modules=ATTENTION), False),
    "boft": (peft.BOFTConfig(boft_block_size=4, target_modules=ATTENTION), False),
    "hra": (peft.HRAConfig(r=4, target_modules=ATTENTION), False),
    "fourierft": (peft.FourierFTConfig(n_frequency=20, target_modules=ATTENTION), False),
    "vblora": (peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, target_modules=ATTENTION), False),
    "randlora": (peft.RandLoraConfig(r=4, target_modules=["q_proj"]), False),
    "shira": (peft.ShiraConfig(r=2, target_modules=ATTENTION), False),
    "miss": (peft.MissConfig(r=4, target_modules=ATTENTION), False),
    "norm-tuning": (peft.LNTuningConfig(target_modules=["input_layernorm"]), False),
    "osf": (peft.OSFConfig(target_modules=ATTENTION), False),
}
# These are the same to the code as the others.
RARE = {"hra", "fourierft", "vblora", "randlora", "shira", "miss", "norm-tuning", "osf", "tokens-alone"}


def config_of(kind):
    config = copy.deepcopy(KINDS[kind][0])
    config.task_type = "CAUSAL_LM"
    return config


@pytest.fixture(scope="module", autouse=True)
def students(models, tokenizer):
    """Folders of a student with biases, of one whose head is its embedding, and of one that 4 bits have blocks for."""
    for name, options in (
        ("biased", {"attention_bias": True, "mlp_bias": True}),
        ("tied", {"tie_word_embeddings": True}),
        ("wide", {"hidden_size": 64}),
    ):
        build_model(tokenizer, seed=4, **options).save_pretrained(models / name)
        tokenizer.save_pretrained(models / name)


def student_for(kind, models):
    return models / ("biased" if kind == "bias-all" else "student")


def adapted(kind, models, *, trained):
    """The student as a PEFT model in memory."""
    torch.manual_seed(0)
    model = get_peft_model(load(student_for(kind, models)), config_of(kind))
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def batch():
    ids = torch.arange(3, 27).view(2, 12)
    return ids, torch.ones_like(ids), ids[:, -6:]


@torch.no_grad()
def logps(model):
    """Log-probabilities of the batch's completions, from the model's own logits in evaluation mode."""
    ids, mask, labels = batch()
    training = model.training
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits.float()
    model.train(training)
    return logits[:, -7:-1].log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def assert_start(trainer, start):
    torch.testing.assert_close(trainer.references[None].score(read(*batch())), start, rtol=0, atol=ATOL)


@pytest.fixture
def build(make, models):
    """Builds a trainer, whose student moves, and the log-probabilities of its student at the start."""

    def build(kind, *, given="config", **options):
        options = {"max_steps": 2, "learning_rate": 10.0 if kind == "adalora" else 1.0, "temperature": 1.0, **options}
        if given == "config":
            trainer = make(model=str(student_for(kind, models)), peft_config=config_of(kind), **options)
            return trainer, logps(trainer.model)
        model = adapted(kind, models, trained=given == "trained")
        start = logps(model)
        return make(model=model, **options), start

    return build


class TestKinds:
    @pytest.mark.parametrize(
        "kind,given,beta",
        [(kind, "config", 0.0) for kind in KINDS if kind not in RARE]
        + [(kind, "trained", 0.1) for kind in KINDS]
        + [(kind, given, beta) for kind in ("lora", "pissa") for given, beta in (("config", 0.1), ("trained", 0.0))],
    )
    def test_reference_is_the_start(self, build, kind, given, beta):
        trainer, start = build(kind, given=given, beta=beta)
        assert torch.equal(logps(trainer.model), start)  # building changes nothing
        assert (trainer.references[None].start is None) is (given == "config" and KINDS[kind][1])
        assert_start(trainer, start)
        trainer.train()
        assert (logps(trainer.model) - start).abs().max() > MOVED
        assert_start(trainer, start)
        if beta:  # the anchor of GRPO's KL penalty
            mask = trainer.seen["completion_mask"].bool()
            anchor, reference = trainer.seen["ref_per_token_logps"], trainer.seen["gopd_reference_logps"]
            torch.testing.assert_close(anchor[mask], reference[mask], rtol=0, atol=ATOL)


class TestFresh:
    @pytest.mark.parametrize(
        "changed", ["up_proj.lora_B.default", "embed_tokens.lora_embedding_A", "norm.modules_to_save.default"]
    )
    def test_any_change_ends_it(self, models, changed):
        config = lora(target_modules=["embed_tokens", "up_proj"], modules_to_save=["norm"])
        model = get_peft_model(load(models / "student"), config)
        assert is_fresh_adapter(model)
        parameter = next(p for name, p in model.named_parameters() if changed in name)
        parameter.data.view(-1)[-1] += 1
        assert not is_fresh_adapter(model)


class TestHeads:
    """The head is applied inside the student's forward and backward passes, where the student is itself again."""

    @pytest.mark.parametrize("estimator", ["full", "stratified"])
    @pytest.mark.parametrize(
        "kind,given", [("head", "fresh"), ("head", "trained"), ("pissa", "fresh"), ("ia3", "trained")]
    )
    def test_distributions_are_those_of_the_start(self, make, models, monkeypatch, estimator, kind, given):
        model = adapted(kind, models, trained=given == "trained")
        start, seen = copy.deepcopy(model), []
        logits = AdapterScorer.logits

        def keep(self, hidden):
            seen.append(logits(self, hidden))
            return seen[-1]

        monkeypatch.setattr(AdapterScorer, "logits", keep)
        trainer = make(model=model, gopd_estimator=estimator, max_steps=3, learning_rate=1.0, gopd_top_k=4)
        trainer.train()
        mask = trainer.seen["completion_mask"].bool()
        want = log_probs(start, trainer.seen)[mask]
        last = [part for part in seen if part.size(0) == len(want)]
        calls = 2 if estimator == "full" else 1  # the backward pass of "stratified" needs no logits
        assert len(last) >= calls
        for part in last[-calls:]:
            torch.testing.assert_close(part.log_softmax(-1), want, rtol=0, atol=ATOL)
        assert (log_probs(trainer.model, trainer.seen)[mask] - want).abs().max() > MOVED

    @pytest.fixture
    def expert(self, models, tmp_path):
        """Folder of a trained adapter on the student, and the model that it makes."""
        folder = tmp_path / "expert"
        model = adapted("lora", models, trained=True)
        model.save_pretrained(folder)
        return folder, model.merge_and_unload()

    def test_adapter_as_teacher_has_the_head_of_the_base(self, make, models, expert):
        folder, dense = expert
        options = {"peft_config": config_of("head"), "teacher_model": str(folder), "learning_rate": 1.0}
        trainer = make(**options, max_steps=3, gopd_lambda=1.0)
        assert isinstance(trainer.teachers[None], AdapterScorer)
        trainer.train()
        head = trainer.model.get_output_embeddings()
        assert (head.modules_to_save["default"].weight - head.original_module.weight).abs().max() > MOVED
        torch.testing.assert_close(trainer.teachers[None].score(read(*batch())), logps(dense), rtol=0, atol=2 * ATOL)

    @pytest.mark.parametrize("kind", ["pissa", "ia3", "bias-all"])
    def test_base_that_is_not_kept_is_not_shared(self, make, models, kind):
        path = str(student_for(kind, models))
        trainer = make(model=path, teacher_model=path, peft_config=config_of(kind), gopd_lambda=1.0)
        assert isinstance(trainer.teachers[None], LocalScorer)
        torch.testing.assert_close(trainer.teachers[None].score(read(*batch())), logps(load(path)), rtol=0, atol=ATOL)


class TestAdapterChoice:
    @pytest.mark.parametrize(
        "options",
        [
            {"init_lora_weights": "pissa"},
            {"bias": "all"},
            {"modules_to_save": ["norm"]},
            {"trainable_token_indices": [3, 4]},
            {"target_modules": r".*(q_proj|lm_head)"},
        ],
        ids=str,
    )
    def test_what_changes_more_than_itself_is_a_model_of_its_own(self, models, tmp_path, options):
        get_peft_model(load(models / "student"), lora(**options)).save_pretrained(tmp_path)
        student = get_peft_model(load(models / "student"), config_of("lora"))
        assert not fits_student(str(tmp_path), student, None)
        get_peft_model(load(models / "student"), lora()).save_pretrained(tmp_path)
        assert fits_student(str(tmp_path), student, None)


class TestState:
    def test_dropout_and_checkpointing_come_back(self, make, models):
        model = get_peft_model(load(models / "student"), lora(init_lora_weights=False, lora_dropout=0.5))
        start = logps(model)
        trainer = make(model=model, max_steps=2, learning_rate=1.0, temperature=1.0, gradient_checkpointing=True)
        trainer.train()
        assert_start(trainer, start)
        assert trainer.model.training and trainer.model.base_model.model.is_gradient_checkpointing
        layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj
        assert layer.lora_dropout["default"].training
        now = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
        with pytest.raises(RuntimeError, match="boom"), trainer.references[None].switched():
            assert not torch.equal(
                layer.lora_B["default"].weight,
                now["base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"],
            )
            raise RuntimeError("boom")
        assert all(torch.equal(parameter, now[name]) for name, parameter in trainer.model.named_parameters())
        assert layer.lora_dropout["default"].training

    def test_start_follows_a_cast(self, make):
        trainer = make(peft_config=config_of("lora-random"))
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"
        start = trainer.model.get_parameter(name).clone()
        trainer.model.to(torch.bfloat16).get_parameter(name).data.zero_()
        with trainer._kept_start.restored(trainer.model):
            assert torch.equal(trainer.model.get_parameter(name), start.bfloat16())
        assert not trainer.model.get_parameter(name).any()

    def test_no_copy_where_the_adapter_can_be_switched_off(self, make):
        assert make(peft_config=config_of("head"))._kept_start is None
        assert make(peft_config=config_of("pissa"), gopd_lambda=1.0)._kept_start is None


class TestResume:
    def run(self, make, kind, seed, **options):
        """TRL seeds the initialisation of `peft_config` with that of the run."""
        options = {"learning_rate": 1.0, "temperature": 1.0, "save_strategy": "steps", "save_steps": 1, **options}
        trainer = make(peft_config=config_of(kind), seed=seed, **options)
        return trainer, logps(trainer.model)

    # The first draws its start anew, the second computes it from the weights, the third is drawn but is the base.
    @pytest.mark.parametrize("kind", ["lora-random", "pissa", "loha"])
    def test_reference_is_the_start_of_the_first_run(self, make, tmp_path, kind):
        first, start = self.run(make, kind, seed=0, max_steps=2)
        first.train()
        second, own = self.run(make, kind, seed=1, max_steps=3)
        assert torch.equal(own, start) is (kind != "lora-random")  # the same seed would give the same start
        second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert second.state.global_step == 3
        assert_start(second, start)
        assert (logps(second.model) - start).abs().max() > MOVED

    def test_other_weights_under_the_adapter_are_refused(self, make, tmp_path):
        self.run(make, "pissa-niter", seed=0)[0].train()
        again, _ = self.run(make, "pissa-niter", seed=1)
        with pytest.raises(ValueError, match="was trained with .* among its references.*Pass the same model"):
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))

    def test_checkpoint_without_the_start(self, make, tmp_path):
        self.run(make, "pissa", seed=0)[0].train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        again, _ = self.run(make, "lora-random", seed=0)
        start = dict(again._kept_start._tensors)
        other = peft.LoraConfig(**{**LORA, "r": 2}, init_lora_weights=False)
        with pytest.raises(
            ValueError, match=r"has the shape \(4, 32\) there and \(2, 32\) in this run.*Pass the student"
        ):
            make(peft_config=other).train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / "gopd_start.safetensors").unlink()
        with pytest.raises(ValueError, match="is not whole: gopd_start.safetensors is missing"):
            again.train(resume_from_checkpoint=str(checkpoint))
        assert again._kept_start._tensors == start


class TestRefused:
    @pytest.mark.parametrize(
        "config",
        [
            peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        ],
        ids=lambda config: config.peft_type.value,
    )
    def test_prompt_learning(self, make, config):
        with pytest.raises(ValueError, match=f"{config.peft_type.value}.*cannot be scored exactly.*pass `ref_model`"):
            make(peft_config=config)
        make(peft_config=config, gopd_lambda=1.0)

    def test_tokens_of_a_tied_head(self, make, models):
        with pytest.raises(ValueError, match="TrainableTokensWrapper.*Untie the head, or train it whole"):
            make(model=str(models / "tied"), peft_config=config_of("tokens"))

    def test_weights_on_a_disk(self, make):
        trainer = make(peft_config=config_of("pissa"))
        next(p for p in trainer.model.parameters() if p.requires_grad).ds_tensor = torch.empty(0)
        with pytest.raises(ValueError, match="ZeRO\\+\\+ or with parameters on NVMe.*pass `ref_model`"):
            trainer.references[None].score(read(*batch()))

    def test_anchor_that_is_taken(self, make, models):
        model = adapted("lora", models, trained=True)
        model.add_adapter("ref", lora())
        with pytest.raises(ValueError, match="an adapter named 'ref'.*Rename it, or use `beta=0`"):
            make(model=model, beta=0.1)
        make(model=model)


class TestFourBits:
    """bitsandbytes asks once, when a layer is built, whether the CPU has the kernel that has no gradient."""

    @pytest.fixture
    def student(self, models, monkeypatch):
        modules = pytest.importorskip("bitsandbytes.nn.modules")

        def load(has_kernel):
            monkeypatch.setattr(modules, "has_avx512bf16", lambda: has_kernel)
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            model = AutoModelForCausalLM.from_pretrained(
                models / "wide", quantization_config=config, dtype=torch.float32
            )
            return get_peft_model(model, config_of("lora"))

        return load

    def test_kernel_without_gradient_is_refused(self, make, models, student):
        with pytest.raises(ValueError, match="support_avx512bf16_for_cpu = False.*8 bits.*`gopd_lambda=1`"):
            make(model=student(True))
        make(model=student(True), gopd_lambda=1.0)
        make(model=student(True), ref_model=str(models / "base"))

    @pytest.mark.parametrize("has_kernel", [False, True])
    def test_without_the_kernel_all_layers_learn(self, make, student, has_kernel):
        model = student(has_kernel)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        trainer = make(model=model, max_steps=2)
        trainer.train()
        grads = [grad for name, grad in trainer.grads.items() if "lora_" in name]
        assert len(grads) == 12 and all(grad.abs().max() > 0 for grad in grads)

    def test_packed_weights_are_refused(self, make, student):
        model = student(True)
        layer = model.base_model.model.model.layers[0].self_attn.k_proj
        layer.weight.quant_state.packing_format_for_cpu = True  # as the first evaluation leaves it
        with pytest.raises(ValueError, match="bitsandbytes has packed its weights"):
            make(model=model, gopd_lambda=1.0)
