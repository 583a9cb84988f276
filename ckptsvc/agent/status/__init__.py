"""What the agent knows of itself and of its jobs, as one document for people and programs."""
