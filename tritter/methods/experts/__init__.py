"""LoRA experts on a frozen base: adapters mixed per token by a router, grown while training."""
