"""The admin API: its own listener, its own keys."""
