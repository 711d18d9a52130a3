"""Faults of the quantizer: of its work folder, of packed checkpoints, and numbers that are not finite."""

import copy
import json
import math
import os
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.faults.disks import small_disk
from tests.faults.harness import Ending, Trial, fuzzed, scenario
from tests.faults.processes import KillAfter, KillAt, count_events, forked
from tests.tiny import build_model, build_tokenizer
from trl_gopd.d2quant import integrity
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.hf_quantizer import save_quantized
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.digests import parameters_digest


AREA = "quantizer"
FILE = "model.safetensors"
TOKENS = torch.randint(0, 200, (3, 16), generator=torch.Generator().manual_seed(0))
IDS = torch.arange(3, 40)[None]
MEBIBYTE = 2**20
# Errors that carry a sentence. `KeyError` and the like, which name a line of code, are none of them.
NAMED = (ValueError, OSError, TypeError, RuntimeError, StrictDataclassError)


# Models and folders


@cache
def tokenizer() -> Any:
    return build_tokenizer()


@cache
def original() -> PreTrainedModel:
    return build_model(tokenizer(), seed=1, num_hidden_layers=3)


def settings(**options: Any) -> D2QuantConfig:
    defaults = {"bits": 2, "group_size": 16, "iterations": 1, "column_scale": True, "mean_shift": True}
    data = {"dataset": TOKENS, "num_samples": 3, "seq_length": 16, "tune_epochs": 1}
    return D2QuantConfig(**{**defaults, **data, **options})


def quantized(**options: Any) -> PreTrainedModel:
    model = copy.deepcopy(original())
    quantize_model(model, None, settings(**options))
    return model


def digest(model: PreTrainedModel) -> str | None:
    return parameters_digest(model.state_dict())


def quantized_digest(**options: Any) -> str | None:
    return digest(quantized(**options))


@cache
def reference(**options: Any) -> tuple[PreTrainedModel, str | None]:
    """A quantized model, not to be changed, and the checksum of its tensors."""
    model = quantized(**options)
    return model, digest(model)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_files(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@cache
def packed_files(shards: bool = False) -> dict[str, bytes]:
    """The files of a packed checkpoint, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        if shards:
            reference()[0].save_pretrained(folder, max_shard_size="20KB")
        else:
            save_quantized(reference()[0], Path(folder) / "packed", tokenizer=tokenizer())
        return files_of(Path(folder) if shards else Path(folder) / "packed")


@cache
def work_files(**options: Any) -> dict[str, bytes]:
    """The files of a work folder after a whole run, by their names, which begin with the run's."""
    with tempfile.TemporaryDirectory() as folder:
        quantized(work_dir=folder, **options)
        return files_of(Path(folder))


@contextmanager
def bounded_memory(extra: int) -> Iterator[None]:
    """Fails if the body makes this process use so many bytes more than before, or reserve 4 GiB more."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use
    before, limits = _status("VmHWM"), resource.getrlimit(resource.RLIMIT_AS)
    # Each thread reserves 72 MiB, without using them.
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4096 * MEBIBYTE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        used = _status("VmHWM") - before
        assert used <= extra, f"It took {used} bytes, more than {extra}."


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@cache
def packed_in(dtype: torch.dtype) -> tuple[str | None, torch.Tensor]:
    """Checksum and logits of the undamaged checkpoint, loaded in this dtype."""
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(write_files(packed_files(), Path(folder)), dtype=dtype)
        return digest(model), logits(model)


def loaded(folder: Path) -> Ending:
    """
    Loads a packed checkpoint: it is the one that was saved, or refused with a sentence, in little memory. The dtype in
    `config.json` is free, as the argument `dtype` is: it is what all but packed words and scales are rounded to.
    """
    size = sum(path.stat().st_size for path in folder.iterdir())
    try:
        with bounded_memory(2 * size + 64 * MEBIBYTE):
            model = AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        assert str(error).strip() and "memory" not in str(error), repr(error)
        # What transformers makes of a `config.json` that is none is not in our hands: nothing of ours has run then.
        if not isinstance(error, NAMED) and not any(
            frame.filename.endswith("configuration_auto.py") for frame in traceback.extract_tb(error.__traceback__)
        ):
            raise
        return Ending.REFUSED
    want_digest, want_logits = packed_in(model.dtype)
    assert digest(model) == want_digest
    assert torch.equal(logits(model), want_logits)
    return Ending.INTACT


def resumed(work_dir: Path) -> Ending:
    """A run that goes on from a work folder ends in the same bytes as one that was not interrupted."""
    assert quantized_digest(work_dir=str(work_dir)) == reference()[1]
    return Ending.RECOVERED


# Killed while saving


def _save(path: Path) -> None:
    save_quantized(copy.deepcopy(reference()[0]), path, tokenizer=tokenizer())


@cache
def _events_of_a_save() -> int:
    reference()
    with tempfile.TemporaryDirectory() as folder:
        return count_events(_save, Path(folder) / "packed", root=Path(folder))


def _killed_save(trial: Trial, mode: Any) -> Ending:
    root = trial.folder / "models"
    root.mkdir()
    path, event = root / "packed", trial.number % _events_of_a_save()
    ended = forked(_save, path, kill=KillAt(event=event, root=root, mode=mode, seed=trial.number))
    assert ended.was_killed, ended
    ending = Ending.RECOVERED
    if path.exists() and any(path.iterdir()):
        assert loaded(path) is Ending.INTACT
        ending = Ending.INTACT
        shutil.rmtree(path)
    _save(path)
    assert [found.name for found in root.iterdir()] == ["packed"]  # what the killed writer left is gone
    assert files_of(path) == packed_files()
    return ending


@scenario("a packed save is killed before any file event", area=AREA, tries=60, short=1)
def killed_save(trial: Trial) -> Ending:
    return _killed_save(trial, "before")


@scenario("a packed save is killed with a torn file", area=AREA, tries=60, short=1)
def torn_save(trial: Trial) -> Ending:
    return _killed_save(trial, "torn")


@scenario("the power fails during a packed save", area=AREA, tries=60, short=1)
def powerless_save(trial: Trial) -> Ending:
    return _killed_save(trial, "power")


@scenario("`save_pretrained` alone is killed at any file event", area=AREA, tries=40, short=1)
def killed_plain_save(trial: Trial) -> Ending:
    """It writes file by file over what is there: what is left loads as one of the two models, or is refused."""
    root = write_files(packed_files(), trial.folder / "packed")
    other, other_digest = reference(alpha=0.5)
    mode = trial.random.choice(["before", "torn", "power"])
    kill = KillAt(event=trial.random.randrange(8), root=root, mode=mode, seed=trial.number)
    forked(lambda: copy.deepcopy(other).save_pretrained(root), kill=kill)
    try:
        model = AutoModelForCausalLM.from_pretrained(root)
    except NAMED as error:
        assert str(error)
        return Ending.REFUSED
    assert digest(model) in (reference()[1], other_digest)
    return Ending.INTACT


@scenario("the disk is full while a packed checkpoint is saved", area=AREA, tries=60, short=3)
def full_disk_of_a_save(trial: Trial) -> Ending:
    size = sum(map(len, packed_files().values()))
    with small_disk(trial.folder / "disk", trial.random.randrange(4096, 2 * size)) as disk:
        try:
            _save(disk / "packed")
        except OSError as error:
            assert error.errno and error.strerror, repr(error)
            assert not list(disk.iterdir())
            return Ending.REFUSED
        return loaded(disk / "packed")


# Killed while quantizing


@cache
def _events_of_a_run() -> int:
    with tempfile.TemporaryDirectory() as folder:
        return count_events(quantized_digest, work_dir=folder, root=Path(folder))


def _killed_run(trial: Trial, mode: Any) -> Ending:
    work = trial.folder / "work"
    work.mkdir()
    event = trial.number % _events_of_a_run()
    ended = forked(
        quantized_digest, work_dir=str(work), kill=KillAt(event=event, root=work, mode=mode, seed=trial.number)
    )
    assert ended.was_killed, ended
    ending = resumed(work)
    assert not [path for path in work.rglob("*") if ".part" in path.name]
    assert files_of(work).keys() == work_files().keys()
    return ending


@scenario("a quantization is killed before any event of its work folder", area=AREA, tries=60, short=1)
def killed_run(trial: Trial) -> Ending:
    return _killed_run(trial, "before")


@scenario("a quantization is killed with a torn file in its work folder", area=AREA, tries=60, short=1)
def torn_run(trial: Trial) -> Ending:
    return _killed_run(trial, "torn")


@scenario("the power fails during a quantization", area=AREA, tries=60, short=1)
def powerless_run(trial: Trial) -> Ending:
    return _killed_run(trial, "power")


def _run(root: Path) -> None:
    model = quantized(work_dir=str(root / "work"))
    save_quantized(model, root / "models" / "packed", tokenizer=tokenizer())


@cache
def _seconds_of_a_run() -> float:
    packed_files()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        forked(_run, Path(folder))
        return time.perf_counter() - start


@scenario("a quantization with its save is killed at random times", area=AREA, tries=100, short=1, seconds=60)
def random_kills(trial: Trial) -> Ending:
    """Up to three kills of one run; whatever is left, the run that ends writes the same files as one without kills."""
    path, kills = trial.folder / "models" / "packed", 0
    for _ in range(trial.random.randint(1, 3)):
        ended = forked(_run, trial.folder, kill=KillAfter(trial.random.uniform(0.0, _seconds_of_a_run())))
        kills += ended.was_killed
        assert not path.exists() or files_of(path) == packed_files()
        if path.exists():
            break
    if not path.exists():
        _run(trial.folder)
    assert files_of(path) == packed_files()
    return Ending.RECOVERED if kills else Ending.INTACT


@scenario("the disk of the work folder is full", area=AREA, tries=40, short=2)
def full_disk_of_a_run(trial: Trial) -> Ending:
    size = sum(map(len, work_files().values()))
    work = trial.folder / "work"
    with small_disk(trial.folder / "disk", trial.random.randrange(4096, size)) as disk:
        try:
            assert quantized_digest(work_dir=str(disk)) == reference()[1]
            return Ending.INTACT
        except OSError as error:
            assert error.errno and error.strerror, repr(error)
            assert not [path for path in disk.rglob("*") if ".part" in path.name]
        shutil.copytree(disk, work)
    return resumed(work)


# A damaged work folder


def _flip(data: bytes, random: Random) -> bytes:
    position = random.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << random.randrange(8)]) + data[position + 1 :]


def _zero_tail(data: bytes, random: Random) -> bytes:
    kept = random.randrange(len(data))
    return data[:kept] + bytes(len(data) - kept)


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def _damaged_run(trial: Trial, damage: Callable[[bytes, Random], bytes]) -> Ending:
    files = dict(work_files())
    name = trial.random.choice(sorted(files))
    files[name] = damage(files[name], trial.random)
    return resumed(write_files(files, trial.folder / "work"))


@scenario("a bit flips in a finished block or its streams", area=AREA, tries=100, short=2)
def flipped_bit_of_a_run(trial: Trial) -> Ending:
    return _damaged_run(trial, _flip)


@scenario("the end of a file in the work folder is zero", area=AREA, tries=50, short=1)
def zeroed_tail_of_a_run(trial: Trial) -> Ending:
    return _damaged_run(trial, _zero_tail)


@scenario("a file in the work folder is cut short", area=AREA, tries=50, short=1)
def truncated_file_of_a_run(trial: Trial) -> Ending:
    return _damaged_run(trial, _truncate)


@scenario("files of the work folder are swapped, copied, lost or of another run", area=AREA, tries=60, short=2)
def misplaced_files_of_a_run(trial: Trial) -> Ending:
    files, foreign = dict(work_files()), work_files(alpha=0.5)
    names = sorted(files)
    one, other = trial.random.sample(names, 2)
    how = trial.random.choice(["swap", "copy", "lose", "lose all but one", "foreign"])
    if how == "swap":
        files[one], files[other] = files[other], files[one]
    elif how == "copy":
        files[one] = files[other]
    elif how == "lose":
        del files[one]
    elif how == "lose all but one":
        files = {one: files[one]}
    else:
        files[one] = next(data for name, data in foreign.items() if name.endswith(one.rpartition("/")[2]))
    return resumed(write_files(files, trial.folder / "work"))


@scenario("two quantizations share a work folder at the same time", area=AREA, tries=30, short=1)
def two_runs(trial: Trial) -> Ending:
    """The other one has other settings, other weights, or is the same run."""
    other = trial.random.choice([{"alpha": 0.5}, {"seed": 1}, {}])
    want = [reference()[1], reference(**other)[1]]
    work = str(trial.folder / "work")
    reader, writer = os.pipe()

    def both() -> list[str | None]:
        child = os.fork()
        if not child:
            os.write(writer, str(quantized_digest(work_dir=work)).encode())
            os._exit(0)
        digests = [None, quantized_digest(work_dir=work, **other)]
        assert os.waitpid(child, 0)[1] == 0
        digests[0] = os.read(reader, 100).decode()
        return digests

    ended = forked(both)
    os.close(reader)
    os.close(writer)
    assert ended.value == want, ended
    assert quantized_digest(work_dir=work) == want[0]
    return Ending.INTACT


# Damaged packed checkpoints


def _damaged_checkpoint(trial: Trial, name: str, damage: Callable[[bytes, Random], bytes]) -> Ending:
    files = dict(packed_files())
    files[name] = damage(files[name], trial.random)
    return loaded(write_files(files, trial.folder / "packed"))


@scenario("a bit flips in the tensors of a packed checkpoint", area=AREA, tries=300, short=3)
def flipped_bit_of_a_checkpoint(trial: Trial) -> Ending:
    return _damaged_checkpoint(trial, FILE, _flip)


@scenario("a bit flips in config.json of a packed checkpoint", area=AREA, tries=300, short=3)
def flipped_bit_of_a_configuration(trial: Trial) -> Ending:
    return _damaged_checkpoint(trial, "config.json", _flip)


@scenario("a file of a packed checkpoint is cut short or ends in zeros", area=AREA, tries=100, short=2)
def truncated_checkpoint(trial: Trial) -> Ending:
    name = trial.random.choice([FILE, "config.json"])
    return _damaged_checkpoint(trial, name, trial.random.choice([_truncate, _zero_tail]))


def _entries(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values of a nested dictionary or list."""
    for key in config if isinstance(config, dict) else range(len(config)):
        yield (*path, key)
        if isinstance(config[key], dict | list):
            yield from _entries(config[key], (*path, key))


@cache
def _paths_of_the_configuration() -> list[tuple[Any, ...]]:
    return list(_entries(json.loads(packed_files()["config.json"])))


def _edit(value: Any, random: Random) -> Any:
    """Another value, most often of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice(
            [value + 1, value * 2 + 1, -value, 0, 10**5, 10**9, 10**15, value + 0.5, str(value), None]
        )
    if isinstance(value, str):
        choices = ["affine", "midrise", "bitplane", "float16", "bfloat16", "float32", "", value + "x", "silu", "gelu"]
        return random.choice([choice for choice in choices if choice != value])
    if isinstance(value, list):
        return random.choice([[], value[:-1], ["mlp.up_proj"], None, 5])
    if isinstance(value, dict):
        return random.choice([{}, None, [], 7])
    return random.choice([0, 1, True, "affine", ["mlp.up_proj"], {}])


def _edited(config: dict[str, Any], path: tuple[Any, ...], random: Random) -> None:
    *parents, last = path
    inner: Any = config
    for key in parents:
        inner = inner[key]
    if random.random() < 0.2 and isinstance(inner, dict):
        del inner[last]
    else:
        inner[last] = _edit(inner[last], random)


@scenario("an entry of config.json of a packed checkpoint is edited", area=AREA, tries=600, short=4, seconds=10)
def edited_configuration(trial: Trial) -> Ending:
    config = json.loads(packed_files()["config.json"])
    paths = _paths_of_the_configuration()
    _edited(config, paths[trial.number % len(paths)], trial.random)
    files = {**packed_files(), "config.json": json.dumps(config).encode()}
    return loaded(write_files(files, trial.folder / "packed"))


@scenario("a size in config.json is forged along with its checksum", area=AREA, tries=60, short=2, seconds=10)
def forged_size(trial: Trial) -> Ending:
    config = json.loads(packed_files()["config.json"])
    name = trial.random.choice(
        ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "head_dim", "num_attention_heads"]
    )
    value = trial.random.choice([10**5, 10**9, 10**12])
    stated = config["quantization_config"]["integrity"]
    config[name] = stated["model_config"][name] = value
    stated["checksum"] = integrity._checksum(config["quantization_config"])
    files = {**packed_files(), "config.json": json.dumps(config).encode()}
    ending = loaded(write_files(files, trial.folder / "packed"))
    assert ending is Ending.REFUSED
    return ending


@scenario("dtypes, names or tensors of a packed checkpoint are changed", area=AREA, tries=100, short=2)
def changed_tensors(trial: Trial) -> Ending:
    folder = write_files(packed_files(), trial.folder / "packed")
    tensors, random = load_file(folder / FILE), trial.random
    one, other = random.sample(sorted(tensors), 2)
    how = random.choice(["dtype", "swap", "drop", "add", "rename", "shape", "number"])
    if how == "dtype":
        same_size = {2: [torch.float16, torch.bfloat16, torch.int16], 4: [torch.float32, torch.int32]}
        tensors[one] = tensors[one].view(
            random.choice([d for d in same_size[tensors[one].element_size()] if d != tensors[one].dtype])
        )
    elif how == "swap":
        shape, dtype = tensors[one].shape, tensors[one].dtype
        peers = [n for n in tensors if n != one and (tensors[n].shape, tensors[n].dtype) == (shape, dtype)]
        if not peers:
            return Ending.INTACT
        other = random.choice(peers)
        if torch.equal(tensors[one], tensors[other]):
            return Ending.INTACT
        tensors[one], tensors[other] = tensors[other], tensors[one]
    elif how == "drop":
        del tensors[one]
    elif how == "add":
        tensors[f"{one}.copy"] = tensors[one].clone()
    elif how == "rename":
        tensors[f"{one}s"] = tensors.pop(one)
    elif how == "shape":
        tensors[one] = tensors[one].flatten()[:-1].contiguous()
    else:
        flat = tensors[one].view(-1).view(torch.uint8)
        flat[random.randrange(len(flat))] += 1
    save_file(tensors, folder / FILE, {"format": "pt"} if random.random() < 0.5 else None)
    ending = loaded(folder)
    assert ending is Ending.REFUSED, (how, one)
    return ending


@scenario("shards of a packed checkpoint are lost, swapped or damaged", area=AREA, tries=60, short=2)
def damaged_shards(trial: Trial) -> Ending:
    files, random = dict(packed_files(shards=True)), trial.random
    shards = sorted(name for name in files if name.startswith("model-"))
    one, other = random.sample(shards, 2)
    how = random.choice(["lose", "swap", "copy", "flip", "index", "none"])
    if how == "lose":
        del files[one]
    elif how == "swap":
        files[one], files[other] = files[other], files[one]
    elif how == "copy":
        files[one] = files[other]
    elif how == "flip":
        files[one] = _flip(files[one], random)
    elif how == "index":
        files["model.safetensors.index.json"] = _flip(files["model.safetensors.index.json"], random)
    return loaded(write_files(files, trial.folder / "packed"))


# Numbers that are not finite


@scenario("a weight of the model to quantize is not finite", area=AREA, tries=120, short=3)
def weight_that_is_not_finite(trial: Trial) -> Ending:
    model = copy.deepcopy(original())
    name = trial.random.choice(sorted(model.state_dict()))
    numbers = model.get_parameter(name).data.view(-1)
    numbers[trial.random.randrange(len(numbers))] = trial.random.choice([math.nan, math.inf, -math.inf])
    before = digest(model)
    try:
        quantize_model(model, None, settings())
    except ValueError as error:
        assert f"`{name}` holds NaN or infinity" in str(error)
        assert digest(model) == before and not any(isinstance(m, D2QuantLinear) for m in model.modules())
        return Ending.REFUSED
    raise AssertionError(f"It was quantized with {name} not finite.")


@scenario("weights are so large or small that numbers overflow or vanish", area=AREA, tries=150, short=3)
def extreme_weights(trial: Trial) -> Ending:
    """
    Whatever is too large is refused with the name of a block or tensor; what passes is finite. A linear that alone was
    scaled is not zero; one whose inputs vanish may be.
    """
    model, random = copy.deepcopy(original()), trial.random
    names = random.sample([name for name, _ in model.named_parameters()], random.choice([1, 1, 2, 4]))
    for name in names:
        model.get_parameter(name).data *= 10.0 ** random.choice([-30, -20, -12, -7, 5, 12, 19, 25, 30, 36])
    options = {
        "scale_dtype": random.choice(["float16", "bfloat16", "float32"]),
        "rounding": random.choice(["rtn", "gptq", "gptaq"]),
        "rotation": random.choice([None, "full"]),
        "mean_shift": random.random() < 0.5,
    }
    try:
        quantize_model(model, None, settings(**options))
    except ValueError as error:
        named = any(text in str(error) for text in ("`model.layers.", "`lm_head", "`model.", "window", "Hessian"))
        assert named, str(error)
        assert not getattr(model, "is_quantized", False)
        return Ending.REFUSED
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    for name, module in model.named_modules():
        if isinstance(module, D2QuantLinear) and names == [f"{name}.weight"]:
            assert module.dequantize().any(), name
    return Ending.INTACT


@scenario("a number of a quantized model is not finite when it is saved", area=AREA, tries=60, short=2)
def packed_number_that_is_not_finite(trial: Trial) -> Ending:
    model = copy.deepcopy(reference()[0])
    floats = sorted(name for name, parameter in model.named_parameters() if parameter.is_floating_point())
    name = trial.random.choice(floats)
    numbers = model.get_parameter(name).data.view(-1)
    numbers[trial.random.randrange(len(numbers))] = trial.random.choice([math.nan, math.inf])
    try:
        save_quantized(model, trial.folder / "packed")
    except ValueError as error:
        assert f"`{name}` holds NaN or infinity" in str(error)
        assert not list(trial.folder.iterdir())
        return Ending.REFUSED
    raise AssertionError(f"It was saved with {name} not finite.")


@scenario("the tuning diverges", area=AREA, tries=40, short=1)
def diverging_tuning(trial: Trial) -> Ending:
    model = copy.deepcopy(original())
    rate = 10.0 ** trial.random.randrange(0, 38)
    try:
        quantize_model(model, None, settings(tune_epochs=2, tune_learning_rate=rate))
    except ValueError as error:
        assert "tune_learning_rate" in str(error)
        assert not getattr(model, "is_quantized", False)
        return Ending.REFUSED
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    return Ending.INTACT


# Fuzzing

BYTES = st.lists(
    st.tuples(st.sampled_from(["replace", "insert", "remove"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


def _spliced(data: bytes, edits: list[tuple[str, float, bytes]], stop: int) -> bytes:
    """`data` with bytes replaced, inserted or removed among its first `stop`."""
    for kind, share, piece in edits:
        at = int(share * min(stop, len(data)))
        end = at if kind == "insert" else at + len(piece)
        data = data[:at] + (b"" if kind == "remove" else piece) + data[end:]
    return data


@fuzzed("bytes of packed checkpoints", BYTES, area=AREA, tries=1200, short=10)
def fuzzed_bytes(edits: Any, trial: Trial) -> Ending:
    data = packed_files()[FILE]
    files = {**packed_files(), FILE: _spliced(data, edits, len(data))}
    return loaded(write_files(files, trial.folder / "packed"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.sampled_from(["F16", "BF16", "I32", "F32", "F64", "U8", "F4", "F8_E4M3", "BOOL", "C64", "I64"])
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
EDITS = st.lists(
    st.tuples(st.sampled_from(["replace", "remove", "add", "offset"]), st.integers(0, 10**6), JSON),
    min_size=1,
    max_size=3,
)


def _with_edits(document: dict[str, Any], edits: list[tuple[str, int, Any]]) -> dict[str, Any]:
    document = copy.deepcopy(document)
    for kind, number, value in edits:
        paths = list(_entries(document))
        if not paths:
            break
        *parents, last = paths[number % len(paths)]
        inner: Any = document
        for key in parents:
            inner = inner[key]
        if kind == "remove":
            del inner[last]
        elif kind == "add" and isinstance(inner, dict):
            inner[f"{last}x"] = value
        elif kind == "offset" and isinstance(inner[last], int) and isinstance(value, int):
            inner[last] += value % 9 - 4
        else:
            inner[last] = value
    return document


@fuzzed("headers of packed checkpoints", EDITS, area=AREA, tries=1600, short=10)
def fuzzed_headers(edits: Any, trial: Trial) -> Ending:
    data = packed_files()[FILE]
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(_with_edits(json.loads(data[8:start]), edits)).encode()
    files = {**packed_files(), FILE: len(header).to_bytes(8, "little") + header + data[start:]}
    return loaded(write_files(files, trial.folder / "packed"))


@fuzzed("values in config.json of packed checkpoints", EDITS, area=AREA, tries=1600, short=10)
def fuzzed_configurations(edits: Any, trial: Trial) -> Ending:
    config = _with_edits(json.loads(packed_files()["config.json"]), edits)
    files = {**packed_files(), "config.json": json.dumps(config).encode()}
    return loaded(write_files(files, trial.folder / "packed"))


@fuzzed("bytes of finished blocks and streams", BYTES, area=AREA, tries=200, short=2)
def fuzzed_work_files(edits: Any, trial: Trial) -> Ending:
    files = dict(work_files())
    name = trial.random.choice(sorted(files))
    stop = trial.random.choice([len(files[name]), 4000])
    files[name] = _spliced(files[name], edits, stop)
    return resumed(write_files(files, trial.folder / "work"))
