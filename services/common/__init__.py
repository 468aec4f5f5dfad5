"""What all services share: settings, logs, health, metrics, and how they start and stop."""
