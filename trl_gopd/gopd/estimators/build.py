"""Picks the estimator that the configuration names."""

from typing import Any

from ..config import GOPDConfig
from ..frozen.build import FrozenModels
from ..frozen.head import logit_transform
from .full import FullEstimator
from .protocol import Estimator
from .sampled import SampledEstimator
from .stratified import StratifiedEstimator


def build_estimator(
    args: GOPDConfig, frozen: FrozenModels, *, student_config: Any, mixes_lambda: bool, asks_servers: bool
) -> Estimator:
    """
    The estimator of a run.

    Args:
        args ([`GOPDConfig`]):
            Configuration of the run.
        frozen ([`FrozenModels`]):
            Teachers and references.
        student_config ([`~transformers.PreTrainedConfig`]):
            Configuration of the student.
        mixes_lambda (`bool`):
            Whether rows may differ in λ.
        asks_servers (`bool`):
            Whether the ids of "stratified" are those that servers find likeliest.
    """
    clip, discount = args.gopd_extrapolation_clip, args.gopd_discount
    if args.gopd_estimator == "sampled":
        return SampledEstimator(
            frozen, mixes_lambda, discount, clip, args.gopd_deterministic_above, args.gopd_needs_agreement
        )
    transform = logit_transform(student_config, args.temperature)
    if args.gopd_estimator == "full":
        return FullEstimator(frozen, transform, mixes_lambda, discount, clip, args.gopd_chunk_size)
    top_k = None if asks_servers else args.gopd_top_k
    return StratifiedEstimator(frozen, transform, top_k, mixes_lambda, discount, clip, args.gopd_chunk_size)
