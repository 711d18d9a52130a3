"""
Files of a checkpoint, and rows of data, that nobody would write on purpose.

What is read is what was written, or ends in one error that names the file or the row. A changed file is also one that
the manifest tells from the one that was written.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.faults.harness import Ending, Trial, fuzzed
from tests.faults.training import build, models, uninterrupted
from tests.tiny import LORA
from trl_gopd.gopd.checkpoints import MANIFEST, STATE, problem
from trl_gopd.gopd.frozen.start import StudentStart
from trl_gopd.gopd.rollout_file import read_rollouts
from trl_gopd.gopd.schedules import LambdaSchedule
from trl_gopd.gopd.state import read_state
from trl_gopd.gopd.trainer import GOPDTrainer


# Values

NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, math.nan, math.inf, -math.inf]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)
# One change of a value in nested lists and dictionaries: where, what, and by what.
EDITS = st.lists(st.tuples(st.integers(0, 999), st.sampled_from(["set", "drop", "rename", "copy"]), JUNK), min_size=1)
SPLICES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=3)
DEPTHS = st.tuples(st.sampled_from(["[", '{"files":', '{"a":[']), st.integers(1, 200_000))


def edited(content: Any, edits: Sequence[tuple[int, str, Any]]) -> Any:
    """A copy of nested lists and dictionaries with some values changed."""
    content = json.loads(json.dumps(content))
    for number, kind, value in edits:
        places: list[tuple[Any, Any]] = []
        stack = [content]
        while stack:
            inner = stack.pop()
            keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
            for key in keys:
                places.append((inner, key))
                stack.append(inner[key])
        if not places:
            return value
        holder, key = places[number % len(places)]
        if kind == "set" or isinstance(holder, list):
            holder[key] = value
        elif kind == "drop":
            del holder[key]
        elif kind == "rename":
            holder[str(value)] = holder.pop(key)
        else:
            holder[str(value)] = holder[key]
    return content


def spliced(content: bytes, splices: Sequence[tuple[float, int, bytes]]) -> bytes:
    """Bytes of which some were replaced by others, as many or not."""
    for place, length, new in splices:
        start = int(place * len(content))
        content = content[:start] + new + content[start + length :]
    return content


# Files

TEXTS = st.one_of(EDITS, SPLICES.map(lambda splices: ("bytes", splices)), DEPTHS, st.binary(max_size=60))


def changed_text(before: bytes, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple) and value[0] == "bytes":
        return spliced(before, value[1])
    if isinstance(value, tuple):
        return (value[0] * value[1]).encode()
    return json.dumps(edited(json.loads(before), value)).encode("utf-8", "surrogatepass")


def checkpoint(trial: Trial) -> Path:
    """A checkpoint in the middle of a generation batch, of which every file may be written anew."""
    folder = trial.folder / "checkpoint-1"
    folder.mkdir()
    for path in (uninterrupted("sampled")[1] / "checkpoint-1").iterdir():
        os.link(path, folder / path.name)
    return folder


def write(path: Path, content: bytes) -> bool:
    """Writes a file anew, and tells whether it is another one now; if so, its checkpoint is not whole."""
    has_changed = path.read_bytes() != content
    path.unlink()
    path.write_bytes(content)
    if path.name != MANIFEST:
        assert (problem(path.parent) is not None) == has_changed
    return has_changed


def refused(read: Callable[[], Any], path: Path) -> Any:
    """What a function returns, or `None` if it raises a `ValueError` with the name of the file and a remedy."""
    try:
        return read()
    except ValueError as error:
        assert str(path) in str(error) or str(path.parent) in str(error), error
        assert "Resume from another" in str(error) or "start anew" in str(error), error
        return None


@functools.cache
def identities() -> dict[str, Any]:
    saved = json.loads((uninterrupted("sampled")[1] / "checkpoint-1" / STATE).read_text())
    return {role: saved[role] for role in ("teachers", "references")}


@fuzzed("a state of a run", TEXTS, area="training_inputs", tries=900, short=20)
def states(value: Any, trial: Trial) -> Ending:
    path = checkpoint(trial) / STATE
    before = json.loads(path.read_bytes())
    write(path, changed_text(path.read_bytes(), value))
    schedule = LambdaSchedule("adaptive")
    saved = refused(lambda: read_state(path.parent, identities(), schedule), path)
    if saved is None:
        assert schedule == LambdaSchedule("adaptive")
        return Ending.REFUSED
    assert all(type(saved[name]) is int and saved[name] >= 0 for name in ("micro_step", "skipped_steps", "format"))
    numbers = schedule.state_dict()
    assert all(math.isfinite(number) for number in (numbers["ratio"], numbers["trust"], *numbers["start_lengths"]))
    for role, found in identities().items():
        for key, model in found.items():  # that of another model would have been refused
            assert saved[role][key].get("weights") in (None, "", model["weights"]) or not before
    return Ending.INTACT


@fuzzed("a manifest of a checkpoint", TEXTS, area="training_inputs", tries=700, short=20)
def manifests(value: Any, trial: Trial) -> Ending:
    folder = checkpoint(trial)
    (trial.folder / "secret").write_bytes(b"x")
    write(folder / MANIFEST, changed_text((folder / MANIFEST).read_bytes(), value))
    if problem(folder) is not None:
        return Ending.REFUSED
    files = json.loads((folder / MANIFEST).read_text())["files"]
    before = json.loads((uninterrupted("sampled")[1] / "checkpoint-1" / MANIFEST).read_text())["files"]
    for name, entry in files.items():  # the files are as they were, so it may only leave some out, or name one twice
        same = os.path.normpath(name)
        assert not same.startswith(("..", "/")) and {key: entry[key] for key in before[same]} == before[same]
    assert STATE in files and "trainer_state.json" in files
    return Ending.INTACT


VALUES_OF_ROLLOUTS = st.one_of(
    JUNK,
    st.tuples(
        st.sampled_from(["int64", "float32", "bool", "complex64", "int8", "bfloat16"]),
        st.lists(st.integers(0, 5), max_size=4),
        st.sampled_from([0, 1, 100, math.nan, math.inf]),
        st.booleans(),
    ),
)


def tensor_of(value: Any) -> Any:
    """A tensor of a drawn dtype and shape, perhaps one number that is seen as many."""
    if not isinstance(value, tuple):
        return value
    dtype, shape, number, is_expanded = value
    if isinstance(number, float) and not dtype.startswith(("float", "bfloat", "complex")):
        number = 7
    tensor = torch.tensor(number, dtype=getattr(torch, dtype))
    return tensor.expand(*shape, 10**6) if is_expanded else tensor.expand(shape).clone()


@fuzzed(
    "rollouts of a checkpoint",
    st.one_of(
        SPLICES,
        st.binary(max_size=60),
        st.tuples(st.integers(0, 9), st.integers(0, 99), VALUES_OF_ROLLOUTS),
    ),
    area="training_inputs",
    tries=700,
    short=20,
)
def rollouts(value: Any, trial: Trial) -> Ending:
    path = checkpoint(trial) / "gopd_rollouts_0.pt"
    content = path.read_bytes()
    if isinstance(value, tuple):
        stored = torch.load(path, weights_only=True)
        micro_batch = stored[value[0] % len(stored)]
        names = [*micro_batch, "gopd_top_ids", "more"]
        micro_batch[names[value[1] % len(names)]] = tensor_of(value[2])
        torch.save(stored, trial.folder / "changed.pt")
        content = (trial.folder / "changed.pt").read_bytes()
    else:
        content = value if isinstance(value, bytes) else spliced(content, value)
    write(path, content)
    fits = {"micro_batches": 4, "rows": 2, "vocab_size": 259, "num_teachers": 1}
    found = refused(lambda: read_rollouts(path, torch.device("cpu"), **fits), path)
    if found is None:
        return Ending.REFUSED
    for micro_batch in found:
        rows, tokens = micro_batch["completion_ids"].shape
        assert rows == 2 and micro_batch["completion_mask"].shape == (rows, tokens)
        assert 0 <= micro_batch["completion_ids"].min() <= micro_batch["completion_ids"].max() < 259
        largest = max(value.numel() * value.element_size() for value in micro_batch.values() if torch.is_tensor(value))
        assert largest <= 2 * len(content)
    return Ending.INTACT


@functools.cache
def start() -> tuple[StudentStart, bytes]:
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_pretrained(models() / "student", dtype=torch.float32)
    kept = StudentStart(get_peft_model(student, LoraConfig(**LORA, init_lora_weights=False)), Accelerator(cpu=True))
    kept.save(models())
    return kept, (models() / StudentStart.FILE).read_bytes()


@fuzzed(
    "the kept start of a student",
    st.one_of(SPLICES, st.binary(max_size=60), EDITS),
    area="training_inputs",
    tries=300,
    short=10,
)
def starts(value: Any, trial: Trial) -> Ending:
    kept, content = start()
    if isinstance(value, list) and isinstance(value[0][1], str):  # a header of other names, shapes and places
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(edited(json.loads(content[8 : 8 + length]), value)).encode("utf-8", "surrogatepass")
        changed = len(header).to_bytes(8, "little") + header + content[8 + length :]
    else:
        changed = value if isinstance(value, bytes) else spliced(content, value)
    path = trial.folder / StudentStart.FILE
    path.write_bytes(changed)
    before = dict(kept._tensors)
    found = refused(lambda: kept.load(trial.folder) or True, path)
    after, kept._tensors = kept._tensors, before
    if found is None:
        return Ending.REFUSED
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    return Ending.INTACT


# Rows

LONGEST = 6  # tokens of a completion
GOOD = {
    "prompt": "1+2",
    "teacher_id": "math",
    "lambda": 1.25,
    "completion_ids": [5, 6, 2],
    "sampling_per_token_logps": [-5.5, -5.0, -6.0],
    "teacher_prompt": None,
}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["user", "system", "", 3, None]), "content": JUNK | st.just("x")}
    )
    | JUNK,
    max_size=3,
)
TEXT = st.one_of(st.text(max_size=30), st.just("x" * 300), st.just("\ud800"), st.just("a\x00\x1b\u2028"))
# Of a column, what it may hold, and everything else.
COLUMNS = {
    "prompt": (st.text(min_size=1, max_size=20), JUNK | TEXT | MESSAGES),
    "teacher_prompt": (st.none() | st.text(min_size=1, max_size=20), JUNK | TEXT | MESSAGES),
    "teacher_id": (st.sampled_from(["math", "code"]), JUNK),
    "lambda": (st.floats(0, 4) | st.integers(0, 4), NUMBERS | JUNK),
    "completion_ids": (
        st.lists(st.integers(0, 258), min_size=3, max_size=3),
        st.lists(st.integers(-1, 260), max_size=8) | st.lists(JUNK, max_size=4) | JUNK,
    ),
    "sampling_per_token_logps": (
        st.lists(st.floats(-20, 0) | st.just(0), min_size=3, max_size=3),
        st.lists(st.floats(-9, 1) | NUMBERS, min_size=2, max_size=4) | st.lists(JUNK, min_size=3, max_size=3) | JUNK,
    ),
}


def is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_prompt(value: Any, may_be_empty: bool = False) -> bool:
    if isinstance(value, str):
        return is_text(value) and 0 < len(value.encode()) <= 250
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(message, dict)
            and is_text(message.get("role"))
            and message["role"] != ""
            and is_text(message.get("content"))
            for message in value
        )
    )


def is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_good(row: dict[str, Any]) -> bool:
    """What a row may hold, said once more, and in another way than the package says it."""
    ids, logps = row["completion_ids"], row["sampling_per_token_logps"]
    return (
        is_prompt(row["prompt"])
        and (row["teacher_prompt"] is None or is_prompt(row["teacher_prompt"]))
        and row["teacher_id"] in ("math", "code")
        and is_number(row["lambda"], 0, 3.4028234e38)
        and isinstance(ids, list)
        and 1 <= len(ids) <= LONGEST
        and all(type(index) is int and 0 <= index < 259 for index in ids)
        and isinstance(logps, list)
        and len(logps) == len(ids)
        and all(is_number(value, -3.4028234e38, 1e-4) for value in logps)
    )


@functools.cache
def row_trainer(estimator: str) -> GOPDTrainer:
    folder = str(models() / "base")
    trainer = build(
        estimator,
        teacher_model={"math": str(models() / "teacher"), "code": folder},
        train_dataset=Dataset.from_list([{**GOOD, "teacher_prompt": "x"}] * 8),
        use_stored_completions=True,
        max_completion_length=LONGEST,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        num_iterations=1,
        per_device_train_batch_size=3,
        gopd_lambda_schedule="constant",
        gopd_back_off=None,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@fuzzed(
    "rows of data",
    st.tuples(
        st.sampled_from(["sampled", "full", "stratified"]),
        st.integers(0, 2),
        st.booleans(),
        st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, max_size=3, unique=True).flatmap(
            lambda names: st.fixed_dictionaries({name: st.one_of(*COLUMNS[name]) for name in names})
        ),
    ),
    area="training_inputs",
    tries=1600,
    short=30,
)
def rows(value: Any, trial: Trial) -> Ending:
    estimator, place, are_messages, columns = value
    others = [{"role": "user", "content": "1+2"}] if are_messages else "1+2"
    batch = [{**GOOD, "prompt": others} for _ in range(3)]
    batch[place].update(columns)
    trainer = row_trainer(estimator)
    trainer._step, trainer._buffered_inputs = 0, None
    trainer.model.zero_grad()
    trainer.model.train()
    expected = is_good(batch[place]) and type(batch[place]["prompt"]) is type(others)
    try:
        loss = trainer.training_step(trainer.model, batch, None)
    except (ValueError, TypeError, FloatingPointError) as error:
        message = str(error)
        assert "row" in message, error
        if expected:  # what is allowed may still be too long together, or too large
            assert isinstance(error, FloatingPointError) or "exceed its context" in message, error
        return Ending.REFUSED
    assert expected, "A row that is none was trained on."
    assert loss.isfinite()
    # The gradient of a huge λ may not be finite; before the step, its norm would say so.
    finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in trainer.model.parameters())
    assert finite or batch[place]["lambda"] > 1e6
    return Ending.INTACT
