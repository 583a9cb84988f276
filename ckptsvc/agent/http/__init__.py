"""What an agent serves over HTTP: the status page with its events, reports of incidents, metrics."""
