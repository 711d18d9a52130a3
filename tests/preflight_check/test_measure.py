"""
What each λ does at a state: closed forms on small vocabularies.

- log Z_λ = (λ − 1)·D_λ by enumeration; the limit of D_λ at 1 is KL(T ‖ R); D_λ does not fall as λ grows.
- Teacher = reference makes λ irrelevant.
"""

import torch

from trl_gopd.preflight_check.measure import lambda_effects


EPS = torch.finfo(torch.float32).eps
TEACHER, REFERENCE = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
GRID = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0)


def logps(generator, rows=4, vocab=37):
    return torch.randn(rows, vocab, generator=generator).mul(2).log_softmax(-1)


def effects(teacher, reference, lambdas, eos_ids=()):
    return lambda_effects(teacher_logps=teacher, reference_logps=reference, lambdas=lambdas, eos_ids=eos_ids)


class TestLambdaEffects:
    def test_closed_forms(self):
        values = effects(TEACHER.log().unsqueeze(0), REFERENCE.log().unsqueeze(0), GRID, eos_ids=[2])
        assert set(values) == {
            *("renyi", "log_z", "kl_to_teacher", "entropy", "eos_probability", "flips", "off_teacher_mass")
        }
        for index, gopd_lambda in enumerate(GRID):
            weights = TEACHER.double() ** gopd_lambda * REFERENCE.double() ** (1 - gopd_lambda)
            z, q = weights.sum(), weights / weights.sum()
            if gopd_lambda == 1:
                renyi = (TEACHER * (TEACHER / REFERENCE).log()).sum()
            else:
                renyi = z.log() / (gopd_lambda - 1)
            expected = {
                "renyi": renyi,
                "log_z": z.log(),
                "kl_to_teacher": (q * (q / TEACHER).log()).sum(),
                "entropy": -(q * q.log()).sum(),
                "eos_probability": q[2],
                "flips": torch.tensor(float(q.argmax() != 0)),
                "off_teacher_mass": torch.tensor(0.0),
            }
            for name, value in expected.items():
                # a dozen roundings of numbers below 2, divided by |λ − 1| ≥ 1/4
                torch.testing.assert_close(values[name][0, index], value.float(), rtol=0, atol=100 * EPS, msg=name)

    def test_entropies_of_the_worked_example(self):
        lambdas = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0)
        entropy = effects(TEACHER.log().unsqueeze(0), REFERENCE.log().unsqueeze(0), lambdas)["entropy"]
        expected = torch.tensor([[1.030, 1.098, 1.030, 0.953, 0.861, 0.663]])
        torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-3)

    def test_log_z_is_scaled_divergence(self, generator):
        lambdas = (0.25, 0.5, 1.0, 1.25, 2.0, 3.0)
        values = effects(logps(generator), logps(generator), lambdas)
        scale = torch.tensor(lambdas) - 1
        torch.testing.assert_close(values["log_z"], scale * values["renyi"])

    def test_limit_at_one_is_kl(self, generator):
        teacher, reference = logps(generator), logps(generator)
        step = 2**-6
        below, kl, above = effects(teacher, reference, (1 - step, 1.0, 1 + step))["renyi"].T
        assert (below < kl).all() and (kl < above).all()
        # the mean of both sides is off by the second order only: h²/2 · D'' with |D''| below r³, r ≤ 16 nats here
        rewards = (teacher - reference).abs().max()
        assert ((below + above) / 2 - kl).abs().max() < step**2 / 2 * rewards**3

    def test_divergence_does_not_fall_with_lambda(self, generator):
        values = effects(logps(generator, rows=50), logps(generator, rows=50), (0.25, 0.5, 1.0, 1.1, 1.5, 2.0, 4.0))
        assert (values["renyi"].diff(dim=1) > 0).all()

    def test_teacher_equal_to_reference_makes_lambda_irrelevant(self, generator):
        teacher = logps(generator)
        values = effects(teacher, teacher, GRID, eos_ids=[0])
        rounding = 37 * EPS * 4  # of one sum over the vocabulary, divided by |λ − 1| ≥ 1/4
        assert not values["flips"].any()
        for name in ("renyi", "log_z", "kl_to_teacher"):
            assert values[name].abs().max() <= rounding, name
        for name in ("entropy", "eos_probability", "off_teacher_mass"):
            torch.testing.assert_close(values[name], values[name][:, 2:3].expand(-1, len(GRID)))

    def test_flip_and_off_teacher_mass_by_hand(self):
        # At λ = 3 the weights T³/R² are 0.9, 0.097 and 7.29: an id that the teacher hardly ever takes comes first.
        teacher = torch.tensor([[0.9, 0.0991, 0.0009]]).log()
        reference = torch.tensor([[0.9, 0.09999, 1e-5]]).log()
        values = effects(teacher, reference, (1.0, 3.0))
        weights = (teacher.double().exp() ** 3 / reference.double().exp() ** 2)[0]
        assert values["flips"].tolist() == [[0.0, 1.0]]
        expected = torch.tensor([[0.0009, float(weights[2] / weights.sum())]])
        torch.testing.assert_close(values["off_teacher_mass"], expected, rtol=32 * EPS * 12, atol=0)
