"""xDeepServe: a token service for Mixture-of-Experts language models.

Importing the package does nothing: no device detection, no thread, no heavy import.
Rooms and who may import whom: ARCHITECTURE.md.
"""

__version__ = "0.1.0"
