"""Prompts are read from files, folders, data sets and lists, and anything else is refused."""

import json

import pytest
from datasets import Dataset, IterableDataset

from tests.preflight_check.harness import PROMPTS, run
from trl_gopd.preflight_check import load_prompts


class TestLoadPrompts:
    @pytest.mark.parametrize("suffix", [".json", ".jsonl"])
    @pytest.mark.parametrize("chat", [False, True])
    def test_json(self, tmp_path, suffix, chat):
        prompts = [[{"role": "user", "content": text}] for text in PROMPTS] if chat else PROMPTS
        rows = [{"prompt": prompt, "answer": str(i)} for i, prompt in enumerate(prompts)]
        path = tmp_path / f"data{suffix}"
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
        assert list(load_prompts(path)) == rows

    def test_text(self, tmp_path):
        (tmp_path / "prompts.txt").write_text("What?\n\n  \nWhy, über?\n", encoding="utf-8")
        assert list(load_prompts(str(tmp_path / "prompts.txt"))["prompt"]) == ["What?", "Why, über?"]

    def test_folder_with_splits(self, tmp_path):
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": split}) + "\n")
        assert list(load_prompts(tmp_path, split="test")["prompt"]) == ["test"]

    def test_few_prompts_are_used_equally_often(self, models):
        counts = []

        def count(prompts, completions, **_):
            counts.append(sorted(prompts.count(prompt) for prompt in set(prompts)))
            return [0.0] * len(prompts)

        run(models, reward_funcs=count, num_samples=7, lambdas=[])
        assert counts == [[2, 2, 3]]

    def test_many_prompts_are_used_once(self, models):
        seen = []
        rows = [f"Number {i}" for i in range(50)]
        run(models, prompts=rows, reward_funcs=lambda prompts, **_: seen.append(prompts) or [0.0] * 6, lambdas=[])
        assert len(set(seen[0])) == 6 and seen[0] != rows[:6]

    @pytest.mark.parametrize(
        ("prompts", "kind", "message"),
        [
            ([], ValueError, "`prompts` has no rows. Pass the name"),
            (Dataset.from_dict({"prompt": []}), ValueError, "has no rows"),
            (Dataset.from_dict({"text": ["a"]}), ValueError, r"no column `prompt`, got \['text'\]"),
            (7, TypeError, "must not be of type int"),
            (IterableDataset.from_generator(lambda: iter([])), TypeError, "must not be of type IterableDataset"),
            (["a", [{"role": "user", "content": "b"}]], TypeError, "must all be strings or all be lists"),
            ("/nowhere/at/all.jsonl", ValueError, "No prompts could be loaded from '/nowhere/at/all.jsonl'"),
        ],
    )
    def test_refuses(self, prompts, kind, message):
        with pytest.raises(kind, match=message):
            load_prompts(prompts)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("empty.txt", b"\n\n", "has no rows"),
            ("latin.txt", b"\xe9\xe8", "No prompts could be loaded"),
            ("broken.jsonl", b'{"prompt": ', "No prompts could be loaded"),
            ("empty.jsonl", b"", "No prompts could be loaded"),
            ("prompts.docx", b"x", "unknown ending '.docx'. Pass"),
        ],
    )
    def test_refuses_file(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_prompts(tmp_path / name)
