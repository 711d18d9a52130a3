"""Generalized On-Policy Distillation (https://huggingface.co/papers/2602.12125)."""
