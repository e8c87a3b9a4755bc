"""Self-Distillation Fine-Tuning (arXiv 2601.19897) on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
