"""
Laws of the exact divergence: its value and gradient against float64 and finite differences, the sampled estimator's
expectation, padded vocabularies, and the precision that the head's products have.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_gopd.gopd.divergence import _add_product, add_label_gradient, chunk_slices, extrapolated_divergence
from trl_gopd.gopd.objective import LogitTransform, token_advantages
from trl_gopd.gopd.stratified import log_probs_at, stratified_divergence


EPS = torch.finfo(torch.float32).eps
# The worked example: targets q_λ for T = (.5, .3, .2) and R = (.2, .3, .5).
TEACHER, REFERENCE = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
TARGETS = {
    0.5: (0.339, 0.322, 0.339),
    1.0: (0.5, 0.3, 0.2),
    1.25: (0.578, 0.276, 0.146),
    1.5: (0.650, 0.246, 0.104),
    2.0: (0.767, 0.184, 0.049),
}


def draw(*shape, generator, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def dense(z_s, z_t, z_r, gopd_lambda, clip=None):
    """KL(π ‖ q_λ) written out with whole tensors, in the dtype of the inputs."""
    log_s, log_t, log_r = (z.log_softmax(-1) for z in (z_s, z_t, z_r))
    reward = log_t - log_r
    if clip is not None:
        reward = reward.clamp(-clip, clip)
    lam = torch.as_tensor(gopd_lambda, dtype=z_s.dtype)
    log_q = (log_t + (lam.unsqueeze(-1) - 1) * reward).log_softmax(-1)
    return (log_s.exp() * (log_s - log_q)).sum(-1)


class TestExtrapolatedDivergence:
    N, D, V = 7, 5, 37

    def problem(self, generator, dtype=torch.float32):
        hidden = draw(self.N, self.D, generator=generator, dtype=dtype).requires_grad_()
        weight = draw(self.V, self.D, generator=generator, dtype=dtype).requires_grad_()
        bias = draw(self.V, generator=generator, dtype=dtype).requires_grad_()
        teacher, reference = (draw(self.N, self.V, generator=generator, dtype=dtype) for _ in range(2))
        labels = torch.randint(self.V, (self.N,), generator=generator)
        return hidden, weight, bias, teacher, reference, labels

    @pytest.mark.parametrize("chunk_size", [3, 256])
    @pytest.mark.parametrize("gopd_lambda", [0.5, 1.0, 1.25, "rows"])
    @pytest.mark.parametrize(
        "transform",
        [LogitTransform(), LogitTransform(scale=0.7, softcap=2.0, temperature=1.3)],
        ids=["plain", "capped"],
    )
    @pytest.mark.parametrize("clip", [None, 0.3])
    def test_value_and_gradient_equal_dense(self, generator, chunk_size, gopd_lambda, transform, clip):
        hidden, weight, bias, teacher, reference, labels = self.problem(generator)
        lam = torch.linspace(0, 2, self.N) if gopd_lambda == "rows" else gopd_lambda
        upstream = draw(self.N, generator=generator)
        out = extrapolated_divergence(
            hidden,
            weight,
            bias,
            labels=labels,
            target_logits=lambda rows: (teacher[rows], reference[rows]),
            gopd_lambda=lam,
            transform=transform,
            extrapolation_clip=clip,
            chunk_size=chunk_size,
        )
        got = torch.autograd.grad((out.divergence * upstream).sum(), (hidden, weight, bias))

        exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
        raw = exact[0] @ exact[1].t() + exact[2]
        z = raw * transform.scale
        z = z if transform.softcap is None else transform.softcap * (z / transform.softcap).tanh()
        z = z / transform.temperature
        expected = dense(z, teacher.double(), reference.double(), lam, clip)
        want = torch.autograd.grad((expected * upstream).sum(), exact)
        # float32 against float64: a few dozen roundings (D + V + the softmaxes) of numbers of magnitude below 16
        tolerance = (self.D + self.V + 10) * EPS * 16
        torch.testing.assert_close(out.divergence.double(), expected, rtol=0, atol=tolerance)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * self.N)

        log_s, log_t = z.log_softmax(-1), teacher.double().log_softmax(-1)
        pick = labels.unsqueeze(1)
        for name, value in {
            "student_logps": log_s.gather(1, pick).squeeze(1),
            "teacher_logps": log_t.gather(1, pick).squeeze(1),
            "reference_logps": reference.double().log_softmax(-1).gather(1, pick).squeeze(1),
            "entropy": -(log_s.exp() * log_s).sum(-1),
            "reverse_kl": (log_s.exp() * (log_s - log_t)).sum(-1),
        }.items():
            torch.testing.assert_close(getattr(out, name).double(), value, rtol=0, atol=tolerance, msg=name)

    def test_gradient_is_the_expectation_of_the_sampled_estimator(self, generator):
        """Rao-Blackwell, by enumeration: Σ_v π_v · A_v ∇log π_v = −∇KL(π ‖ q_λ)."""
        z = draw(1, 6, generator=generator).requires_grad_()
        teacher, reference = draw(1, 6, generator=generator), draw(1, 6, generator=generator)
        logps = z.log_softmax(-1)
        advantages = token_advantages(
            student_logps=logps,
            teacher_logps=teacher.log_softmax(-1),
            reference_logps=reference.log_softmax(-1),
            mask=torch.ones(1, 6),
            gopd_lambda=1.25,
        )
        (sampled,) = torch.autograd.grad((logps.exp().detach() * advantages * logps).sum(), z)
        out = extrapolated_divergence(
            z,
            torch.eye(6),
            None,
            labels=torch.zeros(1, dtype=torch.long),
            target_logits=lambda rows: (teacher[rows], reference[rows]),
            gopd_lambda=1.25,
        )
        (full,) = torch.autograd.grad(out.divergence.sum(), z)
        torch.testing.assert_close(full, -sampled, rtol=0, atol=20 * EPS * 4)

    def test_finite_differences(self, generator):
        z, teacher, reference = (draw(2, 5, generator=generator) for _ in range(3))

        def value(logits):
            out = extrapolated_divergence(
                logits,
                torch.eye(5),
                None,
                labels=torch.zeros(2, dtype=torch.long),
                target_logits=lambda rows: (teacher[rows], reference[rows]),
                gopd_lambda=1.5,
            )
            return out.divergence.sum()

        leaf = z.clone().requires_grad_()
        (grad,) = torch.autograd.grad(value(leaf), leaf)
        step = 1e-2
        for index in range(10):
            shift = torch.zeros(10)
            shift[index] = step
            slope = (value(z + shift.view(2, 5)) - value(z - shift.view(2, 5))) / (2 * step)
            # third derivative below 8, so step²·8/6; plus the rounding of two values below 8
            assert abs(float(slope - grad.view(-1)[index])) < step**2 * 8 / 6 + 20 * EPS * 8 / step

    @pytest.mark.parametrize("gopd_lambda", list(TARGETS))
    def test_target_is_the_closed_form_optimum(self, gopd_lambda):
        """At π = q_λ the divergence and its gradient vanish; the constants are rounded to three digits."""
        z = torch.tensor([TARGETS[gopd_lambda]]).log().requires_grad_()
        out = extrapolated_divergence(
            z,
            torch.eye(3),
            None,
            labels=torch.zeros(1, dtype=torch.long),
            target_logits=lambda rows: (TEACHER.log().unsqueeze(0), REFERENCE.log().unsqueeze(0)),
            gopd_lambda=gopd_lambda,
        )
        (grad,) = torch.autograd.grad(out.divergence.sum(), z)
        # half a unit of the third digit on each of three probabilities
        assert grad.abs().max() < 3 * 0.0005 * 2
        assert out.divergence.item() < (3 * 0.0005) ** 2 / 0.049

    def test_padded_vocabularies_use_the_shared_ids(self, generator):
        hidden, weight, bias, teacher, reference, labels = self.problem(generator)
        wide = torch.cat([teacher, draw(self.N, 3, generator=generator)], 1)
        results = [
            extrapolated_divergence(
                hidden,
                weight,
                bias,
                labels=labels,
                target_logits=lambda rows, t=t: (t[rows], reference[rows]),
                gopd_lambda=1.25,
            ).divergence
            for t in (teacher, wide)
        ]
        assert torch.equal(*results)

    def test_no_tokens(self, generator):
        _, weight, bias, teacher, reference, _ = self.problem(generator)
        hidden = torch.zeros(0, self.D, requires_grad=True)
        out = extrapolated_divergence(
            hidden,
            weight,
            bias,
            labels=torch.zeros(0, dtype=torch.long),
            target_logits=lambda rows: (teacher[rows], reference[rows]),
            gopd_lambda=1.25,
        )
        out.divergence.sum().backward()
        assert weight.grad.abs().max() == 0

    def test_missing_reference_raises(self, generator):
        hidden, weight, bias, teacher, _, labels = self.problem(generator)
        with pytest.raises(ValueError, match="got None. Pass it, or use 1"):
            extrapolated_divergence(
                hidden, weight, bias, labels=labels, target_logits=lambda r: (teacher[r], None), gopd_lambda=1.25
            )


@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_clip_bounds_the_distance_to_the_teacher(clip):
    """|log q_λ/π*| ≤ 2(λ − 1)c for every id."""
    gen = torch.Generator().manual_seed(1)
    teacher, reference = 5 * torch.randn(4, 11, generator=gen), 5 * torch.randn(4, 11, generator=gen)
    for gopd_lambda in (1.25, 2.0):
        log_t, log_r = teacher.log_softmax(-1), reference.log_softmax(-1)
        logits = log_t + (gopd_lambda - 1) * (log_t - log_r).clamp(-clip, clip)
        out = extrapolated_divergence(
            logits.requires_grad_(),
            torch.eye(11),
            None,
            labels=torch.zeros(4, dtype=torch.long),
            target_logits=lambda rows, t=log_t, r=log_r: (t[rows], r[rows]),
            gopd_lambda=gopd_lambda,
            extrapolation_clip=clip,
        )
        assert out.divergence.abs().max() < 30 * EPS * 30  # the student sits at the clipped target
        gap = (logits.log_softmax(-1) - log_t).abs().max()
        assert gap <= 2 * (gopd_lambda - 1) * clip + 4 * EPS * 30


class MatrixProducts(TorchDispatchMode):
    """Records the dtypes of both factors of each matrix product."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes.append(tuple(factor.dtype for factor in args[-2:]))
        return func(*args, **(kwargs or {}))


class TestPrecision:
    """The head has the dtype that autocast would give it, in the backward pass too, which runs outside of it."""

    N, D, V, CHUNKS = 7, 5, 37, 3

    def problem(self, dtype=torch.float32):
        gen = torch.Generator().manual_seed(0)
        shapes = ((self.N, self.D), (self.V, self.D), (self.V,))
        parameters = [draw(*shape, generator=gen).to(dtype).requires_grad_() for shape in shapes]
        self.teacher, self.reference = (draw(self.N, self.V, generator=gen) for _ in range(2))
        self.labels = torch.randint(self.V, (self.N,), generator=gen)
        return parameters

    def estimate(self, parameters, estimator):
        options = {"labels": self.labels, "gopd_lambda": 1.25, "chunk_size": 3}
        if estimator == "full":
            return extrapolated_divergence(
                *parameters, target_logits=lambda rows: (self.teacher[rows], self.reference[rows]), **options
            )
        logits = (self.teacher, self.reference)
        return stratified_divergence(
            *parameters,
            target_logps=lambda rows, ids: tuple(log_probs_at(z[rows], ids) for z in logits),
            top_k=4,
            **options,
        )

    @pytest.mark.parametrize("estimator", ["full", "stratified"])
    @pytest.mark.parametrize("own", [torch.float32, torch.float16])
    def test_autocast_decides(self, estimator, own):
        """One product a chunk in the forward pass, three in the backward pass; gradients in the parameters' dtype."""
        parameters = self.problem(own)
        with MatrixProducts() as forward, torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.estimate(parameters, estimator)
        with MatrixProducts() as backward:
            grads = torch.autograd.grad(out.divergence.sum(), parameters)
        assert forward.dtypes == [(torch.bfloat16, torch.bfloat16)] * self.CHUNKS
        assert backward.dtypes == [(torch.bfloat16, torch.bfloat16)] * 3 * self.CHUNKS
        assert out.divergence.dtype == torch.float32
        assert {grad.dtype for grad in grads} == {own}

    @pytest.mark.parametrize("estimator", ["full", "stratified"])
    def test_autocast_equals_casts(self, estimator):
        parameters = self.problem()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = self.estimate(parameters, estimator)
        want = self.estimate([x.bfloat16() for x in parameters], estimator)
        for name in vars(want):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        of_got, of_want = (torch.autograd.grad(out.divergence.sum(), parameters) for out in (got, want))
        assert torch.equal(of_got[0], of_want[0])
        for a, b in zip(of_got[1:], of_want[1:], strict=True):
            # The cast's gradient is rounded to bfloat16. Sums over chunks are in float32 in both.
            assert torch.equal(a.bfloat16().float(), b)
            assert not torch.equal(a, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_without_autocast_it_is_that_of_the_hidden_states(self, dtype):
        hidden, weight, bias = self.problem()
        parameters = hidden.to(dtype).detach().requires_grad_(), weight, bias
        with MatrixProducts() as products:
            out = self.estimate(parameters, "full")
            grads = torch.autograd.grad(out.divergence.sum(), parameters)
        assert set(products.dtypes) == {(dtype, dtype)}
        assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]

    def test_autocast_leaves_float64_alone(self):
        """As torch's own does."""
        parameters = self.problem(torch.float64)
        with MatrixProducts() as products, torch.autocast("cpu", dtype=torch.bfloat16):
            self.estimate(parameters, "full")
        assert set(products.dtypes) == {(torch.float64, torch.float64)}

    def test_gradients_add_up_in_float32(self):
        """512 equal chunks: in bfloat16 the sum would stop moving at 256 times one of them."""
        hidden = torch.ones(1, 1).bfloat16().expand(512, 1).contiguous()
        weight = torch.tensor([[1.0], [-1.0]]).bfloat16().requires_grad_()
        bias = torch.zeros(2).bfloat16().requires_grad_()

        def gradients(tokens):
            out = extrapolated_divergence(
                hidden[:tokens],
                weight,
                bias,
                labels=torch.zeros(tokens, dtype=torch.long),
                target_logits=lambda rows: (torch.zeros(rows.stop - rows.start, 2), None),
                gopd_lambda=1.0,
                chunk_size=1,
            )
            return torch.autograd.grad(out.divergence.sum(), (weight, bias))

        for whole, one in zip(gradients(512), gradients(1), strict=True):
            assert torch.equal(whole, 512 * one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_to_a_total(dtype, generator):
    left, right = draw(3, 5, generator=generator, dtype=dtype), draw(5, 4, generator=generator, dtype=dtype)
    total = draw(3, 4, generator=generator)
    want = total.double() + left.double() @ right.double()
    _add_product(total, left, right)
    # the product is rounded to its dtype, after and before five sums in float32 or better
    atol = torch.finfo(dtype).eps * float((left.abs() @ right.abs()).max()) + 6 * torch.finfo(torch.float32).eps * 10
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), want, rtol=0, atol=atol)


class TestAddLabelGradient:
    def test_closed_form(self):
        """factor·(1{v = y} − π_v), for labels that the student can have."""
        probs = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.25, 0.5, 0.25]])
        labels, factors = torch.tensor([[2], [1], [2], [3]]), torch.tensor([[2.0], [4.0], [8.0], [16.0]])
        got = add_label_gradient(torch.ones(4, 3), probs, labels, factors)
        assert got.tolist() == [
            [1 - 1.0, 1 - 0.5, 1 + 1.5],
            [1 - 2.0, 1 + 2.0, 1.0],
            [1.0, 1.0, 1.0],  # the student gives it the probability 0
            [1.0, 1.0, 1.0],  # the first id beyond the vocabulary
        ]

    def test_vocabulary_of_one_id(self):
        probs, labels = torch.ones(2, 1), torch.tensor([[0], [1]])
        assert add_label_gradient(torch.zeros(2, 1), probs, labels, torch.ones(2, 1)).tolist() == [[0.0], [0.0]]


class TestChunkSlices:
    @pytest.mark.parametrize(
        ("length", "expected"), [(0, []), (2, [(0, 2)]), (3, [(0, 3)]), (7, [(0, 3), (3, 6), (6, 7)])]
    )
    def test_cover_the_whole_once(self, length, expected):
        assert [(part.start, part.stop) for part in chunk_slices(length, 3)] == expected
