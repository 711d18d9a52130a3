"""How good, how large and how fast a model is, quantized or not."""

from .quality import Agreement, Perplexity, compare, perplexity
from .resources import Resources, measure
from .size import Storage, storage


__all__ = ["Agreement", "Perplexity", "Resources", "Storage", "compare", "measure", "perplexity", "storage"]
