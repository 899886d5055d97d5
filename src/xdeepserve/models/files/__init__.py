"""Files that hold weights: safetensors, GGUF, written checkpoint folders, the packed cache file.

Model files are untrusted: every length and offset is checked against the file before it is used.
"""
