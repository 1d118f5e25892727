"""CLIP with adapters, the surgery, the registry of methods, training, checkpoints, inference."""
