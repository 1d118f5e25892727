"""Distillation-guided gradient surgery (arXiv 2511.13108) as a reproducible notebook pipeline."""
