"""Lossless acceleration of LLM decoding in JAX."""
