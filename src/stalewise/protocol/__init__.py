"""The rules of stale pipelines as plain values: no torch, no clock, no input or output."""
