"""Thin modules: parameters and one call."""
