"""
A teacher that reads another prompt than the student scores the same completion, position by position: its numbers are
those of each row alone, without padding.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.gopd.harness import load, log_probs
from tests.gopd.test_contexts import Model, batch_of
from trl_gopd.gopd._trl import tools_of_rows
from trl_gopd.gopd.batch import Batch
from trl_gopd.gopd.contexts import Contexts
from trl_gopd.gopd.prompts import TeacherPrompts


def solved(row):
    """Prompts of very different lengths, so that padding matters."""
    number = int("".join(filter(str.isdigit, row["prompt"]))[:2])
    return row["prompt"] + " The solution is" + " ha" * (number % 9) + "."


def seen_by_teacher(inputs):
    return {
        **inputs,
        "prompt_ids": inputs["gopd_teacher_prompt_ids"],
        "prompt_mask": inputs["gopd_teacher_prompt_mask"],
    }


def picked(model, inputs):
    return log_probs(model, inputs).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)


def decoded(tokenizer, inputs):
    rows = zip(inputs["gopd_teacher_prompt_ids"], inputs["gopd_teacher_prompt_mask"], strict=True)
    return [tokenizer.decode(ids[mask.bool()]) for ids, mask in rows]


class TestAlignment:
    @pytest.fixture(params=["function", "column"])
    def options(self, request, prompts):
        if request.param == "function":
            return {"teacher_prompt": solved, "train_dataset": prompts}
        return {"train_dataset": prompts.add_column("teacher_prompt", [solved(row) for row in prompts])}

    @pytest.mark.parametrize("multiple", [None, 8])
    def test_scores_are_those_of_each_row_alone(self, make, models, tokenizer, options, multiple):
        """Without padding, that is, however much of it the batch has on either side."""
        padding = {"pad_to_multiple_of": multiple}
        trainer = make(ref_model=str(models / "base"), per_device_train_batch_size=8, **padding, **options)
        trainer.train()
        seen = trainer.seen
        assert len(set(seen["gopd_teacher_prompt_mask"].sum(1).tolist())) > 2
        assert all("The solution is" in text for text in decoded(tokenizer, seen))
        mask = seen["completion_mask"].bool()
        with torch.no_grad():
            teacher = picked(load(models / "teacher"), seen_by_teacher(seen))
            reference = picked(load(models / "base"), seen)
            without = picked(load(models / "teacher"), seen)
        torch.testing.assert_close(seen["gopd_teacher_logps"][mask], teacher[mask], rtol=0, atol=1e-5)
        torch.testing.assert_close(seen["gopd_reference_logps"][mask], reference[mask], rtol=0, atol=1e-5)
        assert (without[mask] - teacher[mask]).abs().max() > 0.05  # the prompt matters

    def test_full_estimator_has_the_expected_gradient_of_the_sampled_one(self, make, models, options):
        trainer = make(gopd_estimator="full", per_device_train_batch_size=4, **options)
        trainer.train()
        seen, student = trainer.seen, load(models / "student")
        with torch.no_grad():
            log_t = log_probs(load(models / "teacher"), seen_by_teacher(seen))
            log_r = log_probs(load(models / "student"), seen)
        log_s, mask = log_probs(student, seen), seen["completion_mask"].float()
        log_q = (1.25 * log_t - 0.25 * log_r).log_softmax(-1)
        token = (log_s.exp() * (log_s - log_q)).sum(-1)
        loss = ((token * mask).sum(1) / mask.sum(1)).mean()
        named = dict(student.named_parameters())
        want = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        norm = torch.stack([g.norm() for g in want.values()]).norm()
        gap = torch.stack([(trainer.grads[n] - want[n]).norm() for n in want]).norm()
        assert gap / norm < 1e-5

    def test_without_the_context_as_its_reference(self, make, models):
        """With the teacher itself as reference, the reward is what the context tells about the completion."""
        trainer = make(teacher_prompt=solved, ref_model=str(models / "teacher"))
        assert trainer.references[None] is trainer.teachers[None]
        trainer.train()
        seen, mask = trainer.seen, trainer.seen["completion_mask"].bool()
        with torch.no_grad():
            teacher = load(models / "teacher")
            want = picked(teacher, seen_by_teacher(seen)) - picked(teacher, seen)
        got = seen["gopd_teacher_logps"] - seen["gopd_reference_logps"]
        torch.testing.assert_close(got[mask], want[mask], rtol=0, atol=2e-5)

    def test_only_some_rows(self, make, models, prompts, tokenizer):
        column = [solved(row) if index % 2 else None for index, row in enumerate(prompts)]
        trainer = make(train_dataset=prompts.add_column("teacher_prompt", column), per_device_train_batch_size=8)
        trainer.train()
        texts = decoded(tokenizer, trainer.seen)
        assert 0 < sum("solution" in text for text in texts) < 8
        mask = trainer.seen["completion_mask"].bool()
        with torch.no_grad():
            want = picked(load(models / "teacher"), seen_by_teacher(trainer.seen))
        torch.testing.assert_close(trainer.seen["gopd_teacher_logps"][mask], want[mask], rtol=0, atol=1e-5)

    def test_reuse_and_accumulation(self, make):
        options = {"teacher_prompt": solved, "gopd_lambda": 1.0}
        whole = make(per_device_train_batch_size=8, **options)
        parts = make(per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
        whole.train()
        parts.train()
        for name, gradient in whole.grads.items():
            torch.testing.assert_close(parts.grads[name], gradient, rtol=1e-4, atol=1e-6)

    def test_answers_of_tools_are_seen_and_not_trained_on(self):
        completion_mask, tool_mask = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, 0, 1, 1]])
        inputs = {
            "prompt_ids": torch.tensor([[5]]),
            "prompt_mask": torch.tensor([[1]]),
            "completion_ids": torch.tensor([[6, 7, 8, 0]]),
            "completion_mask": completion_mask,
            "tool_mask": tool_mask,
            "gopd_teacher_prompt_ids": torch.tensor([[0, 3, 4]]),
            "gopd_teacher_prompt_mask": torch.tensor([[0, 1, 1]]),
            **dict.fromkeys(("advantages", "gopd_teacher_index", "gopd_lambda", "gopd_row"), torch.zeros(1)),
        }
        batch = Batch.from_trl(inputs)
        read = batch.read_by_teacher
        assert read.input_ids.tolist() == [[0, 3, 4, 6, 7, 8, 0]]
        assert read.attention_mask.tolist() == [[0, 1, 1, 1, 1, 1, 0]]
        assert read.scored.tolist() == [[True, False, True, False]]
        assert batch.loss_mask.tolist() == [[1, 0, 1, 0]]


class TestRendering:
    def other_template(self, tokenizer):
        other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<|endoftext|>")
        other.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[say] "
        return other

    def chat(self, prompts):
        return prompts.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    def test_own_chat_template_of_several_turns(self, make, prompts, tokenizer):
        def turns(row):
            return [
                {"role": "system", "content": "Be brief."},
                *row["prompt"],
                {"role": "assistant", "content": "5"},
                {"role": "user", "content": "No. Again."},
            ]

        trainer = make(
            train_dataset=self.chat(prompts),
            teacher_prompt=turns,
            teacher_processing_class=self.other_template(tokenizer),
        )
        trainer.train()
        texts = decoded(tokenizer, trainer.seen)
        assert all(t.startswith("[system] Be brief. [user] What is") for t in texts), texts
        assert all(t.endswith("[assistant] 5 [user] No. Again. [say] ") for t in texts)

    def test_own_template_alone_renders_the_prompt(self, make, prompts, tokenizer):
        trainer = make(
            train_dataset=self.chat(prompts), teacher_processing_class=self.other_template(tokenizer), max_steps=1
        )
        trainer.train()
        assert all(t.startswith("[user] What is") for t in decoded(tokenizer, trainer.seen))

    def test_options_of_the_student(self, make, prompts, tokenizer):
        """As for Qwen3 without thinking, where the template of a teacher would otherwise ask for thoughts."""
        other = self.other_template(tokenizer)
        other.chat_template += "{% if enable_thinking is false %}<think></think>{% endif %}"
        trainer = make(
            train_dataset=self.chat(prompts),
            teacher_processing_class=other,
            chat_template_kwargs={"enable_thinking": False},
        )
        trainer.train()
        assert all(t.endswith("[say] <think></think>") for t in decoded(tokenizer, trainer.seen))

    def test_tools_and_templates_of_rows(self, tokenizer):
        """Each row's tools, and what its environment added to its prompt; a template that stands in for one's own
        stands in for the student's alone."""

        def search(query: str):
            """
            Searches.

            Args:
                query: What for.
            """

        other = self.other_template(tokenizer)
        other.chat_template = "own{% for t in tools or [] %} {{ t['function']['name'] }}{% endfor %}" + (
            "{% for m in messages %} {{ m['content'] }}{% endfor %}{% if think is false %} no{% endif %}"
        )
        render = TeacherPrompts(
            {"ours": lambda row: row["prompt"]},
            {"theirs": other},
            column="teacher_prompt",
            tokenizer=tokenizer,
            chat_template=other.chat_template.replace("own", "given"),
            template_options={"think": False},
            contexts=Contexts({"ours": Model(None), "theirs": Model(None)}, {}),
        )
        message = [{"role": "user", "content": "hi"}]
        added = [{"role": "user", "content": "hi there"}]
        rows = [{"prompt": message}] * 3
        read = render(rows, batch_of([1, 1, 0]), prompts=[message, added, message], tools=[[search], [], [search]])
        texts = [
            tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(read.prompt_ids, read.prompt_mask, strict=True)
        ]
        assert texts == ["own search hi no", "own hi there no", "given search hi no"]

    def test_tools_are_those_of_the_batch(self):
        alone = SimpleNamespace(environment_factories=None, tools=["a"])
        assert tools_of_rows(alone, 2) == [["a"], ["a"]]
        several = SimpleNamespace(
            environment_factories={"x": None, "y": None},
            tools=["a", "b"],
            _env_tools={"x": ["a"], "y": ["b"]},
            _batch_environments=["y", "x"],
        )
        assert tools_of_rows(several, 2) == [["b"], ["a"]]

    def test_prompt_without_tokens(self, make):
        with pytest.raises(ValueError, match="teacher's prompt '' for the row with the prompt .* has no tokens"):
            make(teacher_prompt=lambda row: "").train()

    def test_by_teacher(self, several, tokenizer, prompts):
        trainer = several(teacher_prompt={"code": solved}, per_device_train_batch_size=8)
        trainer.train()
        for owner, text in zip(trainer.seen["gopd_teacher_index"], decoded(tokenizer, trainer.seen), strict=True):
            assert ("solution" in text) == bool(owner)


class TestOverlong:
    def long(self, row):
        return row["prompt"] * (30 if "3 plus" in row["prompt"] else 1)  # the teacher reads 256 tokens

    def test_raises(self, make):
        with pytest.raises(ValueError, match="exceed its context of 256.*overlong_teacher_prompts='drop'"):
            make(teacher_prompt=self.long, per_device_train_batch_size=16).train()

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    def test_dropped_rows_are_as_if_they_had_no_loss(self, make, models, estimator):
        trainer = make(
            teacher_prompt=self.long,
            overlong_teacher_prompts="drop",
            gopd_estimator=estimator,
            gopd_lambda=1.0,
            per_device_train_batch_size=16,
        )
        trainer.train()
        seen = trainer.seen
        readable = seen["tool_mask"].any(1).float()
        assert 0 < (readable == 0).sum() < 16
        student = load(models / "student")
        log_s, mask = log_probs(student, seen), seen["completion_mask"].float()
        with torch.no_grad():
            log_t = log_probs(load(models / "teacher"), seen)
        if estimator == "full":
            token = (log_s.exp() * (log_s - log_t)).sum(-1)
        else:
            s, t = (x.gather(-1, seen["completion_ids"].unsqueeze(-1)).squeeze(-1) for x in (log_s, log_t))
            token = (s - t).detach() * s
        loss = ((token * mask).sum(1) / mask.sum(1) * readable).mean()
        named = dict(student.named_parameters())
        want = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        norm = torch.stack([g.norm() for g in want.values()]).norm()
        gap = torch.stack([(trainer.grads[n] - want[n]).norm() for n in want]).norm()
        assert gap / norm < 1e-5


class TestBadInput:
    @pytest.mark.parametrize("value", [7, [], ["a"]])
    def test_prompt_that_is_none(self, make, value):
        with pytest.raises(TypeError, match="must be a string or a list of messages, got"):
            make(teacher_prompt=lambda row: value).train()

    def test_other_ids(self, make, tokenizer):
        from tests.tiny import build_tokenizer

        with pytest.raises(ValueError, match="`teacher_processing_class` has other token ids.*, 3 for example"):
            make(teacher_processing_class=build_tokenizer(("<|extra|>",)))

    def test_unknown_teacher(self, several):
        with pytest.raises(ValueError, match=r"`teacher_prompt` names \['law'\]"):
            several(teacher_prompt={"law": solved})

    def test_unknown_choice(self, make):
        with pytest.raises(ValueError, match="must be 'raise' or 'drop', got 'cut'"):
            make(overlong_teacher_prompts="cut")
