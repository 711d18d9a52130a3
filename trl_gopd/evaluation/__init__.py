"""Measurement of quality, storage, time and memory of a model, quantized or not."""

from .quality import Agreement, Perplexity, compare, perplexity
from .resources import Resources, measure
from .size import Storage, storage


__all__ = ["Agreement", "Perplexity", "Resources", "Storage", "compare", "measure", "perplexity", "storage"]
