"""What a trainer refuses before it samples anything, and what it refuses in a batch before anything is scored."""

import copy
import functools
import re

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, IterableDataset, Value

from tests.gopd.test_head import build, changed
from trl_gopd.gopd.checks import check_arguments, check_dataset, check_rows, check_student, check_token_ids
from trl_gopd.gopd.config import GOPDConfig
from trl_gopd.gopd.trainer import GOPDTrainer


def student(family, **options):
    from trl.trainer.utils import add_fused_lm_head

    model = build(family, torch.bfloat16)
    add_fused_lm_head(model, **options)
    return model


ALONE = Accelerator(cpu=True)


class TestStudent:
    @pytest.fixture
    def args(self, tmp_path):
        return lambda **options: GOPDConfig(str(tmp_path), use_cpu=True, bf16=False, **options)

    @pytest.mark.parametrize("estimator", ["sampled", "full", "stratified"])
    @pytest.mark.parametrize("family", ["llama", "cohere", "gemma2"])
    def test_families(self, args, family, estimator):
        check_student(
            student(family, temperature=0.7),
            args(gopd_estimator=estimator, temperature=0.7),
            needs_start=False,
            accelerator=ALONE,
        )

    @pytest.mark.parametrize("estimator", ["full", "stratified"])
    def test_refuses_a_head_that_cannot_be_applied_in_chunks(self, args, estimator):
        model = student("llama")
        with pytest.raises(ValueError, match=r"logits of `model` \(LlamaForCausalLM\).*1\.3 times"):
            check_student(
                changed(model, lambda logits: 1.3 * logits),
                args(gopd_estimator=estimator),
                needs_start=False,
                accelerator=ALONE,
            )

    def test_a_family_that_trl_does_not_know(self, args):
        """TRL's forward of the student leaves out the soft cap of RecurrentGemma, which ours has."""
        check_student(student("recurrent_gemma"), args(gopd_estimator="full"), needs_start=False, accelerator=ALONE)
        with pytest.raises(ValueError, match="TRL computes other log-probabilities.*Use `gopd_estimator='full'`"):
            check_student(student("recurrent_gemma"), args(), needs_start=False, accelerator=ALONE)

    def test_leaves_the_student_as_it_was(self, args):
        model = student("llama").train()
        model.model.layers[0].eval()
        before = copy.deepcopy(model.state_dict())
        check_student(model, args(gopd_estimator="stratified"), needs_start=False, accelerator=ALONE)
        assert model.training and not model.model.layers[0].training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


class SimpleDataset(list):
    """Rows whose prompts may be of any type, which those of Arrow may not."""

    column_names = ["prompt"]

    def __getitem__(self, column):
        return [row[column] for row in self]


class TestRows:
    @pytest.mark.parametrize("value", [None, [], 7])
    def test_data_set(self, value):
        rows = SimpleDataset([{"prompt": "a"}, {"prompt": value}])
        with pytest.raises(
            ValueError, match=f"list of messages, got {re.escape(repr(value))} in row 1 of `eval_dataset"
        ):
            check_dataset(rows, "eval_dataset", needs_prompts=True)

    def test_batch_of_a_stream(self, make):
        rows = [{"prompt": "Name a prime."}, {"prompt": None}] * 2
        stream = IterableDataset.from_generator(lambda: iter(rows), features=Features({"prompt": Value("string")}))
        with pytest.raises(ValueError, match=r"got None in row \d of the batch"):
            make(train_dataset=stream).train()

    def test_an_environment_may_give_the_prompt(self):
        check_rows([{"environment": "x"}])
        check_dataset(Dataset.from_dict({"environment": ["x"]}), "train_dataset", needs_prompts=False)

    def test_prompt_without_tokens(self, make):
        rows = Dataset.from_dict({"prompt": ["Name a prime.", ""] * 2})
        with pytest.raises(ValueError, match=r"prompt of row \d of the batch \(''\) has no tokens"):
            make(cls=GOPDTrainer, train_dataset=rows).train()


class TestCompletions:
    @pytest.mark.parametrize(
        ("ids", "message"), [([], "has no tokens.*the end of the answer"), ([5, 999], "has the token id 999, and the")]
    )
    def test_of_a_rollout_function(self, make, tokenizer, monkeypatch, ids, message):
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

        def rollouts(prompts, trainer):
            prompt_ids = tokenizer(text=prompts)["input_ids"]
            return {"prompt_ids": prompt_ids, "completion_ids": [ids] * len(prompts), "logprobs": None}

        with pytest.raises(ValueError, match=rf"completion of row 0 of the batch \('What is.*{message}"):
            make(cls=functools.partial(GOPDTrainer, rollout_func=rollouts)).train()

    @pytest.mark.parametrize("index", [259, 10**9])
    def test_stored_ids_that_the_student_lacks(self, make, prompts, index):
        rows = prompts.add_column("completion_ids", [[5, index, 2]] * len(prompts))
        with pytest.raises(ValueError, match=f"has the token id {index}, and the student has ids below 259"):
            make(cls=GOPDTrainer, train_dataset=rows, use_stored_completions=True).train()

    def test_turns_of_tools_may_be_others_in_number(self):
        config = build("llama").config
        with pytest.raises(ValueError, match="The completion of row 1 of the batch has no tokens"):
            check_token_ids("completion", [[1], []], [{"prompt": "a"}], config)


def test_mapped_ends_and_tools(tmp_path):
    args = GOPDConfig(str(tmp_path), use_cpu=True, bf16=False, gopd_eos_mismatch="map")
    check_arguments(args, uses_tools=False)
    with pytest.raises(ValueError, match="`gopd_eos_mismatch='map'` .* with tools"):
        check_arguments(args, uses_tools=True)


TEXT = {"role": "user", "content": "x"}


class TestPrompts:
    @pytest.mark.parametrize(
        "prompt",
        [
            "x",
            "\x00\x1b\u2028 \U0001f600",
            [TEXT],
            [{**TEXT, "content": [{"type": "text", "text": "x"}]}],
            [TEXT, {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}],
            [{**TEXT, "content": ""}],
        ],
    )
    def test_what_is_one(self, prompt):
        check_rows([{"prompt": prompt}])

    @pytest.mark.parametrize(
        ("prompt", "reason"),
        [
            (None, "neither a string nor a list of at least one message"),
            ([], "neither a string nor a list of at least one message"),
            (("x",), "neither a string"),
            (["a", "b"], "message 0 is no dictionary with a `role`"),
            ([1, 2], "message 0 is no dictionary with a `role`"),
            ([TEXT, {}], "message 1 is no dictionary with a `role`"),
            ([[TEXT]], "message 0 is no dictionary with a `role`"),
            ([{"role": 3, "content": "x"}], "message 0 is no dictionary with a `role`"),
            ([{"role": "user", "content": None}], "the `content` of message 0 is no text"),
            ([{"role": "user", "content": 5}], "the `content` of message 0 is no text"),
            ([{"role": "user", "content": [{"type": "image"}]}], "the `content` of message 0 is no text"),
            ("ab\ud800", "character 2 is a half of a character"),
            ([{"role": "user", "content": "\udfff"}], "character 0 is a half of a character"),
        ],
    )
    def test_what_is_none(self, prompt, reason):
        with pytest.raises(ValueError, match=f"in row 1 of the batch: .*{reason}.* Correct the row, or leave it out"):
            check_rows([{"prompt": "x"}, {"prompt": prompt}])

    def test_strings_among_messages(self):
        with pytest.raises(
            ValueError, match=r"`prompt` is 'x' in row 1 of the batch and \[.* in row 0. Give all rows"
        ):
            check_rows([{"prompt": [TEXT]}, {"prompt": "x"}])
