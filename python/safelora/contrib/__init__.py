"""Entry points that other fine-tuning stacks load by name; each module needs its stack installed."""
