"""LoRA experts on a frozen base: adapters mixed per token by a router, added in training."""
