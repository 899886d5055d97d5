"""Who may use the service: tenants, their projects, and API keys."""
