"""
One of two ranks fails, is killed, or finds its disk full: both end soon, nobody is left, and what is read says why.

Ranks are started by `accelerate launch`, `torchrun` and `deepspeed`, under DDP, ZeRO-2, ZeRO-3 and FSDP2, on gloo.
"""

import re
from pathlib import Path

import transformers

from tests.distributed import harness, launch_fault
from tests.distributed.launching import Ending as Launched
from tests.distributed.launching import launch
from tests.faults.harness import Ending, Trial, scenario
from tests.gopd.test_served import running
from tests.tiny import build_model, build_tokenizer


SOON = 20.0  # seconds from the fault to the end of all processes, on cores that others use as well
FAILED = f"ValueError: {launch_fault.MESSAGE}"
SUMMARY = "Root Cause (first observed failure):"  # of torchrun, and of accelerate, which calls it


def make_models(folder: Path) -> None:
    tokenizer = build_tokenizer()
    for name, seed, hidden in (("student", 1, 32), ("teacher", 2, 48)):
        build_model(tokenizer, seed=seed, hidden_size=hidden).save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)


def fail(trial: Trial, ways: list[tuple[str, str, str]], said: str, *options: str) -> Ending:
    """Runs the script in one of several `ways`, a launcher, a layout and further options, until it says `said`."""
    launcher, layout, more = ways[trial.number % len(ways)]
    make_models(trial.folder)
    end = launch(launcher, layout, trial.folder, *more.split(), *options)
    assert_soon(end)
    assert said in end.log, end.log[-5000:]
    assert "by peer" not in end.log.partition(said)[0], f"A lost connection is read first.\n{end.log[-5000:]}"
    if launcher == "deepspeed":
        assert re.search(rf"OtherRankError: Rank \d: {re.escape(said)}", end.log), end.log[-5000:]
    elif "disk" not in more:  # the message reaches torchrun through a file
        assert said in end.log.partition(SUMMARY)[2], end.log[-5000:]
    return Ending.REFUSED


def assert_soon(end: Launched) -> None:
    assert end.code, f"The launcher ended with {end.code}.\n{end.log[-5000:]}"
    assert not end.left and end.seconds < SOON, f"{end.seconds:.0f} s, ranks left: {end.left}.\n{end.log[-5000:]}"


@scenario("a row of the data raises on one rank", area="ranks", tries=2, short=0, seconds=200)
def row(trial: Trial) -> Ending:
    ways = [("accelerate", "ddp", "--failing 0"), ("deepspeed", "zero2", "")]
    return fail(trial, ways, FAILED, "--fault", "row")


@scenario("a prompt on one rank is too long for the teacher", area="ranks", tries=2, short=0, seconds=200)
def overlong(trial: Trial) -> Ending:
    ways = [("accelerate", "zero2", ""), ("torchrun", "ddp", "--failing 0")]
    return fail(trial, ways, "ValueError: The prompt of 680 tokens that `teacher_model` (", "--fault", "overlong")


@scenario("one rank cannot load its teacher", area="ranks", tries=2, short=0, seconds=200)
def missing(trial: Trial) -> Ending:
    ways = [("accelerate", "zero3", ""), ("accelerate", "fsdp2", "--failing 0")]
    return fail(trial, ways, "OSError: ", "--fault", "missing")


@scenario("a server refuses what one rank asks", area="ranks", tries=1, short=0, seconds=200)
def served(trial: Trial) -> Ending:
    make_models(trial.folder)
    folder = trial.folder / "models" / "teacher"
    with running(transformers.AutoModelForCausalLM.from_pretrained(folder), str(folder)) as server:
        mark = build_tokenizer()("###")["input_ids"]

        def edit(choices):
            asked = server.requests[-1]["prompt"]
            if any(ids[at : at + 3] == mark for ids in asked for at in range(len(ids))):
                server.status = 400
            return choices

        server.edit = edit
        return fail(
            trial, [("accelerate", "ddp", "")], " answered HTTP 400: ", "--fault", "served", "--teacher", server.url
        )


@scenario("the teacher of one rank gives NaN", area="ranks", tries=2, short=0, seconds=200)
def not_a_number(trial: Trial) -> Ending:
    ways = [("accelerate", "zero2", ""), ("accelerate", "ddp", "--failing 0 --estimator full")]
    return fail(trial, ways, "FloatingPointError: `teacher_model` (", "--fault", "nan")


@scenario("one rank fails inside a sharded model", area="ranks", tries=2, short=0, seconds=200)
def sharded(trial: Trial) -> Ending:
    ways = [("accelerate", "zero3", "--phase scoring"), ("accelerate", "fsdp2", "--phase forward --failing 0")]
    return fail(trial, ways, FAILED, "--fault", "error")


@scenario("the disk of one rank is full when it saves", area="ranks", tries=2, short=0, seconds=200)
def disk(trial: Trial) -> Ending:
    ways = [("accelerate", "zero3", "--fault disk"), ("deepspeed", "zero2", "--fault disk")]
    return fail(trial, ways, f"OSError: The checkpoint {trial.folder}", "--phase", "saving")


@scenario("one rank is killed while it samples, scores, trains or saves", area="ranks", tries=5, short=0, seconds=200)
def killed(trial: Trial) -> Ending:
    ways = [
        ("accelerate", "ddp", "--phase generation --failing 0"),
        ("deepspeed", "zero2", "--phase scoring"),
        ("accelerate", "zero3", "--phase backward"),
        ("accelerate", "fsdp2", "--phase forward"),
        ("torchrun", "ddp", "--phase saving"),
    ]
    launcher, layout, more = ways[trial.number % len(ways)]
    make_models(trial.folder)
    end = launch(launcher, layout, trial.folder, "--fault", "killed", *more.split())
    assert_soon(end)
    said = "exits with return code = -9" if launcher == "deepspeed" else "Signal 9 (SIGKILL) received by PID"
    assert said in end.log, end.log[-5000:]
    return Ending.REFUSED


@scenario("the launcher is killed", area="ranks", tries=1, short=0, seconds=200)
def launcher_killed(trial: Trial) -> Ending:
    make_models(trial.folder)
    end = launch("torchrun", "ddp", trial.folder, "--steps", "100000", "--patience", "3", kill_launcher=True)
    assert_soon(end)
    assert "The launcher is gone" in end.log, end.log[-5000:]
    return Ending.REFUSED


@scenario("one rank fails, and its process does not end", area="ranks", tries=2, short=1, seconds=60)
def lives_on(trial: Trial) -> Ending:
    make_models(trial.folder)
    fault = {"fault": "error", "phase": "scoring", "lives_on": 30.0, "patience": 1.0, "failing": 1 - trial.number % 2}
    folders = {"models": str(trial.folder / "models"), "out": str(trial.folder / "out")}
    ended = harness.run_to_end(launch_fault.train, "zero3", within=0, **folders, **fault)
    failing, other = (ended[rank] for rank in (fault["failing"], 1 - fault["failing"]))
    assert (failing.code, other.code) == (None, 1), other.log[-5000:]
    assert other.log.splitlines()[-2] == f"Rank {fault['failing']}: {FAILED}", other.log[-5000:]
    return Ending.REFUSED
