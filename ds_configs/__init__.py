"""Complete DeepSpeed configurations, one per strategy: what is really loaded."""
