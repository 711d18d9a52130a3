"""An error that leaves `together` on one rank ends the other one as well, which then says the same."""

import json
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import harness
from trl_gopd.gopd import ranks
from trl_gopd.gopd.ranks import OtherRankError, together


GONE = "The process of another rank is gone, and has told no error."


def wait_for_the_others() -> None:
    dist.all_reduce(torch.zeros(1))


def ends(function, **kwargs):
    return harness.run_to_end(function, "ddp", within=12, **kwargs)


def fail_alone(layout, rank, *, failing, error):
    dist.init_process_group("gloo")
    with together():
        wait_for_the_others()
        if rank == failing:
            raise error
        wait_for_the_others()


@pytest.mark.parametrize("failing", [0, 1])  # the process of rank 0 holds the store
@pytest.mark.parametrize("error", [ValueError("no such row"), RuntimeError("no such row")], ids=lambda e: type(e))
def test_the_other_rank_says_what_was_wrong(failing, error):
    ended = ends(fail_alone, failing=failing, error=error)
    assert [rank.code for rank in ended] == [1, 1]
    said = f"{type(error).__name__}: no such row"
    assert ended[failing].error == said
    assert ended[1 - failing].error.endswith(f"OtherRankError: Rank {failing}: {said}")
    assert "by peer" in ended[1 - failing].log, "the error of the operation itself is chained"


def fail_and_live_on(layout, rank):
    dist.init_process_group("gloo")
    ranks.PATIENCE = 0.5
    try:
        with together():
            if rank == 1:
                raise ValueError("no such row")
            wait_for_the_others()
    except ValueError:
        time.sleep(3)  # as a process does that cannot end: with NCCL, or while an exit handler waits for a network


def test_a_rank_that_waits_in_vain_is_ended():
    zero, one = ends(fail_and_live_on)
    assert (zero.code, one.code) == (1, 0)
    assert one.seconds > 1, "the other rank was released by the end of this one"
    assert zero.log.splitlines()[-2:] == [
        "Rank 1: ValueError: no such row",
        "The process of rank 0 has waited for 0 more seconds, and ends.",
    ]


def be_killed(layout, rank):
    dist.init_process_group("gloo")
    with together():
        wait_for_the_others()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_the_others()


def test_a_killed_rank_is_named_as_gone():
    zero, one = ends(be_killed)
    assert (zero.code, one.code) == (1, -signal.SIGKILL)
    assert GONE in zero.error and zero.error.endswith("`resume_from_checkpoint=True`.")


def lose_the_store(layout, rank):
    dist.init_process_group("gloo")
    ranks.LOST_AFTER, ranks.ANSWER_WITHIN, ranks.PATIENCE = 0.5, 1.0, 0.5
    with together():
        wait_for_the_others()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(20)  # nothing that a lost connection could end


def test_without_the_process_of_the_store_no_rank_goes_on():
    zero, one = ends(lose_the_store)
    assert (zero.code, one.code) == (-signal.SIGKILL, 1)
    assert "The launcher is gone, or the process of rank 0, which holds the store." in one.log.splitlines()[-2]


def fail_twice(layout, rank):
    """The messages of errors that are the same on both ranks, of one that is not, and of none."""
    dist.init_process_group("gloo")
    said = []
    for own in (ValueError("at once"), torch.OutOfMemoryError(f"rank {rank}"), OtherRankError("Rank 7: gone"), None):
        try:
            with together(), together():
                wait_for_the_others()
                if own is not None:
                    raise own
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    time.sleep(2 * ranks.LOOK_EVERY)  # an earlier error is none of the next body
    with together():
        time.sleep(2 * ranks.LOOK_EVERY)
        wait_for_the_others()
    names = {thread.name for thread in threading.enumerate()}
    return [*said, "gopd_ranks" in names]


def test_errors_of_all_ranks_stay_their_own():
    expected = [["ValueError: at once", f"OutOfMemoryError: rank {n}", "OtherRankError: Rank 7: gone"] for n in (0, 1)]
    assert harness.run(fail_twice, "ddp") == [[*said, False] for said in expected]


def record(layout, rank, *, folder):
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/{rank}.json"
    fail_alone(layout, rank, failing=1, error=ValueError("no such row"))


def test_the_launcher_is_told_of_the_first_error(tmp_path):
    ends(record, folder=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["1.json"]
    message = json.loads((tmp_path / "1.json").read_text())["message"]
    assert message["message"] == "ValueError: no such row" and "fail_alone" in message["extraInfo"]["py_callstack"]


def record_another(layout, rank, *, folder):
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/{rank}.json"
    dist.init_process_group("gloo")
    with together():
        raise OtherRankError("Rank 7: gone")


def test_the_launcher_is_told_by_a_rank_that_ends_before_the_one_that_failed(tmp_path):
    ends(record_another, folder=str(tmp_path))
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["0.json", "1.json"]
    assert all("OtherRankError: Rank 7: gone" in path.read_text() for path in files)


def fail_without_a_place(layout, rank):
    os.environ["TORCHELASTIC_ERROR_FILE"] = "/dev/full"
    fail_alone(layout, rank, failing=1, error=ValueError("no such row"))


def test_an_error_that_cannot_be_recorded_is_raised():
    _, one = ends(fail_without_a_place)
    assert one.error == "ValueError: no such row"


def test_a_single_process_does_nothing():
    before = threading.active_count()
    with together():
        assert threading.active_count() == before
