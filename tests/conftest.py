"""
Tiny models built in code, shared by all tests: nothing is downloaded.

Fixtures import what they need. A file that tests pure functions then does not wait for transformers and datasets.
"""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


torch.set_num_threads(1)
if not torch.cuda.is_available():  # Triton's kernels then run on the CPU; read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    from tests.tiny import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer):
    """Folders of a student, a larger teacher and a second model of the student's size, all different."""
    from tests.tiny import build_model

    folder = tmp_path_factory.mktemp("models")
    for name, seed, hidden in (("student", 1, 32), ("teacher", 2, 48), ("base", 3, 32)):
        build_model(tokenizer, seed=seed, hidden_size=hidden).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def prompts():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [f"What is {i} plus {i + 3}?" for i in range(16)]})
