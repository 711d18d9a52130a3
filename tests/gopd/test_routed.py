"""
Which rows are read together, and how those of all ranks are spread over them: sharded models are called as seldom as
the rows of all ranks allow, equally often by all of them, and rows come back to where they belong.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.gopd.test_scoring import build
from trl_gopd.gopd.batch import Sequences
from trl_gopd.gopd.frozen.build import FrozenModels
from trl_gopd.gopd.frozen.grouping import MAX_PADDING, align, plan_groups, plan_rounds
from trl_gopd.gopd.frozen.local import LocalScorer
from trl_gopd.gopd.frozen.relabelled import relabelled
from trl_gopd.gopd.frozen.routed import RoutedScorer


def cost(group, lengths, is_packed=False):
    sizes = [lengths[row] for row in group]
    return sum(sizes) if is_packed else len(sizes) * max(sizes)


class TestAlign:
    def test_by_hand(self):
        ids = torch.tensor([[9, 9, 3, 4, 5, 9], [1, 2, 3, 4, 5, 6], [9, 7, 8, 9, 9, 9], [9, 1, 2, 3, 9, 9]])
        mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1] * 6, [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]])
        scored = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]).bool()
        got = align(Sequences(ids, mask, scored))
        # up to the last scored token; rows without one are empty
        assert got.input_ids[0].tolist() == [3, 4, 5] and got.attention_mask.sum(1).tolist() == [3, 0, 0, 3]
        assert got.input_ids[3].tolist() == [1, 2, 3]
        assert got.scored.tolist() == [[True, True], [False, False], [False, False], [False, True]]

    def test_padding_is_a_token_of_the_row(self):
        got = align(Sequences.of(torch.tensor([[0, 5, 6, 0], [7, 8, 9, 3]]), torch.tensor([[0, 1, 1, 0], [1] * 4]), 2))
        assert got.input_ids.tolist() == [[5, 6, 5, 5], [7, 8, 9, 3]]

    def test_no_rows(self):
        got = align(Sequences.of(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5), 3))
        assert len(got) == 0 and got.num_tokens == 0


class TestGroups:
    @pytest.mark.parametrize("is_packed", [False, True])
    @pytest.mark.parametrize("max_tokens", [1, 50, 400, 10**6])
    @pytest.mark.parametrize("count", [1, 7, 64, 300])
    def test_laws(self, count, max_tokens, is_packed, generator):
        lengths = torch.randint(0, 60, (count,), generator=generator).square().tolist()
        groups = plan_groups(lengths, max_tokens, is_packed=is_packed)
        rows = [row for group in groups for row in group]
        assert sorted(rows) == [row for row, length in enumerate(lengths) if length]
        assert all(len(group) == 1 or cost(group, lengths, is_packed) <= max_tokens for group in groups)
        positions = sum(cost(group, lengths, is_packed) for group in groups)
        assert positions <= (1 + MAX_PADDING) * sum(lengths)

    def test_fewest_are_found(self):
        """By enumeration of all cuts of nine sorted rows."""
        lengths = [40, 31, 30, 11, 10, 9, 3, 2, 1]
        best = len(lengths)
        for code in range(2 ** (len(lengths) - 1)):
            bounds = [0, *(i + 1 for i in range(len(lengths) - 1) if code >> i & 1), len(lengths)]
            groups = [list(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
            costs = [cost(group, lengths) for group in groups]
            if max(costs) <= 70 and sum(costs) <= (1 + MAX_PADDING) * sum(lengths):
                best = min(best, len(groups))
        assert len(plan_groups(lengths, 70)) == best < len(lengths)

    def test_nothing(self):
        assert plan_groups([], 8) == plan_groups([0, 0], 8) == plan_rounds([], 8, 2) == plan_rounds([0], 8, 2) == []


class TestRounds:
    @pytest.mark.parametrize("is_packed", [False, True])
    @pytest.mark.parametrize("ranks", [1, 2, 8])
    @pytest.mark.parametrize("max_tokens", [1, 300, 10**6])
    def test_laws(self, ranks, max_tokens, is_packed, generator):
        lengths = torch.randint(0, 40, (70,), generator=generator).square().tolist()
        rounds = plan_rounds(lengths, max_tokens, ranks, is_packed=is_packed)
        assert all(len(groups) == ranks for groups in rounds)
        groups = [group for groups in rounds for group in groups if group]
        rows = [row for group in groups for row in group]
        assert sorted(rows) == [row for row, length in enumerate(lengths) if length]
        assert all(len(group) == 1 or cost(group, lengths, is_packed) <= max_tokens for group in groups)

    @pytest.mark.parametrize("ranks,rows,calls", [(2, 8, 1), (2, 9, 2), (4, 33, 3), (64, 64, 1)])
    def test_as_few_as_the_rows_of_all_ranks_allow(self, ranks, rows, calls):
        """⌈rows / ranks / rows of a call⌉, of four rows a call."""
        rounds = plan_rounds([10] * rows, 40, ranks)
        assert len(rounds) == calls == -(-rows // (4 * ranks))
        sizes = [len(group) for groups in rounds for group in groups]
        assert max(sizes) == -(-rows // (ranks * calls))  # none waits for a rank that has more than its share


class FakeScorer:
    context, is_sharded = None, True

    def __init__(self):
        self.calls = []

    def score(self, sequences):
        self.calls.append(len(sequences))
        return sequences.completion_ids.float()


def test_a_sharded_model_is_called_even_without_rows(generator):
    scorers = [FakeScorer(), FakeScorer(), FakeScorer()]
    scorers[2].is_sharded = False
    ids = torch.randint(1, 9, (4, 5), generator=generator)
    got = RoutedScorer(scorers).score(torch.tensor([1, 1, 1, 1]), Sequences.of(ids, torch.ones_like(ids), 3))
    assert [scorer.calls for scorer in scorers] == [[0], [4], []] and torch.equal(got, ids[:, 2:].float())


class TestRanks:
    """Two processes with two models that claim to be sharded; each rank has most rows of another one."""

    def test_calls_are_balanced_and_rows_come_back(self):
        for name, got in zip(("score", "hidden", "bfloat16"), spread_over_two(), strict=True):
            for rank, other in (got, got[::-1]):
                # 16 rows of each model, of which one rank has 15, and a budget of 4 of the longest
                assert rank["calls"] == other["calls"] == [2, 2], name
                torch.testing.assert_close(rank["got"], rank["want"], rtol=0, atol=rank["atol"], msg=name)
            assert got[0]["shape"] != got[1]["shape"]


def spread_over_two():
    """For `score`, `hidden` and `hidden` in bfloat16 what both ranks report."""
    harness = pytest.importorskip("tests.distributed.harness")
    ranks = harness.run(rows_of_a_rank, "ddp")
    return list(zip(*ranks, strict=True))


def rows_of_a_rank(layout, rank):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the process that forked may have made one
    accelerator = Accelerator(cpu=True)
    assert dist.get_world_size() == accelerator.num_processes == 2
    generator = torch.Generator().manual_seed(rank)
    index = torch.tensor([rank] * 15 + [1 - rank] + [0])
    prompts, length = 3, 9 + rank  # the ranks' batches are padded to different widths
    ids = torch.randint(3, 61, (17, prompts + length), generator=generator)
    completions = torch.randint(length - 2, length + 1, (17,), generator=generator)
    mask = (torch.arange(prompts + length) < (prompts + completions).unsqueeze(1)).long()
    mask[::2, 0] = 0
    sequences = Sequences.of(ids, mask, length)
    needed = torch.arange(17) < 16
    reports = []
    for what, dtype in (("score", torch.float32), ("hidden", torch.float32), ("hidden", torch.bfloat16)):
        models = [build("scale").to(dtype), build("learned positions").to(dtype)]
        alone = RoutedScorer([LocalScorer(m, accelerator=accelerator, **OPTIONS) for m in models])
        shared = [LocalScorer(m, accelerator=accelerator, **OPTIONS) for m in models]
        calls = [0, 0]
        for number, scorer in enumerate(shared):
            scorer._is_sharded = True
            scorer.call = counted(scorer.call, calls, number)
        routed = RoutedScorer(shared)
        if what == "score":
            got, want = (each.score(index, sequences, needed) for each in (routed, alone))
        else:
            got, want = (hidden_states(each.targets(index, sequences, needed)) for each in (routed, alone))
        # a few dozen roundings of logits or hidden states below 64, which depend on what is read together
        atol = 40 * torch.finfo(dtype).eps * (64 if dtype == torch.float32 else want.abs().max().item())
        reports.append({"calls": calls, "got": got, "want": want, "atol": atol, "shape": tuple(ids.shape)})
    return reports


OPTIONS = {"temperature": 1.0, "role": "teacher_model", "batch_size": 4, "chunk_size": 7}


def hidden_states(targets):
    return torch.cat([states for _, states, _ in targets._parts]).float()


def counted(call, calls, number):
    def count(*args, **kwargs):
        calls[number] += 1
        return call(*args, **kwargs)

    return count


def test_only_deepspeed_can_shard_beside_the_student():
    from trl_gopd.gopd.frozen.sharding import check_sharding

    state = SimpleNamespace(deepspeed_plugin=None)
    with pytest.raises(ValueError, match=r"launched without it \(NO\). Launch it with a DeepSpeed configuration"):
        check_sharding(SimpleNamespace(state=state, distributed_type="NO"))


def test_configuration_of_a_model_that_is_sharded_alone():
    from trl_gopd.gopd.frozen.sharding import zero3_config

    zero = {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}, "stage3_prefetch_bucket_size": 7}
    given = {"bf16": {"enabled": True}, "train_batch_size": 8, "zero_optimization": zero}
    assert zero3_config(given) == {
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7},
    }
    assert given["zero_optimization"]["stage"] == 2


class TestPrefetch:
    """While completions are generated, the weights of a single teacher are on their way."""

    @pytest.fixture
    def fetched(self, monkeypatch):
        calls = []
        monkeypatch.setattr(LocalScorer, "prefetch", lambda scorer: calls.append(scorer))
        return calls

    @pytest.mark.parametrize("is_relabelled", [False, True])
    def test_of_one_teacher(self, fetched, is_relabelled):
        scorer = local_scorer()
        FrozenModels({None: relabelled(scorer, 1, 2) if is_relabelled else scorer}, {}, None).prefetch()
        assert fetched == [scorer]

    def test_not_of_several(self, fetched):
        FrozenModels({"a": local_scorer(), "b": local_scorer()}, {}, None).prefetch()
        assert fetched == []


def local_scorer():
    from accelerate import Accelerator

    return LocalScorer(build("scale"), accelerator=Accelerator(cpu=True), **OPTIONS)


@pytest.mark.parametrize(
    "value", [1e300, 10**400, float("nan"), -1.0, "1", None, True, [1.0]], ids=lambda v: str(v)[:9]
)
def test_a_lambda_that_is_none_names_its_row(models, value):
    from trl_gopd.gopd.config import GOPDConfig
    from trl_gopd.gopd.frozen.routing import Routing

    routing = Routing("teacher", "reference", GOPDConfig("out", use_cpu=True, bf16=False))
    with pytest.raises(ValueError, match="`lambda` must be a finite number >= 0, got .* 'x'. Correct the row"):
        routing.rows([{"prompt": "x", "lambda": value}])
