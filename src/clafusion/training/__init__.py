"""Train a fused network further: fine-tuning and distillation."""
