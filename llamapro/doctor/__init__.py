"""What `llamapro doctor` looks at: this machine, and the hosts of a job together."""
