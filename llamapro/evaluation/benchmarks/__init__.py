"""Benchmarks through lm-eval: its task definitions, its prompts, its scoring; programs run in the sandbox.

Nothing else imports lm-eval, and these modules are imported only when a benchmark is asked for.
"""
