"""Trainers on tiny models whose completions are scripted and whose gradients are kept, and naive numbers for both."""

import torch
from transformers import AutoModelForCausalLM

from tests.tiny import scripted_completions
from trl_gopd.gopd.batch import Sequences
from trl_gopd.gopd.trainer import GOPDTrainer


# Which of two teachers scores each of the sixteen prompts.
IDS = ["math", "code", "math", "math", "code", "math", "code", "code"] * 2
TRAINER_ARGUMENTS = (
    "teacher_model",
    "ref_model",
    "peft_config",
    "reward_funcs",
    "eval_dataset",
    "train_dataset",
    "teacher_prompt",
    "teacher_processing_class",
    "environment_factory",
)


def read(input_ids, attention_mask, completion_ids):
    """Sequences of which every token of the completions is scored."""
    return Sequences.of(input_ids, attention_mask, completion_ids.size(1))


class ScriptedTrainer(GOPDTrainer):
    """Completions depend on the prompt and the step alone, so that runs of other layouts see the same tokens."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completions = scripted_completions(self._tokenizer, prompt_ids, step=self.state.global_step, max_length=9)
        return completions, None


class Keeping:
    """Keeps the micro-batches and the gradient before the optimizer sees it."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss

    def _compute_loss(self, model, inputs):
        self.seen = inputs
        loss = super()._compute_loss(model, inputs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


class Recording(Keeping, ScriptedTrainer):
    pass


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def log_probs(model, inputs):
    """`(B, T, V)` log-probabilities of the completions, the naive way: each row alone, without padding."""
    width = inputs["completion_ids"].size(1)
    rows = []
    for prompt, seen, completion, mask in zip(
        *(inputs[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
    ):
        ids = torch.cat([prompt[seen.bool()], completion[mask.bool()]]).unsqueeze(0)
        count = int(mask.sum())
        logits = model(input_ids=ids).logits[0, -count - 1 : -1].float().log_softmax(-1)
        rows.append(torch.cat([logits, logits.new_zeros(width - count, logits.size(-1))]))
    return torch.stack(rows)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def sampled_logps(models, inputs, reference="student"):
    """Log-probabilities of the sampled tokens under student, teacher and reference, at the start of training."""
    ids = inputs["completion_ids"].unsqueeze(-1)
    with torch.no_grad():
        return [
            log_probs(load(models / name), inputs).gather(-1, ids).squeeze(-1)
            for name in ("student", "teacher", reference)
        ]


def assert_gradient(trainer, student, losses):
    """`losses` `(B, T)` are those of the tokens, with the gradient of `student`: a loaded copy of the start."""
    mask = trainer.seen["completion_mask"].float()
    loss = ((losses * mask).sum(1) / mask.sum(1)).mean()
    named = dict(student.named_parameters())
    want = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    gap = torch.stack([(trainer.grads[n] - want[n]).norm() for n in want]).norm()
    assert norm > 0 and gap / norm < 1e-5, gap / norm


def assert_policy_gradient(trainer, models, credit):
    """`credit` is what multiplies each token's ∇ log π, before the mean over a sequence's tokens."""
    student, inputs = load(models / "student"), trainer.seen
    log_s = log_probs(student, inputs).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    assert_gradient(trainer, student, -credit * log_s)
