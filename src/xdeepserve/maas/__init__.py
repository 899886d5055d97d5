"""The Tokens service: the OpenAI-compatible HTTP edge over an EngineClient."""
