"""Remembered conversations."""
