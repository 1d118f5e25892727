"""Figures: a function each, drawn from tables."""
