"""Orders of people: who gives them, what becomes of them, which of them last, and the record of it all."""
