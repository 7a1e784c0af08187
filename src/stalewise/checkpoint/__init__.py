"""Checkpoints on disk: how values become JSON and safetensors, and how a folder of files appears whole or not at all.

What belongs into one is the engine's business, and who writes which file the runtime's. Nothing is unpickled.
"""
