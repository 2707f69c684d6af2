"""DeepSpeed: environment, configuration, start, step and named optimizer state. Nothing else imports deepspeed."""
