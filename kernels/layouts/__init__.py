"""Packed layouts."""
