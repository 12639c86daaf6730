"""Adversarial knowledge distillation of diffusion teachers into one-step students (arXiv 2405.20675)."""

__version__ = "0.1.0"
