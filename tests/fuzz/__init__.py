"""Fuzz targets: what strangers, upstreams and people with an editor send, mutated at random, from a fixed seed.

Each target takes 50 000 cases. A refusal is the only other result than success: nothing crashes, hangs, or becomes an
error of the gateway itself.
"""
