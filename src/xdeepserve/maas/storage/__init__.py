"""The database of the Tokens service: connections, transactions, schema."""
