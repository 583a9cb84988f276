"""`ckptsvc bench control`: one real coordinator, and as many simulated agents as a large machine has."""
