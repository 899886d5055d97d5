"""The client side: HTTP and SSE client, workloads, `bench serve`, SLO search, terminal chat.

Speaks HTTP to any OpenAI-compatible server and knows nothing of engines or models.
"""
