"""The agent as a process of the machine: limits, the service manager, settings read again, a successor."""
