"""What is owed: prices, budgets, and one charge for each request, whatever crashes."""
