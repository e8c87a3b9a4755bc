"""`sdft continual`: tasks taught one after another, and what is kept of them."""
