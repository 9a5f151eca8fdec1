"""Tests on architectures that people use, and against Zennit."""
