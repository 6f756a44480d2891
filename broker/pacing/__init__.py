"""The vendor's budget: who mints next, and when."""
