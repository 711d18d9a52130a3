"""
What this package relies on in TRL. A failure names what moved, and the file of ours to adapt.
"""

import functools
import inspect

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_client import VLLMClient

from trl_gopd.gopd import _trl
from trl_gopd.gopd.config import GOPDConfig
from trl_gopd.gopd.frozen.answers import Asked


WHERE = f"moved in TRL {trl.__version__}; adapt trl_gopd/gopd/"


@pytest.mark.parametrize(
    ("method", "parameters", "file"),
    [
        ("_generate_and_score_completions", ["self", "inputs"], "trainer.py"),
        ("_compute_loss", ["self", "model", "inputs"], "trainer.py"),
        ("log", ["self", "logs", "start_time"], "trainer.py"),
        ("_run_epoch", ["self"], "trainer.py"),
        ("_load_best_model", ["self"], "trainer.py"),
        ("save_model", ["self", "output_dir", "_internal_call"], "trainer.py"),
    ],
)
def test_signatures(method, parameters, file):
    got = list(inspect.signature(getattr(GRPOTrainer, method)).parameters)
    assert got[: len(parameters)] == parameters, f"GRPOTrainer.{method} {WHERE}{file}"


def test_log_probabilities_are_asked_for_as_we_do():
    """Four arguments by position, which 1.14 does not name, and the rest by keyword."""
    signature = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
    bound = signature.bind("self", "model", "input_ids", "attention_mask", "logits_to_keep", batch_size=4)
    assert bound.arguments["batch_size"] == 4, f"`batch_size` {WHERE}trainer.py (`_student_logps`)"


def test_constructor_takes_our_keywords():
    names = set(inspect.signature(GRPOTrainer.__init__).parameters)
    ours = {
        *("model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks"),
        *("optimizers", "quantization_config", "peft_config", "tools"),
    }
    assert ours <= names, f"GRPOTrainer.__init__ lost {ours - names}: {WHERE}trainer.py"


@pytest.mark.parametrize("name", _trl.__all__)
def test_private_names_exist(name):
    assert hasattr(_trl, name), f"{name} {WHERE}_trl.py"


def test_grpo_still_refuses_one_generation(tmp_path):
    """If it stops doing so, `allow_one_generation` is dead code."""
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(str(tmp_path), num_generations=1, use_cpu=True, bf16=False)


class Probe(GRPOTrainer):
    """Records what it sees, and replaces the advantages by `(B, T)` ones."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.keys = set(output)
        return output

    def _compute_loss(self, model, inputs):
        self.inputs = inputs = dict(inputs)
        loss = super()._compute_loss(model, inputs)
        self.loss = loss.item()
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        results = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.arity, self.positional = len(results), len(args)
        if hasattr(self, "inputs"):
            gen = torch.Generator().manual_seed(0)
            self.advantages = torch.randn(results[0].shape, generator=gen)
            self.inputs["advantages"] = self.advantages
        return results


def null_reward(completions, **kwargs):
    return [0.0] * len(completions)


def load_model(models, eos_token_id):
    model = AutoModelForCausalLM.from_pretrained(models / "student")
    model.generation_config.eos_token_id = eos_token_id
    return model


@pytest.fixture
def probe(models, tmp_path, prompts, tokenizer):
    args = GRPOConfig(
        str(tmp_path),
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=8,
        max_steps=1,
        loss_type="grpo",
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    probe = Probe(
        model=str(models / "student"),
        reward_funcs=null_reward,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    probe.train()
    return probe


def test_advantages_are_read_after_the_log_probabilities(probe):
    """Set while log-probabilities are computed, they are the ones in the loss: loss = −mean A of each row's tokens."""
    mask = probe.inputs["completion_mask"]
    want = -((probe.advantages * mask).sum(1) / mask.sum(1)).mean().item()
    assert probe.loss == pytest.approx(want, rel=1e-5), f"order of calls in `_compute_loss` {WHERE}trainer.py"


def test_arity_and_arguments(probe):
    assert probe.arity == 3, f"returns of `_get_per_token_logps_and_entropies` {WHERE}trainer.py"
    assert probe.positional == 4, f"positional arguments in `_compute_loss` {WHERE}trainer.py (`_full`)"


def test_log_probabilities_in_parts_are_those_of_the_model(probe):
    inputs = probe.inputs
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    num_tokens, mask = inputs["completion_ids"].size(1), inputs["completion_mask"].bool()
    ask = functools.partial(GRPOTrainer._get_per_token_logps_and_entropies, probe, probe.model)
    with torch.no_grad():
        got, *_ = ask(ids, seen, num_tokens, batch_size=1)
        outputs = [probe.model(input_ids=i[None], attention_mask=m[None]) for i, m in zip(ids, seen, strict=True)]
    logits = torch.cat([output.logits for output in outputs])[:, -num_tokens - 1 : -1]
    want = logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    # A sum over the vocabulary in another order: one rounding a term.
    tolerance = logits.size(-1) * torch.finfo(torch.float32).eps * logits.abs().max().item()
    assert (got - want)[mask].abs().max() < tolerance, f"what `_get_per_token_logps_and_entropies` returns {WHERE}"


@pytest.mark.parametrize("declared", [None, [2], [2, 7]])
def test_ids_that_end_a_completion(declared, models, tmp_path, prompts, tokenizer):
    """The same for us as for TRL's generation, whatever the model declares."""
    model = load_model(models, declared)
    args = GRPOConfig(str(tmp_path), num_generations=2, use_cpu=True, bf16=False, report_to="none")
    probe = GRPOTrainer(model, null_reward, args=args, train_dataset=prompts, processing_class=tokenizer)
    theirs = probe.generation_config.eos_token_id
    want = {theirs} if isinstance(theirs, int) else set(theirs)
    assert set(_trl.eos_token_ids(probe)) == want, f"`eos_token_ids` {WHERE}_trl.py"
    assert tokenizer.eos_token_id in want


def test_keys_of_a_generation_batch(probe):
    ours = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}
    assert ours <= probe.keys, f"keys {ours - probe.keys} of a generation batch {WHERE}trainer.py"


def test_metrics_and_logs_that_are_cleaned(probe):
    logged = probe.state.log_history[0]
    for name in ("reward", "reward_std", "frac_reward_zero_std"):
        assert name in logged, f"metric {name} {WHERE}trainer.py (`_drop_null_reward`)"
    assert {"rewards", "advantages"} <= set(probe._logs), f"`_logs` {WHERE}trainer.py"


def test_gopd_config_adds_no_field_of_grpo():
    """A field of ours that GRPO gains later would change meaning without a word."""
    from dataclasses import fields

    grpo = {field.name for field in fields(GRPOConfig)}
    own = {name for name in GOPDConfig.__annotations__ if name.startswith(("gopd_", "teacher_", "ref_model_"))}
    assert not {name for name in own if name in grpo}, f"fields of GRPOConfig {WHERE}config.py"


@pytest.mark.parametrize("top", [1, 2])
def test_a_server_is_asked_and_read_as_by_the_client_of_trl(top):
    sequences, prompt_lengths = [[3, 5, 7], [4, 6]], [1, 1]
    entry = {"decoded_token": "?", "rank": 1}
    choices = [
        {"index": 0, "prompt_logprobs": [None, {"5": {"logprob": -0.5, **entry}}, {"7": {"logprob": -2.0, **entry}}]},
        {"index": 1, "prompt_logprobs": [None, {"6": {"logprob": -0.25, **entry}, "9": {"logprob": -1.5, **entry}}]},
    ]
    theirs, payloads = object.__new__(VLLMClient), []
    theirs.base_url, theirs.model = "http://server", "model"

    def post(url, json):
        assert url == "http://server/v1/completions"
        payloads.append(json)
        return {"choices": choices}

    theirs._post = post
    answer = theirs.get_sequence_logprobs(sequences, prompt_lengths, top_logprobs=top, temperature=0.5)
    ours = Asked("model", sequences, [2, 1], [0, 1], temperature=0.5, top=top)
    got = ours.read({"choices": choices})
    assert payloads[0] == {key: ours.payload[key] for key in payloads[0]}, f"fields of a request {WHERE}answers.py"
    want = [[value for (value,) in row] for row in answer["actual_logprobs"]]
    read = [[by_id[i] for i, by_id in zip(ids[1:], row, strict=True)] for ids, row in zip(sequences, got, strict=True)]
    assert read == want == [[-0.5, -2.0], [-0.25]], f"fields of an answer {WHERE}answers.py"
