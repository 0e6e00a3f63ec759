"""Durable jobs that messages ask for."""
