"""Builders of trainers on the tiny models. TRL is imported by the fixtures, so that pure tests do not wait for it."""

import pytest


@pytest.fixture
def make(models, tmp_path, prompts, tokenizer):
    """Builds a trainer; keyword arguments go to the trainer or to the configuration."""
    from tests.gopd.harness import TRAINER_ARGUMENTS, Recording
    from trl_gopd.gopd.config import GOPDConfig

    def build(cls=Recording, model=None, **kwargs):
        arguments = {name: kwargs.pop(name) for name in TRAINER_ARGUMENTS if name in kwargs}
        config = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_completion_length": 10,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 0.1,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "weight_decay": 0.0,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            **kwargs,
        }
        arguments.setdefault("teacher_model", str(models / "teacher"))
        arguments.setdefault("train_dataset", prompts)
        return cls(
            model=str(models / "student") if model is None else model,
            args=GOPDConfig(**config),
            processing_class=tokenizer,
            **arguments,
        )

    return build


@pytest.fixture
def routed(prompts):
    from tests.gopd.harness import IDS

    return prompts.add_column("teacher_id", IDS)


@pytest.fixture
def several(make, models, routed):
    """Builds a trainer with two teachers, of different widths."""

    def build(**kwargs):
        kwargs.setdefault("teacher_model", {"math": str(models / "teacher"), "code": str(models / "base")})
        kwargs.setdefault("train_dataset", routed)
        return make(**kwargs)

    return build
