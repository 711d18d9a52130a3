"""
How one frozen model is told from another, and what a checkpoint holds beside what the trainer puts there.

- A checksum covers every number, name, shape and dtype of a model, packed weights too, and a configuration's every
  field that may change an output.
- A checkpoint is whole if its files are those of its manifest, or, without one, can be read; what is wrong is named.
- What was saved is compared with what is there when a run goes on.
"""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trl_gopd.digests import config_digest, parameters_digest
from trl_gopd.files import checksum
from trl_gopd.gopd.checkpoints import (
    LARGEST,
    MANIFEST,
    UNFINISHED,
    begin,
    problem,
    rotate,
    whole_checkpoint,
    write_manifest,
)
from trl_gopd.gopd.frozen.cache_file import LogprobCache
from trl_gopd.gopd.frozen.identity import is_same_identity, weights_digest
from trl_gopd.gopd.schedules import LambdaSchedule
from trl_gopd.gopd.state import read_state, write_state


BASE = {"name": "base", "revision": None}
MODELS = {"teachers": {"": {**BASE, "weights": "xxh3_128:aa"}}, "references": {}}
MAIN_PROCESS = SimpleNamespace(is_main_process=True)


@pytest.mark.parametrize(
    "one,other,same",
    [
        ({**BASE, "weights": "aa"}, {**BASE, "name": "moved", "weights": "aa"}, True),
        ({**BASE, "weights": "aa"}, {**BASE, "weights": "bb"}, False),
        ({**BASE, "weights": None}, {**BASE, "weights": "bb"}, True),  # a sharded run has no checksum
        ({**BASE, "weights": None}, {**BASE, "revision": "v2", "weights": None}, False),
        ({**BASE, "adapter": "teacher_model_math"}, {**BASE, "adapter": "teacher_model_code"}, False),
        ({**BASE, "adapter": None}, BASE, True),  # the base without an adapter is the base
        ({**BASE, "weights": "aa", "config": "c"}, {**BASE, "weights": "aa", "config": "d"}, False),
        ({**BASE, "weights": "aa", "config": "c"}, {**BASE, "weights": "aa"}, True),
        ({**BASE, "weights": "0123abcd"}, {**BASE, "weights": "xxh3_128:0123abcd"}, True),  # by name
        ({**BASE, "weights": "0123abcd"}, {**BASE, "weights": "4567abcd"}, False),
    ],
)
def test_checksums_decide_before_names(one, other, same):
    assert is_same_identity(one, other) is same
    assert is_same_identity(other, one) is same


class TestWeights:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool])
    def test_every_number_counts(self, dtype):
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(37, 203).to(dtype), requires_grad=False)
        before = weights_digest(model)
        assert weights_digest(model) == before and before.startswith("xxh3_128:")
        model.weight[36, 202] = 0
        assert weights_digest(model) != before

    def test_a_changed_row_of_the_head(self, models):
        from tests.gopd.harness import load

        teacher = load(models / "teacher")
        before = weights_digest(teacher)
        assert weights_digest(load(models / "teacher")) == before
        with torch.no_grad():
            teacher.get_output_embeddings().weight[100] += 1e-3
        assert weights_digest(teacher) != before

    def test_an_expert_of_a_mixture(self):
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_experts": 4}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=37, num_hidden_layers=1, num_attention_heads=2, **sizes))
        experts = {name: value for name, value in model.state_dict().items() if "experts" in name}
        assert experts
        before = weights_digest(model)
        for value in experts.values():
            kept = value.flatten()[-1].clone()
            value.view(-1)[-1] += 1e-3
            assert weights_digest(model) != before
            value.view(-1)[-1] = kept
        assert weights_digest(model) == before

    def test_packed_weights_are_buffers(self):
        layer = nn.Module()
        layer.register_buffer("qweight", torch.zeros(8, 3, dtype=torch.int32))
        before = weights_digest(layer)
        layer.qweight[7, 2] = 1
        assert weights_digest(layer) != before

    @pytest.mark.parametrize(
        "other",
        [
            {"w": torch.zeros(3, 2)},
            {"v": torch.zeros(2, 3)},
            {"w": torch.zeros(2, 3, dtype=torch.int32)},
            {"w": torch.zeros(2, 3), "v": torch.zeros(0)},
        ],
    )
    def test_names_shapes_and_dtypes_count(self, other):
        assert parameters_digest(other) != parameters_digest({"w": torch.zeros(2, 3)})

    def test_strides_and_chunks_do_not(self, monkeypatch):
        monkeypatch.setattr("trl_gopd.digests.CHUNK", 5)
        weight = torch.arange(21.0).view(3, 7)
        want = parameters_digest({"w": weight})
        monkeypatch.setattr("trl_gopd.digests.CHUNK", 100)
        assert parameters_digest({"w": weight.T.contiguous().T}) == want

    def test_what_is_elsewhere_has_none(self):
        assert parameters_digest({"w": torch.zeros(2), "v": torch.zeros(2, device="meta")}) is None

    def test_a_tensor_of_tensors(self):
        class Quantized:
            def __init__(self, codes):
                self.codes, self.is_meta, self.dtype = codes, False, torch.int8

            def __tensor_flatten__(self):
                return ["codes"], None

        from trl_gopd.digests import add_tensor

        class Digest(list):
            update = list.append

        seen = []
        for codes in (torch.tensor([1, 2]), torch.tensor([1, 3])):
            digest = Digest()
            assert add_tensor(digest, "w", Quantized(codes))
            seen.append([bytes(part) for part in digest])
        assert seen[0] != seen[1]


class TestConfig:
    def build(self, **options):
        from transformers import LlamaConfig

        return LlamaConfig(**{"hidden_size": 32, "vocab_size": 99, **options})

    @pytest.mark.parametrize(
        "options",
        [
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            {"eos_token_id": 7},
            {"rms_norm_eps": 1e-5},
            {"final_logit_softcapping": 30.0},
            {"logits_scaling": 8.0},
        ],
    )
    def test_what_changes_outputs_counts(self, options):
        assert config_digest(self.build(**options)) != config_digest(self.build())

    def test_names_and_versions_do_not(self):
        config = self.build(architectures=["LlamaForCausalLM"], dtype="bfloat16", use_cache=False)
        config._name_or_path, config._commit_hash, config.transformers_version = "elsewhere", "abc", "4.0"
        assert config_digest(config) == config_digest(self.build())

    def test_it_survives_the_disk(self, tmp_path):
        from transformers import AutoConfig

        config = self.build(eos_token_id=7)
        config.save_pretrained(tmp_path)
        assert config_digest(AutoConfig.from_pretrained(tmp_path)) == config_digest(config)


def test_a_cache_with_a_partial_checksum_is_recognised(tmp_path):
    path = tmp_path / "teacher.sqlite3"
    LogprobCache(path, temperature=1.0, identity={**BASE, "weights": "0123abcd"})
    with pytest.raises(ValueError, match="filled by an earlier version.*'0123abcd'.*Give another path to score anew"):
        LogprobCache(path, temperature=1.0, identity={**BASE, "weights": "xxh3_128:00"})
    assert LogprobCache(path, temperature=1.0).identity["weights"] == "0123abcd"


class TestStateFile:
    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match="gopd_state.json is missing.*pass the folder as `model`"):
            read_state(tmp_path, MODELS, LambdaSchedule())

    @pytest.mark.parametrize("change", ["", "{", "[]", "null", '{"teachers": {}}'])
    def test_a_damaged_file(self, tmp_path, change):
        (tmp_path / "gopd_state.json").write_text(change)
        with pytest.raises(ValueError, match="gopd_state.json is damaged .*Resume from another checkpoint"):
            read_state(tmp_path, MODELS, LambdaSchedule())

    @pytest.mark.parametrize(
        "observed",
        [
            {},
            [],
            {"ratio": "x", "trust": 1, "start_lengths": []},
            {"ratio": float("nan"), "trust": 1.0, "start_lengths": []},
            {"ratio": float("inf"), "trust": 1.0, "start_lengths": []},
            {"ratio": True, "trust": 1.0, "start_lengths": []},
            {"ratio": 1.0, "trust": 1.5, "start_lengths": []},
            {"ratio": 1.0, "trust": 1.0, "start_lengths": [float("nan")]},
            {"ratio": 1.0, "trust": 1.0, "start_lengths": {"5.0": 1}},
            {"ratio": 1.0, "trust": 1.0, "start_lengths": ["5"]},
            {"ratio": 1.0, "trust": 1.0, "start_lengths": [5.0] * 11},
        ],
    )
    def test_a_damaged_schedule(self, tmp_path, observed):
        write_state(tmp_path, MODELS, LambdaSchedule())
        state = json.loads((tmp_path / "gopd_state.json").read_text()) | {"lambda_schedule": observed}
        (tmp_path / "gopd_state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match="gopd_state.json is damaged"):
            read_state(tmp_path, MODELS, LambdaSchedule())

    @pytest.mark.parametrize("name", ["micro_step", "skipped_steps", "skipped_in_a_row", "format"])
    @pytest.mark.parametrize("value", [-1, 1.5, float("nan"), True, "2", None, [], 2**70])
    def test_damaged_counts(self, tmp_path, name, value):
        write_state(tmp_path, MODELS, LambdaSchedule(), micro_step=2)
        state = json.loads((tmp_path / "gopd_state.json").read_text()) | {name: value}
        (tmp_path / "gopd_state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match=f"gopd_state.json is damaged .*`{name}`.*Resume from another checkpoint"):
            read_state(tmp_path, MODELS, LambdaSchedule())

    @pytest.mark.parametrize(
        "change", ['{"a":' * 10**5, '{"teachers": 1e999}', "\ud800".encode("utf-8", "surrogatepass")]
    )
    def test_hostile_text(self, tmp_path, change):
        (tmp_path / "gopd_state.json").write_bytes(change if isinstance(change, bytes) else change.encode())
        with pytest.raises(ValueError, match="gopd_state.json is damaged .*Resume from another checkpoint"):
            read_state(tmp_path, MODELS, LambdaSchedule())

    @pytest.mark.parametrize("name", ["weights", "config"])
    def test_a_checksum_that_is_none(self, tmp_path, name):
        state = {"teachers": {"": {**BASE, name: {"a": 1}}}, "references": {}, "lambda_schedule": {}}
        (tmp_path / "gopd_state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match="gopd_state.json is damaged .*a checksum is no text"):
            read_state(tmp_path, MODELS, LambdaSchedule())

    def test_an_earlier_version_wrote_less(self, tmp_path):
        text = json.dumps({**MODELS, "lambda_schedule": LambdaSchedule().state_dict()})
        (tmp_path / "gopd_state.json").write_text(text)
        saved = read_state(tmp_path, MODELS, LambdaSchedule())
        assert (saved["format"], saved["micro_step"], saved["skipped_steps"], saved["settings"]) == (1, 0, 0, {})

    def test_a_partial_checksum_is_said(self, tmp_path, caplog):
        before = {"teachers": {"": {**BASE, "weights": "0123abcd"}}, "references": {}}
        write_state(tmp_path, before, LambdaSchedule())
        with caplog.at_level(logging.WARNING, "trl_gopd"):
            read_state(tmp_path, MODELS, LambdaSchedule())
        assert "written by an earlier version" in caplog.text and "base was compared by its name" in caplog.text


@pytest.fixture
def checkpoint(tmp_path):
    def build(step, *, of_an_earlier_version=False):
        folder = tmp_path / f"checkpoint-{step}"
        begin(folder)
        save_file({"w": torch.arange(99.0)}, folder / "model.safetensors")
        torch.save({"state": torch.arange(99.0)}, folder / "optimizer.pt")
        write_state(folder, MODELS, LambdaSchedule())
        (folder / "trainer_state.json").write_text('{"global_step": 1}')
        if of_an_earlier_version:
            (folder / UNFINISHED).unlink()
            state = json.loads((folder / "gopd_state.json").read_text())
            del state["format"]
            (folder / "gopd_state.json").write_text(json.dumps(state, indent=1) + "\n")
        return folder

    return build


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


NAMES = ["model.safetensors", "optimizer.pt", "gopd_state.json", "trainer_state.json"]


class TestWhole:
    @pytest.mark.parametrize("name", NAMES)
    def test_with_a_manifest(self, checkpoint, name):
        folder = checkpoint(1)
        write_manifest(folder)
        assert problem(folder) is None
        flip(folder / name)
        assert problem(folder) == f"{name} has another content than was written"
        cut(folder / name)
        assert problem(folder).startswith(f"{name} has ") and "bytes instead of" in problem(folder)
        (folder / name).unlink()
        assert problem(folder) == f"{name} is missing"

    @pytest.mark.parametrize("name", NAMES)
    def test_of_a_version_without_one(self, checkpoint, name):
        folder = checkpoint(1, of_an_earlier_version=True)
        assert problem(folder) is None
        cut(folder / name)
        assert problem(folder).startswith(f"{name} is damaged")
        (folder / name).write_bytes(b"")
        assert problem(folder).startswith(f"{name} is damaged")

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": {"optimizer.pt": {}}}'])
    def test_a_damaged_manifest(self, checkpoint, text):
        folder = checkpoint(1)
        (folder / MANIFEST).write_text(text)
        assert problem(folder).startswith(f"{MANIFEST} is damaged")

    def test_the_newest_whole_one(self, checkpoint, tmp_path, caplog):
        folders = {step: checkpoint(step) for step in (2, 9, 10, 11)}
        write_manifest(folders[9])
        write_manifest(folders[10])
        cut(folders[10] / "model.safetensors")
        (folders[11] / "trainer_state.json").unlink()
        with caplog.at_level(logging.WARNING, "trl_gopd"):
            assert whole_checkpoint(True, str(tmp_path), MAIN_PROCESS) == folders[9]
        assert "checkpoint-11 is passed over, since it is not whole: trainer_state.json is missing" in caplog.text
        assert "checkpoint-10 is passed over, since it is not whole: model.safetensors has" in caplog.text

    def test_one_that_was_not_written_to_its_end(self, checkpoint, tmp_path):
        folder = checkpoint(3)
        assert problem(folder) == f"{MANIFEST} is missing, so it was not written to its end"
        write_manifest(folder)
        assert problem(folder) is None and not (folder / UNFINISHED).exists()
        (folder / MANIFEST).unlink()
        assert problem(folder) == f"{MANIFEST} is missing, so it was not written to its end"

    def test_what_killed_writers_left_is_not_in_the_manifest(self, checkpoint):
        folder = checkpoint(3)
        code = "import os, pathlib, sys\nfrom trl_gopd.files import written_whole\n"
        code += "with written_whole(pathlib.Path(sys.argv[1])) as part:\n    part.touch()\n    os._exit(0)"
        subprocess.run([sys.executable, "-c", code, str(folder / MANIFEST)], check=True)
        assert len(list(folder.glob(".gopd_manifest.*.part.json"))) == 1
        begin(folder)
        write_manifest(folder)
        assert problem(folder) is None

    def test_none_is_whole_any_more(self, checkpoint, tmp_path):
        folder = checkpoint(3)
        write_manifest(folder)
        (folder / "trainer_state.json").unlink()
        with pytest.raises(ValueError, match=r"No checkpoint .*checkpoint-3: trainer_state.json is missing.*anew"):
            whole_checkpoint(True, str(tmp_path), MAIN_PROCESS)
        (folder / MANIFEST).unlink()  # nor does it look as if it had never been whole
        with pytest.raises(ValueError, match=r"No checkpoint .* is whole any more"):
            whole_checkpoint(True, str(tmp_path), MAIN_PROCESS)

    def test_none_was_whole_ever(self, checkpoint, tmp_path, caplog):
        (checkpoint(3) / "trainer_state.json").unlink()
        (tmp_path / "checkpoint-4").mkdir()
        with caplog.at_level(logging.WARNING, "trl_gopd"):
            assert whole_checkpoint(True, str(tmp_path), MAIN_PROCESS) is None
        assert "checkpoint-4 is passed over" in caplog.text and "checkpoint-3 is passed over" in caplog.text
        assert "ended before a checkpoint was whole, so it starts anew" in caplog.text

    def test_the_one_that_was_given(self, checkpoint, tmp_path):
        folder = checkpoint(3)
        write_manifest(folder)
        assert whole_checkpoint(str(folder), "", MAIN_PROCESS) == folder
        cut(folder / "optimizer.pt")
        with pytest.raises(ValueError, match="checkpoint-3 is not whole: optimizer.pt has .*=True` for the newest"):
            whole_checkpoint(str(folder), "", MAIN_PROCESS)
        with pytest.raises(ValueError, match="There is no checkpoint .*checkpoint-4. Give the path of one"):
            whole_checkpoint(str(tmp_path / "checkpoint-4"), "", MAIN_PROCESS)

    @pytest.mark.parametrize("given", [None, False])
    def test_none_is_asked_for(self, tmp_path, given):
        assert whole_checkpoint(given, str(tmp_path), MAIN_PROCESS) is None

    def test_there_is_none(self, tmp_path):
        with pytest.raises(ValueError, match="no checkpoint in .* Check `output_dir`, or start anew"):
            whole_checkpoint(True, str(tmp_path), MAIN_PROCESS)

    @pytest.mark.parametrize("name", ["../secret.bin", "/etc/hostname", "a/../../secret.bin", ".", "", "\0"])
    def test_a_manifest_that_leads_elsewhere(self, checkpoint, tmp_path, name):
        folder = checkpoint(1)
        write_manifest(folder)
        (tmp_path / "secret.bin").write_bytes(b"x")
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name] = {"size": 1, "xxh3_128": checksum(tmp_path / "secret.bin")}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        assert problem(folder) is not None
        if name.startswith(("..", "/", "a/")):
            assert f"{MANIFEST} is damaged ({name!r} is not the name of a file in the checkpoint)" == problem(folder)

    def test_a_manifest_that_leaves_files_out(self, checkpoint):
        folder = checkpoint(1)
        write_manifest(folder)
        (folder / MANIFEST).write_text('{"files": {}}')
        assert problem(folder) == f"{MANIFEST} is damaged (it does not list gopd_state.json)"

    @pytest.mark.parametrize("name", [MANIFEST, "gopd_state.json"])
    def test_files_that_are_deep_or_large(self, checkpoint, name):
        folder = checkpoint(1, of_an_earlier_version=True)
        (folder / name).write_text('{"files":' + "[" * 10**5)
        assert problem(folder) == f"{name} is damaged (it is nested too deeply)"
        with (folder / name).open("wb") as file:
            file.truncate(LARGEST + 1)
        assert f"it has {LARGEST + 1} bytes, and at most {LARGEST} are read" in problem(folder)


class TestRotation:
    def whole(self, checkpoint, *steps, times=None):
        folders = [checkpoint(step) for step in steps]
        for number, folder in enumerate(folders):
            write_manifest(folder)
            os.utime(folder, 2 * (10**9 + (times or range(99))[number],))
        return folders

    def left(self, tmp_path):
        return sorted(int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*"))

    def test_the_oldest_go(self, checkpoint, tmp_path):
        folders = self.whole(checkpoint, 2, 9, 10, 11)
        rotate(folders[-1], limit=2, best=None)
        assert self.left(tmp_path) == [10, 11]

    def test_the_newest_and_the_best_stay(self, checkpoint, tmp_path):
        folders = self.whole(checkpoint, 1, 2, 3, 4)
        rotate(folders[-1], limit=1, best=str(folders[0]))
        assert self.left(tmp_path) == [1, 4]
        rotate(folders[-1], limit=1, best=str(tmp_path / "elsewhere"))
        assert self.left(tmp_path) == [4]

    def test_a_clock_that_went_back_does_not_cost_the_newest(self, checkpoint, tmp_path):
        folders = self.whole(checkpoint, 1, 2, 3, times=[9, 8, 0])
        rotate(folders[-1], limit=1, best=None)
        assert self.left(tmp_path) == [3]

    def test_of_a_run_that_was_begun_anew_the_old_steps_go(self, checkpoint, tmp_path):
        folders = self.whole(checkpoint, 8, 9, 1, 2)
        rotate(folders[-1], limit=2, best=None)
        assert self.left(tmp_path) == [1, 2]

    @pytest.mark.parametrize("limit", [None, 0, 4])
    def test_no_limit(self, checkpoint, tmp_path, limit):
        folders = self.whole(checkpoint, 1, 2, 3, 4)
        rotate(folders[-1], limit=limit, best=None)
        assert self.left(tmp_path) == [1, 2, 3, 4]

    def test_what_a_kill_leaves_is_no_checkpoint(self, checkpoint, tmp_path, monkeypatch):
        folders = self.whole(checkpoint, 1, 2)
        monkeypatch.setattr("shutil.rmtree", lambda folder, ignore_errors: (folder / "optimizer.pt").unlink())
        rotate(folders[-1], limit=1, best=None)
        assert problem(folders[0]) == f"{MANIFEST} is missing, so it was not written to its end"


def test_everything_is_on_the_disk_before_the_manifest(checkpoint, tmp_path, monkeypatch):
    folder = checkpoint(1)
    (folder / "global_step1").mkdir()
    (folder / "global_step1" / "rank_0.pt").write_bytes(b"x")
    synced = []
    monkeypatch.setattr("trl_gopd.files.sync", synced.append)
    monkeypatch.setattr("trl_gopd.gopd.checkpoints.sync", synced.append)
    write_manifest(folder)
    before = synced[: next(n for n, path in enumerate(synced) if path.suffix == ".json" and ".part" in path.name)]
    files = {path for path in folder.rglob("*") if path.name != MANIFEST}
    assert files | {folder, tmp_path, tmp_path.parent} <= {*before, folder / UNFINISHED}
    assert json.loads((folder / MANIFEST).read_text())["files"]["global_step1/rank_0.pt"]["size"] == 1
